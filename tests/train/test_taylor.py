"""First-order Taylor scores against gates in the user's own modules, and against differences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.errors import ArgumentError, ModelError
from morphgraph.graph import ChannelGraph
from morphgraph.testing import model_from_text, randomize_weights
from morphgraph.testing.examples import image, residual_cnn
from morphgraph.torch_io.export import export
from morphgraph.train.taylor import taylor


def lifted(net: nn.Module, example: Tensor) -> ChannelGraph:
    return mg.lift(export(net, (example,), dynamic_batch=True))


def gated_change(
    net: nn.Module, readers: list[tuple[str, int]], width: int, x: Tensor, labels: Tensor
) -> np.ndarray:
    """Per sample the derivative of the loss by one gate per channel, before these modules.

    Args:
        readers: names of modules, and the axis of their operand.
        width: number of channels.
    """
    rows = []
    for sample, label in zip(x.split(1), labels.split(1), strict=True):
        gate = torch.ones(width, requires_grad=True)

        def close(axis: int, gate: Tensor = gate) -> Callable[..., Any]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                shape = [1] * args[0].ndim
                shape[axis] = width
                return (args[0] * gate.reshape(shape), *args[1:])

            return hook

        handles = [
            net.get_submodule(name).register_forward_pre_hook(close(axis)) for name, axis in readers
        ]
        F.cross_entropy(net(sample), label).backward()
        for handle in handles:
            handle.remove()
        assert gate.grad is not None
        rows.append(gate.grad.numpy())
    return np.abs(np.array(rows)).mean(0)


def assert_scores(scores: np.ndarray, expected: np.ndarray) -> None:
    assert expected.max() > 1e-3  # the loss feels them
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.fixture(scope="module")
def cnn() -> tuple[nn.Module, ChannelGraph, Tensor, Tensor]:
    torch.manual_seed(0)
    net = randomize_weights(residual_cnn((6, 8)), image(2)).eval()
    return net, lifted(net, image(2)), image(5), torch.tensor([1, 0, 7, 3, 3])


def test_a_chain_is_gated_behind_its_activation(cnn: Any) -> None:
    net, graph, x, labels = cnn
    scores = mg.taylor(graph, [(x.numpy(), labels.numpy())])
    group = graph.group("blocks.1.conv1")
    expected = gated_change(net, [("blocks.1.conv2", 1)], 8, x, labels)
    assert_scores(scores[group.channels], expected)


def test_tied_channels_go_at_all_readers_together(cnn: Any) -> None:
    net, graph, x, labels = cnn
    scores = taylor(graph, [(x.numpy(), labels.numpy())])
    (stem,) = (g for g in graph.groups if "blocks.0.conv1" in g.readers)
    readers = [("blocks.0.conv1", 1), ("blocks.1.conv1", 1), ("blocks.1.shortcut.0", 1)]
    assert_scores(scores[stem.channels], gated_change(net, readers, 6, x, labels))


def test_the_split_into_batches_makes_no_difference(cnn: Any) -> None:
    _, graph, x, labels = cnn
    whole = taylor(graph, [(x.numpy(), labels.numpy())])
    parts = [({"x": x[k : k + 2].numpy()}, labels[k : k + 2].numpy()) for k in (0, 2, 4)]
    np.testing.assert_allclose(taylor(graph, parts), whole, rtol=1e-6)


def test_scores_are_what_a_small_closing_changes(cnn: Any) -> None:
    """Differences of the loss of the ONNX network whose reader's kernel is scaled."""
    net, graph, x, labels = cnn
    scores = taylor(graph, [(x[:1].numpy(), labels[:1].numpy())])
    weight = net.get_submodule("fc").weight
    (group,) = (g for g in graph.groups if "fc" in g.readers)
    step, found = 1e-2, []
    with torch.no_grad():
        for channel in range(group.width):
            ends = []
            for factor in (1 + step, (1 - step) / (1 + step), 1 / (1 - step)):
                weight[:, channel] *= factor
                ends.append(float(F.cross_entropy(net(x[:1]).double(), labels[:1])))
            found.append(abs(ends[0] - ends[1]) / (2 * step))
    assert_scores(scores[group.channels], np.array(found))


