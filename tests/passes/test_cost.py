"""Costs against MorphNet's printed numbers, torch's counter, closed forms, finite differences."""

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.cost import DEVICES, cost
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text

OPSET = '<ir_version: 10, opset_import: ["": 20]>'
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
    graph = lift(model_from_text(OPSET + CONCAT), pin_outputs=False)
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
    graph = lift(model_from_text(OPSET + DEPTHWISE), pin_outputs=False)
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
    text = OPSET + "net (float[2,6] x, float[6,4] w, float[4,1] w2) => (float[2,1] y) {"
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
    graph = lift(model_from_text(OPSET + text + "{ y = Conv<group=4, pads=[1,1,1,1]>(x, w) }"))
    assert cost(graph, "flops").total == 2 * 64 * 64 * 8 * 9 == 589_824


def test_consumers_of_a_split_are_charged_their_part() -> None:
    """The original charges both with all 10 channels (149,760)."""
    text = """net (float[1,3,8,8] x, float[10,3,1,1] w0, float[20,3,3,3] w1, float[20,7,1,1] w2)
    => (float[1,20,8,8] y) <int64[2] parts = {3, 7}> {
        a = Conv(x, w0)  p, q = Split<axis=1>(a, parts)
        b = Conv<pads=[1,1,1,1]>(p, w1)  c = Conv(q, w2)  y = Add(b, c)
    }"""
    by_layer = cost(lift(model_from_text(OPSET + text)), "macs").by_layer
    assert by_layer["Conv_b"] == 64 * 20 * 3 * 9
    assert by_layer["Conv_c"] == 64 * 20 * 7


def test_convolution_transposed_counts_its_input_space() -> None:
    text = "net (float[1,6,5,5] x, float[6,4,3,3] w) => (float[1,4,11,11] y)"
    graph = lift(model_from_text(OPSET + text + "{ y = ConvTranspose<strides=[2,2]>(x, w) }"))
    assert cost(graph, "macs").total == 25 * 6 * 4 * 9


def test_the_batch_is_not_counted() -> None:
    text = OPSET + "net (float[{n},3,8,8] x, float[4,3,3,3] w) => (float[{n},4,6,6] y)"
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
    graph = lift(model_from_text(OPSET + CHAIN))
    kernels = 6 * 3 * 9 + 5 * 6 * 9 + 4 * 5
    assert cost(graph, "params").total == kernels + 3 * 6
    assert cost(graph, "params", convention="morphnet").total == kernels
    assert cost(graph, "weight_bytes").total == 4 * (kernels + 5 * 6)
    maps = 3 * 64 + 3 * 6 * 36 + 2 * 5 * 16 + 4 * 16
    assert cost(graph, "memory").total == 4 * maps
    assert cost(graph, "peak").total == 4 * 2 * 6 * 36


def test_peak_memory_is_the_largest_sum_alive_at_once() -> None:
    """Brute force over the topological order, at several widths."""
    graph = lift(model_from_text(OPSET + CHAIN))
    peak = cost(graph, "peak")
    free = [group.index for group in graph.groups if group.resizable]
    for a, b in ((6, 5), (1, 5), (6, 1), (2, 3)):
        at = graph.widths.copy()
        at[free] = a, b
        sizes = [3 * 64, a * 36, a * 36, a * 36, b * 16, b * 16, 4 * 16]
        assert peak.at(at) == 4 * max(x + y for x, y in pairwise(sizes))


def test_latency_is_the_roofline() -> None:
    graph = lift(model_from_text(OPSET + CHAIN))
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
        assert cost(graph, "latency", device=device).total == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["macs", "params", "memory", "peak", "latency", "weight_bytes"])
def test_gradient_is_the_difference_of_one_channel(kind: str) -> None:
    """Costs are linear in each group that stands once in every term, so one channel tells all."""
    graph = lift(model_from_text(OPSET + CHAIN))
    function = cost(graph, kind)
    at = graph.widths - 1.0
    for index in range(len(graph.groups)):
        step = np.zeros(len(graph.groups))
        step[index] = 1e-3
        difference = (function.at(at + step) - function.at(at - step)) / 2e-3
        assert function.gradient(at)[index] == pytest.approx(difference, rel=1e-6, abs=1e-12)


def test_by_layer_adds_up() -> None:
    graph = lift(model_from_text(OPSET + CHAIN))
    for kind in ("macs", "params", "memory", "peak", "latency"):
        function = cost(graph, kind)
        assert sum(function.by_layer.values()) == pytest.approx(function.total, rel=1e-12)


def test_unknown_costs_and_devices_are_named() -> None:
    graph = lift(model_from_text(OPSET + CHAIN))
    with pytest.raises(UnsupportedError, match="cost 'joules' is unknown; use one of macs"):
        cost(graph, "joules")
    with pytest.raises(UnsupportedError, match="device 'abacus' is unknown; use one of K80"):
        cost(graph, "latency", device="abacus")


def test_dynamic_batch_counts_one_sample() -> None:
    model = model_from_text(OPSET + CHAIN)
    fixed = cost(lift(model), "macs").total
    assert model.graph.inputs[0].shape is not None
    model.graph.inputs[0].shape = ir.Shape(["batch", 3, 8, 8])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    model.graph.outputs[0].shape = ir.Shape(["batch", 4, 4, 4])
    assert cost(lift(model), "macs").total == fixed
