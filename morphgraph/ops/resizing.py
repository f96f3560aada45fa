"""What an operator's ``resize`` sees of one node: its new sizes, and what it may change."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray, Shape
from morphgraph.edit import Editor, replace_array
from morphgraph.errors import warn
from morphgraph.onnx_io import static_shape


class Resizing:
    """The new sizes around a node, and edits of its copy in the resized model.

    Results of size 0 have gone from the resized node. Nothing is asked where an operand is empty,
    except for a concatenation, which goes on without that operand.

    Attributes:
        copy: the node in the resized model; another one after :meth:`become_gather`.
    """

    def __init__(
        self,
        editor: Editor,
        node: ir.Node,
        copy: ir.Node,
        selected: Callable[[str, int], IntArray | None],
        size: Callable[[str], int],
        follows: Callable[[str], bool],
    ) -> None:
        """Look at one node.

        Args:
            editor: of the resized model.
            node: the original.
            copy: the node in the resized model.
            selected: the old positions that stay, by value and axis; ``None``: all of them.
            size: the new size of a factor, by its name.
            follows: whether the numbers by which a factor's elements are read count, from now on,
                those that stay.
        """
        self.copy = copy
        self.size = size
        self.follows = follows
        self._editor = editor
        self._node = node
        self._selected = selected

    def positions(self, port: int, axis: int) -> IntArray:
        """Old positions that stay on an axis, in the new order; a new one repeats its model."""
        value = self._node.inputs[port] if port >= 0 else self._node.outputs[~port]
        assert value is not None
        selected = self._selected(value.name or "", axis)
        return np.arange(static_shape(value)[axis]) if selected is None else selected

    def kept(self, port: int, axis: int) -> IntArray:
        """The former name of :meth:`positions`."""
        warn("Resizing.kept is now positions", DeprecationWarning)
        return self.positions(port, axis)

    def shape(self, port: int) -> Shape:
        """The new static shape of an operand or (``~k``) a result."""
        value = self._node.inputs[port] if port >= 0 else self._node.outputs[~port]
        assert value is not None
        return tuple(len(self.positions(port, axis)) for axis in range(len(static_shape(value))))

    def set_attribute(self, name: str, value: float | Sequence[float]) -> None:
        """Change an attribute; integers and floats are told apart by their type."""
        if isinstance(value, float):
            self.copy.attributes[name] = ir.AttrFloat32(name, value)
        elif isinstance(value, int):
            self.copy.attributes[name] = ir.AttrInt64(name, value)
        elif any(isinstance(number, float) for number in value):
            self.copy.attributes[name] = ir.AttrFloat32s(name, value)
        else:
            self.copy.attributes[name] = ir.AttrInt64s(name, [int(number) for number in value])

    def remove_attribute(self, name: str) -> None:
        """Drop an attribute, if it is there."""
        self.copy.attributes.pop(name, None)

    def set_constant(self, i: int, value: Array) -> None:
        """Give operand ``i`` a constant; other readers of its old one keep that."""
        if i >= len(self.copy.inputs):
            self.copy.resize_inputs(i + 1)
        old = self.copy.inputs[i]
        if old is None:
            new = self._editor.constant(f"{self.copy.name}_{i}", value)
            self.copy.replace_input_with(i, new)
            return
        assert old.const_value is not None
        if np.array_equal(old.const_value.numpy(), value):
            return
        array = value.astype(old.const_value.numpy().dtype)
        if len(old.uses()) == 1 and not old.is_graph_output():
            replace_array(old, array)
            return
        new = self._editor.constant(f"{old.name}_{self.copy.name}", array)
        self.copy.replace_input_with(i, new)

    def set_sizes(self, i: int, sizes: Sequence[int]) -> None:
        """Change a shape operand, a constant or joined from pieces; what is computed stays."""
        operand = self.copy.inputs[i]
        assert operand is not None
        if operand.const_value is not None:
            self.set_constant(i, np.array(sizes, dtype=np.int64))
            return
        concat, start = operand.producer(), 0
        assert concat is not None
        for k, piece in enumerate(list(concat.inputs)):
            assert piece is not None
            part = list(sizes[start : start + static_shape(piece)[0]])
            start += len(part)
            if piece.const_value is not None and piece.const_value.numpy().tolist() != part:
                new = self._editor.sizes(f"{piece.name}_{concat.name}", part)
                concat.replace_input_with(k, new)

    def become_gather(self, axis: int, indices: IntArray) -> None:
        """Turn the node into a Gather of its first operand, its results unchanged."""
        operands = [self.copy.inputs[0], self._indices(indices)]
        self.copy = self._editor.replace(self.copy, "Gather", operands, {"axis": axis})

    def gather_first(self, axis: int, indices: IntArray) -> None:
        """Give the node a Gather of its first operand to read instead of that."""
        old = self.copy.inputs[0]
        assert old is not None
        name = f"{self.copy.name}_gathered"
        gathered = self._editor.insert(
            "Gather",
            [old, self._indices(indices)],
            {"axis": axis},
            name=name,
            result=name,
            like=old,
            sizes={axis: len(indices)},
            before=self.copy,
            metadata=self.copy.metadata_props,
        )
        self.copy.replace_input_with(0, gathered)

    def _indices(self, indices: IntArray) -> ir.Value:
        return self._editor.constant(f"{self.copy.name}_kept", indices.astype(np.int64))
