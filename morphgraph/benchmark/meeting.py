"""A latency budget that is met: plan, resize, measure beside the original, correct, plan again."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from morphgraph.benchmark.compare import bench
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
SECONDS = 2.0
"""How long the original and each network run."""
FARTHEST = 1.6
"""The most that one round changes what is asked of the prediction."""


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
    seconds: float = SECONDS,
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
        seconds: how long both networks run in each round.
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
    predicted = cost(graph, kind)
    text = budget[kind]
    original_ms = _original(graph, profile, seconds, seed)
    asked = parse_amount(text, original_ms, "ms") / original_ms
    limit, attempts, plans = asked, list[Attempt](), list[Plan]()
    for number in range(ROUNDS):
        progress("measure", number, ROUNDS)
        plan = _planned(make, {**budget, kind: limit * predicted.total}, plans)
        if plan is None:
            break
        widths = plan.widths(graph)
        if any((widths == other.widths(graph)).all() for other in plans):
            break
        share, noise, original_ms = _share(graph, resized(plan), profile, seconds, seed)
        plans.append(plan)
        attempts.append(Attempt(predicted.at(widths) / predicted.total, share, noise))
        if abs(share / asked - 1) <= TOLERANCE / 2:
            break
        limit = _next(limit, asked, attempts)
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


def _next(limit: float, asked: float, attempts: list[Attempt]) -> float:
    """The share to ask for: by the last error, or between two networks on both sides."""
    below = [each for each in attempts if each.measured <= asked]
    above = [each for each in attempts if each.measured > asked]
    if below and above:
        low = max(below, key=lambda each: each.measured)
        high = min(above, key=lambda each: each.measured)
        if low.predicted < high.predicted:
            way = (asked - low.measured) / (high.measured - low.measured)
            return low.predicted + min(max(way, 0.1), 0.9) * (high.predicted - low.predicted)
    factor = asked / attempts[-1].measured
    return limit * min(max(factor, 1 / FARTHEST), FARTHEST)


def _original(graph: ChannelGraph, profile: DeviceProfile, seconds: float, seed: int) -> float:
    found = bench(
        [graph.model],
        runtimes=[profile.runtime],
        threads=profile.threads,
        seconds=seconds,
        seed=seed,
    )
    return found.models[0].p50_ms


def _share(
    graph: ChannelGraph, model: ir.Model, profile: DeviceProfile, seconds: float, seed: int
) -> tuple[float, float, float]:
    """Share of the original's time, its uncertainty, and the original's milliseconds."""
    found = bench(
        [graph.model, model],
        runtimes=[profile.runtime],
        threads=profile.threads,
        seconds=seconds,
        seed=seed,
    )
    original, other = found.models
    assert other.speedup is not None
    low, high = other.speedup_interval or (other.speedup, other.speedup)
    return 1 / other.speedup, (high - low) / (2 * other.speedup), original.p50_ms
