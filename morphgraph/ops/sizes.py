"""Operators that compute with sizes, in models that leave some of them open.

They have no PyTorch form: ``to_torch`` wants sizes for all but the batch, and then they are folded.
"""

from morphgraph.ops.op import Description, Op, OpNode, Place, op


@op("Shape")
class Shape(Op):
    """The axes whose sizes are read keep them; all others are free."""

    @staticmethod
    def describe(n: OpNode, *, start: int = 0, end: int | None = None) -> Description:
        description = Description()
        rank = len(n.shape(0))
        read = set(range(rank)[slice(start, end)])
        picked = _picked(n)
        if picked is not None:
            read &= {range(rank)[slice(start, end)][k] for k in picked}
        for axis, size in enumerate(n.shape(0)):
            if axis in read:
                description.pin(0, axis, size, "its size is read")
            else:
                description.add(f"a{axis}", size, [Place(0, axis)])
        description.pin(~0, 0, n.out()[0], "sizes")
        return description


def _picked(n: OpNode) -> set[int] | None:
    """Which of the sizes the readers pick, where all are Gathers at constant places."""
    found: set[int] = set()
    for node, index in n.ir.outputs[0].uses():
        indices = node.inputs[1] if node.op_type == "Gather" and index == 0 else None
        if indices is None or indices.const_value is None:
            return None
        found.update(int(k) for k in indices.const_value.numpy().reshape(-1))
    return None if n.ir.outputs[0].is_graph_output() else found


@op("Range")
class Range(Op):
    """Counts; what it counts to is no channel."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        description = Description()
        description.pin(~0, 0, n.out()[0], "counted")
        return description


@op("ConstantOfShape")
class ConstantOfShape(Op):
    """A number repeated; its axes follow the shape that is given."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        description = Description()
        for axis, size in enumerate(n.out()):
            description.pin(~0, axis, size, "filled to a computed size")
        return description
