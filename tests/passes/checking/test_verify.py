"""The proof itself: right resizes pass, every kind of wrong one is refused."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.arrays import IntArray
from morphgraph.edit import array_of
from morphgraph.errors import ModelError, MorphWarning, PlanError, VerificationError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import checker_refusal
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.checking.verify import require_valid, verify
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.mask import mask
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan, make_plan
from morphgraph.testing import is_rejected, model_from_text, random_plan
from morphgraph.tolerances import RESIZED

RESIDUAL = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6] b1, float[6,6,3,3] w2, float[6] b2,
    float[2,6,1,1] w3) => (float[1,2,4,4] y) {
    a = Conv(x, w1, b1)  ra = Relu(a)  b = Conv<pads=[1,1,1,1]>(ra, w2, b2)  c = Add(ra, b)
    rc = Relu(c)  y = Conv(rc, w3)
}"""
SHUFFLE = """net (float[1,3,4,4] x, float[12,3,1,1] w1, float[2,12,1,1] w2) => (float[1,2,4,4] y)
<int64[5] five = {1, 3, 4, 4, 4}, int64[4] four = {1, 12, 4, 4}> {
    a = Conv(x, w1)  r = Reshape(a, five)  t = Transpose<perm=[0,2,1,3,4]>(r)  s = Reshape(t, four)
    y = Conv(s, w2)
}"""
SPLIT = """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2,4,1,1] w2, float[2,4,1,1] w3)
=> (float[1,2,4,4] y) {
    a = Conv(x, w1)  p, q = Split<axis=1, num_outputs=2>(a)  b = Conv(p, w2)  g = Sigmoid(q)
    c = Conv(g, w3)  y = Add(b, c)
}"""
GATHER = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[1,2,4,4] y)
<int64[6] order = {4, 0, 5, 2, 1, 3}> {
    a = Conv(x, w1)  b = Gather<axis=1>(a, order)  y = Conv(b, w2)
}"""
NORM = """net (float[2,5,3] x, float[3,8] w1, float[8] s, float[8] h, float[8,2] w2) =>
(float[2,5,2] y) {
    a = MatMul(x, w1)  n = LayerNormalization(a, s, h)  y = MatMul(n, w2)
}"""


def of_text(text: str) -> ChannelGraph:
    return lift(model_from_text(text))


def only_group(graph: ChannelGraph) -> int:
    (group,) = [group for group in graph.groups if group.resizable]
    return group.index


def planned(graph: ChannelGraph, keep: dict[int, IntArray]) -> tuple[Plan, ir.Model]:
    return make_plan(graph, keep, {}), resize(graph, keep)


def give(model: ir.Model, name: str, array: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.Tensor(np.ascontiguousarray(array), name=name)


def array(graph: ChannelGraph, name: str) -> np.ndarray:
    tensor = graph.model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_a_dropped_tie_is_refused() -> None:
    """The second producer of a residual sum keeps other channels than the first."""
    graph = of_text(RESIDUAL)
    kept, other = np.array([0, 1, 4]), np.array([0, 2, 5])
    plan, small = planned(graph, {only_group(graph): kept})
    assert verify(graph, plan, small).worst.relative < 1e-6
    give(small, "w2", array(graph, "w2")[other][:, kept])
    give(small, "b2", array(graph, "b2")[other])
    assert is_rejected(graph, plan, small)


def test_a_bias_left_behind_is_refused() -> None:
    graph = of_text(RESIDUAL)
    kept = np.array([0, 1, 4])
    plan, small = planned(graph, {only_group(graph): kept})
    give(small, "b2", array(graph, "b2")[:3])
    assert is_rejected(graph, plan, small)


def _swap_shuffle(small: ir.Model) -> None:
    (node,) = [n for n in small.graph if n.name == "Reshape_r"]
    assert node.inputs[1] is not None
    give(small, node.inputs[1].name or "", np.array([1, 2, 3, 4, 4], dtype=np.int64))


def _swap_split(small: ir.Model) -> None:
    (node,) = [n for n in small.graph if n.op_type == "Split"]
    assert node.inputs[1] is not None
    sizes = array_of(node.inputs[1])
    assert sizes[0] != sizes[1]
    give(small, node.inputs[1].name or "", sizes[::-1])


def _roll_gather(small: ir.Model) -> None:
    (node,) = [n for n in small.graph if n.op_type == "Gather"]
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    give(small, value.name or "", np.roll(value.const_value.numpy(), 1))


def _swap_outputs(small: ir.Model) -> None:
    first, second = (n for n in small.graph if n.name in ("Conv_b", "Sigmoid_g"))
    left, right = first.inputs[0], second.inputs[0]
    first.replace_input_with(0, right)
    second.replace_input_with(0, left)


@pytest.mark.parametrize(
    ("text", "widths", "fault"),
    [
        (SHUFFLE, {0: [0, 2]}, _swap_shuffle),
        (SPLIT, {0: [0, 3], 1: [0, 1, 3]}, _swap_split),
        (SPLIT, {0: [0, 3], 1: [0, 1]}, _swap_outputs),
        (GATHER, {0: [0, 2, 3, 5]}, _roll_gather),
    ],
)
def test_a_wrong_constant_or_wire_is_refused(
    text: str, widths: dict[int, list[int]], fault: Callable[[ir.Model], None]
) -> None:
    graph = of_text(text)
    free = [group.index for group in graph.groups if group.resizable]
    keep = {free[k]: np.array(kept) for k, kept in widths.items()}
    plan, small = planned(graph, keep)
    assert verify(graph, plan, small).ok
    fault(small)
    assert is_rejected(graph, plan, small)


def test_a_statistical_removal_is_exact_only_with_the_statistic_of_the_kept() -> None:
    """The mask must gather: with zeros in place the norm would divide by another number."""
    graph = of_text(NORM)
    index = only_group(graph)
    assert graph.groups[index].statistical
    kept = np.array([0, 3, 4, 6])
    plan, small = planned(graph, {index: kept})
    feeds = random_inputs(graph.model)
    w1, s, h, w2 = (array(graph, name) for name in ("w1", "s", "h", "w2"))
    a = (feeds["x"] @ w1)[..., kept]
    n = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)
    expected = (n * s[kept] + h[kept]) @ w2[kept]
    for model in (small, mask(graph, {index: kept})):
        assert run(model, feeds)["y"] == pytest.approx(expected, abs=1e-5)
    assert verify(graph, plan, small).sensitivity > 1e-2


def test_the_mask_is_the_original_with_zeros_where_it_sums() -> None:
    """Brute force: zero the removed channels of the activation by hand."""
    graph = of_text(RESIDUAL)
    kept = np.array([1, 2, 5])
    gone = np.setdiff1d(np.arange(6), kept)
    masked = run(mask(graph, {only_group(graph): kept}), feeds := random_inputs(graph.model))
    by_hand = graph.model.clone()
    for name in ("w2", "w3"):
        weight = array(graph, name).copy()
        weight[:, gone] = 0
        give(by_hand, name, weight)
    assert masked["y"] == pytest.approx(run(by_hand, feeds)["y"], abs=1e-6)


def test_the_masked_model_has_the_sizes_of_the_original() -> None:
    graph = of_text(RESIDUAL)
    masked = mask(graph, {only_group(graph): np.array([1])})
    for name, value in graph.model.graph.initializers.items():
        assert masked.graph.initializers[name].const_value is value.const_value
    assert masked.graph.outputs[0].shape == graph.model.graph.outputs[0].shape


def test_the_report_says_what_is_off_and_by_how_much() -> None:
    graph = of_text(RESIDUAL)
    plan = random_plan(graph)
    small = resize(graph, plan.keep_channels(graph))
    good = verify(graph, plan, small)
    good.require()
    feeds = random_inputs(graph.model, seed=0)
    expected = run(mask(graph, plan.keep_channels(graph)), feeds)["y"]
    original = run(graph.model, feeds)["y"]
    assert good.worst.scale == pytest.approx(np.abs(expected).max())
    assert good.sensitivity == pytest.approx(
        np.abs(expected - original).max() / np.abs(expected).max()
    )
    (name,) = [n for n, v in small.graph.initializers.items() if n == "w3"]
    tensor = small.graph.initializers[name].const_value
    assert tensor is not None
    give(small, name, tensor.numpy() * np.float32(1 + 10 * RESIZED))
    bad = verify(graph, plan, small)
    assert not bad.ok
    assert bad.worst.relative == pytest.approx(10 * RESIZED, rel=1e-2)
    with pytest.raises(VerificationError, match=r"output 'y' is off by 0\.001 of its scale"):
        bad.require()


def test_a_result_that_is_not_a_number_is_refused() -> None:
    graph = of_text(RESIDUAL)
    plan = random_plan(graph)
    small = resize(graph, plan.keep_channels(graph))
    tensor = small.graph.initializers["w3"].const_value
    assert tensor is not None
    give(small, "w3", tensor.numpy() * np.float32(np.nan))
    assert not verify(graph, plan, small).ok


def _make_twice(small: ir.Model) -> None:
    """Two values of one name, which no runtime takes."""
    relu, conv = (n for n in small.graph if n.name in ("Relu_ra", "Conv_b"))
    conv.outputs[0].name = relu.outputs[0].name


def test_a_result_that_only_pytorch_would_run_is_wrong() -> None:
    """ONNX Runtime runs the original; nobody else is asked whether the resized one is right."""
    graph = of_text(RESIDUAL)
    plan = random_plan(graph)
    small = resize(graph, plan.keep_channels(graph))
    _make_twice(small)
    assert is_rejected(graph, plan, small)
    with pytest.raises(VerificationError, match=r"the original runs, but the resized model does"):
        mg.verify(graph, plan, small)


def test_a_result_that_the_checker_refuses_is_not_handed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = of_text(RESIDUAL)
    plan = random_plan(graph)

    def broken(*arguments: object) -> ir.Model:
        small = resize(*arguments)  # type: ignore[arg-type]
        _make_twice(small)
        return small

    monkeypatch.setattr("morphgraph.workflow.resize", broken)
    for verified in (True, False):
        with pytest.raises(VerificationError, match=r"onnx\.checker refuses the resized model"):
            mg.apply(graph, plan, verify=verified)


def test_a_file_that_only_the_checker_refuses_is_resized() -> None:
    """ONNX Runtime's optimizer puts LayerNormalization into files of older opsets."""
    model = model_from_text(
        """<ir_version: 8, opset_import: ["": 13]>
        net (float[2,6] x, float[6,8] w, float[8] g, float[8,3] w2) => (float[2,3] y) {
            a = MatMul(x, w)  r = Relu(a)  n = LayerNormalization<axis=-1>(r, g)  y = MatMul(n, w2)
        }"""
    )
    graph = lift(model)
    assert checker_refusal(graph.model) is not None
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    assert run(small, {"x": np.ones((2, 6), np.float32)})["y"].shape == (2, 3)
    small.graph[0].outputs[0].name = "g"
    with pytest.raises(VerificationError, match=r"onnx\.checker refuses the resized model"):
        require_valid(graph, small)


