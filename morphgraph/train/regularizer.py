"""The regularizer: what every channel costs at the present structure, times how much it is used.

    G = sum over groups g of  dF/d(width of g) * sum over channels c in g of strength(c)

with the marginal costs taken at the live widths (channels whose strength is above a threshold). For
convolutions and matrix products this is MorphNet's bilinear regularizer (Gordon et al., CVPR 2018,
equation 6): ``A_in R_out + A_out R_in`` with A the channels alive and R the sums of strengths.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from morphgraph.arrays import Flags, FloatArray, IntArray
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.check import escape
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.channel_sources import Source, channel_scales, kernels
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.analysis.gates import closing_scales, deciding_scales, gated_groups
from morphgraph.passes.analysis.liveness import is_viable
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.passes.planning.bounds import WidthBounds, repair_widths
from morphgraph.passes.planning.constraints import Budget as Amounts
from morphgraph.passes.planning.removal_path import continue_plan
from morphgraph.plans import Plan
from morphgraph.torch_io.weights import named_tensors
from morphgraph.train.proximal import Tied, TiedStrengths
from morphgraph.train.sources import bind, kernel_strength, root, scale_strength

Strength = Literal["auto", "bn", "lasso"]


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
        strength: ``"bn"``: the scales of norms and layer scales, refused where they cannot silence
            a group; ``"lasso"``: the group lasso of the producing kernels; ``"auto"``: scales where
            they cut every path from a group's producers to its readers, the group lasso elsewhere.
            Of several scales in a row the last one counts, since a BatchNorm undoes the scales
            before it (with ``convention="morphnet"`` all of them, as in the original). A group
            without either (an embedding, kernels that are computed) has no strength: it is left
            alone.
        threshold: a channel is alive if its strength is above this. By default 0.01; of the group's
            mean now where scales are no norm's, since they may begin anywhere.
        l1_fraction: share of the mean magnitude in the group lasso.
        tied: how the strengths of tied producers combine: their maximum, as in MorphNet, or the
            root of their sum of squares.
        relative: whether what a channel costs counts in proportion to the mean strength of the
            living channels of its group. Then a scale that all of them share changes nothing, and
            only differences decide; without it nothing may resist such a scale (the next BatchNorm
            undoes it), so that a layer's channels fall together and die at once.
        exclude: globs of groups that are left alone.
        convention: of the costs and of how often an operator counts a channel. By default the
            group lasso is relative: divided by the group's mean now, it begins at 1, as scales do.
            With ``"morphnet"`` it is as it is, and the default threshold 0.01 of the group's mean.
        min_width: the floor of every group in what is left; with 0 groups may die as a whole, and
            their layers vanish.

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
        relative: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        convention: Convention = "default",
        min_width: int = 1,
    ) -> None:
        self.graph = graph
        self.weight = 1.0
        self.l1_fraction = l1_fraction
        self.tied = tied
        self.relative = relative
        morphnet = convention == "morphnet"
        self._deciding = closing_scales(graph) if morphnet else deciding_scales(graph)
        self.cost = _resource(graph, cost, convention)
        self.initial_cost = self.cost.total
        self.limits = WidthBounds(1, min_width, tuple(include), tuple(exclude))
        self.limits.check(graph)
        self._own = np.array([self.limits.allows(group) for group in graph.groups], dtype=bool)
        gated = self._gated(strength)
        producing = kernels(graph)
        self._own &= np.logical_or(gated, self._with_source(producing))
        self._by_scale = self._per_channel(gated)
        by_kernel = self._per_channel(np.logical_and(self._own, np.logical_not(gated)))
        found = named_tensors(net)
        device = next(iter(found.values())).device if found else torch.device("cpu")
        scaling = {source.parameter: source for source in channel_scales(graph).values()}
        scales = [(source, self._by_scale & self._decides(source)) for source in scaling.values()]
        self.scales = bind(scales, found, device)
        self.kernels = bind([(source, by_kernel) for source in producing], found, device)
        self._channel_group = torch.from_numpy(graph.channel_group).to(device)
        self._owned = torch.from_numpy(self._per_channel(self._own)).to(device)
        self._floors = np.array([self.limits.floor(group) for group in graph.groups])
        self._last_paths: dict[frozenset[int], IntArray] = {}  # of the groups dead at last
        self._unit = torch.ones(len(self._owned), device=device)  # of strengths, per channel
        with torch.no_grad():
            means = self._means(self.strengths(), torch.ones_like(self._owned))
        anywhere = self._by_layer_scale() | by_kernel if morphnet else self._by_layer_scale()
        begin = torch.where(torch.from_numpy(anywhere).to(device), means.clamp(1e-6, 1.0), 1.0)
        self.threshold = 1e-2 * begin if threshold is None else threshold
        if not morphnet:
            kernel = torch.from_numpy(by_kernel).to(device)
            self._unit = torch.where(kernel, means.clamp_min(1e-6), 1.0)
        self._ties = self._tie()

    def _gated(self, strength: Strength) -> Flags:
        groups = self.graph.groups
        if strength == "lasso":
            return np.zeros(len(groups), dtype=bool)
        gates = gated_groups(self.graph)
        gated: Flags = np.array([group.index in gates for group in groups], dtype=bool)
        gated &= self._own
        open_ones = [g.name for g in groups if self._own[g.index] and not gated[g.index]]
        if strength == "bn" and open_ones:
            raise UnsupportedError(
                f"strength 'bn': no norm's scale gates '{escape(open_ones[0])}' (and "
                f"{len(open_ones) - 1} more groups); use 'auto', or exclude them"
            )
        return gated

    def _decides(self, scale: Source) -> Flags:
        """The channels whose strength this scale has a part in, ``[channels]``."""
        flags = np.zeros(len(self.graph.groups), dtype=bool)
        flags[list(self._deciding.get(scale.parameter, ()))] = True
        return self._per_channel(flags)

    def _with_source(self, sources: Iterable[Source]) -> Flags:
        """Which groups have channels on one of these axes."""
        found = np.zeros(len(self.graph.groups) + 1, dtype=bool)
        for source in sources:
            found[self.graph.channel_group[source.channels]] = True  # -1, no group, comes last
        return found[:-1]

    def _by_layer_scale(self) -> Flags:
        """The channels that a scale which is no norm's decides on, ``[channels]``."""
        found = np.zeros(len(self.graph.channel_group), dtype=bool)
        for number, source in channel_scales(self.graph).items():
            if facts_of(self.graph.ops[number].ir).scale is None:
                found |= self._by_scale & self._decides(source)
        return found

    def _means(self, strengths: Tensor, counted: Tensor) -> Tensor:
        """The mean strength of the counted channels of every channel's group, ``[channels]``.

        Zero where none is counted.
        """
        size = len(self.graph.groups) + 1
        group = self._channel_group % size  # -1, no group, comes last
        total = torch.zeros(size, device=group.device).index_add(0, group, strengths * counted)
        count = torch.zeros(size, device=group.device).index_add(0, group, counted.float())
        return (total / count.clamp_min(1))[group]

    def _tie(self) -> TiedStrengths:
        """Which strengths are of one channel, and how each falls with its parameter."""
        index = [source.index for source in self.scales]
        index += [source.channels for source in self.kernels]
        weights = [torch.ones_like(source.index, dtype=torch.float32) for source in self.scales]
        # The strength is the norm over u sqrt(n), with u its unit.
        weights += [source.count * self._unit[source.channels].square() for source in self.kernels]
        return TiedStrengths(index, weights, len(self._channel_group))

    def _per_channel(self, flags: Flags) -> Flags:
        """A flag per group as a flag per channel; channels outside of all groups get False."""
        found: Flags = np.append(flags, False)[self.graph.channel_group]
        return found

    def _of_sources(self, l1_fraction: float) -> list[tuple[Tensor, Tensor]]:
        """Per scale and kernel its channels and their strengths."""
        parts = [(source.index, scale_strength(source)) for source in self.scales]
        return parts + [
            (source.channels, kernel_strength(source, l1_fraction) / self._unit[source.channels])
            for source in self.kernels
        ]

    def strengths(self) -> Tensor:
        """The strength of every channel, ``[channels]``; zero for those that are left alone."""
        parts = self._of_sources(self.l1_fraction)
        total = torch.zeros(len(self._channel_group), device=self._channel_group.device)
        if not parts:
            return total
        index = torch.cat([index for index, _ in parts])
        values = torch.cat([value.float() for _, value in parts])
        if self.tied == "max":
            return total.scatter_reduce(0, index, values, "amax", include_self=False)
        return root(total.index_add(0, index, values.square()))

    def alive(self, strengths: Tensor | None = None) -> Tensor:
        """Which channels are alive: above the threshold, or left alone, ``[channels]``."""
        with torch.no_grad():
            found = self.strengths() if strengths is None else strengths
            return (found > self.threshold) | ~self._owned

    def live_widths(self, strengths: Tensor | None = None) -> FloatArray:
        """The number of channels alive in every group, ``[groups]``."""
        alive = self.alive(strengths)
        groups = self._channel_group[alive & (self._channel_group >= 0)]
        counted = torch.bincount(groups, minlength=len(self.graph.groups))
        widths: FloatArray = counted.cpu().numpy().astype(np.float64)
        return widths

    def live_cost(self, strengths: Tensor | None = None) -> float:
        """The resource that the channels alive need."""
        live = self.live_widths(strengths)
        if self.limits.min_width > 0:
            return self.cost.polynomial(live)
        return self.cost.at(repair_widths(self.graph, live.astype(np.int64), self.limits))

    def live_share(self, strengths: Tensor | None = None) -> float:
        """``live_cost`` as a share of the initial cost."""
        return self.live_cost(strengths) / self.initial_cost

    def lowest_share(self) -> float:
        """The cost at the lowest widths, one channel per group or ``min_width``, as a share."""
        widths = self.graph.widths
        lowest = np.where(self._own, np.minimum(self.limits.min_width, widths), widths)
        return self.cost.at(repair_widths(self.graph, lowest, self.limits)) / self.initial_cost

    def __call__(self) -> Tensor:
        """``weight * G / (initial cost)``, a scalar to be added to the loss."""
        return self.weight * self.value() / self.initial_cost

    def value(self) -> Tensor:
        """G itself, in units of the cost, a scalar with a gradient."""
        strengths = self.strengths()
        return (self._prices(strengths.detach()) * strengths).sum()

    def marginals(self, strengths: Tensor | None = None) -> Tensor:
        """What every channel costs at the live widths, ``[channels]``; zero if left alone."""
        per_group = self.cost.marginals(self.live_widths(strengths))
        padded = torch.from_numpy(np.append(per_group, 0.0)).float().to(self._owned.device)
        return padded[self._channel_group] * self._owned

    def _prices(self, strengths: Tensor) -> Tensor:
        """What a unit of every channel's strength costs, ``[channels]``."""
        marginals = self.marginals(strengths)
        if not self.relative:
            return marginals
        means = self._means(strengths, self.alive(strengths))
        return marginals * torch.where(means > 0, means, 1.0)

    def initial_weight(self, path: float) -> float:
        """The weight at which an average channel of strength 1, without a loss, would just die.

        For a channel with one producer; ties share the fall, and need more.

        Args:
            path: the sum of the phase's effective steps.
        """
        marginals = self.marginals()
        mean = float(marginals[marginals > 0].mean()) / self.initial_cost
        return 1.0 / max(path * mean, 1e-30)

    @torch.no_grad()
    def proximal_step(self, step_size: float) -> None:
        """Shrink every strength by ``step_size * weight * marginal / initial cost``, down to zero.

        The proximal operator of the regularizer (:mod:`morphgraph.train.proximal`; of the group
        lasso for kernels, whatever ``l1_fraction`` is), to be called after the optimizer's step
        instead of adding the regularizer to the loss. With momentum m the optimizer's effective
        step is ``lr / (1 - m)``. Zeros are exact.
        """
        strengths = self.strengths()
        amounts = self._prices(strengths) * (step_size * self.weight / self.initial_cost)
        would_die = strengths - amounts * self._ties.rate <= 2 * self.threshold
        amounts[would_die & self.protected(strengths, would_die)] = 0.0
        values = [value for _, value in self._of_sources(l1_fraction=0.0)]
        factors = iter(self._ties.factors(values, amounts, self.tied))
        for source in self.scales:
            source.parameter.view(-1)[source.positions] *= next(factors).to(source.parameter.dtype)
        for source in self.kernels:
            rows = source.parameter.movedim(source.axis, 0)
            factor = next(factors)[source.slot].to(rows.dtype)
            rows[source.positions] *= factor.reshape(-1, *[1] * (rows.dim() - 1))

    def protected(self, strengths: Tensor, would_die: Tensor) -> Tensor:
        """Channels that must not die, ``[channels]``: as many of the strongest as a group needs.

        A group needs its floor, and one channel where no network would be left without it; of
        groups that would die together the strongest stay where they must.
        """
        floors = self._needed(strengths)
        protected = self._strongest(strengths, floors)
        if self.limits.min_width > 0:
            return protected
        remaining = torch.where(would_die & ~protected, 0.0, strengths)
        dead, doomed = self._dead(strengths), self._dead(remaining)
        if len(doomed - dead) < 2 or is_viable(self.graph, doomed):
            return protected
        floors = floors.copy()
        strongest = {k: strengths[self.graph.groups[k].channels].max() for k in doomed - dead}
        for index in sorted(strongest, key=lambda k: (float(strongest[k]), k)):
            if is_viable(self.graph, dead | {index}):
                dead |= {index}
            else:
                floors[index] = 1
        return self._strongest(strengths, floors)

    def _dead(self, strengths: Tensor) -> frozenset[int]:
        """The groups without a channel alive."""
        return frozenset(np.flatnonzero(self.live_widths(strengths) == 0).tolist())

    def _strongest(self, strengths: Tensor, counts: IntArray) -> Tensor:
        """The strongest channels of every group, so many, ``[channels]``."""
        floors = torch.from_numpy(counts).to(strengths.device)
        order = torch.argsort(strengths, descending=True, stable=True)
        order = order[self._channel_group[order] >= 0]
        order = order[torch.argsort(self._channel_group[order], stable=True)]
        groups = self._channel_group[order]
        first = torch.searchsorted(groups, groups)  # where the channel's group begins
        rank = torch.arange(len(order), device=order.device) - first
        protected = torch.zeros_like(strengths, dtype=torch.bool)
        protected[order[rank < floors[groups]]] = True
        return protected

    def _needed(self, strengths: Tensor) -> IntArray:
        """How many channels every group must keep, ``[groups]``."""
        if self.limits.min_width > 0:
            return self._floors
        dead = self._dead(strengths)
        if dead not in self._last_paths:
            self._last_paths = {dead: self._floors_beside(dead)}
        return self._last_paths[dead]

    def _floors_beside(self, dead: frozenset[int]) -> IntArray:
        """One channel for every group without which, beside the dead, no network would be left."""
        floors = self._floors.copy()
        for group in self.graph.groups:
            if self._own[group.index] and not is_viable(self.graph, dead | {group.index}):
                floors[group.index] = 1
        return floors

    def snapshot(self) -> list[Tensor]:
        """Copies of the scales and kernels that the regularizer acts on, for :meth:`restore`."""
        return [source.parameter.detach().clone() for source in (*self.scales, *self.kernels)]

    @torch.no_grad()
    def restore(self, snapshot: Sequence[Tensor], channels: Tensor) -> None:
        """Give some channels the scales and kernels of a snapshot, a flag per channel."""
        for source, earlier in zip((*self.scales, *self.kernels), snapshot, strict=True):
            positions = source.positions[channels[source.index]]
            old = earlier.movedim(source.axis, 0)[positions]
            source.parameter.movedim(source.axis, 0)[positions] = old

    @torch.no_grad()
    def silence(self, dead: Tensor) -> None:
        """Set the scales and kernels of some channels to zero, ``dead`` a flag per channel."""
        for source in (*self.scales, *self.kernels):
            positions = source.positions[dead[source.index]]
            source.parameter.movedim(source.axis, 0)[positions] = 0.0

    def keep(self) -> dict[int, IntArray]:
        """Per group index the channels alive; where none is the strongest, if one must stay."""
        strengths = self.strengths().detach()
        alive = self.alive(strengths).cpu().numpy()
        numbers = strengths.cpu().numpy()
        kept: dict[int, IntArray] = {}
        for group in self.graph.groups:
            living = np.flatnonzero(alive[group.channels])
            if not len(living) and self.limits.floor(group) > 0:
                living = np.array([int(np.argmax(numbers[group.channels]))])
            kept[group.index] = living
        return kept

    def plan(
        self, budget: Amounts | None = None, *, round_to: int = 1, min_width: int | None = None
    ) -> Plan:
        """What the training has decided: the channels alive stay.

        Args:
            budget: if the live cost is above it, the weakest of the living go until it is met.
            round_to, min_width: widths are rounded to the nearest on this grid, not below this
                floor (by default the regularizer's own); the strongest of the dead come back where
                that is upwards.

        Raises:
            BudgetError: the budget cannot be met.
        """
        floor = self.limits.min_width if min_width is None else min_width
        return continue_plan(
            self.graph,
            self.keep(),
            self.strengths().detach().cpu().double().numpy(),
            budget or {},
            self.cost,
            WidthBounds(round_to, floor, self.limits.include, self.limits.exclude),
        )


def _resource(graph: ChannelGraph, resource: str | Cost, convention: Convention) -> Cost:
    if isinstance(resource, Cost):
        return resource
    return cost(graph, resource, convention=convention)
