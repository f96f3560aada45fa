"""GroupQueryAttention of ONNX Runtime by torch: caches, rotations, windows, sinks, norms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from morphgraph.torch_io.one_node import as_one_node


@as_one_node
def grouped_attention(
    qkv: Sequence[Tensor],
    past: Sequence[Tensor | None],
    last: Tensor,
    tables: Sequence[Tensor | None],
    positions: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    norms: Sequence[Tensor | None],
    *,
    heads: tuple[int, int],
    scale: float | None,
    rotates: tuple[bool, bool],
    window: int,
    softcap: float,
    causal: bool,
    smooth: bool,
    epsilons: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention, and the caches behind it.

    Args:
        qkv: ``[N, T, heads d]`` each.
        past: keys and values of earlier positions, ``[N, heads, P, d]``, or none.
        last: the position of every sample's last key, ``[N]``.
        tables: cosines and sines, ``[positions, pairs]``, where queries and keys turn.
        positions: of the new tokens, ``[N, T]``; those behind the past without it.
        bias: of the scores, ``[N or 1, heads or 1, T, keys]``.
        sink: by head the score of one more term of the softmax.
        norms: scales of queries and keys, ``[d]``, or none.
        heads: of queries, and of keys and values.
        scale: of the scores; ``None``: one over the root of the head size.
        rotates: whether queries and keys turn, and whether neighbours or halves do together.
        window: how many keys a query sees, itself included; -1: all.
        softcap: bends scores to stay below; 0: not.
        causal: whether keys behind a query are hidden.
        smooth: whether the softmax has one more term, of score 0.
        epsilons: of the norms of queries and keys.
    """
    counts = (heads[0], heads[1], heads[1])
    q, k, v = (
        x.reshape(*x.shape[:2], count, -1).transpose(1, 2)
        for x, count in zip(qkv, counts, strict=True)
    )
    length = q.shape[2]
    steps = torch.arange(length, device=q.device)
    before = (last.reshape(-1).long() + 1 - length).clamp(min=0)
    places = before[:, None] + steps  # [N, T]
    q, k = (
        x if gain is None else _normed(x, gain, epsilon)
        for x, gain, epsilon in zip((q, k), norms, epsilons, strict=True)
    )
    if rotates[0]:
        cosines, sines = (_at(table, places, positions) for table in tables)
        q, k = (_turned(x, cosines, sines, rotates[1]) for x in (q, k))
    present = [_behind(old, new, places) for old, new in zip(past, (k, v), strict=True)]
    keys, values = present
    groups = heads[0] // heads[1]
    scores = q @ keys.repeat_interleave(groups, 1).transpose(-1, -2)
    scores = scores * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.arange(keys.shape[2], device=q.device)
    behind = places[:, :, None] - seen  # [N, T, keys]
    hidden = behind < 0 if causal else seen > places[:, -1:, None]
    if window >= 0:
        hidden = hidden | (behind >= window)
    if bias is not None:
        scores = scores + bias[..., : scores.shape[-1]]
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    shares = _shares(scores, sink, smooth)
    y = shares @ values.repeat_interleave(groups, 1)
    return y.transpose(1, 2).flatten(2), keys, values


def _normed(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * scale


def _at(table: Tensor | None, places: Tensor, positions: Tensor | None) -> Tensor:
    """Rows of a table, ``[N, 1, T, pairs]``."""
    assert table is not None
    return table[places if positions is None else positions.long()][:, None]


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, neighbours: bool) -> Tensor:
    """Pairs of positions turned; the table says how many of them there are."""
    pairs = cosines.shape[-1]
    part, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if neighbours:
        one, two = part[..., 0::2], part[..., 1::2]
    else:
        one, two = part[..., :pairs], part[..., pairs:]
    turned = [one * cosines - two * sines, one * sines + two * cosines]
    joined = torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)
    return torch.cat([joined, rest], -1)


def _behind(past: Tensor | None, new: Tensor, places: Tensor) -> Tensor:
    """A cache with new rows at their places, which for shorter samples overwrite padding."""
    if past is None or past.shape[2] == 0:
        return new
    whole = torch.cat([past, torch.zeros_like(new)], 2)
    index = places[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return whole.scatter(2, index, new)


def _shares(scores: Tensor, sink: Tensor | None, smooth: bool) -> Tensor:
    if sink is None and not smooth:
        return scores.softmax(-1)
    more = scores.new_zeros(1) if sink is None else sink.reshape(1, -1, 1, 1)
    column = more.expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
