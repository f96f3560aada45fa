"""``plan`` and ``apply`` as users call them: by the weights, or by calibration inputs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import msgspec
import onnx_ir as ir

from morphgraph.arrays import FloatArray
from morphgraph.benchmark.meeting import meet
from morphgraph.calibration import ImageOptions, Progress, TextOptions, no_progress
from morphgraph.device.profile import TABLE
from morphgraph.errors import ArgumentError, warn
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import ModelLike, escape
from morphgraph.onnx_io.inputs import Inputs
from morphgraph.options import DATA_SCORES, Allocation, AnyScore, Depth, RoundTo, Score, Start
from morphgraph.passes.analysis.cost import Convention, Device, measured_device, on_device
from morphgraph.passes.lift import lift
from morphgraph.passes.planning import removal_path
from morphgraph.passes.planning.bounds import WidthBounds, Widths
from morphgraph.passes.planning.build import warn_of_price
from morphgraph.passes.planning.constraints import Budget
from morphgraph.passes.planning.outputs import Classes
from morphgraph.passes.planning.same import one_for_all
from morphgraph.passes.planning.ties import Ties
from morphgraph.passes.planning.vocabulary import by_vocabulary
from morphgraph.passes.refit.refit import with_biases
from morphgraph.passes.refit.room import plan_with_room
from morphgraph.plans import Plan
from morphgraph.shrinker import LIMIT, Shrinker
from morphgraph.shrinking import finish
from morphgraph.workflow import apply as apply_plan, resize_and_check, with_weights

if TYPE_CHECKING:
    from morphgraph.workflow import Weights


def plan(
    graph: ChannelGraph,
    budget: Budget,
    *,
    score: AnyScore | FloatArray = "l2",
    data: Any = None,
    round_to: RoundTo = "auto",
    min_width: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    widths: Widths | None = None,
    same: Sequence[str] = (),
    depth: Depth = "keep",
    keep_classes: Classes = (),
    keep_tokens: Classes = (),
    vocabulary: Sequence[int] = (),
    seed: int = 0,
    convention: Convention = "default",
    allocation: Allocation | None = None,
    limit: int | None = LIMIT,
    images: ImageOptions | None = None,
    text: TextOptions | None = None,
    device: Device | None = None,
    measure: bool = False,
    refit: bool = False,
    config: Any = None,
    example: Any = None,
    progress: Progress = no_progress,
) -> Plan:
    """The plan that meets every budget and keeps what the network uses most.

    Args:
        graph: the lifted network.
        budget: per cost (``"flops"``, ``"params"``, ...) an amount or a share of the present cost.
        score: a kind of score: of the weights, or, with ``data``, of what the network computes
            (:func:`morphgraph.data_scores`); or a number per channel, ``[channels]``.
        data: calibration inputs, as :func:`morphgraph.shrink` takes them.
        round_to: widths that change become multiples of this, counted in channels of the tensors
            that layers make and read: any number of heads of size 64 is on a grid of 16. With
            ``"auto"`` of what suits the operators that see them: 16 for convolutions, 8 or 4 for
            narrow ones; finer where a budget cannot be met otherwise. What that leaves of the
            budget is spent. 1 frees all widths.
        min_width: no group gets narrower, counted as ``round_to``; with 0 groups may go as a whole,
            and layers vanish.
        include, exclude: globs over group ids, names and producers.
        widths: widths by hand, per glob a number or a share (``"50%"``, rounded to the grid); of
            several globs that name a group, the last counts. The budget is met by the others.
        same: globs; all groups that one of them names get one width, which the budget chooses.
            Which channels stay is for each group's own scores to say.
        depth: whether whole ``"branches"`` of a residual network (of x + f(x) what computes f), or
            whole ``"blocks"`` of them (an attention with its MLP), may go beside channels.
        keep_classes: what outputs keep, by index: ``[0, 3, 7]``, or ``{"output": [0, 3, 7]}`` where
            there are several outputs (``"output:1"`` names the axis as well). The graph must be
            lifted with ``pin_outputs=False``; what else stands on outputs keeps its size.
        keep_tokens: rows that an embedding keeps, by token id (``{"table": ids}`` where inputs
            number several tables), and with them the tokens of a head tied to it. The graph must be
            lifted with ``pin_rows=False`` (and ``pin_outputs=False`` for a tied head). The new
            id of a token is its place among those that stay, in ascending order.
        vocabulary: ids of the tokens that a language model keeps, in its embedding and in all
            outputs that have the tokens, whether their head is tied to it or not
            (:func:`morphgraph.frequent_tokens`, :func:`morphgraph.token_map`). Lift the graph with
            ``pin_rows=False, pin_outputs=False``.
        seed: of ``score="random"``, and of what is drawn from ``data``.
        convention: of the costs.
        allocation: what scores of different groups are to each other: ``"shares"`` of what is left
            of their group, or, where they are on one scale for the whole network, numbers whose
            ``"sum"`` is to be the least (:mod:`morphgraph.passes.planning.allocate`), as is the
            default for ``score="data"``.
        limit: the most samples that are read of ``data``.
        images: how images in ``data`` become inputs.
        device: on which a latency counts that names none, as of :func:`morphgraph.cost`.
        measure: whether the network of the plan is timed beside the original in the runtime of a
            measured ``device``, and the plan made again, until it takes the time that was asked
            for; what came out is in ``plan.request["measured"]``
            (:mod:`morphgraph.benchmark.meeting`).
        refit: whether ``apply(..., refit=data)`` follows, which gives biases to layers that have
            none: the budgets are met with them. What the budgeted costs are then at most is in
            ``plan.request["refit"]``.
        config: a network of PyTorch that ``graph`` was exported from, and that its own config
            builds (Hugging Face's), or a wrapper around one: then the plan has widths that the
            config says, and that its class computes with. Corresponding groups of repeated blocks
            get one width, as by ``same=["repeated"]``; which others go together is found by
            building the class (:mod:`morphgraph.torch_io.config_ties`).
        example: of ``config`` arguments of the forward, as :func:`morphgraph.export` takes them;
            needed where the model's inputs do not tell them.
        progress: told how far the measurements are.

    Raises:
        ArgumentError: a score of data without ``data``, or ``data`` with another score; no config
            builds ``config``;
            ``measure`` without a latency on a measured device.
        BudgetError: no plan meets the budget; says the lowest that can be met.
        DataError: there are no or too few samples, or they hold NaN.
        ModelError: a weight is NaN, or ``data`` do not fit the model's inputs.
        PlanError: with the widths by hand nothing would be left of the network.
        UnsupportedError: unknown cost, score or amount, a glob that names no group, or groups of
            different widths that are to get the same.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> first = next(group for group in graph.groups if group.resizable)
    >>> made = mg.plan(graph, {"flops": "50%"}, widths={first.id: "75%"})
    >>> int(made.widths(graph)[first.index]) / first.width
    0.75
    """
    require_data(score, data is not None)
    if len(vocabulary):
        if len(keep_classes) or len(keep_tokens):
            raise ArgumentError("vocabulary says what outputs and tables keep; give it alone")
        keep_classes, keep_tokens = by_vocabulary(graph, vocabulary)
    budget = on_device(budget, device)
    bounds = WidthBounds(round_to, min_width, include, exclude, widths or {}, same, depth=depth)
    if config is not None:
        bounds = replace(bounds, same=one_for_all(same))
        bounds = replace(bounds, ties=_ties(graph, bounds, config, example, seed))
    if isinstance(score, str) and score in DATA_SCORES:
        shrinker = Shrinker(
            graph,
            data,
            limit=limit,
            images=images,
            text=text,
            bounds=bounds,
            seed=seed,
            progress=progress,
        )
        make = partial(
            shrinker.plan,
            score=score,
            keep_classes=keep_classes,
            keep_tokens=keep_tokens,
            convention=convention,
            allocation=allocation,
        )
    else:
        make = partial(
            removal_path.plan,
            graph,
            score=cast("Score | FloatArray", score),
            round_to=round_to,
            min_width=min_width,
            include=include,
            exclude=exclude,
            widths=widths,
            same=bounds.same,
            depth=depth,
            ties=bounds.ties,
            keep_classes=keep_classes,
            keep_tokens=keep_tokens,
            seed=seed,
            convention=convention,
            allocation=allocation or "shares",
        )
    made = with_room(graph, make, convention) if refit else make
    if measure:
        return measured_plan(graph, made, budget, seed, progress, refit=refit)
    return made(budget)


def _ties(graph: ChannelGraph, bounds: WidthBounds, net: Any, example: Any, seed: int) -> Ties:
    from morphgraph.torch_io.config_ties import module_ties

    return module_ties(graph, bounds, net, example, seed)


def with_room(
    graph: ChannelGraph, make: Callable[[Budget], Plan], convention: Convention = "default"
) -> Callable[[Budget], Plan]:
    """What makes plans, so that their networks meet a budget after a fit, too."""
    return lambda budget: plan_with_room(graph, budget, make, convention)


def measured_plan(
    graph: ChannelGraph,
    make: Callable[[Budget], Plan],
    budget: Budget,
    seed: int = 0,
    progress: Progress = no_progress,
    *,
    refit: bool = False,
) -> Plan:
    """The plan whose network takes the budget's latency, as measured beside the original.

    Args:
        graph: the lifted network.
        make: makes a plan for a budget.
        budget: with a latency on a measured device.
        seed: of the inputs.
        progress: told of every round.
        refit: whether a fit follows, whose biases are timed as well.

    Raises:
        ArgumentError: the budget has no such latency.
        BudgetError: no plan meets the budget.
    """
    devices = [kind.partition("@")[2] for kind in budget if kind.startswith("latency")]
    profile = next(filter(None, map(measured_device, devices)), None)
    if profile is not None and profile.runtime == TABLE:
        raise ArgumentError(
            f"device '{escape(profile.name)}' is a table of times from elsewhere, and nothing runs "
            "there; measure with a profile that `morphgraph calibrate` has made here"
        )
    if profile is None:
        raise ArgumentError(
            "a plan is measured for a latency on a measured device; write one with `morphgraph "
            "calibrate -o device.json`, and give it as --device device.json (device=...)"
        )
    met = meet(
        graph,
        make,
        partial(_fitted if refit else _resized, graph),
        budget,
        profile,
        seed=seed,
        progress=progress,
    )
    if not met.is_met:
        warn(met.sentence())
    measured = {
        "asked": round(met.asked, 4),
        "share": round(met.measured, 4),
        "milliseconds": round(met.measured * met.original_ms, 4),
        "rounds": len(met.attempts),
        "runtime": profile.runtime,
        "threads": profile.threads,
    }
    return msgspec.structs.replace(met.plan, request={**met.plan.request, "measured": measured})


def _resized(graph: ChannelGraph, plan: Plan) -> ir.Model:
    return resize_and_check(graph, plan, verify=False).model


def _fitted(graph: ChannelGraph, plan: Plan) -> ir.Model:
    return with_biases(graph, plan.keep_channels(graph))


def require_data(score: AnyScore | FloatArray, is_given: bool) -> None:
    """Scores of data need data, and others have no use for them.

    Raises:
        ArgumentError: they do not go together.
    """
    is_needed = isinstance(score, str) and score in DATA_SCORES
    if is_needed and not is_given:
        raise ArgumentError(
            f"score {score} is measured on calibration inputs; give some with --data (data=...)"
        )
    if is_given and not is_needed:
        raise ArgumentError(
            f"calibration inputs go with score {', '.join(DATA_SCORES[:-1])} or {DATA_SCORES[-1]}: "
            "choose one with --score (score=...), or leave the inputs out"
        )


def apply(
    graph: ChannelGraph | ModelLike,
    plan: Plan,
    *,
    weights: "Weights | Start | None" = None,
    refit: Any = None,
    verify: bool = True,
    absorb: bool = False,
    seed: int = 0,
    inputs: Inputs | None = None,
    limit: int | None = LIMIT,
    images: ImageOptions | None = None,
    text: TextOptions | None = None,
    progress: Progress = no_progress,
) -> ir.Model:
    """Resize a model by a plan, and check the result against the masked original.

    Args:
        graph: a lifted model, or a model or path that is lifted here, as it was for the plan; it is
            not changed.
        plan: which channels stay.
        weights: ``"keep"`` (also ``None``): those of the model, of which growth leaves the function
            as it is. ``"fresh"``: newly drawn ones for training from scratch, as
            :func:`morphgraph.fresh` draws them. A trained module or ``state_dict``: the weights and
            running statistics there, by name, instead of those in the model.
        refit: calibration inputs, as :func:`morphgraph.shrink` takes them: the kernels that are
            left are fitted to what the original computes for them, after the check.
        verify: whether to check the result, as :func:`morphgraph.verify` does. Fresh weights are
            drawn after the check: it is made with those of the model.
        absorb: whether removed channels that were constant move into the next bias; what cannot
            move is warned of.
        seed: of the check's inputs, of the kernels that make new channels, and of fresh weights.
        inputs: of the check, instead of random ones (with ``refit``: some of these), as
            :func:`morphgraph.verify` takes them.
        limit: the most samples that are read of ``refit``.
        images: how images in ``refit`` become inputs.
        progress: told how far the refit is.

    Raises:
        ArgumentError: ``absorb`` or ``refit`` with fresh weights, which leave nothing to absorb
            into or to fit, or both.
        DataError: there are no or too few samples, or they hold NaN.
        PlanError: the plan is for another network, nothing would be left of this one, or it adds
            channels, which ``refit`` cannot fit.
        ModelError: ``weights`` lacks a tensor, or has it in another shape; or ``refit`` does not
            fit the model's inputs.
        UnsupportedError: neither ONNX Runtime nor PyTorch runs the model, so that it cannot be
            checked.
        VerificationError: the result is wrong: it computes something else, is refused by ONNX
            Runtime where the original is not, or by ``onnx.checker`` (looked for also without
            ``verify``).
    """
    if not isinstance(graph, ChannelGraph):
        graph = lift(graph, **plan.model.lift.arguments())
    warn_of_price(graph, plan)
    if refit is None:
        return apply_plan(
            graph, plan, weights=weights, verify=verify, absorb=absorb, seed=seed, inputs=inputs
        )
    if weights == "fresh" or absorb:
        raise ArgumentError(
            "fresh weights have nothing that could be fitted; leave out one of the two"
            if weights == "fresh"
            else "a refit moves more into the biases than absorb does; leave absorb out"
        )
    if weights is not None and weights != "keep":
        graph = with_weights(graph, weights)
    shrinker = Shrinker(
        graph, refit, limit=limit, images=images, text=text, seed=seed, progress=progress
    )
    return finish(shrinker, plan, verify=verify, inputs=inputs).model
