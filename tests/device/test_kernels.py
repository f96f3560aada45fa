"""Kernels: what is read off type and shapes."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from morphgraph.device import Kernel


@pytest.mark.parametrize(
    ("groups", "size", "stride", "form"),
    [
        (1, 3, 1, "dense"),
        (1, 3, 2, "dense"),
        (1, 1, 1, "pointwise"),
        (24, 3, 1, "depthwise"),
        (24, 5, 2, "depthwise"),
        (4, 3, 2, "grouped"),
    ],
)
def test_arithmetic_of_convolutions_is_what_torch_counts(
    groups: int, size: int, stride: int, form: str
) -> None:
    layer = torch.nn.Conv2d(24, 48, size, stride, padding=size // 2, groups=groups)
    x = torch.zeros(2, 24, 13, 17)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    weight = tuple(layer.weight.shape)
    kernel = Kernel("FusedConv", "plain", (tuple(x.shape), weight, (48,)), (tuple(y.shape),))
    assert 2 * kernel.work()[1] == counter.get_total_flops()
    assert kernel.work()[2] == layer.weight.numel()
    assert kernel.kind == f"Conv {form} plain"
    assert 2 ** kernel.features(1)[5] == stride


@pytest.mark.parametrize(
    ("left", "right"),
    [((7, 32), (32, 5)), ((1, 9, 32), (32, 5)), ((2, 3, 9, 32), (2, 3, 32, 11))],
)
def test_arithmetic_of_products_is_what_torch_counts(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    with FlopCounterMode(display=False) as counter:
        y = torch.zeros(left) @ torch.zeros(right)
    kernel = Kernel("MatMul", "", (left, right), (tuple(y.shape),))
    assert 2 * kernel.work()[1] == counter.get_total_flops()
    assert kernel.kind == ("products" if len(right) > 2 else "product")


def test_products_that_transpose_the_batch() -> None:
    queries, keys = torch.zeros(7, 2, 3, 8), torch.zeros(11, 2, 3, 8)
    with FlopCounterMode(display=False) as counter:
        logits = torch.einsum("nbhd,mbhd->bhnm", queries, keys)
    sizes = (tuple(queries.shape), tuple(keys.shape)), (tuple(logits.shape),)
    kernel = Kernel("FusedMatMul", "", *sizes)
    assert 2 * kernel.work()[1] == counter.get_total_flops()
    assert kernel.work()[2] == 8 * 11


def test_an_image_is_another_kind_than_many_channels() -> None:
    image = Kernel("Conv", "blocked", ((1, 3, 8, 8), (16, 3, 3, 3)), ((1, 16, 6, 6),))
    assert image.kind == "Conv image blocked"


def test_groups_may_have_an_axis_of_their_own() -> None:
    sizes = ((1, 24, 8, 8), (1, 48, 8, 8))
    flat = Kernel("Convolution", "", (sizes[0], (48, 6, 3, 3)), sizes[1:])
    apart = Kernel("Convolution", "", (sizes[0], (4, 12, 6, 3, 3)), sizes[1:])
    assert flat.kind == apart.kind == "Conv grouped plain"
    assert (flat.work() == apart.work()).all()


def test_within_a_block_features_are_the_same() -> None:
    def conv(width: int) -> Kernel:
        return Kernel("Conv", "blocked", ((1, 64, 8, 8), (width, 64, 3, 3)), ((1, width, 8, 8),))

    assert (conv(49).features(16) == conv(64).features(16)).all()
    assert (conv(48).features(16) != conv(49).features(16)).any()
    assert (conv(49).features(1) != conv(64).features(1)).any()


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel("Conv", "plain", (), ()),
        Kernel("Conv", "plain", ((1, 4, 8),), ((1, 4, 6),)),
        Kernel("Conv", "plain", ((0, 4, 8), (4, 4, 3)), ((0, 4, 6),)),
        Kernel("Gemm", "", ((3, 4),), ()),
        Kernel("MatMul", "", ((4,), (4,)), ((),)),
        Kernel("LSTM", "", ((5, 1, 3),), ()),
        Kernel("Anything", "", (), ()),
    ],
)
def test_kernels_of_unknown_form_are_counted_by_what_they_move(kernel: Kernel) -> None:
    moved = sum(math.prod(shape) for shape in (*kernel.inputs, *kernel.outputs))
    assert kernel.work().sum() == 1 + moved
    assert math.isfinite(kernel.features(16).sum())
