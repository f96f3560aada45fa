"""Costs against MorphNet's printed numbers, torch's counter, closed forms, finite differences."""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import morphgraph as mg
from morphgraph.arrays import FloatArray
from morphgraph.errors import ArgumentError, BudgetError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import DEVICES, Convention, cost
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text
from morphgraph.testing.examples import image, residual_cnn

THRESHOLD = 0.45

CONV1 = [0.8] * 7 + [0.2] * 6
CONV2 = [-0.7] * 11 + [0.1] * 12
CONV3 = [0.6] * 10 + [-0.3] * 19
CONV4 = [-0.5] * 17 + [-0.4] * 14
DW1 = [-0.3, -0.9, -0.9]
DW2 = [0.3] * 5 + [0.9] * 10 + [-0.1] * 8

# NHWC in the original, so that 17x19 is the space; SAME padding halves it at stride 2.
CONCAT = """net (float[1,3,17,19] x, float[13,3,7,5] w1, float[23,3,1,1] w2, float[29,36,3,3] w3,
    float[31,36,1,1] w4) => (float[1,29,9,10] y3, float[1,31,17,19] y4) {
    a = Conv<pads=[3,2,3,2]>(x, w1)  ra = Relu(a)  b = Conv(x, w2)  rb = Relu(b)
    c = Concat<axis=1>(ra, rb)
    d = Conv<strides=[2,2], pads=[1,1,1,1]>(c, w3)  y3 = Relu(d)
    e = Conv(c, w4)  y4 = Relu(e)
}"""
DEPTHWISE = """net (float[1,3,17,19] x, float[3,1,3,3] u1, float[13,3,7,5] w1, float[23,3,1,1] w2,
    float[23,1,5,5] u2, float[29,36,3,3] w3) => (float[1,29,9,10] y) {
    p = Conv<group=3, pads=[1,1,1,1]>(x, u1)  a = Conv<pads=[3,2,3,2]>(p, w1)
    b = Conv(x, w2)  q = Conv<group=23, pads=[2,2,2,2]>(b, u2)
    c = Concat<axis=1>(a, q)  y = Conv<strides=[2,2], pads=[1,1,1,1]>(c, w3)
}"""


def widths(graph: ChannelGraph, given: dict[str, float]) -> np.ndarray:
    """A number per group, by a producer's kernel; the present width for all others."""
    found = graph.widths.astype(np.float64)
    for kernel, number in given.items():
        found[group_of(graph, kernel)] = number
    return found


def group_of(graph: ChannelGraph, kernel: str) -> int:
    """The group that stands on a kernel's output axis."""
    (index,) = np.unique(graph.channel_group[graph.channels_at(kernel, 0)])
    return int(index)


def regularizer(
    graph: ChannelGraph, kind: str, alive: dict[str, float], strength: dict[str, float]
) -> float:
    """The inner product of marginal costs with the groups' summed strengths."""
    sums = np.zeros(len(graph.groups))
    for kernel, total in strength.items():
        sums[group_of(graph, kernel)] = total
    function = cost(graph, kind, convention="morphnet")
    return float(function.marginals(widths(graph, alive)) @ sums)


def alive(gammas: list[float]) -> float:
    return float((np.abs(gammas) > THRESHOLD).sum())


def strength(gammas: list[float]) -> float:
    return float(np.abs(gammas).sum())


def test_concat_network_of_morphnet() -> None:
    graph = lift(model_from_text(CONCAT), pin_outputs=False)
    gammas = {"w1": CONV1, "w2": CONV2, "w3": CONV3, "w4": CONV4}
    live = {name: alive(g) for name, g in gammas.items()}
    sums = {name: strength(g) for name, g in gammas.items()}
    assert list(live.values()) == [7, 11, 10, 17]
    flops = cost(graph, "flops", convention="morphnet")
    assert dict(flops.by_layer_at(widths(graph, live))) == {
        "Conv_a": 474_810,
        "Conv_b": 21_318,
        "Conv_d": 291_600,
        "Conv_e": 197_676,
    }
    assert flops.at(widths(graph, live)) == 985_404
    assert regularizer(graph, "flops", live, sums) == pytest.approx(1_410_376.4, abs=0.05)
    size = cost(graph, "params", convention="morphnet")
    assert size.at(widths(graph, live)) == 2_694
    assert regularizer(graph, "params", live, sums) == pytest.approx(4_569.8, abs=0.05)


