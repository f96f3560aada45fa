"""``apply``: from a model and a plan to a resized model with trained weights, checked."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import morphgraph as mg
from morphgraph.errors import PlanError, VerificationError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.rewrite.absorb import absorbed_in
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import make_plan
from morphgraph.testing import model_from_text, randomize_weights
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export
from morphgraph.workflow import apply, resize_and_check, with_weights


@pytest.fixture(scope="module")
def model() -> ir.Model:
    net = randomize_weights(residual_cnn((8, 16)), image(1, 8, 8))
    return export(net, (image(1, 8, 8),))


def test_a_path_a_model_and_a_graph_give_the_same(model: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    mg.save(model, path)
    graph = mg.lift(model)
    plan = mg.uniform(graph, 0.5)
    found = [
        ir.to_proto(apply(source, plan)).SerializeToString(deterministic=True)
        for source in (graph, model, path, onnx.load(path))
    ]
    assert len(set(found)) == 1


def test_the_errors_are_told(model: ir.Model) -> None:
    graph = mg.lift(model)
    result = resize_and_check(graph, mg.uniform(graph, 0.5))
    assert result.report is not None
    assert result.report.worst.relative < 1e-5
    assert result.report.sensitivity > 1e-2
    assert resize_and_check(graph, mg.uniform(graph, 0.5), verify=False).report is None


def test_trained_weights_are_resized(model: ir.Model) -> None:
    """The masked original is computed in torch here: a second oracle beside ``verify``."""
    graph = mg.lift(model)
    plan = mg.uniform(graph, 0.5)
    other = randomize_weights(residual_cnn((8, 16)), image(1, 8, 8), seed=7)
    small = apply(graph, plan, weights=other)
    assert resize_and_check(graph, plan, weights=other.state_dict()).report is not None

    # Silence the removed channels in the network itself; a dead channel then adds nothing.
    kept = {
        graph.groups[index].name: channels for index, channels in plan.keep_channels(graph).items()
    }
    masked = residual_cnn((8, 16)).eval()
    masked.load_state_dict(other.state_dict())
    state = masked.state_dict()
    with torch.no_grad():
        for name, channels in kept.items():
            group = graph.group(name)
            dead = np.setdiff1d(np.arange(group.width), channels)
            for member in group.members:
                if member.value in state:
                    state[member.value].movedim(member.axis, 0)[dead] = (
                        1.0 if member.value.endswith("running_var") else 0.0
                    )
    x = image(1, 8, 8)
    expected = masked(x).detach().numpy()
    (found,) = run(small, {model.graph.inputs[0].name or "": x.numpy()}).values()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    (unlike,) = run(apply(graph, plan), {model.graph.inputs[0].name or "": x.numpy()}).values()
    assert np.abs(unlike - expected).max() > 1e-2 * np.abs(expected).max()


def test_a_graph_with_other_weights_has_the_same_structure(model: ir.Model) -> None:
    graph = mg.lift(model)
    other = residual_cnn((8, 16))
    changed = with_weights(graph, other)
    assert isinstance(changed, ChannelGraph)
    assert changed.groups == graph.groups
    stored = changed.model.graph.initializers["stem.weight"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), other.state_dict()["stem.weight"].numpy())
    before = graph.model.graph.initializers["stem.weight"].const_value
    assert before is not None
    assert not np.array_equal(before.numpy(), stored.numpy())
    # Plans rank by the weights that they are made from.
    assert mg.uniform(changed, 0.5).groups != mg.uniform(graph, 0.5).groups


def test_a_wrong_result_is_refused(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = mg.lift(model)

    def wrong(original: ChannelGraph, keep: dict[int, np.ndarray], *_: object) -> ir.Model:
        shifted = {i: np.sort((k + 1) % original.groups[i].width) for i, k in keep.items()}
        return resize(original, shifted)

    monkeypatch.setattr("morphgraph.workflow.resize", wrong)
    with pytest.raises(VerificationError, match="is off by"):
        apply(graph, mg.uniform(graph, 0.5))
    assert apply(graph, mg.uniform(graph, 0.5), verify=False).graph.name == model.graph.name


def test_what_trained_weights_hold_constant_is_absorbed(model: ir.Model) -> None:
    """It is the trained weights that say which channels are constant, not those in the model."""
    graph = mg.lift(model)
    net = randomize_weights(residual_cnn((8, 16)), image(1, 8, 8), seed=7)
    weights = net.state_dict()
    weights["blocks.0.bn1.weight"][:3] = 0
    group = graph.group("blocks.0.conv1")
    plan = make_plan(graph, {group.index: np.arange(3, group.width)}, {})
    small = apply(graph, plan, weights=weights, absorb=True)
    trained = mg.lift(mg.with_weights(model, weights))
    assert absorbed_in(graph, small)[group.index].tolist() == [0, 1, 2]
    again = apply(trained, plan, absorb=True)
    assert ir.to_proto(small).SerializeToString(deterministic=True) == ir.to_proto(
        again
    ).SerializeToString(deterministic=True)


def test_a_plan_remembers_how_the_model_was_lifted(attention_model: ir.Model) -> None:
    source = attention_model
    by_head, by_size = mg.lift(source), mg.lift(source, attention="head-dim")
    plan = mg.Plan.from_json(mg.uniform(by_size, 0.5).to_json())
    assert plan.model.lift.attention == "head-dim"
    small = apply(source, plan)  # lifted as the plan says
    assert small.graph.initializers["wq"].shape == ir.Shape([8, 6])
    assert (
        small.graph.initializers["wq"].shape == apply(by_size, plan).graph.initializers["wq"].shape
    )
    with pytest.raises(PlanError, match=r"attention='head-dim'.*lifted with 'heads'"):
        apply(by_head, plan)
    assert b"lift" not in mg.uniform(by_head, 0.5).to_json()  # the defaults are not written
    with pytest.raises(PlanError, match=r"lift\.attention"):
        mg.Plan.from_json(plan.to_json().replace(b"head-dim", b"sideways"))


def test_where_nothing_attends_the_choice_makes_no_difference(model: ir.Model) -> None:
    plan = mg.uniform(mg.lift(model, attention="head-dim"), 0.5)
    assert plan == mg.uniform(mg.lift(model), 0.5)


def test_a_plan_remembers_pins_and_input_shapes() -> None:
    text = """
    net (float[1,3,H,W] x, float[8,3,3,3] w1, float[4,8,1,1] w2) => (float[1,4,P,Q] y) {
        a = Conv(x, w1)  y = Conv(a, w2)
    }"""
    source = model_from_text(text)
    shapes = {"x": (1, 3, 8, 8)}
    plan = mg.uniform(mg.lift(source, input_shapes=shapes, pin_outputs=False), 0.5)
    assert len(plan.groups) == 2
    again = mg.Plan.from_json(plan.to_json())
    assert again.model.lift.input_shapes == shapes
    assert not again.model.lift.pin_outputs
    small = apply(source, again, verify=False)
    assert small.graph.initializers["w2"].shape == ir.Shape([2, 4, 1, 1])
    with pytest.raises(PlanError, match="pin_outputs=False"):
        apply(mg.lift(source, input_shapes=shapes), again)
    with pytest.raises(PlanError, match=r"inputs were x=1x3x8x8, here they are x=1x3x9x9"):
        apply(mg.lift(source, input_shapes={"x": (1, 3, 9, 9)}), again)


def test_a_check_that_proves_little_warns() -> None:
    text = """
    net (float[1,3,4,4] x, float[8,3,3,3] w1, float[4,8,1,1] w2) => (float[1,4,2,2] y) {
        a = Conv(x, w1)  y = Conv(a, w2)
    }"""
    source = model_from_text(text)
    weight = source.graph.initializers["w1"].const_value
    assert weight is not None
    array = weight.numpy().copy()
    array[4:] *= 1e-5
    source.graph.initializers["w1"].const_value = ir.tensor(array, name="w1")
    graph = mg.lift(source)
    with pytest.warns(mg.MorphWarning, match="masking changed the outputs by"):
        small = apply(graph, mg.uniform(graph, 0.5))
    with pytest.warns(mg.MorphWarning, match="masking changed the outputs by"):
        assert mg.verify(graph, mg.uniform(graph, 0.5), small).ok
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grown = mg.expand(graph, make_plan(graph, {}, {}), {"flops": "200%"})
        assert grown.groups
        apply(graph, grown)  # nothing is removed, so there is nothing to feel


def test_a_plan_for_another_network_is_refused(model: ir.Model) -> None:
    other = mg.lift(export(residual_cnn((8, 12)), (image(1, 8, 8),)))
    with pytest.raises(PlanError, match="another network"):
        apply(other, mg.uniform(mg.lift(model), 0.5))
