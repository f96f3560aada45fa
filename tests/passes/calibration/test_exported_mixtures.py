"""What experts of Hugging Face's mixtures give, as their export has them.

Oracle: PyTorch, where an expert's last kernel is zero: what its layer's mixture gives changes by
just what the expert adds, its bias and its share of every token in it.
"""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

import morphgraph as mg
from morphgraph.passes.calibration.curves import order_of
from morphgraph.passes.calibration.statistics import calibrate
from tests.passes.experts import group_on

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen2Moe": {  # with an expert that all tokens take
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # ArgMax, twice
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},  # with biases
    "Glm4Moe": {
        **ROUTED, "head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    },
    "DeepseekV3": {  # whole groups of experts go
        **ROUTED, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip


def network(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON, **CONFIGS[kind])
    net: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    net.set_experts_implementation("batched_mm")
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif not parameter.any():
                parameter.normal_()
    return net


def given(net: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """What a layer's mixture gives."""
    found: list[torch.Tensor] = []
    mixture = net.model.layers[layer].mlp
    hook = mixture.register_forward_hook(
        lambda _, __, made: found.append(made[0] if isinstance(made, tuple) else made)
    )
    with torch.no_grad():
        net(input_ids=ids, use_cache=False)
    hook.remove()
    return found[0].double()


def added(net: Any, layer: int, ids: torch.Tensor) -> np.ndarray:
    """The energy of what each expert adds, ``[experts]``."""
    whole, experts = given(net, layer, ids), net.model.layers[layer].mlp.experts
    names = [name for name in ("down_proj", "down_proj_bias") if hasattr(experts, name)]
    stacks = [getattr(experts, name) for name in names]
    energies = []
    for expert in range(len(experts.down_proj)):
        kept = [stack[expert].clone() for stack in stacks]
        with torch.no_grad():
            for stack in stacks:
                stack[expert] = 0
        energies.append(float((whole - given(net, layer, ids)).square().sum()))
        with torch.no_grad():
            for stack, each in zip(stacks, kept, strict=True):
                stack[expert] = each
    return np.array(energies)


@pytest.mark.long
@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_of_exported_mixtures_count_by_what_they_add(kind: str) -> None:
    net = network(kind)
    ids = torch.randint(64, (4, 16))
    graph = mg.lift(mg.export(net, {"input_ids": ids, "use_cache": False}))
    found = calibrate(graph, [{"input_ids": ids.numpy()}], stops=lambda group: [], threads=1)
    for layer in range(COMMON["num_hidden_layers"]):
        experts = group_on(graph, f"model.layers.{layer}.mlp.experts.down_proj", 0)
        energies = added(net, layer, ids)
        expected = (energies / energies.sum()).reshape(experts.width, -1).sum(axis=1)
        np.testing.assert_allclose(found.chosen[experts.index], expected, rtol=1e-3)
        assert order_of(found, experts.index).tolist() == np.argsort(expected).tolist()
        # Its kernels hold inputs first.
        axis = 1 if kind == "GptOss" else 2
        inner = group_on(graph, f"model.layers.{layer}.mlp.experts.down_proj", axis)
        assert found.groups[inner.index].complete
        assert sorted(found.removals[inner.index].order) == list(range(inner.width))
