"""Rows of the page on trained networks: where they are stored, and what computes them."""

import datetime as dt
import json
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrink_rows import ROOT, RUNS, machine, versions

ROWS = RUNS / "tuning.jsonl"
KEPT = ROOT / "docs" / "from-trained.jsonl"
NETWORKS = ("ResNet-20", "VGG, by hand", "MobileNet", "ViT", "Inception")
BUDGETS = (50, 30)
FAMILY = "family"

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One arm of one network and seed, at one budget; a family at all of them at once."""

    network: str
    seed: int
    arm: str
    budgets: tuple[int, ...]
    data: Path

    @property
    def keys(self) -> list[str]:
        """What tells the rows from all others."""
        return [f"{self.network} | {self.seed} | {self.arm} | {b}" for b in self.budgets]


def asked(
    networks: Iterable[str], seeds: Iterable[int], arms: Sequence[str], budgets: Sequence[int]
) -> list[tuple[str, int, str, tuple[int, ...]]]:
    """The jobs, the first budget and seed before the others."""
    found: list[tuple[str, int, str, tuple[int, ...]]] = []
    for budget in budgets:
        for seed in seeds:
            for network in networks:
                for arm in arms:
                    if arm != FAMILY:
                        found.append((network, seed, arm, (budget,)))
                    elif budget == budgets[-1] and len(budgets) > 1:
                        found.append((network, seed, arm, tuple(budgets)))
    return found


def stored() -> dict[str, Row]:
    """All rows that there are, by their keys; later ones in place of earlier ones."""
    return {row["key"]: row for path in (KEPT, ROWS) for row in _rows(path)}


def _rows(path: Path) -> Iterator[Row]:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # the process was killed within a line


def compute(job: Job) -> str:
    """Compute a job's rows if any is missing, and append them; says what came out.

    What a program cannot do is a row of its own; an arm that fails is named and left out.
    """
    import torch
    from shrink_peers import CannotError

    known = stored()
    title = f"{job.network}, seed {job.seed}, {job.arm} at {'/'.join(map(str, job.budgets))} %"
    if all(key in known for key in job.keys):
        return f"{title}: known"
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        results = list(_computed(job))
    except CannotError as error:
        results = [{"cannot": str(error)} for _ in job.budgets]
    except Exception as error:  # noqa: BLE001  # another program's failure stops no other arm
        traceback.print_exception(error, limit=-3)
        return f"{title}: left out"
    for key, budget, result in zip(job.keys, job.budgets, results, strict=True):
        row = {
            "key": key,
            "network": job.network,
            "seed": job.seed,
            "arm": job.arm,
            "budget": budget,
            **result,
            "day": dt.date.today().isoformat(),
            "machine": machine(),
            "versions": dict(versions()),
        }
        with ROWS.open("a") as lines:
            lines.write(json.dumps(row) + "\n")  # one short write: rows of processes do not mix
    told = ", ".join(
        str(r["cannot"]) if "cannot" in r else f"{100 * r['accuracy']:.2f}" for r in results
    )
    return f"{title}: {told} ({time.perf_counter() - began:.0f} s)"


def _computed(job: Job) -> Iterator[Row]:
    from tune_arms import Case, made

    case = Case(job.network, job.seed, job.data, RUNS / "trained")
    original = case.accuracy(case.original())
    shares = [budget / 100 for budget in job.budgets]
    for net, seconds in made(case, job.arm, shares):
        yield {
            "original": original,
            "accuracy": case.accuracy(net),
            "share": case.counted(net),
            "cpu_seconds": round(seconds, 1),
        }
