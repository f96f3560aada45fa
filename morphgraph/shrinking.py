"""Shrinking without training: calibration inputs in, a network that still works out.

Statistics of the original, in what order channels may go, what that costs the outputs, the widths
for a budget, the fit of what is left: the passes of :mod:`morphgraph.passes.calibration` and
:mod:`morphgraph.passes.refit`, one after the other.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Arrays, FloatArray
from morphgraph.calibration import ImageOptions, Progress, Samples, no_progress
from morphgraph.errors import (
    BudgetError,
    DataError,
    ModelError,
    MorphWarning,
    PlanError,
)
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import PARAMETERS_KEY, ModelLike, as_model, escape
from morphgraph.onnx_io.inputs import Inputs
from morphgraph.onnx_io.mapped import take
from morphgraph.onnx_io.runtime import is_refusal
from morphgraph.ops.parameters import layers_weights
from morphgraph.options import Allocation, DataScore
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.curves import (
    channel_scores,
    measure,
)
from morphgraph.passes.calibration.outputs import OutputCheck, checks, require_same, run_all
from morphgraph.passes.calibration.statistics import Calibration, calibrate
from morphgraph.passes.checking.verify import VerifyReport, require_valid
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.bounds import WidthBounds, Widths
from morphgraph.passes.planning.constraints import Budget, require_reachable, resolve_budget
from morphgraph.passes.planning.removal_path import plan as make_plan
from morphgraph.passes.refit.refit import LayerError, Refitted, refit
from morphgraph.plans import Plan
from morphgraph.workflow import resize_and_check

if TYPE_CHECKING:
    from torch import nn

LIMIT = 512
"""Samples that are read of data by default."""
HELD_OUT = 0.2
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the first budget's cost at which a curve is measured."""
CHECKED = 8
"""Samples that the resize is checked on."""
BATCH_BYTES = 32e6
LARGEST_BATCH = 100

#: Shares of a group's channels at which what it does to the outputs is measured, most important
#: first; how many of them, and on how many samples, follows from the time that the original takes.
LEVELS = (0.7, 0.4, 0.85, 0.55, 0.25)
FEWEST_LEVELS = 2
#: Runs of the original over all samples that the curves may cost.
CURVE_RUNS = 4.0
FEWEST_SAMPLES, MOST_SAMPLES = 16, 256


