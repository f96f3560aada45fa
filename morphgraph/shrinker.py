"""What is learned of a network from calibration inputs, once for many budgets.

Statistics of the original, in what order channels may go, what that costs the outputs, the widths
for a budget, the fit of what is left: the passes of :mod:`morphgraph.passes.calibration` and
:mod:`morphgraph.passes.refit`, one after the other.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Arrays, FloatArray
from morphgraph.calibration import ImageOptions, Progress, Samples, TextOptions, no_progress
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.errors import (
    BudgetError,
    DataError,
    ModelError,
    MorphWarning,
    PlanError,
    UnsupportedError,
)
from morphgraph.graph import ChannelGraph, Group
from morphgraph.onnx_io import escape, static_shape
from morphgraph.onnx_io.runtime import is_refusal, is_unimplemented
from morphgraph.options import Allocation, DataScore
from morphgraph.passes.analysis.cost import Convention, cost
from morphgraph.passes.analysis.least import least_widths
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.choices import how_often
from morphgraph.passes.calibration.compared import Compared, compared
from morphgraph.passes.calibration.curves import channel_scores, measure
from morphgraph.passes.calibration.outputs import OutputCheck, answers, checks
from morphgraph.passes.calibration.perplexity import Foretelling, foretelling, perplexity
from morphgraph.passes.calibration.segments import run_all
from morphgraph.passes.calibration.skips import measure_skips
from morphgraph.passes.calibration.statistics import Calibration, calibrate
from morphgraph.passes.checking.verify import require_valid
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.constraints import Budget, require_reachable, resolve_budget
from morphgraph.passes.planning.finer import within_reach
from morphgraph.passes.planning.parts import Losses
from morphgraph.passes.planning.removal_path import plan as make_plan
from morphgraph.passes.refit.refit import Refitted, refit
from morphgraph.passes.refit.room import costs_with_biases, plan_with_room
from morphgraph.plans import Plan
from morphgraph.workflow import resize_and_check

LIMIT = 512
"""Samples that are read of data by default."""
HELD_OUT = 0.2
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the first budget's cost at which a curve is measured."""
BATCH_BYTES = 32e6
LARGEST_BATCH = 100

#: What helps where the original cannot be asked.
_WITHOUT_RUNNING = (
    "what it gives is what is fitted to; plan by its weights, without inputs (`morphgraph plan` "
    "and `apply`, mg.plan and mg.apply)"
)
#: Shares of a group's channels at which what it does to the outputs is measured, most important
#: first; how many of them, and on how many samples, follows from the time that the original takes.
LEVELS = (0.7, 0.4, 0.85, 0.55, 0.25)
FEWEST_LEVELS = 2
#: Runs of the original over all samples that the curves may cost.
CURVE_RUNS = 4.0
FEWEST_SAMPLES, MOST_SAMPLES = 16, 256
#: Places of the outputs that are enough, where every sample has many of them (a text its tokens),
#: and the fewest samples then.
ENOUGH_PLACES, FEWEST_WITH_PLACES = 1024, 4


@dataclass(frozen=True)
class CurvePoint:
    """What a budget costs: the share asked for, the share reached, and the outputs' errors.

    ``perplexity`` is that of a language model.
    """

    share: float
    reached: float
    outputs: tuple[OutputCheck, ...]
    perplexity: float | None = None


