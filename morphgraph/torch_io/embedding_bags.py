"""Embeddings of bags of words, as sums over axes.

PyTorch's exporter writes ``embedding_bag`` as a loop over the bags, of which nobody can see what it
does to its channels. While a network is exported, it is computed by a gather and a reduction.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class PlainBags(TorchFunctionMode):
    """Inside it, ``embedding_bag`` is :func:`embedding_bag`.

    >>> table, words = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[1, 2], [2, 2]])
    >>> with PlainBags():
    ...     F.embedding_bag(words, table, mode="mean")
    tensor([[2.],
            [3.]])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called for every function of torch."""
        function = embedding_bag if func is F.embedding_bag else func
        return function(*args, **(kwargs or {}))


# The parameters are those of F.embedding_bag, which it stands in for, used or not.
def embedding_bag(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,  # noqa: ARG001
    scale_grad_by_freq: bool = False,  # noqa: ARG001
    mode: str = "mean",
    sparse: bool = False,  # noqa: ARG001
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """What ``F.embedding_bag`` computes, ``[bags, features]``; its arguments are those of torch.

    What concerns training alone, ``scale_grad_by_freq`` and ``sparse``, has no part in it.

    Raises:
        ValueError: ``max_norm`` is given, by which reading a table changes it.
    """
    if max_norm is not None:
        raise ValueError(f"an EmbeddingBag with max_norm={max_norm} changes its weights when read")
    # Rows [bags, places, features]; flags [bags, places] tell what is in a bag, None: everything.
    rows, scales = F.embedding(input, weight), per_sample_weights
    held: Tensor | None = None
    if offsets is not None:
        held = _between(offsets, input.shape[0], include_last_offset)
        rows, scales = rows[None], None if scales is None else scales[None]
    if padding_idx is not None:
        words = input != padding_idx % weight.shape[0]
        held = words if held is None else held & words
    if scales is not None:
        rows = rows * scales[..., None]
    if held is None:
        return rows.sum(1) if mode == "sum" else rows.mean(1) if mode == "mean" else rows.amax(1)
    if mode == "max":  # of an empty bag 0
        largest = torch.where(held[..., None], rows, torch.finfo(rows.dtype).min).amax(1)
        return torch.where(held.any(1)[:, None], largest, 0.0)
    total = (rows * held[..., None].to(rows.dtype)).sum(1)
    return total if mode == "sum" else total / held.sum(1).clamp(min=1)[:, None].to(rows.dtype)


def _between(offsets: Tensor, count: int, last_given: bool) -> Tensor:
    """Which of ``count`` places are in which bag, ``[bags, places]``."""
    begun = torch.arange(count, device=offsets.device) >= offsets[:, None]
    if last_given:
        return begun[:-1] & ~begun[1:]
    return begun & ~torch.cat([begun[1:], torch.zeros_like(begun[:1])])
