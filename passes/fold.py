"""Fold what is constant: shape arithmetic, casts, masks; never what training changes.

One walk over the nodes in topological order does everything: sizes are inferred node by node while
the constants they depend on are already known, so that chains such as Shape, Gather, Concat,
Reshape fold in a single pass. Nothing is computed before the size of its result is known to be
within the cap.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.reference.ops
import onnx_ir as ir

from morphgraph.errors import ModelError
from morphgraph.notation import NotationError
from morphgraph.onnx_io import PARAMETERS_KEY, escape, stored_names
from morphgraph.ops import OpNode, correct, describe, entry_of
from morphgraph.ops.op import UnreadableError
from morphgraph.stored import StoredTensor, is_stored

Array = np.ndarray[Any, np.dtype[Any]]

FOLD_LIMIT_BYTES = 16 * 2**20  # of one result, or of one operand
_FILL_LIMIT_BYTES = 2**31  # of a weight that is one repeated number and takes no memory
_INFERENCE_DATA = 4096  # elements of an operand that shape inference may look into

# Operators whose result has the size of their operand, and for which ONNX infers nothing.
_LIKE_OPERAND = {"GroupNormalization", "MeanVarianceNormalization"}

# Operators that ONNX has withdrawn in some version, while ONNX Runtime still runs that.
_WITHDRAWN = {"GroupNormalization"}

# Operands that mean zero where they are absent: biases and initial states.
_ZERO_BY_DEFAULT: dict[str, tuple[int, ...]] = {
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "GRU": (3, 5),
    "LSTM": (3, 5, 6),
    "RNN": (3, 5),
}

_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}
_RANDOM |= {"RandomUniformLike"}
_MEANT_AS_THEY_STAND = {"DequantizeLinear", "Dropout", "DynamicQuantizeLinear", "QuantizeLinear"}
_SLOW = {"AveragePool", "Conv", "ConvInteger", "ConvTranspose", "DeformConv", "Einsum", "GRU"}
_SLOW |= {"LSTM", "LpPool", "MatMulInteger", "MaxPool", "MaxUnpool", "NonMaxSuppression"}
_SLOW |= {"QLinearConv", "QLinearMatMul", "RNN"}
_NEVER_FOLDED = _RANDOM | _MEANT_AS_THEY_STAND | _SLOW
# Their results depend on the data, but are no larger than rank times their operands.
_BOUNDED_BY_OPERANDS = frozenset({"Compress", "NonZero", "Unique"})

_INFERENCE_ERRORS = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    RuntimeError,
)

logger = logging.getLogger(__name__)


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
        self.varying = varying
        self.folded: dict[str, object] = {}
        self.at_present: dict[ir.Value, ir.TensorProtocol] = {}  # what varying values are now
        self.opsets = {
            "" if domain == "ai.onnx" else domain: version
            for domain, version in model.opset_imports.items()
        }
        self.checker_context = onnx.checker.C.CheckerContext()
        self.checker_context.ir_version = onnx.IR_VERSION
        self.checker_context.opset_imports = self.opsets
        self.opset_protos = [
            onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()
        ]
        self.lists_parameters = PARAMETERS_KEY in model.metadata_props
        self.parameters = set(stored_names(model))
        self.names = {value.name for value in (*self.graph.inputs, *_results(self.graph))}
        self.names |= set(self.graph.initializers)
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
        if self._is_known(node):
            proto = ir.serde.serialize_node(node)
            self._check(node, proto)
            if _is(node, "CastLike") and self._make_cast(node):
                return
            self._infer(node, proto)
            if self._simplify_reshape(node):
                return
        else:
            self._infer_taught(node)
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
            name = self._fresh(f"{name}_value")
            value = self._register(name, tensor)
            self._replace_by_node(node, ir.Node("", "Identity", [value], name=node.name))
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
            value = self._register(output.name, tensor)
            value.metadata_props.update(output.metadata_props)
            output.replace_all_uses_with(value)
        self._remove(node)

    def _register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

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
        if output not in self.outputs:
            self._replace_by_value(node, source)
            return True
        producer = source.producer()
        if producer is None or producer.graph is not self.graph or source in self.outputs:
            if not _is(node, "Identity"):
                self._replace_by_node(node, ir.Node("", "Identity", [source], name=node.name))
            return True
        name = output.name
        output.name = None
        source.name = name
        for index, value in enumerate(self.graph.outputs):
            if value is output:
                self.graph.outputs[index] = source
        self.outputs = set(self.graph.outputs)
        self._replace_by_value(node, source)
        return True

    def _drop_zeros(self, node: ir.Node) -> None:
        """Drop biases and initial states that an exporter has made up."""
        for index in () if node.domain else _ZERO_BY_DEFAULT.get(node.op_type, ()):
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
        shape = _known_shape(output)
        if source is None or shape is None or self._constant(source) is not None:
            return False
        if _is(node, "Gather"):
            # From PyTorch's as_strided, which its pooling uses on channels-last data.
            indices = self._constant(node.inputs[1])
            if indices is None or not _is_everything(indices, _known_shape(source)):
                return False
            reshape = ir.Node("", "Reshape", [source, self._shape_of(output)], name=node.name)
            self._replace_by_node(node, reshape)
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
        shape = np.array(_known_shape(value), np.int64)
        return self._register(self._fresh(f"{value.name}_shape"), ir.tensor(shape))

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
        to = ir.AttrInt64("to", like.dtype.value)
        self._replace_by_node(node, ir.Node("", "Cast", [source], [to], name=node.name))
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
        for value in list(branch.initializers.values()):
            tensor = branch.initializers.pop(value.name or "").const_value
            assert tensor is not None
            value.replace_all_uses_with(
                self._register(self._fresh(value.name or ""), tensor), replace_graph_outputs=True
            )
        inner = list(branch)
        for value in (value for child in inner for value in child.outputs if value.name):
            value.name = self._fresh(value.name or "")
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

    def _replace_by_node(self, node: ir.Node, new: ir.Node) -> None:
        new.metadata_props.update(node.metadata_props)
        self._take_over(node.outputs[0], new.outputs[0])
        self.graph.insert_after(node, [new])
        self._remove(node)

    def _replace_by_value(self, node: ir.Node, value: ir.Value) -> None:
        node.outputs[0].replace_all_uses_with(value)
        self._remove(node)

    def _remove(self, node: ir.Node) -> None:
        operands = {value for value in node.inputs if value is not None}
        self.graph.remove(node, safe=True)
        for value in operands:
            self._drop_unread(value)

    def _drop_unread(self, value: ir.Value) -> None:
        # At once, not at the end: a chain of folded results never holds more than two of them.
        if self._constant(value) is None or value.uses() or value in self.outputs:
            return
        if value.name not in self.trained:
            del self.graph.initializers[value.name or ""]

    # -- sizes and values ------------------------------------------------------------------------

    def _is_known(self, node: ir.Node) -> bool:
        version = self.opsets.get(node.domain)
        return version is not None and onnx.defs.has(node.op_type, version, node.domain)

    def _check(self, node: ir.Node, proto: onnx.NodeProto) -> None:
        """Operands and attributes are as many, and of such kinds, as the operator's schema says."""
        if _has_subgraph(node) or (node.op_type in _WITHDRAWN and not node.domain):
            return
        try:
            onnx.checker.check_node(proto, self.checker_context)
        except onnx.checker.ValidationError as error:
            raise ModelError(
                f"node '{escape(node.name or '')}' ({node.op_type}): is not valid: "
                f"{escape(' '.join(str(error).split()))}"
            ) from error

    def _infer(self, node: ir.Node, proto: onnx.NodeProto) -> None:
        version = self.opsets[node.domain]
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        operands = [value for value in (*node.inputs, *captured(node)) if value is not None]
        types = {v.name or "": kind for v in operands if (kind := _type_proto(v)) is not None}
        if any(value.name not in types for value in operands):
            return
        if node.op_type in _LIKE_OPERAND and not node.domain and node.inputs[0] is not None:
            _refine(node.outputs[0], types[node.inputs[0].name or ""])
            return
        data = {
            value.name or "": ir.serde.serialize_tensor(tensor)
            for value in operands
            if (tensor := self._known(value)) is not None and tensor.size <= _INFERENCE_DATA
        }
        try:
            inferred = self._inferred(schema, proto, types, data)
        except _INFERENCE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"node '{escape(node.name or '')}' ({node.op_type}): its operands do not fit "
                f"together: {escape(reason)}"
            ) from error
        for output in node.outputs:
            if output.name in inferred:
                _refine(output, inferred[output.name])

    def _inferred(
        self,
        schema: onnx.defs.OpSchema,
        proto: onnx.NodeProto,
        types: dict[str, onnx.TypeProto],
        data: dict[str, onnx.TensorProto],
    ) -> dict[str, onnx.TypeProto]:
        """What ONNX infers; where an operator does not know bfloat16 yet, as if it were float16.

        PyTorch exports convolutions in bfloat16 to opsets whose Conv does not list it.
        """
        try:
            return onnx.shape_inference.infer_node_outputs(
                schema, proto, types, data, opset_imports=self.opset_protos
            )
        except _INFERENCE_ERRORS:
            if all(_element_type(kind) != onnx.TensorProto.BFLOAT16 for kind in types.values()):
                raise
            known = {
                name: _retyped(kind, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16)
                for name, kind in types.items()
            }
            small = {
                name: x for name, x in data.items() if x.data_type != onnx.TensorProto.BFLOAT16
            }
            try:
                inferred = onnx.shape_inference.infer_node_outputs(
                    schema, proto, known, small, opset_imports=self.opset_protos
                )
            except _INFERENCE_ERRORS:
                inferred = None
            if inferred is None:
                raise
            return {
                name: _retyped(kind, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
                for name, kind in inferred.items()
            }

    def _infer_taught(self, node: ir.Node) -> None:
        """The sizes that an operator's entry tells where ONNX has no schema; declared ones stay.

        What the entry says is held against them here, where the node is at fault, and not where a
        later one stumbles.
        """
        entry = entry_of(node.op_type, node.domain)
        present = [value for value in node.inputs if value is not None]
        if entry is None or any(_known_shape(value) is None for value in present):
            return
        results = [value for value in node.outputs if value.name]
        where = f"node '{escape(node.name or '')}' ({escape(node.op_type)})"
        try:
            if entry.shape is not None and any(_known_shape(value) is None for value in results):
                _note_shapes(node, entry.call(entry.shape, node, *map(_known_shape, node.inputs)))
            if all(_known_shape(value) is not None for value in results):
                describe(OpNode(node))
        except UnreadableError:
            return  # nothing is known of this form of it
        except NotationError as error:
            raise ModelError(f"{where}: shape mismatch: {error}; {correct(entry)}") from error
        except Exception as error:
            raise ModelError(
                f"{where}: its entry raised {type(error).__name__}: {error}; {correct(entry)}"
            ) from error

    def _evaluate(self, node: ir.Node) -> None:
        """Replace a node by what it computes where all operands are constants."""
        if node.domain or node.op_type in _NEVER_FOLDED or _has_subgraph(node):
            return
        if any(output in self.outputs for output in node.outputs):
            return
        source = node.inputs[0] if node.inputs else None
        if node.op_type in ("Shape", "Size"):
            shape = _known_shape(source)
            if shape is not None:
                self._settle_computed(node, [ir.tensor(_describe_shape(node, shape))])
            return
        operands = [self._known(value) for value in node.inputs]
        for value, tensor in zip(node.inputs, operands, strict=True):
            if value is not None and (
                tensor is None or tensor.nbytes > FOLD_LIMIT_BYTES or value.name in self.trained
            ):
                return
        if node.op_type == "ConstantOfShape":
            self._fill(node)
            return
        if node.inputs and _result_is_small(node):
            results = _run(node, self.opsets[""], operands)
            if results is not None and len(results) == len(node.outputs):
                self._settle_computed(node, [ir.tensor(result) for result in results])

    def _fill(self, node: ir.Node) -> None:
        shape = self._known(node.inputs[0])
        if shape is None:
            return
        number = node.attributes["value"].as_tensor() if "value" in node.attributes else None
        filler = np.zeros((), np.float32) if number is None else number.numpy().reshape(())
        sizes = tuple(shape.numpy().tolist())
        if min(sizes, default=0) >= 0 and math.prod(sizes) * filler.itemsize <= _FILL_LIMIT_BYTES:
            # A view with stride 0: the weight takes no memory until it is changed.
            self._settle_computed(node, [ir.tensor(np.broadcast_to(filler, sizes))])


def constant_tensor(node: ir.Node) -> ir.TensorProtocol:
    """The tensor that a Constant node holds.

    Raises:
        ModelError: it holds none, or a sparse one.
    """
    if len(node.attributes) == 1:
        (attribute,) = node.attributes.values()
        match attribute.name:
            case "value":
                return attribute.as_tensor()
            case "value_float" | "value_floats":
                return ir.tensor(np.array(attribute.value, np.float32))
            case "value_int" | "value_ints":
                return ir.tensor(np.array(attribute.value, np.int64))
            case "value_string" | "value_strings":
                return ir.tensor(attribute.value, dtype=ir.DataType.STRING)
    raise ModelError(
        f"node '{escape(node.name or '')}' (Constant): holds no dense value; store it as a tensor"
    )


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


def _results(graph: ir.Graph) -> Iterator[ir.Value]:
    return (value for node in graph for value in node.outputs)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _known_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.shape is None:
        return None
    sizes = [size for size in value.shape if isinstance(size, int)]
    return tuple(sizes) if len(sizes) == len(value.shape) else None


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
            shape = _known_shape(output)
            return shape is not None and shape == _known_shape(source)
    return False


def _has_subgraph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def captured(node: ir.Node) -> list[ir.Value]:
    """Values from around a node that its subgraphs read."""
    if not _has_subgraph(node):
        return []
    inner: set[ir.Graph] = set()
    stack = [node]
    read: list[ir.Value] = []
    while stack:
        for attribute in stack.pop().attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                graphs: Sequence[ir.Graph] = [attribute.as_graph()]
            elif attribute.type == ir.AttributeType.GRAPHS:
                graphs = attribute.as_graphs()
            else:
                continue
            for graph in graphs:
                inner.add(graph)
                stack.extend(graph)
                read.extend(value for child in graph for value in child.inputs if value is not None)
                read.extend(graph.outputs)
    return [value for value in dict.fromkeys(read) if value.graph not in inner]


def _type_proto(value: ir.Value) -> onnx.TypeProto | None:
    if value.type is None:
        return None
    proto = ir.serde.serialize_type(value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto


def _element_type(kind: onnx.TypeProto) -> int:
    return kind.tensor_type.elem_type


def _retyped(kind: onnx.TypeProto, old: int, new: int) -> onnx.TypeProto:
    """The same tensor type with another element type, if it has the old one."""
    if _element_type(kind) != old:
        return kind
    copy = onnx.TypeProto()
    copy.CopyFrom(kind)
    copy.tensor_type.elem_type = new
    return copy


def _note_shapes(node: ir.Node, told: Sequence[Any]) -> None:
    """Note the shapes of results where none is declared: one, or one per result."""
    several = any(shape is None or isinstance(shape, Sequence) for shape in told)
    for value, shape in zip(node.outputs, told if several else [told], strict=False):
        if value.type is None and node.inputs and node.inputs[0] is not None:
            value.type = node.inputs[0].type
        if shape is not None and _known_shape(value) is None:
            value.shape = ir.Shape(shape)


def _is_everything(indices: ir.TensorProtocol, shape: tuple[int, ...] | None) -> bool:
    """Whether the indices name every element of a vector of this shape once, in order."""
    if shape is None or shape != (indices.size,) or indices.nbytes > FOLD_LIMIT_BYTES:
        return False
    return np.array_equal(indices.numpy().reshape(-1), np.arange(indices.size))


def _refine(value: ir.Value, inferred: onnx.TypeProto) -> None:
    """Note an inferred type; where it leaves a size open, the size that the file declares stays."""
    value.type = ir.serde.deserialize_type_proto_for_type(inferred)
    shape = ir.serde.deserialize_type_proto_for_shape(inferred)
    declared = value.shape
    if shape is None:
        return
    if declared is None or len(declared) != len(shape):
        value.shape = ir.Shape(shape)
        return
    value.shape = ir.Shape(
        size if isinstance(size, int) else old for size, old in zip(shape, declared, strict=True)
    )


def _describe_shape(node: ir.Node, shape: tuple[int, ...]) -> Array:
    if node.op_type == "Size":
        return np.array(math.prod(shape), np.int64)
    start = node.attributes["start"].as_int() if "start" in node.attributes else None
    end = node.attributes["end"].as_int() if "end" in node.attributes else None
    return np.array(shape[start:end], np.int64)


def _result_is_small(node: ir.Node) -> bool:
    if node.op_type in _BOUNDED_BY_OPERANDS:
        return True
    for output in node.outputs:
        shape = _known_shape(output)
        if shape is None or output.dtype is None:
            return False
        if math.prod(shape) * output.dtype.itemsize > FOLD_LIMIT_BYTES:
            return False
    return True


def _run(
    node: ir.Node, opset: int, operands: Sequence[ir.TensorProtocol | None]
) -> list[Array] | None:
    """What the node computes by ONNX's reference implementation; ``None`` where that cannot."""
    attributes = {
        name: ir.to_proto(attribute.as_tensor())
        if attribute.type == ir.AttributeType.TENSOR
        else attribute.value
        for name, attribute in node.attributes.items()
    }
    arrays = [None if tensor is None else tensor.numpy() for tensor in operands]
    try:
        kernel = onnx.reference.ops.load_op("", node.op_type, opset)
        with np.errstate(all="ignore"):
            results = kernel.eval(*arrays, n_outputs=len(node.outputs), **attributes)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as why:
        logger.debug("%s %s is not folded: %s", node.op_type, node.name, why)
        return None
    if not isinstance(results, tuple | list):
        results = (results,)
    return [
        np.asarray(result, dtype=None if output.dtype is None else output.dtype.numpy())
        for result, output in zip(results, node.outputs, strict=True)
    ]
