"""Read and write ONNX files: lazily, atomically, and with one clear line for whatever is wrong.

Weights stand in arrays of their own for ordinary models, and stay where they are until somebody
asks for them, memory-mapped, for models with external data. Protobuf appears at this border only;
the rest of the program works on ``onnx_ir.Model``.
"""

import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import (  # type: ignore[import-untyped]  # ships no types
    DecodeError,
    EncodeError,
)

from morphgraph.arrays import Array, Arrays
from morphgraph.errors import FileError, ModelError, MorphError, warn
from morphgraph.onnx_io.atomic import check_target, os_errors, put, write_atomically
from morphgraph.onnx_io.calls import check_functions
from morphgraph.onnx_io.check import MAX_RANK, MIN_OPSET, check_proto, escape
from morphgraph.onnx_io.mapped import is_stored
from morphgraph.onnx_io.maps import note_maps, without_maps
from morphgraph.onnx_io.model import bind_inputs, root_cause
from morphgraph.onnx_io.old_opsets import raised, standard_opset
from morphgraph.onnx_io.same_raised import require_same
from morphgraph.onnx_io.values import graphs_of
from morphgraph.onnx_io.wire import WireError, parted
from morphgraph.onnx_io.written import PLAIN_TYPES, written

ModelLike = ir.Model | onnx.ModelProto | str | PathLike[str]
"""A model, or where one comes from: a protobuf message or a file."""

_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_INLINE_LIMIT_BYTES = 1_900_000_000  # weights beyond this go to an external data file
_EXTERNAL_TENSOR_BYTES = 1024  # smaller tensors stay in the message, where shapes are read from

# What a file is that is not ONNX, by how it begins.
_FOREIGN_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "it is a Git LFS pointer; run `git lfs pull`"),
    (b"\x93NUMPY", "it is an array of NumPy; give the model itself"),
    (b"PK\x03\x04", "it is a PyTorch or zip file; export the network to ONNX first"),
    *(
        (protocol, "it is a Python pickle, which is never opened; export the network to ONNX")
        for protocol in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    ),
    (b"\x89HDF", "it is an HDF5 file; export the network to ONNX first"),
    (b"\x1f\x8b", "it is compressed; run gunzip first"),
    *(
        (magic, f"it is compressed; unpack it with {tool} first")
        for magic, tool in (
            *((b"BZh", "bunzip2"), (b"\xfd7zXZ\x00", "unxz")),
            *((b"\x28\xb5\x2f\xfd", "unzstd"), (b"7z\xbc\xaf\x27\x1c", "7z")),
        )
    ),
    (b"GGUF", "it is a GGUF file; export the network to ONNX first"),
)
# The same where the mark stands behind an offset.
_FOREIGN_MARKS = {
    b"TFL3": "it is a TensorFlow Lite file; convert the original network to ONNX",
    b"ORTM": "it is in ONNX Runtime's own format; give the ONNX file that it was made of",
}


_NONE: Mapping[str, Array] = MappingProxyType({})


def load(
    path: str | PathLike[str], input_shapes: Mapping[str, Sequence[int]] | None = None
) -> ir.Model:
    """Read an ONNX file.

    Everything that can be wrong with a file is looked for before a weight is touched, in time
    linear in its size. The model is returned as it stands in the file, apart from ``input_shapes``
    and from the order of its nodes, which is made topological; one of an older opset than 11 is
    raised to that, with a warning; see ``canonicalize`` for more.

    Args:
        path: the file; external data is looked for beside it and nowhere else.
        input_shapes: sizes for graph inputs whose shape the file leaves open.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file is not ONNX, is damaged, or describes an impossible model.
    """
    location = Path(os.path.abspath(path))
    proto, weights = _read_proto(location)
    model = _from_proto(proto, str(location), str(location.parent), weights)
    return bind_inputs(model, input_shapes) if input_shapes else model