@dataclass(frozen=True)
class CurvePoint:
    """What a budget costs: the share asked for, the share reached, and the outputs' errors."""

    share: float
    reached: float
    outputs: tuple[OutputCheck, ...]


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
        tuned: the errors before self-distillation; empty without.
        check: of the resize, against the masked original; ``None`` where it was not made.
    """

    model: ir.Model
    plan: Plan
    error: tuple[OutputCheck, ...]
    before: tuple[OutputCheck, ...]
    layers: tuple[LayerError, ...]
    samples: tuple[int, int]
    curve: tuple[CurvePoint, ...] = ()
    tuned: tuple[OutputCheck, ...] = ()
    check: VerifyReport | None = None


class Shrinker:
    """A network with calibration inputs: what is learned of it once serves many budgets.

    Args:
        graph: the lifted network.
        data: as :meth:`morphgraph.calibration.Samples.of` takes it, or samples.
        limit: the most samples that are read.
        images: how images become inputs.
        bounds: which groups may change; others are not looked at.
        seed: of all that is random.
        threads: of ONNX Runtime; 0 leaves the number to it.
        progress: told how far it is.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),), dynamic_batch=True))
    >>> inputs = np.random.default_rng(0).normal(size=(64, *image().shape[1:]))
    >>> shrinker = Shrinker(graph, inputs.astype(np.float32))
    >>> scores = shrinker.scores()
    >>> scores.shape == graph.channel_group.shape
    True
    """

    def __init__(
        self,
        graph: ChannelGraph,
        data: Any,
        *,
        limit: int | None = LIMIT,
        images: ImageOptions | None = None,
        bounds: WidthBounds | None = None,
        seed: int = 0,
        threads: int = 0,
        progress: Progress = no_progress,
    ) -> None:
        self.graph, self.seed, self.threads, self.progress = graph, seed, threads, progress
        self.bounds = (bounds or WidthBounds()).check(graph)
        self.samples: Samples = (
            data
            if isinstance(data, Samples)
            else Samples.of(data, graph.model, limit, seed, images=images, progress=progress)
        )
        self.fitted, self.held_out = self.samples.split(HELD_OUT)
        per_sample = cost(graph, "peak").total
        self.batch = int(np.clip(BATCH_BYTES / max(per_sample, 1.0), 1, LARGEST_BATCH))

    def batches(self) -> Iterator[Arrays]:
        """Inputs to fit to."""
        return self.fitted.batches(self.batch)

    def aside(self) -> Iterator[Arrays]:
        """Inputs held out."""
        return self.held_out.batches(self.batch)

    @cached_property
    def _levels(self) -> tuple[int, int]:
        """At how many widths of every group, and on how many samples, the outputs are measured."""
        groups = max(sum(self._looked_at(group) for group in self.graph.groups), 1)
        runs = CURVE_RUNS * self.samples.count / groups
        levels = int(np.clip(runs / 64, FEWEST_LEVELS, len(LEVELS)))
        samples = int(np.clip(runs / levels, FEWEST_SAMPLES, MOST_SAMPLES))
        return levels, min(samples, self.held_out.count)

    def _looked_at(self, group: Group) -> bool:
        return self.bounds.allows(group) and group.width > 1

    def _stops(self, group: Group) -> list[int]:
        levels = LEVELS[: self._levels[0]]
        floor = 0 if self.bounds.min_width == 0 else 1
        widths = {int(np.clip(round(s * group.width), floor, group.width - 1)) for s in levels}
        return sorted(widths | ({0} if floor == 0 else set()))

    @cached_property
    def calibration(self) -> Calibration:
        """In what order channels may go."""
        with self._blaming_samples():
            self._require_numbers()
            return calibrate(
                self.graph,
                self.batches(),
                stops=self._stops,
                wanted=self._looked_at,
                seed=self.seed,
                threads=self.threads,
                progress=self.progress,
            )

    def _require_numbers(self) -> None:
        """Refuse a network whose results are no numbers, which nothing can be fitted to.

        Raises:
            ModelError: names the output.
        """
        first = next(self.held_out.batches(1))
        (found,) = run_all(self.graph.model, [first], self.threads)
        for name, array in found.items():
            is_float = hasattr(array, "dtype") and np.issubdtype(array.dtype, np.floating)
            if is_float and array.size and not np.isfinite(array).any():
                raise ModelError(
                    f"output '{escape(name)}' is NaN or infinite for these inputs "
                    f"({self.samples.described}); repair the model's weights, or give inputs as it "
                    "expects them"
                )

    @contextmanager
    def _blaming_samples(self) -> Iterator[None]:
        """What ONNX Runtime refuses while the original runs, it refuses because of the inputs."""
        try:
            yield
        except Exception as error:
            if not is_refusal(error):
                raise
            words = " ".join(str(error).split())
            raise DataError(
                f"{self.samples.described}: the model does not run on some of them ({words}); "
                "check that they are what it expects"
            ) from error

    def scores(self, kind: DataScore = "data") -> FloatArray:
        """A number per channel, ``[channels]``; see :func:`data_scores`."""
        if kind != "data":
            return self.calibration.contributions(kind)
        return self._measured

    def _measured_on(self) -> Batches:
        """Some of the inputs held out: on those that kernels were fitted to they look too good."""
        count = self._levels[1]
        chosen = self.held_out
        if count < chosen.count:
            _, chosen = chosen.split(count / chosen.count)
        kept = Batches()
        for batch in chosen.batches(self.batch):
            kept.append(batch)
        return kept

    @cached_property
    def _measured(self) -> FloatArray:
        groups = [group for group in self.graph.groups if self._looked_at(group)]
        points = measure(
            self.calibration,
            self._measured_on(),
            {group.index: self._stops(group) for group in groups},
            threads=self.threads,
            progress=self.progress,
        )
        return channel_scores(self.calibration, points)

    def plan(
        self,
        budget: Budget,
        score: DataScore = "data",
        *,
        allocation: Allocation | None = None,
        **options: Any,
    ) -> Plan:
        """The plan for a budget; ``options`` as of :func:`morphgraph.plan`."""
        bounds, counted = self.bounds, options.get("convention", "default")
        # A budget that cannot be met is told before anything is measured.
        require_reachable(resolve_budget(self.graph, budget, counted), bounds.on(self.graph))
        made = make_plan(
            self.graph,
            budget,
            score=self.scores(score),
            round_to=bounds.round_to,
            min_width=bounds.min_width,
            include=bounds.include,
            exclude=bounds.exclude,
            widths=bounds.widths,
            same=bounds.same,
            allocation=allocation or ("sum" if score == "data" else "shares"),
            **options,
        )
        request = {**made.request, "score": score, "samples": self.samples.count}
        return msgspec.structs.replace(made, request=request)

    def fit(self, plan: Plan, what: str = "") -> Refitted:
        """The network of a plan, fitted to what the original computes.

        Args:
            plan: which channels stay.
            what: of this plan progress is told, where there are several.

        Raises:
            PlanError: the plan adds channels.
        """
        if plan.added(self.graph):
            raise PlanError(
                "the plan adds channels, and a refit fits what is left of those that there were; "
                "apply it without a refit, or refit a plan that only removes"
            )
        with self._blaming_samples():
            self._require_numbers()
            fitted = refit(
                self.graph,
                plan.keep_channels(self.graph),
                self.batches(),
                self.aside(),
                seed=self.seed,
                threads=self.threads,
                progress=lambda phase, done, total: self.progress(what + phase, done, total),
            )
        self._list_biases(fitted.model)
        require_valid(self.graph, fitted.model)
        return fitted

    def _list_biases(self, model: ir.Model) -> None:
        """Biases that the refit made are parameters, where the model lists these."""
        if PARAMETERS_KEY in model.metadata_props:
            former = self.graph.model.graph.initializers
            made = [name for name in sorted(layers_weights(model)) if name not in former]
            listed = json.loads(model.metadata_props[PARAMETERS_KEY])
            model.metadata_props[PARAMETERS_KEY] = json.dumps([*listed, *made])

    def expected(self, plan: Plan | None = None) -> Batches:
        """What the original gives for inputs held out; of a plan, at the positions that stay."""
        keep = plan.keep_channels(self.graph) if plan else {}
        selection = AxisSelection(self.graph, keep)
        kept = Batches()
        with self._blaming_samples():
            for found in run_all(self.graph.model, self.aside(), self.threads):
                cuts = {name: selection.cuts(name) for name in found if keep}
                kept.append({n: take(a, cuts[n]) if cuts.get(n) else a for n, a in found.items()})
        return kept

    def errors(self, model: ir.Model, expected: Iterable[Arrays]) -> tuple[OutputCheck, ...]:
        """How far a model's outputs are from the original's on held-out inputs."""
        return checks(expected, run_all(model, self.aside(), self.threads))

    def curve(
        self,
        kind: str = "flops",
        *,
        score: DataScore = "data",
        refit: bool = True,
        convention: Convention = "default",
    ) -> tuple[CurvePoint, ...]:
        """What the outputs lose at several shares of a cost, those that no plan reaches left out.

        Args:
            kind: of the cost, as of :func:`morphgraph.cost`.
            score: see :func:`data_scores`.
            refit: whether kernels are fitted.
            convention: of the cost.
        """
        resource = cost(self.graph, kind, convention=convention)
        expected = self.expected()
        points = []
        for share in CURVE:
            try:
                with warnings.catch_warnings():  # the plan that is applied has told of them
                    warnings.simplefilter("ignore", MorphWarning)
                    plan = self.plan({kind: share * resource.total}, score, convention=convention)
            except BudgetError:
                break
            if refit:
                model = self.fit(plan, f"{share:.0%} of {kind}, ").model
            else:
                model = resize_and_check(self.graph, plan, verify=False).model
            reached = resource.at(plan.widths(self.graph)) / resource.total
            points.append(CurvePoint(share, reached, self.errors(model, expected)))
        return tuple(points)


def shrink(
    model: "ChannelGraph | ModelLike | nn.Module",
    data: Any,
    budget: Budget,
    *,
    score: DataScore = "data",
    refit: bool = True,
    tune: int = 0,
    curve: bool = False,
    round_to: int = 1,
    min_width: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    widths: Widths | None = None,
    same: Sequence[str] = (),
    convention: Convention = "default",
    limit: int | None = LIMIT,
    images: ImageOptions | None = None,
    verify: bool = True,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = no_progress,
) -> ShrinkResult:
    """Fit a network into a budget without training it: plan, apply and refit, by some inputs.

    No labels are needed, and torch only for a module and for ``tune``. A fifth of the inputs is
    held out, and says what to expect.

    Args:
        model: a lifted model, or a model or path, or a torch module.
        data: calibration inputs: arrays, a dict of them, a file or folder, a DataLoader, or any
            iterable of feeds (:meth:`morphgraph.calibration.Samples.of`).
        budget: per cost an amount or a share, as of :func:`morphgraph.plan`.
        score: how channels are ranked and widths chosen, see :func:`data_scores`.
        refit: whether kernels are fitted to what the original computes.
        tune: steps of self-distillation after that (:func:`morphgraph.train.distill.distill`);
            needs torch.
        curve: measure the errors at 90, 80, 70, 60 and 50 % of the first budget's cost, too.
        round_to, min_width, include, exclude, widths, same, convention: as of
            :func:`morphgraph.plan`.
        limit: the most samples that are read.
        images: how images become inputs.
        verify: whether the resize is checked against the masked original before the refit.
        seed: of all that is random.
        threads: of ONNX Runtime; 0 leaves the number to it.
        progress: told how far it is.

    Raises:
        BudgetError: no plan meets the budget.
        DataError: there are no or too few samples, or they hold NaN.
        ModelError: data do not fit the model's inputs.
        VerificationError: the result is wrong.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> inputs = np.random.default_rng(0).normal(size=(64, *image().shape[1:]))
    >>> result = mg.shrink(residual_cnn(), inputs.astype(np.float32), {"flops": "70%"})
    >>> result.plan.cost["flops"].after <= 0.7 * result.plan.cost["flops"].before
    True
    >>> [output.name for output in result.error] == [o.name for o in result.model.graph.outputs]
    True
    """
    graph = _graph_of(model, data)
    bounds = WidthBounds(round_to, min_width, include, exclude, widths or {}, same)
    shrinker = Shrinker(
        graph,
        data,
        limit=limit,
        images=images,
        bounds=bounds,
        seed=seed,
        threads=threads,
        progress=progress,
    )
    plan = shrinker.plan(budget, score, convention=convention)
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
    before = shrinker.errors(sliced, expected)
    model, error = sliced, before
    layers: tuple[LayerError, ...] = ()
    if refit:
        fitted = shrinker.fit(plan)
        model, layers = fitted.model, fitted.layers
        require_same(fitted.found, run_all(model, shrinker.aside(), shrinker.threads))
        error = checks(expected, fitted.found)
        _warn_of_few(fitted, shrinker.fitted.count)
    tuned: tuple[OutputCheck, ...] = ()
    if tune:
        tuned = error
        model, error = _tuned(shrinker, plan, model, tune, expected)
    sizes = shrinker.fitted.count, shrinker.held_out.count
    return ShrinkResult(
        model, plan, error, before, layers, sizes, tuned=tuned, check=resized.report
    )


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
        warnings.warn(found.reason, MorphWarning, stacklevel=4)
    return found.model, shrinker.errors(found.model, expected)


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
        warnings.warn(
            f"too few samples ({count}) for {len(few)} of {len(fitted.layers)} layers, which are "
            f"fitted at fewer places than they have inputs ('{escape(worst.name)}': "
            f"{worst.places} of {worst.inputs}); ridge regression carries them; give more samples",
            MorphWarning,
            stacklevel=4,
        )


def _graph_of(model: Any, data: Any) -> ChannelGraph:
    if isinstance(model, ChannelGraph):
        return model
    if hasattr(model, "state_dict") and callable(getattr(model, "forward", None)):
        return lift(_exported(model, data))
    return lift(as_model(model))


def _exported(net: "nn.Module", data: Any) -> ir.Model:
    """A torch module as a model whose batch is open, by the first of the data."""
    from morphgraph.torch_io.export import export
    from morphgraph.torch_io.first import first_example

    return export(net, first_example(net, data), dynamic_batch=True)


__all__ = [
    "CurvePoint",
    "OutputCheck",
    "ShrinkResult",
    "Shrinker",
    "data_scores",
    "shrink",
]
