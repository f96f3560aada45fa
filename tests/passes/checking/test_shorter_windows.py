"""The check on windows of fewer positions: a Swin transformer's, that shift and have biases."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torchvision.models import SwinTransformer

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.messages import message_without_weights
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking import verify as verifying
from morphgraph.passes.checking.following import following, stated, window_sizes
from morphgraph.passes.checking.shorter import Shorter, shorter
from morphgraph.passes.checking.smaller import inferred, smaller_inputs
from morphgraph.testing import model_from_text, prove
from morphgraph.testing.random_weights import randomize_weights


@pytest.fixture(scope="module")
def swin() -> ChannelGraph:
    """Windows of 5 x 5, 4 x 4 of them and then 2 x 2; every second block shifts them by 2."""
    net = SwinTransformer([2, 2], 8, [2, 2], [2, 4], [5, 5], num_classes=5).eval()
    image = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    randomize_weights(net, (image,))
    return mg.lift(mg.export(net, (image,)))


def test_windows_keep_their_number_and_get_fewer_positions(swin: ChannelGraph) -> None:
    assert smaller_inputs(swin) is None
    assert window_sizes(swin)[0] == 5
    plan = shorter(swin)
    assert plan is not None
    assert plan.inputs["x"] == (1, 3, 24, 24)
    sizes = {5: 3, 25: 9, 20: 12, 10: 6}  # a window, its positions, the maps
    assert plan.parts.sizes.items() >= sizes.items()
    assert len(plan.parts.computed) == 4  # the biases of every block
    small = plan.of(swin.model)
    assert small is not None
    shifts = [n for n in small.graph if n.op_type == "Slice" and "smaller" in str(n.inputs[1])]
    found = {tuple(each.numbers.tolist()) for node in shifts for each in stated(node)}
    # A shift by 2 and back again: 2 from the one end, 2 from the other.
    assert {(2,), (12 - 2,), (6 - 2,)} <= found


def test_wrong_slices_are_found_with_fewer_positions(
    swin: ChannelGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "_MOST_NUMBERS", 0)
    taken: list[Shorter | None] = []

    def noted(graph: ChannelGraph) -> Shorter | None:
        taken.append(shorter(graph))
        return taken[-1]

    monkeypatch.setattr(verifying, "shorter", noted)
    reports = prove(swin, seeds=(0,), faults=5)
    assert taken
    assert all(taken)
    plan = mg.uniform(swin, 0.5)
    short = mg.verify(swin, plan, mg.apply(swin, plan, verify=False))
    monkeypatch.setattr(verifying, "shorter", lambda graph: None)
    full = mg.verify(swin, plan, mg.apply(swin, plan, verify=False))
    assert all(report.ok for report in (*reports, short, full))
    assert short.outputs[0].scale != full.outputs[0].scale  # it was another network


def test_of_a_computed_table_the_weights_of_lost_rows_are_compared(swin: ChannelGraph) -> None:
    found = shorter(swin)
    assert found is not None
    plan = mg.uniform(swin, 0.5)
    small = mg.apply(swin, plan, verify=False)
    selection = AxisSelection(swin, plan.keep_channels(swin))
    assert found.agrees(swin.model, small, selection)
    name = next(n for n in small.graph.initializers if n.endswith("position_bias_table"))
    value = small.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[-1] += 1  # which no window of fewer positions reads
    value.const_value = ir.Tensor(array, name=name)
    assert not found.agrees(swin.model, small, selection)


def test_a_place_that_is_another_in_the_resized_model_is_left_alone(swin: ChannelGraph) -> None:
    found = shorter(swin)
    assert found is not None
    other = swin.model.clone()
    node = next(
        n
        for n in other.graph
        if n.op_type == "Slice" and any((s.numbers == 2).any() for s in stated(n))
    )
    place = node.inputs[1]
    assert place is not None
    place.const_value = ir.tensor(np.array([1]), name=place.name)
    assert found.of(other) is None


def test_sizes_at_which_windows_do_not_nest_follow_from_nothing(swin: ChannelGraph) -> None:
    assert following(swin, {"x": (1, 3, 22, 22)}) is None


def test_sizes_are_inferred_once_for_each_round(
    swin: ChannelGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    infer = onnx.shape_inference.infer_shapes

    def counted(message: bytes | onnx.ModelProto, **options: bool) -> bytes | onnx.ModelProto:
        is_read = isinstance(message, onnx.ModelProto)
        asked.append(message.SerializeToString() if is_read else message)
        return infer(message, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", counted)
    assert following(swin, {"x": (1, 3, 24, 24)}) is not None
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(
    "misfit",
    [
        "Add(x, w)",
        "Concat<axis=0>(x, w)",
        "MatMul(x, w)",
        "Gemm(x, w)",
        "Expand(x, k)",
        "Split<axis=1>(x, k)",
        "Transpose<perm=[0,1,2]>(x)",
        "ReduceSum(x, k)",
        "Squeeze(x, k)",
    ],
)
def test_where_operands_do_not_fit_no_result_is_known(misfit: str) -> None:
    model = model_from_text(
        f"""net (float[2,3] x, float[4,5] w) => (float[n,m] y)
        <int64[1] k = {{7}}> {{ a = {misfit}  y = Relu(a) }}"""
    )
    message = message_without_weights(model, {"x": (2, 3), "w": (4, 5)})
    assert inferred(message) is None
    found = inferred(message, strict=False)
    assert found is not None
    assert found.keys() & {"a", "y"} == set()
