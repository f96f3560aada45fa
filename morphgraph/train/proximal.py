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
        flat = torch.cat(list(index)) if index else torch.empty(0, dtype=torch.long)
        order = torch.argsort(flat, stable=True)
        ordered = flat[order]
        place = torch.empty_like(flat)  # of a strength among those of its channel
        place[order] = torch.arange(len(flat), device=flat.device) - torch.searchsorted(
            ordered, ordered
        )
        most = int(place.max()) + 1 if len(place) else 1
        # The strengths lie in a table of a row per channel, whose columns are its ties.
        self._cell = flat * most + place
        self._shape = (channels, most)
        self._weights = self._table(weights)
        falls = torch.where(self._weights > 0, 1 / self._weights, 0.0).amax(dim=1)
        self.rate = torch.where(falls > 0, falls, 1.0)
        """By how much strengths fall in a step of amount 1, at most, ``[channels]``."""

    def _table(self, parts: Sequence[Tensor]) -> Tensor:
        """Numbers of the strengths as ``[channels, most ties]``, zero where there is none."""
        table = torch.zeros(self._shape, device=self._cell.device)
        if parts:
            table.view(-1)[self._cell] = torch.cat([part.float() for part in parts])
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
        table, amount = self._table(values), amounts.float()[:, None]
        shrink = self._below_maximum if tied == "max" else self._below_l2
        factors = shrink(table, amount)
        return torch.split_with_sizes(factors.view(-1)[self._cell], self._sizes)

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
