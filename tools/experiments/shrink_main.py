"""Experiments: what is left of a network that is made smaller with some inputs and no training?

    python tools/experiments/shrink_main.py --data cifar10_16px.npz  # all; writes docs/shrinking.md
    python tools/experiments/shrink_main.py --report  # the page, from the rows that there are
    python tools/experiments/shrink_main.py --networks MiniLM --arms shrink --seeds 0 --again

Two networks are computed at a time, each by one thread. Every row is appended to
``runs/experiments/shrinking.jsonl`` when it is there; rows that are there, or in the checked-in
``docs/shrinking.jsonl``, are not computed again, so that a run that was stopped goes on. Those
whose packages are not installed are left out; ``make experiments-shrink`` installs them.
"""

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

from shrink_arms import ARMS
from shrink_networks import Subject, subjects
from shrink_page import write
from shrink_rows import KEPT, ROOT, RUNS, Job, asked, compute, forget, key, stored


def main() -> int:
    options = _options()
    arms = tuple(a for a in ARMS if not options.arms or a.name in options.arms)
    forms: dict[tuple[str, int], list[Subject]] = {}
    for subject in subjects(options.seeds):
        if not options.networks or subject.network in options.networks:
            forms.setdefault((subject.network, subject.seed), []).append(subject)
    if options.again:
        asked_for = [s for each in forms.values() for s in each]
        forget({key(s, *pair) for s in asked_for for pair in asked(s, arms)})
    if not options.report:
        _compute([(tuple(each), arms, options.data) for each in forms.values()], options.jobs)
    known = stored()
    everything = [key(s, *pair) for s in subjects() for pair in asked(s, ARMS)]
    rows = [known[name] for name in everything if name in known]
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(rows, ROOT / "docs" / "shrinking.md", Path(__file__).with_name("shrink_findings.md"))
    return 0


def _compute(jobs: list[Job], processes: int) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        for number, (title, seconds) in enumerate(pool.imap_unordered(compute, jobs), 1):
            print(f"{number}/{len(jobs)} {title}: {seconds:.0f} s", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 at 16x16 pixels, an .npz file")
    parser.add_argument("--report", action="store_true", help="compute nothing")
    parser.add_argument("--again", action="store_true", help="compute what is there, too")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--networks", nargs="*", help="only these")
    parser.add_argument("--arms", nargs="*", help="only these, by their names")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
