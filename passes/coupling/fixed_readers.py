"""Distributions that a fixed kernel reads: their bins stand for numbers, and stay.

A softmax over bins, then a sum of the bins weighted by constants (0 to 15 for the sides of a box, 0
to 100 for an age, coordinates for a key point): nobody trains the reader, so without a bin it means
something else, and no training repairs that. A group of such bins is held.

A kernel is fixed if no trained parameter is in it, or if it counts: its numbers rise by equal
steps. Files of other tools do not say what is trained, and a frozen kernel is a parameter, too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.graph import ChannelGraph, Edge
from morphgraph.ops import facts_of, parameter_names
from morphgraph.passes.coupling.roles import roles

_LEAST = 3  # any two numbers are an equal step apart


def hold_fixed_bins(graph: ChannelGraph) -> ChannelGraph:
    """The graph with those groups held that a fixed kernel reads right after a softmax."""
    found = _Readers(graph).run()
    if not found:
        return graph
    groups = tuple(
        replace(group, reason=found[group.index], held=True) if group.index in found else group
        for group in graph.groups
    )
    return replace(graph, groups=groups)


class _Readers:
    """Follows distributions from their softmax to what sums over them."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.role = roles(graph.couplings)
        self.found: dict[int, str] = {}

    @cached_property
    def learned(self) -> frozenset[str]:
        return frozenset(parameter_names(self.graph.model))

    @cached_property
    def resizable(self) -> frozenset[int]:
        return frozenset(group.index for group in self.graph.groups if group.resizable)

    def run(self) -> dict[int, str]:
        """By the indices of groups the reason."""
        for op in self.graph.ops:
            if facts_of(op.ir).distribution:
                bins = self._groups(op.factors[name] for name in op.statistical)
                if bins:
                    self._follow(op.ir.outputs[0], bins, None)
        return self.found

    def _groups(self, factors: Iterable[int]) -> frozenset[int]:
        on = (self.graph.groups_on(factor) for factor in factors)
        return frozenset().union(*on) & self.resizable

    def _follow(self, value: ir.Value, bins: frozenset[int], weighted: str | None) -> None:
        """Look at who reads a distribution, or (``weighted``) one times fixed numbers."""
        for use in value.uses():
            op_index = self.graph.makers.get(use.node.outputs[0].name or "", -1)
            if op_index < 0:
                continue
            op, edges = self.graph.ops[op_index], self.graph.edges_of(op_index)
            here = [e for e in edges if e.port == use.idx and bins & self.graph.groups_on(e.factor)]
            summed = [edge for edge in here if self.role.sums[edge.factor]]
            passed = frozenset(edge.factor for edge in here) - {edge.factor for edge in summed}
            numbers = [e for e in edges if e.port >= 0 and self.graph.couplings.on_weight(e)]
            fixed = any(self._is_fixed(e, numbers, op.ir) for e in here)
            reader = f"{op.ir.op_type} '{op.name}'"
            if summed and (weighted or (fixed and op.macs)):
                reason = (
                    f"{weighted or reader} reads it right after a softmax, with fixed numbers "
                    "(include overrides)"
                )
                for group in bins & self._groups(edge.factor for edge in summed):
                    self.found[group] = reason
            left = bins & self._groups(passed)
            if left and not op.macs:
                behind = reader if op.gate and fixed else weighted
                for result in use.node.outputs:
                    self._follow(result, left, behind)

    def _is_fixed(self, bins: Edge, numbers: Sequence[Edge], node: ir.Node) -> bool:
        """Whether fixed numbers stand where the bins do."""
        for edge in numbers:
            if edge.factor != bins.factor:
                continue
            value = node.inputs[edge.port]
            assert value is not None
            stored = stored_in(value)
            if not any(v.name in self.learned for v in stored):
                return True
            tensor = stored[0].const_value if len(stored) == 1 else None
            if tensor is not None:
                array = tensor.numpy()
                direct = stored[0] is value
                if _counts(array, self.graph.couplings.dims[edge.dim].axis if direct else None):
                    return True
        return False


def stored_in(value: ir.Value) -> list[ir.Value]:
    """The floating-point initializers that a weight is computed from."""
    found: dict[ir.Value, None] = {}
    pending, seen = [value], {value}
    while pending:
        reached = pending.pop()
        node = reached.producer()
        if node is None:
            if reached is value or (
                reached.dtype is not None and reached.dtype.is_floating_point()
            ):
                found[reached] = None
            continue
        new = [v for v in node.inputs if v is not None and v not in seen]
        seen.update(new)
        pending += new
    return list(found)


def _counts(array: Array, axis: int | None) -> bool:
    """Whether numbers rise or fall by equal steps along an axis (``None``: along the long one)."""
    if axis is None:
        if array.size != max(array.shape, default=0):
            return False
        array, axis = array.reshape(-1), 0
    if array.shape[axis] < _LEAST:
        return False
    numbers = array.astype(np.float64)
    steps = np.diff(numbers, axis=axis)
    rounding = 8 * np.finfo(np.float32).eps * np.abs(numbers).max()
    even = np.abs(np.diff(steps, axis=axis)) <= rounding
    return bool(even.all() and (np.abs(steps) > rounding).all())