def test_depthwise_network_of_morphnet() -> None:
    graph = lift(model_from_text(DEPTHWISE), pin_outputs=False)
    tied = np.maximum(np.abs(CONV2), np.abs(DW2))
    live = {
        "w1": alive(CONV1),
        "w2": float((tied > THRESHOLD).sum()),
        "w3": alive(CONV3),
    }
    assert live == {"w1": 7, "w2": 15, "w3": 10}
    flops = cost(graph, "flops", convention="morphnet")
    space, small = 2 * 17 * 19, 2 * 9 * 10
    assert dict(flops.by_layer_at(widths(graph, live))) == {
        "Conv_p": space * 9 * 3,
        "Conv_a": space * 35 * 7 * 3,
        "Conv_b": space * 15 * 3,
        "Conv_q": space * 25 * 15,
        "Conv_y": small * 9 * 10 * 22,
    }
    s = float(tied.sum())
    only = {"w1": strength(CONV1), "w2": s}
    silent = {"w1": 0.0, "w2": 0.0, "w3": 0.0}
    conv3 = small * 9 * (10 * (strength(CONV1) + s) + 22 * strength(CONV3))
    expected = space * 35 * 3 * 6.8 + space * 3 * s + space * 25 * 2 * s + conv3
    found = regularizer(graph, "flops", live, {**silent, **only, "w3": strength(CONV3)})
    assert found == pytest.approx(expected, rel=1e-12)


def test_matrix_products_of_morphnet() -> None:
    text = "net (float[2,6] x, float[6,4] w, float[4,1] w2) => (float[2,1] y) {"
    text += "a = MatMul(x, w)  ra = Relu(a)  b = MatMul(ra, w2)  y = Relu(b) }"
    graph = lift(model_from_text(text), pin_outputs=False)
    first, second = (
        int(graph.channel_group[graph.channels_at(name, 1)][0]) for name in ("w", "w2")
    )
    w = np.arange(24.0).reshape(6, 4)
    w2 = np.array([[21.0], [22.0], [23.0], [24.0]])
    strengths = [np.sqrt((kernel**2).mean(axis=0)) for kernel in (w, w2)]
    assert strengths[0] == pytest.approx([12.110601, 12.948616, 13.808210, 14.685594], abs=1e-6)
    assert strengths[1] == pytest.approx([22.527760], abs=1e-6)
    flops = cost(graph, "flops", convention="morphnet")
    for threshold, live, total, penalty in (
        (32, (0, 0), 0, 642.6363),
        (13, (2, 1), 28, 839.8534),
    ):
        assert tuple(int((s > threshold).sum()) for s in strengths) == live
        at, sums = graph.widths.astype(np.float64), np.zeros(len(graph.groups))
        at[[first, second]] = live
        sums[[first, second]] = [s.sum() for s in strengths]
        assert flops.at(at) == total
        assert float(flops.marginals(at) @ sums) == pytest.approx(penalty, abs=1e-4)


def test_grouped_convolution_is_not_overcounted() -> None:
    text = "net (float[1,32,8,8] x, float[64,8,3,3] w) => (float[1,64,8,8] y)"
    graph = lift(model_from_text(text + "{ y = Conv<group=4, pads=[1,1,1,1]>(x, w) }"))
    assert cost(graph, "flops").total == 2 * 64 * 64 * 8 * 9 == 589_824


