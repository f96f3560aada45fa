"""The regularizer against numbers measured on the original MorphNet, and against autograd."""

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphgraph.errors import ModelError, MorphWarning, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.options import Tied
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.testing.examples import BasicBlock, image, residual_cnn
from morphgraph.torch_io.export import export
from morphgraph.torch_io.to_torch import to_torch
from morphgraph.train.regularizer import Regularizer
from morphgraph.workflow import apply

GAMMAS = {
    "conv1": [0.8] * 7 + [0.2] * 6,
    "conv2": [-0.7] * 11 + [0.1] * 12,
    "conv3": [0.6] * 10 + [-0.3] * 19,
    "conv4": [-0.5] * 17 + [-0.4] * 14,
    "dw1": [-0.3, -0.9, -0.9],
    "dw2": [0.3] * 5 + [0.9] * 10 + [-0.1] * 8,
}


class Normed(nn.Module):
    """A convolution, BatchNorm with a given scale, ReLU."""

    def __init__(self, name: str, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)
        with torch.no_grad():
            self.bn.weight.copy_(torch.tensor(GAMMAS[name]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Concat(nn.Module):
    """Oracle O1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Normed("conv1", nn.Conv2d(3, 13, (7, 5), padding=(3, 2), bias=False))
        self.conv2 = Normed("conv2", nn.Conv2d(3, 23, 1, bias=False))
        self.conv3 = Normed("conv3", nn.Conv2d(36, 29, 3, stride=2, padding=1, bias=False))
        self.conv4 = Normed("conv4", nn.Conv2d(36, 31, 1, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.conv1(x), self.conv2(x)], 1)
        return self.conv3(both), self.conv4(both)


class Depthwise(nn.Module):
    """Oracle O2."""

    def __init__(self) -> None:
        super().__init__()
        self.dw1 = Normed("dw1", nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False))
        self.conv1 = Normed("conv1", nn.Conv2d(3, 13, (7, 5), padding=(3, 2), bias=False))
        self.conv2 = Normed("conv2", nn.Conv2d(3, 23, 1, bias=False))
        self.dw2 = Normed("dw2", nn.Conv2d(23, 23, 5, padding=2, groups=23, bias=False))
        self.conv3 = Normed("conv3", nn.Conv2d(36, 29, 3, stride=2, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(torch.cat([self.conv1(self.dw1(x)), self.dw2(self.conv2(x))], 1))


class Products(nn.Module):
    """Oracle O4."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(24.0).reshape(6, 4))
        self.w2 = nn.Parameter(torch.tensor([21.0, 22.0, 23.0, 24.0]).reshape(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.relu(x @ self.w) @ self.w2)


@cache
def concat_network() -> tuple[Concat, ChannelGraph]:
    net = Concat()
    return net, lifted(net, 1, 3, 17, 19)


@cache
def residual_network() -> tuple[nn.Module, ChannelGraph]:
    net = residual_cnn()
    return net, lift(export(net.eval(), (image(),)))


def lifted(net: nn.Module, *shape: int) -> ChannelGraph:
    return lift(export(net.eval(), (torch.zeros(shape),)), pin_outputs=False)


def morphnet(graph: ChannelGraph, net: nn.Module, kind: str, **options: object) -> Regularizer:
    return Regularizer(graph, net, kind, convention="morphnet", **options)  # type: ignore[arg-type]


def by_layer(net: nn.Module, graph: ChannelGraph, kind: str, name: str) -> float:
    """The regularizer of one layer: its terms alone, from the gradient of a cost of one layer."""
    reg = morphnet(graph, net, kind, threshold=0.45)
    return reg.cost.by_layer_at(reg.live_widths())[f"{name}.conv"]


class TestConcatNetwork:
    COSTS = {
        "flops": {"conv1": 474_810, "conv2": 21_318, "conv3": 291_600, "conv4": 197_676},
        "params": {"conv1": 735, "conv2": 33, "conv3": 1_620, "conv4": 306},
    }
    TOTALS = {"flops": (985_404, 1_410_376.4), "params": (2_694, 4_569.8)}

    @pytest.mark.parametrize("kind", ["flops", "params"])
    def test_cost_and_regularizer(self, kind: str) -> None:
        net, graph = concat_network()
        reg = morphnet(graph, net, kind, threshold=0.45)
        total, regularizer = self.TOTALS[kind]
        assert reg.live_cost() == total
        assert reg.value().item() == pytest.approx(
            regularizer, abs=0.15 if kind == "flops" else 0.05
        )

    @pytest.mark.parametrize("kind", ["flops", "params"])
    @pytest.mark.parametrize("name", ["conv1", "conv2", "conv3", "conv4"])
    def test_cost_of_every_layer(self, kind: str, name: str) -> None:
        net, graph = concat_network()
        assert by_layer(net, graph, kind, name) == self.COSTS[kind][name]

    def test_gradient_is_the_marginal_cost(self) -> None:
        """dG/dgamma = sign(gamma) * dF/d(channel alive), the structure held fixed."""
        net, graph = concat_network()
        reg = morphnet(graph, net, "flops", threshold=0.45)
        net.zero_grad()
        reg.value().backward()
        per_channel = 2 * 17 * 19 * 35 * 3  # conv1 makes it
        per_channel += 2 * 9 * 10 * 9 * 10 + 2 * 17 * 19 * 17  # conv3 and conv4 read it
        gradient = net.conv1.bn.weight.grad
        assert gradient is not None
        assert torch.allclose(gradient, torch.full((13,), float(per_channel)))
        gradient = net.conv4.bn.weight.grad
        assert gradient is not None
        assert torch.allclose(gradient, torch.full((31,), -2.0 * 17 * 19 * 18))


def test_depthwise_network() -> None:
    net = Depthwise()
    graph = lifted(net, 1, 3, 17, 19)
    reg = morphnet(graph, net, "flops", threshold=0.45)  # dw1 works on the input, which is pinned
    space, half = 17 * 19, 9 * 10
    dw1, conv1 = 2 * space * 9, 2 * space * 35
    conv2, dw2, conv3 = 2 * space, 2 * space * 25, 2 * half * 9
    expected = dw1 * 3 + conv1 * 21 + conv2 * 45 + dw2 * 15 + conv3 * 220
    assert reg.live_cost() == expected
    tied = np.maximum(np.abs(GAMMAS["conv2"]), np.abs(GAMMAS["dw2"])).sum()
    into_conv3 = 6.8 + tied
    regularizer = (
        conv1 * 3 * 6.8 + conv2 * 3 * tied + dw2 * 2 * tied + conv3 * (22 * 11.7 + 10 * into_conv3)
    )
    assert reg.value().item() == pytest.approx(regularizer, rel=1e-6)


def test_the_last_of_two_norms_counts_but_in_the_original() -> None:
    """Of a pointwise and a depthwise convolution: oracle O2 has the maximum."""
    net = Depthwise()
    graph = lifted(net, 1, 3, 17, 19)
    channels = torch.from_numpy(graph.channels_at("conv2.conv.weight", 0))
    first, last = (torch.tensor(GAMMAS[name]).abs() for name in ("conv2", "dw2"))
    strengths = Regularizer(graph, net).strengths()[channels]
    assert torch.allclose(strengths, last)
    assert torch.allclose(morphnet(graph, net, "flops").strengths()[channels], first.maximum(last))


@pytest.mark.parametrize(
    ("threshold", "total", "regularizer"), [(32, 0, 642.6363), (13, 28, 839.8534)]
)
def test_group_lasso_on_matrix_products(threshold: float, total: float, regularizer: float) -> None:
    net = Products()
    graph = lifted(net, 2, 6)
    reg = morphnet(graph, net, "flops", strength="lasso", threshold=threshold)
    assert reg.live_cost() == total
    assert reg.value().item() == pytest.approx(regularizer, abs=1e-3)
    strengths = sorted(float(s) for s in reg.strengths() if s > 0)
    expected = [12.110601, 12.948616, 13.808210, 14.685594, 22.527760]
    assert strengths == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("tied", "expected"),
    [("max", [0.3, 0.4, 0.6, 0.25]), ("l2", [0.374166, 0.538516, 0.781025, 0.335410])],
)
def test_tied_producers(tied: Tied, expected: list[float]) -> None:
    """Oracle O6: three BatchNorms that meet in a sum."""
    rows = [[0.1, 0.3, 0.6, 0.2], [0.2, 0.4, 0.5, 0.1], [0.3, 0.2, 0.0, 0.25]]

    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 4, 1, bias=False) for _ in rows)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in rows)
            self.last = nn.Conv2d(4, 2, 1)
            with torch.no_grad():
                for norm, row in zip(self.norms, rows, strict=True):
                    assert isinstance(norm, nn.BatchNorm2d)
                    norm.weight.copy_(torch.tensor(row))

        def forward(self, x: Tensor) -> Tensor:
            arms = [norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True)]
            return self.last(arms[0] + arms[1] + arms[2])

    net = Meeting()
    graph = lift(export(net.eval(), (torch.zeros(1, 3, 4, 4),)))
    (group,) = [group for group in graph.groups if group.resizable]
    strengths = Regularizer(graph, net, tied=tied).strengths()[torch.from_numpy(group.channels)]
    assert torch.allclose(strengths, torch.tensor(expected), atol=1e-6)


