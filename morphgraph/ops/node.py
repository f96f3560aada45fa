"""An ONNX node as operators' entries read it."""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from morphgraph.arrays import Array, Shape
from morphgraph.onnx_io import static_shape


class OpNode:
    """An ONNX node as the entry of its operator sees it.

    ``in_shapes`` and ``out_shapes`` are static shapes (``None`` for an absent operand or result),
    ``weights`` the values that depend on no graph input.
    """

    __slots__ = ("domain", "in_shapes", "ir", "name", "op_type", "out_shapes", "weights")

    def __init__(
        self,
        node: ir.Node,
        weights: frozenset[str] = frozenset(),
        shape_of: Callable[[ir.Value], Shape] = static_shape,
    ) -> None:
        self.ir = node
        self.name = node.name or ""
        self.op_type = node.op_type
        self.domain = node.domain
        self.in_shapes = [None if v is None else shape_of(v) for v in node.inputs]
        self.out_shapes = [shape_of(v) if v.name else None for v in node.outputs]
        self.weights = weights

    @property
    def opset(self) -> int:
        """The version of the operator's domain that the model declares."""
        graph = self.ir.graph
        versions = graph.opset_imports if isinstance(graph, ir.Graph) else {}
        return versions.get(self.domain, 20)

    def has(self, i: int) -> bool:
        """Whether operand ``i`` is present."""
        return i < len(self.in_shapes) and self.in_shapes[i] is not None

    def shape(self, port: int = 0) -> Shape:
        """The static shape of an operand or (``~k``) a result."""
        shape = self.in_shapes[port] if port >= 0 else self.out_shapes[~port]
        assert shape is not None
        return shape

    def out(self, k: int = 0) -> Shape:
        """The static shape of result ``k``."""
        return self.shape(~k)

    def is_weight(self, i: int) -> bool:
        """Whether operand ``i`` depends on parameters and constants alone."""
        value = self.ir.inputs[i]
        return value is not None and (value.name or "") in self.weights

    def const(self, i: int) -> Array | None:
        """The value of operand ``i`` where it is a constant, else ``None``."""
        if not self.has(i):
            return None
        value = self.ir.inputs[i]
        assert value is not None
        return None if value.const_value is None else value.const_value.numpy()

    def ints(self, i: int, attribute: Sequence[int] | None = None) -> tuple[int, ...] | None:
        """Integers that newer opsets take as operand ``i`` and older ones as an attribute."""
        if attribute is not None:
            return tuple(attribute)
        value = self.const(i)
        return None if value is None else tuple(int(x) for x in value.reshape(-1))

    def sizes(self, i: int) -> list[int | None]:
        """The numbers of a shape operand; ``None`` for each that is computed at run time.

        A shape may be joined from pieces, of which some are constants; nobody else may read it
        then, so that they can follow a resize.
        """
        constant = self.ints(i)
        if constant is not None:
            return list(constant)
        operand = self.ir.inputs[i]
        maker = None if operand is None else operand.producer()
        unknown: list[int | None] = [None] * self.shape(i)[0]
        if maker is None or maker.op_type != "Concat" or maker.domain:
            return unknown
        if len(maker.outputs[0].uses()) > 1 or maker.outputs[0].is_graph_output():
            return unknown
        numbers: list[int | None] = []
        for piece in maker.inputs:
            assert piece is not None
            constants = piece.const_value
            count = static_shape(piece)[0]
            numbers += [None] * count if constants is None else constants.numpy().tolist()
        return numbers
