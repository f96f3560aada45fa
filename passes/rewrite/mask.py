"""Pass ``mask``: the original network with removed channels silenced.

At each operator that sums over an axis, the activation's removed positions are set to zero; the
original then computes what the resized network computes. Where no activation operand has the axis
(the norm of a weight, the state inside a recurrent layer), the weight's positions are. Where an
operator normalizes, averages or competes over an axis, the kept positions are gathered, the
operator runs on them, and its results are scattered back: there a removal is exact in this sense
only.

The masked model shares with ``resize`` the knowledge which positions of an axis stay, and nothing
else: no weight is sliced, no attribute touched.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, IntArray
from morphgraph.edit import Editor, resize_axis
from morphgraph.graph import ChannelGraph, Edge
from morphgraph.onnx_io import dtype_of, is_float, static_shape
from morphgraph.onnx_io.copies import copied
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.coupling.roles import roles
from morphgraph.tolerances import ROUNDING


def mask(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    rounding: np.random.Generator | None = None,
) -> ir.Model:
    """The original model in its own size, computing what the resized one should compute.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay, ascending; groups left out stay whole.
        rounding: if given, every term of a sum that gets shorter is moved by a random share of
            :data:`morphgraph.tolerances.ROUNDING`, drawn per channel. The sums of another order are
            the only place where a right resize rounds otherwise.
    """
    return _Masker(graph, keep, rounding).run()


class Maskable(NamedTuple):
    """The original with masks that are inputs: one network that is built once, and run as two.

    Attributes:
        model: the network.
        masked: what the masks are by name where it is to compute what the masked original does.
        whole: what they are where it is to compute what the original does.
    """

    model: ir.Model
    masked: Arrays
    whole: Arrays


def maskable(graph: ChannelGraph, keep: Mapping[int, IntArray]) -> Maskable:
    """The original and what :func:`mask` makes of it in one; arguments are as of that."""
    masker = _Masker(graph, keep, None)
    model = masker.run()
    masks: Arrays = {}
    for name in masker.whole:
        value = model.graph.initializers.pop(name)
        assert value.const_value is not None
        masks[name], value.const_value = value.const_value.numpy(), None
        # Of some masks there are more numbers where everything stays. How many axes they have tells
        # ONNX Runtime the shapes behind them, without which it would transpose all kernels in vain.
        value.shape = ir.Shape([None] * len(masks[name].shape))
        model.graph.inputs.append(value)
    return Maskable(model, masks, masker.whole)


class _Masker:
    def __init__(
        self,
        graph: ChannelGraph,
        keep: Mapping[int, IntArray],
        rounding: np.random.Generator | None,
    ) -> None:
        self.graph = graph
        self.rounding = rounding
        self.selection = AxisSelection(graph, keep)
        self.model = copied(graph.model)
        self.editor = Editor(self.model)
        self.whole: Arrays = {}
        """What the masks would be by name if everything stayed."""

    def run(self) -> ir.Model:
        couplings, role = self.graph.couplings, roles(self.graph.couplings)
        copies = list(self.model.graph)
        columns = couplings.columns
        cut = self.selection.changes[columns.dim]
        # Kernels that an index chooses, too: of none that is left nothing is chosen.
        looked_at = role.sums | role.normalizes
        looked_at[list(couplings.indexed)] = True
        cut &= looked_at[columns.factor]
        for edge in map(couplings.edges.__getitem__, np.flatnonzero(cut).tolist()):
            positions = self.selection.vertex(edge.dim)
            assert positions is not None
            node, axis = copies[edge.op_index], couplings.dims[edge.dim].axis
            if role.sums[edge.factor]:
                # A zero in the activation is enough; in the weight where no activation has it.
                if couplings.on_activation(edge) or (
                    edge.port >= 0 and not role.on_activations[edge.factor]
                ):
                    self._silence(node, edge, axis, positions)
            elif (
                not len(positions)
                and (role.normalizes[edge.factor] or edge.factor in couplings.indexed)
                and edge.port >= 0
                and couplings.on_weight(edge)
            ):
                # Of kernels none of which is left nothing is chosen, and nothing added.
                self._silence(node, edge, axis, positions)
            elif (
                role.normalizes[edge.factor]
                # Of (g c), statistics over c stay as they were where whole groups g go.
                and self.selection.vertex(edge.factor) is not None
                # Over no channels there is nothing to compute, and nobody reads it.
                and len(positions)
            ):
                self._detour(node, edge.port, axis, positions)
        for op_index, numbers in couplings.numbered.items():
            for result, factor in numbers.items():
                positions = self.selection.vertex(factor)
                if positions is not None and len(positions):
                    size = int(couplings.sizes[factor])
                    self._renumber(copies[op_index], result, positions, size)
        return self.model

    def _renumber(self, node: ir.Node, result: int, positions: IntArray, size: int) -> None:
        """Let numbers that count kept positions be those of the original's, of so many."""
        value = node.outputs[result]
        users = list(value.uses())
        operands = [self._mask(value, "stays", positions, np.arange(size)), value]
        original = self._insert(node, "Gather", operands, value, after=True)
        for user, index in users:
            user.replace_input_with(index, original)

    def _silence(self, node: ir.Node, edge: Edge, axis: int, positions: IntArray) -> None:
        """Put what adds nothing into an operand's removed positions: 0, or its zero point."""
        value = node.inputs[edge.port]
        assert value is not None
        shape = static_shape(value)
        stays = np.zeros(shape[axis], dtype=bool)
        stays[positions] = True
        stays = stays.reshape([size if k == axis else 1 for k, size in enumerate(shape)])
        port = self.graph.ops[edge.op_index].silent.get(edge.port)
        zero = node.inputs[port] if port is not None and port < len(node.inputs) else None
        if zero is None:
            zero = self._constant(value, "nothing", np.zeros((), dtype=dtype_of(value)))
        operands, wide = [value, zero], _WIDE.get(dtype_of(value).name)
        if wide is not None:
            operands = [self._cast(node, operand, wide) for operand in operands]
        operands = [self._mask(value, "stays", stays, np.ones_like(stays)), *operands]
        masked = self._insert(node, "Where", operands, operands[1])
        if wide is not None and value.dtype is not None:
            masked = self._cast(node, masked, value.dtype)
        if self.rounding is not None and is_float(value):
            share = 1 + ROUNDING * self.rounding.standard_normal(stays.shape)
            noise = self._constant(value, "rounding", share.astype(dtype_of(value)))
            masked = self._insert(node, "Mul", [masked, noise], masked)
        node.replace_input_with(edge.port, masked)

    def _cast(self, node: ir.Node, value: ir.Value, to: ir.DataType) -> ir.Value:
        cast = self._insert(node, "Cast", [value], value, to=to)
        cast.type = ir.TensorType(to)
        return cast

    def _detour(self, node: ir.Node, port: int, axis: int, positions: IntArray) -> None:
        """Let an operator see some positions only, and put its results back where they belong.

        A result is padded by one zero, and a Gather takes that for every position that was removed.
        """
        if port >= 0:
            value = node.inputs[port]
            assert value is not None
            everything = np.arange(static_shape(value)[axis])
            operands = [value, self._mask(value, "stays", positions, everything)]
            gathered = self._insert(node, "Gather", operands, value, axis=axis)
            resize_axis(gathered, axis, len(positions))
            node.replace_input_with(port, gathered)
            return
        value = node.outputs[~port]
        shape = static_shape(value)
        pads = np.zeros(2 * len(shape), dtype=np.int64)
        pads[len(shape) + axis] = 1
        everything = np.arange(shape[axis])
        place = np.full(shape[axis], len(positions), dtype=np.int64)
        place[positions] = everything[: len(positions)]
        users = list(value.uses())
        operands = [value, self._constant(value, "pads", pads)]
        padded = self._insert(node, "Pad", operands, value, after=True)
        pad = padded.producer()
        assert pad is not None
        operands = [padded, self._mask(value, "place", place, everything)]
        whole = self._insert(pad, "Gather", operands, value, after=True, axis=axis)
        for user, index in users:
            user.replace_input_with(index, whole)
        # ONNX Runtime plans its memory by the shapes that are stated.
        resize_axis(value, axis, len(positions))
        resize_axis(padded, axis, len(positions) + 1)

    def _insert(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        like: ir.Value,
        *,
        after: bool = False,
        **attributes: int,
    ) -> ir.Value:
        """A new node beside another; its result has the other value's type and shape."""
        return self.editor.insert(
            op_type,
            inputs,
            attributes,
            name=f"{node.name}_mask",
            result=f"{like.name}_masked",
            like=like,
            before=None if after else node,
            after=node if after else None,
        )

    def _mask(self, value: ir.Value, what: str, array: Array, whole: Array) -> ir.Value:
        """A constant that says what stays, and what it would be if everything did."""
        constant = self._constant(value, what, array)
        self.whole[constant.name or ""] = whole
        return constant

    def _constant(self, value: ir.Value, what: str, array: Array) -> ir.Value:
        return self.editor.constant(f"{value.name}_{what}", array)


# Types for which ONNX Runtime has no Where, and those that hold all their numbers.
_WIDE = {
    "bfloat16": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT,
    "int8": ir.DataType.INT32,
    "int16": ir.DataType.INT32,
    "uint16": ir.DataType.INT32,
}