def test_all_alive_counts_every_axis_but_the_interface() -> None:
    """With all scales at 1: twice the cost, less the first convolution and the last linear."""
    original, graph = residual_network()
    net = copy.deepcopy(original)
    reg = morphnet(graph, net, "flops")
    layers = cost(graph, "flops").by_layer
    expected = 2 * reg.initial_cost - layers["stem"] - layers["fc"]
    assert reg.value().item() == pytest.approx(expected, rel=1e-6)


def test_live_cost_is_the_cost_of_the_plan() -> None:
    original, graph = residual_network()
    net = copy.deepcopy(original)
    reg = Regularizer(graph, net)
    with torch.no_grad():
        for k, module in enumerate(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            module.weight[: 3 + k] = 0.001
    plan = reg.plan()
    assert reg.live_share() < 1
    assert plan.cost["flops"].after == reg.live_cost()
    assert reg.plan({"flops": "20%"}).cost["flops"].after <= 0.2 * reg.initial_cost


def test_training_may_remove_a_block() -> None:
    original, graph = residual_network()
    net = copy.deepcopy(original)
    block = next(m for m in net.modules() if isinstance(m, BasicBlock))
    inside = graph.channel_group[graph.channels_at("blocks.0.conv1.weight", 0)][0]
    with torch.no_grad():
        block.bn1.weight.zero_()
    cautious, bold = Regularizer(graph, net), Regularizer(graph, net, min_width=0)
    assert cautious.plan().widths(graph)[inside] == 1
    assert cautious.live_cost() < cautious.plan().cost["flops"].after  # as if nothing stayed
    plan = bold.plan()
    assert plan.widths(graph)[inside] == 0
    assert plan.cost["flops"].after == bold.live_cost()
    assert bold.lowest_share() < cautious.lowest_share()
    assert bold.plan(min_width=1).widths(graph)[inside] == 1
    slim = apply(graph, plan, weights=net)
    assert "blocks.0.conv2.weight" not in slim.graph.initializers
    for other in net.modules():
        if isinstance(other, nn.BatchNorm2d):
            with torch.no_grad():
                other.weight.zero_()
    # Where all is dead, what a network cannot do without keeps a channel.
    assert bold.plan().cost["flops"].after == bold.live_cost() > 0


def test_errors_name_the_parameter() -> None:
    _, graph = residual_network()
    with pytest.raises(ModelError, match=r"'(bn|blocks)[.\w]*weight' has shape"):
        Regularizer(graph, residual_cnn(widths=(8, 16, 32)))
    with pytest.raises(ModelError, match="is not in the module"):
        Regularizer(graph, nn.Linear(2, 2))


def test_bn_is_refused_where_nothing_gates() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    graph = lift(export(net.eval(), (image(),)))
    with pytest.raises(UnsupportedError, match="no norm's scale gates '0'"):
        Regularizer(graph, net, strength="bn")


class Attention(nn.Module):
    """Queries, keys and values of their own: their kernels are slices of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(x, 2 * x, 3 * x, need_weights=False)[0])
        return out


class Unit(nn.Linear):
    """A layer whose kernel's rows have length 1, whatever its parameter holds."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


def test_groups_without_strength_are_left_alone() -> None:
    nets: list[tuple[nn.Module, Tensor]] = [
        (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 3)), torch.tensor([[1, 2]])),
        (nn.Sequential(Unit(4, 12), nn.ReLU(), nn.Linear(12, 3)), torch.rand(1, 4)),
    ]
    for net, example in nets:
        graph = lift(export(net.eval(), (example,)))
        with pytest.warns(MorphWarning, match="left alone, since nothing measures or trains them"):
            reg = Regularizer(graph, net)
        np.testing.assert_array_equal(reg.live_widths(), graph.widths)
        assert not reg.plan().groups
        measured = {
            int(group) for s in reg.kernels for group in graph.channel_group[s.index.numpy()]
        }
        alone = {group.index for group in graph.groups if group.resizable} - measured
        assert alone
        with torch.no_grad():
            for source in reg.kernels:
                source.parameter.zero_()
        assert not alone & reg.plan().keep_channels(graph).keys()


