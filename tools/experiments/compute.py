"""Rows: where they are stored, and the process that computes those of one study."""

import json
import time
from pathlib import Path

import torch
from arms import Row, Study
from bench import Bench

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS = ROOT / "runs" / "experiments"
ROWS = RUNS / "rows.jsonl"
KEPT = ROOT / "docs" / "experiments.jsonl"


def stored() -> dict[str, Row]:
    """All rows that there are, by their keys."""
    found = {}
    for path in (KEPT, ROWS):
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the process was killed within a line
                found[row["key"]] = row
    return found


def compute(study: Study) -> tuple[str, float]:
    """Compute a study, and append its rows, each when it is there; its name and the seconds."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    known = stored()
    missing = [arm for arm in study.arms if study.key(arm) not in known]
    for row in Bench(study).rows(missing) if missing else ():
        line = json.dumps(row) + "\n"
        with ROWS.open("a") as lines:
            lines.write(line)  # one short write: rows of two processes do not mix
    return f"{study.title}, seed {study.seed}", time.perf_counter() - began
