"""Pass ``exact``: the widths with the least loss within all budgets, where the choice is small.

Every block of groups takes one of its widths: that is an unknown x of 0 or 1 per width, and losses
add up over them. Costs are sums of functions of few widths each
(:meth:`~morphgraph.passes.analysis.polynomial.Cost.parts`). A function of one width is linear in
its x. One of several widths is a table over their choices: an entry gets an unknown z >= 0, and
along every axis of the table the sum of z over the other axes is x. For x of 0 or 1 this leaves z
the product of the x, so that no product is approximated. Where the largest of several pieces
counts, an unknown is not below any of them. HiGHS solves what is linear in unknowns, some of them
whole numbers.

Tables grow with the product of the choices. Where all widths are too many, only those near what a
greedy search found are looked at; where these are too many as well, the greedy search has the last
word. The limits are numbers of unknowns and branches, not seconds, so that a slow machine gets the
same plan.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.passes.analysis.polynomial import Part
from morphgraph.passes.planning.bounds import AllowedWidths
from morphgraph.passes.planning.constraints import Constraint, fits

if TYPE_CHECKING:
    from highspy import Highs

#: Unknowns of a problem at most, and unknowns times branches: about a quarter of a second.
MOST_UNKNOWNS = 400
MOST_WORK = 10_000
#: Steps away from what a greedy search found, where all widths are too many.
NEAR = (3, 2, 1)
#: Products of widths that a cost is the sum of, at most.
MOST_PRODUCTS = 5000
#: Answers that are above a budget by no more than the solver's tolerance, until it is given up.
MOST_REFUSED = 4

_SCALE = 1e3  # of losses: the solver's tolerances are absolute

Loss = Callable[[int, int], float]
"""What a group, by its index, loses at a width."""


def improved(
    widths: IntArray, loss: Loss, constraints: Sequence[Constraint], allowed: AllowedWidths
) -> IntArray:
    """Widths of all groups that lose less within all budgets, or those given, ``[groups]``.

    They lose least, where there are few to choose from. Groups of width 0 are left at 0, and no
    other one vanishes.

    Args:
        widths: within the budgets, as a greedy search found them.
        loss: of a group at a width; the network loses the sum over its groups.
        constraints: budgets.
        allowed: grids, floors and ceilings.
    """

    def lost(each: IntArray) -> float:
        return sum(loss(index, width) for index, width in enumerate(each.tolist()) if width > 0)

    greedy = lost(widths)
    choices = [_choice(block, allowed) for block in allowed.blocks if widths[list(block)].all()]
    choices = [choice for choice in choices if len(choice.widths) > 1]
    if greedy <= 0 or not 0 < len(choices) <= MOST_UNKNOWNS // 2:
        return widths
    sums = [each for c in constraints if (each := c.cost.parts(widths, MOST_PRODUCTS)) is not None]
    few = _few(choices, widths, list(chain.from_iterable(sums)))
    if len(sums) < len(constraints) or few is None:
        return widths
    program = _Program(few, widths)
    for constraint, parts in zip(constraints, sums, strict=True):
        program.within(constraint, parts)
    losses = [
        sum(loss(k, width) for k, width in zip(choice.groups, row, strict=True))
        for choice in few
        for row in choice.widths.tolist()
    ]
    for _ in range(MOST_REFUSED):
        chosen = program.solve(np.array(losses) / greedy * _SCALE)
        if chosen is None:
            break
        better = widths.copy()
        for choice, row in zip(few, chosen, strict=True):
            better[list(choice.groups)] = choice.widths[row]
        if lost(better) >= greedy * (1 - 1e-9):
            break
        if fits(constraints, better):
            return better
        program.refuse(chosen)
    return widths


@dataclass(frozen=True, eq=False)
class _Choice:
    """The widths that a block of groups may take, ``[choices, groups of the block]``."""

    groups: tuple[int, ...]
    widths: IntArray

    def near(self, widths: IntArray, steps: int) -> "_Choice":
        """Those that are so many steps from given widths of all groups at most."""
        distance = np.abs(self.widths - widths[list(self.groups)]).sum(axis=1)
        place = int(np.argmin(distance))
        return _Choice(self.groups, self.widths[max(0, place - steps) : place + steps + 1])


def _choice(block: tuple[int, ...], allowed: AllowedWidths) -> _Choice:
    """All widths of a block from its ceiling down to its floor, but for 0."""
    rows = [[int(allowed.ceilings[k]) for k in block]]
    while True:
        below = [allowed.below(k, width) for k, width in zip(block, rows[-1], strict=True)]
        if below == rows[-1] or 0 in below:
            return _Choice(block, np.array(rows))
        rows.append(below)


def _few(
    choices: Sequence[_Choice], widths: IntArray, parts: Iterable[Part]
) -> list[_Choice] | None:
    """All choices, or those near given widths, that few enough unknowns stand for."""
    number_of = _numbers(choices)
    scopes = {_scope(part, number_of) for part in parts}
    for near in (max(len(choice.widths) for choice in choices), *NEAR):
        chosen = [choice.near(widths, near) for choice in choices]
        counts = [len(choice.widths) for choice in chosen]
        tables = (prod(counts[number] for number in scope) for scope in scopes if len(scope) > 1)
        if sum(counts) + sum(tables) <= MOST_UNKNOWNS:
            return chosen
    return None


def _numbers(choices: Sequence[_Choice]) -> dict[int, int]:
    """By group the number of its choice."""
    return {group: k for k, choice in enumerate(choices) for group in choice.groups}


def _scope(part: Part, number_of: Mapping[int, int]) -> tuple[int, ...]:
    """The numbers of the choices that a part depends on."""
    return tuple(sorted({number_of[group] for group in part.groups if group in number_of}))


@dataclass
class _Sum:
    """Unknowns times values, and a constant."""

    columns: list[IntArray] = field(default_factory=list)
    values: list[FloatArray] = field(default_factory=list)
    constant: float = 0.0

    def terms(self) -> tuple[IntArray, FloatArray]:
        none = np.zeros(0, dtype=np.int64), np.zeros(0)
        return np.concatenate([none[0], *self.columns]), np.concatenate([none[1], *self.values])


class _Program:
    """What HiGHS solves: unknowns, and rows that are linear in them."""

    def __init__(self, choices: Sequence[_Choice], widths: IntArray) -> None:
        self.choices, self.widths = choices, widths
        counts = [len(choice.widths) for choice in choices]
        self.first = [0, *accumulate(counts)]  # of a choice's unknowns
        self.number_of = _numbers(choices)
        self.unknowns = self.first[-1]
        self.rows: list[tuple[IntArray, FloatArray, float, float]] = []
        self.tables: dict[tuple[int, ...], IntArray] = {}
        for number, count in enumerate(counts):
            self._row(self._of(number), np.ones(count), 1.0, 1.0)

    def within(self, constraint: Constraint, parts: Sequence[Part]) -> None:
        """The rows of a budget, whose cost is the sum of these parts."""
        limit = max(constraint.limit, 1e-30)
        blocks: dict[int, dict[int, list[Part]]] = {}
        for part in parts:
            block = blocks.setdefault(constraint.cost.block_of_piece[part.piece], {})
            block.setdefault(part.piece, []).append(part)
        budget = _Sum()
        for block in blocks.values():
            pieces = [self._sum(piece, limit) for piece in block.values()]
            if len(pieces) > 1:
                largest = _Sum([self._more(1)], [np.ones(1)])
                for each in pieces:
                    below = _Sum([*each.columns, *largest.columns], [*each.values, -np.ones(1)])
                    self._row(*below.terms(), -np.inf, -each.constant)
                pieces = [largest]
            for each in pieces:
                budget.columns += each.columns
                budget.values += each.values
                budget.constant += each.constant
        self._row(*budget.terms(), -np.inf, 1.0 - budget.constant)

    def refuse(self, chosen: Sequence[int]) -> None:
        """An answer that is not to come again."""
        columns = np.array([self.first[k] + row for k, row in enumerate(chosen)])
        self._row(columns, np.ones(len(columns)), -np.inf, len(columns) - 1.0)

    def solve(self, losses: FloatArray) -> list[int] | None:
        """Per choice the place of the width that it takes; ``None``: no answer was found."""
        from highspy import HighsLp, HighsStatus, HighsVarType, MatrixFormat, SolutionStatus

        lp, kinds = HighsLp(), HighsVarType
        lp.num_col_, lp.num_row_ = self.unknowns, len(self.rows)
        lp.col_cost_ = np.concatenate([losses, np.zeros(self.unknowns - self.first[-1])])
        lp.col_lower_, lp.col_upper_ = np.zeros(self.unknowns), np.full(self.unknowns, np.inf)
        lp.integrality_ = [
            kinds.kInteger if k < self.first[-1] else kinds.kContinuous
            for k in range(self.unknowns)
        ]
        lp.row_lower_, lp.row_upper_ = (np.array([row[k] for row in self.rows]) for k in (2, 3))
        lp.a_matrix_.format_ = MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0, *(len(columns) for columns, *_ in self.rows)])
        lp.a_matrix_.index_ = np.concatenate([columns for columns, *_ in self.rows])
        lp.a_matrix_.value_ = np.concatenate([values for _, values, *_ in self.rows])
        solver = _silent()
        solver.setOptionValue("mip_rel_gap", 0.0)
        solver.setOptionValue("mip_max_nodes", MOST_WORK // self.unknowns)
        solver.setOptionValue("parallel", "off")
        solver.passModel(lp)
        # It keeps threads for the next problem, which a process that is forked would wait for:
        # none but the caller's, unless somebody else has asked for others before.
        solver.setOptionValue("threads", 1)
        if solver.run() == HighsStatus.kError:
            solver.setOptionValue("threads", 0)
            solver.run()
        if solver.getInfo().primal_solution_status != SolutionStatus.kSolutionStatusFeasible:
            return None
        found = np.array(solver.getSolution().col_value)
        return [int(np.argmax(found[self._of(k)])) for k in range(len(self.choices))]

    def _of(self, number: int) -> IntArray:
        """The unknowns of a choice."""
        return np.arange(self.first[number], self.first[number + 1])

    def _row(self, columns: IntArray, values: FloatArray, low: float, high: float) -> None:
        self.rows.append((columns, values, low, high))

    def _more(self, count: int) -> IntArray:
        self.unknowns += count
        return np.arange(self.unknowns - count, self.unknowns)

    def _sum(self, piece: Iterable[Part], limit: float) -> "_Sum":
        """A piece as a share of a limit."""
        amounts: dict[tuple[int, ...], FloatArray] = {}
        for part in piece:
            scope = _scope(part, self.number_of)
            amounts[scope] = amounts.get(scope, 0.0) + self._table(part, scope) / limit
        constant = float(amounts.pop((), np.zeros(1))[0])
        columns = [self._unknowns(scope) for scope in amounts]
        return _Sum(columns, list(amounts.values()), constant)

    def _table(self, part: Part, scope: tuple[int, ...]) -> FloatArray:
        """The amounts of a part at all choices of a scope, the last axis fastest."""
        counts = [len(self.choices[k].widths) for k in scope]
        places = np.indices(counts).reshape(len(scope), prod(counts))
        widths = np.empty((prod(counts), len(part.groups)))
        for column, group in enumerate(part.groups):
            number = self.number_of.get(group)
            if number is None:
                widths[:, column] = self.widths[group]
            else:
                choice = self.choices[number]
                own = choice.widths[:, choice.groups.index(group)]
                widths[:, column] = own[places[scope.index(number)]]
        return part.at(widths)

    def _unknowns(self, scope: tuple[int, ...]) -> IntArray:
        """The unknowns of a table over a scope, the last axis fastest."""
        if len(scope) == 1:
            return self._of(scope[0])
        if scope not in self.tables:
            counts = [len(self.choices[k].widths) for k in scope]
            self.tables[scope] = entries = self._more(prod(counts))
            for axis, number in enumerate(scope):
                along = np.moveaxis(entries.reshape(counts), axis, 0).reshape(counts[axis], -1)
                for x, row in zip(self._of(number), along, strict=True):
                    self._row(np.append(row, x), np.append(np.ones(len(row)), -1.0), 0.0, 0.0)
        return self.tables[scope]


def _silent() -> "Highs":
    """A solver that writes nothing, also not from its constructor, as that of highspy 1.16 does.

    The constructor enables callbacks: what can be changed there has the library's name, and no
    types (``findings/highspy-header.sh``).
    """
    from highspy import Highs

    class Silent(Highs):
        def enableCallbacks(self) -> None:  # noqa: N802
            self.silent()
            super().enableCallbacks()  # type: ignore[no-untyped-call]

    return Silent()  # type: ignore[no-untyped-call]
