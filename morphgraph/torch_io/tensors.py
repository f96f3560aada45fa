"""ONNX tensors as torch tensors and back, also in the types that numpy has not got."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from morphgraph.arrays import Array, IntArray
from morphgraph.errors import UnsupportedError

_TORCH_TYPES = {
    ir.DataType.BOOL: torch.bool,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
}

_HELD = {ir.DataType.INT4: torch.int8, ir.DataType.UINT4: torch.uint8}
"""What holds numbers of fewer bits than torch has a type for, such as weights of four."""


def torch_type(dtype: ir.DataType | int) -> torch.dtype:
    """The torch dtype of an ONNX element type.

    >>> torch_type(1)
    torch.float32

    Raises:
        UnsupportedError: torch has no such type.
    """
    known = ir.DataType(dtype)
    if known not in _TORCH_TYPES:
        raise UnsupportedError(f"element type {known.name} has no torch dtype; convert the model")
    return _TORCH_TYPES[known]


def to_tensor(value: ir.TensorProtocol | None) -> torch.Tensor:
    """A torch tensor with memory of its own, so that training never writes into the model.

    Whole numbers of four bits stand in eight.

    Raises:
        UnsupportedError: torch has no such element type.
    """
    assert value is not None
    held = _HELD.get(value.dtype)
    dtype = torch_type(value.dtype) if held is None else held
    array = np.array(value.numpy(), order="C", copy=True)
    if held is not None:
        return torch.from_numpy(array.astype(np.int8)).to(dtype)
    if value.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array).to(dtype)


def take(tensor: torch.Tensor, positions: Mapping[int, IntArray]) -> torch.Tensor:
    """The given positions of axes, by the number of the axis; a copy, unless there are none."""
    for axis, kept in positions.items():
        tensor = tensor.index_select(axis, torch.from_numpy(kept).to(tensor.device))
    return tensor


def to_onnx(tensor: torch.Tensor, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """An ONNX tensor of the given element type, detached and in main memory."""
    held = _HELD.get(dtype)
    plain = tensor.detach().to("cpu", torch_type(dtype) if held is None else held).contiguous()
    array: Array
    if held is not None:
        return ir.Tensor(plain.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
    if dtype == ir.DataType.BFLOAT16:
        array = plain.view(torch.int16).numpy().view(dtype.numpy())
    else:
        array = plain.numpy()
    return ir.Tensor(array.copy(), dtype=dtype, name=name)
