"""What types and sizes the results of a node have, inferred while constants are being folded.

ONNX infers them, from the numbers of known operands where those decide (such as the target of a
Reshape); for an operator that came into ONNX after the model's opset, as its first version does.
For one that ONNX does not have, or for which it infers no shape, the operator's entry does
(``Op.shape``), and where that is silent ONNX Runtime is asked what comes out (``ask_runtime``).
"""

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import onnx
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.errors import ModelError
from morphgraph.notation import NotationError
from morphgraph.onnx_io import (
    captured_values,
    escape,
    known_shape,
    node_label,
    shape_of,
    subgraphs,
)
from morphgraph.onnx_io.maps import is_map_type
from morphgraph.onnx_io.messages import node_message, tensor_message, type_message
from morphgraph.ops import Op, OpNode, describe, entry_of, mismatch_hint
from morphgraph.ops.op import UnsupportedFormError, lookup
from morphgraph.passes.canonical.ask_runtime import Runtime
from morphgraph.passes.canonical.fold_values import (
    FOLD_LIMIT_BYTES,
    KnownValues,
    plain_attributes,
)

INFERENCE_DATA = 4096  # elements of an operand that shape inference may look into
_FLOATS = 64  # of those that are no integers: scales per axis decide on sizes, weights do not

# Operators that ONNX has withdrawn in some version, while ONNX Runtime still runs that.
_WITHDRAWN = {"GroupNormalization"}

# The type and shape of a result; None where nothing was inferred.
_Result = tuple[ir.TypeProtocol | None, ir.Shape | Shape | None] | None
_Results = tuple[_Result, ...]

_INFERENCE_ERRORS = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    RuntimeError,
    ValueError,
    TypeError,
)


class _Message(NamedTuple):
    """A message as ``onnx`` hands it on to its inference: nobody looks at more than this.

    Attributes:
        content: what it is serialized to.
        input: of a node the names of its operands.
    """

    content: bytes
    input: tuple[str, ...] = ()

    def SerializeToString(self) -> bytes:  # noqa: N802  # as protobuf calls it
        return self.content


class _Form(NamedTuple):
    """All of a node that its operator's schema speaks of: sizes and types are none of it.

    Attributes:
        kind: the operator.
        attributes: as of ``plain_attributes``.
        given: which operands are there.
        wanted: which results have a name.
    """

    kind: tuple[str, str, str]
    attributes: Hashable
    given: tuple[bool, ...]
    wanted: tuple[bool, ...]


