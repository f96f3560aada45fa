"""Read and write ONNX files: lazily, atomically, and with one clear line for whatever is wrong.

Weights stay where they are until somebody asks for them: in the protobuf message for ordinary
models, memory-mapped for models with external data. Protobuf appears at this border only; the rest
of the program works on ``onnx_ir.Model``.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import (  # type: ignore[import-untyped]  # ships no types
    DecodeError,
    EncodeError,
)

from morphgraph.errors import FileError, ModelError, MorphError
from morphgraph.onnx_check import check_proto, escape
from morphgraph.stored import is_stored

__all__ = [
    "as_model",
    "bind_inputs",
    "checker_refusal",
    "constant_names",
    "escape",
    "load",
    "parameter_names",
    "save",
    "static_shape",
    "write_atomically",
]

ModelLike = ir.Model | onnx.ModelProto | str | PathLike[str]
Shape = tuple[int, ...]

STATIC_SHAPE_KEY = "static_shape"  # in ``Value.meta``, where symbolic sizes stand in the shape
PARAMETERS_KEY = "morphgraph.parameters"
CONSTANTS_KEY = "morphgraph.constants"

_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_INLINE_LIMIT_BYTES = 1_900_000_000  # weights beyond this go to an external data file
_EXTERNAL_TENSOR_BYTES = 1024  # smaller tensors stay in the message, where shapes are read from

# What a file is that is not ONNX, by how it begins.
_FOREIGN_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "it is a Git LFS pointer; run `git lfs pull`"),
    (b"PK\x03\x04", "it is a PyTorch or zip file; export the network to ONNX first"),
    (b"\x80\x02", "it is a Python pickle, which is never opened; export the network to ONNX"),
    (b"\x80\x03", "it is a Python pickle, which is never opened; export the network to ONNX"),
    (b"\x80\x04", "it is a Python pickle, which is never opened; export the network to ONNX"),
    (b"\x80\x05", "it is a Python pickle, which is never opened; export the network to ONNX"),
    (b"\x89HDF", "it is an HDF5 file; export the network to ONNX first"),
    (b"\x1f\x8b", "it is compressed; run gunzip first"),
)


def load(
    path: str | PathLike[str], input_shapes: Mapping[str, Sequence[int]] | None = None
) -> ir.Model:
    """Read an ONNX file.

    Everything that can be wrong with a file is looked for before a weight is touched, in time
    linear in its size. The model is returned as it stands in the file, apart from ``input_shapes``
    and from the order of its nodes, which is made topological; see ``canonicalize`` for more.

    Args:
        path: the file; external data is looked for beside it and nowhere else.
        input_shapes: sizes for graph inputs whose shape the file leaves open.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file is not ONNX, is damaged, or describes an impossible model.
    """
    location = Path(os.path.abspath(path))
    model = _from_proto(_read_proto(location), str(location), str(location.parent))
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
            content = ir.to_proto(_internalized(model)).SerializeToString(deterministic=True)
        except (ir.serde.SerdeError, EncodeError, ValueError) as error:
            raise ModelError(
                f"{escape(str(location))}: cannot be written as one protobuf message: "
                f"{escape(_root_cause(error))}"
            ) from error
        write_atomically(location, content, overwrite)
        return
    data = location.with_name(location.name + ".data")
    for target in (location, data):
        _check_target(target, overwrite)
    with _os_errors(location):
        folder = Path(tempfile.mkdtemp(prefix=f".{location.name}.", dir=location.parent))
        try:
            ir.save(
                model.clone(),
                folder / location.name,
                external_data=data.name,
                size_threshold_bytes=_EXTERNAL_TENSOR_BYTES,
            )
            os.replace(folder / data.name, data)
            os.replace(folder / location.name, location)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: str | PathLike[str], content: str | bytes, overwrite: bool) -> None:
    """Write a file by way of a temporary one in the same folder, so that it is never seen half.

    Raises:
        FileError: the file exists already (without ``overwrite``) or cannot be written.
    """
    location = Path(os.path.abspath(path))
    _check_target(location, overwrite)
    with _os_errors(location):
        handle, temporary = tempfile.mkstemp(prefix=f".{location.name}.", dir=location.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, location)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def as_model(model: ModelLike) -> ir.Model:
    """The model itself, or the one that a protobuf message or a file describes.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file or message is not a valid model.
    """
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, onnx.ModelProto):
        return _from_proto(model, "model", None)
    return load(model)


def bind_inputs(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> ir.Model:
    """A copy of the model whose graph inputs have these shapes; weights are shared.

    Symbolic sizes of other values follow where an input gives the symbol a size.

    Raises:
        ModelError: there is no such input, or its rank or a fixed size is another.
    """
    bound = model.clone()
    inputs = {value.name: value for value in bound.graph.inputs if not value.is_initializer()}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        value = inputs.get(name)
        if value is None:
            known = ", ".join(escape(str(n)) for n in inputs)
            raise ModelError(
                f"input '{escape(name)}': the model has no such input; its inputs are {known}"
            )
        declared = [None] * len(shape) if value.shape is None else list(value.shape)
        if len(declared) != len(shape) or not all(map(_may_be, declared, shape)):
            raise ModelError(
                f"input '{escape(name)}': shape {_format(shape)} does not fit the model, "
                f"which declares {_format(declared)}"
            )
        for old, size in zip(declared, shape, strict=True):
            if isinstance(old, ir.SymbolicDim) and old.value is not None:
                sizes[old.value] = size
        value.shape = ir.Shape(shape)
    for value in (*bound.graph.inputs, *(v for node in bound.graph for v in node.outputs)):
        value.meta.pop(STATIC_SHAPE_KEY, None)
        if value.shape is not None:
            value.shape = ir.Shape(
                sizes.get(dim.value or "", dim) if isinstance(dim, ir.SymbolicDim) else dim
                for dim in value.shape
            )
    return bound


def _may_be(declared: int | ir.SymbolicDim | None, size: int) -> bool:
    # Old exporters write 0 where they do not know a size.
    return size > 0 and (not isinstance(declared, int) or declared in (0, size))


def static_shape(value: ir.Value) -> Shape:
    """The sizes of a value, in a model with a dynamic batch those that it is analysed with.

    Raises:
        ModelError: a size is not known.

    >>> static_shape(ir.val("x", ir.DataType.FLOAT, [1, 3, 8, 8]))
    (1, 3, 8, 8)
    """
    known: Shape | None = value.meta.get(STATIC_SHAPE_KEY)
    if known is not None:
        return known
    sizes = (None,) if value.shape is None else value.shape.dims
    if not all(isinstance(size, int) for size in sizes):
        raise ModelError(
            f"value '{escape(value.name or '')}': its shape is not known; "
            "canonicalize the model, giving --input-shape where inputs are dynamic"
        )
    return cast("Shape", tuple(sizes))


def checker_refusal(model: ir.Model) -> str | None:
    """Why ``onnx.checker`` refuses a model, in its words; ``None``: it takes the model.

    It gets the structure: weights are left out, so that large models cost no more than small ones.
    """
    skeleton = model.clone()
    for graph in skeleton.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING:
                nothing = np.zeros(0, tensor.dtype.numpy())
                value.const_value = ir.Tensor(nothing, dtype=tensor.dtype, name=value.name)
    try:
        onnx.checker.check_model(ir.to_proto(skeleton))
    except (onnx.checker.ValidationError, ValueError, TypeError) as error:
        return escape(_root_cause(error).strip().splitlines()[0])
    return None


def parameter_names(model: ir.Model) -> list[str]:
    """Names of the initializers that training changes, in the model's order.

    A model exported by morphgraph lists them. In any other, ONNX cannot tell parameters from
    buffers: there, all floating-point initializers with at least one axis count, apart from the
    running statistics of batch normalizations.
    """
    initializers = model.graph.initializers
    if PARAMETERS_KEY in model.metadata_props:
        return [name for name in stored_names(model) if name in initializers]
    return [
        name
        for name, value in initializers.items()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and value.const_value.shape.rank() > 0
        and not _is_running_statistic(value)
    ]


def stored_names(model: ir.Model) -> list[str]:
    """The parameter names that the export has stored in the model's metadata; else none.

    Raises:
        ModelError: what is stored is not a list of names.
    """
    return _listed(model, PARAMETERS_KEY)


def constant_names(model: ir.Model) -> frozenset[str]:
    """Names of the initializers that vanished layers have left in their place.

    Raises:
        ModelError: what is stored is not a list of names.
    """
    return frozenset(_listed(model, CONSTANTS_KEY))


def add_constant_names(model: ir.Model, names: Sequence[str]) -> None:
    """Note that initializers stand for vanished layers; they are trained like parameters."""
    for key in (CONSTANTS_KEY, PARAMETERS_KEY):
        if key == CONSTANTS_KEY or key in model.metadata_props:
            listed = dict.fromkeys([*_listed(model, key), *names])
            known = [name for name in listed if name in model.graph.initializers]
            model.metadata_props[key] = json.dumps(known)


def _listed(model: ir.Model, key: str) -> list[str]:
    """Names that stand in the model's metadata."""
    try:
        names = json.loads(model.metadata_props.get(key, "[]"))
    except ValueError as error:
        raise ModelError(f"metadata '{key}' is not JSON; export the model anew") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"metadata '{key}' is not a list of names; export the model anew")
    return names


