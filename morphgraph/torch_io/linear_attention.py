"""Layers that carry a memory of fixed size from position to position, by ONNX's formulas."""

import torch
from torch import Tensor
from torch.nn import functional as F

from morphgraph.torch_io.one_node import as_one_node


@as_one_node
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    decay: Tensor | None,
    beta: Tensor | None,
    heads: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention that reads a matrix per head, to which every position adds key times value.

    Args:
        q: queries, ``[N, T, query heads * d]``.
        k: keys, ``[N, T, heads * d]``.
        v: values, ``[N, T, heads * e]``.
        state: before the first position, ``[N, heads, d, e]``; ``None``: zero.
        decay: by whose exponential the state is multiplied first, ``[N, T, heads]`` or
            ``[N, T, heads * d]``; ``None``: nothing is forgotten.
        beta: how much of the difference between a value and what its key finds is written,
            ``[N, T, heads]`` or ``[N, T, 1]``; ``None``: the value itself is.
        heads: of queries, of keys and values.
        scale: of what is read.

    Returns:
        What is read, ``[N, T, (the more heads) * e]``, and the state behind the last position.
    """
    queries, keys, values = (
        x.reshape(*x.shape[:2], count, -1)
        for x, count in ((q, heads[0]), (k, heads[1]), (v, heads[1]))
    )
    queries = queries.repeat_interleave(max(1, heads[1] // heads[0]), 2)
    shared = max(1, heads[0] // heads[1])
    if state is None:
        state = q.new_zeros(()).expand(len(q), heads[1], keys.shape[-1], values.shape[-1])
    kept = None if decay is None else decay.reshape(*decay.shape[:2], heads[1], -1).exp()
    read = []
    for t in range(q.shape[1]):
        key, value = keys[:, t], values[:, t]  # [N, heads, d], [N, heads, e]
        if kept is not None:
            state = state * kept[:, t, :, :, None]
        if beta is not None:
            found = torch.einsum("nhde,nhd->nhe", state, key)
            value = beta[:, t, :, None] * (value - found)
        state = state + key[..., None] * value[..., None, :]
        seen = state.repeat_interleave(shared, 1)
        read.append(torch.einsum("nhd,nhde->nhe", queries[:, t], seen))
    return scale * torch.stack(read, 1).flatten(2), state


@as_one_node
def causal_convolution(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    activated: bool,
    channels_last: bool,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """A depthwise convolution of a sequence and what came before it, ``[N, c, T]``.

    Args:
        x: the sequence.
        kernel: ``[c, 1, k]``.
        bias: ``[c]`` or ``None``.
        past: the positions before, ``[N, c, (k - 1) * dilation]``; ``None``: zeros.
        activated: whether its results pass a swish.
        channels_last: whether ``x``, ``past`` and the results are ``[N, T, c]``.
        dilation: the distance between two of its taps.

    Returns:
        As many positions as there are in ``x``, and the past of those that follow.
    """
    if channels_last:
        x, past = x.transpose(1, 2), None if past is None else past.transpose(1, 2)
    room = (kernel.shape[-1] - 1) * dilation
    whole = F.pad(x, (room, 0)) if past is None else torch.cat((past, x), 2)
    y = F.conv1d(whole, kernel, bias, dilation=dilation, groups=len(kernel))
    left = whole[..., whole.shape[2] - room :]
    y = F.silu(y) if activated else y
    return (y.transpose(1, 2), left.transpose(1, 2)) if channels_last else (y, left)
