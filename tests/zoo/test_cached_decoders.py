"""Decoders of Hugging Face exported with their caches, resized, written, loaded, and run.

What `from_pretrained` loads generates what the resized ONNX model does, token by token.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.export import Dim

import morphgraph as mg
from morphgraph.onnx_io.runtime import run
from tests.cached import Cached, caches_of

WORDS, LAYERS, STEPS = 96, 2, 4
TOKENS = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = {
    **TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**PLAIN, "num_key_value_heads": 4}
LATENT = {
    **PLAIN, "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8,
    "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
SIZED = {**GROUPED, "head_dim": 8}
WINDOWED = {**SIZED, "query_pre_attn_scalar": 8, "sliding_window": 8}
EIGHTS = {  # heads follow from the hidden width, and Falcon's from a number of groups
    "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_kv_heads": 4,
    "new_decoder_architecture": True,
}  # fmt: skip
# What is asked beside equal widths; where it is nothing, the plan finds what the config says.
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen2": (GROUPED, {}),
    "GPTNeoX": (PLAIN, {}),
    "DeepseekV3": (LATENT, {"widths": {"*gate_up_proj": 12, "*shared_experts*": 12}}),
    "Llama": (GROUPED, {}),
    "Falcon": ({**TOKENS, **EIGHTS}, {}),
    "StableLm": (GROUPED, {}),
    "Cohere": (GROUPED, {}),
    "Olmo2": (GROUPED, {}),
    "Granite": ({**GROUPED, "attention_multiplier": 0.3, "residual_multiplier": 0.5}, {}),
    "SmolLM3": (GROUPED, {}),
    "Gemma3Text": (WINDOWED, {"exclude": ["*residual*"], "widths": {"*self_attn (*": 2}}),
    "Phi3": ({**GROUPED, "original_max_position_embeddings": 64}, {}),
    "Mixtral": ({**SIZED, "num_local_experts": 4, "num_experts_per_tok": 2}, {}),
    "OPT": ({**PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64}, {}),
}
QUICK = ("Qwen2", "GPTNeoX", "DeepseekV3")


def made(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**NETWORKS[kind][0])
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if "emb" in name else parameter.shape[-1] ** -0.5)
    return with_experts(net)


def with_experts(net: Any) -> Any:
    """Experts as products that are exported, where there are any."""
    if getattr(net.config, "num_experts_per_tok", None):
        net.set_experts_implementation("batched_mm")
    return net


def example(net: Any) -> tuple[Tensor, Tensor, Any]:
    tokens = torch.randint(3, WORDS, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        past = caches_of(net(input_ids=tokens[:, :6], use_cache=True))
    pairs = list(zip(past[::2], past[1::2], strict=True))
    return tokens[:, 6:], torch.ones_like(tokens), pairs


def greedy_of_pytorch(net: Any, tokens: list[int]) -> list[tuple[int, np.ndarray]]:
    found, cache, new = [], transformers.DynamicCache(), torch.tensor([tokens])
    for _ in range(STEPS):
        with torch.no_grad():
            out = net(input_ids=new, past_key_values=cache, use_cache=True)
        logits, cache = out.logits[0, -1].numpy(), out.past_key_values
        found.append((int(logits.argmax()), logits))
        new = torch.tensor([[found[-1][0]]])
    return found


def greedy_of_onnx(model: Any, tokens: list[int]) -> list[tuple[int, np.ndarray]]:
    names, new = [value.name for value in model.graph.inputs], tokens
    past = [
        np.zeros(
            [size if isinstance(size, int) else int(not k) for k, size in enumerate(v.shape)], "f"
        )
        for v in model.graph.inputs[2:]
    ]
    found = []
    for _ in range(STEPS):
        mask = np.ones((1, past[0].shape[2] + len(new)), np.int64)
        logits, *past = run(
            model, dict(zip(names, [np.array([new]), mask, *past], strict=True))
        ).values()
        found.append((int(logits[0, -1].argmax()), logits[0, -1]))
        new = [found[-1][0]]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.long if k in QUICK else pytest.mark.slow) for k in NETWORKS],
)
def test_what_is_loaded_again_generates_what_the_resized_model_does(
    kind: str, tmp_path: Path
) -> None:
    net = made(kind)
    wrapped, arguments = Cached(net), example(net)
    lengths, grows = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    shapes = (lengths, lengths, [(grows, grows)] * LAYERS)
    graph = mg.lift(mg.export(wrapped, arguments, dynamic_shapes=shapes))
    asked = NETWORKS[kind][1] and {"same": ["repeated"], **NETWORKS[kind][1]}
    asked = asked or {"config": wrapped, "example": arguments}
    plan = mg.plan(graph, {"params": "75%"}, **asked)
    small = mg.apply(graph, plan)
    before = [tuple(t.shape) for pair in arguments[2] for t in pair]
    report = mg.resize_module(wrapped, graph, plan, example=arguments)
    assert report.config == f"{type(net.config).__name__} builds this network"
    net.save_pretrained(tmp_path)
    again = with_experts(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    with torch.no_grad():
        after = caches_of(again(input_ids=arguments[0], use_cache=True))
    assert any(new.shape[1:] < old[1:] for new, old in zip(after, before, strict=True))
    for tokens in ([5, 9, 30, 7], [11, 4], [50, 60, 3, 8, 90]):
        expected, found = greedy_of_pytorch(again, tokens), greedy_of_onnx(small, tokens)
        assert [token for token, _ in found] == [token for token, _ in expected]
        for (_, one), (_, other) in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())
