"""Pins and carriers: which classes keep their size, and which factor of a product may change.

Pins spread over shared axes until nothing changes. Then every product with several free factors
chooses one carrier; the others are pinned, and pins spread again. Preferences are properties of
classes, and nested products have been refined to the same factors
(:mod:`morphgraph.passes.coupling.factorize_axes`), so that no channel is tied to two carriers.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping

import numpy as np

from morphgraph.arrays import Flags, IntArray
from morphgraph.graph import Attention, Couplings, Pin
from morphgraph.passes.coupling.factorize_axes import AxisFactor, FactorizedAxes, SharedAxis
from morphgraph.passes.coupling.roles import roles

_LOST = "shares an axis with the factor that shrinks there"
_TWICE = "stands on an axis with itself, as in an outer product"


def choose_carriers(
    couplings: Couplings, found: FactorizedAxes, attention: Attention
) -> Mapping[int, Pin]:
    """The classes that keep their size, each with the reason; of every product one factor is free.

    Args:
        couplings: what the pass ``couple`` found.
        found: its classes and shared axes.
        attention: what an attention shrinks by: heads of keys and values with all query heads that
            share them, query heads within these groups, or the size of every head.
    """
    pins = _Pins(couplings, found)
    eager = _with_factors(found, {int(found.classes[factor]) for factor in couplings.eager})
    reluctant = _with_factors(found, {int(found.classes[factor]) for factor in couplings.reluctant})
    statistics = _statistics(couplings, found)
    repeated = _repeated(couplings, found)
    sharing = _with_factors(found, {int(found.classes[factor]) for factor in couplings.sharing})
    # Where keys are repeated for the queries that share them, the factor that repeats is that one.
    sharing |= repeated & eager
    sizes = couplings.sizes
    chosen = [vertex for vertex, count in couplings.least.items() if count >= sizes[vertex] > 1]
    whole = set(found.classes[chosen].tolist())
    first = sharing if attention == "query-heads" else set[int]()
    if attention == "head-dim":
        eager, reluctant = reluctant, eager
    products = [axis for axis in found.shared_axes if axis.product]
    # An attention decides for all that shares an axis with it, wherever that stands.
    products.sort(key=lambda axis: not any(factor.axis_class in eager for factor in axis.factors))
    carriers: set[int] = set()

    def preference(factor: AxisFactor) -> tuple[bool | int, ...]:
        """The smallest carries: who can, whom attentions want, exact removals, who carries now."""
        return (
            # What is chosen from as a whole cannot shrink: of groups that all compete, experts do.
            factor.axis_class in whole,
            factor.axis_class not in first,
            factor.axis_class not in eager,
            factor.axis_class in reluctant,
            factor.axis_class in repeated,
            # Of two that are normalized over, the one over which fewer norms run: before kernels
            # that are standardized over both, whole groups of a GroupNorm.
            statistics[factor.axis_class],
            factor.axis_class not in carriers,
            factor.rank,
        )

    for axis in products:
        classes = [factor.axis_class for factor in axis.factors]
        free = [factor for factor in axis.factors if factor.axis_class not in pins.reasons]
        # A class that stands on the axis twice, as in an outer product, cannot shrink there.
        candidates = [factor for factor in free if classes.count(factor.axis_class) == 1]
        winner = -1
        if candidates:
            winner = min(candidates, key=preference).axis_class
            carriers.add(winner)
        reason = _LOST if candidates else _TWICE
        pins.add(
            {
                factor.axis_class: Pin(reason, factor.vertex, through=axis.through)
                for factor in free
                if factor.axis_class != winner
            }
        )
    return pins.reasons


def _statistics(couplings: Couplings, found: FactorizedAxes) -> Counter[int]:
    """Over how many axes that a class is a factor of an operator normalizes or competes.

    Its removal changes what the others become. The other factor of a product axis is removed
    exactly: of a GroupNorm's channels whole groups go.
    """
    factors = np.flatnonzero(roles(couplings).normalizes)
    counted: Counter[int] = Counter()
    for axis_class in set(found.classes[factors].tolist()):
        counted.update(_with_factors(found, {axis_class}))
    return counted


def _with_factors(found: FactorizedAxes, marked: set[int]) -> set[int]:
    """Classes with the factors of their products: a factor of attention heads is heads, too."""
    reached, pending = set(marked), list(marked)
    while pending:
        for factor in found.factors_of_products.get(pending.pop(), ()):
            if factor not in reached:
                reached.add(factor)
                pending.append(factor)
    return reached


def _repeated(couplings: Couplings, found: FactorizedAxes) -> set[int]:
    """Classes of factors that stand on no operand: an axis that Expand repeats has no producer."""
    role = roles(couplings)
    nowhere = (role.on_results > 0) & (role.on_activations + role.on_weights == 0)
    return set(found.classes[np.flatnonzero(nowhere)].tolist())


class _Pins:
    """The classes that keep their size, each with the reason; pins spread over the shared axes.

    Segments carry them position by position: an axis all of whose factors are pinned, by whichever
    operators, is pinned, and so is a factor all of whose positions are.
    """

    def __init__(self, couplings: Couplings, found: FactorizedAxes) -> None:
        self.reasons: dict[int, Pin] = {}
        self._sizes = found.sizes
        self._partly: dict[int, tuple[Flags, Pin]] = {}
        self._touching: dict[int, list[SharedAxis]] = defaultdict(list)
        for axis in found.shared_axes:
            for axis_class in {axis.axis_class, *(factor.axis_class for factor in axis.factors)}:
                self._touching[axis_class].append(axis)
        direct: dict[int, Pin] = {}
        for vertex, reason in couplings.pins.items():
            axis_class = int(found.classes[vertex])
            if axis_class not in direct or reason.startswith("graph "):
                direct[axis_class] = Pin(reason, vertex)
        self.add(direct)

    def add(self, reasons: Mapping[int, Pin]) -> None:
        """Pin classes, and all that keeps its size with them.

        Pins spread step by step, so that the nearest reason comes first; of those equally near that
        of the graph's inputs and outputs, then that of the most positions. An axis of size 1 says
        least.
        """
        self.reasons.update(reasons)
        self._pending = deque(
            sorted(
                reasons,
                key=lambda axis_class: (
                    not reasons[axis_class].reason.startswith("graph "),
                    -self._sizes[axis_class],
                ),
            )
        )
        while self._pending:
            for axis in self._touching[self._pending.popleft()]:
                if axis.product:
                    self._over_product(axis)
                else:
                    self._over_segments(axis)

    def _over_product(self, axis: SharedAxis) -> None:
        if axis.axis_class in self.reasons:
            for factor in axis.factors:
                self._pin(factor.axis_class, self._down(axis, factor))
        elif all(factor.axis_class in self.reasons for factor in axis.factors):
            self._pin(axis.axis_class, self._up(axis, axis.factors[0]))

    def _over_segments(self, axis: SharedAxis) -> None:
        for factor in axis.factors:
            if factor.axis_class in self.reasons and axis.axis_class in self.reasons:
                continue
            elements, positions = factor.pairs()
            for here, there, source, target, pin in (
                (factor.axis_class, axis.axis_class, elements, positions, self._up(axis, factor)),
                (axis.axis_class, factor.axis_class, positions, elements, self._down(axis, factor)),
            ):
                if here in self.reasons:
                    self._mark(there, target, pin)
                elif here in self._partly:
                    self._mark(there, target[self._partly[here][0][source]], pin)

    def _up(self, axis: SharedAxis, factor: AxisFactor) -> Pin:
        """The pin of an axis that comes from a factor on it."""
        source = factor.axis_class
        return Pin(self._reason(source), axis.dim, source, factor.vertex, axis.through)

    def _down(self, axis: SharedAxis, factor: AxisFactor) -> Pin:
        """The pin of a factor that comes from the axis that it stands on."""
        source = axis.axis_class
        return Pin(self._reason(source), factor.vertex, source, axis.dim, axis.through)

    def _reason(self, axis_class: int) -> str:
        pin = self.reasons.get(axis_class) or self._partly.get(axis_class, (None, None))[1]
        return "" if pin is None else pin.reason

    def _mark(self, axis_class: int, positions: IntArray, pin: Pin) -> None:
        """Pin some positions of a class; once all are pinned, the class is."""
        if axis_class in self.reasons:
            return
        nothing = np.zeros(self._sizes[axis_class], dtype=bool)
        pinned, first = self._partly.setdefault(axis_class, (nothing, pin))
        if pinned[positions].all():
            return
        pinned[positions] = True
        self._pending.append(axis_class)
        if pinned.all():
            self._pin(axis_class, first)

    def _pin(self, axis_class: int, pin: Pin) -> None:
        if axis_class not in self.reasons:
            self.reasons[axis_class] = pin
            self._pending.append(axis_class)
