"""The second half of a row: what morphgraph makes of an exported model."""

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from entry import Entry, Feeds
from file_findings import FileFindings
from findings import BUDGET, TOLERANCE, Findings
from prepare import stored, worst_error

import morphgraph as mg
from morphgraph.arrays import IntArray
from morphgraph.errors import MorphError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.model import frozen_names
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking.compare import kept
from morphgraph.passes.rewrite.mask import mask
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import wrong_slices
from morphgraph.tolerances import RESIZED as REJECTED
from morphgraph.torch_io.to_torch import flat_network

T = TypeVar("T")
Arrays = list[np.ndarray[Any, Any]]


class Examination:
    """Puts one model through every check; ``found`` is up to date after every stage."""

    def __init__(self, entry: Entry, note: Callable[[Findings], None]) -> None:
        self.entry = entry
        self.note = note
        self.found = Findings(entry.name, entry.family, structure_only=entry.structure_only)

    def run(self) -> Findings:
        """Everything that can be found out; a stage that fails ends those that need it."""
        found = self.found
        model, feeds, outputs, prepared = stored(self.entry)
        found.route, found.export_note = prepared.route, prepared.note
        found.seconds |= {stage: round(s, 3) for stage, s in prepared.seconds.items()}
        found.rounding, found.torch_macs = prepared.rounding, prepared.torch_macs
        found.memory_mib["prepare"] = prepared.memory_mib
        found.nodes = len(model.graph)
        self.note(found)
        original = None
        if not self.entry.structure_only:
            original = self.attempt("run", lambda: list(run(model, feeds).values()))
            if original is not None:
                found.export_error = worst_error(original, outputs)
        graph = self.attempt("lift", lambda: mg.lift(model))
        if graph is not None:
            small = self._resize(graph)
            if small is not None and original is not None:
                self._verify(graph, *small, feeds, original)
        if original is not None:
            self.attempt("to_torch", lambda: self._to_torch("base", model, feeds, original))
        return found

    def attempt(self, stage: str, action: Callable[[], T]) -> T | None:
        """Do it; an error becomes a finding."""
        try:
            with self._clock(stage):
                return action()
        except Exception as error:  # noqa: BLE001 - whatever fails is what is looked for
            words = str(error).strip().splitlines() or [""]
            kind = "" if isinstance(error, MorphError) else f"{type(error).__name__}: "
            self.found.crashes[stage] = kind + words[0][:400]
            return None
        finally:
            self.note(self.found)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.found.seconds[stage] = round(self.found.seconds.get(stage, 0.0) + spent, 3)

    def _resize(self, graph: ChannelGraph) -> tuple[mg.Plan, ir.Model] | None:
        found = self.found
        macs = self.attempt("cost", lambda: mg.cost(graph, "macs"))
        if macs is None:
            return None
        found.macs = macs.total
        self.attempt("describe", lambda: describe(found, graph))
        found.target = max(BUDGET, found.lowest)
        budget = f"{BUDGET:.0%}" if found.lowest <= BUDGET else 2 * macs.total * found.lowest
        plan = self.attempt(
            "plan", lambda: mg.plan(graph, {"flops": budget}, score="random", seed=0)
        )
        if plan is None:
            return None
        change = plan.cost["flops"]
        found.ratio = change.after / change.before
        found.coarsest = coarsest(graph, plan)
        small = self.attempt("resize", lambda: resize(graph, plan.keep_channels(graph)))
        if small is None:
            return None
        self.attempt("check", lambda: self._check(small))
        return plan, small

    def _check(self, small: ir.Model) -> None:
        if not self.entry.structure_only:
            onnx.checker.check_model(ir.to_proto(small), full_check=True)
        self.found.recounted = mg.cost(mg.lift(small), "flops").total / (2 * self.found.macs)

    def _verify(
        self, graph: ChannelGraph, plan: mg.Plan, small: ir.Model, feeds: Feeds, original: Arrays
    ) -> None:
        found = self.found
        keep = plan.keep_channels(graph)
        expected = self.attempt("mask", lambda: list(run(mask(graph, keep), feeds).values()))
        names = [value.name or "" for value in graph.model.graph.outputs]
        feeds = cut(graph, keep, feeds)
        results = self.attempt("verify", lambda: list(run(small, feeds).values()))
        if expected is not None and results is not None:
            found.felt = worst_error(original, expected)
            expected = list(cut(graph, keep, dict(zip(names, expected, strict=True))).values())
            found.error = worst_error(results, expected)
            self.attempt("plant", lambda: self._plant(graph, plan, small, feeds, expected))
        if results is not None:
            self.attempt("to_torch", lambda: self._to_torch("resized", small, feeds, results))

    def _plant(
        self, graph: ChannelGraph, plan: mg.Plan, small: ir.Model, feeds: Feeds, expected: Arrays
    ) -> None:
        for kernel, fault, broken in _faults(graph, plan, small):
            rejected = _is_rejected(broken, feeds, expected)
            if rejected or _is_rejected(_strengthened(small, kernel), feeds, expected):
                self.found.planted += 1
                if not rejected:
                    self.found.passed_wrongly.append(fault)

    def _to_torch(self, which: str, model: ir.Model, feeds: Feeds, expected: Arrays) -> None:
        net = flat_network(model)
        names = [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
        inputs = [torch.from_numpy(feeds[name].copy()) for name in names]
        outputs = net(*inputs)
        tensors = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        found = [tensor.detach().numpy() for tensor in tensors]
        error = worst_error(found, expected)
        if not error <= TOLERANCE:
            # PyTorch's fast convolutions may round that much; float64 tells it from an error.
            error = worst_error(expected, _exact(net, inputs))
            self.found.in_float64.append(which)
        self.found.torch_errors[which] = error
        trained = [t for t in tensors if t.is_floating_point() and t.requires_grad]
        sum((t.square().sum() for t in trained), torch.zeros(())).backward()
        frozen = frozen_names(model)
        self.found.without_gradient += [
            f"{name} ({which})"
            for name, parameter in net.named_parameters()
            if parameter.grad is None and name not in frozen
        ]


def cut(
    graph: ChannelGraph, keep: Mapping[int, IntArray], arrays: Mapping[str, Any]
) -> dict[str, Any]:
    """Inputs or outputs by name as a resized network has them: heads of caches go."""
    selection = AxisSelection(graph, keep)
    return {
        name: kept(selection, name, array) if isinstance(array, np.ndarray) else array
        for name, array in arrays.items()
    }


def _exact(net: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Arrays:
    """What the network computes in float64."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        outputs = copy.deepcopy(net).double()(*wide)
    return [t.numpy() for t in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]


def coarsest(graph: ChannelGraph, plan: mg.Plan) -> str:
    """The group of which one channel frees the largest share of the MACs under a plan."""
    macs = mg.cost(graph, "macs")
    shares = macs.gradient(plan.widths(graph)) / macs.total
    group = graph.groups[int(np.argmax(shares))]
    return f"one channel of '{group.name}' is {shares.max():.1%} of the MACs"


def describe(found: Findings, graph: ChannelGraph) -> None:
    """Groups, what can shrink, and what cannot and why."""
    found.statistical = sum(group.statistical for group in graph.groups if group.resizable)
    found.params = mg.cost(graph, "params").total
    describe_groups(found, graph)


def describe_groups(found: Findings | FileFindings, graph: ChannelGraph) -> None:
    """What networks and files of others have in common of that."""
    free = [group for group in graph.groups if group.resizable]
    found.groups, found.resizable = len(graph.groups), len(free)
    found.binding = fixed_shares(graph)
    found.shrinkable = 1 - sum(found.binding.values())
    floor = np.array([1 if group.resizable else group.width for group in graph.groups])
    macs = mg.cost(graph, "macs")
    found.lowest = macs.at(floor) / macs.total if macs.total else 1.0
    reasons = Counter(group.reason for group in graph.groups if group.reason is not None)
    found.pinned = dict(sorted(reasons.items()))
    ops = Counter(f"{node.ir.op_type}: {node.opaque}" for node in graph.ops if node.opaque)
    found.opaque = dict(sorted(ops.items()))


def fixed_shares(graph: ChannelGraph) -> dict[str, float]:
    """Share of the MACs in terms of which no factor can shrink, by the reasons of their groups."""
    widths = graph.per_channel
    free = [group.index for group in graph.groups if group.resizable and group.width > 1]
    varies = np.asarray(widths[:, free].sum(axis=1)).reshape(-1) > 0
    total = 0.0
    fixed: dict[str, float] = defaultdict(float)
    for node in graph.ops:
        for term in node.macs:
            size = float(np.prod(graph.couplings.sizes[list(term)], dtype=np.float64))
            total += size
            classes = graph.vertex_class[list(term)]
            if not varies[classes].any():
                fixed[_reasons(graph, classes)] += size
    return {reason: size / total for reason, size in fixed.items()} if total else {}


def _reasons(graph: ChannelGraph, classes: np.ndarray[Any, Any]) -> str:
    """Why none of these classes can shrink."""
    touched = np.unique(graph.per_channel[np.unique(classes)].indices)
    reasons = {graph.groups[index].reason or "a single channel" for index in touched}
    return " and ".join(sorted(reasons)) or "no channels, only batch and space"


def _is_rejected(broken: ir.Model, feeds: Feeds, expected: Arrays) -> bool:
    try:
        return worst_error(list(run(broken, feeds).values()), expected) > REJECTED
    except MorphError:
        return True


def _strengthened(small: ir.Model, kernel: str) -> ir.Model:
    """With a kernel a tenth larger: where that makes no difference, its channels are silent.

    (A ReLU that passes nothing, say.) What is wrong there cannot be seen on these inputs.
    """
    changed = small.clone()
    value = changed.graph.initializers[kernel]
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.Tensor((array * 1.1).astype(array.dtype), name=kernel)
    return changed


def _faults(
    graph: ChannelGraph, plan: mg.Plan, small: ir.Model, kernels: int = 3
) -> list[tuple[str, str, ir.Model]]:
    """Wrong slices of a few kernels, one for each axis: the kernel, the fault, the model."""
    generator = np.random.default_rng(0)
    old, new = graph.model.graph.initializers, small.graph.initializers
    sliced = [
        name
        for name, value in old.items()
        if name in new and value.shape is not None and value.shape != new[name].shape
    ]
    sliced = [name for name in sliced if len(old[name].shape or ()) > 1] or sliced
    chosen = generator.choice(sliced, min(kernels, len(sliced)), replace=False).tolist()
    per_axis: dict[tuple[str, str], tuple[str, str, ir.Model]] = {}
    for fault, broken in wrong_slices(graph, plan.keep_channels(graph), small, chosen):
        name, _, axis, _ = fault.split(" ", 3)
        per_axis.setdefault((name, axis), (name, fault, broken))
    return list(per_axis.values())
