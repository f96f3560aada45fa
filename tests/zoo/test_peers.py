"""One construct a network: 31 on which pruners in PyTorch crash, err, or are right.

Each is written as people write it, exported, proven (resized equals masked, planted wrong slices
are rejected), and loaded back: equal to ONNX Runtime, every parameter trainable and under its name.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import prove, random_plan, randomize_weights
from morphgraph.torch_io.export import export
from morphgraph.torch_io.to_torch import to_torch

IMAGE = (1, 3, 8, 8)


class Net(nn.Module):
    """Modules in a chain, with a function of them all in between where one is given."""

    def __init__(
        self, *modules: nn.Module, forward: Callable[..., Tensor] | None = None, **named: nn.Module
    ) -> None:
        super().__init__()
        self.chain = nn.Sequential(*modules)
        self.function = forward
        for name, module in named.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) if self.function is None else self.function(self, x)


def conv(i: int, o: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def between(forward: Callable[[Tensor], Tensor], made: int, read: int) -> Net:
    """Something that has no weights, between a convolution and another."""
    return Net(
        a=conv(3, made, 3),
        b=conv(read, 4),
        forward=lambda net, x: net.b(forward(torch.relu(net.a(x)))),
    )


class Bottlenecks(nn.Module):
    """YOLOv8's C2f: split, chained bottlenecks, all parts concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(8, 12), conv(24, 10)
        self.m = nn.ModuleList(nn.Sequential(conv(6, 6, 3), nn.SiLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(m(parts[-1]) for m in self.m)
        return self.cv2(torch.cat(parts, 1))


class CrossStage(nn.Module):
    """CSP: one path through bottlenecks, one around them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(8, 6), conv(8, 5), conv(6, 6, 3), conv(11, 10)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.a(x))
        return self.d(torch.cat([inner + torch.relu(self.c(inner)), self.b(x)], 1))


class Raw(nn.Module):
    """A parameter of the network's own in a matrix product."""

    def __init__(self, einsum: bool) -> None:
        super().__init__()
        self.w, self.out, self.einsum = nn.Parameter(torch.randn(6, 10)), nn.Linear(10, 4), einsum

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("btc,cd->btd", x, self.w) if self.einsum else x @ self.w
        return self.out(torch.relu(h))


class Scaled(nn.Module):
    """A buffer scales the channels."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8, 3), conv(8, 4)
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * self.scale)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn, self.out = kind(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Heads(nn.Module):
    """Self-attention by reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).reshape(b, t, c))


