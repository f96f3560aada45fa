"""How far one step of the penalty may go: channels that many others would die with are spared."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from morphgraph.train.pace import Pace
from morphgraph.train.regularizer import Regularizer, Shrinkage


def only_as_far(
    regularizer: Regularizer,
    paces: Sequence[Pace],
    step: Shrinkage,
    levels: Sequence[float],
    lived: Tensor,
) -> tuple[Shrinkage, Tensor]:
    """As much of a step of the penalty as takes the costs no further than to these levels.

    Of those that would die the strongest stay, as many as fit: many channels may die at once,
    and the cost would end far below. In the end the others that are dead count among them, those
    first that died last: what the step takes may be too expensive to stay where they are not.
    Returned with the channels that stay, a flag for each.

    Args:
        regularizer: whose step it is.
        paces: of the budgets.
        step: the whole step.
        levels: per budget the share of its cost that is not to be undercut.
        lived: the step at which every channel was last alive, ``[channels]``.
    """

    def excess(strengths: Tensor) -> float:
        """How far the most expensive resource is above its level, at these strengths."""
        live = regularizer.live_widths(strengths)
        return max(
            regularizer.needed_at(pace.counted.resource, live) / pace.counted.initial - level
            for pace, level in zip(paces, levels, strict=True)
        )

    last = all(pace.target == level for pace, level in zip(paces, levels, strict=True))
    # On the way, what is left just above the threshold counts as dead: the loss may push it.
    margin = regularizer.threshold * (1 if last else 2)
    after = torch.where(step.after > margin, step.after, 0.0)
    spared = torch.zeros_like(step.before, dtype=torch.bool)
    if excess(after) > 0:
        return step, spared
    if last:  # groups that are gone stay so
        live = regularizer.live_widths(after) > 0
        beside = torch.from_numpy(np.append(live, False)[regularizer.graph.channel_group])
        dying = ~regularizer.alive(after) & ((step.before > 0) | beside.to(after.device))
    else:
        dying = (step.before > margin) & (after == 0)
    died = torch.nonzero(dying).flatten()
    died = died[lived[died].argsort(descending=True, stable=True)]
    died = died[step.before[died].argsort(descending=True, stable=True)]
    # Bisection: more channels never cost less. `low` can stay, more than `high` cannot.
    low, high = 0, len(died)
    while low < high:
        middle = (low + high + 1) // 2
        if excess(after.index_fill(0, died[:middle], torch.inf)) <= 0:
            low = middle
        else:
            high = middle - 1
    # On the way no cost falls below its level: one more stays.
    spared[died[: low if last else low + 1]] = True
    # In the end cheaper ones may fit where the next strongest does not, nor any of its group.
    too_dear: set[int] = set()
    for channel in died[low:].tolist() if last else ():
        group = int(regularizer.graph.channel_group[channel])
        if group not in too_dear:
            spared[channel] = True
            if excess(after.masked_fill(spared, torch.inf)) > 0:
                spared[channel] = False
                too_dear.add(group)
    return regularizer.sparing(step, spared), spared
