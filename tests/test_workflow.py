"""``apply``: from a model and a plan to a resized model with trained weights, checked."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import morphgraph as mg
from morphgraph.errors import PlanError, VerificationError
from morphgraph.examples import image, residual_cnn
from morphgraph.graph import ChannelGraph
from morphgraph.ort import run
from morphgraph.passes.resize import resize
from morphgraph.testing import make_felt
from morphgraph.torch_io.export import export
from morphgraph.workflow import apply, resize_and_check, with_weights


@pytest.fixture(scope="module")
def model() -> ir.Model:
    net = make_felt(residual_cnn((8, 16)), image(1, 8, 8))
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
    assert result.report.felt > 1e-2
    assert resize_and_check(graph, mg.uniform(graph, 0.5), verify=False).report is None


def test_trained_weights_are_resized(model: ir.Model) -> None:
    """The masked original is computed in torch here: a second oracle beside ``verify``."""
    graph = mg.lift(model)
    plan = mg.uniform(graph, 0.5)
    other = make_felt(residual_cnn((8, 16)), image(1, 8, 8), seed=7)
    small = apply(graph, plan, weights=other)
    assert resize_and_check(graph, plan, weights=other.state_dict()).report is not None

    # Silence the removed channels in the network itself; a dead channel then adds nothing.
    kept = {graph.groups[index].name: channels for index, channels in plan.kept(graph).items()}
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


def test_a_plan_for_another_network_is_refused(model: ir.Model) -> None:
    other = mg.lift(export(residual_cnn((8, 12)), (image(1, 8, 8),)))
    with pytest.raises(PlanError, match="another network"):
        apply(other, mg.uniform(mg.lift(model), 0.5))
