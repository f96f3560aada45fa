"""What convolutions and pools share: windows that slide over the spatial axes."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from morphgraph.ops.op import OpNode


def window_pads(
    n: OpNode,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions added before and after each spatial axis, ``auto_pad`` written out.

    SAME pads so that the output has ``ceil(input / stride)`` positions; UPPER puts the odd one
    behind, LOWER before (ONNX operator specification, Conv).
    """
    rank = len(kernel)
    if auto_pad in ("NOTSET", ""):
        given = tuple(pads or (0,) * (2 * rank))
        return given[:rank], given[rank:]
    if auto_pad == "VALID":
        return (0,) * rank, (0,) * rank
    totals = [
        max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        for size, width, stride, dilation in zip(
            n.shape(0)[2:], kernel, strides, dilations, strict=True
        )
    ]
    small = tuple(total // 2 for total in totals)
    large = tuple(total - total // 2 for total in totals)
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def torch_padding(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Pads in the order of ``torch.nn.functional.pad``: the last axis first.

    >>> torch_padding((1, 2), (3, 4))
    [2, 4, 1, 3]
    """
    return [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]


def ranked(namespace: ModuleType, name: str, rank: int) -> Any:
    """What torch has once per number of axes: ``ranked(nn, "Conv", 2)`` is ``nn.Conv2d``."""
    return getattr(namespace, f"{name}{rank}d")
