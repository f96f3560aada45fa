"""The rounding grid counts channels of tensors: read off the kernels of what is written."""

from typing import Any

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.errors import BudgetError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.grids import Grid, tensor_channels


class Attention(nn.Module):
    """Heads, and a layer that mixes them."""

    def __init__(self, width: int = 96, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).unbind(2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(b, t, c))
        return x + y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(x)[0])
        return y


def _normalized() -> nn.Module:
    layers = [nn.Conv2d(3, 96, 3), nn.GroupNorm(8, 96), nn.ReLU()]
    more = [nn.Conv2d(96, 96, 3), nn.GroupNorm(8, 96), nn.ReLU(), nn.Conv2d(96, 4, 1)]
    return nn.Sequential(*layers, *more)


def _grouped() -> nn.Module:
    inner = [nn.Conv2d(128, 128, 3, groups=32), nn.ReLU(), nn.Conv2d(128, 4, 1)]
    return nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), *inner)


def _shuffled() -> nn.Module:
    up = [nn.Conv2d(32, 128, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(32, 4, 1)]
    return nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), *up)


def _flattened() -> nn.Module:
    tail = [nn.Flatten(), nn.Linear(48 * 9, 32), nn.ReLU(), nn.Linear(32, 5)]
    return nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), *tail)


def _separable() -> nn.Module:
    depthwise = nn.Conv2d(64, 128, 3, groups=64)
    return nn.Sequential(nn.Conv2d(3, 64, 1), depthwise, nn.ReLU(), nn.Conv2d(128, 4, 1))


IMAGE, TOKENS = (1, 3, 8, 8), (1, 6, 96)
NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "heads of 8": (Attention, TOKENS),
    "normalization groups of 12": (_normalized, IMAGE),
    "32 groups of 4": (_grouped, IMAGE),
    "pixel shuffle": (_shuffled, IMAGE),
    "flattened maps": (_flattened, IMAGE),
    "depthwise, two for one": (_separable, IMAGE),
    "recurrent": (Recurrent, (1, 5, 16)),
}


def _lifted(name: str) -> ChannelGraph:
    torch.manual_seed(0)
    make, shape = NETS[name]
    return mg.lift(mg.export(make().eval(), (torch.randn(shape),)))


def _channels(model: ir.Model) -> dict[tuple[str, str], int]:
    """Channels of what every layer with a kernel reads and makes, from the file's own shapes."""
    found = {}
    for node in model.graph:
        kernels = [v for v in node.inputs if v is not None and _is_kernel(v, model)]
        axis = {"Conv": 1, "Gemm": -1, "MatMul": -1, "LSTM": -1}.get(node.op_type)
        if axis is not None and kernels and node.inputs[0] is not None:
            for value, where in ((node.inputs[0], "reads"), (node.outputs[0], "makes")):
                found[str(node.name), where] = static_shape(value)[axis]
    return found


def _is_kernel(value: ir.Value, model: ir.Model) -> bool:
    """An initializer, as it is or transposed."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Transpose" else value
    return source is not None and source.name in model.graph.initializers


@pytest.mark.parametrize("round_to", [4, 8, 16])
@pytest.mark.parametrize("name", NETS)
def test_kernels_read_and_make_multiples_of_the_grid(name: str, round_to: int) -> None:
    graph = _lifted(name)
    before = _channels(graph.model)
    for how in ("plan", "uniform", "expand"):
        made = mg.uniform(graph, 0.55, round_to=round_to)
        if how == "plan":
            made = mg.plan(graph, {"flops": "60%"}, round_to=round_to)
        elif how == "expand":
            small = mg.uniform(graph, 0.3, round_to=round_to)
            made = mg.expand(graph, small, {"flops": "170%"}, round_to=round_to)
        assert made.groups
        after = _channels(mg.apply(graph, made, verify=False))
        changed = {where for where in before if after[where] != before[where]}
        assert changed
        assert {after[where] % round_to for where in changed} == {0}


def test_heads_and_positions_of_grouped_convolutions_need_no_grid_of_their_own() -> None:
    for name, unit in (("heads of 8", 8), ("32 groups of 4", 32)):
        graph = _lifted(name)
        free = [group for group in graph.groups if group.resizable]
        assert {int(tensor_channels(graph)[group.index]) for group in free} == {unit}
        lowest = WidthBounds(8).lowest(graph)
        assert [lowest[group.index] for group in free] == [1] * len(free)


def test_a_grid_that_no_number_of_units_meets_takes_the_nearest() -> None:
    graph = _lifted("normalization groups of 12")
    for round_to in (32, 64, 80):  # of 96 channels, in steps of 12
        made = mg.plan(graph, {"flops": "85%"}, round_to=round_to)
        wanted = range(round_to, 97, round_to)
        nearest = {min(range(12, 97, 12), key=lambda c: abs(c - n)) for n in wanted}
        channels = {12 * len(entry.positions) for entry in made.groups.values()}
        assert channels
        assert channels <= nearest
    with pytest.raises(BudgetError):  # channels of their own, and fewer than the grid
        mg.plan(graph, {"flops": "60%"}, round_to=96)


def test_the_floor_counts_channels_of_tensors_too() -> None:
    graph = _lifted("normalization groups of 12")
    lowest = WidthBounds(min_width=30).lowest(graph)
    assert [12 * lowest[group.index] for group in graph.groups if group.resizable] == [36, 36]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
def test_a_grid_is_every_multiple_or_the_nearest_to_each(
    round_to: int, unit: int, width: int
) -> None:
    """By enumeration: multiples of both if there are smaller ones, else nearest to multiples."""
    grid = Grid.of(round_to, unit, width)
    widths = range(1, width + 1)
    on = {w for w in widths if grid.at_most(w) == w}
    exact = {w for w in widths if w * unit % round_to == 0}
    if min(exact, default=width) < width or width == 1 or round_to >= unit * width:
        assert on == exact
    else:
        multiples = range(round_to, unit * width + 1, round_to)
        distances = [{w: abs(w * unit - each) for w in widths} for each in multiples]
        nearest = {w for d in distances for w in widths if d[w] == min(d.values())}
        smaller = on - {width}
        assert smaller  # something smaller is left
        assert smaller <= nearest if min(nearest) < width else smaller == {width - 1}
    for w in widths:
        assert grid.at_most(w) == max((k for k in on if k <= w), default=0)
        assert grid.at_least(w) == min((k for k in on if k >= w), default=grid.at_least(w))
        assert grid.between(1, w).tolist() == sorted(k for k in on if k <= w)
        here = grid.nearest(w)
        assert all(abs(here - w) <= abs(k - w) for k in on | {0})


def test_a_smaller_budget_keeps_fewer_on_any_grid() -> None:
    graph = _lifted("heads of 8")
    flops = cost(graph, "flops")
    for round_to in (3, 8, 12, 24):
        before = graph.widths
        for share in (0.9, 0.7, 0.5):
            made = mg.plan(graph, {"flops": f"{share:.0%}"}, round_to=round_to)
            widths = made.widths(graph)
            assert flops.at(widths) <= share * flops.total
            assert (widths <= before).all()
            before = widths