def save(model: ir.Model, path: str | PathLike[str], overwrite: bool = False) -> None:
    """Write a model to a file that appears whole or not at all.

    Weights go to ``NAME.onnx.data`` beside it where they are more than about 1.9 GB together, for
    protobuf cannot hold them, and where they stood in such a file before: then they pass from file
    to file in blocks, and never all stand in memory. The model itself is left as it is.

    Raises:
        FileError: the file exists already (without ``overwrite``) or cannot be written.
    """
    location = Path(os.path.abspath(path))
    if not _wants_external_data(model):
        try:
            content = written(_internalized(model))
        except (ir.serde.SerdeError, EncodeError, ValueError) as error:
            raise ModelError(
                f"{escape(str(location))}: cannot be written as one protobuf message: "
                f"{escape(root_cause(error))}"
            ) from error
        write_atomically(location, content, overwrite)
        return
    data = data_file(location)
    for target in (location, data):
        check_target(target, overwrite)
    with os_errors(location):
        folder = Path(tempfile.mkdtemp(prefix=f".{location.name}.", dir=location.parent))
        try:
            ir.save(
                model.clone(),
                folder / location.name,
                external_data=data.name,
                size_threshold_bytes=_EXTERNAL_TENSOR_BYTES,
            )
            if overwrite:  # never a model beside the data of another
                location.unlink(missing_ok=True)
            put(folder / data.name, data, overwrite)
            try:
                put(folder / location.name, location, overwrite)
            except BaseException:
                data.unlink(missing_ok=True)
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def data_file(path: Path) -> Path:
    """Where weights go that do not fit into the file itself, or were not in one before."""
    return path.parent / f"{path.name}.data"  # a folder such as "." has no name


def files_of(path: Path) -> list[Path]:
    """The files that a model consists of: its own, and those that its weights stand in.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: it is not ONNX.
    """
    proto, _ = _read_message(path)
    names = {
        entry.value
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path, *(path.parent / name for name in sorted(names))]


def as_model(model: ModelLike) -> ir.Model:
    """The model itself, or the one that a protobuf message or a file describes.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file or message is not a valid model.
    """
    if isinstance(model, ir.Model):
        versions = model.opset_imports
        if 0 < versions.get("", versions.get("ai.onnx", MIN_OPSET)) < MIN_OPSET:
            return _from_proto(ir.to_proto(model), "model", None)
        return model
    if isinstance(model, onnx.ModelProto):
        return _from_proto(model, "model", None)
    return load(model)


def _read_proto(path: Path) -> tuple[onnx.ModelProto, Arrays]:
    """The message in a file without its large weights, and these by name."""
    proto, held = _read_message(path)
    with os_errors(path):
        return proto, _read_weights(proto, held, path)


def _read_message(path: Path) -> tuple[onnx.ModelProto, Mapping[str, slice]]:
    """The message in a file without its large weights, and where these stand, by name."""
    where = escape(str(path))
    with os_errors(path):
        if path.is_dir():
            raise FileError(f"{where}: is a folder; give the .onnx file in it")
        if path.exists() and not path.is_file():
            raise FileError(f"{where}: is not an ordinary file")
        size = path.stat().st_size
        if size == 0:
            raise ModelError(f"{where}: the file is empty; export or download it again")
        if size > _PROTOBUF_LIMIT_BYTES:
            raise ModelError(
                f"{where}: {size} bytes are more than protobuf can hold (2 GiB); "
                "save the model with external data"
            )
        with path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    for beginning, explanation in _FOREIGN_BEGINNINGS:
        if content[: len(beginning)] == beginning:
            raise ModelError(f"{where}: not an ONNX file: {explanation}")
    proto = onnx.ModelProto()
    try:
        light, held = parted(content)
    except WireError:
        light, held = bytes(content), {}
    try:
        proto.ParseFromString(light)
    except DecodeError as error:
        raise ModelError(f"{where}: {_why_undecodable(bytes(content))}") from error
    return proto, held


