"""The regularizer: what every channel costs at the present structure, times how much it is used.

    G = sum over groups g of  dF/d(width of g) * sum over channels c in g of strength(c)

with the marginal costs taken at the live widths (channels whose strength is above a threshold). For
convolutions and matrix products this is MorphNet's bilinear regularizer (Gordon et al., CVPR 2018,
equation 6): ``A_in R_out + A_out R_in`` with A the channels alive and R the sums of strengths.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.errors import warn
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io.check import escape
from morphgraph.options import RoundTo, Strength, Tied
from morphgraph.passes.analysis.cost import Convention, cost as cost_of
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.passes.planning.bounds import WidthBounds, Widths, repair_widths
from morphgraph.passes.planning.constraints import Budget as Amounts, holders
from morphgraph.passes.planning.removal_path import continue_plan
from morphgraph.plans import Plan
from morphgraph.train.computed import ComputedSource
from morphgraph.train.motion import require_finite
from morphgraph.train.requests import require_network, require_one_of
from morphgraph.train.resources import Counted, Resource
from morphgraph.train.sources import BoundSource
from morphgraph.train.strengths import THRESHOLD, Strengths
from morphgraph.train.viability import Viability


@dataclass(frozen=True)
class Shrinkage:
    """A proximal step before it is done.

    Attributes:
        parts: per source its channels and their strengths.
        amounts: by how much the penalty lowers a strength that falls at rate 1, ``[channels]``.
        factors: by what every source's strengths are multiplied.
        before, after: the strengths, ``[channels]``.
    """

    parts: Sequence[tuple[Tensor, Tensor]]
    amounts: Tensor
    factors: tuple[Tensor, ...]
    before: Tensor
    after: Tensor


class Regularizer:
    """MorphNet's regularizer on a torch module, found by parameter names.

    Works on what ``to_torch`` returns and on any module whose parameters have the names that the
    model's initializers have (the user's own module that was exported).

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> net = residual_cnn()
    >>> graph = mg.lift(mg.export(net, (image(),)))
    >>> reg = mg.Regularizer(graph, net)
    >>> loss = net(image(2)).square().mean() + reg()
    >>> loss.backward()
    >>> reg.live_share()                        # every channel is alive at the start
    1.0

    Args:
        graph: the lifted network.
        net: the module to be trained.
        cost: the resource to save, or a :class:`~morphgraph.passes.analysis.polynomial.Cost`.
        strength: ``"bn"``: the scales of norms and layer scales, and before products (squeeze and
            excite) the norms' shifts with them; refused where no scale can zero a group;
            ``"lasso"``: the group lasso of the producing kernels; ``"auto"``: scales where they cut
            every path from a group's producers to its readers, the group lasso elsewhere.
            Of several scales in a row the last one counts, since a BatchNorm undoes the scales
            before it (with ``convention="morphnet"`` all of them, as in the original). A kernel
            that is computed (weight norm, masks, fake quantization) is measured as it is, and
            shrinks by the parameters that scale its channels. A group without any (an embedding,
            standardized kernels without a norm's scale) is left alone, with a warning.
        threshold: a channel is alive if its strength is above this. By default 0.01; of the group's
            mean now where scales are no norm's, since they may begin anywhere.
        l1_fraction: share of the mean magnitude in the group lasso.
        tied: how the strengths of tied producers combine: their maximum, as in MorphNet, or the
            root of their sum of squares.
        relative: whether what a channel costs counts in proportion to the mean strength of the
            living channels of its group. Then a scale that all of them share changes nothing, and
            only differences decide; without it nothing may resist such a scale (the next norm
            undoes it), so that a layer's channels fall together and die at once. By default where
            most of the cost is measured by kernels, as in transformers (never with
            ``convention="morphnet"``).
        include, exclude: globs over group ids, names and producers: the groups to shrink (all, if
            none is given), and those that are left alone.
        convention: of the costs and of how often an operator counts a channel. By default the
            group lasso is relative: divided by the group's mean now, it begins at 1, as scales do.
            With ``"morphnet"`` it is as it is, and the default threshold 0.01 of the group's mean.
        min_width: the floor of every group in what is left; with 0 groups may die as a whole, and
            their layers vanish.
        floors, ceilings: the same for some groups: by a glob a number of channels or a share
            (``{"layer1*": 16, "head*": "50%"}``). Ceilings are met by :class:`Budget` and
            :meth:`plan`.
        absorb: whether the resize will absorb what dead channels still add (the shift behind a
            scale of 0, the bias behind a kernel of 0; ``mg.apply(..., absorb=True)``): then they go
            on adding it. Without it nobody reads them any more once a :class:`Budget` is met, and
            the network computes what the resized one will.

    Attributes:
        net: the module.
        known: the strengths after the last step of a :class:`Budget`, ``[channels]``.
        settled: the channels that a :class:`Budget` has taken, a flag each; they stay dead whatever
            becomes of their parameters (averaged, swapped by the optimizer).
        hold: sets them to zero, and what reads them: between two control steps of the
            :class:`Budget` the optimizer moves them a little.
        unfinished: says what a :class:`Budget` still has to do.

    Raises:
        ModelError: a parameter that the graph names is not in the module, or has another shape.
        UnsupportedError: ``strength="bn"`` and some group has no BatchNorm that gates it.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        net: nn.Module,
        cost: str | Cost = "flops",
        strength: Strength = "auto",
        *,
        threshold: float | None = None,
        l1_fraction: float = 0.0,
        tied: Tied = "max",
        relative: bool | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        convention: Convention = "default",
        min_width: int = 1,
        floors: Widths | None = None,
        ceilings: Widths | None = None,
        absorb: bool = False,
    ) -> None:
        require_network(graph, net)
        require_one_of("strength", strength, Strength)
        require_one_of("tied", tied, Tied)
        self.graph = graph
        self.net = net
        self.cost = cost if isinstance(cost, Cost) else cost_of(graph, cost, convention=convention)
        self.initial_cost = self.cost.total
        self.known: Tensor | None = None
        self.settled: Tensor | None = None
        self.hold: Callable[[], None] | None = None
        self.absorb = absorb
        self.unfinished: Callable[[], str] | None = None
        self.counted = [Counted(self.cost, self.initial_cost)]
        self.limits = WidthBounds(
            1, min_width, tuple(include), tuple(exclude), least=floors or {}, most=ceilings or {}
        )
        self._allowed = self.limits.on(graph)
        self._strengths = Strengths(
            graph,
            net,
            self.limits.allowed(graph),
            strength,
            threshold=threshold,
            l1_fraction=l1_fraction,
            tied=tied,
            convention=convention,
        )
        self._ties = self._strengths.ties
        self.scales = self._strengths.scales
        self.kernels = self._strengths.kernels
        if relative is None:
            relative = convention != "morphnet" and self._by_kernels() > 0.5
        self.relative = relative
        self._viability = Viability(self._strengths, self.limits)
        if self._strengths.left_alone:
            warn(f"left alone, since nothing measures or trains them: {self.left_alone()}")

        acted_on = self._strengths.acted_on
        if acted_on and all(source.frozen for source in acted_on):
            warn(
                "every parameter is frozen (requires_grad=False): strengths are measured, and no "
                "step changes them; set requires_grad to train"
            )

    def left_alone(self) -> str:
        """The groups that may shrink, but have no strength, and why; empty where there is none."""
        reasons = list(self._strengths.left_alone.items())
        named = [
            f"{(group := self.graph.groups[index]).id} '{escape(group.name)}' ({why})"
            for index, why in reasons[:5]
        ]
        more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        return "; ".join(named) + more

    def held_by(self, resource: Resource) -> str:
        """Beside a budget that cannot be met, what holds it and what else there is to change."""
        limits = self.limits
        said = ", or lower the floors" * bool(limits.least or limits.min_width > 1)
        said += ", or exclude less" * bool(limits.include or limits.exclude)
        left_alone, allowed = self.left_alone(), limits.on(self.graph)
        held = ""
        if isinstance(resource, Cost):  # a user's own resource tells no parts
            held = holders(resource, allowed.lowest(), allowed)
        said += f". It is held by {held}" * bool(held)
        return said + f". Nothing measures {left_alone}" * bool(left_alone)

    @property
    def threshold(self) -> float | Tensor:
        """A channel is alive if its strength is above this; one number, or ``[channels]``."""
        return self._strengths.threshold

    def strengths(self) -> Tensor:
        """The strength of every channel, ``[channels]``; zero for those that are left alone.

        Of parameters that several processes share (``fully_shard``) they are those after the last
        step of a :class:`Budget`, so that one process may ask alone.
        """
        if self.known is not None and self._strengths.shared:
            return self.known
        return self._strengths.measure()

    @torch.no_grad()
    def alive(self, strengths: Tensor | None = None) -> Tensor:
        """Which channels are alive: above the threshold, or left alone, ``[channels]``.

        Once a :class:`Budget` is met, those that it has left, unless strengths are given.
        """
        if strengths is None and self.settled is not None:
            return ~self.settled
        return self._strengths.alive(self.strengths() if strengths is None else strengths)

    @torch.no_grad()
    def live_widths(self, strengths: Tensor | None = None) -> FloatArray:
        """The number of channels alive in every group, ``[groups]``."""
        if strengths is None:
            return self._strengths.widths_of(self.alive())
        return self._strengths.live_widths(strengths)

    @property
    def weight(self) -> float:
        """Of the penalty on :attr:`cost`, in units of 1/(initial cost)."""
        return self.counted[0].weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self.counted[0].weight = weight

    def live_cost(self, strengths: Tensor | None = None) -> float:
        """The resource that the channels alive need."""
        return self.needed(self.cost, strengths)

    def needed(self, resource: Resource, strengths: Tensor | None = None) -> float:
        """How much of any resource the channels alive need."""
        return self.needed_at(resource, self.live_widths(strengths))

    def needed_at(self, resource: Resource, live: FloatArray) -> float:
        """The same for live widths, ``[groups]``."""
        if (self._allowed.floors > 0).all():
            return resource.polynomial(live)
        return resource.at(repair_widths(live.astype(np.int64), self._allowed))

    def live_share(self, strengths: Tensor | None = None) -> float:
        """``live_cost`` as a share of the initial cost."""
        return self.live_cost(strengths) / self.initial_cost

    def lowest_share(self, resource: Resource | None = None) -> float:
        """The cost at the lowest widths, one channel per group or the floors, as a share."""
        resource = resource or self.cost
        lowest = np.where(self._strengths.measured, self._allowed.floors, self.graph.widths)
        return resource.at(repair_widths(lowest, self._allowed)) / max(resource.total, 1e-30)

    def ceilings(self) -> list[tuple[Group, int]]:
        """The groups that must get narrower, with the most that each may keep."""
        most = self._allowed.ceilings
        return [
            (group, int(most[group.index]))
            for group in self.graph.groups
            if most[group.index] < group.width and self._strengths.measured[group.index]
        ]

    def __call__(self) -> Tensor:
        """``weight * G / (initial cost)``, a scalar to be added to the loss."""
        strengths = self.strengths()
        return (self._pull(strengths.detach()) * strengths).sum()

    def value(self) -> Tensor:
        """G itself, in units of the cost, a scalar with a gradient."""
        strengths = self.strengths()
        fixed = strengths.detach()
        prices = self.marginals(fixed) * self._weakened(fixed)
        return (prices * strengths).sum()

    def marginals(self, strengths: Tensor | None = None) -> Tensor:
        """What every channel costs at the live widths, ``[channels]``; zero if left alone."""
        return self._per_channel(self.cost.marginals(self.live_widths(strengths)))

    def _per_channel(self, per_group: FloatArray) -> Tensor:
        """A number per group as one per channel that is measured, zero elsewhere."""
        owned = self._strengths.owned
        # The group -1, of channels of no group, is the last number.
        padded = torch.from_numpy(np.append(per_group, 0.0)).float().to(owned.device)
        return padded[self._strengths.channel_group] * owned

    def _pull(self, strengths: Tensor) -> Tensor:
        """What a unit of every channel's strength adds to the loss, ``[channels]``."""
        live = self.live_widths(strengths)
        per_group = np.zeros(len(live))
        for each in self.counted:
            if each.weight:
                per_group += each.resource.marginals(live) * (each.weight / each.initial)
        return self._per_channel(per_group) * self._weakened(strengths)

    def _by_kernels(self) -> float:
        """Which share of what can be removed is measured by kernels."""
        prices = self.marginals()
        return float((prices * self._strengths.by_kernel).sum() / prices.sum().clamp_min(1e-30))

    def _weakened(self, strengths: Tensor) -> Tensor | float:
        """By what relative penalties count, ``[channels]``: the mean strength of the group."""
        if not self.relative:
            return 1.0
        means = self._strengths.means(strengths, self.alive(strengths))
        return torch.where(means > 0, means, 1.0)

    def initial_weight(self, path: float, resource: Resource | None = None) -> float:
        """The weight at which an average channel of strength 1, without a loss, would just die.

        For a channel with one producer; ties share the fall, and need more. A relative penalty
        weakens as a group shrinks: strengths fall by shares, down to the threshold, where a
        constant one takes them to zero.

        Args:
            path: the sum of the phase's effective steps.
            resource: what is counted, by default :attr:`cost`.
        """
        resource = resource or self.cost
        prices = self._per_channel(resource.marginals(self.live_widths()))
        # Kernels of few numbers, or of small ones, fall faster than by the amount.
        falls = (prices * self._ties.rate)[prices > 0]
        mean = float(falls.mean()) / max(resource.total, 1e-30) if len(falls) else 0.0
        return self._fall() / max(path * mean, 1e-30)

    def _fall(self) -> float:
        """How far a strength of 1 has to fall to die, in units of the penalty's amounts."""
        if not self.relative:
            return 1.0
        # A threshold of the program's own is a share of where a strength begins.
        share = THRESHOLD if isinstance(self.threshold, Tensor) else self.threshold
        return max(1.0, -log(max(share, 1e-6)))

    @torch.no_grad()
    def proximal_step(self, step_size: float) -> None:
        """Shrink every strength by ``step_size * weight * marginal / initial cost``, down to zero.

        The proximal operator of the regularizer (:mod:`morphgraph.train.proximal`; of the group
        lasso for kernels, whatever ``l1_fraction`` is), to be called after the optimizer's step
        instead of adding the regularizer to the loss. With momentum m the optimizer's effective
        step is ``lr / (1 - m)``. Zeros are exact.
        """
        self.shrink(self.shrinkage(step_size))

    @torch.no_grad()
    def shrinkage(
        self, step_size: float, parts: Sequence[tuple[Tensor, Tensor]] | None = None
    ) -> "Shrinkage":
        """What :meth:`proximal_step` would do; no parameter changes.

        Args:
            step_size: the effective step.
            parts: what :meth:`measured` has given, where that is known.
        """
        parts = self.measured() if parts is None else parts
        strengths = self._strengths.combined(parts)
        if self._strengths.l1_fraction:
            strengths = self.strengths()
        amounts = self._pull(strengths) * step_size
        # With a margin: below twice the threshold a channel counts as dying.
        would_die = strengths - amounts * self._ties.rate <= 2 * self.threshold
        would_die &= self._strengths.owned
        if bool(would_die.any()):
            amounts[would_die & self.protected(strengths, would_die)] = 0.0
        return self._by_amounts(parts, strengths, amounts)

    def measured(self) -> list[tuple[Tensor, Tensor]]:
        """Per scale and kernel its channels and their strengths, whatever ``l1_fraction`` is."""
        return self._strengths.of_sources(l1_fraction=0.0)

    @torch.no_grad()
    def sparing(self, shrinkage: "Shrinkage", channels: Tensor) -> "Shrinkage":
        """The same, but for some channels that stay as they are, a flag per channel."""
        amounts = shrinkage.amounts.masked_fill(channels, 0.0)
        return self._by_amounts(shrinkage.parts, shrinkage.before, amounts)

    def _by_amounts(
        self, parts: Sequence[tuple[Tensor, Tensor]], before: Tensor, amounts: Tensor
    ) -> "Shrinkage":
        tied = self._strengths.tied
        factors = [
            torch.ones_like(factor) if source.frozen else factor
            for source, factor in zip(
                (*self.scales, *self.kernels),
                self._ties.factors([value for _, value in parts], amounts, tied),
                strict=True,
            )
        ]
        scaled = [
            (index, value * factor) for (index, value), factor in zip(parts, factors, strict=True)
        ]
        # A strength with a share of magnitudes falls by the same factors.
        after = self._strengths.combined(scaled)
        if self._strengths.l1_fraction:
            plain = self._strengths.combined(parts)
            after = torch.where(plain > 0, before * after / plain.where(plain > 0, 1.0), 0.0)
        return Shrinkage(parts, amounts, tuple(factors), before, after)

    @torch.no_grad()
    def shrink(self, shrinkage: "Shrinkage") -> None:
        """Do it: multiply the scales and kernels by their factors."""
        factors = iter(shrinkage.factors)
        for source in self.scales:
            source.multiply(next(factors))
        for source in self.kernels:  # one factor per channel, which may have several positions
            factor = next(factors)
            for part in source.scaling if isinstance(source, ComputedSource) else (source,):
                part.multiply(factor[part.slot])

    def bind_again(self) -> bool:
        """Find the parameters by their names again: ``fully_shard`` and others replace them.

        Returns:
            Whether any is another one.

        Raises:
            ModelError: a parameter is not in the module any more, or has another shape.
            UnsupportedError: a kernel is computed from what several processes share.
        """
        return self._strengths.bind_again()

    def state_dict(self) -> dict[str, Any]:
        """By what strengths are measured: read off the network as it was at first."""
        return {"relative": self.relative, **self._strengths.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Measure as another run does, whatever the network is now.

        Raises:
            ArgumentError: the state is of another network, or of other groups.
        """
        self._strengths.load_state_dict(state)
        self._ties = self._strengths.ties
        self.relative = state["relative"]

    @property
    def acted_on(self) -> list[BoundSource]:
        """The slices of parameters that shrinking steps multiply."""
        return self._strengths.acted_on

    @property
    def silencing(self) -> list[BoundSource]:
        """The slices that must be zero beside them, so that nobody reads a dead channel."""
        return self._strengths.silencing

    def protected(self, strengths: Tensor, would_die: Tensor) -> Tensor:
        """Channels that must not die, ``[channels]``: as many of the strongest as a group needs.

        A group needs its floor, and one channel where no network would be left without it; of
        groups that would die together the strongest stay where they must.
        """
        return self._viability.protected(strengths, would_die)

    def keep(self) -> dict[int, IntArray]:
        """Per group index the channels alive; where none is the strongest, if one must stay."""
        strengths = self._decided()
        alive = self.alive().cpu().numpy()
        ranked = strengths.cpu().numpy()
        keep: dict[int, IntArray] = {}
        for group in self.graph.groups:
            living = np.flatnonzero(alive[group.channels])
            if not len(living) and self._allowed.floors[group.index] > 0:
                living = np.array([int(np.argmax(ranked[group.channels]))])
            keep[group.index] = living
        return keep

    def _decided(self) -> Tensor:
        """The strengths, ``[channels]``; zero for channels that a budget has taken."""
        strengths = self.strengths().detach()
        return strengths if self.settled is None else strengths.masked_fill(self.settled, 0.0)

    def plan(
        self, budget: Amounts | None = None, *, round_to: RoundTo = 1, min_width: int | None = None
    ) -> Plan:
        """What the training has decided: the channels alive stay.

        What a met :class:`Budget` has taken is set to zero in the network, which then computes what
        the resized one will.

        Args:
            budget: if the live cost is above it, the weakest of the living go until it is met.
            round_to, min_width: widths are rounded to the nearest on this grid, not below this
                floor (by default the regularizer's own); the strongest of the dead come back where
                that is upwards.

        Raises:
            BudgetError: the budget cannot be met.
            UnsupportedError: the training has diverged.
        """
        if self.unfinished is not None and (missed := self.unfinished()):
            warn(f"the budget is not met: {missed}")
        if self.hold is not None:
            self.hold()
        require_finite(bool(self._decided().isfinite().all()))
        floor = self.limits.min_width if min_width is None else min_width
        return continue_plan(
            self.graph,
            self.keep(),
            self._decided().cpu().double().numpy(),
            budget or {},
            self.cost,
            replace(self.limits, round_to=round_to, min_width=floor),
        )
