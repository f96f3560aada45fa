"""Decoders of Hugging Face with their caches as pairs of tensors."""

from typing import Any

import transformers
from torch import Tensor, nn


def caches_of(out: Any) -> list[Tensor]:
    """Keys and values of every layer behind each other."""
    return [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]


class Cached(nn.Module):
    """A decoder with a cache, as the runtimes of language models call it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Any) -> Any:
        out = self.net(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=transformers.DynamicCache(past),
            use_cache=True,
        )
        return (out.logits, *caches_of(out))
