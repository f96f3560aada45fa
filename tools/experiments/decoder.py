"""A small decoder for the experiments, trained here on documentation that is installed here.

    python tools/experiments/decoder.py  # into runs/experiments/decoder; about 20 minutes
    python tools/experiments/decoder.py --normed --steps 700  # into runs/experiments/decoder-normed

The text are the docstrings of the standard library and of the installed packages, every docstring
once; one file in fifty is held out. A byte-level byte-pair tokenizer is made from the rest, and a
Llama of 4.7 million parameters (grouped queries, rotary embedding, RMSNorm, SwiGLU, tied head)
trained on it by one thread. What is there is not made again, and a training that was stopped goes
on from its last checkpoint, so the folder serves while it is still trained.
"""

import argparse
import ast
import hashlib
import json
import math
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from shrink_rows import RUNS
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Decoder: TypeAlias = LlamaForCausalLM | Qwen3ForCausalLM
FOLDER = RUNS / "decoder"
NORMED = RUNS / "decoder-normed"
VOCABULARY = 2048
LENGTH = 256  # tokens of a sequence
BATCH = 8
RATE = 2e-3
_END = "<|end|>"  # between the texts of two files
_APART = {"idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests", "turtledemo"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="by default one for each kind")
    parser.add_argument("--steps", type=int, default=1150, help=f"of {BATCH} x {LENGTH} tokens")
    parser.add_argument("--normed", action="store_true", help="queries and keys have norms: Qwen 3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or (NORMED if options.normed else FOLDER)
    prepare(folder)
    train(folder, new_decoder(options.normed), options.steps)
    return 0


def prepare(folder: Path) -> None:
    """Writes ``train.txt``, ``held_out.txt``, ``tokenizer.json`` and the ids of both texts."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "held_out.npy").exists():
        return
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    for name, text in documentation():
        digest = hashlib.sha256(name.encode()).digest()
        texts["held_out" if digest[0] % 50 == 0 else "train"].append(text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts["train"], vocab_size=VOCABULARY, special_tokens=[_END], show_progress=False
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    for part, found in texts.items():
        (folder / f"{part}.txt").write_text("\n\n".join(found))
        coded = tokenizer.encode_batch(found)
        end = tokenizer.token_to_id(_END)
        ids = np.concatenate([np.array([*each.ids, end], np.uint16) for each in coded])
        np.save(folder / f"{part}.npy", ids)
        print(f"{part}: {len(found)} files, {len(ids):,} tokens", flush=True)


def documentation() -> Iterator[tuple[str, str]]:
    """Every file's name and its docstrings, those apart that an earlier file had, in order."""
    known: set[str] = set()
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for root, apart in ((library, _APART), (packages, {"tests"})):
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if not apart & set(name.parts):
                fresh = [text for text in docstrings(path) if text not in known]
                known.update(fresh)
                if fresh:
                    yield str(name), "\n\n".join(dict.fromkeys(fresh))


def docstrings(path: Path) -> Iterable[str]:
    """Those of a file, in order; none of one that does not parse."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = [ast.get_docstring(each) for each in ast.walk(tree) if isinstance(each, documented)]
    return [text for text in found if text and len(text) > 40]


def new_decoder(normed: bool) -> Decoder:
    torch.manual_seed(0)
    config, decoder = (Qwen3Config, Qwen3ForCausalLM) if normed else (LlamaConfig, LlamaForCausalLM)
    return decoder(
        config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            intermediate_size=640,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def train(folder: Path, network: Decoder, steps: int) -> None:
    """AdamW with a warm-up and a cosine, bfloat16 products; a checkpoint every 200 steps."""
    optimizer = torch.optim.AdamW(
        network.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    state, first = folder / "training.pt", 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        first = int(kept["step"])
    ids = np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False)
    began = time.perf_counter()
    for step in range(first, steps):
        warm, along = min(1.0, (step + 1) / 100), step / steps
        rate = RATE * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * along)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(network, _batch(ids, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            speed = (step + 1 - first) * BATCH * LENGTH / (time.perf_counter() - began)
            print(f"{step + 1}/{steps} loss {loss.item():.3f}, {speed:.0f} tokens/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            kept = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**kept, "step": step + 1}, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            network.save_pretrained(folder)
    known = perplexity(network, np.load(folder / "held_out.npy", allow_pickle=False))
    (folder / "trained.json").write_text(json.dumps({"steps": steps, "perplexity": known}))
    print(f"perplexity on held-out text: {known:.2f}", flush=True)


def _batch(ids: NDArray[np.uint16], step: int) -> torch.Tensor:
    """``[BATCH, LENGTH]`` from random places, the same ones whenever this step comes."""
    places = np.random.default_rng(step).integers(len(ids) - LENGTH, size=BATCH)
    return torch.tensor(np.stack([ids[at : at + LENGTH] for at in places]).astype(np.int64))


def _loss(network: Decoder, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(input_ids=batch, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def perplexity(network: Decoder, ids: NDArray[np.uint16], sequences: int = 64) -> float:
    """On the first sequences, every one on its own: exp of the mean loss of their tokens."""
    kept = torch.tensor(ids[: sequences * LENGTH].astype(np.int64)).view(-1, LENGTH)
    with torch.no_grad():
        logits = network(input_ids=kept).logits[:, :-1]
    return math.exp(cross_entropy(logits.flatten(0, 1), kept[:, 1:].flatten()).item())


if __name__ == "__main__":
    raise SystemExit(main())
