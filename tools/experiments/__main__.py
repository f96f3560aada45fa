"""Experiments: does structure learning beat the width multiplier?

    python tools/experiments --data cifar10_16px.npz   # everything; writes docs/experiments.md
    python tools/experiments --quick                   # minutes; writes runs/experiments/quick.md
    python tools/experiments --report                  # the page from the rows that there are

Two studies are computed at a time, each by one thread. Every row is appended to
``runs/experiments/rows.jsonl`` when it is there; rows that are there, or in the checked-in
``docs/experiments.jsonl``, are not computed again, so that a run that was stopped goes on.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from arms import Arm, Study
from compute import KEPT, ROOT, RUNS, compute, stored
from page import write, write_summary
from questions import Question, full, quick


def main() -> int:
    options = _options()
    if options.quick:
        questions = quick(options.data, RUNS)
    elif options.data is None:
        print("give --data cifar10_16px.npz (or any .npz of images), or --quick", file=sys.stderr)
        return 2
    else:
        questions = full(options.data, RUNS)
    if not options.report:
        _compute(questions, options.jobs)
    asked = _keys(questions)
    kept = [row for key, row in stored().items() if key in asked]
    if options.quick:
        write(questions, kept, RUNS / "quick.md", "QUICK=1 make experiments")
    else:
        KEPT.write_text("".join(json.dumps(row) + "\n" for row in sorted(kept, key=_key)))
        page, findings = ROOT / "docs" / "experiments.md", Path(__file__).parent / "findings.md"
        write(questions, kept, page, "make experiments", findings)
        write_summary(questions[0], kept, ROOT / "docs" / "train-in-pytorch.md")
    return 0


def _compute(questions: Iterable[Question], jobs: int) -> None:
    known = stored()
    studies = _merged(study for question in questions for study in question.studies)
    todo = [s for s in studies if any(s.key(arm) not in known for arm in s.arms)]
    RUNS.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    done, began = 0, time.perf_counter()
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        for name, seconds in pool.imap_unordered(compute, todo):
            done += 1
            left = (time.perf_counter() - began) / done * (len(todo) - done)
            told = f"{done}/{len(todo)} {name}: {seconds:.0f} s; about {left / 60:.0f} min left"
            print(told, flush=True)


def _merged(studies: Iterable[Study]) -> list[Study]:
    """One study for each seed network, so that what arms of several questions share comes once."""
    arms: dict[Study, dict[Arm, None]] = {}
    for study in studies:
        arms.setdefault(replace(study, arms=()), {}).update(dict.fromkeys(study.arms))
    return [replace(study, arms=tuple(found)) for study, found in arms.items()]


def _keys(questions: Iterable[Question]) -> set[str]:
    return {study.key(arm) for q in questions for study in q.studies for arm in study.arms}


def _key(row: dict[str, object]) -> str:
    return str(row["key"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 at 16x16 pixels, an .npz file")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