def test_kernels_that_are_parts_of_a_parameter_have_a_strength() -> None:
    net = Attention().eval()  # query, key and value stand in one parameter
    reg = Regularizer(lift(export(net, (torch.rand(1, 5, 16),))), net)
    heads = reg.graph.channels_at("mix.in_proj_weight", 0)
    assert len(set(heads)) == 4
    assert reg.strengths()[heads].min() > 0
    head = heads[5]
    with torch.no_grad():
        for rows in net.mix.in_proj_weight.split(16):
            rows[4:8] = 0
    assert reg.alive()[heads].sum() == 3 * 12
    assert not reg.alive()[head]


class Tagger(nn.Module):
    """Words to tags: embeddings, an LSTM in both directions, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, words: Tensor) -> Tensor:
        tags: Tensor = self.out(self.lstm(self.embed(words))[0])
        return tags


def test_group_lasso_on_recurrent_layers() -> None:
    """A unit's strength: the mean square of its rows in all gates, the most of both kernels."""
    net, words = Tagger().eval(), torch.randint(0, 20, (2, 7))
    graph = lift(export(net, (words,)))
    reg = Regularizer(graph, net)
    kernels = [
        getattr(net.lstm, f"weight_{which}_l0{way}")
        for which in ("ih", "hh")
        for way in ("", "_reverse")
    ]
    rows = [kernel.reshape(4, 8, -1).square().mean(dim=(0, 2)).sqrt() for kernel in kernels]
    expected = torch.stack(rows).amax(0)
    expected = expected / expected.mean()
    units = torch.from_numpy(graph.channels_at("lstm.weight_hh_l0", 1))
    assert torch.allclose(reg.strengths()[units], expected)
    reg().backward()
    counted = torch.stack(rows).argmax(0)  # per unit the kernel whose rows are the strongest
    for number, kernel in enumerate(kernels):
        felt = kernel.grad.reshape(4, 8, -1).abs().sum(dim=(0, 2)) > 0
        assert felt.tolist() == (counted == number).tolist()
    with torch.no_grad():
        for kernel in kernels:
            kernel.reshape(4, 8, -1)[:, [1, 5]] = 0
    plan = reg.plan()
    assert [list(change.keep) for change in plan.groups.values()] == [[(0, 1), (2, 5), (6, 8)]]
    loaded = Regularizer(graph, to_torch(graph.model))
    assert torch.allclose(loaded.strengths()[units], expected, rtol=1e-4)


