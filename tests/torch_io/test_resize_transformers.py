"""Hugging Face's own classes are resized in place, and load by ``from_pretrained``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import morphgraph as mg
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import runtime as ort
from morphgraph.passes.planning.uniform import set_widths

transformers: Any = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80}


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=60, max_position_embeddings=7, num_attention_heads=6, **SIZES
    )
    return transformers.BertForMaskedLM(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=60, num_attention_heads=6, num_key_value_heads=3, head_dim=8, **SIZES
    )
    return transformers.LlamaForCausalLM(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        num_attention_heads=6, image_size=16, patch_size=8, num_labels=5, **SIZES
    )
    return transformers.ViTForImageClassification(config)


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "bert": (bert, {"input_ids": TOKENS}, {"labels": TOKENS}),
    "llama": (llama, {"input_ids": TOKENS, "use_cache": False}, {"labels": TOKENS}),
    "vit": (vit, {"pixel_values": IMAGES}, {"labels": torch.tensor([1, 3])}),
}


def planned(net: Any, example: dict[str, Any]) -> tuple[mg.ChannelGraph, mg.Plan]:
    """All widths times 2/3, which a config can say; kinds of layers have one width each."""
    graph = mg.lift(mg.export(net, example))
    free = [g for g in graph.groups if g.resizable and g.width > 2]
    return graph, set_widths(graph, {g.id: g.width * 2 // 3 // 2 * 2 or 2 for g in free})


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_of_one_width_load_from_the_config(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, example, labels = KINDS[kind]
    net = make().eval()
    graph, plan = planned(net, example)
    small = mg.apply(graph, plan, weights=net)
    report = mg.resize_module(net, graph, plan, example=example)
    with torch.no_grad():
        results = pytree.tree_leaves(net.eval()(**example))
    tensor = next(v for v in example.values() if isinstance(v, torch.Tensor))
    feeds = {small.graph.inputs[0].name or "": tensor.numpy()}
    for found, expected in zip(results, ort.run(small, feeds).values(), strict=True):
        assert np.abs(found.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    assert report.config.endswith("builds this network")
    config = net.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (32, 4, 52)
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for found, expected in zip(pytree.tree_leaves(again(**example)), results, strict=True):
            torch.testing.assert_close(found, expected)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net.train()(**example, **labels).loss.backward()
    optimizer.step()


SAME = {
    "bert": ["*intermediate*"],
    "llama": ["*.self_attn (*", "*.mlp (*"],
    "vit": ["*.mlp.fc1"],
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_widths_that_a_budget_chose_load_from_the_config(kind: str, tmp_path: Path) -> None:
    """One width per kind of layer (``same``); which channels go differs from layer to layer."""
    torch.manual_seed(0)
    make, example, labels = KINDS[kind]
    net = make().eval()
    graph = mg.lift(mg.export(net, example))
    plan = mg.plan(graph, {"flops": "75%"}, include=SAME[kind], same=SAME[kind])
    keeps = [tuple(map(tuple, group.keep)) for group in plan.groups.values()]
    assert len(set(keeps)) > len(SAME[kind])
    small = mg.apply(graph, plan, weights=net)
    report = mg.resize_module(net, graph, plan, example=example)
    assert report.config.endswith("builds this network")
    widths = {group.name: sum(b - a for a, b in group.keep) for group in plan.groups.values()}
    assert net.config.intermediate_size in widths.values()
    assert net.config.intermediate_size < SIZES["intermediate_size"]
    with torch.no_grad():
        results = pytree.tree_leaves(net.eval()(**example))
    tensor = next(v for v in example.values() if isinstance(v, torch.Tensor))
    feeds = {small.graph.inputs[0].name or "": tensor.numpy()}
    for found, expected in zip(results, ort.run(small, feeds).values(), strict=True):
        assert np.abs(found.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for found, expected in zip(pytree.tree_leaves(again(**example)), results, strict=True):
            torch.testing.assert_close(found, expected)
    net.train()(**example, **labels).loss.backward()


def small(kind: str, **sizes: Any) -> Any:
    """A decoder of two blocks, four heads of size 8 where the class lets us say it."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    return getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        config
    )


WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LATENT = EXPERTS | {
    "num_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
DECODERS: dict[str, tuple[dict[str, int], dict[str, Any], dict[str, int]]] = {
    # sizes, wishes, entries that follow from others and have to be stated now
    "GPT2": (
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 7},
        {"widths": {"*residual*": 24, "*c_attn": 3}},
        {"n_embd": 24, "n_head": 3, "n_inner": 128},
    ),
    # It counts its query heads per group of keys: what is one without the other runs no further.
    "Falcon": (
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
        | {"new_decoder_architecture": True},
        {"widths": {"*residual*": 24, "*query_key_value": 1}},
        {"hidden_size": 24, "num_attention_heads": 2, "num_kv_heads": 1},
    ),
    "Phi3": (WIDE | HEADS, {"same": ["repeated"], "round_to": 2}, {"head_dim": 8}),
    "Mixtral": (
        WIDE | HEADS | {"num_local_experts": 4, "head_dim": 8},
        {"same": ["repeated"], "round_to": 4},
        {"head_dim": 8},
    ),
    # A token takes the best expert, and the best of the others.
    "Phimoe": (
        WIDE | HEADS | {"num_local_experts": 6},
        {"widths": {"*router": 4, "*gate_up_proj": 32}},
        {"num_local_experts": 4, "intermediate_size": 32, "num_experts_per_tok": 2},
    ),
    # It takes experts of two groups of four only: whole groups go.
    "DeepseekV3": (
        WIDE | LATENT | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
        {"widths": {"*mlp.gate": 3, "*gate_up_proj": 8, "*shared_experts*": 8}},
        {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "moe_intermediate_size": 8},
    ),
    # All groups, of which there is one: experts go.
    "Glm4Moe": (
        WIDE | HEADS | EXPERTS | {"n_routed_experts": 6, "head_dim": 8},
        {"widths": {"*mlp.gate": 4}},
        {"n_routed_experts": 4, "n_group": 1, "moe_intermediate_size": 16},
    ),
}


CHOSEN = ("Phimoe", "DeepseekV3", "Glm4Moe")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_load_with_what_followed_from_other_entries(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes, wishes, entries = DECODERS[kind]
    net = small(kind, **sizes).eval()
    if any("experts" in size for size in sizes):
        net.set_experts_implementation("batched_mm")
    example = {"input_ids": TOKENS, "use_cache": False}
    graph = mg.lift(mg.export(net, example))
    plan = mg.plan(graph, {} if kind in CHOSEN else {"params": "70%"}, **wishes)
    resized = mg.apply(graph, plan)
    report = mg.resize_module(net, graph, plan, example=example)
    assert report.config == f"{kind}Config builds this network"
    assert {key: getattr(net.config, key) for key in entries} == entries
    assert (net.config.num_hidden_layers, net.config.vocab_size) == (2, 60)
    net.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = again(**example).logits.numpy()
    (expected,) = ort.run(resized, {"input_ids": TOKENS.numpy()}).values()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.long
def test_heads_of_unequal_number_stay_out_of_the_config() -> None:
    torch.manual_seed(0)
    net = bert().eval()
    graph = mg.lift(mg.export(net, {"input_ids": TOKENS}))
    heads = [g for g in graph.groups if "attention" in g.name and g.width == 6]
    plan = set_widths(graph, {heads[0].id: 4, heads[1].id: 3})
    with pytest.warns(mg.MorphWarning, match="BertConfig cannot say"):
        report = mg.resize_module(net, graph, plan, example={"input_ids": TOKENS})
    layers = net.bert.encoder.layer
    assert [layer.attention.self.num_attention_heads for layer in layers] == [4, 3]
    assert [layer.attention.self.attention_head_size for layer in layers] == [8, 8]
    assert net.config.num_attention_heads == 6
    assert "same=" in report.config


@pytest.mark.long
def test_an_example_of_other_inputs_is_refused() -> None:
    net = llama()
    graph = mg.lift(mg.export(net, {"input_ids": TOKENS, "use_cache": False}))
    example = {"input_ids": TOKENS, "attention_mask": torch.ones(2, 7)}
    with pytest.raises(UnsupportedError, match="holds 2 tensors, and the graph has 1 inputs"):
        mg.resize_module(net, graph, mg.uniform(graph, 0.5), example=example)
    assert net.config.hidden_size == 48
