"""What a fit of the experts' kernels brings: a small mixture of experts, trained here.

    python tools/experiments/decoder_experts.py  # into runs/experiments/mixture; about 20 minutes

A Mixtral of 2.5 million parameters (four blocks, eight experts, two of them for every token) learns
the docstrings of ``decoder.py``. It loses units inside of the experts, experts, hidden width, or
all of them under one budget, and is fitted with its experts' kernels as slices, and with them
fitted, too. Judged is the perplexity on held-out text that neither was fitted to.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from decoder import FOLDER, VOCABULARY, prepare
from shrink_rows import RUNS
from transformers import MixtralConfig, MixtralForCausalLM

LENGTH, BATCH, RATE = 128, 8, 2e-3
JUDGED = 128  # sequences of the held-out text, from its beginning


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=RUNS / "mixture")
    parser.add_argument("--text", type=Path, default=FOLDER, help="the folder of decoder.py")
    parser.add_argument("--steps", type=int, default=900, help=f"of {BATCH} x {LENGTH} tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare(options.text)
    options.folder.mkdir(parents=True, exist_ok=True)
    trained(options.folder, options.text, options.steps)
    return 0


def trained(folder: Path, text: Path, steps: int) -> MixtralForCausalLM:
    """The mixture, from its folder where it is there."""
    if (folder / "config.json").exists():
        return MixtralForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    network = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=160,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            output_router_logits=True,  # a loss that spreads the tokens over the experts
            router_aux_loss_coef=0.02,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = np.load(text / "train.npy", mmap_mode="r", allow_pickle=False)
    began = time.perf_counter()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        rate = RATE * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        places = np.random.default_rng(step).integers(len(ids) - LENGTH, size=BATCH)
        batch = torch.tensor(np.stack([ids[at : at + LENGTH] for at in places]).astype(np.int64))
        loss = network(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            speed = (step + 1) * BATCH * LENGTH / (time.perf_counter() - began)
            print(f"{step + 1}/{steps} loss {loss.item():.3f}, {speed:.0f} tokens/s", flush=True)
    network.config.output_router_logits = False
    network.save_pretrained(folder)
    return network.eval()


if __name__ == "__main__":
    raise SystemExit(main())