class MisfitError(ModelError):
    """Operands do not fit together at the sizes that the inputs have.

    Attributes:
        sizes: of the operands, and numbers that stand in them; one of them may be right where
            another is now.
    """

    def __init__(self, message: str, sizes: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.sizes = tuple(sizes)


class ResultTypes:
    """Infers types and shapes of results, node by node in topological order.

    Args:
        model: its operator sets say how ONNX infers.
        known: the numbers that inference may look into.
    """

    def __init__(self, model: ir.Model, known: KnownValues) -> None:
        self.known = known
        self.runtime = Runtime(model, known)
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
        self.schemas: dict[tuple[str, str], onnx.defs.OpSchema | None] = {}
        self.repeated: dict[Hashable, _Results] = {}
        self.valid: set[_Form] = set()

    def infer(self, node: ir.Node) -> None:
        """Write types and shapes on a node's results; what cannot be inferred stays as declared.

        Raises:
            ModelError: the node is not valid, or its operands do not fit together.
        """
        self._infer(node)
        self._check_places(node)
        for value in node.outputs:
            sizes = known_shape(value) or ()
            if min(sizes, default=0) < 0:  # a kernel that is larger than what it moves over
                name = escape(value.name or "")
                raise self._misfit(node, f"its result '{name}' would have the size {min(sizes)}")

    def _infer(self, node: ir.Node) -> None:
        key = self._key(node)
        if key in self.repeated:
            _write(node, self.repeated[key])
            return
        schema = self._schema(node)
        if schema is None:
            entry = entry_of(node.op_type, node.domain)
            self._infer_by_entry(node, entry)
            self._ask(node, entry)
            return
        message = node_message(node)
        if schema.since_version <= self.opsets[node.domain]:
            self._check(node, message)
        results = self._infer_by_onnx(node, message, schema)
        if any(map(_is_sized, results)):
            self._check_reshape(node)
            if key is not None:
                self.repeated[key] = results
            return
        entry = lookup(node.op_type, node.domain)
        if entry is not None and entry.shape is not None:
            # Declared shapes may be those of before the inputs were made static.
            self._infer_by_entry(node, entry, outdated=True)
        if not schema.has_type_and_shape_inference_function:
            self._ask(node, entry)

    def _key(self, node: ir.Node) -> Hashable:
        """All that ONNX infers a node's results from; ``None`` where that is more than a little."""
        attributes = plain_attributes(node)
        if attributes is None:
            return None
        operands: list[Hashable] = []
        for value in node.inputs:
            if value is None:
                operands.append(None)
                continue
            if type(value.type) is not ir.TensorType or value.dtype == ir.DataType.STRING:
                return None
            tensor = self._data(value)
            numbers = None if tensor is None else tensor.numpy().tobytes()
            shape = None if value.shape is None else value.shape.dims
            operands.append((value.dtype, shape, numbers))
        results = tuple([bool(value.name) for value in node.outputs])
        kind = node.domain, node.op_type, node.overload
        return kind, attributes, tuple(operands), results

    def _data(self, value: ir.Value) -> ir.TensorProtocol | None:
        """The numbers of an operand that inference may look into, where they are known."""
        tensor = self.known.get(value)
        if tensor is None:
            return None
        size = prod(cast("Shape", tensor.shape.dims))
        if size > INFERENCE_DATA:
            return None
        return None if size > _FLOATS and tensor.dtype.is_floating_point() else tensor

    def _schema(self, node: ir.Node) -> onnx.defs.OpSchema | None:
        """ONNX's own description of an operator."""
        kind = node.domain, node.op_type
        if kind not in self.schemas:
            self.schemas[kind] = self._found_schema(node)
        return self.schemas[kind]

    def _found_schema(self, node: ir.Node) -> onnx.defs.OpSchema | None:
        """The description in the model's opset, else the first later one.

        ONNX Runtime writes operators such as LayerNormalization into models of older opsets.
        """
        version = self.opsets.get(node.domain)
        if version is None or not onnx.defs.has(node.op_type, node.domain):
            return None
        if onnx.defs.has(node.op_type, version, node.domain):
            return onnx.defs.get_schema(node.op_type, version, node.domain)
        newest = onnx.defs.get_schema(node.op_type, domain=node.domain)
        return newest if newest.since_version > version else None

    def _ask(self, node: ir.Node, entry: type[Op] | None) -> None:
        """Have ONNX Runtime say what results nobody else knows the sizes of."""
        unknown = [v for v in node.outputs if v.name and (known_shape(v) is None or v.type is None)]
        if not unknown or (entry is not None and entry.sized_by_data) or subgraphs(node):
            return
        types = self.runtime.results(node)
        for value, found in zip(node.outputs, types or (), strict=False):
            if value in unknown and found is not None:
                value.type, value.shape = found

    def _check(self, node: ir.Node, message: bytes) -> None:
        """Operands and attributes are as many, and of such kinds, as the operator's schema says."""
        attributes = plain_attributes(node)
        if attributes is None and subgraphs(node):
            return
        if node.op_type in _WITHDRAWN and not node.domain:
            return
        form = _Form(
            (node.domain, node.op_type, node.overload),
            attributes,
            tuple([value is not None and bool(value.name) for value in node.inputs]),
            tuple([bool(value.name) for value in node.outputs]),
        )
        if form in self.valid:
            return
        try:
            onnx.checker.check_node(onnx.NodeProto.FromString(message), self.checker_context)
        except onnx.checker.ValidationError as error:
            reason = escape(" ".join(str(error).split()))
            raise ModelError(f"{node_label(node)}: is not valid: {reason}") from error
        if attributes is not None:
            self.valid.add(form)

    def _infer_by_onnx(self, node: ir.Node, message: bytes, schema: onnx.defs.OpSchema) -> _Results:
        """Write what ONNX infers, and return it."""
        operands = [value for value in (*node.inputs, *captured_values(node)) if value is not None]
        types = {v.name or "": t for v in operands if (t := self._type_message(v)) is not None}
        if schema.deprecated or any(value.name not in types for value in operands):
            return ()
        data = {
            value.name or "": tensor_message(value.name or "", tensor)
            for value in operands
            if (tensor := self._data(value)) is not None
        }
        try:
            inferred = self._inferred(schema, message, types, data)
        except _INFERENCE_ERRORS as error:
            raise self._misfit(node, escape(" ".join(str(error).split()))) from error
        results = tuple(_read(inferred.get(output.name or "")) for output in node.outputs)
        _write(node, results)
        return results

    def _type_message(self, value: ir.Value) -> bytes | None:
        """The type and shape of a value, as far as they are known."""
        kind, shape = value.type, value.shape
        if kind is None:
            return None
        if shape is not None and type(kind) is ir.TensorType and kind.denotation is None:
            sizes = known_shape(value)
            if sizes is not None:
                return type_message(kind.dtype, sizes)
        proto = ir.serde.serialize_type(kind)
        if shape is not None:
            ir.serde.serialize_shape_into(proto, shape)
        return bytes(proto.SerializeToString())

    def _check_reshape(self, node: ir.Node) -> None:
        """Refuse a Reshape to another number of elements, which ONNX's inference lets pass."""
        if node.op_type != "Reshape" or node.domain:
            return
        before, after = known_shape(node.inputs[0]), known_shape(node.outputs[0])
        if before is not None and after is not None and prod(before) != prod(after):
            raise self._misfit(node, f"{prod(before)} elements cannot become {prod(after)}")

    def _check_places(self, node: ir.Node) -> None:
        """Refuse a Gather at known places that an axis does not have, as runtimes do."""
        if node.op_type != "Gather" or node.domain or len(node.inputs) != 2:
            return
        shape, places = known_shape(node.inputs[0]), self.known.get(node.inputs[1])
        if not shape or places is None or places.nbytes > FOLD_LIMIT_BYTES:
            return
        if self.known.constant(node.inputs[0]) is not None:
            return  # a table, whose rows may be fewer than the positions that are tried
        size, numbers = shape[node.attributes.get_int("axis", 0)], places.numpy()
        if numbers.size and not -size <= numbers.min() <= numbers.max() < size:
            worst = numbers.max() if numbers.max() >= size else numbers.min()
            raise self._misfit(node, f"it reads place {worst} of an axis of {size}")

    def _misfit(self, node: ir.Node, reason: str) -> MisfitError:
        """The error that a node's operands do not fit together; it names their sizes."""
        sizes: list[int] = []
        operands = []
        for value in node.inputs:
            shape = known_shape(value)
            if value is None or shape is None:
                continue
            tensor = self.known.get(value)
            if tensor is not None and tensor.dtype == ir.DataType.INT64 and tensor.size <= 8:
                numbers = tensor.numpy().reshape(-1).tolist()
                sizes += [prod(abs(n) for n in numbers if n), *numbers]
                operands.append(f"[{','.join(map(str, numbers))}]")
            else:
                sizes += [prod(shape), *shape]
                operands.append("x".join(map(str, shape)) or "scalar")
        what = f"{', '.join(operands)}: {reason}"
        return MisfitError(f"{node_label(node)}: its operands do not fit together: {what}", sizes)

    def _inferred(
        self,
        schema: onnx.defs.OpSchema,
        message: bytes,
        types: Mapping[str, bytes],
        data: Mapping[str, bytes],
    ) -> dict[str, onnx.TypeProto]:
        """What ONNX infers; where an operator does not know bfloat16 yet, as if it were float16.

        PyTorch exports convolutions in bfloat16 to opsets whose Conv does not list it.
        """
        is_function = schema.has_function  # type: ignore[attr-defined]  # not in onnx's stubs
        if is_function and not schema.has_type_and_shape_inference_function:
            return _inferred_from_body(message, types, self.opset_protos)
        try:
            return self._outputs(schema, message, types, data)
        except _INFERENCE_ERRORS as error:
            bfloat16, float16 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16
            protos = {name: onnx.TypeProto.FromString(each) for name, each in types.items()}
            if all(t.tensor_type.elem_type != bfloat16 for t in protos.values()):
                raise
            types = {
                name: _retyped(t, bfloat16, float16).SerializeToString()
                for name, t in protos.items()
            }
            of_others = {
                name: each
                for name, each in data.items()
                if onnx.TensorProto.FromString(each).data_type != bfloat16
            }
            try:
                inferred = self._outputs(schema, message, types, of_others)
            except _INFERENCE_ERRORS:
                raise error from None  # the first one speaks of the types that the model has
            return {name: _retyped(t, float16, bfloat16) for name, t in inferred.items()}

    def _outputs(
        self,
        schema: onnx.defs.OpSchema,
        message: bytes,
        types: Mapping[str, bytes],
        data: Mapping[str, bytes],
    ) -> dict[str, onnx.TypeProto]:
        """What ONNX infers of a node's results."""
        infer: Any = onnx.shape_inference.infer_node_outputs
        found: dict[str, onnx.TypeProto] = infer(
            schema,
            _Message(message, tuple(types)),
            {name: _Message(each) for name, each in types.items()},
            {name: _Message(each) for name, each in data.items()},
            opset_imports=self.opset_protos,
        )
        return found

    def _infer_by_entry(
        self, node: ir.Node, entry: type[Op] | None, outdated: bool = False
    ) -> None:
        """Write the shapes that an operator's entry gives; declared ones stay if not ``outdated``.

        The description of the entry is bound to the shapes here as well as in the coupling: here
        an error names the node that is at fault, before a later one stumbles over its shape.
        """
        operands = [value for value in node.inputs if value is not None]
        if entry is None or any(known_shape(value) is None for value in operands):
            return
        results = [value for value in node.outputs if value.name]
        missing = outdated or any(known_shape(value) is None for value in results)
        try:
            if entry.shape is not None and missing:
                shapes = entry.call(entry.shape, node, *map(known_shape, node.inputs))
                _write_shapes(node, shapes, entry.typed_by, outdated)
            if all(known_shape(value) is not None for value in results):
                describe(OpNode(node))
        except UnsupportedFormError:
            return  # nothing is known of this form of it
        except NotationError as error:
            sizes = [size for value in operands for size in known_shape(value) or ()]
            raise MisfitError(
                f"{node_label(node)}: shape mismatch: {error}; {mismatch_hint(entry)}", sizes
            ) from error
        except Exception as error:
            raise ModelError(
                f"{node_label(node)}: its entry raised {type(error).__name__}: {error}; "
                f"{mismatch_hint(entry)}"
            ) from error


def _inferred_from_body(
    message: bytes,
    types: Mapping[str, bytes],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> dict[str, onnx.TypeProto]:
    """What ONNX infers from the body of an operator that is a function (of a node by itself)."""
    proto = onnx.NodeProto.FromString(message)
    declared = {name: onnx.TypeProto.FromString(each) for name, each in types.items()}
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [onnx.helper.make_value_info(name, each) for name, each in declared.items()],
        [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output if name],
    )
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    inferred = onnx.shape_inference.infer_shapes(model).graph.output
    return {value.name: value.type for value in inferred if value.HasField("type")}


def require_fit(graph: ir.Graph) -> None:
    """Check that all operands fit their operators' entries: ONNX's inference is not that strict.

    Raises:
        MisfitError: some do not, such as an image of other channels than a convolution's.
    """
    for node in graph:
        try:
            op_node = OpNode(node)
            describe(op_node)
        except NotationError as error:
            sizes = [size for shape in op_node.in_shapes for size in shape or ()]
            raise MisfitError(f"{node_label(node)}: shape mismatch: {error}", sizes) from error


def _retyped(declared: onnx.TypeProto, old: int, new: int) -> onnx.TypeProto:
    """The same tensor type with another element type, if it has the old one."""
    if declared.tensor_type.elem_type != old:
        return declared
    copy = onnx.TypeProto()
    copy.CopyFrom(declared)
    copy.tensor_type.elem_type = new
    return copy


def _read(inferred: onnx.TypeProto | None) -> _Result:
    """A type that ONNX has inferred, and the shape with it."""
    if inferred is None or is_map_type(inferred):
        return None  # onnx_ir has no maps
    tensor = inferred.tensor_type
    if tensor.HasField("shape") and tensor.HasField("elem_type") and not inferred.denotation:
        sizes = tuple([dim.dim_value for dim in tensor.shape.dim])
        if 0 not in sizes:  # one that is open reads as 0
            return ir.TensorType(ir.DataType(tensor.elem_type)), sizes
    return (
        ir.serde.deserialize_type_proto_for_type(inferred),
        ir.serde.deserialize_type_proto_for_shape(inferred),
    )


def _is_sized(result: _Result) -> bool:
    """Whether a tensor's shape was inferred."""
    return result is not None and type(result[0]) is ir.TensorType and result[1] is not None


def _write(node: ir.Node, results: _Results) -> None:
    """Write inferred types; a size that inference leaves open stays as the file declares it."""
    for value, result in zip(node.outputs, results, strict=False):
        if result is None:
            continue
        type_, shape = result
        value.type = type_
        if isinstance(shape, tuple):
            value.shape = shape_of(shape)
            continue
        declared = value.shape
        if shape is None:
            continue
        if declared is None or len(declared) != len(shape):
            value.shape = ir.Shape(shape)
            continue
        value.shape = ir.Shape(
            size if isinstance(size, int) else old
            for size, old in zip(shape, declared, strict=True)
        )


def _write_shapes(
    node: ir.Node, shapes: Sequence[Any], typed_by: int | tuple[int, ...], outdated: bool
) -> None:
    """Write the shapes of results: one, or one per result; declared ones stay if not outdated."""
    several = any(shape is None or isinstance(shape, Sequence) for shape in shapes)
    for k, (value, shape) in enumerate(
        zip(node.outputs, shapes if several else [shapes], strict=False)
    ):
        source = typed_by if isinstance(typed_by, int) else typed_by[k]
        like = node.inputs[source] if source < len(node.inputs) else None
        if value.type is None and like is not None and shape is not None:
            value.type = like.type
        if shape is not None and (outdated or known_shape(value) is None):
            value.shape = ir.Shape(shape)
