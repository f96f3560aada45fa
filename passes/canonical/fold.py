"""Fold what is constant: shape arithmetic, casts, masks; never what training changes.

One walk over the nodes in topological order does everything: sizes are inferred node by node while
the constants they depend on are already known, so that chains such as Shape, Gather, Concat,
Reshape fold in a single pass. ``infer_shapes`` knows the types and sizes of a node's results,
``fold_values`` knows the numbers; what is here replaces nodes.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.edit import Editor
from morphgraph.errors import ModelError
from morphgraph.notation import NotationError
from morphgraph.onnx_io import ALIASES_KEY, known_shape
from morphgraph.onnx_io.mapped import shared
from morphgraph.ops import OpNode, describe
from morphgraph.ops.op import lookup
from morphgraph.passes.canonical.branches import take_branch
from morphgraph.passes.canonical.fold_values import (
    FOLD_LIMIT_BYTES,
    KnownValues,
    computed,
    constant_tensor,
)
from morphgraph.passes.canonical.infer_shapes import INFERENCE_DATA, ResultTypes

_SMALL_BYTES = 256  # by so much a folded vector may be larger than what it is computed from


def fold_constants(model: ir.Model, varying: frozenset[str] = frozenset()) -> dict[str, object]:
    """Fold constants and drop operators that do nothing, in place; every size becomes known.

    The graph must be topologically sorted and its inputs static. Constants become initializers
    named after the value they replace.

    Args:
        model: is changed.
        varying: names of values that depend on dynamic sizes. Their nodes stay; what they compute
            at the present sizes is used to infer other sizes, and for nothing else.

    Returns:
        By the name of a folded value, a digest: equal for two values if their content is.

    Raises:
        ModelError: operands of a node do not fit together.
    """
    folder = _Folder(model, varying)
    for node in model.graph:  # nodes put behind the present one are visited too
        folder.visit(node)
    return folder.digests


class _Folder:
    def __init__(self, model: ir.Model, varying: frozenset[str]) -> None:
        self.graph = model.graph
        self.editor = Editor(model)
        self.varying = varying
        self.digests: dict[str, object] = {}
        self.unfolded: dict[ir.Value | None, tuple[int, int]] = {}
        self.aliases: dict[tuple[str, str], str] = model.meta.setdefault(ALIASES_KEY, {})
        self.known = KnownValues(model)
        self.types = ResultTypes(model, self.known)

    def visit(self, node: ir.Node) -> None:
        if _is(node, "Constant"):
            self._replace_constant_node(node)
            return
        if _is(node, "If") and self._inline_branch(node):
            return
        self._drop_zeros(node)
        self.types.infer(node)
        if _is(node, "CastLike") and self._make_cast(node):
            return
        if self._simplify_reshape(node):
            return
        if not self._bypass(node):
            self._fold(node)

    # -- constants ---------------------------------------------------------------------------

    def _replace_constant_node(self, node: ir.Node) -> None:
        tensor = shared(constant_tensor(node))
        output = node.outputs[0]
        name = output.name or ""
        if self._is_output(output):
            # A graph output must be made by a node: keep it, as an Identity of the constant.
            value = self.editor.constant(f"{name}_value", tensor)
            name = value.name or ""
            self._replace(node, "Identity", [value])
        else:
            self._replace_by_constants(node, [tensor])
        is_matrix = len(tensor.shape) > 1 and tensor.dtype.is_floating_point()
        if not self.known.lists_parameters and is_matrix and not _is_zero(tensor):
            self.known.trained.add(name)  # some exporters keep weights in Constant nodes

    def _fold(self, node: ir.Node) -> None:
        """Put what a node computes in its place, where that is known; varying nodes stay."""
        if any(self._is_output(output) for output in node.outputs):
            return
        tensors = computed(node, self.types.opsets[""], self.known)
        if tensors is None:
            return
        for output, tensor in zip(node.outputs, tensors, strict=True):
            self.digests[output.name or ""] = _digest(tensor)
        if any(output.name in self.varying for output in node.outputs):
            for output, tensor in zip(node.outputs, tensors, strict=True):
                self.known.note_varying(output, tensor)
        elif self._would_inflate(node, tensors):
            for output, tensor in zip(node.outputs, tensors, strict=True):
                self.unfolded[output] = self._extent(node.inputs)
                if tensor.size <= INFERENCE_DATA:
                    self.known.note_varying(output, tensor)
        else:
            self._replace_by_constants(node, tensors)

    def _would_inflate(self, node: ir.Node, tensors: Sequence[ir.TensorProtocol]) -> bool:
        """Whether what a node computes has the numbers of its operands, but takes more bytes.

        So weights that are kept in int8 behind Cast and Mul. They stay there, and are sliced there.
        What has more numbers than its operands is folded: no axis of theirs would be sliced.
        """
        size, stored = self._extent(node.inputs)
        numbers, bytes_ = sum(t.size for t in tensors), sum(t.nbytes for t in tensors)
        is_matrix = any(sum(n > 1 for n in t.shape.numpy()) > 1 for t in tensors)
        slack = 0 if is_matrix else _SMALL_BYTES
        if numbers > size or bytes_ <= stored + slack:
            return False
        try:
            return describe(OpNode(node)).opaque is None
        except (NotationError, ModelError):
            return False

    def _extent(self, values: Sequence[ir.Value | None]) -> tuple[int, int]:
        """How many numbers, and bytes of them, constants are computed from."""
        size = stored = 0
        for value in dict.fromkeys(values):
            tensor = self.known.constant(value)
            if value in self.unfolded:
                size, stored = size + self.unfolded[value][0], stored + self.unfolded[value][1]
            elif tensor is not None:
                size, stored = size + tensor.size, stored + tensor.nbytes
        return size, stored

    def _replace_by_constants(self, node: ir.Node, tensors: Sequence[ir.TensorProtocol]) -> None:
        """Put initializers in the place of a node's results."""
        for output, tensor in zip(node.outputs, tensors, strict=True):
            if not output.name:
                continue
            value = self.editor.constant_for(output, tensor)
            value.metadata_props.update(output.metadata_props)
            output.replace_all_uses_with(value)
        self._remove(node)

    # -- operators that do nothing -------------------------------------------------------------

    def _bypass(self, node: ir.Node) -> bool:
        """Let readers of a node that does nothing read its operand instead."""
        if not _is_no_op(node):
            return False
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        if _is(node, "Identity") and self._is_alias(source, output):
            # TorchScript ties equal parameters by Identity; each gets back a tensor of its own.
            self._split_alias(node)
            return True
        if self.known.constant(source) is not None and not self._is_output(output):
            for reader, _ in output.uses():
                self.aliases[source.name or "", reader.name or ""] = output.name or ""
        self._edit(node, lambda: self.editor.bypass(node, 0))
        return True

    def _drop_zeros(self, node: ir.Node) -> None:
        """Drop biases and initial states that an exporter has made up."""
        entry = lookup(node.op_type, node.domain)
        for index in () if entry is None else entry.zeros:
            value = node.inputs[index] if index < len(node.inputs) else None
            tensor = self.known.constant(value)
            if value is None or tensor is None or value.name in self.known.trained:
                continue
            if _is_zero(tensor):
                node.replace_input_with(index, None)
                self._drop_unread(value)
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)

    def _simplify_reshape(self, node: ir.Node) -> bool:
        """Write a Gather of everything in order as the Reshape that it is; join two in a row."""
        source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        shape = known_shape(output)
        if source is None or shape is None or self.known.constant(source) is not None:
            return False
        if _is(node, "Gather"):
            # From PyTorch's as_strided, which its pooling uses on channels-last data.
            indices = self.known.constant(node.inputs[1])
            if indices is None or not _lists_all(indices, known_shape(source)):
                return False
            self._replace(node, "Reshape", [source, self._shape_of(output)])
            return True
        # Of two Reshapes in a row the second alone decides, once its shape is written out: a 0 or
        # -1 in it may speak of the shape between the two.
        first = source.producer()
        if not _is(node, "Reshape") or first is None or not _is(first, "Reshape"):
            return False
        if first.graph is not self.graph or self._is_output(source) or len(source.uses()) > 1:
            return False
        target = node.inputs[1]
        if target is None or self.known.constant(target) is None or 0 in shape:
            return False
        node.replace_input_with(0, first.inputs[0])
        node.replace_input_with(1, self._shape_of(output))
        self._remove(first)
        self._drop_unread(target)
        return False

    def _shape_of(self, value: ir.Value) -> ir.Value:
        """A new initializer that holds the shape of a value."""
        shape = np.array(known_shape(value), np.int64)
        return self.editor.constant(f"{value.name}_shape", shape)

    def _is_alias(self, source: ir.Value, output: ir.Value) -> bool:
        """Whether two parameters are tied that are two in the model's list of them."""
        return (
            self.known.constant(source) is not None
            and {source.name, output.name} <= self.known.parameters
            and not self._is_output(output)
        )

    def _split_alias(self, node: ir.Node) -> None:
        tensor = self.known.constant(node.inputs[0])
        assert tensor is not None
        name = node.outputs[0].name or ""
        self._replace_by_constants(node, [shared(tensor)])
        self.known.trained.add(name)

    def _make_cast(self, node: ir.Node) -> bool:
        source, like = node.inputs
        if like is None or like.dtype is None:
            return False
        self._replace(node, "Cast", [source], {"to": like.dtype.value})
        return True

    def _inline_branch(self, node: ir.Node) -> bool:
        """Replace an If whose condition is known by the branch that is taken."""
        condition = self.known.constant(node.inputs[0]) if node.inputs else None
        if condition is None or condition.size != 1:
            return False
        if take_branch(node, bool(condition.numpy().item()), self.editor) is None:
            return False
        self._remove(node)
        return True

    # -- editing -------------------------------------------------------------------------------

    def _is_output(self, value: ir.Value) -> bool:
        # A value may also be the output of a subgraph that captures it.
        return value.is_graph_output() and value in self.graph.outputs

    def _replace(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int] | None = None,
    ) -> None:
        """Put another node in the place of one; what nobody reads any more goes."""
        self._edit(node, lambda: self.editor.replace(node, op_type, inputs, attributes or {}))

    def _remove(self, node: ir.Node) -> None:
        self._edit(node, lambda: self.graph.remove(node, safe=True))

    def _edit(self, node: ir.Node, edit: Callable[[], object]) -> None:
        """Take a node out; constants that only it has read go with it."""
        operands = {value for value in node.inputs if value is not None}
        edit()
        for value in operands:
            self._drop_unread(value)

    def _drop_unread(self, value: ir.Value) -> None:
        # At once, not at the end: a chain of folded results never holds more than two of them.
        if self.known.constant(value) is None or value.uses() or self._is_output(value):
            return
        if value.name not in self.known.trained:
            del self.graph.initializers[value.name or ""]