def test_the_checker_looks_at_a_model_without_its_weights() -> None:
    graph = of_text(RESIDUAL)
    assert checker_refusal(graph.model) is None
    large = graph.model.clone()
    value = large.graph.initializers["w1"]
    value.const_value = ir.LazyTensor(
        lambda: pytest.fail("weights were read"), ir.DataType.FLOAT, ir.Shape([6, 3, 1, 1])
    )
    assert checker_refusal(large) is None
    _make_twice(large)
    assert "'ra'" in (checker_refusal(large) or "").replace('"', "'")


def test_another_networks_file_is_refused() -> None:
    graph, other = of_text(RESIDUAL), of_text(NORM)
    with pytest.raises(ModelError, match=r"takes inputs 'x' \(FLOAT \[2,5,3\]\), but the original"):
        verify(graph, random_plan(graph), other.model)


def test_another_networks_plan_is_refused() -> None:
    graph, other = of_text(RESIDUAL), of_text(GATHER)
    plan = random_plan(graph)
    with pytest.raises(PlanError, match="made for another network"):
        verify(other, plan, resize(graph, plan.keep_channels(graph)))


def plan_of(graph: ChannelGraph) -> Plan:
    """Four of eight channels stay, the first."""
    return make_plan(graph, {graph.group("MatMul_a").index: np.arange(4)}, {})


