"""Random plans, planted faults, and checks of whole networks at both.

:func:`prove` resizes a model at random plans, compares each result with the masked original, and
checks that models with wrong slices are rejected. It serves tests of new operators as well. Weights
must be such that a removal changes the outputs, see :mod:`morphgraph.testing.random_weights`.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir

from morphgraph.arrays import IntArray
from morphgraph.errors import VerificationError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.least import multiples
from morphgraph.passes.analysis.liveness import is_viable
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking.verdict import VerifyReport
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan, make_plan
from morphgraph.testing.random_weights import random_weight
from morphgraph.tolerances import PROOF_SENSITIVITY

_HEADER = '<ir_version: 10, opset_import: ["": 20]> '


def model_from_text(text: str, inputs: Sequence[str] = ("x",), seed: int = 0) -> ir.Model:
    """A model from ONNX's text form, with random weights.

    A text that does not begin with ``<ir_version: ...>`` is of opset 20. Graph
    inputs other than ``inputs`` become initializers: vectors uniform in 0.5 to 1.5, so that
    they serve as scales and variances too, all others normal with a variance of 1 / fan-in.

    >>> model = model_from_text(
    ...     "net (float[1,3] x, float[3,4] w) => (float[1,4] y) { y = MatMul(x, w) }"
    ... )
    >>> list(model.graph.initializers)
    ['w']
    """
    generator = np.random.default_rng(seed)
    header = "" if text.lstrip().startswith("<") else _HEADER
    model = ir.from_proto(onnx.parser.parse_model(header + text))
    for value in list(model.graph.inputs):
        if value.name in inputs:
            continue
        assert value.shape is not None
        array = random_weight(value.shape.numpy(), generator)
        model.graph.inputs.remove(value)
        dtype = ir.DataType.FLOAT if value.dtype is None else value.dtype
        value.const_value = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=value.name)
        model.graph.register_initializer(value)
    return model


def random_plan(graph: ChannelGraph, seed: int = 0, low: float = 0.3, high: float = 0.8) -> Plan:
    """A plan that keeps a random share, ``low`` to ``high``, of every resizable group.

    At least one channel of a group stays, and where it has two, one goes.
    """
    generator = np.random.default_rng(seed)
    pitches = multiples(graph)
    keep: dict[int, IntArray] = {}
    for group in graph.groups:
        if group.resizable and group.width > 1:
            count = round(generator.uniform(low, high) * group.width)
            pitch = int(pitches[group.index])
            count = min(max(count // pitch * pitch, pitch), group.width - pitch)
            if not count:
                continue
            keep[group.index] = np.sort(generator.choice(group.width, count, replace=False))
    return _planned(graph, keep, {"random": seed})


def random_removal(graph: ChannelGraph, seed: int = 0, deaths: float = 0.3) -> Plan:
    """A random plan that removes about a share ``deaths`` of the removable groups as a whole.

    Of the other groups, half keep all channels and half a random share.
    """
    generator = np.random.default_rng(seed)
    keep = {
        index: channels
        for index, channels in random_plan(graph, seed).keep_channels(graph).items()
        if generator.random() < 0.5
    }
    removed: set[int] = set()
    for index in generator.permutation(len(graph.groups)).tolist():
        removable = graph.groups[index].resizable and is_viable(graph, removed | {index})
        if removable and generator.random() < deaths:
            removed.add(index)
            keep[index] = np.zeros(0, dtype=np.int64)
    return _planned(graph, keep, {"random": seed, "deaths": deaths})


def _planned(graph: ChannelGraph, keep: Mapping[int, IntArray], request: dict[str, Any]) -> Plan:
    return make_plan(graph, keep, request, [cost(graph, unit) for unit in ("flops", "params")])


def wrong_slices(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    small: ir.Model,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, ir.Model]]:
    """Resized models with one fault each, and what the fault is.

    Every initializer axis that was sliced is sliced wrongly once in each way: shifted by one
    position, in another order, and the first positions instead of those that stay. ``names`` are
    the initializers to try, by default all.
    """
    selection = AxisSelection(graph, keep)
    for name, value in graph.model.graph.initializers.items():
        if name not in small.graph.initializers or value.const_value is None:
            continue
        if names is not None and name not in names:
            continue
        array = value.const_value.numpy()
        for axis in range(array.ndim):
            stays = selection.axis(name, axis)
            if stays is None:
                continue
            faults = {
                "shifted": (stays + 1) % array.shape[axis],
                "permuted": np.roll(stays, 1),
                "left behind": np.arange(len(stays)),
            }
            for fault, positions in faults.items():
                if np.array_equal(positions, stays):
                    continue
                wrong = array
                for other in range(array.ndim):
                    chosen = positions if other == axis else selection.axis(name, other)
                    wrong = wrong if chosen is None else np.take(wrong, chosen, axis=other)
                # A fault that happens to pick equal numbers is none.
                right = small.graph.initializers[name].const_value
                if right is None or np.array_equal(wrong, right.numpy()):
                    continue
                broken = small.clone()
                tensor = ir.Tensor(np.ascontiguousarray(wrong), name=name)
                broken.graph.initializers[name].const_value = tensor
                yield f"{name} axis {axis} {fault}", broken


def is_rejected(graph: ChannelGraph, plan: Plan, small: ir.Model) -> bool:
    """Whether verify, or ONNX Runtime itself, refuses a resized model."""
    try:
        return not verify(graph, plan, small).ok
    except VerificationError:
        return True


def prove(
    model: ir.Model | ChannelGraph, seeds: Sequence[int] = (0, 1, 2), faults: int = 12
) -> list[VerifyReport]:
    """Resize at random plans, compare with the masked original, and plant wrong slices.

    Args:
        model: a model, or its graph, in whose outputs a removal shows.
        seeds: one random plan each.
        faults: how many wrong slices are planted per plan at most, spread over the network.

    Returns:
        The report of every plan.

    Raises:
        AssertionError: nothing shrinks, a cost is not what was predicted, a result is off, a
            removal hardly changes the outputs (then the check has no power), or a wrong slice
            passes.
    """
    graph = model if isinstance(model, ChannelGraph) else lift(model)
    return [
        prove_plan(graph, random_plan(graph, seed), faults=faults, label=f"seed {seed}")
        for seed in seeds
    ]


def prove_plan(
    graph: ChannelGraph, plan: Plan, *, faults: int = 12, label: str = "plan"
) -> VerifyReport:
    """The same for one plan, which states its cost in FLOPs and parameters.

    Raises:
        AssertionError: as :func:`prove`; ``label`` begins the message.
    """
    assert plan.groups, "nothing in this model can be resized"
    keep = plan.keep_channels(graph)
    small = resize(graph, keep)
    report = verify(graph, plan, small)
    assert report.ok, f"{label}: {report.worst}"
    assert report.sensitivity > PROOF_SENSITIVITY, f"{label}: the outputs hardly change: {report}"
    again = lift(small)
    for unit, change in plan.cost.items():
        recounted = cost(again, unit).total
        assert recounted == change.after, f"{unit}: predicted {change.after}, is {recounted}"
    planted = list(wrong_slices(graph, keep, small))
    step = max(1, math.ceil(len(planted) / faults))
    for fault, broken in planted[::step]:
        assert is_rejected(graph, plan, broken), f"{label}: not rejected: {fault}"
    return report
