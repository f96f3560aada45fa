"""A user's own module is resized in place; ONNX Runtime on the resized ONNX is the oracle."""

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import morphgraph as mg
from morphgraph.errors import ModelError, PlanError, UnsupportedError
from morphgraph.onnx_io import runtime as ort
from morphgraph.passes.planning.uniform import set_widths
from morphgraph.testing import randomize_weights
from morphgraph.torch_io.resize_module import ModuleReport

Planner = Callable[[mg.ChannelGraph], mg.Plan]
IMAGE, IDS = (
    torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(1)),
)


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBlock(c1, c2 // 2, 3), ConvBlock(c2 // 2, c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Splits its channels by a number that it keeps."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1 = ConvBlock(c1, 2 * self.c)
        self.cv2 = ConvBlock((2 + n) * self.c, c2)
        self.m = nn.ModuleList(self.block(shortcut) for _ in range(n))

    def block(self, shortcut: bool) -> nn.Module:
        return Bottleneck(self.c, self.c, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C3k(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 2) -> None:
        super().__init__()
        c = c2 // 2
        self.cv1, self.cv2, self.cv3 = ConvBlock(c1, c), ConvBlock(c1, c), ConvBlock(2 * c, c2)
        self.m = nn.Sequential(*(Bottleneck(c, c) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C3k2(C2f):
    """A C2f whose inner blocks are C3k."""

    def block(self, shortcut: bool) -> nn.Module:
        return C3k(self.c, self.c)


class SpatialAttention(nn.Module):
    """The attention of a PSA block: heads over channels, positions as tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.key_dim = self.head_dim // 2
        self.scale = self.key_dim**-0.5
        self.qkv = nn.Conv2d(dim, dim + 2 * self.key_dim * num_heads, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.pe = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        sizes = [self.key_dim, self.key_dim, self.head_dim]
        split = self.qkv(x).view(b, self.num_heads, self.key_dim * 2 + self.head_dim, h * w)
        q, k, v = split.split(sizes, dim=2)
        attention = ((q.transpose(-2, -1) @ k) * self.scale).softmax(-1)
        y = (v @ attention.transpose(-2, -1)).view(b, c, h, w)
        return self.proj(y + self.pe(v.reshape(b, c, h, w)))


class PSA(nn.Module):
    def __init__(self, c1: int) -> None:
        super().__init__()
        self.c = c1 // 2
        self.cv1, self.cv2 = ConvBlock(c1, 2 * self.c), ConvBlock(2 * self.c, c1)
        self.attn = SpatialAttention(self.c, 2)
        self.ffn = nn.Sequential(ConvBlock(self.c, self.c * 2), nn.Conv2d(self.c * 2, self.c, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.c, self.c), dim=1)
        b = b + self.attn(b)
        b = b + self.ffn(b)
        return self.cv2(torch.cat((a, b), 1))


class Detect(nn.Module):
    """A decoupled head: raw maps in training, decoded boxes and classes in inference."""

    def __init__(self, classes: int, widths: tuple[int, ...], bins: int = 4) -> None:
        super().__init__()
        self.nc, self.reg_max, self.no = classes, bins, classes + bins * 4
        self.cv2 = nn.ModuleList(
            nn.Sequential(ConvBlock(w, 16, 3), nn.Conv2d(16, 4 * bins, 1)) for w in widths
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(ConvBlock(w, w, 3, g=w), ConvBlock(w, 12), nn.Conv2d(12, classes, 1))
            for w in widths
        )
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(bins).view(1, bins, 1, 1)

    def forward(self, maps: list[Tensor]) -> Any:
        raw = [
            torch.cat((box(f), kind(f)), 1)
            for f, box, kind in zip(maps, self.cv2, self.cv3, strict=True)
        ]
        if self.training:
            return raw
        b = raw[0].shape[0]
        joined = torch.cat([r.view(b, self.no, -1) for r in raw], 2)
        box, kinds = joined.split((self.reg_max * 4, self.nc), 1)
        bins = box.view(b, 4, self.reg_max, -1).transpose(2, 1).softmax(1)
        return torch.cat((self.dfl(bins).view(b, 4, -1), kinds.sigmoid()), 1)


class Detector(nn.Module):
    """A detector with two scales and every block above."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBlock(3, 8, 3, 2)
        self.c2f = C2f(8, 16, 2)
        self.down = ConvBlock(16, 20, 3, 2)
        self.c3k2 = C3k2(20, 24)
        self.psa = PSA(24)
        self.up = C2f(40, 20, 1, shortcut=False)
        self.head = Detect(5, (20, 24))

    def forward(self, x: Tensor) -> Any:
        p3 = self.c2f(self.stem(x))
        p4 = self.psa(self.c3k2(self.down(p3)))
        merged = torch.cat((F.interpolate(p4, scale_factor=2.0), p3), 1)
        return self.head([self.up(merged), p4])


class Segmenter(nn.Module):
    """A segmentation network whose auxiliary classifier runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(ConvBlock(3, 8, 3, 2), ConvBlock(8, 12, 3))
        self.late = ConvBlock(12, 16, 3)
        self.head = nn.Conv2d(16, 4, 1)
        self.aux = nn.Sequential(ConvBlock(12, 6, 3), nn.Dropout(0.1), nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> Any:
        early = self.early(x)
        out = F.interpolate(self.head(self.late(early)), scale_factor=2.0)
        return {"out": out, "aux": self.aux(early)} if self.training else out


class Attention(nn.Module):
    """Heads by an attribute; a wrong number runs, and gives other results."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.n_head = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.d, config.d) for _ in range(4))

    def heads(self) -> int:
        return self.n_head

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            m(x).view(b, t, self.heads(), -1).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class ConfigAttention(Attention):
    """Reads the number of heads from a config that all layers share."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__(config)
        self.config = config

    def heads(self) -> int:
        return int(self.config.heads)


class LiteralAttention(Attention):
    """Its number of heads stands in the code."""

    def heads(self) -> int:
        return 4


class Transformer(nn.Module):
    def __init__(self, attention: type[Attention] = Attention, d: int = 16) -> None:
        super().__init__()
        config = SimpleNamespace(d=d, heads=4)
        self.emb = nn.Embedding(20, d)
        self.layers = nn.ModuleList(attention(config) for _ in range(3))
        self.head = nn.Linear(d, 20)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], layers: int = 1) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12, padding_idx=3)
        self.rnn = kind(12, 16, layers, batch_first=True, bidirectional=True)  # type: ignore[arg-type]
        self.fc = nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.rnn(self.emb(ids))[0])


class Tied(nn.Module):
    """The embedding is the last layer's weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        return self.head(h + self.down(F.gelu(self.up(h))))


class Buffers(nn.Module):
    """A buffer that the exporter folds into a constant, and a list of positions."""

    scale: Tensor
    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * (self.scale * 2 + 1))[:, self.order])


class Halves(nn.Module):
    """Splits by arithmetic on a number that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 16
        self.a, self.left, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        left, right = y[:, : self.dim // 2], y[:, self.dim // 2 :]
        return self.b(torch.cat([self.left(left), right], 1))


class Literal(nn.Module):
    """A size in the code of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv1d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(x.shape[0], 12, 64))


class SplitLiteral(nn.Module):
    """Splits by a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.a(x), 8, 1)
        return self.b(left * right)


class PlainTensor(nn.Module):
    """Keeps a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.gain = torch.rand(1, 8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.gain)


def half(graph: mg.ChannelGraph) -> mg.Plan:
    return mg.uniform(graph, 0.5, round_to=1)


def budget(graph: mg.ChannelGraph) -> mg.Plan:
    return mg.plan(graph, {"params": "60%"})


def without(*globs: str) -> Planner:
    return lambda graph: mg.uniform(graph, 0.5, exclude=globs, round_to=1)


def widths(**sizes: int) -> Planner:
    return lambda graph: set_widths(graph, {k.replace("__", "*"): v for k, v in sizes.items()})


def resized(
    net: nn.Module, example: Tensor, planner: Planner = half
) -> tuple[ModuleReport, ir.Model]:
    """Resize a network in place; the same by ONNX, checked there against the masked original."""
    graph = mg.lift(mg.export(net, (example,)))
    plan = planner(graph)
    assert plan.groups
    small = mg.apply(graph, plan, weights=net)
    return mg.resize_module(net, graph, plan), small


def assert_equal_to(small: ir.Model, net: nn.Module, seed: int = 5) -> None:
    """The network gives what ONNX Runtime gives, on inputs that the resize has not seen."""
    feeds: dict[str, Any] = ort.random_inputs(small, seed)
    if next(iter(feeds.values())).dtype == np.int64:
        generator = np.random.default_rng(seed)
        feeds = {name: generator.integers(0, 20, array.shape) for name, array in feeds.items()}
    with torch.no_grad():
        found = net.eval()(*map(torch.from_numpy, feeds.values()))
    (expected,) = ort.run(small, feeds).values()
    assert found.shape == expected.shape
    assert np.abs(found.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    for layer in (net[0], net[2]):
        prune.l1_unstructured(layer, "weight", 0.3)
    return net


def normalized(norm: Callable[..., Any]) -> nn.Module:
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 2, 1)
    )


