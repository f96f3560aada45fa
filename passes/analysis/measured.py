"""Latency on a device that was measured: a run time as a function of the group widths.

The runtime is asked once which kernels it makes of the network and on what sizes they run. A
kernel's time then follows its sizes as the device's profile has them: a staircase, no polynomial.
What a channel costs is therefore the secant over a block of channels, not a slope.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from morphgraph.arrays import Arrays, FloatArray, IntArray, Shape
from morphgraph.device import DeviceProfile, Kernel
from morphgraph.device.kernels import BYTES, around, channels_of_a_group, reads_all
from morphgraph.device.predictor import ENOUGH, UNKNOWN
from morphgraph.device.profile import TABLE
from morphgraph.errors import MorphWarning
from morphgraph.graph import ChannelGraph, GraphOp, analysis
from morphgraph.onnx_io import escape, static_shape
from morphgraph.onnx_io.runtime import random_inputs
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.passes.analysis.polynomial import Cost, Part
from morphgraph.runtimes import Executed, find_runtime
from morphgraph.runtimes.host import processor, version_of

MILLISECONDS = 1e-3
_GUESSED = 0.3
"""Share of a network's time that may be of kernels which were hardly measured, without a word."""
_UNSURE = 0.25
"""Error of kinds of kernels, each by its share of the time, that may be without a word."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A kernel of a network, and the operator whose sizes it follows.

    Attributes:
        kernel: as it runs at the present widths.
        op: index of the operator in the graph; -1 for none, whose time stays.
        layer: that it counts for.
        beside: it is no kernel of the operator's own, but changes the layout of what that reads, or
            is a step on the way to its result.
    """

    kernel: Kernel
    op: int
    layer: str
    beside: bool = False


