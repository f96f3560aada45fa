"""Recurrent networks from PyTorch and back: export, resize, load, train, write back."""

import copy
import io
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.onnx_io import runtime as ort
from morphgraph.passes.analysis.cost import cost
from morphgraph.testing import model_from_text, prove, random_plan, randomize_weights
from morphgraph.torch_io import translate as translating
from morphgraph.torch_io.origins import Origins


class Tagger(nn.Module):
    """Words to tags: embeddings, a recurrent layer in both directions, a linear layer."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.rnn = kind(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(12, 5)

    def forward(self, words: Tensor) -> Tensor:
        tags: Tensor = self.out(self.rnn(self.embed(words))[0])
        return tags


class Classifier(nn.Module):
    """A sequence, steps first, to classes by the last state; ``bias`` and initial states vary."""

    def __init__(
        self, kind: Callable[..., nn.RNNBase], bias: bool = True, given: bool = False
    ) -> None:
        super().__init__()
        self.rnn = kind(8, 6, num_layers=2, bias=bias)
        self.start = nn.Linear(8, 6) if given else None
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.start is None:
            last = self.rnn(x)[1]
        else:
            state = torch.stack([self.start(x[0]), self.start(x[1])])
            last = self.rnn(x, (state, state) if isinstance(self.rnn, nn.LSTM) else state)[1]
        classes: Tensor = self.out((last[0] if isinstance(last, tuple) else last)[-1])
        return classes


WORDS = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
STEPS = torch.randn((7, 2, 8), generator=torch.Generator().manual_seed(0))
NETS = {
    "lstm tagger": (lambda: Tagger(nn.LSTM), WORDS),
    "gru tagger": (lambda: Tagger(nn.GRU), WORDS),
    "rnn tagger": (lambda: Tagger(nn.RNN), WORDS),
    "lstm by its last state": (lambda: Classifier(nn.LSTM), STEPS),
    "gru without bias": (lambda: Classifier(nn.GRU, bias=False), STEPS),
    "lstm with initial states": (lambda: Classifier(nn.LSTM, given=True), STEPS),
    "gru with initial states": (lambda: Classifier(nn.GRU, given=True), STEPS),
}


@pytest.fixture(scope="module", params=NETS)
def exported(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, ir.Model]:
    make, example = NETS[request.param]
    torch.manual_seed(0)
    net = make().eval()
    randomize_weights(net, example) if example.is_floating_point() else None
    return net, example, mg.export(net, (example,))


@cache
def tagger(kind: type[nn.RNNBase]) -> tuple[Tagger, ir.Model]:
    """A network that no test may change, and its export."""
    net = Tagger(kind).eval()
    return net, mg.export(net, (WORDS,))


def by_ort(model: ir.Model, x: Tensor) -> Tensor:
    (name,) = (str(value.name) for value in model.graph.inputs)
    (result,) = ort.run(model, {name: x.numpy()}).values()
    return torch.from_numpy(result)


def test_it_resizes_exactly(exported: tuple[nn.Module, Tensor, ir.Model]) -> None:
    _, _, model = exported
    graph = mg.lift(model)
    assert not [node.name for node in graph.ops if node.opaque]
    prove(graph, seeds=(0, 1), faults=8)


def test_it_loads_at_half_the_size_and_trains(
    exported: tuple[nn.Module, Tensor, ir.Model],
) -> None:
    net, x, model = exported
    graph = mg.lift(model)
    small = mg.apply(graph, random_plan(graph, 3, 0.4, 0.6))
    for resized in (model, small):
        loaded = mg.to_torch(resized)
        assert loaded.state_dict().keys() == net.state_dict().keys()
        assert torch.allclose(loaded(x), by_ort(resized, x), atol=1e-5)
        optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
        loaded.train()(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in loaded.parameters())
        optimizer.step()
        again = mg.with_weights(resized, loaded)
        assert torch.allclose(by_ort(again, x), loaded.eval()(x), atol=1e-5)
        assert not torch.allclose(by_ort(again, x), by_ort(resized, x), atol=1e-3)
        twin = mg.to_torch(again)
        assert all(torch.equal(t, twin.state_dict()[k]) for k, t in loaded.state_dict().items())


def test_the_layers_are_those_of_torch() -> None:
    for kind in (nn.LSTM, nn.GRU):
        net, model = tagger(kind)
        net = copy.deepcopy(net)
        loaded = mg.to_torch(model)
        assert repr(loaded.rnn) == f"{kind.__name__}(8, 6, num_layers=2, bidirectional=True)"
        assert repr(loaded.embed) == repr(net.embed)
        assert loaded.meta["morphgraph.batch"] == "free"
        more = torch.randint(0, 20, (5, 7))
        assert torch.allclose(loaded(more), net(more), atol=1e-5)
        loaded.load_state_dict(net.state_dict())
        with torch.no_grad():
            for parameter in loaded.rnn.parameters():
                parameter.mul_(2)
            for parameter in net.rnn.parameters():
                parameter.mul_(2)
        assert torch.allclose(loaded(WORDS), net(WORDS), atol=1e-5)


def test_torchscript_keeps_an_rnn_as_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> ir.Model:
        raise RuntimeError("as torch.export refuses a network")

    monkeypatch.setattr(translating, "_translate_quickly", lambda *_: None)
    monkeypatch.setattr(translating, "_translate_by_dynamo", refuse)
    net = Tagger(nn.RNN).eval()
    model = mg.export(net, (WORDS,))
    loaded = mg.to_torch(model)
    assert repr(loaded.rnn) == "RNN(8, 6, num_layers=2, bidirectional=True)"
    assert torch.allclose(loaded(WORDS), net(WORDS), atol=1e-5)
    prove(mg.lift(model), seeds=(0,), faults=4)


def test_layers_of_unequal_size_are_calls_of_torchs_kernel() -> None:
    graph = mg.lift(tagger(nn.LSTM)[1])
    plan = mg.plan(graph, {"params": "70%"}, include=["rnn #1"])
    small = mg.apply(graph, plan)
    loaded = mg.to_torch(small)
    assert loaded.code.count("fused('lstm'") == 2
    assert loaded.code.count("torch.cat") == 0  # the parameters are read as they are
    more = torch.randint(0, 20, (5, 7))
    rows = [by_ort(small, more[k : k + 2]) for k in (0, 2)]
    assert torch.allclose(loaded(more)[:4], torch.cat(rows), atol=1e-5)
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for twin in (copy.deepcopy(loaded), torch.load(file, weights_only=False)):
        assert torch.equal(twin(WORDS), loaded(WORDS))


@pytest.mark.parametrize("equal", [True, False])
def test_it_exports_again(equal: bool) -> None:
    graph = mg.lift(tagger(nn.GRU)[1])
    plan = mg.uniform(graph, 0.5) if equal else mg.uniform(graph, 0.5, include=["rnn #2"])
    loaded = mg.to_torch(mg.apply(graph, plan))
    again = mg.export(loaded, (WORDS,))
    assert torch.allclose(by_ort(again, WORDS), loaded(WORDS), atol=1e-5)
    assert sum(node.op_type == "GRU" for node in again.graph) == 2
    assert cost(mg.lift(again), "macs").total == plan.cost["flops"].after / 2


@pytest.mark.slow
def test_torch_compiles_it() -> None:
    graph = mg.lift(tagger(nn.LSTM)[1])
    loaded = mg.to_torch(mg.apply(graph, mg.uniform(graph, 0.5, include=["rnn #1"])))
    program = torch.export.export(loaded, (WORDS,))
    assert torch.allclose(program.module()(WORDS), loaded(WORDS), atol=1e-6)


def test_steps_first_are_not_taken_for_samples() -> None:
    loaded = mg.to_torch(mg.export(nn.LSTM(8, 6).eval(), (STEPS,)))
    assert "mixes samples" in loaded.meta["morphgraph.batch"]


def test_a_file_by_others_trains_under_its_own_names() -> None:
    text = """
    net (float[5,2,3] x, float[2,16,3] w, float[2,16,4] r, float[2,32] b) => (float[5,2,2,4] y) {
        y = LSTM<hidden_size=4, direction="bidirectional">(x, w, r, b)
    }"""
    model = model_from_text(text)
    loaded = mg.to_torch(model)
    assert {name: t.shape for name, t in loaded.named_parameters()} == {
        "w": (2, 16, 3),
        "r": (2, 16, 4),
        "b": (2, 32),
    }
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(0.5)
    x = torch.randn(5, 2, 3)
    assert torch.allclose(by_ort(mg.with_weights(model, loaded), x), loaded(x), atol=1e-5)


def test_tied_embeddings_shrink_as_one() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.rnn = nn.LSTM(8, 6, batch_first=True)
            self.back = nn.Linear(6, 8)
            self.out = nn.Linear(8, 20)
            self.out.weight = self.embed.weight

        def forward(self, words: Tensor) -> Tensor:
            logits: Tensor = self.out(self.back(self.rnn(self.embed(words))[0]))
            return logits

    torch.manual_seed(0)
    net = Language().eval()
    model = mg.export(net, (WORDS,))
    graph = mg.lift(model)
    tied = [v for v in graph.model.graph.initializers.values() if v.shape == (20, 8)]
    assert len(tied) == 1
    prove(graph, seeds=(0,), faults=8)
    loaded = mg.to_torch(mg.apply(graph, mg.uniform(graph, 0.5)))
    assert loaded.embed.weight.shape == (20, 4)
    assert len([p for p in loaded.parameters() if p.shape == (20, 4)]) == 1


def test_origins_see_what_moved_where() -> None:
    """Against the movements themselves, run on other numbers."""
    weight = nn.Parameter(torch.randn(8, 3))
    graph = torch.fx.Graph()
    read = graph.create_node("get_attr", "w")
    halves = [graph.call_function(torch.narrow, (read, 0, k, 4)) for k in (4, 0)]
    moved = graph.call_method("unsqueeze", (graph.call_function(torch.cat, (halves, 0)), 0))
    found = Origins(moved, lambda _: weight)
    expected = torch.cat([weight[4:], weight[:4]])[None].detach()
    assert np.array_equal(weight.detach().numpy().ravel()[found.positions], expected.numpy())
    order = np.r_[4:8, 0:4]
    assert found.parameter(found.positions[0][order]) == "w"
    assert found.parameter(found.positions[0]) is None
    assert found.parameter(found.positions[0][:4]) is None
