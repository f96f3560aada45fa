"""The proximal operator of the regularizer: what one shrinking step leaves of every strength.

A channel with producers ``i``, all tied, costs ``t |s|`` with the maximum or the L2 norm of their
strengths ``s_i``. The step goes to the minimum of ``t |s| + 1/2 sum_i w_i (s_i - v_i)^2`` (Parikh
and Boyd, *Proximal Algorithms*, 2014, sections 6.5.1 and 6.5.2 for equal weights). For one producer
both norms are the soft threshold ``max(v - t / w, 0)``. With the maximum, ties share the amount:
n equal scales fall by ``t / n`` each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from morphgraph.options import Tied

_HALVINGS = 40  # of the interval in which an L2 norm is looked for


class TiedStrengths:
    """The strengths of sources by their channels; those of one channel are tied.

    >>> index = [torch.tensor([0, 1]), torch.tensor([1, 2])]   # channel 1 has two producers
    >>> ties = TiedStrengths(index, [torch.ones(2), torch.ones(2)], channels=3)
    >>> values = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.5])]
    >>> [factor.tolist() for factor in ties.factors(values, torch.full((3,), 0.5), "max")]
    [[0.5, 0.75], [0.75, 0.0]]

    Args:
        index: the channels of every source's strengths.
        weights: ``w``, one for each of those strengths: where ``s = a |x|``, that is ``1 / a^2``.
        channels: how many channels there are.
    """

    def __init__(self, index: Sequence[Tensor], weights: Sequence[Tensor], channels: int) -> None:
        self._sizes = [len(part) for part in index]
        self._flat = torch.cat(list(index)) if index else torch.empty(0, dtype=torch.long)
        device = self._flat.device
        self._weight = torch.cat([part.float() for part in weights]) if weights else torch.empty(0)
        fall = torch.where(self._weight > 0, 1 / self._weight, 0.0)
        falls = torch.zeros(channels, device=device).scatter_reduce(0, self._flat, fall, "amax")
        self.rate = torch.where(falls > 0, falls, 1.0)
        """By how much strengths fall in a step of amount 1, at most, ``[channels]``."""

        count = torch.bincount(self._flat, minlength=channels)
        self._tied = torch.nonzero(count[self._flat] > 1).flatten()  # of the strengths
        channel = self._flat[self._tied]
        self._channels, row = torch.unique(channel, return_inverse=True)
        order = torch.argsort(row, stable=True)
        ordered = row[order]
        place = torch.empty_like(row)  # of a strength among those of its channel
        place[order] = torch.arange(len(row), device=device) - torch.searchsorted(ordered, ordered)
        most = int(place.max()) + 1 if len(place) else 1
        # Tied strengths lie in a table of a row per channel, whose columns are its ties.
        self._cell = row * most + place
        self._shape = (len(self._channels), most)
        self._weights = self._table(self._weight)

    def _table(self, numbers: Tensor) -> Tensor:
        """Numbers of the tied strengths as ``[channels, most ties]``, zero where there is none."""
        table = torch.zeros(self._shape, device=self._cell.device)
        table.view(-1)[self._cell] = numbers[self._tied]
        return table

    def factors(self, values: Sequence[Tensor], amounts: Tensor, tied: Tied) -> Sequence[Tensor]:
        """What every strength is to be multiplied by, per source, from 0 to 1.

        Args:
            values: ``v``, the strengths now.
            amounts: ``t``, a number per channel, ``[channels]``.
            tied: the norm.
        """
        if not values:
            return ()
        now, amount = torch.cat([part.float() for part in values]), amounts.float()
        left = (now - amount[self._flat] / self._weight.clamp_min(1e-30)).clamp_min(0.0)
        factors = torch.where(left < now, left / now, 1.0)  # of one producer
        if len(self._tied):
            shrink = self._below_maximum if tied == "max" else self._below_l2
            together = shrink(self._table(now), amount[self._channels, None])
            factors[self._tied] = together.view(-1)[self._cell]
        return torch.split_with_sizes(factors, self._sizes)

    def _below_maximum(self, values: Tensor, amount: Tensor) -> Tensor:
        """All strengths above one level come down to it, by ``t`` in all (each times its w)."""
        ordered, order = values.sort(dim=1, descending=True, stable=True)
        weights = self._weights.gather(1, order)
        # The level that the k strongest would come down to; of the right k it is the highest.
        levels = ((weights * ordered).cumsum(1) - amount) / weights.cumsum(1).clamp_min(1e-30)
        level = levels.amax(dim=1, keepdim=True).clamp_min(0.0)
        return torch.where(values > level, level / values, 1.0)

    def _below_l2(self, values: Tensor, amount: Tensor) -> Tensor:
        """``s_i = w_i v_i r / (w_i r + t)`` with ``r = |s|``, found by halving."""
        weights, low = self._weights, torch.zeros_like(amount)
        high = values.norm(dim=1, keepdim=True)
        pull = weights * values
        # r is where sum_i (w_i v_i / (w_i r + t))^2 = 1; the sum falls as r grows from 0 to |v|.
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = (pull / (weights * middle + amount).clamp_min(1e-30)).square().sum(1) > 1
            low = torch.where(above[:, None], middle, low)
            high = torch.where(above[:, None], high, middle)
        scaled = weights * high  # w_i r
        factor = torch.where(amount > 0, scaled / (scaled + amount).clamp_min(1e-30), 1.0)
        # No r > 0 solves this where |w v| <= t: the step is at least as long as the strengths.
        dies = (pull.norm(dim=1, keepdim=True) <= amount) & (amount > 0)
        return torch.where(dies, 0.0, factor)