def _is_running_statistic(value: ir.Value) -> bool:
    uses = value.uses()
    return bool(uses) and all(
        use.node.op_type == "BatchNormalization" and use.idx in (3, 4) for use in uses
    )


def _read_proto(path: Path) -> onnx.ModelProto:
    where = escape(str(path))
    with _os_errors(path):
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
        content = path.read_bytes()
    for beginning, explanation in _FOREIGN_BEGINNINGS:
        if content.startswith(beginning):
            raise ModelError(f"{where}: not an ONNX file: {explanation}")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(f"{where}: {_why_undecodable(content)}") from error
    return proto


def _why_undecodable(content: bytes) -> str:
    head = content[:512].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        return "not an ONNX file: it looks like a web page (HTML); download the model itself"
    if all(byte in b"\t\n\r" or byte >= 32 for byte in head) and b"\xff" not in head:
        return "not an ONNX file: it looks like text"
    return f"truncated or corrupt ({len(content)} bytes); export or download it again"


def _from_proto(proto: onnx.ModelProto, where: str, folder: str | None) -> ir.Model:
    where = escape(where)
    try:
        is_sorted = check_proto(proto, folder)
        model = ir.from_proto(proto)
    except MorphError as error:
        raise type(error)(f"{where}: {error}") from error
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{where}: not a valid model: {escape(_root_cause(error))}") from error
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    if not is_sorted:
        model.graph.sort()
    _open_negative_sizes(model)
    return model


