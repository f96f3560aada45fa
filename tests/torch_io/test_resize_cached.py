"""Decoders with a cache resized in place; after it they are fed the heads that stay."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.onnx_io import runtime as ort
from morphgraph.passes.planning.uniform import set_widths

Layers = list[tuple[Tensor, Tensor]]
WORDS, PAST = 20, 6
IDS = torch.randint(0, WORDS, (2, 5), generator=torch.Generator().manual_seed(0))


@dataclass
class CacheConfig:
    width: int = 12
    heads: int = 4
    head_dim: int = 4
    layers: int = 2
    scaled: bool = False


class Block(nn.Module):
    def __init__(self, config: CacheConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        size = config.heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.width, size) for _ in range(3))
        self.o = nn.Linear(size, config.width)

    def forward(self, x: Tensor, before: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        k, v = (torch.cat([old, new], 2) for old, new in zip(before, (k, v), strict=True))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        return x + self.o(mixed.transpose(1, 2).flatten(2)), k, v


class Decoder(nn.Module):
    """It may scale by its width, which a config says, and a resize cannot."""

    def __init__(self, config: CacheConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = config.width**0.5 if config.scaled else 1.0
        self.embed = nn.Embedding(WORDS, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, WORDS)

    def forward(self, ids: Tensor, layers: Layers) -> tuple[Tensor, ...]:
        x, caches = self.embed(ids) * self.scale, []
        for block, layer in zip(self.blocks, layers, strict=True):
            x, *cache = block(x, layer)
            caches += cache
        return (self.head(x), *caches)


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inner = net

    def forward(self, ids: Tensor, layers: Layers) -> Any:
        return self.inner(ids, layers)


def past(config: CacheConfig, length: int = PAST) -> Layers:
    generator = torch.Generator().manual_seed(1)
    shape = (2, config.heads, length, config.head_dim)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in range(config.layers)
    ]


def feeds_of(model: Any, arguments: Any) -> dict[str, Any]:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    names = [value.name for value in model.graph.inputs]
    return {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)}


def same(net: nn.Module, small: Any, arguments: Any) -> None:
    with torch.no_grad():
        found = net(*arguments)
    for one, expected in zip(
        found, ort.run(small, feeds_of(small, arguments)).values(), strict=True
    ):
        np.testing.assert_allclose(one.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("attention", "sizes"), [("heads", (2, 4)), ("head-dim", (4, 2))])
def test_the_cache_follows_the_plan(wrapped: bool, attention: Any, sizes: tuple[int, int]) -> None:
    """The heads and their size, said by the config of a network or of one in a wrapper."""
    torch.manual_seed(0)
    config = CacheConfig()
    net = Decoder(config).eval()
    outer: nn.Module = Wrapper(net) if wrapped else net
    example = (IDS, past(config))
    graph = mg.lift(mg.export(outer, example), attention=attention)
    plan = mg.uniform(graph, 0.5)
    small = mg.apply(graph, plan, weights=outer)
    report = mg.resize_module(outer, graph, plan, example=example)
    assert report.config == "CacheConfig builds this network"
    assert (config.width, config.heads, config.head_dim) == (6, *sizes)
    again = Decoder(config).eval()
    again.load_state_dict(net.state_dict())
    same(again, small, (IDS, past(config)))


def test_every_cache_follows_its_own_block() -> None:
    """Inputs that are made up have the sizes of the graph, and are cut as well."""
    torch.manual_seed(0)
    net = Decoder(CacheConfig()).eval()
    graph = mg.lift(mg.export(net, (IDS, past(net.config))))
    heads = [group for group in graph.groups if group.resizable and "blocks" in group.name]
    narrow = [group for group in heads if group.width == net.config.heads]
    plan = set_widths(graph, {narrow[0].id: 3, narrow[1].id: 1})
    small = mg.apply(graph, plan, weights=net)
    with pytest.warns(mg.MorphWarning, match="cannot say unequal widths"):
        mg.resize_module(net, graph, plan, example=(IDS, past(net.config)))
    assert [block.heads for block in net.blocks] == [3, 1]
    arguments = IDS, [past(CacheConfig(heads=heads))[0] for heads in (3, 1)]
    same(net, small, arguments)


def test_a_config_in_a_wrapper_that_cannot_say_all_does_not_claim_it() -> None:
    torch.manual_seed(0)
    net = Wrapper(Decoder(CacheConfig(scaled=True))).eval()
    example = (IDS, past(CacheConfig()))
    graph = mg.lift(mg.export(net, example))
    with pytest.warns(mg.MorphWarning, match="but cannot say all.*'scale'"):
        mg.resize_module(net, graph, mg.uniform(graph, 0.5), example=example)
