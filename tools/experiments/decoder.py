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
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from decoder_training import BATCH, Course, train
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
    network = new_decoder(options.normed)
    train(folder, folder, network, options.steps, Course(LENGTH, 100, _loss))
    known = perplexity(network, np.load(folder / "held_out.npy", allow_pickle=False))
    (folder / "trained.json").write_text(json.dumps({"steps": options.steps, "perplexity": known}))
    print(f"perplexity on held-out text: {known:.2f}", flush=True)
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


def _loss(network: Decoder, batch: torch.Tensor) -> torch.Tensor:
    """Of the next tokens; products in bfloat16."""
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
