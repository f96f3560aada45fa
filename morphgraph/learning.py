"""``morph`` as users call it: from a new network, or from a trained one; and families of networks.

From a trained network the weights are kept throughout (:mod:`morphgraph.trained`), and what was
resized is fine-tuned with its original as a teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from morphgraph.calibration import Samples
from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph
from morphgraph.options import RoundTo, Start, Strength, Update
from morphgraph.passes.planning.nested import Ranking, falling
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.torch_io.weights import with_weights
from morphgraph.train import loop
from morphgraph.train.config import SHRINK_TO, SearchConfig
from morphgraph.train.lifted import lift_to_train
from morphgraph.train.loop import Fit, MorphResult
from morphgraph.train.phases import run_fit
from morphgraph.trained import DISTILL, Ranked, Shrinking, Trained


@dataclass(frozen=True)
class Family:
    """Networks for several budgets from one trained network, each a part of the larger ones.

    Attributes:
        graph: the original, lifted.
        members: the networks, fine-tuned, from the largest to the smallest; their ``iterations``
            are empty.
        ranking: the order in which channels leave, from which plans for other budgets follow.
    """

    graph: ChannelGraph
    members: tuple[MorphResult, ...]
    ranking: Ranking


def family(
    net: nn.Module,
    example: Any,
    fit: Fit,
    *,
    budgets: Sequence[Mapping[str, str | float | int]],
    data: Any = None,
    rank: Ranked = "data",
    refit: bool | None = None,
    distill: float = DISTILL,
    inside: float = 0.0,
    cost: str | None = None,
    steps: int | None = None,
    strength: Strength = "auto",
    round_to: RoundTo = "auto",
    min_width: int = 1,
    absorb: bool = False,
    update: Update = "proximal",
    relative: bool | None = None,
    seed: int = 0,
) -> Family:
    """Shrink a trained network to several budgets, and fine-tune each of the smaller networks.

    Args:
        net: the trained network. A learned ranking trains it in place; otherwise it is not changed.
        example: inputs for the export; ``fit`` may train on batches of other sizes.
        fit: as for :func:`morph`: it trains a network for one phase, at a rate that suits a
            fine-tuning. It is called once for a learned ranking, and once for each budget.
            ``penalty.carry(optimizer)``, once the optimizer is made, gives it the state of the one
            before the resize; ``loss + penalty.loss()`` learns from the original.
        budgets: on the same costs.
        data: calibration inputs without labels, as :func:`morphgraph.shrink` takes them.
        rank, distill, inside: see :class:`Trained`.
        refit: whether what is left is fitted to ``data`` after the resize; by default where there
            are any.
        cost, strength, update, relative: of the regularizer, where the ranking is learned.
        steps, round_to, min_width, absorb, seed: as for :func:`morph`.

    Raises:
        ArgumentError: an argument makes no sense, or ``data`` are missing.
        BudgetError: a budget cannot be met.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> def fit(net, penalty):
    ...     optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    ...     penalty.carry(optimizer)
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         (net.train()(image(2)).square().mean() + penalty.loss()).backward()
    ...         optimizer.step()
    ...         penalty.step(lr=0.01 / (1 - 0.9))
    >>> budgets = [{"flops": "70%"}, {"flops": "40%"}]
    >>> made = mg.family(residual_cnn(), (image(2),), fit, budgets=budgets, data=[image(64)])
    >>> large, small = (member.plan.widths(made.graph) for member in made.members)
    >>> bool((small <= large).all())
    True
    """
    graph = lift_to_train(net, example)
    ordered = tuple(falling(graph, budgets))
    aim = SearchConfig(
        ordered[-1],
        cost=cost,
        strength=strength,
        round_to=round_to,
        min_width=min_width,
        absorb=absorb,
        update=update,
        relative=relative,
    )
    settings = Trained(
        aim,
        ordered,
        rank,
        data is not None if refit is None else refit,
        distill,
        inside,
    )
    samples = None
    if data is not None:
        samples = data if isinstance(data, Samples) else Samples.of(data, graph.model, seed=seed)
    shrinking = Shrinking(graph, net, settings, samples, steps, seed)
    shrinking.learn(fit)
    device = next(net.parameters()).device
    results = []
    for member in shrinking.members():
        small = to_torch(member.model).to(device)
        penalty = shrinking.tuning(member, small)
        run_fit(fit, small, penalty)
        penalty.end()
        model = with_weights(member.model, small)
        results.append(MorphResult(graph, member.plan, model, small, ()))
    ranking = Ranking.of(graph, [result.plan for result in results])
    return Family(graph, tuple(results), ranking)


def morph(
    net: nn.Module,
    example: Any,
    fit: Fit,
    *,
    budget: Mapping[str, str | float | int],
    iterations: int = 1,
    cost: str | None = None,
    steps: int | None = None,
    shrink_to: float = SHRINK_TO,
    strength: Strength = "auto",
    round_to: RoundTo = "auto",
    min_width: int = 1,
    max_growth: float | None = None,
    weights: Start = "keep",
    absorb: bool = False,
    update: Update = "proximal",
    relative: bool | None = None,
    seed: int = 0,
    start: Literal["new", "trained"] = "new",
    data: Any = None,
    rank: Ranked = "data",
    refit: bool | None = None,
    distill: float = DISTILL,
    inside: float = 0.0,
) -> MorphResult:
    """Learn a structure within a budget, resize the network to it, and train it again.

    Each iteration shrinks the network while it trains, and multiplies the widths that are left by
    one factor so that the budget is used. A budget of 100 % gives a better network of the same
    cost.

    Args:
        net: the seed network; it is trained in place by the first phase. From a trained network
            with a ranking by data it is not changed.
        example: inputs for the export; ``fit`` may train on batches of other sizes.
        fit: ``fit(net, penalty)`` trains a network for one phase, on any data with any loss. It
            calls ``penalty.begin(steps)`` first, to say how many optimizer steps it takes, and
            ``penalty.attach(optimizer)``, or ``penalty.step()`` after each of them. It makes its
            own optimizer each time: after a resize the old one's state has the wrong sizes.
        budget: ``{"flops": "50%"}``; per cost an amount or a share.
        iterations: how often to shrink and expand before the last training.
        cost: what the regularizer counts; the first of the budget's costs if not given.
        steps: optimizer steps of a phase, for a ``fit`` that does not call ``penalty.begin``; 1000
            are assumed without either.
        shrink_to, strength, round_to, min_width, max_growth, weights, absorb, update, relative: see
            :class:`~morphgraph.train.config.SearchConfig`; with ``update="subgradient"`` ``fit``
            adds ``penalty.loss()`` to the loss.
        seed: of the inputs of checks, and of new weights.
        start: ``"trained"`` keeps the weights of ``net`` throughout: its channels are ranked by
            ``data`` (``rank="learned"``: by a phase with the regularizer, at the budget itself),
            the network is resized, fitted to ``data`` and fine-tuned by ``fit``, with the original
            as a teacher where ``fit`` adds ``penalty.loss()`` to its loss. ``iterations``,
            ``shrink_to``, ``max_growth`` and ``weights`` are of ``"new"`` alone.
        data, rank, refit, distill, inside: from a trained network, as for :func:`family`.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> def fit(net, penalty):
    ...     optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    ...     penalty.begin(80)
    ...     penalty.attach(optimizer)
    ...     for _ in range(80):
    ...         optimizer.zero_grad()
    ...         net(image(2)).square().mean().backward()
    ...         optimizer.step()
    >>> result = mg.morph(residual_cnn(), (image(2),), fit, budget={"flops": "50%"})
    >>> mg.cost(mg.lift(result.model), "flops").total <= 0.5 * mg.cost(result.graph, "flops").total
    True

    Raises:
        ArgumentError: an argument makes no sense.
        BudgetError: the budget cannot be met.
    """
    regularizing: dict[str, Any] = {
        "cost": cost,
        "steps": steps,
        "strength": strength,
        "round_to": round_to,
        "min_width": min_width,
        "absorb": absorb,
        "update": update,
        "relative": relative,
        "seed": seed,
    }
    if start == "new":
        return loop.morph(
            net,
            example,
            fit,
            budget=budget,
            iterations=iterations,
            shrink_to=shrink_to,
            max_growth=max_growth,
            weights=weights,
            **regularizing,
        )
    if start != "trained":
        raise ArgumentError(f"start={start!r} is unknown; use 'new' or 'trained'")
    given = {
        "iterations": iterations != 1,
        "max_growth": max_growth is not None,
        "weights": weights != "keep",
        "shrink_to": shrink_to != SHRINK_TO,
    }
    if any(given.values()):
        name = next(name for name, is_given in given.items() if is_given)
        raise ArgumentError(f"{name} goes with start='new'; a trained network keeps its weights")
    made = family(
        net,
        example,
        fit,
        budgets=[budget],
        data=data,
        rank=rank,
        refit=refit,
        distill=distill,
        inside=inside,
        **regularizing,
    )
    return made.members[0]
