"""Pass ``absorb``: removed channels that were constant move into the next bias.

A channel whose BatchNorm scale is exactly 0 still gives its shift, one whose kernel is 0 its bias.
Dropping it changes the network by that constant. Here it is found out which positions of which axes
depend on the graph's inputs, what the others hold, and what they contribute to each operator that
sums over them. The resize then adds that contribution where it belongs, so that the result equals
the original as far as such channels are concerned.

The contribution is what the operator gives for the constants alone, all else zero, less what it
gives for zeros. Next to zero padding it differs at the border; there it is a small map whose rows
and columns are repeated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Flags, IntArray
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.graph import ChannelGraph, Edge, GraphOp
from morphgraph.onnx_io import escape, static_shape
from morphgraph.passes.analysis.dependence import dependence
from morphgraph.passes.analysis.evaluate import evaluate
from morphgraph.passes.analysis.liveness import result_names
from morphgraph.passes.rewrite.bias import deduplicate_slices
from morphgraph.passes.rewrite.mask import mask

ABSORBED_KEY = "morphgraph.absorbed"

_ADDITIVE = 1e-4  # of a result's scale, within which an operator counts as linear


@dataclass(frozen=True)
class Absorbed:
    """Which removed channels were constant, and what they contribute.

    Attributes:
        graph: the network.
        channels: which channels are absorbed, ``[channels]``.
        contributions: per place of a node in ``graph.ops`` what its result gets, at the
            original size, for one sample.
        free: per such node the axes of its result that a plan may resize.
        refused: in words, what was constant and could not be absorbed.
    """

    graph: ChannelGraph
    channels: Flags
    contributions: Mapping[int, Array] = field(default_factory=dict)
    free: Mapping[int, frozenset[int]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def note_in(self, model: ir.Model) -> None:
        """Say in a resized model's metadata which channels it has absorbed, for ``verify``."""
        listed = {self.graph.groups[k].id: v.tolist() for k, v in self.positions().items()}
        model.metadata_props.pop(ABSORBED_KEY, None)
        if listed:
            model.metadata_props[ABSORBED_KEY] = json.dumps(listed)

    def positions(self) -> dict[int, IntArray]:
        """Per group index the channels that are absorbed, 0-based, ascending."""
        return {
            group.index: np.flatnonzero(self.channels[group.channels])
            for group in self.graph.groups
            if self.channels[group.channels].any()
        }


def absorb(graph: ChannelGraph, keep: Mapping[int, IntArray]) -> Absorbed:
    """What removed channels that are constant contribute to what stays.

    Args:
        graph: the lifted network, with the weights that are resized.
        keep: per group index the channels that stay, ascending; groups left out stay whole.

    Raises:
        UnsupportedError: ONNX Runtime does not run the model.
    """
    return _Absorber(graph, keep).run()


def nothing_absorbed(graph: ChannelGraph) -> Absorbed:
    """What is absorbed where nobody asked for it."""
    return Absorbed(graph, np.zeros(len(graph.channel_group), dtype=bool))


def absorbed_in(graph: ChannelGraph, small: ir.Model) -> dict[int, IntArray]:
    """Per group index the removed channels that a resized model says it has absorbed.

    A model that claims too much is held against the original in those channels, and fails.

    Raises:
        ModelError: what its metadata says does not fit the network.
    """
    try:
        listed = json.loads(small.metadata_props.get(ABSORBED_KEY, "{}"))
        by_id = {group.id: group for group in graph.groups}
        found = {by_id[key].index: np.array(v, dtype=np.int64) for key, v in listed.items()}
        fits = all(
            v.ndim == 1 and ((v >= 0) & (v < graph.groups[k].width)).all() for k, v in found.items()
        )
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
        fits = False
    if not fits:
        raise ModelError(
            f"metadata '{ABSORBED_KEY}' does not fit the original network; resize the model anew"
        )
    return found


def with_channels(
    keep: Mapping[int, IntArray], more: Mapping[int, IntArray]
) -> dict[int, IntArray]:
    """What stays, and some of the removed channels besides."""
    nothing = np.zeros(0, dtype=np.int64)
    return {
        index: np.union1d(kept, more.get(index, nothing)).astype(np.int64)
        for index, kept in keep.items()
    }


