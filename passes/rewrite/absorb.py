"""Pass ``absorb``: removed channels that were constant move into the next bias.

A channel whose BatchNorm scale is exactly 0 still gives its shift, one whose kernel is 0 its bias.
Dropping it changes the network by that constant. This pass computes which channels do not depend on
the graph's inputs, what they hold, and what they contribute to each operator that sums over them.
``resize`` then adds that contribution to the operator's result, which equals the original's as far
as such channels are concerned.

The contribution is what the operator gives for the constants alone, all else zero, less what it
gives for zeros. Next to zero padding it differs at the border; there it is a small map whose rows
and columns are repeated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, Flags, IntArray
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.graph import ChannelGraph, Edge
from morphgraph.onnx_io import ABSORBED_KEY, escape, static_shape
from morphgraph.passes.analysis.dependence import dependence
from morphgraph.passes.analysis.evaluate import evaluate
from morphgraph.passes.analysis.liveness import result_names
from morphgraph.passes.coupling.roles import roles
from morphgraph.passes.rewrite.bias import deduplicate_slices
from morphgraph.passes.rewrite.mask import mask
from morphgraph.tolerances import ADDITIVE


@dataclass(frozen=True)
class Absorbed:
    """Which removed channels were constant, and what they contribute.

    Attributes:
        graph: the network.
        channels: which channels are absorbed, ``[channels]``.
        contributions: per operator, by its index in ``graph.ops``, what is added to its result,
            at the original size, for one sample.
        free: per such operator the axes of its result that a plan may resize.
        refused: which operators read constants that could not be absorbed, and why.
    """

    graph: ChannelGraph
    channels: Flags
    contributions: Mapping[int, Array] = field(default_factory=dict)
    free: Mapping[int, frozenset[int]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def note_in(self, model: ir.Model) -> None:
        """Say in a resized model's metadata which channels it has absorbed, for ``verify``."""
        by_id = {self.graph.groups[k].id: v.tolist() for k, v in self.positions().items()}
        model.metadata_props.pop(ABSORBED_KEY, None)
        if by_id:
            model.metadata_props[ABSORBED_KEY] = json.dumps(by_id)

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
    """No channel absorbed."""
    return Absorbed(graph, np.zeros(len(graph.channel_group), dtype=bool))


def absorbed_in(graph: ChannelGraph, small: ir.Model) -> dict[int, IntArray]:
    """Per group index the removed channels that a resized model says it has absorbed.

    A model that claims too much is held against the original in those channels, and fails.

    Raises:
        ModelError: what its metadata says does not fit the network.
    """
    try:
        listed = json.loads(small.metadata_props.get(ABSORBED_KEY, "{}"))
        index_of = {group.id: group.index for group in graph.groups}
        absorbed = {index_of[key]: np.array(v, dtype=np.int64) for key, v in listed.items()}
        fits = all(
            positions.ndim == 1 and ((positions >= 0) & (positions < graph.groups[k].width)).all()
            for k, positions in absorbed.items()
        )
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
        fits = False
    if not fits:
        raise ModelError(
            f"metadata '{ABSORBED_KEY}' does not fit the original network; resize the model anew"
        )
    return absorbed


def with_channels(
    keep: Mapping[int, IntArray], more: Mapping[int, IntArray]
) -> dict[int, IntArray]:
    """Per group index the channels that stay, and more of them for some groups."""
    return {
        index: np.union1d(positions, more[index]).astype(np.int64) if index in more else positions
        for index, positions in keep.items()
    }


class _RefusedError(Exception):
    """Why an operator cannot be given a contribution; follows its name in a warning."""