def _open_negative_sizes(model: ir.Model) -> None:
    """Make sizes of -1, which PaddlePaddle writes, symbols as ONNX has them."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            _open_sizes(value)
    for value in (*model.graph.inputs, *model.graph.outputs):
        _open_sizes(value)


def _open_sizes(value: ir.Value) -> None:
    if value.shape is not None and -1 in value.shape.dims:
        value.shape = ir.Shape(
            f"{value.name}_{axis}" if size == -1 else size for axis, size in enumerate(value.shape)
        )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _weights(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _wants_external_data(model: ir.Model) -> bool:
    weights = list(_weights(model))
    return sum(tensor.nbytes for tensor in weights) > _INLINE_LIMIT_BYTES or any(
        is_stored(tensor) and tensor.nbytes > _EXTERNAL_TENSOR_BYTES for tensor in weights
    )


def _internalized(model: ir.Model) -> ir.Model:
    """The model, or a copy of it whose weights point into memory (maps) instead of to files."""
    if not any(isinstance(tensor, ir.ExternalTensor) for tensor in _weights(model)):
        return model
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
    return copy


def _check_target(path: Path, overwrite: bool) -> None:
    where = escape(str(path))
    if path.is_dir():
        raise FileError(f"{where}: is a folder; give a file name in it")
    if not path.parent.is_dir():
        raise FileError(f"{where}: there is no folder '{escape(str(path.parent))}'; make it first")
    if path.exists() and not overwrite:
        raise FileError(f"{where}: exists already; choose another name or pass --overwrite")


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileNotFoundError):
            reason += "; check the path"
        raise FileError(f"{escape(str(path))}: {reason}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _format(shape: Sequence[object]) -> str:
    return "x".join(escape(str(size)) for size in shape) or "scalar"