def test_consumers_of_a_split_are_charged_their_part() -> None:
    """The original charges both with all 10 channels (149,760)."""
    text = """net (float[1,3,8,8] x, float[10,3,1,1] w0, float[20,3,3,3] w1, float[20,7,1,1] w2)
    => (float[1,20,8,8] y) <int64[2] parts = {3, 7}> {
        a = Conv(x, w0)  p, q = Split<axis=1>(a, parts)
        b = Conv<pads=[1,1,1,1]>(p, w1)  c = Conv(q, w2)  y = Add(b, c)
    }"""
    by_layer = cost(lift(model_from_text(text)), "macs").by_layer
    assert by_layer["Conv_b"] == 64 * 20 * 3 * 9
    assert by_layer["Conv_c"] == 64 * 20 * 7


def test_convolution_transposed_counts_its_input_space() -> None:
    text = "net (float[1,6,5,5] x, float[6,4,3,3] w) => (float[1,4,11,11] y)"
    graph = lift(model_from_text(text + "{ y = ConvTranspose<strides=[2,2]>(x, w) }"))
    assert cost(graph, "macs").total == 25 * 6 * 4 * 9


def test_the_batch_is_not_counted() -> None:
    text = "net (float[{n},3,8,8] x, float[4,3,3,3] w) => (float[{n},4,6,6] y)"
    graphs = [lift(model_from_text(text.format(n=n) + "{ y = Conv(x, w) }")) for n in (1, 7)]
    for kind in ("macs", "params", "memory", "peak", "weight_bytes"):
        assert cost(graphs[0], kind).total == cost(graphs[1], kind).total, kind


CHAIN = """net (float[1,3,8,8] x, float[6,3,3,3] w1, float[6] b1, float[6] s, float[6] h, float[6]
m,
    float[6] v, float[5,6,3,3] w2, float[4,5,1,1] w3) => (float[1,4,4,4] y) {
    a = Conv(x, w1, b1)  n = BatchNormalization(a, s, h, m, v)  r = Relu(n)
    b = Conv(r, w2)  rb = Relu(b)  y = Conv(rb, w3)
}"""


def test_parameters_and_bytes() -> None:
    graph = lift(model_from_text(CHAIN))
    kernels = 6 * 3 * 9 + 5 * 6 * 9 + 4 * 5
    assert cost(graph, "params").total == kernels + 3 * 6
    assert cost(graph, "params", convention="morphnet").total == kernels
    assert cost(graph, "weight_bytes").total == 4 * (kernels + 5 * 6)
    maps = 3 * 64 + 3 * 6 * 36 + 2 * 5 * 16 + 4 * 16
    assert cost(graph, "memory").total == 4 * maps
    assert cost(graph, "peak").total == 4 * 2 * 6 * 36


def test_text_counts_as_references() -> None:
    """Names of classes are results, too; how long they are, no type says."""
    text = """net (float[2,3] x, float[3,4] w) => (float[2,4] s, string[2] label)
    <string[4] names = {"ant", "bee", "cat", "dog"}> {
        s = MatMul(x, w)  i = ArgMax<axis=1, keepdims=0>(s)  label = Gather(names, i)
    }"""
    graph = lift(model_from_text(text))
    scores, place, reference = 4 * (3 + 4), 8, 8
    assert cost(graph, "memory").total == scores + place + reference
    assert cost(graph, "latency").total > 0


def test_peak_memory_is_the_largest_sum_alive_at_once() -> None:
    """Brute force over the topological order, at several widths."""
    graph = lift(model_from_text(CHAIN))
    peak = cost(graph, "peak")
    free = [group.index for group in graph.groups if group.resizable]
    for a, b in ((6, 5), (1, 5), (6, 1), (2, 3)):
        at = graph.widths.copy()
        at[free] = a, b
        sizes = [3 * 64, a * 36, a * 36, a * 36, b * 16, b * 16, 4 * 16]
        assert peak.at(at) == 4 * max(x + y for x, y in pairwise(sizes))


