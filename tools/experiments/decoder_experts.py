"""In what order experts and their units go, and what a fit of their kernels brings.

    python tools/experiments/decoder_experts.py  # all; writes docs/mixtures-results.md
    python tools/experiments/decoder_experts.py --seeds 0 --cuts "experts 8 to 6"
    python tools/experiments/decoder_experts.py --report  # computes nothing

A Mixtral of 2.5 million parameters (four blocks, eight experts, two of them for every token), which
is trained here, learns the docstrings of ``decoder.py``. It loses units inside of the experts,
experts, hidden width, or all of them under one budget, in the order of the kernels' norms, of what
they are on the calibration text, or, of experts, of how often tokens choose them. It is fitted with
its experts' kernels as slices, and with them fitted, too. Judged is the perplexity on held-out text
that neither was fitted to.

The mixture is in ``runs/experiments/mixture``. Every row is appended to ``mixture.jsonl`` beside it
when it is there, and not computed again, so that a run that was stopped goes on.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import torch
from decoder import FOLDER, VOCABULARY, prepare
from decoder_training import BATCH, Course, random_sequences, train
from numpy.typing import NDArray
from shrink_rows import ROOT, RUNS
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM

import morphgraph as mg
from morphgraph.onnx_io import runtime
from morphgraph.passes.calibration.choices import how_often
from morphgraph.passes.calibration.curves import order_of
from morphgraph.passes.refit.refit import refit
from morphgraph.passes.rewrite.resize import resize
from morphgraph.shrinker import Shrinker

Keep = dict[int, NDArray[np.int64]]
Row = dict[str, Any]
KEPT = ROOT / "docs" / "mixtures-results.jsonl"
PAGE = ROOT / "docs" / "mixtures-results.md"
ROWS = RUNS / "mixture.jsonl"
LENGTH = 128
JUDGED = 128  # sequences of the held-out text, from its beginning
ASIDE = 32  # sequences on which the fit chooses: a fifth, as `shrink` holds out
#: What goes: the names of the groups, and the width that is left.
CUTS = {
    "units 160 to 96": ("*.experts.*", 96),
    "experts 8 to 6": ("*.gate", 6),
    "hidden width 128 to 96": ("*(residual*", 96),
    "params 70%": ("", 0),
}
ORDERS = ("norms", "choices", "data")
FITS = ("slices", "others fitted", "experts fitted, too")
SEEDS = (0, 1, 2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=RUNS / "mixture")
    parser.add_argument("--text", type=Path, default=FOLDER, help="the folder of decoder.py")
    parser.add_argument("--steps", type=int, default=900, help=f"of {BATCH} x {LENGTH} tokens")
    parser.add_argument("--sequences", type=int, default=128, help="of the text that is fitted to")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=CUTS)
    parser.add_argument("--orders", nargs="+", default=ORDERS, choices=ORDERS)
    parser.add_argument("--report", action="store_true", help="compute nothing")
    options = parser.parse_args()
    if not options.report:
        compute(options)
    write([*stored(KEPT, ROWS).values()])
    return 0


def compute(options: argparse.Namespace) -> None:
    """Append the rows that are missing."""
    torch.set_num_threads(1)
    prepare(options.text)
    options.folder.mkdir(parents=True, exist_ok=True)
    network = trained(options.folder, options.text, options.steps)
    network.set_experts_implementation("batched_mm")
    example = {"input_ids": torch.zeros((BATCH, LENGTH), dtype=torch.int64), "use_cache": False}
    graph = mg.lift(mg.export(network, example))
    judged = np.load(options.text / "held_out.npy", allow_pickle=False)
    known = batches(judged[: JUDGED * LENGTH])
    there = stored(ROWS)

    def add(row: Row, make: Callable[[], ir.Model]) -> None:
        began = time.process_time()
        found = perplexity(make(), known)
        seconds = round(time.process_time() - began, 1)
        with ROWS.open("a") as file:
            file.write(json.dumps({**row, "perplexity": found, "seconds": seconds}) + "\n")
        print(", ".join(map(str, row.values())), f"{found:.2f}", flush=True)

    whole = {"cut": "whole", "order": "", "fit": "", "seed": 0}
    if place(whole) not in there:
        add(whole, lambda: graph.model)
    for seed in options.seeds:
        text = pieces(options.text, options.sequences + ASIDE, seed)
        shrinker = Shrinker(graph, {"input_ids": text}, seed=seed, threads=1)
        for cut in options.cuts:
            for order in options.orders:
                rows = [dict(whole, cut=cut, order=order, fit=f, seed=seed) for f in fits_of(order)]
                missing = [row for row in rows if place(row) not in there]
                keep = cut_of(shrinker, cut, order) if missing else None
                if keep is None:
                    continue
                for row in missing:
                    add(row, partial(made, shrinker, keep, row["fit"]))


def stored(*paths: Path) -> dict[tuple[str, ...], Row]:
    """The rows that there are; later ones in place of earlier ones."""
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    return {place(row): row for row in map(json.loads, lines)}


def place(row: Row) -> tuple[str, ...]:
    """What tells a row from all others."""
    return tuple(str(row[name]) for name in ("cut", "order", "fit", "seed"))


def fits_of(order: str) -> list[str]:
    """Which fits are made of an order; that of the other layers alone for one of them."""
    return [fit for fit in FITS if fit != "others fitted" or order == "norms"]


def made(shrinker: Shrinker, keep: Keep, fit: str) -> ir.Model:
    """The resized network without a fit, with one of all that is no expert, or of all."""
    graph = shrinker.graph
    if fit == "slices":
        return resize(graph, keep)
    if fit == "others fitted":
        with patch("morphgraph.passes.refit.refit.stacks", lambda *_: {}):
            return refit(graph, keep, shrinker.batches(), shrinker.aside(), threads=1).model
    return refit(graph, keep, shrinker.batches(), shrinker.aside(), threads=1).model


def write(rows: list[Row]) -> None:
    """The page, and the rows that it shows."""
    rows = sorted(rows, key=lambda row: (row["cut"] != "whole", place(row)))
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        found.setdefault(place(row)[:3], []).append(row["perplexity"])
    lines = ["| what goes | in the order of | " + " | ".join(FITS) + " |"]
    lines.append("|---|---|" + "---:|" * len(FITS))
    for cut in CUTS:
        for order in ORDERS:
            cells = [_cell(found.get((cut, order, fit), [])) for fit in FITS]
            if any(cells):
                lines.append(f"| {cut} | {order} | " + " | ".join(cells) + " |")
    (original,) = found["whole", "", ""]
    seeds = len({row["seed"] for row in rows})
    text = Path(__file__).with_name("mixture_page.md").read_text()
    PAGE.write_text(
        text.format(
            date=datetime.now(UTC).date(),
            original=f"{original:.2f}",
            seeds=seeds,
            table="\n".join(lines),
        )
    )


def _cell(values: list[float]) -> str:
    """The mean perplexity, and the standard error over the seeds."""
    if not values:
        return ""
    shown = f"{statistics.mean(values):.1f}"
    if len(values) < 2:
        return shown
    return f"{shown} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def cut_of(shrinker: Shrinker, cut: str, order: str) -> Keep | None:
    """Which channels stay; ``None`` where an order says nothing of those that go."""
    graph, (pattern, width) = shrinker.graph, CUTS[cut]
    chosen = [group for group in graph.groups if fnmatch(group.name, pattern)]
    if order == "choices":
        times = how_often(graph, shrinker.batches(), threads=1)
        found = {
            g.index: np.sort(np.argsort(times[g.index])[-width:])
            for g in chosen
            if g.index in times
        }
        return found or None
    if not pattern:
        score: Any = shrinker.scores() if order == "data" else "l2"
        plan = mg.plan(graph, {"params": "70%"}, same=["repeated"], score=score)
        return plan.keep_channels(graph)
    if order == "norms":
        plan = mg.plan(graph, {}, widths={group.id: width for group in chosen})
        return plan.keep_channels(graph)
    orders = {group.index: order_of(shrinker.calibration, group.index) for group in chosen}
    return {index: np.sort(each[-width:]) for index, each in orders.items()}


def pieces(text: Path, count: int, seed: int) -> NDArray[np.int64]:
    """Sequences from random places of the text that the mixture was trained on."""
    ids = np.load(text / "train.npy", mmap_mode="r", allow_pickle=False)
    return random_sequences(ids, 1000 + seed, LENGTH, count)


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
