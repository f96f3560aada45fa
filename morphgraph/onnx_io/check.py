"""Check an ONNX message before a weight is touched or memory allocated.

``onnx.checker`` accepts some of these models and names neither node nor remedy for the others. All
checks here are linear in the size of the message, and none recurses: subgraphs wait in a list.
"""

import math
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

import onnx
import onnx_ir as ir

from morphgraph.errors import ModelError, UnsupportedError, warn
from morphgraph.words import escape as escape

MIN_OPSET = 11
_KNOWN_TYPES = frozenset(dtype.value for dtype in ir.DataType) - {ir.DataType.UNDEFINED.value}
MAX_RANK = 64  # as in NumPy
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum", "basepath"}  # as onnx.proto says


def check_proto(proto: onnx.ModelProto, folder: str | None, elsewhere: Container[str] = ()) -> bool:
    """Check a model; tell whether the nodes of every graph stand in topological order.

    Args:
        proto: the model.
        folder: absolute path of the folder that external data must lie in.
        elsewhere: the graph's initializers whose data is right and does not stand in the message.

    Raises:
        ModelError: the first thing that is wrong.
        UnsupportedError: the model is valid, but holds sparse weights.
    """
    _check_versions(proto)
    if not proto.graph.output:
        raise ModelError("not a valid model: it has no outputs; export it again")
    scopes = [_Scope.of_graph(proto.graph, None, -1)]
    for function in proto.functions:
        _check_text(function.name, function.domain, function.overload, *function.attribute)
        scopes.append(_Scope.of_function(function))
    for scope in scopes:  # grows while subgraphs are found
        if scope.graph is not None:
            is_main = scope is scopes[0]
            _check_graph(scope.graph, folder, elsewhere if is_main else (), is_main)
        for index, node in enumerate(scope.nodes):
            words = node.name, node.op_type, node.domain, node.doc_string
            _check_text(*words, *node.input, *node.output)
            for attribute in node.attribute:
                _check_text(attribute.name, attribute.doc_string)
                if not attribute.name or attribute.type == onnx.AttributeProto.UNDEFINED:
                    raise ModelError(
                        f"{_describe(node, index)}: attribute '{escape(attribute.name)}' has no "
                        "name or type; export the model again"
                    )
                for tensor in _tensors(attribute):
                    where = f"{_describe(node, index)}: attribute '{escape(attribute.name)}'"
                    check_tensor(tensor, where, folder)
                subgraphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
                scopes += [_Scope.of_graph(graph, scope, index) for graph in subgraphs]
    for scope in scopes:
        scope.resolve_inputs()
    sorted_scopes = [scope.is_sorted() for scope in scopes]
    return all(sorted_scopes)


def check_tensor(tensor: onnx.TensorProto, where: str, folder: str | None) -> None:
    """Check that a tensor holds, or points to, exactly the bytes that it declares.

    Raises:
        ModelError: type, sizes or amount of data are wrong, or the external file may not be read.
    """
    _check_text(tensor.name, tensor.doc_string)
    dtype = _dtype(tensor.data_type, where)
    negative = [size for size in tensor.dims if size < 0]
    if negative:
        raise ModelError(f"{where}: negative size {negative[0]}; export the model again")
    if len(tensor.dims) > MAX_RANK:
        raise ModelError(
            f"{where}: has {len(tensor.dims)} axes, at most {MAX_RANK} are supported; export the "
            "model again"
        )
    count = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise ModelError(f"{where}: strings cannot be external data; export the model again")
        _check_external(tensor, where, _bytes(count, dtype), folder)
        return
    if dtype == ir.DataType.STRING:
        need, have, unit = count, len(tensor.string_data), "strings"
    elif tensor.HasField("raw_data") or count == 0:
        need, have, unit = _bytes(count, dtype), len(tensor.raw_data), "bytes"
    else:
        need, have, unit = _stored_numbers(tensor, dtype, count)
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data)
    strays = (
        sum(map(len, (*fields, tensor.uint64_data, tensor.string_data, tensor.raw_data))) - have
    )
    if strays:
        raise ModelError(f"{where}: stores data of more than one type; the file is damaged")
    # Six-bit numbers may be padded to a whole group of four, which is three bytes.
    padding = 2 if dtype in (ir.DataType.FLOAT6E2M3, ir.DataType.FLOAT6E3M2) else 0
    if not need <= have <= need + padding:
        sizes = "x".join(str(size) for size in tensor.dims[:16])
        raise ModelError(
            f"{where}: declares {sizes or 'a scalar'} of {dtype}, which needs {need} {unit}, "
            f"but stores {have}; the file is damaged, export it again"
        )