class MeasuredCost(Cost):
    """Milliseconds of a run on a measured device, as a function of the group widths.

    Args:
        graph: the lifted network.
        profile: of the device.
        kernels: of the network, as the runtime executes them.
        kind: how budgets spell it.
        size: bytes of the network's weights and results at some widths.

    Attributes:
        kernels: with the operators that they follow.
        groups_of: by kernel the indices of the groups that its sizes depend on.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        profile: DeviceProfile,
        kernels: Sequence[Placed],
        kind: str,
        size: Callable[[IntArray], float],
    ) -> None:
        self.graph, self.profile, self.kernels = graph, profile, tuple(kernels)
        self.kind, self.unit = kind, "ms"
        self.terms, self.block_of_piece = (), (0,)
        self._sizes_of = [_operands(graph, each.op) for each in kernels]
        self.groups_of = [
            sorted({g for size in sizes for v in size if v >= 0 for g in graph.groups_on(v)})
            for sizes in self._sizes_of
        ]
        self._by_group: dict[int, list[int]] = {}
        for place, groups in enumerate(self.groups_of):
            for group in groups:
                self._by_group.setdefault(group, []).append(place)
        self._known: list[dict[tuple[float, ...], float]] = [{} for _ in kernels]
        self._size = size
        self._passes = BYTES * sum(each.kernel.passes() for each in kernels)
        near = self._around(graph.widths)
        now = [replace(each.kernel, around=near) for each in kernels]
        self._now = profile.predictor.times(now) * MILLISECONDS
        self._live: dict[frozenset[int], AbstractSet[int]] = {}
        #: Kernels that the runtime has laid out by rules that the measurements do not show.
        self._as_told = frozenset(
            place
            for place, each in enumerate(kernels)
            if self._laid_out(self._sized(place, graph.widths, near)).layout != each.kernel.layout
        )
        # Sizes that the graph counts at another batch than the kernels ran on.
        self._base = [self._kernel_at(place, graph.widths, near) for place in range(len(kernels))]

    @property
    def times(self) -> FloatArray:
        """Milliseconds of every kernel at the present widths, ``[kernels]``."""
        return self._now

    @cached_property
    def step(self) -> IntArray:
        """Channels over which every group's price is taken, ``[groups]``."""
        return measured_grids(self)

    def at(self, widths: FloatArray | IntArray) -> float:
        """Milliseconds at these group widths, ``[groups]``."""
        return float(self._times(widths).sum())

    def polynomial(self, widths: FloatArray | IntArray) -> float:
        """The same: nothing here is a polynomial."""
        return self.at(widths)

    def by_layer_at(self, widths: FloatArray | IntArray) -> Mapping[str, float]:
        """Milliseconds of every layer at these widths."""
        layers = dict.fromkeys((op.layer for op in self.graph.ops), 0.0)
        for placed, time in zip(self.kernels, self._times(widths), strict=True):
            layers[placed.layer] = layers.get(placed.layer, 0.0) + float(time)
        return layers

    def gradient(self, widths: FloatArray | IntArray) -> FloatArray:
        """What a channel of every group costs: the secant over a block of them, ``[groups]``."""
        now = np.rint(np.asarray(widths, dtype=np.float64)).astype(np.int64)
        times, near = self._times(now), self._around(now)
        prices = np.zeros(len(now))
        for group, places in self._by_group.items():
            step = min(int(self.step[group]), int(now[group]) - 1)
            other = now.copy()
            if step >= 1:
                other[group] -= step
            else:
                other[group] += max(int(self.step[group]), 1)
            there = sum(self._time_of(place, other, near) for place in places)
            here = float(times[places].sum())
            prices[group] = (there - here) / float(other[group] - now[group])
        return np.maximum(prices, 0.0)

    def marginals(self, widths: FloatArray | IntArray) -> FloatArray:
        """The gradient."""
        return self.gradient(widths)

    def parts(self, widths: IntArray, most: int) -> list[Part] | None:
        """The kernels by the groups that they depend on.

        How much passes through the caches in a whole run is taken from ``widths``: a kernel's time
        depends little on it, and otherwise on a few groups alone.
        """
        live, near = self._ops_live(widths), self._around(widths)
        by_groups: dict[tuple[int, ...], list[int]] = {}
        for place, each in enumerate(self.kernels):
            if each.op < 0 or each.op in live:
                by_groups.setdefault(tuple(self.groups_of[place]), []).append(place)

        def of(groups: tuple[int, ...], places: list[int]) -> Part:
            def at(rows: FloatArray) -> FloatArray:
                every = np.tile(widths, (len(rows), 1))
                every[:, list(groups)] = np.rint(rows)
                self._learn(places, every, near)
                return np.array([sum(self._time_of(p, row, near) for p in places) for row in every])

            return Part(0, groups, at)

        return [of(*each) for each in by_groups.items()] if len(by_groups) <= most else None

    def _times(self, widths: FloatArray | IntArray) -> FloatArray:
        now = np.rint(np.asarray(widths, dtype=np.float64)).astype(np.int64)
        live = self._ops_live(now)
        near = self._around(now)
        self._learn(range(len(self.kernels)), [now], near)
        return np.array(
            [
                self._time_of(place, now, near) if each.op < 0 or each.op in live else 0.0
                for place, each in enumerate(self.kernels)
            ]
        )

    def _ops_live(self, widths: IntArray) -> AbstractSet[int]:
        dead = frozenset(np.flatnonzero(widths == 0).tolist())
        if dead not in self._live:
            every = frozenset(range(len(self.graph.ops)))
            self._live[dead] = liveness(self.graph, dead).live if dead else every
        return self._live[dead]

    def _around(self, widths: IntArray) -> float:
        """Bytes that pass through the caches in a run, in steps."""
        return around(self._passes * self._size(widths) / max(self._size(self.graph.widths), 1.0))

    def _key(self, place: int, widths: IntArray, near: float) -> tuple[float, ...]:
        return (near, *widths[self.groups_of[place]].tolist())

    def _learn(self, places: Iterable[int], widths: Iterable[IntArray], near: float) -> None:
        """Ask the profile for all kernels at once, which costs little more than for one."""
        missing = [
            (place, each)
            for each in widths
            for place in places
            if self.groups_of[place] and self._key(place, each, near) not in self._known[place]
        ]
        if missing:
            kernels = [self._kernel_at(place, each, near) for place, each in missing]
            self.profile.predictor.times([*kernels, *(self._base[place] for place, _ in missing)])

    def _time_of(self, place: int, widths: IntArray, near: float) -> float:
        if not self.groups_of[place]:
            return float(self._now[place])
        key = self._key(place, widths, near)
        known = self._known[place]
        if key not in known:
            if 0 in key[1:]:
                known[key] = 0.0
            else:
                kernels = [self._kernel_at(place, widths, near), self._base[place]]
                there, here = self.profile.predictor.times(kernels)
                known[key] = float(self._now[place] * there / here)
        return known[key]

    def _kernel_at(self, place: int, widths: IntArray, near: float) -> Kernel:
        """The kernel at other widths, in the layout that it has there."""
        kernel = self._sized(place, widths, near)
        return kernel if place in self._as_told else self._laid_out(kernel)

    def _sized(self, place: int, widths: IntArray, near: float) -> Kernel:
        """The kernel as it is laid out now, by the operator's own operands and result."""
        placed = self.kernels[place]
        sizes = self.graph.class_sizes(widths)
        vertices = self._sizes_of[place]
        if placed.op < 0 or not vertices:
            return replace(placed.kernel, around=near)
        op = self.graph.ops[placed.op]
        made = list(op.ir.outputs)
        values = [*(value for value in op.ir.inputs if value is not None), *made]
        shapes = [
            tuple(
                max(round(sizes[self.graph.vertex_class[v]]), 1) if v >= 0 else size
                for v, size in zip(row, static_shape(value), strict=True)
            )
            for row, value in zip(vertices, values, strict=True)
        ]
        kernel = placed.kernel
        before = [static_shape(value) for value in values]
        if placed.beside:  # what it reads and makes is shaped as an operand or a result
            follows = dict(zip(reversed(before), reversed(shapes), strict=True))
            sizes_of = [
                tuple(follows.get(shape, shape) for shape in some)
                for some in (kernel.inputs, kernel.outputs)
            ]
            return replace(kernel, inputs=sizes_of[0], outputs=sizes_of[1], around=near)
        inputs, outputs = shapes[: -len(made)], shapes[-len(made) :]
        # What the kernel gets beside the operator's own operands: a sum that was fused into it.
        follows = dict(zip(before, shapes, strict=True))
        more = [follows.get(shape, shape) for shape in kernel.inputs[len(inputs) :]]
        return replace(kernel, inputs=(*inputs, *more), outputs=(*outputs,), around=near)

    def _laid_out(self, kernel: Kernel) -> Kernel:
        """The kernel in the layout that the runtime gives to these widths."""
        if not kernel.layout or "image" in kernel.kind:
            return kernel
        channels, multiple = kernel.inputs[0][1], self.profile.blocked_multiple
        if kernel.op_type.endswith("Pool"):
            multiple = self.profile.pooled_multiple
        elif each := channels_of_a_group(kernel):
            channels, multiple = each, self.profile.grouped_multiple
        elif channels < self.profile.blocked_below and reads_all(kernel):
            return replace(kernel, layout="blocked")
        if multiple <= 1:
            return kernel
        return replace(kernel, layout="plain" if channels % multiple else "blocked")


