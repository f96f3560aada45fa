"""Self-distillation against ONNX Runtime: the tuned network is nearer to its original, or given."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.arrays import Array, Arrays
from morphgraph.calibration.samples import Samples
from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.testing import model_from_text, randomize_weights
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export
from morphgraph.train.distill import distill, relative_errors
from morphgraph.train.pair import layer_results


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def answers(model: ir.Model, feeds: Arrays) -> list[Array]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return [np.asarray(result) for result in session.run(None, feeds)]


def error(original: ir.Model, model: ir.Model, feeds: Arrays) -> float:
    """Mean over float outputs of the relative error, at inputs that nobody has seen."""
    pairs = zip(answers(original, feeds), answers(model, feeds), strict=True)
    found = [np.sqrt(((a - b) ** 2).mean()) / a.std() for a, b in pairs if a.dtype.kind == "f"]
    return float(np.mean(found))


def halved(graph: ChannelGraph) -> tuple[ir.Model, AxisSelection]:
    plan = mg.uniform(graph, 0.6)
    return mg.apply(graph, plan, verify=False), AxisSelection(graph, plan.keep_channels(graph))


class Tokens(nn.Module):
    """An encoder block over tokens that are numbers of rows, with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 8)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.table(tokens)
        qkv = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in qkv)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        scores = self.head(x.mean(1))
        return x, scores.softmax(-1), scores.argmax(-1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 10, batch_first=True), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.cell(x)[0][:, -1])
        return scores


def exported(net: nn.Module, example: Tensor) -> ir.Model:
    torch.manual_seed(3)
    net = randomize_weights(net, example).eval()
    return export(net, (example,), dynamic_batch=True)


@pytest.fixture(scope="module")
def cnn() -> ir.Model:
    torch.manual_seed(0)
    return exported(residual_cnn((6, 8)), image(2))


def tokens(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 13, (count, 5))


def check_it_helps(model: ir.Model, feeds: Arrays, unseen: Arrays, *, inside: bool = True) -> None:
    graph = mg.lift(model)
    small, selection = halved(graph)
    given = ir.to_proto(small).SerializeToString()
    chosen = selection if inside else None
    samples = Samples.of(feeds, graph.model)
    tuned = distill(graph.model, small, samples, steps=40, selection=chosen)
    assert tuned.reason == ""
    before, after = (error(model, m, unseen) for m in (small, tuned.model))
    assert after < 0.9 * before
    shares = [np.mean(list(errors.values())) for errors in (tuned.before, tuned.after)]
    (held,) = samples.split()[1].batches(1000)
    np.testing.assert_allclose(shares[1], error(model, tuned.model, held), rtol=1e-3)
    assert ir.to_proto(small).SerializeToString() == given  # it is not changed


@pytest.mark.parametrize("inside", [True, False])
def test_a_residual_network(cnn: ir.Model, inside: bool) -> None:
    feeds, unseen = {"x": noise(100, 1, 8, 8)}, {"x": noise(50, 1, 8, 8, seed=1)}
    check_it_helps(cnn, feeds, unseen, inside=inside)


def test_norms_that_are_folded(cnn: ir.Model) -> None:
    from morphgraph.passes.canonical.fold_affine import fold_affine

    folded = fold_affine(cnn)
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph)
    check_it_helps(folded, {"x": noise(100, 1, 8, 8)}, {"x": noise(50, 1, 8, 8, seed=1)})


def test_tokens_and_several_outputs() -> None:
    model = exported(Tokens(), torch.randint(0, 13, (2, 5)))
    check_it_helps(model, {"tokens": tokens(120, 0)}, {"tokens": tokens(60, 1)})


def test_a_recurrent_network() -> None:
    model = exported(Recurrent(), torch.randn(2, 6, 3))
    check_it_helps(model, {"x": noise(120, 6, 3)}, {"x": noise(60, 6, 3, seed=1)})


