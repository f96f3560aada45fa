"""What the results of a node are: their types and sizes, told while constants are being folded.

ONNX infers them, from the numbers of constant operands where those decide. For an operator that it
does not know, or of which it infers no shape, the entry tells (``Op.shape``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.errors import ModelError
from morphgraph.notation import NotationError
from morphgraph.onnx_io import escape
from morphgraph.ops import Op, OpNode, describe, entry_of, mismatch_hint
from morphgraph.ops.op import UnsupportedFormError, lookup

_INFERENCE_DATA = 4096  # elements of an operand that shape inference may look into

# Operators that ONNX has withdrawn in some version, while ONNX Runtime still runs that.
_WITHDRAWN = {"GroupNormalization"}

_INFERENCE_ERRORS = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    RuntimeError,
)

Known = Callable[[ir.Value], ir.TensorProtocol | None]
"""The numbers of a value, where they are known."""


class ResultTypes:
    """Types and shapes of results, node by node in topological order."""

    def __init__(self, model: ir.Model, known: Known) -> None:
        self.known = known
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

    def note(self, node: ir.Node) -> None:
        """Note types and shapes on a node's results; what nobody knows stays as it is declared.

        Raises:
            ModelError: the node is not valid, or its operands do not fit together.
        """
        if not self._is_in_onnx(node):
            self._note_taught(node, entry_of(node.op_type, node.domain))
            return
        proto = ir.serde.serialize_node(node)
        self._check(node, proto)
        entry = lookup(node.op_type, node.domain)
        if not self._note_inferred(node, proto) and entry is not None and entry.shape is not None:
            self._note_taught(node, entry, outdated=True)

    def _is_in_onnx(self, node: ir.Node) -> bool:
        version = self.opsets.get(node.domain)
        return version is not None and onnx.defs.has(node.op_type, version, node.domain)

    def _check(self, node: ir.Node, proto: onnx.NodeProto) -> None:
        """Operands and attributes are as many, and of such kinds, as the operator's schema says."""
        if has_subgraph(node) or (node.op_type in _WITHDRAWN and not node.domain):
            return
        try:
            onnx.checker.check_node(proto, self.checker_context)
        except onnx.checker.ValidationError as error:
            raise ModelError(
                f"node '{escape(node.name or '')}' ({node.op_type}): is not valid: "
                f"{escape(' '.join(str(error).split()))}"
            ) from error

    def _note_inferred(self, node: ir.Node, proto: onnx.NodeProto) -> bool:
        """Note what ONNX infers; whether a shape is among it."""
        version = self.opsets[node.domain]
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        operands = [value for value in (*node.inputs, *captured(node)) if value is not None]
        types = {v.name or "": kind for v in operands if (kind := _type_proto(v)) is not None}
        if schema.deprecated or any(value.name not in types for value in operands):
            return False
        data = {
            value.name or "": ir.serde.serialize_tensor(tensor)
            for value in operands
            if (tensor := self.known(value)) is not None and tensor.size <= _INFERENCE_DATA
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
        return any(kind.tensor_type.HasField("shape") for kind in inferred.values())

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

    def _note_taught(self, node: ir.Node, entry: type[Op] | None, outdated: bool = False) -> None:
        """Note the shapes that an operator's entry tells; declared ones stay if not ``outdated``.

        What the entry says is held against them here, where the node is at fault, and not where a
        later one stumbles.
        """
        present = [value for value in node.inputs if value is not None]
        if entry is None or any(known_shape(value) is None for value in present):
            return
        results = [value for value in node.outputs if value.name]
        where = f"node '{escape(node.name or '')}' ({escape(node.op_type)})"
        missing = outdated or any(known_shape(value) is None for value in results)
        try:
            if entry.shape is not None and missing:
                told = entry.call(entry.shape, node, *map(known_shape, node.inputs))
                _note_shapes(node, told, outdated)
            if all(known_shape(value) is not None for value in results):
                describe(OpNode(node))
        except UnsupportedFormError:
            return  # nothing is known of this form of it
        except NotationError as error:
            raise ModelError(f"{where}: shape mismatch: {error}; {mismatch_hint(entry)}") from error
        except Exception as error:
            raise ModelError(
                f"{where}: its entry raised {type(error).__name__}: {error}; {mismatch_hint(entry)}"
            ) from error


def known_shape(value: ir.Value | None) -> Shape | None:
    """The sizes of a value, if all of them are known."""
    if value is None or value.shape is None:
        return None
    sizes = [size for size in value.shape if isinstance(size, int)]
    return tuple(sizes) if len(sizes) == len(value.shape) else None


def has_subgraph(node: ir.Node) -> bool:
    """Whether an attribute of a node is a graph: the branches of an If, the body of a Loop."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def captured(node: ir.Node) -> list[ir.Value]:
    """Values from around a node that its subgraphs read."""
    if not has_subgraph(node):
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


def _note_shapes(node: ir.Node, told: Sequence[Any], outdated: bool) -> None:
    """Note the shapes of results: one, or one per result; declared ones stay if not outdated."""
    several = any(shape is None or isinstance(shape, Sequence) for shape in told)
    for value, shape in zip(node.outputs, told if several else [told], strict=False):
        if value.type is None and node.inputs and node.inputs[0] is not None:
            value.type = node.inputs[0].type
        if shape is not None and (outdated or known_shape(value) is None):
            value.shape = ir.Shape(shape)
