"""The configuration of structure learning: plain data, without torch.

The annotations of the fields hold what a command line needs; ``morphgraph morph`` and
``morphgraph sweep`` take their options from them. Their help reads nothing else, so that what
computes is imported where it is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from morphgraph.errors import ArgumentError
from morphgraph.options import ROUND_TO, RoundTo, Start, Strength, Update, option

if TYPE_CHECKING:
    from morphgraph.graph import ChannelGraph
    from morphgraph.passes.planning.bounds import WidthBounds

SHRINK_TO = 0.35
"""How far a phase shrinks before the widths are scaled to the budget, see :class:`SearchConfig`."""


@dataclass(frozen=True)
class SearchConfig:
    """The target of structure learning, and how to get there.

    Attributes:
        budget: per cost an amount or a share of the original's, such as ``{"flops": "50%"}``. All
            hold in the end.
        cost: what the regularizer counts; the first of the budget's costs if not given.
        iterations: how often to shrink and expand; ends before where the widths repeat.
        shrink_to: how far a phase shrinks, as the share of the way from the least cost that can be
            reached to the cost of the network that it begins with. Then all widths are multiplied
            by one factor, above or below 1, that brings the network to the budget. A phase that
            shrinks hard tells more about what each layer needs than one that stops at a budget
            near where it began; docs/experiments.md has the figures.
        max_growth: no group gets wider than so many times its width in the original.
        weights: of the last phase: the trained ones (``"keep"``), or new ones (``"fresh"``).
        absorb: whether what removed channels still add (a shift behind a scale of 0) moves into the
            next bias.
        strength, relative: how the use of a channel is measured, and whether channels compete
            within their group only; see :class:`~morphgraph.train.regularizer.Regularizer`.
        update: how the strengths shrink, see
            :class:`~morphgraph.train.fixed_weight.FixedWeight`.
        round_to, min_width: grid and floor of the new widths; with 0 layers may vanish.

    Raises:
        ArgumentError: a number is out of its range.
    """

    budget: Mapping[str, str | float | int]
    cost: str | None = None
    iterations: Annotated[
        int, option("How often to shrink and scale before the last training.", ge=1)
    ] = 1
    shrink_to: Annotated[
        float,
        option(
            "How far a phase shrinks, as a share of what it begins with, before all widths are "
            "multiplied by the factor that brings them to the budget.",
            gt=0,
            le=1,
            show_default=False,
        ),
    ] = SHRINK_TO
    max_growth: Annotated[
        float | None,
        option(
            "No group gets wider than so many times its width in the model.", ge=1, metavar="TIMES"
        ),
    ] = None
    weights: Annotated[
        Start,
        option("Whether the last training goes on with the weights or begins with new ones."),
    ] = "keep"
    absorb: Annotated[bool, option("Move what removed channels still add into the next bias.")] = (
        False
    )
    strength: Annotated[Strength, option("How the use of a channel is measured.")] = "auto"
    update: Annotated[
        Update,
        option("Shrink to exact zeros after every step, or by a term of the loss and a threshold."),
    ] = "proximal"
    relative: Annotated[
        bool | None,
        option(
            "Channels compete within their group only, so that no layer loses its channels all at "
            "once; by default where strengths are those of kernels."
        ),
    ] = None
    round_to: Annotated[RoundTo, ROUND_TO] = "auto"
    min_width: Annotated[int, option("No group gets narrower; with 0 layers may vanish.", ge=0)] = 1

    def __post_init__(self) -> None:
        from morphgraph.passes.analysis.cost import parse_cost, require_budget, spelling

        require_budget(self.budget or None)
        budget = {spelling(parse_cost(unit)): amount for unit, amount in self.budget.items()}
        object.__setattr__(self, "budget", budget)
        if self.cost is not None:
            object.__setattr__(self, "cost", spelling(parse_cost(self.cost)))
        if self.iterations < 1:
            raise ArgumentError(f"iterations={self.iterations}: give a number from 1")
        if not 0 < self.shrink_to <= 1:
            raise ArgumentError(f"shrink_to={self.shrink_to}: give a share above 0, at most 1")
        if self.max_growth is not None and not self.max_growth >= 1:
            raise ArgumentError(f"max_growth={self.max_growth}: give a number from 1")

    @property
    def regularized(self) -> str:
        """The cost that the regularizer counts."""
        return self.cost or next(iter(self.budget))

    @property
    def limits(self) -> "WidthBounds":
        """Grid and floor of the widths."""
        from morphgraph.passes.planning.bounds import WidthBounds

        return WidthBounds(self.round_to, self.min_width)

    def check(self, graph: "ChannelGraph") -> None:
        """Refuse before anything is trained what no training could reach.

        Raises:
            ArgumentError: an amount is none, or a cost is unknown.
            BudgetError: the narrowest network is above a budget.
        """
        from morphgraph.passes.analysis.cost import cost as cost_of
        from morphgraph.passes.planning.constraints import require_reachable, resolve_budget
        from morphgraph.passes.planning.finer import within_reach

        cost_of(graph, self.regularized)
        constraints = resolve_budget(graph, self.budget, "default")
        require_reachable(constraints, within_reach(graph, self.limits, constraints))

    def request(self) -> dict[str, Any]:
        """What a plan says it was made for."""
        names = ("iterations", "shrink_to", "strength", "update", "relative", "round_to")
        return {
            "morph": {unit: str(amount) for unit, amount in self.budget.items()},
            "cost": self.regularized,
            **{name: getattr(self, name) for name in (*names, "min_width", "max_growth")},
        }
