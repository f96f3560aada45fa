"""Random networks: fitted, a resized network is never further from the original than before."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from morphgraph.errors import BudgetError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import finish
from morphgraph.testing import random_plan, random_removal


def _laws() -> ModuleType:
    """The test of the laws, whose random networks are these."""
    path = Path(__file__).parents[2] / "test_laws.py"
    spec = importlib.util.spec_from_file_location("random_networks_of_laws", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


LAWS = _laws()
PLAN = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
MANY = settings(PLAN, max_examples=50)


def relative(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected)) / max(float(np.linalg.norm(expected)), 1e-30)


def outputs(model: ir.Model, samples: np.ndarray) -> np.ndarray:
    return np.concatenate([run(model, {"x": one[None]})["y"] for one in samples])


def require_nearer(graph: ChannelGraph, plan: Plan | None, seed: int) -> None:
    """Fitted is not further away than sliced; and the model is valid, its names those of sliced."""
    data = np.random.default_rng(seed).normal(size=(80, 3, 4, 4)).astype(np.float32)
    before = ir.to_proto(graph.model).SerializeToString()
    shrinker = Shrinker(graph, data, threads=1)
    if plan is None:
        try:
            plan = shrinker.plan({"flops": "60%"})
        except BudgetError:
            return
    result = finish(shrinker, plan)
    assert ir.to_proto(graph.model).SerializeToString() == before
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    small = resize(graph, plan.keep_channels(graph))
    assert set(small.graph.initializers) <= set(result.model.graph.initializers)
    held_out = np.concatenate([feed["x"] for feed in shrinker.aside()])
    expected = outputs(graph.model, held_out)
    sliced = relative(expected, outputs(small, held_out))
    found = relative(expected, outputs(result.model, held_out))
    assert found <= 1.05 * sliced + 1e-5
    (check,) = result.error
    assert check.error == pytest.approx(found, rel=1e-2, abs=1e-6)


@PLAN
@given(LAWS.networks(), st.integers(0, 2**16))
def test_random_widths(model: ir.Model, seed: int) -> None:
    graph = lift(model)
    require_nearer(graph, random_plan(graph, seed), seed)


@PLAN
@given(LAWS.networks(), st.integers(0, 2**16))
def test_groups_that_vanish(model: ir.Model, seed: int) -> None:
    graph = lift(model)
    require_nearer(graph, random_removal(graph, seed, deaths=0.4), seed)


@PLAN
@given(LAWS.networks(), st.integers(0, 2**16))
def test_planned_by_data(model: ir.Model, seed: int) -> None:
    require_nearer(lift(model), None, seed)


@pytest.mark.long
@MANY
@given(LAWS.networks(), st.integers(0, 2**16), st.sampled_from(["widths", "vanish", "plan"]))
def test_many_random_networks(model: ir.Model, seed: int, how: str) -> None:
    graph = lift(model)
    if how == "plan":
        require_nearer(graph, None, seed)
    else:
        made = random_plan(graph, seed) if how == "widths" else random_removal(graph, seed)
        require_nearer(graph, made, seed)