def _bytes(count: int, dtype: ir.DataType) -> int:
    """How many bytes so many numbers take; exact, for sizes in damaged files have no bounds."""
    return -(-count * dtype.bitwidth // 8)


def _check_text(*texts: str | bytes) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise ModelError(f"name '{escape(text)}' is not UTF-8; the file is damaged")


def _check_versions(proto: onnx.ModelProto) -> None:
    if not proto.HasField("graph"):
        raise ModelError("not a valid model: it has no graph; export it again")
    if proto.ir_version <= 0 or not proto.opset_import:
        missing = "operator set" if proto.ir_version > 0 else "IR version"
        raise ModelError(f"not a valid model: it names no {missing}; export it again")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"IR version {proto.ir_version} is newer than the newest supported, "
            f"{onnx.IR_VERSION}; upgrade the package onnx or export for an older version"
        )
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx"):
            if opset.version < 1:
                raise ModelError(f"opset {opset.version} does not exist; export the model again")
            check_opset(max(opset.version, MIN_OPSET))  # older ones are raised to it


def check_opset(version: int) -> None:
    """Check that the standard operators of this opset are known.

    Raises:
        ModelError: the opset is older or newer than what is supported.

    >>> check_opset(20)
    """
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise ModelError(
            f"opset {version} is newer than the newest supported, {newest}; "
            "upgrade the package onnx or export for an older opset"
        )
    if version < MIN_OPSET:
        raise ModelError(
            f"opset {version} is older than the oldest supported, {MIN_OPSET}; export again with a "
            "newer opset, or convert with onnx.version_converter"
        )


def _check_graph(
    graph: onnx.GraphProto, folder: str | None, elsewhere: Container[str], is_main: bool
) -> None:
    _check_text(graph.name, graph.doc_string)
    for tensor in graph.initializer:
        if tensor.name in elsewhere:
            _check_text(tensor.doc_string)
        else:
            check_tensor(tensor, f"initializer '{escape(tensor.name)}'", folder)
    for sparse in graph.sparse_initializer:
        raise UnsupportedError(
            f"initializer '{escape(sparse.values.name)}': sparse weights are not supported; "
            "store them as dense tensors"
        )
    for role, infos in (
        ("input", graph.input),
        ("output", graph.output),
        ("value", graph.value_info),
    ):
        for info in infos:
            if not info.type.HasField("tensor_type"):
                continue
            _check_text(info.name, info.doc_string)
            tensor_type = info.type.tensor_type
            code = tensor_type.elem_type
            if code not in _KNOWN_TYPES and (code or (role == "input" and is_main)):
                _dtype(code, f"{role} '{escape(info.name)}'")
            dims = tensor_type.shape.dim
            _check_text(*[dim.dim_param for dim in dims])
            # PaddlePaddle writes -1 for a size that is open.
            if min([dim.dim_value for dim in dims], default=0) < -1:
                raise ModelError(
                    f"{role} '{escape(info.name)}': its shape has a negative size; export the "
                    "model again"
                )


