"""What whole branches and blocks save, and what it loses without data to let them go.

Of a branch without calibration inputs nothing is known but the scores of the channels inside it.
It is priced in the unit of the removal path, in which a group that is left with the share ``f`` of
its scores has lost ``share * (1 / f - 1)``: an average branch loses as if a quarter of it were
left, a weaker or stronger one in proportion to its scores beside those of branches of its kind::

    loss(branch)  =  3 * saved(branch) * scores(branch) / mean scores(branches of its kind)

with ``saved`` the relative cost that goes with it in the original network.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.along import WidthsAlong
from morphgraph.passes.analysis.branches import Branch
from morphgraph.passes.analysis.polynomial import Cost

#: What an average branch loses, in units of what it saves: as much as three quarters of channels.
AVERAGE = 3.0


def weigh(graph: ChannelGraph, parts: Sequence[Branch], scores: FloatArray) -> FloatArray:
    """How much scores say of each part beside others of its kind, ``[parts]``; 1 is the mean.

    A block weighs what its branches do, each in proportion.
    """
    single = {branch.groups: branch for part in parts for branch in (part.parts or (part,))}
    means = {key: _mean(graph, key, scores) for key in single}
    of_kind: dict[int, list[float]] = {}
    for key, branch in single.items():
        of_kind.setdefault(branch.kind, []).append(means[key])
    average = {kind: float(np.mean(numbers)) for kind, numbers in of_kind.items()}
    weights = {
        key: means[key] / average[branch.kind] if average[branch.kind] > 0 else 1.0
        for key, branch in single.items()
    }
    return np.array([np.mean([weights[b.groups] for b in (p.parts or (p,))]) for p in parts])


def _mean(graph: ChannelGraph, groups: Sequence[int], scores: FloatArray) -> float:
    return float(np.mean([scores[graph.groups[k].channels].mean() for k in groups]))


class Parts:
    """Branches and blocks, and what each saves of some costs.

    Args:
        parts: of the network, in its order.
        costs: to be saved.
    """

    def __init__(self, parts: Sequence[Branch], costs: Sequence[Cost]) -> None:
        self.parts = parts
        self.groups = [np.array(part.groups) for part in parts]
        self._costs = costs
        self._gone = {cost: [_gone(cost, part) for part in parts] for cost in costs}

    def saved(self, state: WidthsAlong, number: int, cost: Cost) -> float:
        """What goes of a cost with a part, at the present widths."""
        return state[cost].without(self.groups[number], self._gone[cost][number])


def _gone(cost: Cost, part: Branch) -> IntArray:
    """The terms of a cost that vanish with a part."""
    if not cost.terms:  # of a measured device: it knows at any widths
        return np.zeros(0, dtype=np.int64)
    return cost.gone_with(part.groups)


Losses = Mapping[tuple[int, ...], float]
"""By the groups of a part what the network loses with it."""
