"""Functions that ONNX has and torch has not; lowerings call them by the builder's ``functions``.

Recurrent layers, :func:`fused` by torch's own kernels and :func:`stepwise` by ONNX's formulas where
those do not reach, work on ``[steps, batch, features]`` and return what the ONNX operator does: the
states of all steps ``[T, D, N, h]``, then the last states ``[D, N, h]``. :func:`over_the_tensor`
counts the positions of pooled values as ONNX does.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from morphgraph.torch_io.grouped import grouped_attention as grouped_attention
from morphgraph.torch_io.linear_attention import (
    causal_convolution as causal_convolution,
    linear_attention as linear_attention,
)
from morphgraph.torch_io.one_node import as_one_node

Activation = tuple[str, float, float]
"""Name in lower case, alpha, beta."""

_ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "affine": lambda x, a, b: a * x + b,
    "elu": lambda x, a, _: F.elu(x, a),
    "hardsigmoid": lambda x, a, b: (a * x + b).clamp(0, 1),
    "leakyrelu": lambda x, a, _: F.leaky_relu(x, a),
    "relu": lambda x, _a, _b: x.relu(),
    "scaledtanh": lambda x, a, b: a * (b * x).tanh(),
    "sigmoid": lambda x, _a, _b: x.sigmoid(),
    "softplus": lambda x, _a, _b: F.softplus(x),
    "softsign": lambda x, _a, _b: F.softsign(x),
    "tanh": lambda x, _a, _b: x.tanh(),
    "thresholdedrelu": lambda x, a, _: torch.where(x > a, x, 0.0),
}


def zero_state(x: Tensor, directions: int, size: int) -> Tensor:
    """The state before the first step, ``[D, N, h]``."""
    return torch.zeros_like(x[:1, :, :1]).repeat(directions, 1, size)


@as_one_node
def fused(
    kernel: str,
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    directions: int,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """One layer by torch's kernels.

    Args:
        kernel: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        x: the sequence, ``[T, N, i]``.
        states: the initial states, ``[D, N, h]``; ``None``: zero.
        weights: per direction ``[G h, i]``, ``[G h, h]`` and the two biases ``[G h]`` or none, in
            torch's order of gates.
        directions: 1 or 2.
        reverse: whether the one direction is from the last step to the first.
    """
    size = weights[1].shape[1]
    initial = [zero_state(x, directions, size) if s is None else s for s in states]
    biased = len(weights) == 4 * directions
    sequence = x.flip(0) if reverse else x
    # Training mode, without dropout, is the same arithmetic; cuDNN learns in no other.
    options = (list(weights), biased, 1, 0.0, True, directions == 2, False)
    function = getattr(torch, kernel)
    y, *last = function(sequence, initial if kernel == "lstm" else initial[0], *options)
    y = y.flip(0) if reverse else y
    return (y.unflatten(2, (directions, size)).transpose(1, 2), *last)


@as_one_node
def stepwise(
    op_type: str,
    x: Tensor,
    states: Sequence[Tensor | None],
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    p: Tensor | None,
    lengths: Tensor | None,
    activations: Sequence[Sequence[Activation]],
    reversed_first: bool,
    clip: float | None = None,
    option: bool = False,
) -> tuple[Tensor, ...]:
    """One layer by ONNX's formulas, step by step: slow, but in every form of the operator.

    Args:
        op_type: ``"LSTM"``, ``"GRU"`` or ``"RNN"``.
        x: the sequence, ``[T, N, i]``.
        states: the initial states, ``[D, N, h]``; ``None``: zero.
        w, r, b, p: the operator's weights: ``[D, G h, i]``, ``[D, G h, h]``, ``[D, 2 G h]``,
            ``[D, 3 h]``.
        lengths: how many steps of every sample count, ``[N]``.
        activations: per direction the functions, in ONNX's order.
        reversed_first: whether the first direction is from the last step to the first.
        clip: bound of what goes into the activations of the gates; not of the cell's value on its
            way out, as ONNX Runtime has it.
        option: ``input_forget`` of LSTM, ``linear_before_reset`` of GRU.
    """
    outputs, lasts = [], []
    for d, functions in enumerate(activations):
        state = [zero_state(x, 1, r.shape[2])[0] if s is None else s[d] for s in states]
        bias = None if b is None else b[d].chunk(2)
        peepholes = None if p is None else p[d].chunk(3)
        apply = [_Clipped(function, clip) for function in functions]
        backwards = d == 1 or reversed_first
        steps = range(x.shape[0])[::-1] if backwards else range(x.shape[0])
        steps_out: list[Tensor] = []
        for t in steps:
            enter = F.linear(x[t], w[d], None if bias is None else bias[0])
            recur = r[d], None if bias is None else bias[1]
            if op_type == "LSTM":
                new = _lstm_step(enter, *recur, peepholes, state[0], state[1], apply, option)
            elif op_type == "GRU":
                new = _gru_step(enter, *recur, state[0], apply, option)
            else:
                new = [apply[0](enter + F.linear(state[0], *recur))]
            if lengths is None:
                state, out = new, new[0]
            else:
                # A sample that has ended keeps its state, and gives zeros.
                live = (lengths > t).unsqueeze(1)
                state = [torch.where(live, a, o) for a, o in zip(new, state, strict=True)]
                out = torch.where(live, new[0], torch.zeros_like(new[0]))
            steps_out.append(out)
        outputs.append(torch.stack(steps_out[::-1] if backwards else steps_out))
        lasts.append(state)
    return (torch.stack(outputs, 1), *(torch.stack(last) for last in zip(*lasts, strict=True)))


class _Clipped:
    """An activation whose input is bounded first."""

    def __init__(self, activation: Activation, clip: float | None) -> None:
        self.name, self.alpha, self.beta = activation
        self.clip = clip

    def __call__(self, x: Tensor) -> Tensor:
        return self.plain(x if self.clip is None else x.clamp(-self.clip, self.clip))

    def plain(self, x: Tensor) -> Tensor:
        """Without the bound."""
        return _ACTIVATIONS[self.name](x, self.alpha, self.beta)


def _lstm_step(
    enter: Tensor,
    r: Tensor,
    bias: Tensor | None,
    peepholes: Sequence[Tensor] | None,
    h: Tensor,
    c: Tensor,
    apply: Sequence[_Clipped],
    coupled: bool,
) -> list[Tensor]:
    """``[h, c]`` after a step; gates are input, output, forget, cell."""
    i, o, f, g = (enter + F.linear(h, r, bias)).chunk(4, dim=1)
    if peepholes is not None:
        i, f = i + peepholes[0] * c, f + peepholes[2] * c
    i = apply[0](i)
    f = 1 - i if coupled else apply[0](f)
    c = f * c + i * apply[1](g)
    if peepholes is not None:
        o = o + peepholes[1] * c
    return [apply[0](o) * apply[2].plain(c), c]


def _gru_step(
    enter: Tensor,
    r: Tensor,
    bias: Tensor | None,
    h: Tensor,
    apply: Sequence[_Clipped],
    linear_first: bool,
) -> list[Tensor]:
    """``[h]`` after a step; gates are update, reset, hidden."""
    size = 2 * h.shape[1]
    z, reset, new = enter.tensor_split((h.shape[1], size), dim=1)
    gates = F.linear(h, r[:size], None if bias is None else bias[:size])
    z, reset = apply[0](z + gates[:, : h.shape[1]]), apply[0](reset + gates[:, h.shape[1] :])
    hidden = r[size:], None if bias is None else bias[size:]
    if linear_first:
        new = new + reset * F.linear(h, *hidden)
    else:
        new = new + F.linear(reset * h, *hidden)
    return [(1 - z) * apply[1](new) + z * h]


def over_the_tensor(
    positions: torch.Tensor, pooled: torch.Tensor, space: Sequence[int], shift: Sequence[int]
) -> torch.Tensor:
    """Positions that ``max_pool`` gives within every plane, counted over a whole tensor.

    Args:
        positions: [batch, channels, *windows], flat within a plane of ``pooled``.
        pooled: [batch, channels, *padded space].
        space: the spatial sizes of the tensor in which is counted, before it was padded.
        shift: how many positions were put before each spatial axis.

    >>> over_the_tensor(torch.tensor([[[0, 3]], [[1, 2]]]), torch.empty(2, 1, 4), [4], [0])
    tensor([[[0, 3]],
    <BLANKLINE>
            [[5, 6]]])
    """
    count, channels = pooled.shape[:2]
    planes = torch.arange(count * channels, device=positions.device)
    flat = planes.reshape(count, channels, *[1] * len(space)) * prod(space)
    rest, step = positions, 1
    for size, whole, before in zip(
        reversed(pooled.shape[2:]), reversed(space), reversed(shift), strict=True
    ):
        flat = flat + (rest % size - before) * step
        rest = rest // size
        step *= whole
    return flat
