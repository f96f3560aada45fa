"""A latency budget that is met: plan, resize, measure beside the original, correct, plan again."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from morphgraph.benchmark.compare import BenchResult, bench
from morphgraph.benchmark.profile import structure_of
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.device import DeviceProfile
from morphgraph.errors import ArgumentError, BudgetError, MorphWarning
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.planning.constraints import parse_amount
from morphgraph.plans import Plan

TOLERANCE = 0.03
"""How far from the asked time a plan may end, as a share of it."""
ROUNDS = 8
PLANS = 40
"""Networks that are measured at most, and plans that are made: many limits give the same."""
SECONDS = 2.0
"""How long the original and each network run."""
FARTHEST = 1.6
LEAST = 1.01
"""The most and the least that one round changes what is asked of the prediction."""
CLOSE = 1.002
"""Two limits between which there is nothing to be found."""


@dataclass(frozen=True)
class Attempt:
    """A plan that was measured: shares of the original's time, predicted and measured."""

    predicted: float
    measured: float
    noise: float


@dataclass(frozen=True)
class Met:
    """A plan whose network was measured.

    Attributes:
        plan: the one that came nearest to the asked time.
        asked: share of the original's time.
        attempts: all that were measured; the plan's own is ``best``.
        best: its place among them.
        original_ms: the original's time, in the last measurement.
    """

    plan: Plan
    asked: float
    attempts: tuple[Attempt, ...]
    best: int
    original_ms: float

    @property
    def measured(self) -> float:
        """The plan's share of the original's time."""
        return self.attempts[self.best].measured

    @property
    def is_met(self) -> bool:
        """Whether that is the asked time, within :data:`TOLERANCE`."""
        return abs(self.measured / self.asked - 1) <= TOLERANCE

    def sentence(self) -> str:
        """What came out, in words."""
        milliseconds = self.measured * self.original_ms
        told = (
            f"measured: {milliseconds:.3g} ms, {self.measured:.1%} of the original's "
            f"{self.original_ms:.3g} ms, in round {self.best + 1} of {len(self.attempts)}"
        )
        if self.is_met:
            return told
        noise = self.attempts[self.best].noise
        reason = (
            f"the machine is too noisy to tell (+-{noise:.1%})"
            if noise > TOLERANCE
            else "no widths that the budget and the grid allow come nearer; free them by --round-to"
        )
        return f"{told}; {self.asked:.1%} was asked for: {reason}"