def test_a_proximal_step_shortens_a_unit_over_all_gates() -> None:
    """Its four kernels come down to one level, and the sum of n times the fall is 1/2 t."""
    net, words = Tagger().eval(), torch.randint(0, 20, (2, 7))
    reg = Regularizer(lift(export(net, (words,))), net, convention="morphnet")
    units = torch.from_numpy(reg.graph.channels_at("lstm.weight_hh_l0", 1))
    amounts = reg.marginals()[units] / reg.initial_cost

    def strengths(kernel: Tensor) -> Tensor:
        return kernel.detach().reshape(4, 8, -1).square().mean(dim=(0, 2)).sqrt()

    kernels = [
        getattr(net.lstm, f"weight_{which}_l0{way}")
        for which in ("ih", "hh")
        for way in ("", "_reverse")
    ]
    before = [strengths(kernel) for kernel in kernels]
    reg.proximal_step(0.5)
    after = [strengths(kernel) for kernel in kernels]
    level = torch.stack(after).amax(0)
    for early, late in zip(before, after, strict=True):
        assert torch.allclose(late, torch.minimum(early, level), atol=1e-6)
    falls = [
        kernel.numel() / 8 * (early - late)
        for kernel, early, late in zip(kernels, before, after, strict=True)
    ]
    assert torch.allclose(torch.stack(falls).sum(0), 0.5 * amounts, atol=1e-5)
    strongest = int(reg.strengths()[units].argmax())
    reg.proximal_step(1e6)  # the floor is one unit
    kernel = net.get_parameter("lstm.weight_ih_l0").detach()
    left = kernel.reshape(4, 8, -1).abs().sum(dim=(0, 2)) > 0
    assert left.nonzero().flatten().tolist() == [strongest]


