"""What convolutions and pools share: windows that slide over the spatial axes."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from morphgraph.ops.node import OpNode


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


def window_axes(
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    pads: Sequence[int] | None,
) -> tuple[str, str]:
    """Factors of the spatial axes of operand and result.

    An axis that no window mixes, moves or pads passes as it is, whatever stands on it.

    >>> window_axes((3, 1), None, (1, 0, 1, 0))
    ('S0 s1', 'T0 s1')
    """
    rank = len(kernel)
    steps, added = strides or (1,) * rank, pads or (0,) * (2 * rank)
    passes = [
        (width, step, before, after) == (1, 1, 0, 0)
        for width, step, before, after in zip(
            kernel, steps, added[:rank], added[rank:], strict=True
        )
    ]
    before, after = (
        " ".join(f"{'s' if free else letter}{k}" for k, free in enumerate(passes))
        for letter in "ST"
    )
    return before, after


def torch_padding(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Pads in the order of ``torch.nn.functional.pad``: the last axis first.

    >>> torch_padding((1, 2), (3, 4))
    [2, 4, 1, 3]
    """
    return [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]


def ranked(namespace: ModuleType, name: str, rank: int) -> Any:
    """What torch has once per number of axes: ``ranked(nn, "Conv", 2)`` is ``nn.Conv2d``."""
    return getattr(namespace, f"{name}{rank}d")
