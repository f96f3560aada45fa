"""Fold what is constant: shape arithmetic, casts, masks; never what training changes.

One walk over the nodes in topological order does everything: sizes are inferred node by node while
the constants they depend on are already known, so that chains such as Shape, Gather, Concat,
Reshape fold in a single pass. What a node gives is told by ``infer`` (types and sizes) and by
``compute`` (numbers).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.edit import Editor
from morphgraph.onnx_io import PARAMETERS_KEY, stored_names
from morphgraph.onnx_io.mapped import StoredTensor, is_stored
from morphgraph.ops.op import lookup
from morphgraph.passes.canonical.fold_values import (
    FOLD_LIMIT_BYTES,
    computed,
    constant_tensor,
    described_shape,
    filled,
    is_foldable,
)
from morphgraph.passes.canonical.infer_shapes import ResultTypes, known_shape


def fold_constants(model: ir.Model, varying: frozenset[str] = frozenset()) -> dict[str, object]:
    """Fold constants and drop operators that do nothing, in place; every size becomes known.

    The graph must be topologically sorted and its inputs static. Constants become initializers
    named after the value they replace.

    Args:
        model: is changed.
        varying: values that depend on sizes which are not meant to be fixed. Their nodes stay, and
            what they compute at the present sizes is used to know other sizes only.

    Returns:
        By name, something that is equal for two folded values if they are.

    Raises:
        ModelError: operands of a node do not fit together.
    """
    folder = _Folder(model, varying)
    for node in model.graph:  # nodes put behind the present one are visited too
        folder.visit(node)
    return folder.folded


class _Folder:
    def __init__(self, model: ir.Model, varying: frozenset[str]) -> None:
        self.graph = model.graph
        self.editor = Editor(model)
        self.varying = varying
        self.folded: dict[str, object] = {}
        self.at_present: dict[ir.Value, ir.TensorProtocol] = {}  # what varying values are now
        self.results = ResultTypes(model, self._known)
        self.lists_parameters = PARAMETERS_KEY in model.metadata_props
        self.parameters = set(stored_names(model))
        self.trained = self.parameters | {
            name
            for name, value in self.graph.initializers.items()
            if _is_float(value) and value.shape is not None and len(value.shape) > 0
        }
        self.outputs = set(self.graph.outputs)

    def visit(self, node: ir.Node) -> None:
        if _is(node, "Constant"):
            self._lift_constant(node)
            return
        if _is(node, "If") and self._inline_branch(node):
            return
        self._drop_zeros(node)
        self.results.note(node)
        if _is(node, "CastLike") and self._make_cast(node):
            return
        if self._simplify_reshape(node):
            return
        if not self._forward(node):
            self._evaluate(node)

    # -- constants ---------------------------------------------------------------------------

    def _constant(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        if value is None or not value.is_initializer() or value.graph is not self.graph:
            return None
        return value.const_value

    def _lift_constant(self, node: ir.Node) -> None:
        tensor = _shared(constant_tensor(node))
        output = node.outputs[0]
        name = output.name or ""
        if output in self.outputs:
            # A graph output must be made by a node: keep it, as an Identity of the constant.
            value = self.editor.constant(f"{name}_value", tensor)
            name = value.name or ""
            self._replace(node, "Identity", [value])
        else:
            self._settle(node, [tensor])
        is_matrix = len(tensor.shape) > 1 and tensor.dtype.is_floating_point()
        if not self.lists_parameters and is_matrix and not _is_zero(tensor):
            self.trained.add(name)  # some exporters keep weights in Constant nodes

    def _known(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The value of a constant, or what a varying one is at the present sizes."""
        return None if value is None else self.at_present.get(value, self._constant(value))

    def _settle_computed(self, node: ir.Node, tensors: Sequence[ir.TensorProtocol]) -> None:
        """Put initializers in the place of a node's results, unless they vary."""
        for output, tensor in zip(node.outputs, tensors, strict=True):
            self.folded[output.name or ""] = _digest(tensor)
        if any(output.name in self.varying for output in node.outputs):
            self.at_present.update(zip(node.outputs, tensors, strict=True))
            for output, tensor in zip(node.outputs, tensors, strict=True):
                output.type = ir.TensorType(tensor.dtype)
                output.shape = ir.Shape(tensor.shape.numpy())
            return
        self._settle(node, tensors)

    def _settle(self, node: ir.Node, tensors: Sequence[ir.TensorProtocol]) -> None:
        """Put initializers in the place of a node's results."""
        for output, tensor in zip(node.outputs, tensors, strict=True):
            if not output.name:
                continue
            value = self.editor.constant_for(output, tensor)
            value.metadata_props.update(output.metadata_props)
            output.replace_all_uses_with(value)
        self._remove(node)

    # -- operators that do nothing -------------------------------------------------------------

    def _forward(self, node: ir.Node) -> bool:
        """Let readers of a node that does nothing read its operand instead."""
        if not _does_nothing(node):
            return False
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        if _is(node, "Identity") and self._is_alias(source, output):
            # TorchScript ties equal parameters by Identity; each gets back a tensor of its own.
            self._split_alias(node)
            return True
        self._edit(node, lambda: self.editor.bypass(node, 0))
        return True

    def _drop_zeros(self, node: ir.Node) -> None:
        """Drop biases and initial states that an exporter has made up."""
        entry = lookup(node.op_type, node.domain)
        for index in () if entry is None else entry.zeros:
            value = node.inputs[index] if index < len(node.inputs) else None
            tensor = self._constant(value)
            if value is None or tensor is None or value.name in self.trained:
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
        if source is None or shape is None or self._constant(source) is not None:
            return False
        if _is(node, "Gather"):
            # From PyTorch's as_strided, which its pooling uses on channels-last data.
            indices = self._constant(node.inputs[1])
            if indices is None or not _is_everything(indices, known_shape(source)):
                return False
            self._replace(node, "Reshape", [source, self._shape_of(output)])
            return True
        first = source.producer()
        if not _is(node, "Reshape") or first is None or not _is(first, "Reshape"):
            return False
        if first.graph is not self.graph or source in self.outputs or len(source.uses()) > 1:
            return False
        target = node.inputs[1]
        if target is None or self._constant(target) is None or 0 in shape:
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
        if self._constant(source) is None or source.name not in self.trained:
            return False
        return output not in self.outputs and (
            not self.lists_parameters or output.name in self.parameters
        )

    def _split_alias(self, node: ir.Node) -> None:
        tensor = self._constant(node.inputs[0])
        assert tensor is not None
        name = node.outputs[0].name or ""
        self._settle(node, [_shared(tensor)])
        self.trained.add(name)

    def _make_cast(self, node: ir.Node) -> bool:
        source, like = node.inputs
        if like is None or like.dtype is None:
            return False
        self._replace(node, "Cast", [source], {"to": like.dtype.value})
        return True

    def _inline_branch(self, node: ir.Node) -> bool:
        """Replace an If whose condition is known by the branch that is taken."""
        condition = self._constant(node.inputs[0]) if node.inputs else None
        if condition is None or condition.size != 1:
            return False
        taken = node.attributes.get("then_branch" if condition.numpy().item() else "else_branch")
        if taken is None or len(taken.as_graph().outputs) != len(node.outputs):
            return False
        branch = taken.as_graph()
        self.editor.release_subgraphs(node)
        for value in list(branch.initializers.values()):
            tensor = branch.initializers.pop(value.name or "").const_value
            assert tensor is not None
            value.replace_all_uses_with(
                self.editor.constant(value.name or "", tensor), replace_graph_outputs=True
            )
        inner = list(branch)
        for value in (value for child in inner for value in child.outputs if value.name):
            value.name = self.editor.value_name(value.name or "")
        results = list(branch.outputs)
        branch.outputs.clear()
        branch.remove(inner)
        # An Identity for each result keeps the names of the outer values.
        ends = [ir.Node("", "Identity", [result]) for result in results]
        for old, end in zip(node.outputs, ends, strict=True):
            self._take_over(old, end.outputs[0])
        self.graph.insert_after(node, [*inner, *ends])
        self._remove(node)
        return True

    # -- editing -------------------------------------------------------------------------------

    def _take_over(self, old: ir.Value, new: ir.Value) -> None:
        name = old.name
        old.name = None
        new.name, new.type, new.shape = name, old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.outputs = set(self.graph.outputs) if old in self.outputs else self.outputs

    def _replace(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int] | None = None,
    ) -> None:
        """Put another node in the place of one; what nobody reads any more goes."""
        self._edit(node, lambda: self.editor.replace(node, op_type, inputs, attributes or {}))

    def _edit(self, node: ir.Node, edit: Callable[[], object]) -> None:
        operands = {value for value in node.inputs if value is not None}
        edit()
        self.outputs = set(self.graph.outputs)
        for value in operands:
            self._drop_unread(value)

    def _remove(self, node: ir.Node) -> None:
        self._edit(node, lambda: self.graph.remove(node, safe=True))

    def _drop_unread(self, value: ir.Value) -> None:
        # At once, not at the end: a chain of folded results never holds more than two of them.
        if self._constant(value) is None or value.uses() or value in self.outputs:
            return
        if value.name not in self.trained:
            del self.graph.initializers[value.name or ""]

    # -- values --------------------------------------------------------------------------------

    def _evaluate(self, node: ir.Node) -> None:
        """Replace a node by what it computes where all operands are constants."""
        if not is_foldable(node) or any(output in self.outputs for output in node.outputs):
            return
        source = node.inputs[0] if node.inputs else None
        if node.op_type in ("Shape", "Size"):
            shape = known_shape(source)
            if shape is not None:
                self._settle_computed(node, [ir.tensor(described_shape(node, shape))])
            return
        operands = [self._known(value) for value in node.inputs]
        for value, tensor in zip(node.inputs, operands, strict=True):
            if value is not None and (
                tensor is None or tensor.nbytes > FOLD_LIMIT_BYTES or value.name in self.trained
            ):
                return
        if node.op_type == "ConstantOfShape":
            made = None if operands[0] is None else filled(node, operands[0])
            if made is not None:
                self._settle_computed(node, [made])
        elif node.inputs:
            results = computed(node, self.results.opsets[""], operands)
            if results is not None and len(results) == len(node.outputs):
                self._settle_computed(node, [ir.tensor(result) for result in results])


def _digest(tensor: ir.TensorProtocol) -> object:
    array = tensor.numpy()
    if array.size and not any(array.strides):
        array = array.reshape(-1)[:1]
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
    return tensor.dtype, tuple(tensor.shape.numpy()), content


def _is_zero(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor holds zeros alone; large ones are not looked into."""
    return tensor.nbytes <= FOLD_LIMIT_BYTES and not tensor.numpy().any()


def _shared(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same data under a name of its own; an initializer gives its tensor its name."""
    if is_stored(tensor):
        return StoredTensor(tensor)
    return ir.LazyTensor(lambda: tensor, tensor.dtype, ir.Shape(tensor.shape.numpy()))


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and not node.domain


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _does_nothing(node: ir.Node) -> bool:
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


def _is_everything(indices: ir.TensorProtocol, shape: tuple[int, ...] | None) -> bool:
    """Whether the indices name every element of a vector of this shape once, in order."""
    if shape is None or shape != (indices.size,) or indices.nbytes > FOLD_LIMIT_BYTES:
        return False
    return np.array_equal(indices.numpy().reshape(-1), np.arange(indices.size))
