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
from morphgraph.onnx_io import static_shape
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
        self.found: dict[str, list[Flags]] = {}

    def run(self) -> dict[str, list[Flags]]:
        for value in self.graph.model.graph.inputs:
            self.found[value.name or ""] = self._all(static_shape(value), True)
        for op_index, node in enumerate(self.graph.ops):
            if not self.weights.issuperset(result_names(node)):
                self._step(op_index, node)
        return self.found

    def _all(self, shape: Sequence[int], flag: bool) -> list[Flags]:
        return [np.full(size, flag) for size in shape]

    def _varies(self, name: str) -> bool:
        """Whether any position of a value depends on an input."""
        axes = self.found.get(name)
        if axes is None:
            return name not in self.weights
        return all(bool(flags.any()) for flags in axes)

    def _step(self, op_index: int, node: GraphOp) -> None:
        reads = [name for name in operand_names(node) if name not in self.weights]
        varies = not reads or node.opaque is not None or any(map(self._varies, reads))
        for k, value in enumerate(node.ir.outputs):
            if value.name:
                axes = self._all(static_shape(value), varies)
                if varies and node.opaque is None and not node.captured:
                    self._narrow(op_index, node, ~k, axes)
                    if not all(flags.any() for flags in axes):
                        axes = self._all(static_shape(value), False)
                self.found[value.name] = axes

    def _narrow(self, op_index: int, node: GraphOp, port: int, axes: list[Flags]) -> None:
        """Unflag positions of a result that depend on constants alone."""
        couplings = self.graph.couplings
        for edge in self.graph.edges_of(op_index):
            if edge.port == port:
                elements, positions = edge.map.pairs(int(couplings.sizes[edge.factor]))
                flags = self._elements(op_index, node, edge)
                axes[couplings.dims[edge.dim].axis][positions] &= flags[elements]
        self._narrow_by_kernel(op_index, node, axes)

    def _elements(self, op_index: int, node: GraphOp, place: Edge) -> Flags:
        """Which elements of a factor on a result may depend on an input."""
        couplings = self.graph.couplings
        size = int(couplings.sizes[place.factor])
        flags = np.zeros(size, dtype=bool)
        edges = self.graph.edges_of(op_index)
        product = place.map.outer * place.map.inner > 1
        siblings = {e.factor for e in edges if e.dim == place.dim and e.port == place.port}
        name = couplings.factor(place.factor).name
        for port, value in enumerate(node.ir.inputs):
            if value is None or value.name in self.weights or not self._varies(value.name or ""):
                continue
            here = [e for e in edges if e.port == port and e.factor == place.factor]
            beside = any(e.port == port and e.factor in siblings for e in edges)
            if name in node.statistical or (not here and (product or not beside)):
                flags[:] = True
            for edge in here:
                elements, positions = edge.map.pairs(size)
                varying = self.found[value.name or ""][couplings.dims[edge.dim].axis]
                np.logical_or.at(flags, elements, varying[positions])
        for port in self._scaling(op_index, node):
            flags &= self._not_zero(op_index, node, port, place.factor)
        return flags

    def _scaling(self, op_index: int, node: GraphOp) -> list[int]:
        """Constant operands that multiply: a zero there ends the dependence."""
        scale = facts_of(node.ir).scale
        ports = [] if scale is None else [scale]
        if node.gate:
            ports = list(range(len(node.ir.inputs)))
        kernel = self._kernel(op_index, node)
        ports += [] if kernel is None else [kernel]
        return [p for p in ports if self._constant(node.ir.inputs[p]) is not None]

    def _kernel(self, op_index: int, node: GraphOp) -> int | None:
        """The one weight that the one activation is multiplied with."""
        if not node.macs or sum(n not in self.weights for n in operand_names(node)) != 1:
            return None
        couplings = self.graph.couplings
        counted = {factor for term in node.macs for factor in term}
        summed = {node.factors[name] for name in node.contracted}
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

    def _not_zero(self, op_index: int, node: GraphOp, port: int, factor: int) -> Flags:
        """For which elements of a factor a constant operand has a op_index that is not zero."""
        array = self._constant(node.ir.inputs[port])
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

    def _narrow_by_kernel(self, op_index: int, node: GraphOp, axes: list[Flags]) -> None:
        """The same by running the node on flags, where its activation varies in part only.

        With a kernel of ones and zeros nothing cancels, so that a zero in the result depends on
        nothing that varies.
        """
        kernel = self._kernel(op_index, node)
        name = next(n for n in operand_names(node) if n not in self.weights)
        if kernel is None or all(flags.all() for flags in self.found[name]):
            return
        weight = node.ir.inputs[kernel]
        array = self._constant(weight)
        if array is None or weight is None:
            return
        varying = np.ones((), dtype=array.dtype)
        for flags in self.found[name]:
            varying = varying[..., None] * flags.astype(array.dtype)
        given = {name: varying, weight.name or "": (array != 0).astype(array.dtype)}
        for value in node.ir.inputs:
            if value is not None and value.name not in given and value.name in self.weights:
                dtype = np.float32 if value.dtype is None else value.dtype.numpy()
                given[value.name or ""] = np.zeros(static_shape(value), dtype)
        (result,) = result_names(node)
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
