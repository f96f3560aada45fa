"""The laws that hold for every network, tried on random ones.

Each network is a random DAG of convolutions (dense, grouped, depthwise), norms, adds, gates,
concats, splits, shuffles, slices and pools with felt weights, on 4x4 maps of a few channels; every
tensor that nothing reads ends in the head.
"""

from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from morphgraph.errors import BudgetError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.dependence import dependence
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.compose import Provenance
from morphgraph.passes.planning.expand import expand
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.uniform import uniform
from morphgraph.passes.rewrite.absorb import absorb
from morphgraph.passes.rewrite.mask import mask
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import structure_hash
from morphgraph.testing import random_plan, random_removal, random_weight
from morphgraph.workflow import apply

LAWS = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FEWER = settings(LAWS, max_examples=50)
MANY = settings(LAWS, max_examples=200)
SIZE = 4


@dataclass
class Net:
    """A network that grows node by node; every tensor is ``[1, C, 4, 4]`` until the head."""

    seed: int
    nodes: list[ir.Node] = field(default_factory=list)
    weights: list[ir.Value] = field(default_factory=list)
    unread: dict[str, ir.Value] = field(default_factory=dict)
    tensors: list[ir.Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(self.seed)
        self.input = ir.val("x", ir.DataType.FLOAT, [1, 3, SIZE, SIZE])

    def weight(self, *shape: int) -> ir.Value:
        return self.constant(random_weight(shape, self.generator))

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"w{len(self.weights)}"
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.weights.append(value)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, dtype=np.int64))

    def node(
        self, op_type: str, inputs: list[ir.Value], *shapes: tuple[int, ...], **attributes: Any
    ) -> list[ir.Value]:
        outputs = [
            ir.val(f"t{len(self.nodes)}_{k}", ir.DataType.FLOAT, list(shape))
            for k, shape in enumerate(shapes)
        ]
        self.nodes.append(
            ir.node(op_type, inputs, attributes, outputs=outputs, name=f"n{len(self.nodes)}")
        )
        for value in inputs:
            self.unread.pop(value.name or "", None)
        self.unread.update((value.name or "", value) for value in outputs)
        return outputs

    def add(
        self, op_type: str, inputs: list[ir.Value], *channels: int, **attributes: Any
    ) -> ir.Value:
        """A node whose results have these channels; the first of them is returned."""
        shapes = [(1, c, SIZE, SIZE) for c in channels]
        made = self.node(op_type, inputs, *shapes, **attributes)
        self.tensors += made
        return made[0]

    def conv(self, x: ir.Value, out: int, kernel: int = 1, group: int = 1) -> ir.Value:
        pad = kernel // 2
        weight = self.weight(out, width(x) // group, kernel, kernel)
        inputs = [x, weight, self.weight(out)]
        return self.add("Conv", inputs, out, group=group, pads=[pad] * 4)

    def model(self) -> ir.Model:
        """Close the network: everything unread goes through a linear layer into one sum."""
        total: ir.Value | None = None
        for k, value in enumerate(list(self.unread.values())):
            channels = width(value)
            if k % 2:
                (pooled,) = self.node("GlobalAveragePool", [value], (1, channels, 1, 1))
                features = channels
            else:
                pooled, features = value, channels * SIZE * SIZE
            (flat,) = self.node("Flatten", [pooled], (1, features), axis=1)
            weight = self.weight(5, features)
            (head,) = self.node("Gemm", [flat, weight, self.weight(5)], (1, 5), transB=1)
            total = head if total is None else self.node("Add", [total, head], (1, 5))[0]
        assert total is not None
        total.name = "y"
        graph = ir.Graph(
            [self.input],
            [total],
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": 20},
            name="net",
        )
        return ir.Model(graph, ir_version=10)


def width(value: ir.Value) -> int:
    return static_shape(value)[1]


def _conv(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    net.conv(x, draw(st.integers(2, 8)), draw(st.sampled_from([1, 3])))


def _grouped(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    groups = [g for g in range(2, width(x) + 1) if width(x) % g == 0]
    if groups:
        group = draw(st.sampled_from(groups))
        net.conv(x, group * draw(st.integers(1, 3)), 1, group)


def _depthwise(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    net.conv(x, width(x) * draw(st.integers(1, 2)), 3, width(x))


def _norm(net: Net, x: ir.Value, _draw: st.DrawFn) -> None:
    inputs = [x, *(net.weight(width(x)) for _ in range(4))]
    net.add("BatchNormalization", inputs, width(x))


def _activate(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    net.add(draw(st.sampled_from(["Relu", "Sigmoid", "Tanh"])), [x], width(x))


def _combine(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    alike = [t for t in net.tensors if width(t) == width(x) and t is not x]
    other = draw(st.sampled_from(alike)) if alike else net.conv(x, width(x))
    net.add(draw(st.sampled_from(["Add", "Mul"])), [x, other], width(x))


def _concat(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    others = draw(st.lists(st.sampled_from(net.tensors), min_size=1, max_size=2))
    parts = [x, *others]
    if sum(map(width, parts)) <= 24:
        net.add("Concat", parts, sum(map(width, parts)), axis=1)


def _split(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    if width(x) >= 2:
        first = draw(st.integers(1, width(x) - 1))
        sizes = (first, width(x) - first)
        net.add("Split", [x, net.ints(*sizes)], *sizes, axis=1)


def _shuffle(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    groups = [g for g in range(2, width(x)) if width(x) % g == 0]
    if groups:
        g = draw(st.sampled_from(groups))
        c = width(x) // g
        five = net.node("Reshape", [x, net.ints(1, g, c, SIZE, SIZE)], (1, g, c, SIZE, SIZE))
        turned = net.node("Transpose", five, (1, c, g, SIZE, SIZE), perm=[0, 2, 1, 3, 4])
        net.add("Reshape", [*turned, net.ints(1, -1, SIZE, SIZE)], width(x))


def _slice(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    step = draw(st.sampled_from([1, 2, -1]))
    start = draw(st.integers(0, width(x) - 1))
    stop = -(2**63) + 1 if step < 0 else width(x)
    size = len(range(width(x))[start : None if step < 0 else stop : step])
    bounds = [net.ints(start), net.ints(stop), net.ints(1), net.ints(step)]
    net.add("Slice", [x, *bounds], size)


def _gather(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    order = draw(st.permutations(range(width(x))))
    net.add("Gather", [x, net.ints(*order)], width(x), axis=1)


def _pad(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    before, after = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    pads = net.ints(0, before, 0, 0, 0, after, 0, 0)
    net.add("Pad", [x, pads], width(x) + before + after)


def _pool(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    kind = draw(st.sampled_from(["MaxPool", "AveragePool"]))
    net.add(kind, [x], width(x), kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def _gate(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    (pooled,) = net.node("GlobalAveragePool", [x], (1, width(x), 1, 1))
    weight = net.weight(width(x), width(x), 1, 1)
    (gate,) = net.node("Conv", [pooled, weight], (1, width(x), 1, 1))
    (soft,) = net.node("Sigmoid", [gate], (1, width(x), 1, 1))
    net.add("Mul", [x, soft], width(x))


def _recur(net: Net, x: ir.Value, draw: st.DrawFn) -> None:
    """The image, row by row, through a recurrent layer."""
    kind, gates = draw(st.sampled_from([("LSTM", 4), ("GRU", 3), ("RNN", 1)]))
    units, directions = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    channels, steps, rows = width(x), SIZE * SIZE, gates * units
    (flat,) = net.node("Reshape", [x, net.ints(1, channels, steps)], (1, channels, steps))
    (turned,) = net.node("Transpose", [flat], (steps, 1, channels), perm=[2, 0, 1])
    weights = [net.weight(directions, rows, size) for size in (channels, units)]
    weights += [net.weight(directions, 2 * rows)] if draw(st.booleans()) else []
    way = "bidirectional" if directions == 2 else draw(st.sampled_from(["forward", "reverse"]))
    shape = steps, directions, 1, units
    (y,) = net.node(kind, [turned, *weights], shape, hidden_size=units, direction=way)
    (beside,) = net.node("Transpose", [y], (1, directions, units, steps), perm=[2, 1, 3, 0])
    image = net.ints(1, directions * units, SIZE, SIZE)
    net.add("Reshape", [beside, image], directions * units)


STEPS = (
    *(_conv, _conv, _conv, _grouped, _depthwise, _norm, _activate, _combine, _combine, _concat),
    *(_split, _shuffle, _slice, _gather, _pad, _pool, _gate, _recur),
)


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    net = Net(draw(st.integers(0, 2**16)))
    net.conv(net.input, draw(st.integers(2, 8)), 3)
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=9)):
        recent = net.tensors[-4:]
        step(net, draw(st.sampled_from(recent)), draw)
    return net.model()


def check_laws(model: ir.Model) -> None:
    graph = lift(model)
    free = [group for group in graph.groups if group.resizable and group.width > 1]
    _check_gradient(graph)
    _check_identity_of_lifts(model, graph)
    if not free:
        return
    chosen = random_plan(graph, seed=1)
    small = resize(graph, chosen.keep_channels(graph))
    report = verify(graph, chosen, small)
    assert report.ok, report.worst
    again = lift(small)
    for kind in ("macs", "params", "memory", "peak"):
        predicted = cost(graph, kind).at(chosen.widths(graph))
        assert cost(again, kind).total == predicted, kind
    if chosen.widths(graph).min() > 1:  # an axis of 1 stands for no channel, it broadcasts
        assert [(g.id, g.name) for g in again.groups] == [(g.id, g.name) for g in graph.groups]
        assert again.widths.tolist() == chosen.widths(graph).tolist()
    _check_budget(graph)


def _check_gradient(graph: ChannelGraph) -> None:
    """The gradient is the central difference, exactly where the cost is at most quadratic."""
    for kind in ("macs", "params", "memory"):
        function = cost(graph, kind)
        gradient = function.gradient(graph.widths)
        for index in range(len(graph.groups)):
            step = np.zeros(len(graph.groups))
            step[index] = 1e-3
            widths = graph.widths.astype(np.float64)
            difference = (function.at(widths + step) - function.at(widths - step)) / 2e-3
            assert abs(difference - gradient[index]) <= 1e-6 * max(1.0, function.total)


def _check_identity_of_lifts(model: ir.Model, graph: ChannelGraph) -> None:
    again = lift(ir.to_proto(model))
    assert structure_hash(again) == structure_hash(graph)
    assert [(g.id, g.name, g.width, g.reason) for g in again.groups] == [
        (g.id, g.name, g.width, g.reason) for g in graph.groups
    ]


def _check_budget(graph: ChannelGraph) -> None:
    function = cost(graph, "macs")
    floor = np.array([1 if group.resizable else group.width for group in graph.groups])
    lowest = function.at(floor)
    limit = lowest + 0.4 * (function.total - lowest)
    loose = lowest + 0.8 * (function.total - lowest)
    tight, wide = (
        plan(graph, {"macs": amount}, score="l2", round_to=1) for amount in (limit, loose)
    )
    on_grid = plan(graph, {"macs": limit}, score="l2")
    assert function.at(on_grid.widths(graph)) <= limit
    assert function.at(tight.widths(graph)) <= limit
    assert function.at(wide.widths(graph)) <= loose
    kept, kept_wide = tight.keep_channels(graph), wide.keep_channels(graph)
    for index, group in enumerate(graph.groups):
        everything = np.arange(group.width)
        inner, outer = kept.get(index, everything), kept_wide.get(index, everything)
        assert np.isin(inner, outer).all()


@pytest.mark.filterwarnings("ignore:the plan changes nothing")
@LAWS
@given(networks())
def test_laws(model: ir.Model) -> None:
    check_laws(model)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the plan changes nothing")
@MANY
@given(networks())
def test_all_laws_of_many_networks(model: ir.Model) -> None:
    check_laws(model)
    check_removal(model)
    check_absorption(model)


def check_removal(model: ir.Model) -> None:
    """Groups die at random, where a network is left: it is the masked one, at the stated cost."""
    graph = lift(model)
    for seed in (1, 2):
        chosen = random_removal(graph, seed, deaths=0.5)
        if not (chosen.widths(graph) == 0).any():
            continue
        small = resize(graph, chosen.keep_channels(graph))
        report = verify(graph, chosen, small)
        assert report.ok, report.worst
        again = lift(small)
        for kind in ("macs", "flops", "params"):
            predicted = cost(graph, kind).at(chosen.widths(graph))
            assert cost(again, kind).total == predicted, kind
        for kind in ("memory", "weight_bytes"):  # upper bounds: sums may go as well
            assert cost(again, kind).total <= cost(graph, kind).at(chosen.widths(graph)), kind


@FEWER
@given(networks())
def test_laws_of_removal(model: ir.Model) -> None:
    check_removal(model)


@pytest.mark.filterwarnings("ignore::morphgraph.errors.MorphWarning")
@settings(LAWS, max_examples=15)
@given(networks())
def test_laws_of_budgets_without_a_floor(model: ir.Model) -> None:
    """Where layers may vanish to meet a budget: what is fed by a dead arm alone goes with it."""
    graph = lift(model)
    for unit, share in (("macs", "30%"), ("params", "10%")):
        try:
            chosen = plan(graph, {unit: share}, min_width=0, round_to=1)
        except BudgetError:
            continue
        small = resize(graph, chosen.keep_channels(graph))
        report = verify(graph, chosen, small)
        assert report.ok, report.worst
        again = lift(small)
        for kind in ("macs", "params"):
            assert cost(again, kind).total == cost(graph, kind).at(chosen.widths(graph)), kind


@pytest.mark.filterwarnings("ignore::morphgraph.errors.MorphWarning")
@settings(LAWS, max_examples=8)
@given(networks())
def test_laws_of_growth_after_growth(model: ir.Model) -> None:
    """Shrunk and grown three times, product axes among them: one plan says the same."""
    graph = lift(model)
    provenance, feeds = Provenance.of(graph), random_inputs(graph.model, 1)
    for seed in (1, 2, 3):
        current = provenance.graph
        frozen = provenance.frozen_groups()
        # The original's channels stay before new ones: a plan cannot say that new ones alone do.
        scores = np.random.default_rng(seed).random(len(current.channel_group))
        scores += provenance.origin >= 0
        narrow = uniform(current, 0.6, score=scores, round_to=1)
        wide = expand(current, narrow, {"macs": "150%"}, exclude=frozen, round_to=1)
        step = apply(current, wide, verify=False)
        whole = apply(graph, provenance.compose(wide, {}), verify=False)
        widths = [{g.name: g.width for g in lift(made).groups} for made in (step, whole)]
        assert widths[0] == widths[1]
        one, other = (run(made, feeds)["y"] for made in (step, whole))
        assert np.abs(one - other).max() <= 1e-4 * max(1.0, np.abs(one).max())
        provenance = provenance.after(wide, lift(step))


def silenced(model: ir.Model, seed: int) -> ir.Model:
    """The network with about a third of the slices of every weight set to zero."""
    generator = np.random.default_rng(seed)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        if array.dtype == np.float32:
            array[generator.random(len(array)) < 0.3] = 0.0
            value.const_value = ir.Tensor(array, name=value.name)
    return model


def check_absorption(model: ir.Model) -> None:
    """What is constant is the same for all inputs, and moves without a change of the function."""
    graph = lift(silenced(model, 1))
    _check_dependence(graph)
    for chosen in (random_plan(graph, 3), random_removal(graph, 4)):
        if not chosen.groups:
            continue
        moved = absorb(graph, chosen.keep_channels(graph))
        small = resize(graph, chosen.keep_channels(graph), absorbed=moved)
        report = verify(graph, chosen, small)
        assert report.ok, report.worst
        for kind in ("macs", "params"):
            assert cost(lift(small), kind).total == cost(graph, kind).at(chosen.widths(graph))


def _check_dependence(graph: ChannelGraph) -> None:
    depends = dependence(graph)
    traced = graph.model.clone()
    made = [v for node in traced.graph for v in node.outputs if not v.is_graph_output()]
    traced.graph.outputs.extend(made)
    runs = [run(traced, random_inputs(graph.model, seed)) for seed in range(3)]
    for value in made:
        name = value.name or ""
        differs = np.any([runs[0][name] != other[name] for other in runs[1:]], axis=0)
        for axis, flags in enumerate(depends[name]):
            seen = differs.any(axis=tuple(a for a in range(differs.ndim) if a != axis))
            assert not (seen & ~flags).any(), (name, axis)


@FEWER
@given(networks())
def test_laws_of_absorption(model: ir.Model) -> None:
    check_absorption(model)


def with_hostile_names(model: ir.Model, seed: int) -> ir.Model:
    """The network with about half of its values named as the program would name what it makes."""
    graph = lift(model)
    generator = np.random.default_rng(seed)
    own = set(_names(graph.model))
    made_up: set[str] = set()
    for chosen in (random_plan(graph, 1), random_removal(graph, 1, deaths=0.5)):
        keep = chosen.keep_channels(graph)
        moved = absorb(graph, keep)
        for made in (resize(graph, keep), resize(graph, keep, absorbed=moved), mask(graph, keep)):
            made_up.update(_names(made))
    names = sorted(made_up - own)
    values = [
        *model.graph.initializers.values(),
        *(v for node in model.graph for v in node.outputs),
    ]
    chosen_values = [v for v in values if not v.is_graph_output() and generator.random() < 0.5]
    for value, name in zip(chosen_values, generator.permutation(names).tolist()):
        value.name = name
    return model


def _names(model: ir.Model) -> list[str]:
    values = [
        *model.graph.initializers.values(),
        *(v for node in model.graph for v in node.outputs),
    ]
    return [value.name for value in values if value.name]


@pytest.mark.filterwarnings("ignore:the plan changes nothing")
@settings(LAWS, max_examples=25)
@given(networks(), st.integers(0, 2**16))
def test_laws_whatever_values_are_called(model: ir.Model, seed: int) -> None:
    """Names that a rewrite makes up may be taken: results are valid, and right in ONNX Runtime."""
    graph = lift(with_hostile_names(silenced(model, 1), seed))
    onnx.checker.check_model(ir.to_proto(graph.model))
    for chosen in (random_plan(graph, 1), random_removal(graph, 1, deaths=0.5)):
        keep = chosen.keep_channels(graph)
        for moved in (None, absorb(graph, keep)):
            small = resize(graph, keep, absorbed=moved)
            onnx.checker.check_model(ir.to_proto(small))
            report = verify(graph, chosen, small)
            assert report.by == "ONNX Runtime"
            assert report.ok, report.worst


def test_gcd_of_group_counts() -> None:
    """A convolution of a groups that feeds one of b: gcd of the group sizes channels per group."""
    for a, b in ((2, 3), (4, 6), (2, 4)):
        channels = 24
        net = Net(0)
        stem = net.conv(net.input, channels)
        first = net.conv(stem, channels, 1, a)
        net.conv(first, channels, 1, b)
        widths = [group.width for group in lift(net.model()).groups if group.resizable]
        assert widths[1] == gcd(channels // a, channels // b)