def test_untrained_wide_layers_are_alive() -> None:
    torch.manual_seed(0)
    wide = nn.Conv2d(512, 512, 3)  # initialized to strengths of about 0.0085
    net = nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), wide, nn.ReLU(), nn.Conv2d(512, 4, 1))
    reg = Regularizer(lift(export(net, (torch.rand(1, 3, 6, 6),))), net)
    raw = Regularizer(reg.graph, net, convention="morphnet")
    assert raw.strengths()[raw.kernels[-1].index].max() < 1e-2
    assert raw.live_share() == reg.live_share() == 1.0
    with torch.no_grad():
        wide.weight[:128] = 0.0
        wide.weight[128:256] *= 1e-3
    assert sorted(reg.live_widths()) == [3, 4, 256, 512]
    with torch.no_grad():
        wide.weight.zero_()
    assert 0 in reg.live_widths()


class Scale(nn.Module):
    """A learned scale per channel, and no shift."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Gated(nn.Module):
    """A product whose second operand alone is scaled, and passes a function on its way."""

    def __init__(self, scale: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.value, self.key = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.norm, self.gate, self.out = scale, gate, nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.value(x) * self.gate(self.norm(self.key(x))))
        return out


@pytest.mark.parametrize(
    ("make", "gate", "is_gated"),
    [
        (Scale, nn.ReLU(), True),
        (Scale, nn.Tanh(), True),
        (Scale, nn.Sigmoid(), False),
        (lambda: nn.BatchNorm2d(6), nn.ReLU(), True),
        (lambda: nn.BatchNorm2d(6), nn.Tanh(), True),
        (lambda: nn.BatchNorm2d(6), nn.Sigmoid(), False),
    ],
)
def test_a_product_is_silent_where_an_operand_is_zero(
    make: Callable[[], nn.Module], gate: nn.Module, is_gated: bool
) -> None:
    net = Gated(make(), gate).eval()
    graph = lift(export(net, (torch.rand(1, 3, 9, 9),)))  # the shift is zero, but is trained
    reg = Regularizer(graph, net)
    acted_on = {id(source.parameter) for source in reg.scales}
    assert bool(acted_on) == is_gated
    with torch.no_grad():
        for name, parameter in net.norm.named_parameters():
            closed = id(parameter) in acted_on or name == "weight"
            parameter.fill_(0.0 if closed else 0.7)
    spread = float(net(torch.rand(1, 3, 9, 9)).std(dim=(2, 3)).max())
    assert (spread < 1e-6) == is_gated  # the oracle: is what is left a constant?