def meet(
    graph: ChannelGraph,
    make: Callable[[Mapping[str, str | float]], Plan],
    resized: Callable[[Plan], ir.Model],
    budget: Mapping[str, str | float | int],
    profile: DeviceProfile,
    *,
    seconds: float | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Met:
    """The plan whose network takes the asked time, as measured in the profile's runtime.

    Args:
        graph: the lifted network.
        make: makes a plan for budgets.
        resized: makes the network of a plan.
        budget: with one latency on the profile's device among its costs; its share is one of the
            time that the original takes here, its amount one of this machine's milliseconds.
        profile: of the device.
        seconds: how long both networks run in each round; :data:`SECONDS` if not given.
        seed: of the inputs.
        progress: told of every round.

    Raises:
        ArgumentError: the budget has no latency, or several.
        BudgetError: no plan meets the budget.
    """
    kinds = [kind for kind in budget if kind.partition("@")[0] == "latency"]
    if len(kinds) != 1:
        raise ArgumentError("a budget that is to be measured has one latency; give latency=60%")
    kind = kinds[0]
    seconds = SECONDS if seconds is None else seconds
    predicted = cost(graph, kind)
    text = budget[kind]
    original_ms = _original(graph, profile, seconds, seed)
    asked = parse_amount(text, original_ms, "ms") / original_ms
    search = _Search(asked)
    attempts, plans = list[Attempt](), list[Plan]()
    for _ in range(PLANS):
        progress("measure", len(attempts), ROUNDS)
        plan = _planned(make, {**budget, kind: search.limit * predicted.total}, plans)
        if plan is None:
            break
        widths = plan.widths(graph)
        same = (k for k, other in enumerate(plans) if (widths == other.widths(graph)).all())
        known = next(same, None)
        if known is None:
            if len(attempts) == ROUNDS:
                break
            share, noise, original_ms = _share(graph, resized(plan), profile, seconds, seed)
            plans.append(plan)
            at = predicted.at(widths) / predicted.total
            attempts.append(Attempt(at, share, noise))
            known = len(plans) - 1
        measured = attempts[known].measured
        if abs(measured / asked - 1) <= TOLERANCE / 2 or not search.learn(measured):
            break
    progress("measure", ROUNDS, ROUNDS)
    within = [k for k, each in enumerate(attempts) if each.measured <= asked * (1 + TOLERANCE)]
    best = min(
        within or range(len(attempts)), key=lambda k: abs(math.log(attempts[k].measured / asked))
    )
    return Met(plans[best], asked, tuple(attempts), best, original_ms)


def _planned(
    make: Callable[[Mapping[str, str | float]], Plan],
    budget: Mapping[str, str | float],
    plans: list[Plan],
) -> Plan | None:
    """A plan; ``None`` where a correction asks for more than any plan can do."""
    try:
        with warnings.catch_warnings():  # of the plan that is taken they are said once
            warnings.simplefilter("ignore", MorphWarning)
            return make(budget)
    except BudgetError:
        if plans:
            return None
        raise


class _Search:
    """What to ask the prediction for, so that the measurement is what was asked for.

    Bisection by what was measured, once there is a network on either side.
    """

    def __init__(self, asked: float) -> None:
        self.asked = self.limit = asked
        self.below: tuple[float, float] | None = None  # what was asked for, and measured
        self.above: tuple[float, float] | None = None

    def learn(self, measured: float) -> bool:
        """Choose the next limit; whether there is any between those that were tried."""
        here = self.limit, measured
        if measured <= self.asked:
            self.below = max(self.below or here, here)
        else:
            self.above = min(self.above or here, here)
        if self.below is None or self.above is None:
            factor = self.asked / measured
            # Where the plan has not changed the same step would not change it either.
            least = LEAST if measured <= self.asked else 1 / LEAST
            factor = max(factor, least) if factor >= 1 else min(factor, least)
            self.limit *= min(max(factor, 1 / FARTHEST), FARTHEST)
            return 0 < self.limit <= FARTHEST
        (low, fast), (high, slow) = self.below, self.above
        if high <= low * CLOSE:
            return False
        way = (self.asked - fast) / max(slow - fast, 1e-9)
        self.limit = low + min(max(way, 0.2), 0.8) * (high - low)
        return True


def _original(graph: ChannelGraph, profile: DeviceProfile, seconds: float, seed: int) -> float:
    return _timed(graph, [graph.model], profile, seconds, seed).models[0].p50_ms


def _share(
    graph: ChannelGraph, model: ir.Model, profile: DeviceProfile, seconds: float, seed: int
) -> tuple[float, float, float]:
    """Share of the original's time, its uncertainty, and the original's milliseconds."""
    original, other = _timed(graph, [graph.model, model], profile, seconds, seed).models
    assert other.speedup is not None
    low, high = other.speedup_interval or (other.speedup, other.speedup)
    return 1 / other.speedup, (high - low) / (2 * other.speedup), original.p50_ms


def _timed(
    graph: ChannelGraph,
    models: Sequence[ir.Model],
    profile: DeviceProfile,
    seconds: float,
    seed: int,
) -> BenchResult:
    """The models side by side, as the device was measured, at the sizes that costs count."""
    return bench(
        models,
        runtimes=[profile.runtime],
        threads=profile.threads,
        seconds=seconds,
        seed=seed,
        structures=[structure_of(graph)] * len(models),
    )
