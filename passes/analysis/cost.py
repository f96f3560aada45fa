"""Costs: what is counted of a network, each as sums of products of factor sizes.

Multiply-adds are products of an operator's factors, parameters and bytes of a value's axes. As
:mod:`morphgraph.passes.analysis.polynomial` calls it, FLOPs, parameters and bytes have one piece; a
roofline's block has two (arithmetic, traffic); peak memory is one block with a piece per moment. In
a weighted sum of costs the blocks stand side by side.

Arithmetic is counted per sample: a term of the whole run is divided by the batch. Constants that
vanished layers have left are no parameters here: how many numbers they need depends on the weights'
values, and a cost depends on the structure alone.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from morphgraph.device import DeviceProfile, load_profile
from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph, analysis
from morphgraph.onnx_io import constant_names, escape, is_unsized, item_bytes, static_shape
from morphgraph.ops import coded_weights, facts_of, weights_of
from morphgraph.options import Convention as Convention
from morphgraph.passes.analysis.channel_sources import kernels as producing_kernels
from morphgraph.passes.analysis.measured import measured_cost
from morphgraph.passes.analysis.polynomial import Cost, Term
from morphgraph.passes.coupling.roles import roles
from morphgraph.words import did_you_mean

#: Peak arithmetic in GFLOP/s and memory bandwidth in GB/s, as MorphNet's device table has them.
DEVICES: Mapping[str, tuple[float, float]] = {
    "K80": (8740, 480),
    "P4": (5500, 192),
    "T4": (8100, 300),
    "P100": (9300, 732),
    "V100": (125000, 900),
    "TPUv2": (22500, 300),
}


_DEVICE = "V100"
_PART = re.compile(
    r"\s*(?:([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*\*)?\s*([A-Za-z_]+(?:@[^\s+*]*)?)\s*"
)

Device = str | PathLike[str] | DeviceProfile
"""A device of :data:`DEVICES`, a measured one, or the file of one."""

_MEASURED: dict[str, DeviceProfile] = {}
"""Measured devices that costs have been asked for, by the name in ``latency@NAME``."""


def device_name(device: Device) -> str:
    """How a cost names a device, ``latency@NAME``.

    Raises:
        FileError: its file cannot be read.
        ModelError: its file is no profile.
        ArgumentError: there is no such device.
    """
    if isinstance(device, str) and (device in DEVICES or device in _MEASURED):
        return device
    profile = device if isinstance(device, DeviceProfile) else _read(device)
    known = next((name for name, other in _MEASURED.items() if other is profile), None)
    if known is None:
        same = (f"{profile.name}-{k}" if k > 1 else profile.name for k in itertools.count(1))
        known = next(name for name in same if name not in _MEASURED)
        _MEASURED[known] = profile
    return known


def cost(
    graph: ChannelGraph,
    kind: str | Mapping[str, float],
    *,
    convention: Convention = "default",
    device: Device = _DEVICE,
) -> Cost:
    """One resource of a network, or a weighted sum of several.

    Args:
        graph: the lifted network.
        kind: ``"macs"`` (multiply-adds), ``"flops"`` (2 x macs), ``"params"`` (numbers),
            ``"body_params"`` (those outside of embeddings, as language models count them),
            ``"weight_bytes"``, ``"memory"`` (bytes of all activations), ``"peak"`` (bytes of the
            activations alive at once), or ``"latency"`` (milliseconds on a roofline:
            max(FLOPs / peak, bytes / bandwidth) per operator, summed; MorphNet), which may name its
            device, ``"latency@P100"``. A sum is spelled ``"flops+20*params"``, or given as
            ``{"flops": 1, "params": 20}``; its unit is that of its parts where they have one in
            common, else ``"mixed units"``.
        convention: ``"morphnet"`` counts kernels only as parameters, and a depthwise operator's
            channel twice in the regularizer.
        device: of a ``"latency"`` that names none: one of :data:`DEVICES`, or a profile that
            :func:`morphgraph.calibrate` has measured, or its file. Of a measured device a latency
            is that of a run at the declared batch, of one sample where the batch is open.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> flops, params, both = (mg.cost(graph, k) for k in ("flops", "params", "flops + 20*params"))
    >>> both.total == flops.total + 20 * params.total
    True
    >>> both.kind, both.unit, mg.cost(graph, {"flops": 1, "params": 20}) is both
    ('flops+20*params', 'mixed units', True)

    Raises:
        ArgumentError: no such cost or device, or a weight that is not above 0.
    """
    return _cost(graph, tuple(parse_cost(kind, device_name(device))), convention)


def _read(path: str | PathLike[str]) -> DeviceProfile:
    """The profile in a file; the same as before where the file has not changed."""
    if not Path(path).suffix:
        raise ArgumentError(
            f"device '{escape(str(path))}' is unknown{did_you_mean(str(path), DEVICES)}; use one "
            f"of {', '.join(DEVICES)}, or the file of a profile that `morphgraph calibrate` has "
            "written"
        )
    profile = load_profile(path)
    same = (other for other in _MEASURED.values() if other.encoded == profile.encoded)
    return next(same, profile)


_Amount = TypeVar("_Amount")


def require_budget(budget: object) -> None:
    """Refuse what is no mapping of costs to amounts.

    Raises:
        ArgumentError: says how a budget is written.
    """
    if not isinstance(budget, Mapping):
        said = "no budget is given" if budget is None else f"{escape(str(budget))} is no budget"
        raise ArgumentError(f"{said}; write one such as {{'flops': '50%'}}")


def on_device(budget: Mapping[str, _Amount], device: Device | None) -> dict[str, _Amount]:
    """A budget whose latency, where it names no device, is on this one.

    >>> on_device({"flops": "50%", "latency": "4ms"}, "P100")
    {'flops': '50%', 'latency@P100': '4ms'}

    Raises:
        ArgumentError: it is no budget, or there is no such device.
    """
    require_budget(budget)
    if device is None:
        return dict(budget)
    name = device_name(device)
    return {f"latency@{name}" if k == "latency" else k: v for k, v in budget.items()}


def is_known_here(kind: str) -> bool:
    """Whether a cost can be counted, and no file is opened for it.

    A plan may name a device of which nobody here has the profile, or anything else.

    >>> [is_known_here(kind) for kind in ("flops", "latency@P100", "latency@nobodys", "beauty")]
    [True, True, False, False]
    """
    devices = [part.partition("@")[2].strip() for part in kind.split("+")]
    if any(name and name not in DEVICES and name not in _MEASURED for name in devices):
        return False
    try:
        return bool(parse_cost(kind))
    except ArgumentError:
        return False


def measured_device(name: str) -> DeviceProfile | None:
    """The profile that a cost names; ``None`` of a roofline."""
    return _MEASURED.get(name)


@analysis
def _cost(graph: ChannelGraph, parts: tuple["Part", ...], convention: Convention) -> Cost:
    if len(parts) == 1 and parts[0].weight == 1:
        return _BUILDERS[parts[0].kind](graph, convention, parts[0].device)
    return _sum(graph, parts, convention)


@dataclass(frozen=True, slots=True)
class Part:
    """One resource of a weighted sum; ``device`` is that of a latency, where it is named."""

    weight: float
    kind: str
    device: str = ""


def spelling(parts: Sequence[Part]) -> str:
    """A cost as :func:`cost` takes it, and as ``Cost.kind`` and plan files name it.

    >>> spelling(parse_cost("flops + 20.0 * params"))
    'flops+20*params'
    """
    return "+".join(
        f"{'' if part.weight == 1 else f'{part.weight:.12g}*'}{part.kind}"
        f"{part.device and f'@{part.device}'}"
        for part in parts
    )


def parse_cost(kind: str | Mapping[str, float], device: str = _DEVICE) -> list[Part]:
    """The parts of a cost, spelled or as a mapping from kinds to weights.

    >>> parse_cost("flops+20*params")
    [Part(weight=1.0, kind='flops', device=''), Part(weight=20.0, kind='params', device='')]
    >>> parse_cost({"latency@P100": 1e3})
    [Part(weight=1000.0, kind='latency', device='P100')]

    Raises:
        ArgumentError: no such cost or device, a weight that is not above 0, or a kind twice.
    """
    if isinstance(kind, str):
        words = [_PART.fullmatch(text) for text in re.split(r"(?<![0-9.][eE])\+", kind)]
        weighted = [(float(word[1] or 1), word[2]) for word in words if word]
        if len(weighted) < len(words):
            raise ArgumentError(
                f"cost '{escape(kind)}' cannot be read; write flops, latency@P100 or "
                "flops+20*params"
            )
    else:
        weighted = [(float(weight), name) for name, weight in kind.items()]
    parts = [_part(weight, name, device) for weight, name in weighted]
    if not parts or len({(part.kind, part.device) for part in parts}) < len(parts):
        raise ArgumentError("a sum of costs needs one part at least, and each of them once")
    return parts


def is_arithmetic(kind: str) -> bool:
    """Whether a cost counts multiply-adds alone: what is only added has no share in it.

    >>> is_arithmetic("flops"), is_arithmetic("flops+20*params")
    (True, False)
    """
    return all(part.kind in ("macs", "flops") for part in parse_cost(kind))


def _part(weight: float, name: str, device: str) -> Part:
    kind, at, named = name.partition("@")
    if kind not in _BUILDERS:
        raise ArgumentError(
            f"cost '{escape(kind)}' is unknown{did_you_mean(kind, _BUILDERS)}; use one of "
            f"{', '.join(_BUILDERS)}"
        )
    if at and kind != "latency":
        raise ArgumentError(f"cost '{escape(name)}': only a latency is of a device; write {kind}")
    where = named if at else device
    where = device_name(where)
    if not 0 < weight < math.inf:
        raise ArgumentError(f"cost '{kind}' has weight {weight:g}; give a number above 0")
    names_it = kind == "latency" and (at or device != _DEVICE)
    return Part(weight, kind, where if names_it else "")


def _sum(graph: ChannelGraph, parts: Sequence[Part], convention: Convention) -> Cost:
    """A weighted sum: blocks and pieces of all parts side by side."""
    terms: list[Term] = []
    blocks: list[int] = []
    units = set()
    for part in parts:
        resource = cost(graph, spelling([replace(part, weight=1.0)]), convention=convention)
        if part.device in _MEASURED:
            raise ArgumentError(
                f"cost '{part.kind}@{escape(part.device)}' was measured, and cannot be part of a "
                "sum; give it a budget of its own"
            )
        first = len(blocks)
        blocks += [first + block for block in resource.block_of_piece]
        terms += [
            replace(term, coefficient=part.weight * term.coefficient, piece=first + term.piece)
            for term in resource.terms
        ]
        units.add(resource.unit)
    unit = units.pop() if len(units) == 1 else "mixed units"
    return Cost(graph, spelling(parts), unit, terms, blocks)


def _arithmetic(graph: ChannelGraph, convention: Convention, scale: float) -> list[Term]:
    """The cost terms of every operator, per sample.

    MorphNet's regularizer sums over the channel axes of an operator's activations: a factor counts
    once per operand that has it, and once for the results, however many show it.
    """
    role = roles(graph.couplings)
    axes = np.ones(len(role.op_index), dtype=np.int64)
    if convention == "morphnet":
        axes = np.maximum(1, role.on_activations + (role.on_results > 0))
    return [
        Term(scale / graph.batch, term, op.layer, tuple(axes[list(term)].tolist()), op_index=index)
        for index, op in enumerate(graph.ops)
        for term in op.macs
    ]


def _macs(graph: ChannelGraph, convention: Convention, _device: str) -> Cost:
    return Cost(graph, "macs", "MACs", _arithmetic(graph, convention, 1.0))


def _flops(graph: ChannelGraph, convention: Convention, _device: str) -> Cost:
    return Cost(graph, "flops", "FLOPs", _arithmetic(graph, convention, 2.0))


def _value_term(graph: ChannelGraph, value: ir.Value, scale: float, layer: str) -> Term:
    """The element count of a value, times ``scale``; nothing where its size is not known."""
    shape = static_shape(value)
    name = value.name or ""
    if is_unsized(value):
        return Term(0.0, (), layer, value=name)
    first = graph.couplings.first_dim.get(name)
    if first is None:
        return Term(scale * float(np.prod(shape, dtype=np.float64)), (), layer, value=name)
    return Term(scale, tuple(range(first, first + len(shape))), layer, value=name)


@analysis
def _layers(graph: ChannelGraph) -> dict[str | None, str]:
    return {op.name: op.layer for op in graph.ops}


def _owner(graph: ChannelGraph, value: ir.Value) -> str:
    """The layer that an initializer belongs to: the first that reads it."""
    layers = _layers(graph)
    return next((layers[u.node.name] for u in value.uses() if u.node.name in layers), "")


def _params(graph: ChannelGraph, convention: Convention, _device: str) -> Cost:
    left_over = constant_names(graph.model)
    weights = weights_of(graph.model)
    names: Iterable[str] = [name for name in weights if name not in left_over]
    if convention == "morphnet":
        kernels = {
            op.ir.inputs[1].name for op in graph.ops if op.macs and op.ir.inputs[1] is not None
        }
        kernels |= {source.parameter for source in producing_kernels(graph)}
        names = [name for name in names if name in kernels or _feeds(graph, name, kernels)]
    values = [graph.model.graph.initializers[name] for name in names]
    terms = [
        _value_term(graph, value, weights[value.name or ""], _owner(graph, value))
        for value in values
    ]
    return Cost(graph, "params", "parameters", terms)


def _body_params(graph: ChannelGraph, convention: Convention, device: str) -> Cost:
    """The parameters without tables whose rows are chosen by number, as embeddings are."""
    stored = graph.model.graph.initializers
    tables = {name for name in weights_of(graph.model) if _is_table(stored[name])}
    terms = _params(graph, convention, device).terms
    kept = [term for term in terms if term.value not in tables]
    return Cost(graph, "body_params", "parameters", kept)


def _is_table(value: ir.Value) -> bool:
    """Whether an operator reads rows of a parameter that inputs choose."""
    found = False
    for use in value.uses():
        facts = facts_of(use.node)
        numbers = [v for k, v in enumerate(use.node.inputs) if k not in facts.tables and v]
        constant = all(v.const_value is not None for v in numbers)
        found |= use.idx in facts.tables and not constant
    return found


def _feeds(graph: ChannelGraph, name: str, kernels: set[str | None]) -> bool:
    """Whether a kernel is computed from this parameter (a transposed linear layer's)."""
    value = graph.model.graph.initializers[name]
    outputs = {out.name for use in value.uses() for out in use.node.outputs}
    return bool(outputs & kernels & set(graph.couplings.input_independent))


def _weight_bytes(graph: ChannelGraph, _convention: Convention, _device: str) -> Cost:
    left_over = constant_names(graph.model)
    coded, codes = coded_weights(graph.model)
    terms = [
        _value_term(graph, value, item_bytes(value.dtype), _owner(graph, value))
        for name, value in graph.model.graph.initializers.items()
        if value.dtype is not None and name not in left_over
        if value.dtype.is_floating_point() or name in coded or name in codes
    ]
    return Cost(graph, "weight_bytes", "bytes", terms)


def _activations(graph: ChannelGraph) -> list[tuple[ir.Value, str, int, int]]:
    """Every activation with its layer, the step that makes it and the last that reads it."""
    steps = {op.name: step for step, op in enumerate(graph.ops)}
    end = len(graph.ops) - 1
    outputs = {value.name for value in graph.model.graph.outputs}
    activations = []
    values = [(value, "input", 0) for value in graph.model.graph.inputs]
    for step, op in enumerate(graph.ops):
        values += [(value, op.layer, step) for value in op.ir.outputs]
    for value, layer, step in values:
        if (value.name or "") in graph.couplings.input_independent or not value.name:
            continue
        reads = [steps[use.node.name] for use in value.uses() if use.node.name in steps]
        last = end if value.name in outputs else max(reads, default=step)
        activations.append((value, layer, step, last))
    return activations


def _item_bytes(graph: ChannelGraph, value: ir.Value) -> float:
    return item_bytes(value.dtype) / graph.batch


def _memory(graph: ChannelGraph, _convention: Convention, _device: str) -> Cost:
    terms = [
        _value_term(graph, value, _item_bytes(graph, value), layer)
        for value, layer, _, _ in _activations(graph)
    ]
    return Cost(graph, "memory", "bytes", terms)


def _peak(graph: ChannelGraph, _convention: Convention, _device: str) -> Cost:
    terms = [
        Term(term.coefficient, term.vertices, term.layer, piece=moment, value=term.value)
        for value, layer, step, last in _activations(graph)
        for term in [_value_term(graph, value, _item_bytes(graph, value), layer)]
        for moment in range(step, last + 1)
    ]
    return Cost(graph, "peak", "bytes", terms, [0] * max(1, len(graph.ops)))


def _latency(graph: ChannelGraph, _convention: Convention, device: str) -> Cost:
    if device in _MEASURED:
        resources = [cost(graph, kind) for kind in ("weight_bytes", "memory")]
        return measured_cost(
            graph,
            _MEASURED[device],
            f"latency@{device}",
            lambda widths: sum(resource.polynomial(widths) for resource in resources),
        )
    gflops, gbytes = DEVICES[device or _DEVICE]
    terms: list[Term] = []
    blocks: list[int] = []
    for op_index, op in enumerate(graph.ops):
        if not op.macs:
            continue
        arithmetic = len(blocks)
        blocks += [arithmetic, arithmetic]
        for term in op.macs:
            scale = 2.0 / graph.batch / (gflops * 1e6)
            terms.append(Term(scale, term, op.layer, piece=arithmetic, op_index=op_index))
        for value in (*op.ir.inputs, *op.ir.outputs):
            if value is None or not value.name:
                continue
            weight = value.name in graph.couplings.input_independent
            size = item_bytes(value.dtype)
            scale = (size if weight else size / graph.batch) / (gbytes * 1e6)
            term_ = _value_term(graph, value, scale, op.layer)
            terms.append(
                Term(
                    term_.coefficient,
                    term_.vertices,
                    op.layer,
                    piece=arithmetic + 1,
                    op_index=op_index,
                )
            )
    kind = f"latency@{device}" if device else "latency"
    return Cost(graph, kind, "ms", terms, blocks or (0,))


_BUILDERS = {
    "macs": _macs,
    "flops": _flops,
    "params": _params,
    "body_params": _body_params,
    "weight_bytes": _weight_bytes,
    "memory": _memory,
    "peak": _peak,
    "latency": _latency,
}