def shuffled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ChannelShuffle(4), nn.ReLU(), nn.Conv2d(16, 2, 1))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 12, 2),
        nn.Conv2d(12, 12, 3, groups=3),
        nn.PReLU(12),
        nn.Conv2d(12, 2, 1),
    )


def group_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.GroupNorm(4, 16, affine=False),
        nn.Conv2d(16, 12, 1),
        nn.InstanceNorm2d(12),
        nn.Conv2d(12, 2, 1),
    )


def layer_norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 16),
        nn.LayerNorm(16, elementwise_affine=False),
        nn.Linear(16, 24),
        nn.RMSNorm(24),
        nn.Linear(24, 2),
    )


def unflattened() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), nn.Unflatten(1, (6, 4)), nn.ReLU(), nn.Conv1d(6, 2, 1)
    )


def encoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 2)
    )


SEQUENCE = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, Planner]] = {
    "plain": (plain, IMAGE, half),
    "depthwise": (depthwise, IMAGE, half),
    "group norm": (group_norms, IMAGE, half),
    "layer norm": (layer_norms, ROWS, half),
    "unflatten": (unflattened, IMAGE, half),
    "shuffle": (shuffled, IMAGE, half),
    "feed forward of an encoder": (encoder, SEQUENCE, without("*self_attn*", "*residual*")),
    "lstm": (lambda: Recurrent(nn.LSTM), IDS, half),
    "gru": (lambda: Recurrent(nn.GRU, 2), IDS, half),
    "tied": (Tied, IDS, half),
    "weight norm": (lambda: normalized(parametrizations.weight_norm), IMAGE, half),
    "spectral norm": (lambda: normalized(nn.utils.spectral_norm), IMAGE, half),
    "prune": (pruned, IMAGE, half),
    "buffers": (Buffers, IMAGE, half),
    "halves": (Halves, IMAGE, half),
    "split by a number": (lambda: nn.Sequential(C2f(3, 16, 2), nn.Conv2d(16, 2, 1)), IMAGE, half),
    "heads": (Transformer, IDS, half),
    "heads of unequal number": (
        Transformer,
        IDS,
        lambda graph: set_widths(graph, {"layers.0 (*": 2, "layers.1 (*": 1}),
    ),
    "heads in a config": (lambda: Transformer(ConfigAttention), IDS, half),
}