def _read_weights(proto: onnx.ModelProto, held: Mapping[str, slice], path: Path) -> Arrays:
    """Arrays of what was held back, and of small weights that stand in the message.

    What is not exactly as it should be goes into the message, or stays there.
    """
    arrays: Arrays = {}
    is_old = standard_opset(proto) < MIN_OPSET  # such a message is converted as a whole
    room = _Room([place.stop - place.start for place in held.values()])
    with path.open("rb", buffering=0) as file:
        for tensor in proto.graph.initializer:
            name, place = tensor.name, held.get(tensor.name)
            if place is not None:
                data = room.take(place.stop - place.start)
                file.seek(place.start)
                if file.readinto(data.data) != len(data):
                    raise ModelError(
                        f"{escape(str(path))}: was cut off while it was read; try again"
                    )
                if is_old or not _is_plain(tensor, len(data), _NOTES):
                    tensor.raw_data = data.tobytes()
                    continue
            elif is_old or not _is_plain(tensor, len(tensor.raw_data), _NOTES | {"raw_data"}):
                continue
            else:
                data = np.frombuffer(tensor.raw_data, dtype=np.uint8)
                tensor.ClearField("raw_data")
            arrays[name] = data.view(PLAIN_TYPES[tensor.data_type]).reshape(tensor.dims)
            arrays[name].flags.writeable = False
    return arrays


_NOTES = frozenset({"dims", "data_type", "name", "doc_string", "metadata_props"})
"""Fields of a tensor beside its data and where that is."""


def _is_plain(tensor: onnx.TensorProto, length: int, fields: frozenset[str]) -> bool:
    """Whether so many bytes are all that a tensor declares, and it has no other fields."""
    dtype = PLAIN_TYPES.get(tensor.data_type)
    return (
        dtype is not None
        and length > 0
        and len(tensor.dims) <= MAX_RANK
        and min(tensor.dims, default=0) >= 0
        and length == math.prod(tensor.dims) * dtype.itemsize
        and fields.issuperset([field.name for field, _ in tensor.ListFields()])
    )