class Shrinker:
    """A network with calibration inputs: what is learned of it once serves many budgets.

    Args:
        graph: the lifted network.
        data: as :meth:`morphgraph.calibration.Samples.of` takes it, or samples.
        limit: the most samples that are read.
        images: how images become inputs.
        text: how text becomes inputs.
        bounds: which groups may change; others are not looked at.
        seed: of all that is random.
        threads: of ONNX Runtime; 0 leaves the number to it.
        progress: told how far it is.
        processes: that share the work.

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
        text: TextOptions | None = None,
        bounds: WidthBounds | None = None,
        seed: int = 0,
        threads: int = 0,
        progress: Progress = no_progress,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.graph, self.seed, self.threads, self.progress = graph, seed, threads, progress
        self.bounds = (bounds or WidthBounds()).check(graph)
        self.samples: Samples = (
            data
            if isinstance(data, Samples)
            else Samples.of(
                data, graph.model, limit, seed, images=images, text=text, progress=progress
            )
        )
        self.fitted, self.held_out = self.samples.split(HELD_OUT)
        per_sample = cost(graph, "peak").total * self._stretch()
        self.batch = int(np.clip(BATCH_BYTES / max(per_sample, 1.0), 1, LARGEST_BATCH))

    def _stretch(self) -> float:
        """How much larger a sample is than the sizes that the network is analysed at."""
        first = next(self.held_out.batches(1))
        ratios = [1.0]
        for value in self.graph.model.graph.inputs:
            given = first.get(value.name or "")
            if given is not None and given.size:
                analysed = max(prod(static_shape(value)) / self.graph.batch, 1.0)
                ratios.append(given.size / given.shape[0] / analysed if given.ndim else 1.0)
        return max(ratios)

    def batches(self) -> Iterator[Arrays]:
        """Inputs to fit to, of this process."""
        return self.processes.share(self.fitted.batches(self.batch))

    def aside(self, plan: Plan | None = None) -> Iterator[Arrays]:
        """Inputs held out; for the network of a plan, whose caches have fewer heads."""
        feeds = self.held_out.batches(self.batch)
        if plan is None:
            return feeds
        return map(AxisSelection(self.graph, plan.keep_channels(self.graph)).positions, feeds)

    @cached_property
    def _levels(self) -> tuple[int, int]:
        """At how many widths of every group, and on how many samples, the outputs are measured."""
        groups = max(sum(self._looked_at(group) for group in self.graph.groups), 1)
        runs = CURVE_RUNS * self.samples.count / groups
        levels = int(np.clip(runs / 64, FEWEST_LEVELS, len(LEVELS)))
        enough = -(-ENOUGH_PLACES // self._places)
        fewest = min(FEWEST_SAMPLES, max(FEWEST_WITH_PLACES, enough))
        samples = int(np.clip(runs / levels, fewest, MOST_SAMPLES))
        return levels, min(samples, self.held_out.count)

    @cached_property
    def _places(self) -> int:
        """At how many places a sample's outputs are: the tokens of a text, the pixels of a map."""
        with self._blaming_samples():
            return max(map(answers, self._first_outputs.values()), default=1)

    @cached_property
    def _first_outputs(self) -> Arrays:
        first = next(self.held_out.batches(1))
        try:
            (found,) = run_all(self.graph.model, [first], self.threads)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error}; {_WITHOUT_RUNNING}") from error
        return found

    def _looked_at(self, group: Group) -> bool:
        enough = group.width > int(least_widths(self.graph)[group.index])
        return self.bounds.allows(group) and enough

    def _stops(self, group: Group) -> list[int]:
        levels = LEVELS[: self._levels[0]]
        least = int(least_widths(self.graph)[group.index])
        floor = 0 if self.bounds.min_width == 0 and least == 1 else least
        widths = {int(np.clip(round(s * group.width), floor, group.width - 1)) for s in levels}
        return sorted(widths | ({0} if floor == 0 else set()))

    @cached_property
    def compared(self) -> Compared:
        """Products of queries and keys whose elements may go."""
        return compared(
            self.graph,
            self.batches,
            aside=self.aside,
            threads=self.threads,
            processes=self.processes,
        )

    @cached_property
    def calibration(self) -> Calibration:
        """In what order channels may go."""
        with self._blaming_samples():
            self._require_numbers()
            found = calibrate(
                self.graph,
                self.batches(),
                stops=self._stops,
                wanted=self._looked_at,
                seed=self.seed,
                threads=self.threads,
                progress=self.progress,
                processes=self.processes,
                compared=self.compared,
            )
            found.chosen.update(
                how_often(
                    self.graph,
                    self.batches(),
                    known=found.chosen,
                    threads=self.threads,
                    processes=self.processes,
                )
            )
            return found

    def _require_numbers(self) -> None:
        """Refuse a network whose results are no numbers, which nothing can be fitted to.

        Raises:
            ModelError: names the output.
        """
        for name, array in self._first_outputs.items():
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
            if is_unimplemented(error):
                raise UnsupportedError(
                    f"ONNX Runtime has no kernel for CPUs that runs the model ({words}); "
                    f"{_WITHOUT_RUNNING}"
                ) from error
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
            processes=self.processes,
        )
        return channel_scores(self.calibration, points)

    @cached_property
    def _skips(self) -> Losses:
        """What the outputs lose with whole branches, where these may go."""
        parts = self.bounds.on(self.graph).parts
        if not parts:
            return {}
        with self._blaming_samples():
            return measure_skips(
                self.graph,
                parts,
                self.fitted.batches(self.batch),
                self._measured_on(),
                threads=self.threads,
                progress=self.progress,
            )

    def plan(
        self,
        budget: Budget,
        score: DataScore = "data",
        *,
        allocation: Allocation | None = None,
        refit: bool = False,
        **options: Any,
    ) -> Plan:
        """The plan for a budget; ``options`` as of :func:`morphgraph.plan`.

        With ``refit`` the network meets it after :meth:`fit`, too, which may add biases.
        """
        if refit:
            make = partial(self.plan, score=score, allocation=allocation, **options)
            return plan_with_room(self.graph, budget, make, options.get("convention", "default"))
        bounds, counted = self.bounds, options.get("convention", "default")
        # A budget that cannot be met is told before anything is measured.
        constraints = resolve_budget(self.graph, budget, counted)
        require_reachable(constraints, within_reach(self.graph, bounds, constraints))
        made = make_plan(
            self.graph,
            budget,
            depth=bounds.depth,
            losses=self._skips if score == "data" else None,
            score=self.scores(score),
            round_to=bounds.round_to,
            min_width=bounds.min_width,
            include=bounds.include,
            exclude=bounds.exclude,
            widths=bounds.widths,
            same=bounds.same,
            ties=bounds.ties,
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
                processes=self.processes,
                compared=self.compared,
            )
        require_valid(self.graph, fitted.model)
        return fitted

    def expected(self, plan: Plan | None = None) -> Batches:
        """What the original gives for inputs held out; of a plan, at the positions that stay.

        Caches that the plan leaves without heads are left out.
        """
        kept = Batches()
        with self._blaming_samples():
            found = run_all(self.graph.model, self.aside(), self.threads)
            for arrays in found if plan is None else self._of_plan(plan, found):
                kept.append(arrays)
        return kept

    def _of_plan(self, plan: Plan, found: Iterable[Arrays]) -> Iterator[Arrays]:
        """What the original gives at the positions that a plan leaves."""
        selection = AxisSelection(self.graph, plan.keep_channels(self.graph))
        gone = liveness(self.graph, selection.dead).gone_outputs
        for arrays in found:
            left = {name: array for name, array in arrays.items() if name not in gone}
            yield selection.positions(left)

    def errors(
        self, model: ir.Model, expected: Iterable[Arrays], plan: Plan
    ) -> tuple[OutputCheck, ...]:
        """How far the outputs of a plan's network are from the original's on held-out inputs."""
        return checks(expected, run_all(model, self.aside(plan), self.threads))

    @cached_property
    def foretells(self) -> Foretelling | None:
        """Which tokens the network foretells; ``None`` of what is no language model."""
        with self._blaming_samples():
            return foretelling(self.graph.model, next(self.held_out.batches(1)), self.threads)

    def perplexity(self, model: ir.Model | None = None, plan: Plan | None = None) -> float | None:
        """Of a language model on inputs held out; ``None`` of others.

        Args:
            model: another than the original.
            plan: whose network that is.
        """
        if self.foretells is None:
            return None
        found = run_all(model or self.graph.model, self.aside(plan), self.threads)
        return perplexity(found, self.aside(), self.foretells)

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
                    budget = {kind: share * resource.total}
                    plan = self.plan(budget, score, refit=refit, convention=convention)
            except BudgetError:
                break
            if refit:
                model = self.fit(plan, f"{share:.0%} of {kind}, ").model
            else:
                model = resize_and_check(self.graph, plan, verify=False).model
            costs = costs_with_biases(self.graph, plan, model, [kind], convention)
            reached = costs[kind].after / costs[kind].before
            errors = self.errors(model, self._of_plan(plan, expected), plan)
            points.append(CurvePoint(share, reached, errors, self.perplexity(model, plan)))
        return tuple(points)