QUICK = ("depthwise", "heads")


def _quick_or_long(kind: str) -> Any:
    return kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long)


@pytest.mark.parametrize("kind", [_quick_or_long(kind) for kind in NETWORKS])
def test_computes_what_its_resized_onnx_computes(kind: str) -> None:
    make, example, planner = NETWORKS[kind]
    torch.manual_seed(0)
    net = randomize_weights(make(), example)
    _, small = resized(net, example, planner)
    assert_equal_to(small, net)
    net.train()(example).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def test_a_plain_network_by_hand() -> None:
    torch.manual_seed(0)
    net: Any = randomize_weights(plain(), IMAGE)
    graph = mg.lift(mg.export(net, (IMAGE,)))
    plan = mg.uniform(graph, 0.5, round_to=1)
    keep = {graph.groups[k].name: v for k, v in plan.keep_channels(graph).items()}
    first, second = torch.from_numpy(keep["0"]), torch.from_numpy(keep["3"])
    old = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    same = mg.to_torch(mg.apply(graph, plan, weights=net))
    mg.resize_module(net, graph, plan)
    expected = {
        "0.weight": old["0.weight"][first],
        "0.bias": old["0.bias"][first],
        "1.running_var": old["1.running_var"][first],
        "3.weight": old["3.weight"][second][:, first],
        "5.weight": old["5.weight"].view(10, 16, 36)[:, second].flatten(1),
        "5.bias": old["5.bias"],
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=0, atol=0)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net.eval()(x), same(x))
    sizes = [net[0].out_channels, net[1].num_features, net[3].in_channels, net[5].in_features]
    assert sizes == [4, 4, 4, 288]