def test_latency_is_the_roofline() -> None:
    graph = lift(model_from_text(CHAIN))
    flops = [2 * 36 * 6 * 27, 2 * 16 * 5 * 54, 2 * 16 * 20]
    moved = [
        3 * 64 + 6 * 27 + 6 + 6 * 36,
        6 * 36 + 5 * 54 + 5 * 16,
        5 * 16 + 20 + 4 * 16,
    ]
    for device, (gflops, gbytes) in DEVICES.items():
        expected = sum(
            max(f / (gflops * 1e6), 4 * b / (gbytes * 1e6))
            for f, b in zip(flops, moved, strict=True)
        )
        assert cost(graph, f"latency@{device}").total == pytest.approx(expected, rel=1e-12)
        assert cost(graph, "latency", device=device).total == cost(graph, f"latency@{device}").total
    assert cost(graph, "latency").total == cost(graph, "latency@V100").total


def roofline_ms(net: nn.Module, example: torch.Tensor, device: str) -> float:
    """Every layer that multiplies, as it runs: its shapes as hooks see them."""
    gflops, gbytes = DEVICES[device]
    total = 0.0

    def add(module: Any, given: tuple[torch.Tensor], result: torch.Tensor) -> None:
        nonlocal total
        weights = sum(p.numel() for p in module.parameters())
        rows = result[:, 0].numel() if isinstance(module, nn.Conv2d) else 1
        flops = 2 * rows * module.weight.numel()
        moved = 4 * (given[0].numel() + weights + result.numel())
        total += 1e3 * max(flops / (gflops * 1e9), moved / (gbytes * 1e9))

    handles = [
        m.register_forward_hook(add) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    net(example)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("device", DEVICES)
def test_latency_of_a_network_whole_and_resized(device: str) -> None:
    example = image(1, 12, 12)
    net = residual_cnn((40, 24, 56)).eval()
    graph = mg.lift(mg.export(net, (example,)))
    latency = cost(graph, f"latency@{device}")
    assert latency.total == pytest.approx(roofline_ms(net, example, device), rel=1e-12)
    made = mg.plan(graph, {f"latency@{device}": "60%"})
    small = mg.to_torch(mg.apply(graph, made))
    (change,) = [c for kind, c in made.cost.items() if kind == f"latency@{device}"]
    assert change.after == pytest.approx(roofline_ms(small, example, device), rel=1e-12)
    assert change.after <= 0.6 * change.before


SUMS = (
    {"flops": 1.0, "params": 20.0},
    {"macs": 0.5, "peak": 3.0, "latency@P100": 1e6},
    {"latency@K80": 2.0, "latency": 1.0},
)


@pytest.mark.parametrize("weights", SUMS)
@pytest.mark.parametrize("convention", ["default", "morphnet"])
def test_a_weighted_sum_is_the_sum(weights: dict[str, float], convention: Convention) -> None:
    graph = lift(model_from_text(DEPTHWISE), pin_outputs=False)
    whole = cost(graph, weights, convention=convention)
    parts = {kind: cost(graph, kind, convention=convention) for kind in weights}
    generator = np.random.default_rng(0)
    for at in (graph.widths, *(generator.integers(1, graph.widths + 1) for _ in range(5))):
        for method in ("at", "polynomial", "gradient", "marginals"):
            expected = sum(w * getattr(parts[kind], method)(at) for kind, w in weights.items())
            assert getattr(whole, method)(at) == pytest.approx(expected, rel=1e-12), method
        for layer, found in whole.by_layer_at(at).items():
            expected = sum(
                w * parts[kind].by_layer_at(at).get(layer, 0.0) for kind, w in weights.items()
            )
            assert found == pytest.approx(expected, rel=1e-12)
    assert whole.total == whole.at(graph.widths)
    assert cost(graph, whole.kind, convention=convention) is whole
    units = {part.unit for part in parts.values()}
    assert whole.unit == ("ms" if units == {"ms"} else "mixed units")


def test_a_weighted_sum_is_a_target() -> None:
    graph = mg.lift(mg.export(residual_cnn().eval(), (image(),)))
    kind = "flops+20*params"
    flops, params = cost(graph, "flops"), cost(graph, "params")
    half = mg.plan(graph, {kind: "50%"})
    wide = mg.expand(graph, half, {"flops + 20 * params": "80%"})
    for made, share in ((half, 0.5), (wide, 0.8), (mg.uniform(graph, budget={kind: "30%"}), 0.3)):
        after = flops.at(made.widths(graph)) + 20 * params.at(made.widths(graph))
        assert made.cost[kind].after == after
        assert 0.9 * share < after / (flops.total + 20 * params.total) <= share
    with pytest.raises(BudgetError, match=r"flops\+20\*params=10 cannot be met.*mixed units"):
        mg.plan(graph, {kind: 10})


def test_the_regularizer_of_a_weighted_sum_is_the_sum() -> None:
    net = residual_cnn()
    graph = mg.lift(mg.export(net, (image(),)))
    flops, params, both = (
        mg.Regularizer(graph, net, cost=kind) for kind in ("flops", "params", "flops+20*params")
    )
    expected = flops.value().item() + 20 * params.value().item()
    assert both.value().item() == pytest.approx(expected, rel=1e-6)
    budget = mg.Budget(both, {"flops+20*params": "40%"}, steps=10)
    assert budget.target == 0.4


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flops+", "cannot be read"),
        ("flops params", "cannot be read"),
        ("2**flops", "cannot be read"),
        ("", "cannot be read"),
        ("flops-params", "cannot be read"),
        ("flops+joules", "cost 'joules' is unknown"),
        ("flops@P100", "only a latency is of a device; write flops"),
        ("latency@abacus", "device 'abacus' is unknown; use one of K80"),
        ("latency@", "device '' is unknown"),
        ("flops+2*flops", "each of them once"),
        ("0*flops", "weight 0; give a number above 0"),
        ({"flops": -1.0}, "weight -1; give a number above 0"),
        ({"flops": float("nan")}, "weight nan; give a number above 0"),
        ({}, "one part at least"),
    ],
)
def test_sums_that_make_no_sense_are_refused(kind: str | dict[str, float], message: str) -> None:
    graph = lift(model_from_text(CHAIN))
    with pytest.raises(ArgumentError, match=re.escape(message)):
        cost(graph, kind)