def _operands(graph: ChannelGraph, op: int) -> list[Shape]:
    """Per operand and result of an operator the vertex of every axis; -1 where it has none."""
    if op < 0:
        return []
    node = graph.ops[op].ir
    first = graph.couplings.first_dim
    rows = []
    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        rank = len(static_shape(value))
        start = first.get(value.name or "")
        rows.append((-1,) * rank if start is None else tuple(range(start, start + rank)))
    return rows


def measured_grids(cost: MeasuredCost) -> IntArray:
    """The step in which every group's width costs, ``[groups]``: the largest of its kernels'."""
    steps = np.ones(len(cost.graph.groups), dtype=np.int64)
    kinds = cost.profile.predictor.kinds
    for placed, groups in zip(cost.kernels, cost.groups_of, strict=True):
        model = kinds.get(placed.kernel.kind)
        if model is not None:
            for group in groups:
                steps[group] = max(steps[group], model.block)
    return steps


def place_kernels(
    graph: ChannelGraph, executed: Sequence[tuple[Kernel, str, tuple[str, ...]]]
) -> list[Placed]:
    """Kernels with the operators that they follow.

    Args:
        graph: the lifted network.
        executed: kernels in the order of their execution, with the node that each is for, if any,
            and all nodes that it computes; none of a step on the way to a node's result.
    """
    index = {op.name: place for place, op in enumerate(graph.ops)}
    placed: list[Placed] = []
    waiting: list[Kernel] = []
    last = -1
    for kernel, layer, origins in executed:
        names = [layer, *reversed(origins)]
        op = next((index[name] for name in names if name in index), -1)
        if op < 0:
            waiting.append(kernel)  # a change of layout goes with what comes next
            continue
        placed += [_beside(graph, each, op) for each in waiting]
        waiting = []
        placed.append(Placed(kernel, op, graph.ops[op].layer, beside=not origins))
        last = op
    return placed + [_beside(graph, each, last) for each in waiting]


def _beside(graph: ChannelGraph, kernel: Kernel, op: int) -> Placed:
    layer: GraphOp | None = graph.ops[op] if op >= 0 else None
    return Placed(kernel, op, layer.layer if layer else "", beside=True)