class Attention(nn.Module):
    """Two heads over tokens that are numbers of rows, and an MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        q, k, v = (
            part.unflatten(-1, (2, 4)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def test_a_transformer_with_tokens() -> None:
    torch.manual_seed(1)
    net = randomize_weights(Attention(), torch.randint(0, 11, (2, 5))).eval()
    tokens = torch.randint(0, 11, (4, 5))
    labels = torch.tensor([0, 1, 2, 3])
    graph = lifted(net, tokens[:2])
    scores = taylor(graph, [(tokens.numpy(), labels.numpy())])
    units = graph.group("up")
    assert_scores(scores[units.channels], gated_change(net, [("down", -1)], 12, tokens, labels))
    (residual,) = (g for g in graph.groups if "head" in g.readers)
    readers = [("qkv", -1), ("up", -1), ("head", -1)]
    assert_scores(scores[residual.channels], gated_change(net, readers, 8, tokens, labels))


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell: Any = getattr(nn, kind)(3, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.cell(x)[0][:, -1])
        return scores


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_reads_its_own_state(kind: str) -> None:
    torch.manual_seed(2)
    net, x = Recurrent(kind).eval(), torch.randn(4, 6, 3)
    labels = torch.tensor([0, 1, 2, 3])
    graph = lifted(net, x[:2])
    scores = taylor(graph, [(x.numpy(), labels.numpy())])
    (group,) = (g for g in graph.groups if "head" in g.readers)
    expected = np.zeros(5)
    own, head = net.cell.weight_hh_l0, net.head.weight
    for sample, label in zip(x.split(1), labels.split(1), strict=True):
        net.zero_grad()
        F.cross_entropy(net(sample), label).backward()
        # A gate before a product changes the loss as the product's weights scaled with it do.
        assert own.grad is not None
        assert head.grad is not None
        expected += np.abs(((own * own.grad).sum(0) + (head * head.grad).sum(0)).detach().numpy())
    assert_scores(scores[group.channels], expected / 4)


def test_another_loss_and_several_outputs() -> None:
    model = model_from_text("""
    net (float[1,3] x) => (float[1,2] y, float[1,2] z)
    <float[4,3] v = {1,0,2, 0,1,1, 1,1,0, 0,0,1}, float[2,4] w = {1,0,0,3, 0,2,0,1},
     float[2,4] u = {0,0,1,0, 1,0,0,0}> {
        h = Gemm<transB=1>(x, v)  y = Gemm<transB=1>(h, w)  z = Gemm<transB=1>(h, u) }""")
    graph = mg.lift(model)
    x, wanted = np.array([[1, 2, 3]], dtype=np.float32), np.ones((1, 2), dtype=np.float32)

    def loss(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        return (outputs[0] - labels).square().sum() + outputs[1].sum()

    h = np.array([7, 5, 3, 3.0])
    w, u = np.array([[1, 0, 0, 3], [0, 2, 0, 1.0]]), np.array([[0, 0, 1, 0], [1, 0, 0, 0.0]])
    expected = np.abs(h * (2 * (w @ h - 1) @ w + u.sum(0)))
    scores = mg.taylor(graph, [(x, wanted)], loss)
    np.testing.assert_allclose(scores[graph.group("g1").channels], expected, rtol=1e-5)


def test_probabilities_count_as_such() -> None:
    body = "h = Gemm<transB=1>(x, v)  a = Relu(h)  s = Gemm<transB=1>(a, w)"
    weights = "<float[4,3] v = {1,0,2, 0,1,1, 1,1,0, 0,0,1}, float[2,4] w = {1,0,0,0.3, 0,0.2,0,1}>"
    end = {"s": "", "p": "p = Softmax(s)"}
    x, labels = np.array([[0.1, 0.2, 0.3]], dtype=np.float32), np.array([1])
    found = [
        taylor(
            mg.lift(
                model_from_text(
                    f"net (float[1,3] x) => (float[1,2] {out}) {weights} {{ {body} {e} }}"
                )
            ),
            [(x, labels)],
        )
        for out, e in end.items()
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_a_plan_by_these_scores_keeps_what_counts(cnn: Any) -> None:
    _, graph, x, labels = cnn
    scores = taylor(graph, [(x.numpy(), labels.numpy())])
    group = graph.group("blocks.1.conv1")
    plan = mg.plan(graph, {"flops": "100%"}, score=scores, widths={group.id: 3})
    best = np.sort(np.argsort(scores[group.channels])[-3:])
    np.testing.assert_array_equal(plan.keep_channels(graph)[group.index], best)


def test_the_model_is_left_as_it_is(cnn: Any) -> None:
    _, graph, x, labels = cnn
    before = ir.to_proto(graph.model).SerializeToString()
    taylor(graph, [(x.numpy(), labels.numpy())])
    assert ir.to_proto(graph.model).SerializeToString() == before


@pytest.mark.parametrize(
    ("samples", "error", "words"),
    [
        ([], ArgumentError, "no samples"),
        ([(np.zeros((2, 1, 8, 8)), np.array([0, 1, 2]))], ArgumentError, "3 labels"),
        ([(np.zeros((1, 1, 8, 8)), np.array([10]))], ArgumentError, "10 classes"),
        ([({"image": np.zeros((1, 1, 8, 8))}, np.array([1]))], ModelError, "'x' is missing"),
    ],
)
def test_what_does_not_fit_is_said(
    cnn: Any, samples: list[Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        taylor(cnn[1], samples)