def test_removed_channels_that_were_zero_leave_the_check_its_power(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Masking what adds nothing moves nothing; a wrong slice would be noticed all the same."""
    text = """net (float[1,6] x, float[6,8] w, float[8,3] v) => (float[1,3] y) {
        a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, v) }"""
    model = model_from_text(text)
    kernel = model.graph.initializers["w"].const_value
    assert kernel is not None
    numbers = kernel.numpy().copy()
    numbers[:, 4:] = 0
    model.graph.initializers["w"].const_value = ir.Tensor(numbers, name="w")
    graph = mg.lift(model)
    plan = plan_of(graph)
    small = mg.apply(graph, plan)
    report = mg.verify(graph, plan, small)
    assert report.ok
    assert report.sensitivity > 0.1
    assert not recwarn.list
    wrong = small.graph.initializers["w"].const_value
    assert wrong is not None
    small.graph.initializers["w"].const_value = ir.Tensor(wrong.numpy()[:, ::-1].copy(), name="w")
    assert not mg.verify(graph, plan, small).ok


def test_a_network_that_tells_nothing_is_still_warned_of() -> None:
    text = """net (float[1,6] x, float[6,8] w, float[8,3] v) => (float[1,3] y) {
        a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, v) }"""
    model = model_from_text(text)
    model.graph.initializers["w"].const_value = ir.Tensor(np.zeros((6, 8), np.float32), name="w")
    graph = mg.lift(model)
    with pytest.warns(MorphWarning, match="a wrong slice could go unnoticed"):
        mg.apply(graph, plan_of(graph))