def _digest(tensor: ir.TensorProtocol) -> object:
    array = tensor.numpy()
    if array.size and not any(array.strides):
        array = array.reshape(-1)[:1]
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
    return tensor.dtype, tuple(tensor.shape.numpy()), content


def _is_zero(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor holds zeros alone; large ones are not looked into."""
    return tensor.nbytes <= FOLD_LIMIT_BYTES and not tensor.numpy().any()


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and not node.domain


def _is_no_op(node: ir.Node) -> bool:
    if node.domain or not node.inputs or node.inputs[0] is None:
        return False
    source, output = node.inputs[0], node.outputs[0]
    match node.op_type:
        case "Identity":
            return True
        case "Cast":
            return source.dtype is not None and source.dtype == node.attributes["to"].as_int()
        case "Concat":
            return len(node.inputs) == 1
        case "Expand" | "Reshape":
            shape = known_shape(output)
            return shape is not None and shape == known_shape(source)
    return False


def _lists_all(indices: ir.TensorProtocol, shape: tuple[int, ...] | None) -> bool:
    """Whether the indices name every element of a vector of this shape once, in order."""
    if shape is None or shape != (indices.size,) or indices.nbytes > FOLD_LIMIT_BYTES:
        return False
    return np.array_equal(indices.numpy().reshape(-1), np.arange(indices.size))
