"""Decoders of Hugging Face after a phase that has narrowed their residual stream.

What the network in training computes must be what the resized one does; the oracle is ONNX Runtime.
Exact for the families with root mean squares, near for those with LayerNorms.
"""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.onnx_io.runtime import run

VOCABULARY, STEPS = 96, 200
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = COMMON | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GEMMA = PLAIN | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
# What an epsilon adds to the mean square of small numbers is not made up for.
FAMILIES: dict[str, tuple[dict[str, Any], float]] = {
    "Llama": (PLAIN, 1e-3),
    "Qwen3": (PLAIN | {"head_dim": 8}, 1e-3),
    "Gemma2": (GEMMA, 1e-3),
    "Gemma3Text": (GEMMA, 1e-3),
    "Olmo2": (PLAIN | {"rms_norm_eps": 1e-9}, 1e-3),
    "GPT2": (COMMON | {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64}, 0.05),
    "StableLm": (PLAIN, 0.05),
    "Cohere": (PLAIN, 0.05),
}


class Logits(nn.Module):
    """A decoder without a cache."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.net(input_ids=tokens, use_cache=False).logits
        return logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_of_a_decoder(family: str) -> None:
    torch.manual_seed(0)
    options, tolerance = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**options)
    net = Logits(transformers.AutoModelForCausalLM.from_config(config)).eval()
    starts = torch.randint(0, VOCABULARY, (64, 1))
    texts = (starts * torch.tensor([1] + [3] * 16) + 5 * torch.arange(17)) % VOCABULARY
    tokens = texts[:4, :16]
    graph = mg.lift(mg.export(net, (tokens,)))
    stream = next(group for group in graph.groups if group.resizable and group.width == 64)
    regularizer = mg.Regularizer(graph, net, ceilings={stream.id: "60%"})
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    budget = mg.Budget(regularizer, {"flops": "60%"}, STEPS).attach(optimizer)
    net.train()
    for _ in range(STEPS):
        batch = texts[torch.randint(0, 64, (8,))]
        optimizer.zero_grad()
        F.cross_entropy(net(batch[:, :16]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    assert budget.met
    plan = regularizer.plan()
    assert plan.widths(graph)[stream.index] < 40
    with torch.no_grad():
        wanted = net.eval()(tokens)
    small = mg.apply(graph, plan, weights=net)
    (found,) = run(small, {small.graph.inputs[0].name or "": tokens.numpy()}).values()
    mg.resize_module(net, graph, plan)
    with torch.no_grad():
        for logits in (torch.from_numpy(found), net(tokens)):
            assert float((logits - wanted).abs().max() / wanted.abs().max()) < tolerance
