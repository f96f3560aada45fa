"""Experiments: what is left of a language model that is made smaller by some text?

    python tools/experiments/decoder.py        # trains the model, once
    python tools/experiments/decoder_table.py  # all; writes docs/language-models-results.md
    python tools/experiments/decoder_table.py --arms shrink --seeds 0

Every row is appended to ``runs/experiments/decoder.jsonl`` when it is there, and not computed
again, so that a run that was stopped goes on.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from decoder import FOLDER, Decoder
from decoder_peers import by_flap, by_torch_pruning
from numpy.typing import NDArray
from shrink_rows import ROOT, RUNS
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import morphgraph as mg
from morphgraph.passes.calibration.perplexity import Foretelling, perplexity
from morphgraph.passes.calibration.segments import run_all
from morphgraph.plans import Plan
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import finish

KEPT = ROOT / "docs" / "language-models-results.jsonl"
PAGE = ROOT / "docs" / "language-models-results.md"
ROWS = RUNS / "decoder.jsonl"
LENGTH = 128  # tokens of a sequence
SEQUENCES, JUDGED = 96, 64  # of calibration, a fifth held out, and of the judgement
SHARES = (0.9, 0.8, 0.7, 0.6)
SEEDS = (0, 1, 2)
TUNED = (0.8, 0.6)
"""Shares at which self-distillation is tried: it takes longer than all else together."""


@dataclass
class Material:
    """The decoder, text to calibrate with, and text to judge by."""

    folder: Path
    seed: int

    @cached_property
    def net(self) -> Decoder:
        net: Decoder = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        net.config.use_cache = False
        return net

    @cached_property
    def graph(self) -> mg.ChannelGraph:
        path = self.folder / "decoder.onnx"
        weights = self.folder / "model.safetensors"
        if not path.exists() or path.stat().st_mtime < weights.stat().st_mtime:
            example = torch.zeros(2, LENGTH, dtype=torch.int64)
            ir.save(mg.export(self.net, (example,), dynamic_batch=True), path)
        return mg.lift(path)

    @cached_property
    def text(self) -> NDArray[np.int64]:
        """Calibration, ``[SEQUENCES, LENGTH]``: other places of the training text for each seed."""
        ids = np.load(self.folder / "train.npy", mmap_mode="r", allow_pickle=False)
        places = np.random.default_rng(1000 + self.seed).integers(len(ids) - LENGTH, size=SEQUENCES)
        return np.stack([ids[at : at + LENGTH] for at in places]).astype(np.int64)

    @cached_property
    def judged(self) -> NDArray[np.int64]:
        """Files that neither the training nor the calibration has seen."""
        ids = np.load(self.folder / "held_out.npy", allow_pickle=False)[-JUDGED * LENGTH :]
        return ids.reshape(JUDGED, LENGTH).astype(np.int64)

    @cached_property
    def shrinker(self) -> Shrinker:
        return Shrinker(self.graph, {"input_ids": self.text}, seed=self.seed, threads=1)

    def budget(self, share: float) -> dict[str, str]:
        return {"body_params": f"{100 * share:g}%"}

    def plan(self, share: float) -> Plan:
        return self.shrinker.plan(self.budget(share))

    def judge(self, model: ir.Model) -> float:
        feeds = [{"input_ids": part} for part in np.split(self.judged, 4)]
        (output,) = (value.name or "" for value in model.graph.outputs)
        what = Foretelling("input_ids", output, self.net.config.vocab_size)
        found = perplexity(run_all(model, feeds, 1), feeds, what)
        assert found is not None
        return found

    def judge_module(self, net: nn.Module) -> float:
        total = 0.0
        for part in torch.from_numpy(self.judged).split(16):
            with torch.no_grad():
                logits = net(input_ids=part, use_cache=False).logits[:, :-1]
            total += cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            ).item()
        return math.exp(total / (JUDGED * (LENGTH - 1)))


def _original(material: Material, _share: float) -> float:
    return material.judge(material.graph.model)


def _l2(material: Material, share: float) -> float:
    plan = mg.plan(material.graph, material.budget(share), score="l2")
    return material.judge(mg.apply(material.graph, plan, verify=False))


def _most(material: Material, share: float) -> float:
    return share * mg.cost(material.graph, "body_params").total


def _torch_pruning(material: Material, share: float) -> float:
    return material.judge_module(by_torch_pruning(material.net, _most(material, share)))


def _flap(material: Material, share: float) -> float:
    return material.judge_module(by_flap(material.net, material.text, _most(material, share)))


def _sliced(material: Material, share: float) -> float:
    return material.judge(mg.apply(material.graph, material.plan(share), verify=False))


def _shrink(material: Material, share: float) -> float:
    return material.judge(finish(material.shrinker, material.plan(share), verify=False).model)


def _tuned(material: Material, share: float) -> float:
    made = finish(material.shrinker, material.plan(share), tune=300, verify=False)
    return material.judge(made.model)


ARMS: dict[str, Callable[[Material, float], float]] = {
    "l2": _l2,
    "torch-pruning l2": _torch_pruning,
    "FLAP": _flap,
    "shrink, no refit": _sliced,
    "shrink": _shrink,
    "shrink, 300 steps": _tuned,
}
WITHOUT_TEXT = {"l2", "torch-pruning l2"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the trained decoder")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--report", action="store_true", help="compute nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        _compute(options.folder, options.seeds, options.arms, options.shares)
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    write(rows, options.folder)
    return 0


def _compute(
    folder: Path, seeds: Iterable[int], arms: Iterable[str], shares: Iterable[float]
) -> None:
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    known = {(r["arm"], r["share"], r["seed"]) for r in map(json.loads, lines)}
    for seed in seeds:
        material = Material(folder, seed)
        for arm, share in [("original", 1.0), *((a, s) for a in arms for s in shares)]:
            fixed = arm == "original" or arm in WITHOUT_TEXT
            if (arm, share, seed) in known or (fixed and seed != SEEDS[0]):
                continue
            if arm == "shrink, 300 steps" and share not in TUNED:
                continue
            began = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = (ARMS.get(arm) or _original)(material, share)
            seconds = time.process_time() - began
            row = {"arm": arm, "share": share, "seed": seed, "perplexity": found}
            with ROWS.open("a") as file:
                file.write(json.dumps({**row, "seconds": round(seconds, 1)}) + "\n")
            print(f"{arm} {share:.0%} seed {seed}: {found:.2f}, {seconds:.0f} s", flush=True)


def write(rows: list[dict[str, object]], folder: Path) -> None:
    """The page, and the rows that it shows."""
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        place = str(row["arm"]), float(str(row["share"]))
        found.setdefault(place, []).append(float(str(row["perplexity"])))
    (original,) = found["original", 1.0]
    lines = ["| arm | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"]
    lines.append("|---|" + "---:|" * len(SHARES))
    for arm in ARMS:
        cells = [_cell(found.get((arm, share), []), original) for share in SHARES]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    trained = json.loads((folder / "trained.json").read_text())
    day = datetime.now(UTC).date()
    text = Path(__file__).with_name("decoder_page.md").read_text()
    PAGE.write_text(
        text.format(
            date=day, original=f"{original:.2f}", steps=trained["steps"], table="\n".join(lines)
        )
    )


def _cell(values: list[float], original: float) -> str:
    """Perplexity as a multiple of the original's, and the standard error over the seeds."""
    if not values:
        return ""
    ratios = [value / original for value in values]
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else None
    shown = f"{statistics.mean(ratios):.3f}"
    return shown if error is None else f"{shown} ± {error:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