class _Absorber:
    def __init__(self, graph: ChannelGraph, keep: Mapping[int, IntArray]) -> None:
        self.graph = graph
        self.keep = keep
        self.removed = ~graph.alive(keep)
        self.refused: dict[str, None] = {}
        couplings, reads = graph.couplings, roles(graph.couplings).reads
        # Where removed channels of activations are summed over, or enter a statistic.
        self.reads = [
            edge
            for edges in couplings.edges_of_ops
            for edge in edges
            if couplings.on_activation(edge)
            and reads[edge.factor]
            and self.removed[graph.channels_of(edge.dim)].any()
        ]

    def run(self) -> Absorbed:
        chosen = self._constant(dependence(self.graph))
        while True:
            # A channel that one reader cannot absorb is masked everywhere. That changes what the
            # others hold, so that all contributions are computed again without it.
            contributions, lost = self._contributions(chosen)
            if not lost.any():
                free = {op_index: self._free_axes(op_index) for op_index in contributions}
                return Absorbed(self.graph, chosen, contributions, free, tuple(self.refused))
            chosen = chosen & ~lost

    def _constant(self, depends: Mapping[str, Sequence[Flags]]) -> Flags:
        """Removed channels that hold constants wherever they are read, ``[channels]``."""
        read = np.zeros_like(self.removed)
        varying = np.zeros_like(self.removed)
        for edge in self.reads:
            dim = self.graph.couplings.dims[edge.dim]
            channels = self.graph.channels_of(edge.dim)
            depending = channels[depends[dim.value][dim.axis]]
            read[channels] = True
            varying[depending] = True
            obstacle = self._obstacle(edge)
            if obstacle is not None:
                if self.removed[np.setdiff1d(channels, depending)].any():
                    self._refuse(edge.op_index, obstacle)
                varying[channels] = True
        constant: Flags = read & self.removed & ~varying
        return constant

    def _refuse(self, op_index: int, reason: str) -> None:
        op = self.graph.ops[op_index]
        self.refused[f"{op.ir.op_type} '{escape(op.name)}' {reason}"] = None

    def _obstacle(self, edge: Edge) -> str | None:
        """Why an operator cannot be given a constant contribution; ``None``: it can."""
        op = self.graph.ops[edge.op_index]
        couplings = self.graph.couplings
        if couplings.factor(edge.factor).name in op.statistical:
            return "averages, normalizes or competes over it"
        others = {v.name for k, v in enumerate(op.ir.inputs) if v is not None and k != edge.port}
        if others - couplings.input_independent or op.captured:
            return "multiplies it with another activation"
        if len(result_names(op)) != 1:
            return "has several results"
        if self._computed_from(others, self.graph.channels_of(edge.dim)):
            return "has a kernel that is computed from all of its channels (by a norm over them)"
        return None

    def _computed_from(self, values: set[str | None], channels: IntArray) -> bool:
        """Whether weights are computed by a sum, or a norm, over removed ones of some channels.

        Without these the others would not be what they are.
        """
        removed = np.zeros_like(self.removed)
        removed[channels] = self.removed[channels]
        pending, seen = list(values), set(values)
        while pending:
            op_index = self.maker_of.get(pending.pop() or "")
            if op_index is None:
                continue
            if any(removed[self.graph.channels_of(e.dim)].any() for e in self.reduced[op_index]):
                return True
            operands = {v.name for v in self.graph.ops[op_index].ir.inputs if v is not None} - seen
            seen |= operands
            pending += operands
        return False

    @cached_property
    def maker_of(self) -> dict[str, int]:
        """By value that is computed from weights alone the operator that makes it."""
        independent = self.graph.couplings.input_independent
        return {
            name: op_index
            for op_index, op in enumerate(self.graph.ops)
            for name in result_names(op)
            if name in independent
        }

    @cached_property
    def reduced(self) -> list[list[Edge]]:
        """Per operator where weights are summed over, or enter a norm."""
        couplings, reads = self.graph.couplings, roles(self.graph.couplings).reads
        return [
            [e for e in edges if reads[e.factor] and not couplings.on_activation(e)]
            for edges in couplings.edges_of_ops
        ]

    # -- contributions ------------------------------------------------------------------------

    def _contributions(self, chosen: Flags) -> tuple[dict[int, Array], Flags]:
        """Per operator what constants contribute, and the channels that it cannot absorb."""
        contributions: dict[int, Array] = {}
        lost = np.zeros_like(chosen)
        readers: dict[int, list[Edge]] = {}
        for edge in self.reads:
            if chosen[self.graph.channels_of(edge.dim)].any():
                readers.setdefault(edge.op_index, []).append(edge)
        values = self._values(chosen, readers) if readers else {}
        for op_index, edges in readers.items():
            try:
                contribution = self._contribution(edges, chosen, values)
            except _RefusedError as refusal:
                self._refuse(op_index, str(refusal))
                for edge in edges:
                    lost[self.graph.channels_of(edge.dim)] = True
            else:
                if contribution.any():
                    contributions[op_index] = contribution
        return contributions, lost & chosen

    def _values(self, chosen: Flags, readers: Mapping[int, Sequence[Edge]]) -> Arrays:
        """What the operands hold, in the original with all other removed channels silenced."""
        from morphgraph.onnx_io.runtime import random_inputs, run

        positions = Absorbed(self.graph, chosen).positions()
        model = mask(self.graph, with_channels(self.keep, positions))
        dims = self.graph.couplings.dims
        operands = {dims[edge.dim].value for edges in readers.values() for edge in edges}
        feeds = random_inputs(self.graph.model)
        results = {value.name: value for node in model.graph for value in node.outputs}
        listed = {value.name for value in model.graph.outputs}
        model.graph.outputs.extend(results[k] for k in sorted(operands - listed - set(feeds)))
        return feeds | run(model, feeds)

    def _contribution(
        self, edges: Sequence[Edge], chosen: Flags, values: Mapping[str, Array]
    ) -> Array:
        """What an operator gives for the chosen channels of its operand beyond what zeros give.

        Raises:
            _RefusedError: it cannot be computed, or not be added to the result.
        """
        if len(edges) > 1:
            raise _RefusedError("sums over it in two directions")
        (edge,) = edges
        dim = self.graph.couplings.dims[edge.dim]
        constants = np.zeros_like(values[dim.value])
        where = np.flatnonzero(chosen[self.graph.channels_of(edge.dim)])
        index = (slice(None),) * dim.axis + (where,)
        constants[index] = values[dim.value][index]
        if not constants.any():
            return constants
        contribution = self._linear_part(edge.op_index, dim.value, constants)
        op = self.graph.ops[edge.op_index]
        shape = self.graph.shapes[result_names(op)[0]]
        if len(shape) > 1 and shape[0] == self.graph.batch:
            contribution = contribution[:1]  # the same for every sample
        compact, _ = deduplicate_slices(contribution, self._free_axes(edge.op_index))
        weights = sum(
            int(np.prod(static_shape(value)))
            for value in op.ir.inputs
            if value is not None and value.name in self.graph.couplings.input_independent
        )
        if compact.size > weights:
            raise _RefusedError(
                f"would need a map of {compact.size} numbers, more than its {weights} weights"
            )
        return contribution

    def _linear_part(self, op_index: int, operand: str, constants: Array) -> Array:
        """``f(constants) - f(0)``, if that is what they add to any other operand.

        Tried at one: ``f(constants + noise) - f(noise)`` must be the same.
        """
        (result,) = result_names(self.graph.ops[op_index])
        drawn = np.random.default_rng(0).standard_normal(constants.shape)
        noise = np.asarray(drawn, dtype=constants.dtype)
        inputs = (np.zeros_like(constants), constants, noise, constants + noise)
        try:
            at_zero, at_constants, at_noise, at_sum = (
                evaluate([result], {operand: array}, self.graph.model)[result] for array in inputs
            )
        except UnsupportedError:
            raise _RefusedError("is not run by ONNX Runtime") from None
        scale = float(np.abs(at_sum).max(initial=0.0)) or 1.0
        linear = at_constants - at_zero
        if np.abs((at_sum - at_noise) - linear).max(initial=0.0) > ADDITIVE * scale:
            raise _RefusedError("is not linear")
        return linear

    def _free_axes(self, op_index: int) -> frozenset[int]:
        """Axes of an operator's result that a plan may resize; slices there are not shared."""
        (result,) = result_names(self.graph.ops[op_index])
        axes = range(len(self.graph.shapes[result]))
        return frozenset(a for a in axes if self.graph.groups_on(self.graph.dim(result, a)))
