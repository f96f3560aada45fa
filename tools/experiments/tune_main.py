"""Experiments: what does a trained network come to at a part of its FLOPs, after a few more epochs?

    python tools/experiments/tune_main.py --data cifar10_16px.npz  # writes docs/from-trained.md
    python tools/experiments/tune_main.py --report  # the page, from the rows that there are
    python tools/experiments/tune_main.py --networks MobileNet --arms "from trained" --seeds 0

Every row is appended to ``runs/experiments/tuning.jsonl`` when it is there; rows that are there, or
in the checked-in ``docs/from-trained.jsonl``, are not computed again, so that a run that was
stopped goes on. Trained networks are kept under ``runs/experiments/trained``.
"""

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

from shrink_rows import ROOT, RUNS
from tune_arms import ARMS
from tune_page import write
from tune_rows import BUDGETS, KEPT, NETWORKS, Job, asked, compute, stored


def main() -> int:
    options = _options()
    if not options.report:
        if options.data is None:
            print("give --data cifar10_16px.npz, or --report", file=sys.stderr)
            return 2
        jobs = [
            Job(network, seed, arm, budgets, options.data)
            for network, seed, arm, budgets in asked(
                options.networks, options.seeds, options.arms, options.budgets
            )
        ]
        _compute(jobs, options.jobs)
    known = stored()
    everything = asked(NETWORKS, range(10), ARMS, BUDGETS)
    keys = [key for job in everything for key in Job(*job, Path()).keys]
    rows = [known[key] for key in keys if key in known]
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    findings = Path(__file__).with_name("tune_findings.md")
    write(rows, ROOT / "docs" / "from-trained.md", findings)
    return 0


def _compute(jobs: list[Job], processes: int) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        for number, told in enumerate(pool.imap(compute, jobs, chunksize=1), 1):
            print(f"{number}/{len(jobs)} {told}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 at 16x16 pixels, an .npz file")
    parser.add_argument("--report", action="store_true", help="compute nothing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="only these")
    parser.add_argument("--arms", nargs="*", default=ARMS, help="only these")
    parser.add_argument("--budgets", nargs="*", type=int, default=BUDGETS, help="percent of FLOPs")
    parser.add_argument("--seeds", nargs="*", type=int, default=range(3))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