class Tied(nn.Module):
    """An embedding whose matrix is the classifier's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(9, 12, bias=False), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.mix(self.embed(x))), self.embed.weight.t())


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.squeeze, self.excite = (
            conv(3, 12, 3),
            conv(12, 4),
            conv(12, 5),
            conv(5, 12),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        gate = self.excite(F.silu(self.squeeze(h.mean((2, 3), keepdim=True)))).sigmoid()
        return self.b(h * gate)


def shuffled_by_view(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)


def unequal_split(x: Tensor) -> Tensor:
    p, q, r = torch.split(x, [2, 5, 3], 1)
    return torch.cat([r, p * 2, torch.sigmoid(q)], 1)


# name -> network, shape of its input, widths of the groups that shrink
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "depthwise, multiplier 2": (
        lambda: Net(conv(3, 6, 3), nn.ReLU(), conv(6, 12, 3, groups=6), nn.ReLU(), conv(12, 4)),
        IMAGE,
        [6],
    ),
    "grouped transposed convolution": (
        lambda: Net(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), conv(12, 4)),
        IMAGE,
        [2, 3],
    ),
    "pixel shuffle": (lambda: between(nn.PixelShuffle(2), 24, 6), IMAGE, [6]),
    "pixel unshuffle": (lambda: between(nn.PixelUnshuffle(2), 6, 24), IMAGE, [6]),
    "unequal split": (lambda: between(unequal_split, 10, 10), IMAGE, [3, 5, 2]),
    "C2f": (
        lambda: Net(conv(3, 8), nn.ReLU(), Bottlenecks(), nn.ReLU(), conv(10, 4)),
        IMAGE,
        [8, 6, 6, 6, 6, 10],
    ),
    "CSP": (
        lambda: Net(conv(3, 8), nn.ReLU(), CrossStage(), nn.ReLU(), conv(10, 4)),
        IMAGE,
        [8, 6, 5, 10],
    ),
    "channel gather": (lambda: between(lambda x: x[:, [3, 0, 5, 5, 2]], 6, 5), IMAGE, [2, 3, 1]),
    "raw parameter in matmul": (lambda: Raw(einsum=False), (2, 5, 6), [10]),
    "raw parameter in einsum": (lambda: Raw(einsum=True), (2, 5, 6), [10]),
    "buffer that scales channels": (Scaled, IMAGE, [8]),
    "LSTM": (lambda: Recurrent(nn.LSTM), (2, 5, 6), [8]),
    "GRU": (lambda: Recurrent(nn.GRU), (2, 5, 6), [8]),
    "channel shuffle by view": (lambda: between(shuffled_by_view, 12, 12), IMAGE, [4]),
    "heads by reshape": (Heads, (2, 5, 12), [4]),
    "F.channel_shuffle": (lambda: between(lambda x: F.channel_shuffle(x, 3), 12, 12), IMAGE, [4]),
    "4 groups feed 6": (
        lambda: Net(
            conv(3, 16),
            nn.ReLU(),
            conv(16, 24, groups=4),
            nn.ReLU(),
            conv(24, 12, groups=6),
            conv(12, 4),
        ),
        IMAGE,
        [4, 2, 2],
    ),
    "tied weights": (Tied, (2, 5, 9), [12]),
    "transposed convolution": (
        lambda: Net(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, 2), nn.ReLU(), conv(6, 4)),
        IMAGE,
        [8, 6],
    ),
    "grouped convolution": (
        lambda: Net(conv(3, 12), nn.ReLU(), conv(12, 8, 3, groups=2), nn.ReLU(), conv(8, 4)),
        IMAGE,
        [6, 4],
    ),
    "flatten to linear": (
        lambda: Net(conv(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)),
        IMAGE,
        [6],
    ),
    "unequal concat": (
        lambda: Net(
            a=conv(3, 5),
            b=conv(3, 7),
            c=conv(12, 4),
            forward=lambda net, x: net.c(torch.cat([net.a(x), torch.relu(net.b(x))], 1)),
        ),
        IMAGE,
        [5, 7],
    ),
    "GLU by chunk": (lambda: between(lambda x: F.glu(x, 1), 12, 6), IMAGE, [6]),
    "a convolution used twice": (
        lambda: Net(
            a=conv(3, 8),
            b=conv(8, 8, 3),
            c=conv(8, 4),
            forward=lambda net, x: net.c(net.b(torch.relu(net.b(torch.relu(net.a(x)))))),
        ),
        IMAGE,
        [8],
    ),
    "squeeze and excite": (SqueezeExcite, IMAGE, [12, 5]),
    "group norm": (
        lambda: Net(conv(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 4)),
        IMAGE,
        [4],
    ),
    "PReLU": (lambda: Net(conv(3, 8, 3), nn.PReLU(8), conv(8, 4)), IMAGE, [8]),
    "Conv1d": (
        lambda: Net(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1)),
        (1, 3, 9),
        [8],
    ),
    "Conv3d": (
        lambda: Net(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 1)),
        (1, 3, 4, 4, 4),
        [8],
    ),
    "broadcast add": (
        lambda: Net(
            a=conv(3, 8),
            b=conv(3, 8),
            c=conv(8, 4),
            forward=lambda net, x: net.c(net.a(x) + net.b(x.mean((2, 3), keepdim=True))),
        ),
        IMAGE,
        [8],
    ),
    "NHWC permute": (
        lambda: Net(
            a=conv(3, 8),
            b=nn.Linear(8, 6),
            c=conv(6, 4),
            forward=lambda net, x: net.c(
                net.b(net.a(x).permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)
            ),
        ),
        IMAGE,
        [8, 6],
    ),
}


def test_none_is_left_out() -> None:
    assert len(NETWORKS) == 31


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_peers_construct(name: str) -> None:
    build, shape, widths = NETWORKS[name]
    torch.manual_seed(0)
    example = torch.randn(shape)
    net = randomize_weights(build(), example)
    model = export(net, (example,))
    feeds = {model.graph.inputs[0].name or "": example.numpy()}
    with torch.no_grad():
        expected = net(example).numpy()
    (found,) = run(model, feeds).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    graph = lift(model)
    assert [group.width for group in graph.groups if group.resizable] == widths
    prove(graph, seeds=(0, 1), faults=8)
    plan = random_plan(graph)
    small = resize(graph, plan.keep_channels(graph))
    again = to_torch(small)
    assert set(dict(again.named_parameters())) == set(dict(net.named_parameters()))
    inputs = random_inputs(small)
    output = again(*(torch.from_numpy(x) for x in inputs.values()))
    (expected,) = run(small, inputs).values()
    np.testing.assert_allclose(
        output.detach().numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
