"""Budgets as numbers: what costs must not exceed, and whether any network meets that."""

import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.errors import ArgumentError, BudgetError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.along import WidthsAlong, along
from morphgraph.passes.analysis.cost import Convention, cost, require_budget
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.passes.planning.bounds import AllowedWidths

Budget = Mapping[str, str | float | int]
"""Per cost an amount or a share.

Costs are spelled as :func:`~morphgraph.passes.analysis.cost.cost` takes them.
"""

_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[a-z]*)\s*", re.IGNORECASE)
# By suffix a factor, and the unit where it is more than a multiple.
_MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_SCALES = _MULTIPLES | _BYTES | _MILLISECONDS
_MEASURES = dict.fromkeys(_BYTES, "bytes") | dict.fromkeys(_MILLISECONDS, "ms")


def parse_amount(text: str | float | int, present: float, unit_of_cost: str) -> float:
    """A budget as a number: absolute (``"300M"``, ``"5ms"``, ``2e6``) or a share (``"50%"``).

    Args:
        text: the amount; a suffix of time or memory fits costs in ``"ms"`` or ``"bytes"`` alone.
        present: what ``"100%"`` stands for.
        unit_of_cost: of ``present`` and of the result, as
            :class:`~morphgraph.passes.analysis.polynomial.Cost` names it.

    >>> parse_amount("50%", 80.0, "FLOPs"), parse_amount("300M", 1.0, "FLOPs")
    (40.0, 300000000.0)

    Raises:
        ArgumentError: it is no amount, or one of something else.
    """
    match = _AMOUNT.fullmatch(str(text))
    unit = match.group(2).lower() if match else "?"
    if match is None or (unit != "%" and unit not in _SCALES):
        raise ArgumentError(
            f"budget '{escape(str(text))}' is no amount; write 50%, 300M, 2e6 or 5ms"
        )
    number = float(match.group(1))
    if not math.isfinite(number) or _MEASURES.get(unit, unit_of_cost) != unit_of_cost:
        raise ArgumentError(
            f"budget '{escape(str(text))}' is no amount of {unit_of_cost}; write 50%, or a number"
        )
    return number / 100 * present if unit == "%" else number * _SCALES[unit]


@dataclass(frozen=True, slots=True)
class Constraint:
    """A budget: a cost, and the amount that it must not exceed."""

    cost: Cost
    limit: float

    @property
    def kind(self) -> str:
        """The cost, as budgets spell it."""
        return self.cost.kind

    def holds(self, widths: FloatArray | IntArray) -> bool:
        """Whether a network with these group widths, ``[groups]``, is within the budget."""
        return self.cost.at(widths) <= self.limit


def resolve_budget(graph: ChannelGraph, budget: Budget, convention: Convention) -> list[Constraint]:
    """Budgets as absolute amounts; shares are of the present cost.

    Raises:
        ArgumentError: no such cost, no amount, or a share of a cost of which the network has none.
    """
    require_budget(budget)
    costs = [(cost(graph, kind, convention=convention), text) for kind, text in budget.items()]
    for resource, text in costs:
        share = str(text).strip().removesuffix("%")
        if resource.total == 0 and share != str(text).strip() and share != "100":
            raise ArgumentError(
                f"budget {resource.kind}={escape(str(text))}: the network has no {resource.unit} "
                "of which that could be a share; give a budget on another cost"
            )
    return [Constraint(c, parse_amount(text, c.total, c.unit)) for c, text in costs]


def require_reachable(constraints: Sequence[Constraint], allowed: AllowedWidths) -> None:
    """Refuse a budget that the narrowest network within the bounds does not meet.

    Raises:
        BudgetError: names the budget, and the lowest that can be met.
    """
    if not fits(constraints, lowest := allowed.lowest()):
        raise unreachable(constraints, lowest, allowed)


def fits(constraints: Sequence[Constraint], widths: FloatArray | IntArray) -> bool:
    """Whether a network with these group widths is within all budgets."""
    return all(constraint.holds(widths) for constraint in constraints)


def fits_along(constraints: Sequence[Constraint], state: WidthsAlong) -> bool:
    """The same at widths that change step by step; the state follows the costs of all budgets."""
    return all(state[each.cost].holds(each.limit) for each in constraints)


