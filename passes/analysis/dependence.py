"""Pass ``depend``: which positions of which axes depend on a graph input.

A channel behind a BatchNorm of scale 0, or made by a kernel of zeros, holds the same numbers
whatever the inputs are. Flags run through the network by notation: a factor's elements depend on
what its operands hold there; a constant operand that multiplies ends the dependence where it is 0.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Flags
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph, Edge, GraphOp, analysis
from morphgraph.onnx_io import dtype_of, static_shape
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.evaluate import evaluate
from morphgraph.passes.analysis.liveness import operand_names, result_names


def dependence(graph: ChannelGraph) -> dict[str, list[Flags]]:
    """Per value and axis which positions may depend on a graph input, ``[size]`` each.

    A position that is not flagged holds the same numbers whatever the inputs are.
    """
    return _Dependence(graph).run()


class _Dependence:
    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.weights = graph.couplings.input_independent
        self.varying_axes: dict[str, list[Flags]] = {}

    def run(self) -> dict[str, list[Flags]]:
        for value in self.graph.model.graph.inputs:
            self.varying_axes[value.name or ""] = self._all(static_shape(value), True)
        for op_index, op in enumerate(self.graph.ops):
            if not self.weights.issuperset(result_names(op)):
                self._step(op_index, op)
        return self.varying_axes

    def _all(self, shape: Sequence[int], flag: bool) -> list[Flags]:
        return [np.full(size, flag) for size in shape]

    def _varies(self, name: str) -> bool:
        """Whether any position of a value depends on an input."""
        axes = self.varying_axes.get(name)
        if axes is None:
            return name not in self.weights
        return all(bool(flags.any()) for flags in axes)

    def _step(self, op_index: int, op: GraphOp) -> None:
        reads = [name for name in operand_names(op) if name not in self.weights]
        varies = not reads or op.opaque is not None or any(map(self._varies, reads))
        for k, value in enumerate(op.ir.outputs):
            if value.name:
                axes = self._all(static_shape(value), varies)
                if varies and op.opaque is None and not op.captured:
                    self._narrow(op_index, op, ~k, axes)
                    if not all(flags.any() for flags in axes):
                        axes = self._all(static_shape(value), False)
                self.varying_axes[value.name] = axes

    def _narrow(self, op_index: int, op: GraphOp, port: int, axes: list[Flags]) -> None:
        """Unflag positions of a result that depend on constants alone."""
        couplings = self.graph.couplings
        for edge in self.graph.edges_of(op_index):
            if edge.port == port:
                elements, positions = edge.map.pairs(int(couplings.sizes[edge.factor]))
                flags = self._elements(op_index, op, edge)
                axes[couplings.dims[edge.dim].axis][positions] &= flags[elements]
        self._narrow_by_kernel(op_index, op, axes)

    def _elements(self, op_index: int, op: GraphOp, place: Edge) -> Flags:
        """Which elements of a factor on a result may depend on an input."""
        couplings = self.graph.couplings
        size = int(couplings.sizes[place.factor])
        flags = np.zeros(size, dtype=bool)
        edges = self.graph.edges_of(op_index)
        product = place.map.outer * place.map.inner > 1
        siblings = {e.factor for e in edges if e.dim == place.dim and e.port == place.port}
        name = couplings.factor(place.factor).name
        for port, value in enumerate(op.ir.inputs):
            if value is None or value.name in self.weights or not self._varies(value.name or ""):
                continue
            standing = [e for e in edges if e.port == port and e.factor == place.factor]
            beside = any(e.port == port and e.factor in siblings for e in edges)
            if name in op.statistical or (not standing and (product or not beside)):
                flags[:] = True
            for edge in standing:
                elements, positions = edge.map.pairs(size)
                varying = self.varying_axes[value.name or ""][couplings.dims[edge.dim].axis]
                np.logical_or.at(flags, elements, varying[positions])
        for port in self._scaling(op_index, op):
            flags &= self._not_zero(op_index, op, port, place.factor)
        return flags

    def _scaling(self, op_index: int, op: GraphOp) -> list[int]:
        """Constant operands that multiply: a zero there ends the dependence."""
        scale = facts_of(op.ir).scale
        ports = [] if scale is None else [scale]
        if op.gate:
            ports = list(range(len(op.ir.inputs)))
        kernel = self._kernel(op_index, op)
        ports += [] if kernel is None else [kernel]
        return [p for p in ports if self._constant(op.ir.inputs[p]) is not None]

    def _kernel(self, op_index: int, op: GraphOp) -> int | None:
        """The one weight that the one activation is multiplied with."""
        if not op.macs or sum(n not in self.weights for n in operand_names(op)) != 1:
            return None
        couplings = self.graph.couplings
        counted = {factor for term in op.macs for factor in term}
        summed = {op.factors[name] for name in op.contracted}
        on: dict[int, set[int]] = {}
        for edge in self.graph.edges_of(op_index):
            if edge.port >= 0 and couplings.dims[edge.dim].value in self.weights:
                on.setdefault(edge.port, set()).add(edge.factor)
        if sum(bool(factors & summed) for factors in on.values()) > 1 or not on:
            return None
        ranked = sorted(on, key=lambda port: -len(on[port] & counted))
        alone = len(ranked) == 1 or len(on[ranked[0]] & counted) > len(on[ranked[1]] & counted)
        return ranked[0] if alone and (on[ranked[0]] & summed or not summed) else None

    def _constant(self, value: ir.Value | None) -> Array | None:
        """A weight's numbers, computed ones through their transposes and the like."""
        if value is None or value.name not in self.weights:
            return None
        if value.const_value is not None:
            return value.const_value.numpy()
        return _computed_weight(self.graph, value.name or "")

    def _not_zero(self, op_index: int, op: GraphOp, port: int, factor: int) -> Flags:
        """For which elements of a factor a constant operand has a op_index that is not zero."""
        array = self._constant(op.ir.inputs[port])
        assert array is not None
        size = int(self.graph.couplings.sizes[factor])
        result = np.ones(size, dtype=bool)
        for edge in self.graph.edges_of(op_index):
            if edge.port == port and edge.factor == factor:
                axis = self.graph.couplings.dims[edge.dim].axis
                others = tuple(a for a in range(array.ndim) if a != axis)
                elements, positions = edge.map.pairs(size)
                there = np.zeros(size, dtype=bool)
                np.logical_or.at(there, elements, (array != 0).any(axis=others)[positions])
                result &= there
        return result

    def _narrow_by_kernel(self, op_index: int, op: GraphOp, axes: list[Flags]) -> None:
        """The same by running the node on flags, where its activation varies in part only.

        With a kernel of ones and zeros nothing cancels, so that a zero in the result depends on
        nothing that varies.
        """
        kernel = self._kernel(op_index, op)
        name = next(n for n in operand_names(op) if n not in self.weights)
        if kernel is None or all(flags.all() for flags in self.varying_axes[name]):
            return
        weight = op.ir.inputs[kernel]
        array = self._constant(weight)
        if array is None or weight is None:
            return
        varying = np.ones((), dtype=array.dtype)
        for flags in self.varying_axes[name]:
            varying = varying[..., None] * flags.astype(array.dtype)
        given = {name: varying, weight.name or "": (array != 0).astype(array.dtype)}
        for value in op.ir.inputs:
            if value is not None and value.name not in given and value.name in self.weights:
                given[value.name or ""] = np.zeros(static_shape(value), dtype_of(value))
        (result,) = result_names(op)
        try:
            reached = evaluate([result], given, self.graph.model)[result] > 0
        except UnsupportedError:
            return
        for axis, flags in enumerate(axes):
            flags &= reached.any(axis=tuple(a for a in range(reached.ndim) if a != axis))


@analysis
def _computed_weight(graph: ChannelGraph, name: str) -> Array | None:
    """The numbers of a weight that operators compute; ``None`` where ONNX Runtime does not."""
    try:
        return evaluate([name], {}, graph.model)[name]
    except UnsupportedError:
        return None
