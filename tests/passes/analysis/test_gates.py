"""Which scales close which groups, held against what the networks compute."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.arrays import Array
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import PARAMETERS_KEY
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.analysis.channel_sources import channel_scales
from morphgraph.passes.analysis.gates import (
    closing_scales,
    closing_shifts,
    deciding_scales,
    deciding_shifts,
    gated_groups,
)
from morphgraph.testing import model_from_text

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, nn.Parameter(layer) if isinstance(layer, Tensor) else layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(into: int, out: int, size: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, padding=size // 2, groups=groups)


def chain(*layers: nn.Module) -> Net:
    return Net(lambda n, x: n.chain(x), chain=nn.Sequential(*layers))


class ConvNextBlock(nn.Module):
    """Depthwise convolution, LayerNorm, an MLP, a layer scale, all on the skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dw, self.norm = conv(width, width, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


class Attention(nn.Module):
    """Of two heads; its kernels are apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def norm_last(x: Tensor, norm: nn.Module) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


RELU = nn.ReLU()
NORM = nn.BatchNorm2d
# Per network the deciding scales, as sets that close a group each.
NETS: dict[str, tuple[Callable[[], Net], Sequence[set[str]]]] = {
    "plain": (lambda: chain(conv(3, 4), NORM(4), RELU, conv(4, 2)), [{"chain.1"}]),
    "no norm": (lambda: chain(conv(3, 4), RELU, conv(4, 2)), []),
    "norm without a scale": (
        lambda: chain(conv(3, 4), NORM(4, affine=False), RELU, conv(4, 2)),
        [],
    ),
    "depthwise": (
        lambda: chain(
            conv(3, 4), NORM(4), RELU, conv(4, 4, groups=4), NORM(4), RELU, conv(4, 2, 1)
        ),
        [{"chain.4"}],
    ),
    "two in a row": (lambda: chain(conv(3, 4), NORM(4), NORM(4), conv(4, 2)), [{"chain.2"}]),
    "a residual sum": (
        lambda: Net(
            lambda n, x: n.c(F.relu(n.na(n.a(x)) + n.nb(n.b(x)))),
            a=conv(3, 4),
            na=NORM(4),
            b=conv(3, 4),
            nb=NORM(4),
            c=conv(4, 2),
        ),
        [{"na", "nb"}],
    ),
    "an arm without a norm": (
        lambda: Net(
            lambda n, x: n.c(F.relu(n.na(n.a(x)) + n.b(x))),
            a=conv(3, 4),
            na=NORM(4),
            b=conv(3, 4),
            c=conv(4, 2),
        ),
        [],
    ),
    "norms first": (
        lambda: Net(
            lambda n, x: n.c(F.relu(n.n2((y := n.a(x)) + n.b(F.relu(n.n1(y)))))),
            a=conv(3, 4),
            n1=NORM(4),
            b=conv(4, 4),
            n2=NORM(4),
            c=conv(4, 2),
        ),
        [{"n1", "n2"}],
    ),
    "a concatenation": (
        lambda: Net(
            lambda n, x: n.c(F.relu(n.n2(torch.cat([y := n.a(x), n.b(F.relu(n.n1(y)))], 1)))),
            a=conv(3, 4),
            n1=NORM(4),
            b=conv(4, 3),
            n2=NORM(7),
            c=conv(7, 2),
        ),
        [{"n1", "n2"}, {"n2"}],
    ),
    "a group norm": (
        lambda: chain(conv(3, 4), nn.GroupNorm(1, 4), RELU, conv(4, 2)),
        [{"chain.1"}],
    ),
    "group norms on a sum": (
        lambda: Net(
            lambda n, x: n.d(F.relu((y := F.relu(n.na(n.a(x)))) + n.nb(n.b(y)))),
            a=conv(3, 8),
            na=nn.GroupNorm(4, 8),
            b=conv(8, 8),
            nb=nn.GroupNorm(4, 8),
            d=conv(8, 2),
        ),
        [{"na", "nb"}],
    ),
    "group norms first": (  # the skip goes around them
        lambda: Net(
            lambda n, x: n.c(n.n2((y := n.a(x)) + n.b(F.relu(n.n1(y))))),
            a=conv(3, 4),
            n1=nn.GroupNorm(1, 4),
            b=conv(4, 4),
            n2=nn.GroupNorm(1, 4),
            c=conv(4, 2),
        ),
        [],
    ),
    "an instance norm": (
        lambda: chain(conv(3, 4), nn.InstanceNorm2d(4, affine=True), RELU, conv(4, 2)),
        [{"chain.1"}],
    ),
    "layer scale": (
        lambda: Net(
            lambda n, x: n.b(F.relu(n.scale * n.a(x))),
            a=conv(3, 4),
            scale=torch.ones(4, 1, 1),
            b=conv(4, 2),
        ),
        [{"scale"}],
    ),
    "ConvNeXt": (
        lambda: Net(
            lambda n, x: n.head(n.last(n.two(n.one(norm_last(n.a(x), n.norm))).mean((2, 3)))),
            a=conv(3, 4),
            norm=nn.LayerNorm(4),
            one=ConvNextBlock(4),
            two=ConvNextBlock(4),
            last=nn.LayerNorm(4),
            head=nn.Linear(4, 2),
        ),
        [{"norm", "one.scale", "two.scale"}],
    ),
}
TOKEN_NETS: dict[str, tuple[Callable[[], Net], Sequence[set[str]]]] = {
    "an MLP with a norm inside": (
        lambda: chain(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)),
        [{"chain.2"}],
    ),
    "a transformer, norms last": (  # what is skipped has been closed before
        lambda: Net(
            lambda n, x: n.head(
                n.n2((z := n.n1((y := n.n0(n.a(x))) + n.mix(y))) + n.down(F.gelu(n.up(z))))
            ),
            a=nn.Linear(6, 4),
            n0=nn.LayerNorm(4),
            mix=Attention(4),
            n1=nn.LayerNorm(4),
            up=nn.Linear(4, 6),
            down=nn.Linear(6, 4),
            n2=nn.LayerNorm(4),
            head=nn.Linear(4, 2),
        ),
        [{"n0", "n1", "n2"}],
    ),
    "a transformer, norms first": (  # the norms' statistics see what goes around them
        lambda: Net(
            lambda n, x: n.head(
                n.n2((z := (y := n.a(x)) + n.mix(n.n0(y))) + n.down(F.gelu(n.up(n.n1(z)))))
            ),
            a=nn.Linear(6, 4),
            n0=nn.LayerNorm(4),
            mix=Attention(4),
            n1=nn.LayerNorm(4),
            up=nn.Linear(4, 6),
            down=nn.Linear(6, 4),
            n2=nn.LayerNorm(4),
            head=nn.Linear(4, 2),
        ),
        [],
    ),
}
CASES = [(name, IMAGE, *case) for name, case in NETS.items()]
CASES += [(name, TOKENS, *case) for name, case in TOKEN_NETS.items()]


def felt(net: nn.Module) -> nn.Module:
    """Every scale and shift away from 0 and 1, so that closing one is seen."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1 or "scale" in name:
                parameter.uniform_(0.4, 1.4)
    return net.eval()


def readings(graph: ChannelGraph, channel: int, closing: Sequence[str]) -> list[tuple[str, int]]:
    """Axes on which a channel is read: by a contraction, or by the statistic of another norm.

    Behind such a norm every channel varies with what the others are.
    """
    couplings = graph.couplings
    scales = channel_scales(graph)
    found, behind = [], set()
    for number, node in enumerate(graph.ops):
        mixed = any(value is not None and value.name in behind for value in node.ir.inputs)
        ways = set()
        for edge in couplings.edges:
            dim = couplings.dims[edge.dim]
            if edge.op_index != number or edge.port < 0 or dim.value in couplings.input_independent:
                continue
            name = couplings.factors[edge.factor - len(couplings.dims)].name
            other = number in scales and scales[number].parameter not in closing
            if name in node.contracted or (name in node.statistical and other):
                if channel in graph.channels_of(edge.dim):
                    ways.add("sum" if name in node.contracted else "statistic")
                if not mixed:
                    found.append((dim.value, dim.axis))
        if "sum" not in ways and (mixed or ways):
            behind |= {value.name for value in node.ir.outputs}
    outputs = [value.name or "" for value in graph.model.graph.outputs]
    return found + [(n, k) for n in outputs if n not in behind for k in range(len(graph.shapes[n]))]


def varies(
    graph: ChannelGraph, weights: dict[str, Tensor], channel: int, closing: Sequence[str]
) -> bool:
    """Whether a reader of a channel sees it change with the input, in ONNX Runtime."""
    model = mg.with_weights(graph.model, weights)
    values = {value.name or "": value for node in model.graph for value in node.outputs}
    read = [(name, axis) for name, axis in readings(graph, channel, closing) if name in values]
    outputs = [value.name or "" for value in model.graph.outputs]
    model.graph.outputs.extend(values[n] for n in sorted({n for n, _ in read} - set(outputs)))
    (x,) = (value.name or "" for value in model.graph.inputs)
    rng = np.random.default_rng(0)
    one, other = (
        run(model, {x: rng.standard_normal(graph.shapes[x]).astype(np.float32)}) for _ in range(2)
    )
    for value, axis in read:
        here = np.flatnonzero(graph.channels_at(value, axis) == channel)
        difference = np.abs(one[value] - other[value]).take(here, axis)
        if difference.size and difference.max() > 1e-6:
            return True
    return False


def check_scales(graph: ChannelGraph, weights: dict[str, Tensor]) -> None:
    """The deciding scales of a channel at zero silence it; without any one of them they do not."""
    deciding = deciding_scales(graph)
    sources = {source.parameter: source for source in channel_scales(graph).values()}
    for index in gated_groups(graph):
        channel = int(graph.groups[index].channels[1])
        mine = [name for name, groups in deciding.items() if index in groups]
        assert mine
        assert set(mine) <= {n for n, groups in closing_scales(graph).items() if index in groups}

        def without(names: Sequence[str], channel: int = channel) -> dict[str, Tensor]:
            changed = dict(weights)
            for name in names:
                changed[name] = weights[name].clone()
                changed[name].view(-1)[torch.from_numpy(sources[name].channels == channel)] = 0
            return changed

        assert varies(graph, weights, channel, mine)
        assert not varies(graph, without(mine), channel, mine)
        for name in mine:
            rest = [other for other in mine if other != name]
            assert varies(graph, without(rest), channel, mine), (graph.groups[index].name, name)


@pytest.mark.parametrize(
    ("make", "example", "expected"),
    [pytest.param(make, example, expected, id=name) for name, example, make, expected in CASES],
)
def test_deciding_scales_close_a_channel(
    make: Callable[[], Net], example: Tensor, expected: Sequence[set[str]]
) -> None:
    torch.manual_seed(0)
    net = felt(make())
    graph = mg.lift(mg.export(net, (example,)))
    gated = gated_groups(graph)
    named = {n.removesuffix(".weight"): groups for n, groups in deciding_scales(graph).items()}
    found = [{name for name, groups in named.items() if index in groups} for index in gated]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    check_scales(graph, {name: value.detach() for name, value in net.state_dict().items()})


HEAD = '<ir_version: 11, opset_import: ["": 23]>'
TEXTS = {
    "RMSNormalization": """
        net (float[2,6] x, float[6,8] w1, float[8] g, float[8,2] w2) => (float[2,2] y) {
          a = MatMul(x, w1)
          n = RMSNormalization(a, g)
          y = MatMul(n, w2)
        }""",
    "GroupNormalization": """
        net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8] g, float[8] b, float[2,8,1,1] w2)
            => (float[1,2,4,4] y) {
          a = Conv(x, w1)
          n = GroupNormalization<num_groups=4>(a, g, b)
          r = Relu(n)
          y = Conv(r, w2)
        }""",
    "a factor behind BatchNormalization": """
        net (float[1,3,4,4] x, float[4,3,1,1] w1, float[4] s, float[4] b, float[4] m, float[4] v,
             float[4,1,1] g, float[2,4,1,1] w2) => (float[1,2,4,4] y) {
          a = Conv(x, w1)
          n = BatchNormalization(a, s, b, m, v)
          r = Mul(g, n)
          y = Conv(r, w2)
        }""",
}


@pytest.mark.parametrize("name", list(TEXTS))
def test_scales_of_foreign_models(name: str) -> None:
    model = model_from_text(HEAD + TEXTS[name])
    graph = mg.lift(model)
    weights = {
        name: torch.from_numpy(value.const_value.numpy().copy()).abs() + 0.1
        for name, value in graph.model.graph.initializers.items()
        if value.const_value is not None
    }
    assert len(gated_groups(graph)) == 1
    assert {name for name, groups in deciding_scales(graph).items() if groups} == {"g"}
    check_scales(graph, weights)


def test_an_output_that_is_not_pinned() -> None:
    torch.manual_seed(0)
    net = felt(chain(conv(3, 4), NORM(4), RELU, conv(4, 2), NORM(2), RELU))
    graph = mg.lift(mg.export(net, (IMAGE,)), pin_outputs=False)
    found = {name: len(groups) for name, groups in deciding_scales(graph).items()}
    assert found == {"chain.1.weight": 1, "chain.4.weight": 1}
    assert len(gated_groups(graph)) == 2
    check_scales(graph, {name: value.detach() for name, value in net.state_dict().items()})


def test_a_norm_that_is_used_twice() -> None:
    """One scale, two places: it closes what passes either."""
    torch.manual_seed(0)
    net = felt(
        Net(
            lambda n, x: n.c(n.n(n.a(x))) + n.d(n.n(n.b(x))),
            a=conv(3, 4),
            b=conv(3, 4),
            n=NORM(4),
            c=conv(4, 2),
            d=conv(4, 2),
        )
    )
    graph = mg.lift(mg.export(net, (IMAGE,)))
    (scale,) = deciding_scales(graph)
    assert deciding_scales(graph)[scale] == gated_groups(graph) != frozenset()


def removable(net: nn.Module, example: Tensor, **options: Any) -> ChannelGraph:
    """Proximal steps close channels exactly; what is left is the plan, and it is verified."""
    graph = mg.lift(mg.export(net, (example,)))
    reg = mg.Regularizer(graph, net, **options)
    reg.weight = 0.2 * reg.initial_cost / float(reg.marginals().detach().max())
    while reg.live_share() > 0.6:
        reg.proximal_step(0.1)
    dead = ~reg.alive()
    for _ in range(3):
        reg.proximal_step(0.1)
    assert reg.scales
    assert float(reg.strengths().detach()[dead].max()) == 0.0
    plan = reg.plan()
    np.testing.assert_array_equal(plan.widths(graph), reg.live_widths())
    trained = mg.lift(mg.with_weights(graph.model, net))
    assert mg.verify(trained, plan, mg.apply(trained, plan)).ok
    return graph


@pytest.mark.filterwarnings("ignore:masking changed the outputs")
@pytest.mark.parametrize("name", ["group norms on a sum", "a group norm", "ConvNeXt"])
def test_what_is_closed_is_removed(name: str) -> None:
    torch.manual_seed(0)
    graph = removable(felt(NETS[name][0]()), IMAGE)
    assert gated_groups(graph)


# What the arm is behind its BatchNorm -> the scales and the shifts that silence the product if all
# of them are zero; none where nothing that is trained does.
PRODUCTS: dict[str, tuple[str, str, str, str]] = {
    "as it is": ("p = Mul(a, n)", "h", "s", "h"),
    "behind a ReLU": ("r = Relu(n)  p = Mul(r, a)", "h", "s", "h"),
    "behind a HardSwish": ("r = HardSwish(n)  p = Mul(r, a)", "h", "s", "h"),
    "behind a SiLU": ("q = Sigmoid(n)  r = Mul(n, q)  p = Mul(r, a)", "h", "s", "h"),
    "squeezed": ("q = GlobalAveragePool(n)  p = Mul(a, q)", "h", "s", "h"),
    "behind a depthwise convolution": (
        "r = Relu(n)  q = Conv<group=4>(r, wd, hd)  p = Mul(a, q)",
        "h",
        "s",
        "h hd",
    ),
    "a sum of two norms": (
        "o = BatchNormalization(b, s2, h2, m, v)  q = Add(n, o)  p = Mul(a, q)",
        "h",
        "s s2",
        "h h2",
    ),
    "a shift written out": ("o = Mul(b, g)  q = Add(o, k)  p = Mul(a, q)", "h", "g", "k"),
    "less a shift": ("o = Mul(b, g)  q = Sub(o, k)  p = Mul(a, q)", "h", "g", "k"),
    "two products": ("q = Mul(a, n)  p = Mul(a, q)", "h", "s", "h"),
    "a norm behind it": (
        "q = Mul(a, n)  p = BatchNormalization(q, s2, h2, m, v)",
        "h",
        "s2",
        "",
    ),
    "without a shift": ("p = Mul(a, n)", "zero", "s", ""),
    "behind a ReLU without a shift": ("r = Relu(n)  p = Mul(r, a)", "zero", "s", ""),
    "scaled by one number each": ("q = Mul(n, g)  p = Mul(a, q)", "h", "g", ""),
    "as a gate of itself": ("q = Sigmoid(n)  p = Mul(a, q)", "h", "", ""),
    "a shift that nobody trains": ("p = Mul(a, n)", "fixed", "", ""),
    "a constant more": ("q = Add(n, fixed1)  r = Relu(q)  p = Mul(a, r)", "h", "", ""),
    "what has no channels more": (
        "one = ReduceMean<keepdims=1>(x, axes)  q = Add(n, one)  p = Mul(a, q)",
        "h",
        "",
        "",
    ),
    "a gate for all channels": (
        "one = ReduceMean<keepdims=1>(x, axes)  q = Relu(n)  p = Mul(one, q)",
        "h",
        "s",
        "h",
    ),
    "a gate for all channels without a shift": (
        "one = ReduceMean<keepdims=1>(x, axes)  p = Mul(n, one)",
        "zero",
        "s",
        "",
    ),
    "a gate for all channels behind a sigmoid": (
        "one = ReduceMean<keepdims=1>(x, axes)  q = Sigmoid(n)  p = Mul(q, one)",
        "h",
        "",
        "",
    ),
    "a norm that nobody trains": (
        "q = BatchNormalization(n, ones, zero, m, v)  p = Mul(a, q)",
        "h",
        "",
        "",
    ),
}
CONSTANTS: dict[str, Array] = {
    "zero": np.zeros(4, np.float32),
    "ones": np.ones(4, np.float32),
    "fixed": np.full(4, 0.5, np.float32),
    "fixed1": np.full(1, 3.0, np.float32),
    "axes": np.ones(1, np.int64),
}


def product_graph(body: str, shift: str) -> ChannelGraph:
    text = f"""net (float[1,3,4,4] x, float[4,3,1,1] w1, float[4,3,1,1] w2, float[4] s, float[4] h,
    float[4] s2, float[4] h2, float[4] zero, float[4] ones, float[4] fixed, float[1] fixed1,
    int64[1] axes, float[4] m, float[4] v, float[4,1,1] g, float[4,1,1] k, float[4,1,1,1] wd,
    float[4] hd, float[2,4,1,1] w3) => (float[1,2,4,4] y) {{
        {"a = Conv(x, w1)" if re.search("[(,] ?a[,)]", body) else ""}  b = Conv(x, w2)
        n = BatchNormalization(b, s, {shift}, m, v)  {body}  y = Conv(p, w3)
    }}"""
    model = model_from_text(text)
    for name, array in CONSTANTS.items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    read = {value.name for node in model.graph for value in node.inputs if value is not None}
    names = [n for n in model.graph.initializers if n in read and n not in {*CONSTANTS, "m", "v"}]
    model.metadata_props[PARAMETERS_KEY] = json.dumps(names)
    return mg.lift(model)


def is_silent(graph: ChannelGraph, zero: set[str]) -> bool:
    """Whether channel 1 of the product is a constant in ONNX Runtime, with these at zero there."""
    silent = graph.model.clone()
    for name in zero & silent.graph.initializers.keys():
        array = silent.graph.initializers[name].const_value.numpy().copy()
        array[1] = 0.0
        silent.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    product = next(n for n in silent.graph if n.outputs[0].name == "p").outputs[0]
    silent.graph.outputs.append(product)
    feeds = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 4)).astype(np.float32)
    one, other = (run(silent, {"x": x})["p"][:, 1] for x in feeds)
    return np.array_equal(one, other)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_norm_on_one_arm_of_a_product(name: str) -> None:
    """A shift that is not zero is multiplied with the other arm, so that the channel lives on."""
    body, shift, *expected = PRODUCTS[name]
    graph = product_graph(body, shift)
    (group,) = [group for group in graph.groups if group.resizable]
    found = [
        {name for name, groups in deciding.items() if group.index in groups}
        for deciding in (deciding_scales(graph), deciding_shifts(graph))
    ]
    scales, shifts = (set(names.split()) for names in expected)
    assert (group.index in gated_groups(graph)) == bool(scales)
    if scales:
        assert found == [scales, shifts]
        assert shifts <= {n for n, groups in closing_shifts(graph).items() if group.index in groups}
        assert is_silent(graph, scales | shifts)
        for one in scales | shifts:  # none is enough without the others
            assert not is_silent(graph, (scales | shifts) - {one})
    else:
        assert not is_silent(graph, {"s", "h", "s2", "h2", "g", "k", "hd"})
