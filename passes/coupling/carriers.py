"""Pins and carriers: which classes keep their size, and which factor of a product may change.

Pins spread over sites until nothing changes. Then every product with several free factors chooses
one carrier; the others are pinned, and pins spread again. Preferences are properties of classes,
and nested products have been refined to the same factors
(:mod:`morphgraph.passes.coupling.factorize_axes`), so that two sites do not tie a channel to two
masters.
"""

from collections import defaultdict, deque
from collections.abc import Mapping

import numpy as np

from morphgraph.arrays import Flags, IntArray
from morphgraph.graph import Attention, Couplings, Pin
from morphgraph.passes.coupling.factorize_axes import AxisFactor, FactorizedAxes, SharedAxis

_LOST = "shares an axis with the factor that shrinks there"
_TWICE = "stands on an axis with itself, as in an outer product"


def choose_carriers(
    couplings: Couplings, found: FactorizedAxes, attention: Attention
) -> Mapping[int, Pin]:
    """The classes that keep their size, each with the reason; of every product one factor is free.

    Args:
        couplings: what the pass ``couple`` found.
        found: its classes and sites.
        attention: whether an attention shrinks by whole heads or by the size of every head.
    """
    pins = _Pins(couplings, found)
    eager = _with_parts(found, {int(found.classes[factor]) for factor in couplings.eager})
    reluctant = _with_parts(found, {int(found.classes[factor]) for factor in couplings.reluctant})
    statistical = _statistical(couplings, found)
    repeats = _repeats(couplings, found)
    if attention == "head-dim":
        eager, reluctant = reluctant, eager
    products = [site for site in found.shared_axes if site.product]
    # An attention decides for all that shares an axis with it, wherever that stands.
    products.sort(key=lambda site: not any(part.axis_class in eager for part in site.factors))
    carriers: set[int] = set()
    for site in products:
        free = [part for part in site.factors if part.axis_class not in pins.reasons]
        kinds = [part.axis_class for part in site.factors]
        candidates = [part for part in free if kinds.count(part.axis_class) == 1]
        winner = -1
        if candidates:
            winner = min(
                candidates,
                key=lambda p: (
                    p.axis_class not in eager,
                    p.axis_class in reluctant,
                    p.axis_class in repeats,
                    p.axis_class in statistical,
                    p.axis_class not in carriers,
                    p.rank,
                ),
            ).axis_class
            carriers.add(winner)
        pins.add(
            {
                part.axis_class: Pin(
                    _LOST if candidates else _TWICE, part.vertex, through=site.through
                )
                for part in free
                if part.axis_class != winner
            }
        )
    return pins.reasons


def _statistical(couplings: Couplings, found: FactorizedAxes) -> set[int]:
    """Classes over which an operator normalizes or competes, and the factors that they consist of.

    Their removal changes what the others become. The other factor of a product axis is removed
    exactly: of a GroupNorm's channels whole groups go.
    """
    factors = {node.factors[name] for node in couplings.ops for name in node.statistical}
    return _with_parts(found, {int(found.classes[factor]) for factor in factors})


def _with_parts(found: FactorizedAxes, marked: set[int]) -> set[int]:
    """Classes with the factors of their products: a part of attention heads is heads, too."""
    parts: dict[int, list[int]] = defaultdict(list)
    for site in found.shared_axes:
        if site.product:
            parts[site.axis_class] += (part.axis_class for part in site.factors)
    reached, pending = set(marked), list(marked)
    while pending:
        for part in parts[pending.pop()]:
            if part not in reached:
                reached.add(part)
                pending.append(part)
    return reached


def _repeats(couplings: Couplings, found: FactorizedAxes) -> set[int]:
    """Classes of factors that stand on no operand: an axis that Expand repeats has no producer."""
    on_operand = {edge.factor for edge in couplings.edges if edge.port >= 0}
    return {int(found.classes[e.factor]) for e in couplings.edges if e.factor not in on_operand}


class _Pins:
    """The classes that keep their size, each with the reason; pins spread over the sites.

    Segments carry them position by position: an axis all of whose parts are pinned, by whichever
    operators, is pinned, and so is a part all of whose positions are.
    """

    def __init__(self, couplings: Couplings, found: FactorizedAxes) -> None:
        self.reasons: dict[int, Pin] = {}
        self._sizes = found.sizes
        self._partly: dict[int, tuple[Flags, Pin]] = {}
        self._touching: dict[int, list[SharedAxis]] = defaultdict(list)
        for site in found.shared_axes:
            for kind in {site.axis_class, *(part.axis_class for part in site.factors)}:
                self._touching[kind].append(site)
        direct: dict[int, Pin] = {}
        for node, reason in couplings.pins.items():
            kind = int(found.classes[node])
            if kind not in direct or reason.startswith("graph "):
                direct[kind] = Pin(reason, node)
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
                key=lambda kind: (
                    not reasons[kind].reason.startswith("graph "),
                    -self._sizes[kind],
                ),
            )
        )
        while self._pending:
            for site in self._touching[self._pending.popleft()]:
                if site.product:
                    self._over_product(site)
                else:
                    self._over_segments(site)

    def _over_product(self, site: SharedAxis) -> None:
        if site.axis_class in self.reasons:
            for part in site.factors:
                self._pin(part.axis_class, self._down(site, part))
        elif all(part.axis_class in self.reasons for part in site.factors):
            self._pin(site.axis_class, self._up(site, site.factors[0]))

    def _over_segments(self, site: SharedAxis) -> None:
        for part in site.factors:
            if part.axis_class in self.reasons and site.axis_class in self.reasons:
                continue
            elements, positions = part.pairs()
            for here, there, source, target, pin in (
                (part.axis_class, site.axis_class, elements, positions, self._up(site, part)),
                (site.axis_class, part.axis_class, positions, elements, self._down(site, part)),
            ):
                if here in self.reasons:
                    self._mark(there, target, pin)
                elif here in self._partly:
                    self._mark(there, target[self._partly[here][0][source]], pin)

    def _up(self, site: SharedAxis, part: AxisFactor) -> Pin:
        """The pin of an axis that comes from a factor on it."""
        return Pin(
            self._reason(part.axis_class), site.dim, part.axis_class, part.vertex, site.through
        )

    def _down(self, site: SharedAxis, part: AxisFactor) -> Pin:
        """The pin of a factor that comes from the axis that it stands on."""
        source = site.axis_class
        return Pin(self._reason(source), part.vertex, source, site.dim, site.through)

    def _reason(self, kind: int) -> str:
        pin = self.reasons.get(kind) or self._partly.get(kind, (None, None))[1]
        return "" if pin is None else pin.reason

    def _mark(self, kind: int, positions: IntArray, pin: Pin) -> None:
        """Pin some positions of a class; once all are pinned, the class is."""
        if kind in self.reasons:
            return
        nothing = np.zeros(self._sizes[kind], dtype=bool)
        pinned, first = self._partly.setdefault(kind, (nothing, pin))
        if pinned[positions].all():
            return
        pinned[positions] = True
        self._pending.append(kind)
        if pinned.all():
            self._pin(kind, first)

    def _pin(self, kind: int, pin: Pin) -> None:
        if kind not in self.reasons:
            self.reasons[kind] = pin
            self._pending.append(kind)