def attributes(module: nn.Module, *names: str) -> list[Any]:
    return [getattr(module, name) for name in names]


@pytest.mark.long
def test_sizes_of_torchs_layers_follow() -> None:
    net = depthwise()
    resized(net, IMAGE)
    sizes = ("in_channels", "out_channels", "groups")
    for k in (0, 1, 2, 3, 5):
        layer: Any = net.get_submodule(str(k))
        inputs, outputs, groups = attributes(layer, *sizes)
        kernel = (inputs, outputs // groups) if k == 2 else (outputs, inputs // groups)
        assert tuple(layer.weight.shape[:2]) == kernel
    assert net.get_submodule("1").groups == net.get_submodule("0").out_channels == 4


@pytest.mark.long
def test_sizes_that_no_tensor_tells_follow() -> None:
    net: Any = group_norms()
    resized(net, IMAGE)
    assert attributes(net[1], "num_groups", "num_channels") == [2, 8]
    assert attributes(net[4], "num_groups", "num_channels") == [2, 8]
    assert net[6].num_features == 6
    net = layer_norms()
    resized(net, ROWS)
    assert (net[1].normalized_shape, net[3].normalized_shape) == ((8,), (12,))


@pytest.mark.long
def test_a_recurrent_layer_keeps_its_sizes_in_step() -> None:
    net: Any = Recurrent(nn.LSTM)
    resized(net, IDS)
    assert attributes(net.rnn, "input_size", "hidden_size") == [6, 8]
    assert attributes(net.emb, "embedding_dim", "num_embeddings", "padding_idx") == [6, 20, 3]
    assert [tuple(p.shape) for p in net.rnn._flat_weights[:2]] == [(32, 6), (32, 8)]


@pytest.mark.long
def test_layers_of_a_recurrent_stack_must_stay_alike() -> None:
    net = Recurrent(nn.LSTM, 2)
    graph = mg.lift(mg.export(net, (IDS,)))
    hidden = [g for g in graph.groups if g.resizable and g.width == 16]
    plan = set_widths(graph, {hidden[0].id: 8})
    with pytest.raises(UnsupportedError, match=r"'rnn' \(LSTM\): its layers .* \(8, 16\)"):
        mg.resize_module(net, graph, plan)


@pytest.mark.long
def test_attention_of_torch_by_heads_and_width() -> None:
    net: Any = encoder()
    graph = mg.lift(mg.export(net, (SEQUENCE,)))
    heads = next(g for g in graph.groups if g.resizable and g.width == 4)
    width = next(g for g in graph.groups if g.resizable and g.width == 16)
    with pytest.raises(UnsupportedError, match=r"'1.self_attn'.*16 channels and the heads 12"):
        mg.resize_module(net, graph, set_widths(graph, {heads.id: 3}))
    plan = set_widths(graph, {heads.id: 3, width.id: 12})
    small = mg.apply(graph, plan, weights=net)
    mg.resize_module(net, graph, plan)
    assert attributes(net[1].self_attn, "embed_dim", "num_heads", "head_dim") == [12, 3, 4]
    assert_equal_to(small, net)


def test_a_training_forward_keeps_its_auxiliary_layers() -> None:
    torch.manual_seed(0)
    net = randomize_weights(Segmenter(), IMAGE)
    graph = mg.lift(mg.export(net, (IMAGE,)))
    plan = budget(graph)
    keep = {graph.groups[k].name: v for k, v in plan.keep_channels(graph).items()}
    kept = torch.from_numpy(keep["early.1.conv"])
    before = net.get_parameter("aux.0.conv.weight").clone()
    report = mg.resize_module(net, graph, plan)
    torch.testing.assert_close(
        net.get_parameter("aux.0.conv.weight"), before[:, kept], rtol=0, atol=0
    )
    assert report.training.startswith("equal to its resized ONNX")
    results = net.train()(IMAGE)
    loss = results["out"].square().mean() + 0.4 * results["aux"].square().mean()
    loss.backward()
    assert net.get_parameter("aux.0.conv.weight").grad is not None
    torch.optim.AdamW(net.parameters()).step()


class Untraceable(nn.Module):
    """An auxiliary head that no exporter can look at."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        if not self.training:
            return self.b(y)
        if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
            raise RuntimeError("not now")
        return self.b(y), self.aux(y.mean((2, 3)))


class Sorting(Untraceable):
    """Its training forward does something that depends on numbers."""

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        if not self.training:
            return self.b(y)
        pooled = y.mean((2, 3))
        order = sorted(range(len(pooled)), key=lambda k: float(pooled[k].sum()))
        return self.b(y), self.aux(pooled[order])


@pytest.mark.long
def test_an_auxiliary_layer_that_cannot_be_followed_is_named() -> None:
    net = Untraceable()
    with Unchanged(net), pytest.raises(UnsupportedError) as caught:
        resized(net, IMAGE)
    for words in ("training forward", "test_resize_module.py:", "could not be followed"):
        assert words in str(caught.value)


@pytest.mark.long
def test_a_training_forward_that_depends_on_numbers_runs() -> None:
    net: Any = Sorting()
    report, _ = resized(net, IMAGE)
    assert (report.training, net.aux.in_features) == ("runs", 4)


@pytest.mark.long
def test_a_detector_trains_with_its_own_loss() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    net = randomize_weights(Detector(), example)
    _, small = resized(net, example, without("psa.cv1*", "*attn*", "head.cv2.?.1*"))
    assert_equal_to(small, net)
    detector: Any = net
    assert detector.psa.c == detector.psa.attn.qkv.in_channels
    raw = net.train()(example)
    assert [tuple(r.shape) for r in raw] == [(2, 21, 16, 16), (2, 21, 8, 8)]
    sum(r.square().mean() for r in raw).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()


@pytest.mark.long
def test_halves_of_unequal_size_are_named() -> None:
    net = nn.Sequential(C2f(3, 16), nn.Conv2d(16, 2, 1))
    graph = mg.lift(mg.export(net, (IMAGE,)))
    halves = [g for g in graph.groups if g.name.startswith("0.cv1")]
    plan = set_widths(graph, {halves[0].id: 3})
    with Unchanged(net), pytest.raises(UnsupportedError, match=r"'0' \(C2f\).*'0.cv1"):
        mg.resize_module(net, graph, plan)


class Unchanged:
    """A context after which a network has the same objects, numbers and attributes as before."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for path, module in self.net.named_modules():
            plain = {k: v for k, v in vars(module).items() if not k.startswith("_")}
            seen[path] = {k: v for k, v in plain.items() if not isinstance(v, Tensor | nn.Module)}
        for name, tensor in self.net.state_dict(keep_vars=True).items():
            seen[name] = (id(tensor), tuple(tensor.shape), tensor.detach().numpy().tobytes())
        return copy.deepcopy(seen)

    def __enter__(self) -> None:
        self.before = self.seen()

    def __exit__(self, *_: object) -> None:
        assert self.seen() == self.before


@pytest.mark.parametrize(
    ("make", "example", "planner", "words"),
    [
        (Literal, IMAGE, half, "Literal, .*test_resize_module.py:[0-9]+: its eval forward"),
        pytest.param(
            SplitLiteral,
            IMAGE,
            half,
            "SplitLiteral, .*x.shape.*leave 'a",
            marks=pytest.mark.long,
        ),
        pytest.param(PlainTensor, IMAGE, half, "self.gain buffers", marks=pytest.mark.long),
        (
            lambda: Transformer(LiteralAttention),
            IDS,
            lambda graph: set_widths(graph, {"layers.1 (*": 2}),
            r"module 'layers.1' \(LiteralAttention\).*differs by",
        ),
        pytest.param(
            lambda: Transformer(ConfigAttention),
            IDS,
            lambda graph: set_widths(graph, {"layers.0 (*": 2, "layers.1 (*": 1}),
            r"\(ConfigAttention\).*'config.heads'.*same=",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_size_that_nobody_sees_is_named(
    make: Callable[[], nn.Module], example: Tensor, planner: Planner, words: str
) -> None:
    torch.manual_seed(0)
    net = randomize_weights(make(), example)
    with Unchanged(net), pytest.raises(UnsupportedError, match=words):
        resized(net, example, planner)
    assert net(example) is not None


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:masking changed")
def test_untrained_weights_hide_no_wrong_number_of_heads() -> None:
    """Under such weights attention is uniform, and any number of heads gives the same."""
    torch.manual_seed(0)
    net: Any = Transformer()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=1e-3)
    resized(net, IDS, lambda graph: set_widths(graph, {"layers.0 (*": 2, "layers.1 (*": 1}))
    assert [layer.n_head for layer in net.layers] == [2, 1, 4]


def test_parameters_stay_the_same_objects() -> None:
    torch.manual_seed(0)
    net: Any = randomize_weights(Tied(), IDS)
    graph = mg.lift(mg.export(net, (IDS,)))
    plan = half(graph)
    net.up.weight.requires_grad_(False)  # later, for what is frozen keeps its size
    seen: list[torch.Size] = []
    net.up.bias.register_hook(lambda grad: seen.append(grad.shape))
    net.up.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    before = {name: id(p) for name, p in net.named_parameters(remove_duplicate=False)}
    loss = net(IDS).sum()  # autograd remembers shapes as long as this is alive
    small = mg.apply(graph, plan, weights=net)
    mg.resize_module(net, graph, plan)
    assert {n: id(p) for n, p in net.named_parameters(remove_duplicate=False)} == before
    assert net.head.weight is net.emb.weight
    assert not net.up.weight.requires_grad
    seen.clear()
    net(IDS).sum().backward()
    assert seen == [torch.Size([2, 5, 16]), torch.Size([16])]
    assert net.up.weight.grad is None
    assert net.down.weight.grad.shape == net.down.weight.shape
    assert loss.requires_grad
    assert_equal_to(small, net)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(torch.float64, marks=pytest.mark.long),
        pytest.param(torch.bfloat16, marks=pytest.mark.long),
    ],
)
def test_the_element_type_is_kept(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = randomize_weights(plain(), IMAGE).to(dtype)
    before = net.state_dict()["0.weight"].clone()
    graph = mg.lift(mg.export(net, (IMAGE.to(dtype),)))
    plan = half(graph)
    report = mg.resize_module(net, graph, plan)
    assert {p.dtype for p in net.parameters()} == {dtype}
    kept = torch.from_numpy(plan.keep_channels(graph)[graph.group("0").index])
    torch.testing.assert_close(net.state_dict()["0.weight"], before[kept], rtol=0, atol=0)
    assert report.error < report.tolerance < 1e-3


@pytest.mark.long
def test_the_result_is_an_ordinary_module() -> None:
    torch.manual_seed(0)
    net = randomize_weights(pruned(), IMAGE)
    _, small = resized(net, IMAGE)
    twin = copy.deepcopy(net)
    assert_equal_to(small, twin)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert_equal_to(small, torch.load(file, weights_only=False))
    state = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    assert_equal_to(small, net)
    twin.load_state_dict(net.state_dict())
    assert_equal_to(small, twin)
    net.load_state_dict(state)
    again = mg.lift(mg.export(twin, (IMAGE,)))
    assert mg.cost(again, "flops").total == mg.cost(mg.lift(small), "flops").total


@pytest.mark.long
def test_parametrizations_and_masks_stay() -> None:
    net: Any = normalized(parametrizations.weight_norm)
    resized(net, IMAGE)
    assert parametrize.is_parametrized(net[0], "weight")
    assert attributes(net[2], "in_channels", "out_channels") == [4, 4]
    net = pruned()
    mask = net[0].weight_mask.clone()
    graph = mg.lift(mg.export(net, (IMAGE,)))
    plan = half(graph)
    mg.resize_module(net, graph, plan)
    kept = torch.from_numpy(plan.keep_channels(graph)[graph.group("0").index])
    assert torch.equal(net[0].weight_mask, mask[kept])


@pytest.mark.long
def test_a_network_grows() -> None:
    torch.manual_seed(0)
    net: Any = randomize_weights(depthwise(), IMAGE)
    x = torch.randn(2, 3, 8, 8)
    before = net(x)

    def wider(graph: mg.ChannelGraph) -> mg.Plan:
        none = set_widths(graph, {"0": 8})
        return mg.expand(graph, none, budget={"params": "150%"}, round_to=1)

    _, small = resized(net, IMAGE, wider)
    assert net[0].out_channels > 8
    assert net[1].groups == net[0].out_channels
    assert_equal_to(small, net)
    torch.testing.assert_close(net(x), before)


@pytest.mark.long
def test_growth_of_what_the_graph_does_not_show_is_refused() -> None:
    net = Segmenter()
    graph = mg.lift(mg.export(net, (IMAGE,)))
    plan = mg.expand(graph, mg.uniform(graph, 1.0), budget={"params": "200%"})
    with Unchanged(net), pytest.raises(UnsupportedError, match="plan without new channels"):
        mg.resize_module(net, graph, plan)


@pytest.mark.long
def test_a_layer_that_vanishes_is_refused() -> None:
    from morphgraph.testing.examples import image, residual_cnn

    net = residual_cnn()
    graph = mg.lift(mg.export(net, image(2)))
    plan = set_widths(graph, {"blocks.0.conv1": 0})
    with (
        Unchanged(net),
        pytest.raises(UnsupportedError, match=r"'blocks.0.conv1.weight'.*min_width"),
    ):
        mg.resize_module(net, graph, plan)


@pytest.mark.long
def test_a_plan_and_an_example_are_enough() -> None:
    torch.manual_seed(0)
    net: Any = plain()
    plan = half(mg.lift(mg.export(net, (IMAGE,))))
    with pytest.raises(PlanError, match="example="):
        mg.resize_module(net, plan)
    mg.resize_module(net, plan, example=IMAGE)
    assert net[0].out_channels == 4


@pytest.mark.long
def test_a_plan_for_another_network_is_refused() -> None:
    net, other = plain(), depthwise()
    graph = mg.lift(mg.export(net, (IMAGE,)))
    with pytest.raises(PlanError, match="another network"):
        mg.resize_module(net, graph, half(mg.lift(mg.export(other, (IMAGE,)))))
    with Unchanged(other), pytest.raises(ModelError):
        mg.resize_module(other, graph, half(graph))


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.long
def test_a_network_that_computes_something_else_is_refused() -> None:
    net = plain()
    graph = mg.lift(mg.export(net, (IMAGE,)))
    other = Doubled(*net)
    with Unchanged(other), pytest.raises(UnsupportedError, match="before the resize"):
        mg.resize_module(other, graph, half(graph))


@pytest.mark.long
def test_modes_and_random_numbers_stay() -> None:
    net = Segmenter().train()
    net.early.eval()
    modes = [module.training for module in net.modules()]
    buffers = [buffer.clone() for buffer in net.aux.buffers()]
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    mg.resize_module(net, *_planned(net))
    assert torch.rand(1) == expected
    assert [module.training for module in net.modules()] == modes
    for old, new in zip(buffers, net.aux.buffers(), strict=True):
        assert torch.equal(old, new)


def _planned(net: nn.Module) -> tuple[mg.ChannelGraph, mg.Plan]:
    state = torch.get_rng_state()
    graph = mg.lift(mg.export(net, (IMAGE,)))
    torch.set_rng_state(state)
    return graph, half(graph)


def test_the_report_says_what_has_changed() -> None:
    net = Transformer()
    report, _ = resized(net, IDS, lambda graph: set_widths(graph, {"layers.0 (*": 2}))
    lines = str(report).splitlines()
    assert "  layers.0.q.weight: 16x16 -> 8x16" in lines
    assert "  layers.0.q (Linear): out_features 16 -> 8" in lines
    assert "  layers.0 (Attention): n_head 4 -> 2" in lines
    assert not [line for line in lines if "layers.1" in line]


@pytest.mark.long
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_segmentation_networks_of_torchvision(name: str) -> None:
    from torchvision.models import segmentation

    torch.manual_seed(0)
    net = getattr(segmentation, name)(
        weights=None, weights_backbone=None, aux_loss=True, num_classes=5
    )
    example = torch.randn(2, 3, 64, 64)
    randomize_weights(net, example)
    graph = mg.lift(mg.export(net, (example,)))
    plan = mg.plan(graph, {"flops": "50%"})
    small = mg.apply(graph, plan, weights=net)
    mg.resize_module(net, graph, plan)
    expected = list(ort.run(small, {small.graph.inputs[0].name or "": example.numpy()}).values())
    with torch.no_grad():
        found = list(net.eval()(example).values())
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(mine.numpy() - theirs).max() < 1e-4 * np.abs(theirs).max()
    results = net.train()(example)
    sum(result.square().mean() for result in results.values()).backward()
    torch.optim.SGD(net.parameters(), lr=0.01).step()


@pytest.mark.long
def test_auxiliary_classifiers_of_googlenet() -> None:
    from torchvision.models import googlenet

    torch.manual_seed(0)
    net: Any = googlenet(weights=None, init_weights=False, aux_logits=True, num_classes=7)
    example = torch.randn(2, 3, 96, 96)
    randomize_weights(net, example)
    report, small = resized(net, example, half)
    assert_equal_to(small, net)
    assert report.training.startswith("equal")
    logits, second, first = net.train()(example)
    (logits.sum() + second.sum() + first.sum()).backward()


def test_a_compiled_network_is_not_compiled_for_every_run() -> None:
    """Its runs are eager, whatever they try; what was compiled compiles once more, and is right."""
    torch.compiler.reset()
    compiled: list[int] = []

    def backend(traced: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(len(compiled))
        return traced.forward

    net = C2f(3, 16).eval()
    randomize_weights(net, (IMAGE,))
    net.eval()
    graph = mg.lift(mg.export(net, (IMAGE,)))
    net.compile(backend=backend)
    net(IMAGE)
    assert len(compiled) == 1
    plan = mg.uniform(graph, 0.5)
    (expected,) = ort.run(mg.apply(graph, plan), {"x": IMAGE.numpy()}).values()
    mg.resize_module(net, graph, plan)
    assert len(compiled) == 1
    with torch.no_grad():
        found = net(IMAGE)
    assert len(compiled) > 1
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


class Pyramid(nn.Module):
    """Runs a layer more than its results need."""

    def __init__(self, *, add: bool) -> None:
        super().__init__()
        self.stem, self.add = ConvBlock(3, 12, 3), add
        self.lateral = nn.ModuleList(nn.Conv2d(12, 10, 1) for _ in range(2))
        self.after = nn.ModuleList(nn.Conv2d(10, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        maps = [after(F.relu(lateral(x))) for lateral, after in zip(self.lateral, self.after)]
        if self.add:
            maps[1] = maps[1] + maps[0]
        out: Tensor = self.head(F.relu(maps[0]))
        return out


@pytest.mark.filterwarnings("ignore:network Pyramid. its forward in eval is exported")
def test_layers_whose_results_nobody_uses_follow() -> None:
    net = Pyramid(add=False).eval()
    randomize_weights(net, (IMAGE,))
    net.eval()
    graph = mg.lift(mg.export(net, (IMAGE,)))
    plan = mg.uniform(graph, 0.5)
    (expected,) = ort.run(mg.apply(graph, plan), {"x": IMAGE.numpy()}).values()
    mg.resize_module(net, graph, plan)
    with torch.no_grad():
        np.testing.assert_allclose(net(IMAGE).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert net.lateral[1].weight.shape == (10, 8, 1, 1)


@pytest.mark.filterwarnings("ignore:network Pyramid. its forward in eval is exported")
def test_what_is_combined_for_nobody_is_named() -> None:
    net = Pyramid(add=True).eval()
    graph = mg.lift(mg.export(net, (IMAGE,)))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedError, match=r"no result depends on .*'after.1.weight'.*do not"):
        mg.resize_module(net, graph, mg.uniform(graph, 0.5))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_layers_of_one_recurrent_module_have_one_width() -> None:
    """What the refusal says works: a plan of one width, or a module for every layer."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 12, num_layers=2, batch_first=True)
            self.head = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            head: torch.Tensor = self.head(self.rnn(x)[0])
            return head

    torch.manual_seed(0)
    net, x = Tagger().eval(), torch.randn(2, 5, 4)
    graph = mg.lift(mg.export(net, x))
    unequal = mg.plan(graph, {}, widths={"rnn #1": 5, "rnn #2": 8})
    with pytest.raises(UnsupportedError, match=r"\(5, 8\).*same=.*mg\.to_torch"):
        mg.resize_module(copy.deepcopy(net), graph, unequal)
    small = mg.apply(graph, unequal, weights=net)
    (found,) = ort.run(small, {"x": x.numpy()}).values()
    torch.testing.assert_close(mg.to_torch(small)(x), torch.from_numpy(found))
    equal = mg.plan(graph, {"flops": "50%"}, same=["rnn*"])
    mg.resize_module(net, graph, equal)
    (found,) = ort.run(mg.apply(graph, equal), {"x": x.numpy()}).values()
    torch.testing.assert_close(net(x), torch.from_numpy(found))