def test_a_fixed_batch_and_a_part_of_the_inputs_at_a_time(
    cnn: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time in the file, and fewer bytes in memory than all inputs have."""
    monkeypatch.setattr("morphgraph.train.distill._HELD", 3000)
    passes: list[int] = []
    batches = Samples.batches

    def counted(samples: Samples, size: int) -> Iterator[Arrays]:
        passes.append(samples.count)
        return batches(samples, size)

    monkeypatch.setattr(Samples, "batches", counted)
    fixed = mg.lift(cnn, input_shapes={"x": (2, 1, 8, 8)})
    small, selection = halved(fixed)
    samples, unseen = (
        Samples.of({"x": noise(count, 1, 8, 8, seed=count)}, fixed.model) for count in (60, 20)
    )
    tuned = distill(
        fixed.model, small, samples, steps=10, held_out=unseen, selection=selection, lr=0.03
    )
    assert tuned.reason == ""
    assert passes.count(60) > 2  # read again and again


def test_never_worse(cnn: ir.Model) -> None:
    """What is right already, and rates that are far too high: the given network comes back."""
    samples = Samples.of({"x": noise(40, 1, 8, 8)}, cnn)
    same = distill(cnn, cnn, samples, steps=5)
    assert same.model is cnn
    assert same.reason.startswith("tuning did not help")
    small, _ = halved(mg.lift(cnn))
    wild = distill(cnn, small, samples, steps=5, lr=1e4)
    assert wild.model is small
    assert wild.reason


def test_frozen_weights_stay() -> None:
    net = randomize_weights(residual_cnn((4, 6)), image(2)).eval()
    net.get_submodule("stem").requires_grad_(False)
    model = export(net, (image(2),), dynamic_batch=True)
    small, selection = halved(mg.lift(model))
    feeds = Samples.of({"x": noise(40, 1, 8, 8)}, model)
    tuned = distill(selection.graph.model, small, feeds, steps=10, selection=selection)
    for name, stays in (("stem.weight", True), ("fc.weight", False)):
        before, after = (weight(m, name) for m in (small, tuned.model))
        assert np.array_equal(before, after) == stays


def weight(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())


def test_without_weights_nothing_changes() -> None:
    model = model_from_text("net (float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    found = distill(model, model, Samples.of({"x": noise(8, 3)}, model), steps=2)
    assert found.model is model
    assert "no weights" in found.reason


def test_the_values_inside_are_those_of_layers(cnn: ir.Model) -> None:
    graph = mg.lift(cnn)
    kinds = [graph.ops[graph.makers[name]].ir.op_type for name in layer_results(graph)]
    assert sorted(set(kinds)) == ["Conv", "Gemm"]
    assert len(kinds) == 7


def test_errors_are_measured_in_torch_where_onnx_runtime_refuses(
    cnn: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, _ = halved(mg.lift(cnn))
    samples = Samples.of({"x": noise(20, 1, 8, 8)}, cnn)
    measured = relative_errors(cnn, small, samples)

    def refuse(_model: ir.Model) -> None:
        raise UnsupportedError("no such operator")

    monkeypatch.setattr("morphgraph.train.distill.session", refuse)
    assert relative_errors(cnn, small, samples) == pytest.approx(measured, rel=1e-4)
    (feeds,) = samples.batches(100)
    assert list(measured.values()) == pytest.approx([error(cnn, small, feeds)], rel=1e-4)


def test_single_samples_and_norms_over_batches() -> None:
    """Sizes that differ, so that each sample stands alone, and a norm over vectors."""
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = exported(net, torch.randn(2, 3))
    small, selection = halved(mg.lift(model))
    samples = Samples.of({"input": noise(41, 3)}, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("morphgraph.train.distill.BATCH", 1)
        patch.setattr("morphgraph.train.pair.BATCH", 1)
        patch.setattr("morphgraph.train.distill._CHUNK", 1)
        patch.setattr("morphgraph.train.distill._ENOUGH", 1)
        tuned = distill(selection.graph.model, small, samples, steps=30, selection=selection)
    assert np.mean(list(tuned.after.values())) < np.inf


def test_progress_is_told(cnn: ir.Model) -> None:
    said: list[Any] = []
    small, selection = halved(mg.lift(cnn))
    feeds = Samples.of({"x": noise(40, 1, 8, 8)}, cnn)
    distill(
        selection.graph.model,
        small,
        feeds,
        steps=10,
        selection=selection,
        progress=lambda *words: said.append(words),
    )
    assert said[0] == ("rate", 1, 6)
    assert said[5:7] == [("rate", 6, 6), ("tune", 3, 10)]
    assert said[-1] == ("tune", 10, 10)


def test_what_cannot_be_tuned_is_said() -> None:
    model = model_from_text(
        "net (float[2,3] x) => (int64[2] y) { y = ArgMax<axis=1, keepdims=0>(x) }"
    )
    samples = Samples.of({"x": noise(8, 3)}, model)
    with pytest.raises(ArgumentError, match="no floating-point output"):
        distill(model, model, samples, steps=3)
    with pytest.raises(ArgumentError, match="0 steps"):
        distill(model, model, samples, steps=0)
