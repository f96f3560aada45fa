"""What a factor per pair of rotated positions would make up for, where heads get smaller.

    python tools/bench_rotary.py FOLDER [--sequences 24] [--tokens 128]

The folder holds a Llama of transformers with ``train.npy`` and ``held_out.npy`` (ids), as
``tools/experiments`` trains one. The pairs with the smallest kernels go, the same in all layers. A
pair of a query times any complex number commutes with the rotation; for each that stays it is
fitted to all logits of its head, each row apart from its mean, which a softmax does not see.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Decoder:
    """A network with its kernels of queries and keys, and what the texts make of them."""

    def __init__(self, folder: Path, sequences: int, tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        self.net: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self.net.float().eval()
        config = self.net.config
        self.kv_heads = config.num_key_value_heads
        self.shared = config.num_attention_heads // self.kv_heads
        self.pairs = config.head_dim // 2
        train, held_out = (
            np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("train", "held_out")
        )
        starts = np.random.default_rng(0).integers(0, len(train) - tokens, sequences)
        self.text = torch.tensor(np.stack([train[s : s + tokens] for s in starts]).astype(np.int64))
        whole = held_out[: len(held_out) // tokens * tokens].astype(np.int64)
        self.held_out = torch.tensor(whole.reshape(-1, tokens)[:96])
        self.layers = [layer.self_attn for layer in self.net.model.layers]
        self.queries = [layer.q_proj.weight.detach().clone() for layer in self.layers]
        self.keys = [layer.k_proj.weight.detach().clone() for layer in self.layers]

    def rotated(self) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of every layer behind the rotation, ``[N, heads, T, size]``."""
        module = sys.modules[type(self.layers[0]).__module__]
        rotate, found = module.apply_rotary_pos_emb, list[tuple[Tensor, Tensor]]()

        def noted(*arguments: Any, **options: Any) -> Any:
            found.append(rotate(*arguments, **options))
            return found[-1]

        with torch.no_grad(), patch.object(module, "apply_rotary_pos_emb", noted):
            self.net.model(self.text)
        return found

    @torch.no_grad()
    def perplexity(self) -> float:
        """Of the held-out text."""
        losses = []
        for ids in torch.split(self.held_out, 16):
            logits = self.net(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            losses.append(F.cross_entropy(logits, ids[:, 1:].flatten()))
        return float(torch.stack(losses).mean().exp())


def added(q: Tensor, k: Tensor) -> Tensor:
    """What every pair adds to the logits of a head, ``[pairs, N * T * T]``, as complex numbers."""
    size, causal = q.shape[-1] // 2, torch.ones(q.shape[1], q.shape[1]).tril()
    queries, keys = (torch.complex(x[..., :size], x[..., size:]) for x in (q, k))
    products = torch.einsum("ntp,nsp->pnts", queries, keys.conj()) * causal
    means = products.sum(-1, keepdim=True) / causal.sum(-1)[:, None]
    return ((products - means) * causal).flatten(1)


def factors(parts: Tensor, kept: Tensor) -> Tensor:
    """The complex numbers by which pairs that stay give the sum of all best, ``[kept]``."""
    given = torch.cat([parts.real[kept], -parts.imag[kept]]).double()
    gram = given @ given.T
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram))
    found = torch.linalg.solve(gram, given @ parts.real.sum(0).double())
    return torch.complex(found[: len(kept)], found[len(kept) :]).to(torch.complex64)


def measured(decoder: Decoder) -> Iterator[tuple[int, str, float]]:
    """Pairs that stay, with or without factors, and the perplexity."""
    shape = decoder.kv_heads, decoder.shared, 2, decoder.pairs, -1
    large = torch.zeros(decoder.pairs)
    for q, k in zip(decoder.queries, decoder.keys, strict=True):
        large += q.view(shape).square().sum((0, 1, 2, 4)).sqrt()
        large += k.view(decoder.kv_heads, 2, decoder.pairs, -1).square().sum((0, 1, 3)).sqrt()
    rotated = decoder.rotated()
    for share in (0.75, 0.5, 0.25):
        kept = large.topk(int(decoder.pairs * share)).indices
        for fits in (False, True):
            for layer, old, (q, k) in zip(decoder.layers, decoder.queries, rotated, strict=True):
                rows = torch.zeros_like(old).view(shape)
                for head, other in np.ndindex(shape[:2]):
                    number = torch.ones(len(kept), dtype=torch.complex64)
                    if fits:
                        parts = added(q[:6, head * decoder.shared + other], k[:6, head])
                        number = factors(parts, kept)
                    pair = torch.complex(*old.view(shape)[head, other, :, kept]) * number[:, None]
                    rows[head, other, 0, kept], rows[head, other, 1, kept] = pair.real, pair.imag
                layer.q_proj.weight.data.copy_(rows.view(old.shape))
            yield len(kept), "with a factor each" if fits else "as they are", decoder.perplexity()


def main() -> None:
    """Print perplexities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    decoder = Decoder(options.folder, options.sequences, options.tokens)
    print(f"original: {decoder.perplexity():.1f}")
    for count, how, found in measured(decoder):
        print(f"{count} of {decoder.pairs} pairs, {how}: {found:.1f}", flush=True)


if __name__ == "__main__":
    main()
