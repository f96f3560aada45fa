"""Shrinking without training: calibration inputs in, a network that still works out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from msgspec.structs import replace as replace_fields

from morphgraph.arrays import Arrays, FloatArray
from morphgraph.calibration import ImageOptions, Progress, TextOptions, no_progress
from morphgraph.errors import ArgumentError, warn
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import ModelLike, as_model, escape
from morphgraph.onnx_io.fixed import Fixed
from morphgraph.onnx_io.inputs import Inputs
from morphgraph.options import DataScore, Depth, RoundTo
from morphgraph.origin import Origin
from morphgraph.passes.analysis.cost import Convention, is_known_here
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.calibration.outputs import OutputCheck, checks, require_same
from morphgraph.passes.calibration.segments import run_all
from morphgraph.passes.checking.verdict import VerifyReport
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.bounds import WidthBounds, Widths
from morphgraph.passes.planning.constraints import Budget
from morphgraph.passes.refit.refit import LayerError, Refitted
from morphgraph.passes.refit.room import costs_with_biases, warn_beyond
from morphgraph.plans import Change, Plan
from morphgraph.shrinker import LIMIT, CurvePoint, Shrinker
from morphgraph.workflow import resize_and_check

if TYPE_CHECKING:
    from torch import nn

CHECKED = 8
"""Samples that the resize is checked on."""
COSTS = ("macs", "flops", "params")
"""Costs that are told of every result."""


@dataclass(frozen=True)
class Perplexity:
    """Of a language model on held-out inputs, after every step of the work.

    Attributes:
        original: of the network as it was.
        resized: of what is left of it.
        refitted: after the fit; ``None``: there was none.
        tuned: after self-distillation; likewise.
    """

    original: float
    resized: float
    refitted: float | None = None
    tuned: float | None = None


@dataclass(frozen=True)
class ShrinkResult:
    """A shrunk network.

    Attributes:
        model: the network, to be saved, or loaded by ``to_torch``.
        plan: which channels stay.
        error: of every output on held-out inputs.
        before: the same without the refit.
        layers: of every layer that was fitted, on held-out inputs.
        curve: the errors at other budgets, where they were asked for.
        samples: how many inputs it was fitted to, and how many were held out.
        cost: before and after, biases of the fit included: multiply-adds, FLOPs, parameters, and
            what the plan has a budget for (of a latency only where its device is known here).
        tuned: the errors before self-distillation; empty without.
        perplexity: of a language model; ``None`` of others, and where the ids have changed.
        check: of the resize, against the masked original; ``None`` where it was not made.
    """

    model: ir.Model
    plan: Plan
    error: tuple[OutputCheck, ...]
    before: tuple[OutputCheck, ...]
    layers: tuple[LayerError, ...]
    samples: tuple[int, int]
    cost: Mapping[str, Change]
    curve: tuple[CurvePoint, ...] = ()
    tuned: tuple[OutputCheck, ...] = ()
    check: VerifyReport | None = None
    perplexity: Perplexity | None = None


def shrink(
    model: "ChannelGraph | ModelLike | nn.Module",
    data: Any,
    budget: Budget,
    *,
    score: DataScore = "data",
    refit: bool = True,
    tune: int = 0,
    curve: bool = False,
    round_to: RoundTo = "auto",
    min_width: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    widths: Widths | None = None,
    same: Sequence[str] = (),
    depth: Depth = "keep",
    convention: Convention = "default",
    limit: int | None = LIMIT,
    images: ImageOptions | None = None,
    text: TextOptions | None = None,
    verify: bool = True,
    seed: int = 0,
    threads: int = 0,
    fixed: Fixed | None = None,
    progress: Progress = no_progress,
) -> ShrinkResult:
    """Fit a network into a budget without training it: plan, apply and refit, by some inputs.

    No labels are needed, and torch only for a module and for ``tune``. A fifth of the inputs is
    held out, and says what to expect.

    Args:
        model: a lifted model, or a model or path, or a torch module.
        data: calibration inputs: arrays, a dict of them, a file or folder, a DataLoader, any
            iterable of feeds, or text (:meth:`morphgraph.calibration.Samples.of`).
        budget: per cost an amount or a share, as of :func:`morphgraph.plan`.
        score: how channels are ranked and widths chosen, see :func:`data_scores`.
        refit: whether kernels are fitted to what the original computes.
        tune: steps of self-distillation after that (:func:`morphgraph.train.distill.distill`);
            needs torch.
        curve: measure the errors at 90, 80, 70, 60 and 50 % of the first budget's cost, too.
        round_to, min_width, include, exclude, widths, same, depth, convention: as of
            :func:`morphgraph.plan`.
        limit: the most samples that are read.
        images: how images become inputs.
        text: of a language model: the tokenizer of text, and how long its sequences are.
        verify: whether the resize is checked against the masked original before the refit.
        seed: of all that is random.
        threads: of ONNX Runtime; 0 leaves the number to it.
        fixed: by input of a model or file the value that it is fixed to, as of
            :func:`morphgraph.lift`; a graph is lifted with it. Data may hold these inputs as well,
            if they are equal.
        progress: told how far it is.

    Raises:
        BudgetError: no plan meets the budget.
        DataError: there are no or too few samples, or they hold NaN.
        ModelError: data do not fit the model's inputs.
        VerificationError: the result is wrong.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> import numpy as np
    >>> inputs = np.random.default_rng(0).normal(size=(64, *image().shape[1:]))
    >>> result = mg.shrink(residual_cnn(), inputs.astype(np.float32), {"flops": "70%"})
    >>> result.plan.cost["flops"].after <= 0.7 * result.plan.cost["flops"].before
    True
    >>> [output.name for output in result.error] == [o.name for o in result.model.graph.outputs]
    True
    """
    graph = _graph_of(model, data, fixed or {})
    bounds = WidthBounds(round_to, min_width, include, exclude, widths or {}, same, depth=depth)
    shrinker = Shrinker(
        graph,
        data,
        limit=limit,
        images=images,
        text=text,
        bounds=bounds,
        seed=seed,
        threads=threads,
        progress=progress,
    )
    plan = shrinker.plan(budget, score, refit=refit, convention=convention)
    result = finish(shrinker, plan, refit=refit, tune=tune, verify=verify)
    if not curve:
        return result
    kind = next(iter(budget), "flops")
    points = shrinker.curve(kind, score=score, refit=refit, convention=convention)
    return replace(result, curve=points)


def finish(
    shrinker: Shrinker,
    plan: Plan,
    *,
    refit: bool = True,
    tune: int = 0,
    verify: bool = True,
    inputs: Inputs | None = None,
) -> ShrinkResult:
    """Apply a plan, fit what is left, and say how far it is from the original.

    Args:
        shrinker: of the original.
        plan: which channels stay.
        refit, tune, verify: as of :func:`shrink`.
        inputs: of the check against the masked original; the first of those held out, if not given.
    """
    expected = shrinker.expected(plan)
    if inputs is None:
        inputs = next(shrinker.held_out.batches(min(shrinker.batch, CHECKED)))
    resized = resize_and_check(
        shrinker.graph, plan, verify=verify, seed=shrinker.seed, inputs=inputs
    )
    sliced = resized.model
    before = shrinker.errors(sliced, expected, plan)
    model, error = sliced, before
    layers: tuple[LayerError, ...] = ()
    if refit:
        fitted = shrinker.fit(plan)
        model, layers = fitted.model, fitted.layers
        require_same(fitted.found, run_all(model, shrinker.aside(plan), shrinker.threads))
        error = checks(expected, fitted.found)
        _warn_of_few(fitted, shrinker.fitted.count)
        _warn_of_slices(fitted)
    tuned: tuple[OutputCheck, ...] = ()
    after_fit = model if refit else None
    if tune:
        tuned = error
        model, error = _tuned(shrinker, plan, model, tune, expected)
    kinds = dict.fromkeys([*COSTS, *filter(is_known_here, plan.cost)])
    convention = plan.convention
    costs = costs_with_biases(shrinker.graph, plan, model, kinds, convention)
    if refit:
        warn_beyond(shrinker.graph, plan, costs)
    if refit or tune:
        errors = {output.name: output.error for output in error}
        origin = Origin.of(shrinker.graph, plan, resized.report, errors)
        replace_fields(
            origin,
            cost=dict(plan.cost) | {kind: costs[kind] for kind in plan.cost.keys() & costs.keys()},
        ).write(model)
    sizes = shrinker.fitted.count, shrinker.held_out.count
    return ShrinkResult(
        model,
        plan,
        error,
        before,
        layers,
        sizes,
        costs,
        tuned=tuned,
        check=resized.report,
        perplexity=_perplexity(shrinker, plan, sliced, after_fit, model if tune else None),
    )


def _perplexity(
    shrinker: Shrinker,
    plan: Plan,
    sliced: ir.Model,
    fitted: ir.Model | None,
    tuned: ir.Model | None,
) -> Perplexity | None:
    original, resized, *later = (
        shrinker.perplexity(),
        *(
            None if model is None else shrinker.perplexity(model, plan)
            for model in (sliced, fitted, tuned)
        ),
    )
    if original is None or resized is None:
        return None
    return Perplexity(original, resized, *later)


def _tuned(
    shrinker: Shrinker, plan: Plan, model: ir.Model, steps: int, expected: Iterable[Arrays]
) -> tuple[ir.Model, tuple[OutputCheck, ...]]:
    from morphgraph.train.distill import distill

    found = distill(
        shrinker.graph.model,
        model,
        shrinker.fitted,
        steps=steps,
        held_out=shrinker.held_out,
        selection=AxisSelection(shrinker.graph, plan.keep_channels(shrinker.graph)),
        seed=shrinker.seed,
        progress=shrinker.progress,
    )
    if found.reason:
        warn(found.reason)
    return found.model, shrinker.errors(found.model, expected, plan)


def data_scores(
    graph: ChannelGraph, data: Any, kind: DataScore = "data", **options: Any
) -> FloatArray:
    """A number per channel from calibration inputs, ``[channels]``.

    Args:
        graph: the lifted network.
        data: as :func:`shrink` takes it.
        kind: ``"data"`` is what removing the channel, when its turn comes, does to the outputs
            after the best compensation, on one scale for the whole network: shares of the outputs'
            variance; to be allocated by their ``"sum"``. ``"variance"`` is the variance of what a
            channel contributes to its readers (FLAP, An et al. 2024), ``"activation"`` its energy,
            both as shares of what the readers give; to be allocated as ``"shares"``.
        options: as of :class:`Shrinker`.
    """
    return Shrinker(graph, data, **options).scores(kind)


def _warn_of_few(fitted: Refitted, count: int) -> None:
    few = [layer for layer in fitted.layers if layer.places < layer.inputs]
    if few:
        worst = max(few, key=lambda layer: layer.inputs / max(layer.places, 1))
        warn(
            f"too few samples ({count}) for {len(few)} of {len(fitted.layers)} layers, which are "
            f"fitted at fewer places than they have inputs ('{escape(worst.name)}': "
            f"{worst.places} of {worst.inputs}); ridge regression carries them; give more samples",
        )


def _warn_of_slices(fitted: Refitted) -> None:
    if fitted.slices:
        named = ", ".join(f"'{escape(name)}'" for name in fitted.slices[:3])
        count = len(fitted.slices)
        more = count - 3
        warn(
            f"kernels of {count} node{'s' if count > 1 else ''} lose inputs and stay slices, since "
            f"they are shared, computed or in few bits: {named}"
            f"{f' and {more} more' if more > 0 else ''}; "
            "shrink the network before it is quantized, or train what is left"
        )


def _graph_of(model: Any, data: Any, fixed: Fixed) -> ChannelGraph:
    if isinstance(model, ChannelGraph):
        if fixed and not fixed.items() <= model.options.fixed.items():
            raise ArgumentError("fixed goes with a model or file; lift the graph with fixed=")
        return model
    if hasattr(model, "state_dict") and callable(getattr(model, "forward", None)):
        return lift(_exported(model, data), fixed=fixed)
    return lift(as_model(model), fixed=fixed)


def _exported(net: "nn.Module", data: Any) -> ir.Model:
    """A torch module as a model whose batch is open, by the first of the data."""
    from morphgraph.torch_io.export import export
    from morphgraph.torch_io.first import first_example

    return export(net, first_example(net, data), dynamic_batch=True)