@analysis
def measured_cost(
    graph: ChannelGraph, profile: DeviceProfile, kind: str, size: Callable[[IntArray], float]
) -> MeasuredCost:
    """Milliseconds of a run on a measured device: of the batch that is declared, one where open.

    Args:
        graph: the lifted network, whose kernels the profile's runtime is asked for.
        profile: of the device.
        kind: how budgets spell the cost.
        size: bytes of the network's weights and results at some widths.

    Raises:
        UnsupportedError: the runtime does not take the network, or does not tell its kernels.
    """
    runtime = find_runtime(profile.runtime if profile.runtime != TABLE else "ort")
    session = runtime.session(graph.model, profile.threads)
    executed = session.executed(one_sample(graph))
    told = [(kernel_of(each), each.layer, each.origins) for each in executed]
    _warn_of_others(profile, [kernel for kernel, *_ in told])
    measured = MeasuredCost(graph, profile, place_kernels(graph, told), kind, size)
    _warn_of_guesses(profile, measured)
    return measured


def _warn_of_others(profile: DeviceProfile, kernels: Sequence[Kernel]) -> None:
    """Say where a profile is not of this machine, or knows less than this version measures."""
    if profile.runtime == TABLE:
        return
    there = {"processor": profile.machine, **profile.versions}
    here = {"processor": processor(), **version_of(profile.runtime)}
    differ = [name for name in here if there.get(name) and there[name] != here[name]]
    if differ:
        warnings.warn(
            f"device '{escape(profile.name)}': was measured with "
            f"{', '.join(f'{name} {escape(there[name])}' for name in differ)}, and here is "
            f"{', '.join(f'{name} {here[name]}' for name in differ)}: its milliseconds are those "
            "of there; calibrate here (`morphgraph calibrate`) unless the network will run there",
            MorphWarning,
            stacklevel=2,
        )
    fused = sorted({each.activation for each in kernels if each.passes_again})
    if fused and not any(each.activation for each in profile.kernels):
        warnings.warn(
            f"device '{escape(profile.name)}': was measured without what activations cost that are "
            f"fused into kernels, as older versions did, and this network has such "
            f"({', '.join(fused)}): it may take longer than is said; calibrate again "
            "(`morphgraph calibrate`)",
            MorphWarning,
            stacklevel=2,
        )


def _warn_of_guesses(profile: DeviceProfile, cost: MeasuredCost) -> None:
    """Say of which kernels the profile has too few measurements, if much time is theirs."""
    kinds = profile.predictor.kinds
    guessed: dict[str, float] = {}
    for placed, time in zip(cost.kernels, cost.times, strict=True):
        kind = placed.kernel.kind
        if kind not in kinds or kinds[kind].process is None:
            guessed[kind] = guessed.get(kind, 0.0) + float(time)
    share = sum(guessed.values()) / max(float(cost.times.sum()), 1e-12)
    if share > _GUESSED:
        longest = sorted(guessed, key=lambda kind: -guessed[kind])[:3]
        remedy = (
            "add lines to the table"
            if profile.runtime == TABLE
            else "go on with `morphgraph calibrate --resume`, or measure the plan"
        )
        warnings.warn(
            f"device '{escape(profile.name)}': {share:.0%} of the time is of kernels of which "
            f"it has fewer than {ENOUGH} measurements ({', '.join(longest)}), and is "
            f"guessed: {remedy}",
            MorphWarning,
            stacklevel=2,
        )
        return
    # Kinds err apart from each other, kernels of one kind in the same way: what a kind errs by
    # counts in full, and the kinds' errors as their squares.
    errors: dict[str, float] = {}
    for placed, time in zip(cost.kernels, cost.times, strict=True):
        kind = placed.kernel.kind
        error = kinds[kind].error if kind in kinds else UNKNOWN
        errors[kind] = errors.get(kind, 0.0) + error * float(time)
    unsure = math.hypot(*errors.values()) / max(float(cost.times.sum()), 1e-12)
    if unsure > _UNSURE:
        most = max(errors, key=lambda kind: errors[kind])
        warnings.warn(
            f"device '{escape(profile.name)}': its measurements differ from what they say of each "
            f"other, so that the time of this network may be off by {unsure:.0%} (most of it in "
            f"{most}): calibrate again while nothing else runs, or measure the plan",
            MorphWarning,
            stacklevel=2,
        )


def one_sample(graph: ChannelGraph) -> Arrays:
    """Random inputs of the batch that a model declares; of one sample where it is open."""
    feeds = random_inputs(graph.model)
    for value in graph.model.graph.inputs:
        name, shape = value.name or "", value.shape
        if name in feeds and shape is not None and len(shape) and not isinstance(shape[0], int):
            feeds[name] = feeds[name][:1]
    return feeds


def kernel_of(executed: Executed) -> Kernel:
    """A kernel that ran, without its name and time."""
    return Kernel(
        executed.op_type,
        executed.layout or "",
        executed.inputs,
        executed.outputs,
        activation=executed.activation,
    )