@pytest.mark.parametrize("text", ["1e+3*flops+.5*params", " 1000 *flops+ 5E-1*params "])
def test_numbers_in_a_sum(text: str) -> None:
    graph = lift(model_from_text(CHAIN))
    assert cost(graph, text).kind == "1000*flops+0.5*params"


@pytest.mark.parametrize("kind", ["macs", "params", "memory", "peak", "latency", "weight_bytes"])
def test_gradient_is_the_difference_of_one_channel(kind: str) -> None:
    """Costs are linear in each group that stands once in every term, so one channel tells all."""
    graph = lift(model_from_text(CHAIN))
    function = cost(graph, kind)
    at: FloatArray = graph.widths.astype(np.float64) - 1.0
    for index in range(len(graph.groups)):
        step = np.zeros(len(graph.groups))
        step[index] = 1e-3
        difference = (function.at(at + step) - function.at(at - step)) / 2e-3
        assert function.gradient(at)[index] == pytest.approx(difference, rel=1e-6, abs=1e-12)


def test_by_layer_adds_up() -> None:
    graph = lift(model_from_text(CHAIN))
    for kind in ("macs", "params", "memory", "peak", "latency"):
        function = cost(graph, kind)
        assert sum(function.by_layer.values()) == pytest.approx(function.total, rel=1e-12)


def test_unknown_costs_and_devices_are_named() -> None:
    graph = lift(model_from_text(CHAIN))
    with pytest.raises(UnsupportedError, match="cost 'joules' is unknown; use one of macs"):
        cost(graph, "joules")
    with pytest.raises(UnsupportedError, match="device 'abacus' is unknown; use one of K80"):
        cost(graph, "latency", device="abacus")


def test_dynamic_batch_counts_one_sample() -> None:
    model = model_from_text(CHAIN)
    fixed = cost(lift(model), "macs").total
    assert model.graph.inputs[0].shape is not None
    model.graph.inputs[0].shape = ir.Shape(["batch", 3, 8, 8])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    model.graph.outputs[0].shape = ir.Shape(["batch", 4, 4, 4])
    assert cost(lift(model), "macs").total == fixed
