"""What a fit of the experts' kernels brings: a small mixture of experts, trained here.

    python tools/experiments/decoder_experts.py  # into runs/experiments/mixture; about 20 minutes

A Mixtral of 2.5 million parameters (four blocks, eight experts, two of them for every token) learns
the docstrings of ``decoder.py``. It loses units inside of the experts, experts, hidden width, or
all of them under one budget, and is fitted with its experts' kernels as slices, and with them
fitted, too. Judged is the perplexity on held-out text that neither was fitted to.
"""

import argparse
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import torch
from decoder import FOLDER, VOCABULARY, prepare
from decoder_training import BATCH, Course, random_sequences, train
from numpy.typing import NDArray
from shrink_rows import RUNS
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import runtime
from morphgraph.passes.refit.refit import refit
from morphgraph.passes.rewrite.resize import resize

LENGTH = 128
JUDGED = 128  # sequences of the held-out text, from its beginning
ASIDE = 32  # sequences on which the fit chooses
#: What goes: part of the names of the groups, and the width that is left.
CUTS = {
    "units 160 to 96": ("experts", 96),
    "experts 8 to 6": ("gate", 6),
    "hidden width 128 to 96": ("residual", 96),
    "params 70%": ("", 0),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=RUNS / "mixture")
    parser.add_argument("--text", type=Path, default=FOLDER, help="the folder of decoder.py")
    parser.add_argument("--steps", type=int, default=900, help=f"of {BATCH} x {LENGTH} tokens")
    parser.add_argument("--sequences", type=int, default=128, help="of the text that is fitted to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=CUTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare(options.text)
    options.folder.mkdir(parents=True, exist_ok=True)
    network = trained(options.folder, options.text, options.steps)
    network.set_experts_implementation("batched_mm")
    example = {"input_ids": torch.zeros((BATCH, LENGTH), dtype=torch.int64), "use_cache": False}
    graph = mg.lift(mg.export(network, example))
    judged = np.load(options.text / "held_out.npy", allow_pickle=False)
    known = batches(judged[: JUDGED * LENGTH])
    print(f"whole: {perplexity(graph.model, known):.2f}", flush=True)
    for seed in options.seeds:
        text = pieces(options.text, options.sequences + ASIDE, seed)
        fitted, aside = text[: -ASIDE // BATCH], text[-ASIDE // BATCH :]
        for cut in options.cuts:
            keep = cut_of(graph, cut)
            found = {"slices": resize(graph, keep)}
            with patch("morphgraph.passes.refit.refit.chosen_products", lambda *_: {}):
                found["others fitted"] = refit(graph, keep, fitted, aside).model
            found["experts fitted, too"] = refit(graph, keep, fitted, aside).model
            known_of = {name: perplexity(model, known) for name, model in found.items()}
            row = ", ".join(f"{name} {value:.2f}" for name, value in known_of.items())
            print(f"seed {seed}, {cut}: {row}", flush=True)
    return 0


def cut_of(graph: ChannelGraph, cut: str) -> dict[int, NDArray[np.int64]]:
    """Which channels stay, by the kernels' norms."""
    if cut == "params 70%":
        return mg.plan(graph, {"params": "70%"}, same=["repeated"]).keep_channels(graph)
    pattern, width = CUTS[cut]
    widths = {group.id: width for group in graph.groups if pattern in group.name}
    return mg.plan(graph, {}, widths=widths).keep_channels(graph)


def pieces(text: Path, count: int, seed: int) -> list[dict[str, NDArray[np.int64]]]:
    """Sequences from random places of the text that the mixture was trained on."""
    ids = np.load(text / "train.npy", mmap_mode="r", allow_pickle=False)
    return batches(random_sequences(ids, 1000 + seed, LENGTH, count))


def batches(ids: NDArray[Any]) -> list[dict[str, NDArray[np.int64]]]:
    """Feeds of ``[BATCH, LENGTH]`` ids."""
    return [{"input_ids": each} for each in ids.astype(np.int64).reshape(-1, BATCH, LENGTH)]


def perplexity(model: ir.Model, feeds: list[dict[str, NDArray[np.int64]]]) -> float:
    """The exponential of the mean loss of the tokens, every sequence on its own."""
    loss, session = 0.0, runtime.session(model, 1)
    for feed in feeds:
        (logits,) = session.run(None, feed)
        shown, wanted = torch.tensor(logits)[:, :-1], torch.tensor(feed["input_ids"])[:, 1:]
        loss += cross_entropy(shown.flatten(0, 1), wanted.flatten()).item()
    return math.exp(loss / len(feeds))


def trained(folder: Path, text: Path, steps: int) -> MixtralForCausalLM:
    """The mixture, from its folder as far as it is there."""
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
    train(folder, text, network, steps, Course(LENGTH, 50, _loss))
    network.config.output_router_logits = False
    return network.eval()


def _loss(network: MixtralForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Of the next tokens, and of experts that few tokens take."""
    loss: torch.Tensor = network(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


if __name__ == "__main__":
    raise SystemExit(main())
