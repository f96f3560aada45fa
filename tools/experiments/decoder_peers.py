"""What others make of the decoder: Torch-Pruning's l2, and the rule of FLAP (An et al. 2024)."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch_pruning as tp
from decoder import Decoder
from numpy.typing import NDArray
from torch import nn
from transformers.models.llama import modeling_llama

STEPS = 8  # of a bisection: ratios are exact to 0.4 %


def body(net: Any) -> int:
    """Parameters outside of the embedding and of the head, which shares its table."""
    tables = {id(net.get_input_embeddings().weight), id(net.get_output_embeddings().weight)}
    return sum(p.numel() for p in net.parameters() if id(p) not in tables)


def by_torch_pruning(net: Decoder, most: float) -> nn.Module:
    """Torch-Pruning as its example for language models has it: one ratio for all layers.

    MLPs and the hidden width by the norm of their kernels. It is asked for heads, too, and of
    grouped queries takes none. Rotary embeddings are left out while it builds its graph: they
    change no widths, and it follows every index through their halves without coming to an end.
    """
    low, high = 0.0, 0.95
    for _ in range(STEPS):
        ratio = (low + high) / 2
        low, high = (low, ratio) if body(_pruned(net, ratio)) <= most else (ratio, high)
    return _pruned(net, high)


def _pruned(net: Decoder, ratio: float) -> nn.Module:
    net = copy.deepcopy(net)
    heads: dict[nn.Module, int] = {}
    for name, module in net.named_modules():
        if name.endswith("self_attn"):
            heads[module.q_proj] = net.config.num_attention_heads
            heads[module.k_proj] = heads[module.v_proj] = net.config.num_key_value_heads
    without = patch.object(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))
    with warnings.catch_warnings(), without:
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            net,
            torch.arange(8)[None],
            importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            ignored_layers=[net.lm_head],
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            output_transform=lambda found: found.logits,
        )
        pruner.step()
    for module in net.modules():
        if hasattr(module, "q_proj"):
            module.num_key_value_groups = heads_of(module.q_proj, module) // heads_of(
                module.k_proj, module
            )
    return net


def heads_of(layer: nn.Linear, attention: Any) -> int:
    return layer.out_features // int(attention.head_dim)


def by_flap(net: Decoder, ids: NDArray[np.int64], most: float) -> nn.Module:
    """FLAP: variance of what a channel gives times the norm of what reads it.

    Standardized by layer and compared over the whole network; what went gives its mean, in the
    reader's bias. Heads are compared by the mean over their channels, and go with the keys and
    values that they share; widths of the residual stream stay, as in the publication. Channels are
    masked, which computes the same.
    """
    net = copy.deepcopy(net)
    layers = list(_layers(net))
    moments = _moments(net, [layer for layer, _, _ in layers], torch.from_numpy(ids))
    scores = []
    for (layer, size, _), (_, variance) in zip(layers, moments, strict=True):
        each = variance * layer.weight.square().sum(dim=0)
        standard = (each - each.mean()) / each.std()
        scores.append(standard.view(-1, size).mean(dim=1))
    prices = torch.cat(
        [torch.full_like(s, p, dtype=torch.float64) for s, (_, _, p) in zip(scores, layers)]
    )
    order = torch.argsort(torch.cat(scores))
    left = body(net) - torch.cumsum(prices[order], dim=0)
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order[: int((left > most).sum()) + 1]] = True
    parts = gone.split([len(s) for s in scores])
    for (layer, size, _), (mean, _), part in zip(layers, moments, parts, strict=True):
        lost = part.repeat_interleave(size)
        with torch.no_grad():
            layer.bias = nn.Parameter(layer.weight[:, lost] @ mean[lost])
            layer.weight[:, lost] = 0.0
    return net


def _layers(net: Decoder) -> Iterator[tuple[nn.Linear, int, int]]:
    """Readers of heads and of MLPs, channels that go together, and the parameters of those."""
    width = net.config.hidden_size
    for block in net.model.layers:
        attention = block.self_attn
        shared = attention.head_dim * attention.num_key_value_groups
        yield attention.o_proj, shared, width * 2 * (shared + attention.head_dim)
        yield block.mlp.down_proj, 1, 3 * width


def _moments(
    net: Decoder, layers: list[nn.Linear], ids: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    seen: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in layers}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, given: seen[module].append(given[0].flatten(0, 1))
        )
        for layer in layers
    ]
    with torch.no_grad():
        for part in ids.split(16):
            net(input_ids=part)
    for hook in hooks:
        hook.remove()
    joined = [torch.cat(seen[layer]) for layer in layers]
    return [(each.mean(dim=0), each.var(dim=0)) for each in joined]
