"""Tensors without memory, beside what PyTorch computes for tensors with numbers."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from morphgraph.torch_io.forms import KNOWN, form_of

aten = torch.ops.aten
X, HALF = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5, dtype=torch.float16)
ROWS, TURNED, COUNTS = torch.randn(6, 5), X.permute(0, 2, 3, 1), torch.arange(20).reshape(4, 5)
ONES = torch.ones(5)

CALLS: list[tuple[Any, ...]] = [
    (aten.slice.Tensor, TURNED, 2, 1, -1, 2),
    (aten.slice_scatter.default, TURNED, TURNED[:, 1:3], 1, 1, 3),
    (aten.select.int, X, -2, 1),
    (aten.alias.default, TURNED),
    (aten.view.default, X, [2, -1, 5]),
    (aten._unsafe_view.default, X, [6, 20]),
    (aten.unsqueeze.default, TURNED, -1),
    (aten.squeeze.dim, TURNED[:, :1], 1),
    (aten.permute.default, X, [3, 1, 0, 2]),
    (aten.transpose.int, TURNED, -1, 0),
    (aten.clone.default, TURNED),
    (aten.fill.Tensor, COUNTS, torch.tensor(2)),
    (aten.add.Tensor, X, ROWS[0]),
    (aten.add.Tensor, COUNTS, 0.5),
    (aten.sub.Tensor, HALF, torch.tensor(2.0)),
    (aten.mul.Tensor, TURNED, X[:, :1].permute(0, 2, 3, 1)),
    (aten.mul.Tensor, COUNTS, COUNTS > 3),
    (aten.eq.Tensor, COUNTS, torch.tensor(3)),
    (aten.ne.Tensor, TURNED, X.permute(0, 2, 3, 1)),
    (aten.relu.default, TURNED),
    (aten.gelu.default, HALF),
    (aten.hardswish.default, X[..., ::2]),
    (aten.softmax.int, TURNED, -1),
    (aten.masked_fill.Scalar, X, X > 0, -100.0),
    (aten.linear.default, TURNED.transpose(2, 3), torch.randn(7, 5), torch.randn(7)),
    (aten.linear.default, X, ROWS),
    (aten.matmul.default, X, TURNED[:, :3, :, :1]),
    (aten.matmul.default, X, X.transpose(2, 3)),
    (aten.matmul.default, ROWS, X.transpose(2, 3)),
    (aten.matmul.default, X, ROWS[0]),
    (aten.layer_norm.default, TURNED, [3], ONES[:3], None),
    (aten.layer_norm.default, X, [5], ONES, ONES),
    (aten.cat.default, [X, TURNED.permute(0, 3, 1, 2)], 1),
    (aten.cat.default, [COUNTS, COUNTS > 2]),
    (aten.mean.dim, TURNED, [1, 2], True),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call[0]))
def test_forms_are_those_of_numbers(call: tuple[Any, ...]) -> None:
    func, *args = call
    mode = FakeTensorMode()
    fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, tuple(args))
    found, expected = form_of(func, fakes, {}), func(*args)
    assert isinstance(found, FakeTensor)
    assert found.device == expected.device
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.stride() == expected.stride()
    if isinstance(args[0], torch.Tensor):
        assert _share_memory(found, fakes[0]) == _share_memory(expected, args[0])


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def test_all_operators_are_tried() -> None:
    assert {call[0] for call in CALLS} == KNOWN


def test_others_are_left_to_pytorch() -> None:
    mode = FakeTensorMode()
    fake = mode.from_tensor(X)
    assert form_of(aten.exp.default, (fake,), {}) is None
    assert form_of(aten.relu.default, (X,), {}) is None
    with mode:
        elsewhere = torch.empty(2, 3, device="cuda")
    assert form_of(aten.relu.default, (elsewhere,), {}) is None
