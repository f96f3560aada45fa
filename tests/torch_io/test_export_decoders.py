"""Decoders of Hugging Face by `mg.export`, with and without a cache, at open sizes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import morphgraph as mg
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.canonical.caches import caches

transformers: Any = pytest.importorskip("transformers")

LAYERS, HEADS, PAST = 1, 4, 6
COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "GemmaConfig": {**COMMON, "head_dim": 8},
    "PhiConfig": {**COMMON, "num_key_value_heads": HEADS},
    "Qwen3MoeConfig": {
        **COMMON, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "PhimoeConfig": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Glm4MoeConfig": {
        **COMMON, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 0,
    },
    "GPT2Config": {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": LAYERS,
                   "n_head": HEADS},
}  # fmt: skip
OPEN = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


class Plain(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor) -> Any:
        return self.net(input_ids=input_ids, use_cache=False).logits


class Cached(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Any) -> Any:  # type: ignore[override]
        out = self.net(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=transformers.DynamicCache(past),
            use_cache=True,
        )
        layers = out.past_key_values.layers
        return (out.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**CONFIGS[kind])
    net: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    if "moe" in kind.lower():
        net.set_experts_implementation("batched_mm")
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return net


def arguments(net: Any, cached: bool, batch: int, length: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(96, (batch, length), generator=generator)
    if not cached:
        return (ids,)
    heads = getattr(net.config, "num_key_value_heads", HEADS)
    past = [
        tuple(torch.randn((batch, heads, PAST, 8), generator=generator) for _ in "kv")
        for _ in range(LAYERS)
    ]
    return ids, torch.ones((batch, PAST + length), dtype=torch.int64), past


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "cached"),
    [
        ("GemmaConfig", True),
        ("PhiConfig", True),
        ("Qwen3MoeConfig", False),
        ("Qwen3MoeConfig", True),
        ("PhimoeConfig", True),
        ("Glm4MoeConfig", True),
        ("GPT2Config", True),
        ("GPT2Config", False),
    ],
)
def test_a_decoder_is_exported_and_resized(kind: str, cached: bool) -> None:
    """The file computes what PyTorch does at other sizes; resizing is checked through the cache."""
    net = made(kind)
    wrapped = (Cached if cached else Plain)(net)
    grows = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    shapes = (OPEN, OPEN, [(grows, grows)] * LAYERS) if cached else (OPEN,)
    model = mg.export(wrapped, arguments(net, cached, 2, 5), dynamic_shapes=shapes)
    other = arguments(net, cached, 3, 4)
    with torch.no_grad():
        expected = wrapped(*other)
    tensors = torch.utils._pytree.tree_leaves(other)
    feeds = {
        value.name or "": tensor.numpy()
        for value, tensor in zip(model.graph.inputs, tensors, strict=True)
    }
    found = list(run(model, feeds).values())
    for one, tensor in zip(found, expected if cached else (expected,), strict=True):
        np.testing.assert_allclose(one, tensor.numpy(), rtol=0, atol=1e-4)
    graph = mg.lift(model)
    plan = mg.plan(graph, {"params": "65%"})
    small = mg.apply(graph, plan)  # held against the masked original, in two steps with a cache
    assert len(caches(small)) == (2 * LAYERS if cached else 0)
    left = mg.cost(mg.lift(small), "params").total / mg.cost(graph, "params").total
    assert 0.5 < left <= 0.65
    routers = [g for g in graph.groups if g.name.endswith((".mlp.gate", ".mlp.router"))]
    assert all(2 <= plan.widths(graph)[g.index] <= g.width == 4 for g in routers)
    assert all(g.resizable for g in routers)
    assert bool(routers) == ("moe" in kind.lower())


@pytest.mark.filterwarnings("ignore")
def test_experts_that_onnx_cannot_say_are_refused_with_what_helps() -> None:
    net: Any = made("Qwen3MoeConfig")
    net.set_experts_implementation("grouped_mm")
    with pytest.raises(mg.UnsupportedError, match=r"set_experts_implementation\('batched_mm'\)"):
        mg.export(net, {"input_ids": torch.zeros((1, 4), dtype=torch.int64), "use_cache": False})