class _Absorber:
    def __init__(self, graph: ChannelGraph, keep: Mapping[int, IntArray]) -> None:
        self.graph = graph
        self.keep = keep
        self.removed = ~graph.alive(keep)
        self.refused: dict[str, None] = {}

    def run(self) -> Absorbed:
        depends = dependence(self.graph)
        chosen = self._constant(depends)
        while True:
            contributions, lost = self._contributions(chosen)
            if not lost.any():
                names = {k: result_names(self.graph.ops[k])[0] for k in contributions}
                free = {k: self._free_axes(name) for k, name in names.items()}
                return Absorbed(self.graph, chosen, contributions, free, tuple(self.refused))
            chosen = chosen & ~lost

    def _constant(self, depends: Mapping[str, Sequence[Flags]]) -> Flags:
        """Removed channels that hold constants wherever they are read, ``[channels]``."""
        chosen = np.zeros_like(self.removed)
        varying = np.zeros_like(self.removed)
        for number, edge in self._reads():
            dim = self.graph.couplings.dims[edge.dim]
            channels = self.graph.channels_at(dim.value, dim.axis)
            flags = depends[dim.value][dim.axis]
            chosen[channels] = True
            varying[channels[flags]] = True
            reason = self._obstacle(number, edge)
            if reason is None:
                continue
            if self.removed[np.setdiff1d(channels, channels[flags])].any():
                self._refuse(number, reason)
            varying[channels] = True
        constant: Flags = chosen & self.removed & ~varying
        return constant

    def _refuse(self, number: int, reason: str) -> None:
        node = self.graph.ops[number]
        self.refused[f"{node.ir.op_type} '{escape(node.name)}' {reason}"] = None

    def _reads(self) -> list[tuple[int, Edge]]:
        """The edges at which removed channels of activations are summed or compete."""
        couplings = self.graph.couplings
        found = []
        for number, node in enumerate(self.graph.ops):
            for edge in self.graph.edges_of(number):
                name = couplings.factors[edge.factor - len(couplings.dims)].name
                value = couplings.dims[edge.dim].value
                read = edge.port >= 0 and name in node.contracted | node.statistical
                if not read or value in couplings.input_independent:
                    continue
                if self.removed[self.graph.channels_of(edge.dim)].any():
                    found.append((number, edge))
        return found

    def _obstacle(self, number: int, edge: Edge) -> str | None:
        """Why a node cannot be given a constant contribution; ``None``: it can."""
        node = self.graph.ops[number]
        couplings = self.graph.couplings
        if couplings.factors[edge.factor - len(couplings.dims)].name in node.statistical:
            return "averages, normalizes or competes over it"
        others = [
            value.name
            for port, value in enumerate(node.ir.inputs)
            if value is not None
            and port != edge.port
            and value.name not in couplings.input_independent
        ]
        if others or node.captured:
            return "multiplies it with another activation"
        if len(result_names(node)) != 1:
            return "has several results"
        return None

    # -- contributions ------------------------------------------------------------------------

    def _contributions(self, chosen: Flags) -> tuple[dict[int, Array], Flags]:
        """Per node what constants contribute, and the channels for which that cannot be added."""
        lost = np.zeros_like(chosen)
        readers: dict[int, list[Edge]] = {}
        for number, edge in self._reads():
            if chosen[self.graph.channels_of(edge.dim)].any():
                readers.setdefault(number, []).append(edge)
        if not readers:
            return {}, lost
        values = self._values(chosen, readers)
        found: dict[int, Array] = {}
        for number, edges in readers.items():
            operand = self.graph.couplings.dims[edges[0].dim].value
            constants = np.zeros_like(values[operand])
            for edge in edges:
                dim = self.graph.couplings.dims[edge.dim]
                here = np.moveaxis(constants, dim.axis, 0)
                held = np.moveaxis(values[operand], dim.axis, 0)
                mine = chosen[self.graph.channels_of(edge.dim)]
                here[mine] = held[mine]
            reason = "sums over it in two directions" if len(edges) > 1 else None
            if reason is None and constants.any():
                given, reason = self._given(number, operand, constants)
                if given is not None and given.any():
                    found[number] = given
            if reason is not None:
                self._refuse(number, reason)
                for edge in edges:
                    lost[self.graph.channels_of(edge.dim)] = True
        return found, lost & chosen

    def _values(self, chosen: Flags, readers: Mapping[int, Sequence[Edge]]) -> dict[str, Array]:
        """What the operands hold, in the original with all other removed channels silenced."""
        from morphgraph.onnx_io.runtime import random_inputs, run

        positions = Absorbed(self.graph, chosen).positions()
        model = mask(self.graph, with_channels(self.keep, positions))
        made = {value.name: value for node in model.graph for value in node.outputs}
        made |= {value.name: value for value in model.graph.inputs}
        names = {
            self.graph.couplings.dims[e.dim].value for edges in readers.values() for e in edges
        }
        feeds = random_inputs(self.graph.model)
        listed = {value.name for value in model.graph.outputs}
        model.graph.outputs.extend(made[name] for name in sorted(names - listed - set(feeds)))
        return feeds | run(model, feeds)

    def _given(
        self, number: int, operand: str, constants: Array
    ) -> tuple[Array | None, str | None]:
        """What a node gives for constants beyond what it gives for zeros, or why not."""
        node = self.graph.ops[number]
        noise = np.asarray(
            np.random.default_rng(0).standard_normal(constants.shape), dtype=constants.dtype
        )
        inputs = (np.zeros_like(constants), constants, noise, constants + noise)
        try:
            zero, alone, other, both = (self._run(node, operand, x) for x in inputs)
        except UnsupportedError:
            return None, "is not run by ONNX Runtime"
        scale = float(np.abs(both).max(initial=0.0)) or 1.0
        if np.abs((both - other) - (alone - zero)).max(initial=0.0) > _ADDITIVE * scale:
            return None, "is not linear"
        given = alone - zero
        result = self.graph.shapes[result_names(node)[0]]
        if len(result) > 1 and result[0] == self.graph.batch:
            given = given[:1]
        weights = sum(
            int(np.prod(static_shape(value)))
            for value in node.ir.inputs
            if value is not None and value.name in self.graph.couplings.input_independent
        )
        needed = deduplicate_slices(given, self._free_axes(result_names(node)[0]))[0].size
        if needed > weights:
            return None, f"would need a map of {needed} numbers, more than its {weights} weights"
        return given, None

    def _free_axes(self, value: str) -> frozenset[int]:
        """Axes of a value that a plan may resize; slices there are not shared."""
        rows = np.diff(self.graph.per_channel.indptr)
        first = self.graph.dim(value, 0)
        axes = range(len(self.graph.shapes[value]))
        return frozenset(a for a in axes if rows[self.graph.vertex_class[first + a]])

    def _run(self, node: GraphOp, operand: str, array: Array) -> Array:
        (name,) = result_names(node)
        return evaluate([name], {operand: array}, self.graph.model)[name]
