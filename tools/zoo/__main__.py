"""Coverage over whole networks: what can be resized, at what cost, and proof that it is right.

    python tools/zoo                        # every entry; writes docs/coverage.md
    python tools/zoo --small                # 14 small networks; writes docs/coverage-small.md
    python tools/zoo --only timm/dla34 ...  # these (globs too); prints their findings
    python tools/zoo --failed               # once more what failed

Every network is exported and examined in processes of its own under a time and a memory limit, two
at a time. Exported models stay in ``runs/zoo/models`` until what they depend on changes; findings
are appended to ``runs/zoo/results.jsonl`` and hold while the program stays the same. So a run that
was stopped goes on where it was, and with ``--reuse-exports`` a mended pass has its row in seconds.
The exit code is 1 if a row falls short.
"""

import argparse
import dataclasses
import datetime as dt
import fnmatch
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from entries import ENTRIES
from entry import ROOT, Entry, export_digest, program_digest, versions
from examine import Examination
from findings import Findings
from prepare import is_prepared, paths, prepare
from report import report

RUNS = ROOT / "runs" / "zoo"
RESULTS = RUNS / "results.jsonl"
WORK = RUNS / "work"
_LOCK = threading.Lock()


def main() -> int:
    options = _options()
    if options.worker:
        return _work(options.worker, ENTRIES[options.only[0]], options.memory_gib)
    entries = _chosen(options)
    digest = program_digest()
    known = {} if options.fresh else stored(None if options.report else digest)
    todo = [] if options.report else [e for e in entries if _is_open(e, known, options)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda entry: _measure(entry, digest, options), todo):
            known[found.name] = found
    rows = [known[entry.name] for entry in entries if entry.name in known]
    if options.only or options.failed:
        print(json.dumps([dataclasses.asdict(found) for found in rows], indent=1))
    else:
        _write(options, rows)
    return int(any(found.shortfalls for found in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--small", action="store_true", help="the small networks only")
    add("--only", nargs="+", metavar="NAME", default=[], help="these; globs are understood")
    add("--failed", action="store_true", help="once more those whose last row falls short")
    add("--fresh", action="store_true", help="measure again what is stored")
    add("--reuse-exports", action="store_true", help="take stored exports, whatever has changed")
    add("--report", action="store_true", help="measure nothing; a page of the last rows")
    add("--jobs", type=int, default=2, help="networks at a time (default 2)")
    add("--time-s", type=int, default=1200, help="limit per process (default 1200)")
    add("--memory-gib", type=float, default=10.0, help="limit per process (default 10)")
    add("--worker", choices=("prepare", "examine"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[Entry]:
    entries = [entry for entry in ENTRIES.values() if entry.small or not options.small]
    for pattern in options.only:
        if not fnmatch.filter(ENTRIES, pattern):
            raise SystemExit(f"zoo: no entry is named {pattern}")
    if options.only:
        entries = [e for e in entries if any(fnmatch.fnmatch(e.name, p) for p in options.only)]
    if options.failed:
        last = stored(None)
        entries = [e for e in entries if e.name in last and last[e.name].shortfalls]
    return entries


def stored(digest: str | None) -> dict[str, Findings]:
    """The last row of every network, of this program or (None) of any."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {
        row["name"]: Findings.from_json(row["findings"])
        for row in rows
        if digest is None or row["digest"] == digest
    }


def _is_open(entry: Entry, known: dict[str, Findings], options: argparse.Namespace) -> bool:
    found = known.get(entry.name)
    return found is None or (options.failed and bool(found.shortfalls))


def _measure(entry: Entry, digest: str, options: argparse.Namespace) -> Findings:
    """One row, from processes of its own."""
    start = time.perf_counter()
    found = Findings(entry.name, entry.family, structure_only=entry.structure_only)
    words = ""
    if not is_prepared(entry, options.reuse_exports):
        words = _run_alone("prepare", entry, options)
    if words:
        found.crashes["export"] = words
    else:
        path = WORK / f"{entry.stem}.json"
        path.unlink(missing_ok=True)
        words = _run_alone("examine", entry, options)
        if path.exists():
            found = Findings.from_json(json.loads(path.read_text()))
        if words:
            found.crashes["examine"] = words
    line = {"name": entry.name, "digest": digest, "findings": dataclasses.asdict(found)}
    with _LOCK:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        spent = time.perf_counter() - start
        print("; ".join([f"{entry.name}: {spent:.0f} s", *found.shortfalls]), file=sys.stderr)
    return found


def _run_alone(stage: str, entry: Entry, options: argparse.Namespace) -> str:
    """Run a stage in a process of its own; what went wrong, in words."""
    here = str(Path(__file__).parent)
    command = [sys.executable, here, "--worker", stage, "--only", entry.name]
    command += ["--memory-gib", str(options.memory_gib)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=options.time_s,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no result in {options.time_s} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return lines[-1][:400] if lines else f"ended with {done.returncode}"


def _work(stage: str, entry: Entry, memory_gib: float) -> int:
    """In the process of its own."""
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    if stage == "prepare":
        prepare(entry)
        facts = paths(entry)[2]
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"memory_mib": _memory_mib()}))
        return 0
    WORK.mkdir(parents=True, exist_ok=True)

    def note(found: Findings) -> None:
        found.memory_mib["examine"] = _memory_mib()
        (WORK / f"{entry.stem}.json").write_text(json.dumps(dataclasses.asdict(found)))

    note(Examination(entry, note).run())
    return 0


def _memory_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _write(options: argparse.Namespace, rows: Sequence[Findings]) -> None:
    name = "coverage-small" if options.small else "coverage"
    page = report(
        "small networks" if options.small else "the zoo",
        f"python tools/zoo{' --small' if options.small else ''}",
        dt.datetime.now(dt.UTC).date().isoformat(),
        {"Python": platform.python_version(), **versions()},
        f"{os.cpu_count()} cores",
        rows,
    )
    (ROOT / "docs" / f"{name}.md").write_text(page)


if __name__ == "__main__":
    sys.exit(main())