def _tensors(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors


def _dtype(code: int, where: str) -> ir.DataType:
    try:
        dtype = ir.DataType(code)
    except ValueError as error:
        raise ModelError(f"{where}: unknown data type {code}; export the model again") from error
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{where}: its data type is not set; export the model again")
    return dtype


def _stored_numbers(
    tensor: onnx.TensorProto, dtype: ir.DataType, count: int
) -> tuple[int, int, str]:
    """Numbers needed, numbers found, and what they are, for data in a typed field."""
    match dtype:
        case ir.DataType.FLOAT:
            return count, len(tensor.float_data), "numbers"
        case ir.DataType.COMPLEX64:
            return 2 * count, len(tensor.float_data), "numbers"
        case ir.DataType.DOUBLE:
            return count, len(tensor.double_data), "numbers"
        case ir.DataType.COMPLEX128:
            return 2 * count, len(tensor.double_data), "numbers"
        case ir.DataType.INT64:
            return count, len(tensor.int64_data), "numbers"
        case ir.DataType.UINT32 | ir.DataType.UINT64:
            return count, len(tensor.uint64_data), "numbers"
        case _ if dtype.bitwidth < 8:  # packed, several to a byte, a byte to an entry
            return _bytes(count, dtype), len(tensor.int32_data), "packed bytes"
        case _:
            return count, len(tensor.int32_data), "numbers"


def _check_external(tensor: onnx.TensorProto, where: str, need: int, folder: str | None) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    unknown = sorted(entries.keys() - _EXTERNAL_KEYS)
    if unknown:
        warn(f"{where}: entry '{escape(unknown[0])}' of its external data is none, and is ignored")
    location = entries.get("location", "")
    if folder is None:
        raise ModelError(
            f"{where}: its data is in an external file; load the model by path, not as a message"
        )
    path = _external_path(location, where, folder)
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", need))
    except ValueError as error:
        raise ModelError(f"{where}: external offset or length is not a number") from error
    if offset < 0 or length < need:
        raise ModelError(
            f"{where}: external data has offset {offset} and length {length}, but {need} bytes "
            "are needed; export the model again"
        )
    size = os.stat(path).st_size
    if offset + length > size:
        raise ModelError(
            f"{where}: needs {offset + length} bytes of external file '{escape(location)}', "
            f"which has {size}; copy it again"
        )


def _external_path(location: str, where: str, folder: str) -> str:
    shown = f"external file '{escape(location)}'"
    parts = location.replace("\\", "/").split("/")
    if not location or "_ORT_MEM_ADDR_" in location or "\0" in location:
        raise ModelError(f"{where}: {shown} is not a file; export the model again")
    if os.path.isabs(location) or ".." in parts or ":" in parts[0]:
        raise ModelError(
            f"{where}: {shown} is refused: it must lie in the model's folder; copy it there"
        )
    path = os.path.join(folder, location)
    resolved = os.path.realpath(path)
    if not resolved.startswith(os.path.join(os.path.realpath(folder), "")):
        raise ModelError(
            f"{where}: {shown} is refused: it links out of the model's folder; copy the file itself"
        )
    if not os.path.exists(resolved):
        raise ModelError(f"{where}: {shown} is missing; copy it beside the model")
    if not os.path.isfile(resolved) or not os.access(resolved, os.R_OK):
        raise ModelError(f"{where}: {shown} is not a readable file")
    if os.stat(resolved).st_nlink > 1:
        # A hard link may make any file of the user look like a part of the model.
        raise ModelError(f"{where}: {shown} is refused: it has several hard links; copy the file")
    return resolved


def _describe(node: onnx.NodeProto, index: int) -> str:
    if node.name:
        return f"node '{escape(node.name)}' ({escape(node.op_type)})"
    output = f", output '{escape(node.output[0])}'" if node.output else ""
    return f"unnamed node {index} ({escape(node.op_type)}{output})"


@dataclass
class _Scope:
    """A graph or function body: who makes each name, and which node needs which."""

    graph: onnx.GraphProto | None
    nodes: Sequence[onnx.NodeProto]
    outputs: Sequence[str]
    parent: "_Scope | None"
    owner: int  # index of the node of the parent that holds this graph
    producers: dict[str, int] = field(default_factory=dict)  # -1: an input or initializer
    needs: list[set[int]] = field(default_factory=list)  # by node: nodes that must run before

    @classmethod
    def of_graph(cls, graph: onnx.GraphProto, parent: "_Scope | None", owner: int) -> "_Scope":
        scope = cls(graph, graph.node, [info.name for info in graph.output], parent, owner)
        scope._declare([info.name for info in graph.input], "input")
        inputs = scope.producers
        scope.producers = {}
        scope._declare([tensor.name for tensor in graph.initializer], "initializer")
        scope.producers.update(inputs)  # an initializer may give an input its default
        scope._declare_nodes()
        return scope

    @classmethod
    def of_function(cls, function: onnx.FunctionProto) -> "_Scope":
        scope = cls(None, function.node, function.output, None, -1)
        scope._declare(function.input, "input")
        scope._declare_nodes()
        return scope

    def _declare(self, names: Iterable[str], role: str) -> None:
        for name in names:
            if not name:
                raise ModelError(f"an {role} has no name; export the model again")
            _check_text(name)
            if name in self.producers:
                raise ModelError(
                    f"{role} '{escape(name)}' is there twice; remove one of the two or export again"
                )
            self.producers[name] = -1

    def _declare_nodes(self) -> None:
        for index, node in enumerate(self.nodes):
            for name in filter(None, node.output):
                other = self.producers.get(name)
                if other is not None:
                    first = "an input or initializer"
                    if other >= 0:
                        first = _describe(self.nodes[other], other)
                    raise ModelError(
                        f"value '{escape(name)}' is made twice: by {first} and by "
                        f"{_describe(node, index)}; rename one of the two"
                    )
                self.producers[name] = index
        self.needs = [set() for _ in self.nodes]

    def resolve_inputs(self) -> None:
        """Find the producer of every input, in this scope or in one around it."""
        producers, needs = self.producers, self.needs
        for index, node in enumerate(self.nodes):
            for name in node.input:
                producer = producers.get(name)
                if producer is not None and producer >= 0:
                    needs[index].add(producer)
                elif producer is None and name and not self._require(name, index):
                    raise ModelError(
                        f"{_describe(node, index)}: input '{escape(name)}' is made by no node, "
                        "input or initializer; export the model again"
                    )
        for name in self.outputs:
            if not self._require(name, None):
                raise ModelError(
                    f"output '{escape(name)}' is made by no node, input or initializer; "
                    "export the model again"
                )

    def _require(self, name: str, index: int | None) -> bool:
        scope = self
        while name not in scope.producers:
            if scope.parent is None:
                return False
            index = scope.owner
            scope = scope.parent
        producer = scope.producers[name]
        if producer >= 0 and index is not None:
            scope.needs[index].add(producer)
        return True

    def is_sorted(self) -> bool:
        """Whether every node stands after those that it needs.

        Raises:
            ModelError: no order can be found, because nodes need each other in a circle.
        """
        if all(all(n < index for n in needed) for index, needed in enumerate(self.needs)):
            return True
        try:
            TopologicalSorter(dict(enumerate(self.needs))).prepare()
        except CycleError as error:
            shown = [_describe(self.nodes[index], index) for index in error.args[1]]
            if len(shown) > 6:
                shown[5:-1] = ["..."]
            raise ModelError(
                f"the graph has a cycle: {' -> '.join(shown)}; export the model again"
            ) from error
        return False