class _Room:
    """Memory for arrays, many in one piece: the system hands out large pieces in half the time.

    Whoever holds one of its arrays holds the whole piece.

    Args:
        lengths: of all that will be taken, in bytes.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self._left = np.empty(0, dtype=np.uint8)
        self._wanted = sum(map(_aligned, filter(_shares_a_piece, lengths)))

    def take(self, length: int) -> Array:
        """Room for so many bytes, at a place where any number may stand."""
        if not _shares_a_piece(length):
            return np.empty(length, dtype=np.uint8)
        whole = _aligned(length)
        if whole > len(self._left):
            self._left = np.empty(min(_PIECE_BYTES, self._wanted), dtype=np.uint8)
        self._wanted -= whole
        taken, self._left = self._left[:length], self._left[whole:]
        return taken


def _shares_a_piece(length: int) -> bool:
    return length < _PIECE_BYTES // 4


def _aligned(length: int) -> int:
    return -(-length // _ALIGNED_BYTES) * _ALIGNED_BYTES


_PIECE_BYTES = 2**26
_ALIGNED_BYTES = 64


def _why_undecodable(content: bytes) -> str:
    if content[4:8] in _FOREIGN_MARKS:
        return f"not an ONNX file: {_FOREIGN_MARKS[content[4:8]]}"
    head = content[:512].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        return "not an ONNX file: it looks like a web page (HTML); download the model itself"
    if head.startswith(b"<?xml") and b"<net" in head:
        return "not an ONNX file: it looks like a network of OpenVINO; give the ONNX file it is of"
    if all(byte in b"\t\n\r" or byte >= 32 for byte in head) and b"\xff" not in head:
        return "not an ONNX file: it looks like text; give the ONNX file itself, which is binary"
    if content[8:10] == b'{"':  # behind the length of its header
        return "not an ONNX file: it looks like safetensors, which hold weights alone; export first"
    return f"truncated or corrupt ({len(content)} bytes); export or download it again"


def _from_proto(
    proto: onnx.ModelProto, where: str, folder: str | None, weights: Mapping[str, Array] = _NONE
) -> ir.Model:
    where = escape(where)
    try:
        is_sorted = check_proto(proto, folder, weights)
        check_functions(proto)
        read, proto = proto, raised(proto)
        model = _model_of(proto)
    except MorphError as error:
        raise type(error)(f"{where}: {error}") from error
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{where}: not a valid model: {escape(root_cause(error))}") from error
    _give_weights(model, weights)
    if not is_sorted:
        model.graph.sort()
    graphs = graphs_of(model)
    if folder is not None:
        _set_folder(graphs, folder)
    _open_negative_sizes(model, graphs)
    _forget_false_types(graphs)
    if proto is not read:
        _tell_raised(read, model, where, folder)
    return model


def _model_of(proto: onnx.ModelProto) -> ir.Model:
    with without_maps(proto) as maps:
        model = ir.from_proto(proto)
    note_maps(model, maps)
    return model


def _tell_raised(read: onnx.ModelProto, model: ir.Model, where: str, folder: str | None) -> None:
    before = _model_of(read)
    if folder is not None:
        _set_folder(graphs_of(before), folder)
    try:
        unknown = require_same(before, model)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    unchecked = f"; whether it computes the same was not checked: {unknown}" if unknown else ""
    warn(
        f"{where}: opset {standard_opset(read)} is raised to {MIN_OPSET}, the oldest supported"
        + unchecked
    )


def _give_weights(model: ir.Model, weights: Mapping[str, Array]) -> None:
    """Give initializers the arrays that were held back from the message."""
    for name, array in weights.items():
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.Tensor(
            array,
            dtype=tensor.dtype,
            name=name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )


def _set_folder(graphs: Iterable[ir.Graph], folder: str) -> None:
    """Say where external data is looked for."""
    tensors = list(_weights(graphs))
    for node in (node for graph in graphs for node in graph):
        for attribute in node.attributes.data.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                tensors.append(attribute.as_tensor())
            elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                tensors += attribute.as_tensors()
    for tensor in tensors:
        if is_stored(tensor):
            assert isinstance(tensor, ir.ExternalTensor)
            tensor.base_dir = folder


def _open_negative_sizes(model: ir.Model, graphs: Iterable[ir.Graph]) -> None:
    """Make sizes of -1, which PaddlePaddle writes, symbols as ONNX has them."""
    results = (value for graph in graphs for node in graph for value in node.outputs)
    for value in (*results, *model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and -1 in value.shape.dims:
            value.shape = ir.Shape(
                f"{value.name}_{axis}" if size == -1 else size
                for axis, size in enumerate(value.shape)
            )


def _forget_false_types(graphs: Iterable[ir.Graph]) -> None:
    """Take types and shapes of weights from their tensors, and those that name no type as unknown.

    A file may declare both once more, and otherwise.
    """
    for graph in graphs:
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and not value.is_graph_input():
                # A tensor's shape never changes, so that it may be shared.
                value.shape = cast("ir.Shape", tensor.shape)
                value.type = ir.TensorType(tensor.dtype)
        for node in graph:
            for value in node.outputs:
                if value.dtype == ir.DataType.UNDEFINED:
                    value.type = None


def _weights(graphs: Iterable[ir.Graph]) -> Iterator[ir.TensorProtocol]:
    for graph in graphs:
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _wants_external_data(model: ir.Model) -> bool:
    weights = list(_weights(graphs_of(model)))
    return sum(tensor.nbytes for tensor in weights) > _INLINE_LIMIT_BYTES or any(
        is_stored(tensor) and tensor.nbytes > _EXTERNAL_TENSOR_BYTES for tensor in weights
    )


def _internalized(model: ir.Model) -> ir.Model:
    """The model, or a copy of it whose weights point into memory (maps) instead of to files."""
    if not any(isinstance(tensor, ir.ExternalTensor) for tensor in _weights(graphs_of(model))):
        return model
    copy = model.clone()
    for graph in graphs_of(copy):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
    return copy
