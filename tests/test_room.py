"""Room in a budget for the biases of a fit: every cost is met after it, and used up.

Costs of the finished file are counted anew, by a lift of that file.
"""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.arrays import Array
from morphgraph.errors import MorphWarning
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.refit.refit import with_biases
from morphgraph.passes.refit.room import fitted_costs, plan_with_room
from morphgraph.plans import Plan
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import finish
from morphgraph.testing import model_from_text

COSTS = ["params", "flops", "weight_bytes", "memory", "peak", "latency"]
OPSET = '<ir_version: 9, opset_import: ["": 20]> '
MLP = """net (float[N,4,6] x, float[6,160] a, float[160,96] b, float[96,48] c, float[48,6] d)
=> (float[N,4,6] y) {
    p = MatMul(x, a)  r = Relu(p)  q = MatMul(r, b)  s = Relu(q)  t = MatMul(s, c)  u = Relu(t)
    y = MatMul(u, d)
}"""


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def encoder(width: int = 48, heads: int = 4, hidden: int = 192) -> ir.Model:
    """Two blocks as BERT has them: post-norm, heads by Reshape, matrices without biases."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (
                nn.Linear(width, width, bias=False) for _ in range(4)
            )
            self.up, self.down = nn.Linear(width, hidden, False), nn.Linear(hidden, width, False)
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            split = (x.shape[0], x.shape[1], heads, width // heads)
            q, k, v = (
                layer(x).reshape(split).transpose(1, 2)
                for layer in (self.query, self.key, self.value)
            )
            weights = (q @ k.transpose(2, 3) / 4).softmax(-1)
            x = self.first(x + self.out((weights @ v).transpose(1, 2).reshape(x.shape)))
            return self.second(x + self.down(nn.functional.gelu(self.up(x))))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, width, bias=False), Block(), Block(), nn.Linear(width, 6))
    return mg.export(net.eval(), (torch.randn(2, 10, 12),), dynamic_batch=True)


def resnet18() -> ir.Model:
    import torch
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=10)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.2)
    return mg.export(net.eval(), (torch.randn(1, 3, 48, 48),), dynamic_batch=True)


NETWORKS: Mapping[str, Any] = {
    "mlp": (lambda: model_from_text(OPSET + MLP, ("x",), 0), (120, 4, 6)),
    "encoder": (encoder, (60, 10, 12)),
    "resnet18": (resnet18, (20, 3, 48, 48)),
}


@cache
def shrinker(name: str) -> Shrinker:
    """Measured once for all budgets."""
    model, shape = NETWORKS[name]
    bounds = WidthBounds(round_to=1)
    return Shrinker(lift(model()), noise(*shape), bounds=bounds, threads=1)


def made(name: str, kind: str, share: float) -> tuple[Plan, ir.Model, float]:
    """A plan with room, its network after the fit, and the budget."""
    learned = shrinker(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MorphWarning)
        plan = learned.plan({kind: f"{share:.0%}"}, refit=True)
        fitted = finish(learned, plan, verify=False).model
    return plan, fitted, share * mg.cost(learned.graph, kind).total


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize(
    "name", ["mlp", "encoder", pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_a_budget_is_met_after_the_fit_and_used(name: str, kind: str) -> None:
    plan, fitted, limit = made(name, kind, 0.6)
    after = mg.cost(lift(fitted), kind).total
    assert 0.97 * limit <= after <= limit * (1 + 1e-9)
    assert plan.request["refit"][kind] >= after * (1 - 1e-9)


def test_memory_of_matrix_products_at_half() -> None:
    """43.6 of 50 % it was, when the share of the biases was kept that a larger network has."""
    _, fitted, limit = made("mlp", "memory", 0.5)
    assert 0.98 * limit <= mg.cost(lift(fitted), "memory").total <= limit


def test_several_budgets_hold_together() -> None:
    learned = shrinker("mlp")
    plan = learned.plan({"params": "50%", "memory": "60%", "flops": "55%"}, refit=True)
    small, shares = lift(finish(learned, plan).model), {}
    for kind, share in (("params", 0.5), ("memory", 0.6), ("flops", 0.55)):
        shares[kind] = mg.cost(small, kind).total / mg.cost(learned.graph, kind).total / share
    assert max(shares.values()) <= 1 + 1e-9
    assert max(shares.values()) > 0.97, shares
    assert plan.request["refit"].keys() == shares.keys()


def test_where_nothing_is_lost_no_bias_is_expected() -> None:
    """The first layer reads what it read before, so that its slice is right as it is."""
    graph = lift(model_from_text(OPSET + MLP, ("x",), 0))
    first, *_ = (group for group in graph.groups if group.resizable)
    biased = with_biases(graph, {first.index: np.arange(first.width - 8)})
    sums = {node.inputs[0].name for node in biased.graph if node.op_type == "Add"}
    assert "p" not in {name and name.split("_")[0] for name in sums}
    assert len(sums) == 3


def test_a_plan_of_weights_keeps_room_where_a_refit_is_told() -> None:
    graph = lift(model_from_text(OPSET + MLP, ("x",), 0))
    data, budget = noise(80, 4, 6), {"params": "50%"}
    limit = 0.5 * mg.cost(graph, "params").total
    for score in ("l2", "data"):
        options: dict[str, Any] = {"round_to": 1, "score": score}
        if score == "data":
            options["data"] = data
        plain, roomy = (mg.plan(graph, budget, refit=kept, **options) for kept in (False, True))
        assert "refit" not in plain.request
        assert roomy.request["budget"] == plain.request["budget"]
        fitted = lift(mg.apply(graph, roomy, refit=data))
        assert 0.97 * limit <= mg.cost(fitted, "params").total <= limit
        with pytest.warns(MorphWarning, match=r"params is .*50\.\d+%.*budget params=50%.*refit"):
            small = mg.apply(graph, plain, refit=data)
        assert mg.cost(lift(small), "params").total > limit


def test_a_coarse_grid_ends_the_search() -> None:
    """Plans repeat; the search ends, with one that fits."""
    graph = lift(model_from_text(OPSET + MLP, ("x",), 0))
    asked: list[float] = []

    def make(budget: Any) -> Plan:
        asked.append(budget["memory"])
        return mg.plan(graph, budget, round_to=32)

    plan = plan_with_room(graph, {"memory": "55%"}, make)
    limit = 0.55 * mg.cost(graph, "memory").total
    assert fitted_costs(graph, plan, ["memory"])["memory"].after <= limit
    assert len(asked) <= 8