def spend_rest(
    constraints: Sequence[Constraint],
    widths: IntArray,
    proportions: IntArray,
    ceilings: IntArray,
    allowed: AllowedWidths,
) -> IntArray:
    """Widths that use what rounding left of the budgets, one grid step of one group at a time.

    First is the group that rounding took most from: the narrowest for its proportion. In the end no
    single step of any group fits. Costs grow with every width, so a step that does not fit never
    will.

    Args:
        constraints: budgets that ``widths`` meet.
        widths: where to begin, ``[groups]``. A group of width 0 is left at 0.
        proportions: the widths are a multiple of these, but for the rounding, ``[groups]``.
        ceilings: the widest that every group may get, ``[groups]``.
        allowed: the grids, and which groups grow together; a group whose ceiling is off its grid
            may end there.
    """
    may_grow = (widths > 0) & (widths < ceilings)
    state = WidthsAlong([constraint.cost for constraint in constraints], widths)
    # Groups of one block have one width or one ratio, and are at their ceilings together: its
    # first stands for all.
    growing = {block[0]: list(block) for block in allowed.blocks if may_grow[list(block)].all()}
    narrowest = [(widths[first] / proportions[first], first) for first in growing]
    heapq.heapify(narrowest)
    while narrowest:
        _, first = heapq.heappop(narrowest)
        block = growing[first]
        before = state.widths[block].astype(int).tolist()
        above = zip(block, before, strict=True)
        wide = [min(int(ceilings[k]), allowed.grids[k].above(width)) for k, width in above]
        wider = wide[block.index(first)]
        state.move(block, wide)
        if not fits_along(constraints, state):
            state.move(block, before)
        elif wider < ceilings[first]:
            heapq.heappush(narrowest, (wider / proportions[first], first))
    return state.widths.astype(np.int64)


def all_pinned(graph: ChannelGraph) -> str:
    """The reasons why nothing can shrink; empty where something can."""
    if any(group.resizable for group in graph.groups):
        return ""
    reasons = sorted({group.reason or "" for group in graph.groups})
    return f"every group keeps its size ({'; '.join(reasons[:5])})"


_TELLING = 5e-4  # of the whole: less is shown as nothing
_HOLDERS = 3  # groups that an error names
_PERCENT, _LARGE = 100, 1e4  # such an amount of a cost so large was meant as a share


def unreachable(
    constraints: Sequence[Constraint],
    lowest: FloatArray | IntArray,
    allowed: AllowedWidths,
    remedy: str = "raise the budget, lower min-width or round-to, or exclude less",
) -> BudgetError:
    """The error that says which budget the lowest widths do not meet, what they need, and why."""
    violated = next(constraint for constraint in constraints if not constraint.holds(lowest))
    least, resource = violated.cost.at(lowest), violated.cost
    if pinned := all_pinned(allowed.graph):
        remedy = f"{pinned}; see `analyze`"
    elif held := holders(resource, lowest, allowed):
        remedy = f"it is held by {held}; {remedy}"
    elif least > 0:
        timed = resource.unit == "ms"
        left = "every kernel takes some time to begin" if timed else "all are at their least widths"
        remedy = f"no group holds it: {left}; raise the budget, or take layers out (--min-width 0)"
    remedy = meant_share(violated.kind, violated.limit, resource.total) + remedy
    if violated.holds(_lowest_unequal(allowed)):
        remedy = f"only unequal widths meet it: give no `same` (--unequal); {remedy}"
    return BudgetError(
        f"budget {violated.kind}={_digits(violated)} cannot be met: the lowest that can is "
        f"{_digits(violated, least)} {resource.unit} ({least / resource.total:.1%} of the model); "
        f"{remedy}"
    )


def _digits(constraint: Constraint, amount: float | None = None) -> str:
    """An amount, by default the limit, exactly where it is counted, and rounded where measured."""
    shown = constraint.limit if amount is None else amount
    return f"{shown:.4g}" if constraint.cost.unit == "ms" else f"{shown:.12g}"


def meant_share(kind: str, limit: float, total: float) -> str:
    """How to write an amount that was meant as a share, for a message; empty where it was none.

    >>> meant_share("flops", 0.5, 1e9)
    'for a share write flops=50%; '
    """
    if not 0 < limit <= _PERCENT or total < _LARGE:
        return ""
    return f"for a share write {kind}={limit * (100 if limit < 1 else 1):.12g}%; "


def _lowest_unequal(allowed: AllowedWidths) -> IntArray:
    """The narrowest widths if no groups had to get one width together."""
    if not allowed.bounds.same:
        return allowed.graph.widths
    return replace(allowed.bounds, same=()).on(allowed.graph).lowest()


def holders(resource: Cost, lowest: FloatArray | IntArray, allowed: AllowedWidths) -> str:
    """The groups that hold most of what is left, the reasons, and what each would free alone."""
    state, shares = along(resource, lowest), {}
    least, widths = state.at, np.asarray(lowest, dtype=np.float64)
    for index in np.flatnonzero(widths > 1).tolist():
        place = np.array([index])
        state.move(place, np.ones(1))
        shares[index] = (least - state.at) / resource.total
        state.move(place, widths[place])
    largest = sorted(shares, key=lambda index: -shares[index])[:_HOLDERS]
    return ", ".join(
        f"'{escape(allowed.graph.groups[index].name)}' with {shares[index]:.1%} "
        f"({escape(allowed.why_wide(index))})"
        for index in largest
        if shares[index] >= _TELLING
    )


def shown_costs(
    graph: ChannelGraph, constraints: Sequence[Constraint], convention: Convention
) -> list[Cost]:
    """The costs that every plan states, and those of its budgets."""
    always = [cost(graph, kind, convention=convention) for kind in ("flops", "params")]
    budgeted = [constraint.cost for constraint in constraints]
    return list({resource.kind: resource for resource in (*always, *budgeted)}.values())
