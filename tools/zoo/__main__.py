"""Coverage over whole networks: what can be resized, at what cost, and proof that it is right.

    python tools/zoo                        # every entry; writes docs/coverage.md
    python tools/zoo --small                # 25 small ones; writes docs/coverage-small.md
    python tools/zoo --only timm/dla34 ...  # these (globs too); prints their findings
    python tools/zoo --failed               # once more what failed

Beside networks there are ONNX files of others under treatments (``files/*``), files of language
models (``decoders/*``), the small models of the onnx package (``onnx/*``), and peers at half the
width (``peers/*``).

Every network is exported and examined in processes of its own under a time and a memory limit, two
at a time. Exported models stay in ``runs/zoo/models`` until what they depend on changes; findings
are appended to ``runs/zoo/results.jsonl`` and hold while the program stays the same. So a run that
was stopped goes on where it was, and with ``--reuse-exports`` a mended pass has its row in seconds.
The exit code is 1 if a row does not hold.
"""

import argparse
import dataclasses
import datetime as dt
import fnmatch
import json
import logging
import multiprocessing
import os
import platform
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import connection

import torch
from entries import ALL
from entry import ROOT, Entry, export_digest, program_digest, versions
from file_findings import DecoderFindings, FileFindings
from file_report import file_sections
from findings import Findings
from kinds import AnyFindings, kind_of
from peers import PeerFindings
from prepare import is_prepared, note_memory
from report import report
from small_models import SmallFindings

RUNS = ROOT / "runs" / "zoo"
RESULTS = RUNS / "results.jsonl"
WORK = RUNS / "work"


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes the processes below along
    entries = _chosen(options)
    digest = program_digest()
    known = {} if options.fresh or options.only else stored(None if options.report else digest)
    todo = [] if options.report else [e for e in entries if _is_open(e, known, options)]
    known |= {found.name: found for found in _measure(todo, digest, options)}
    rows = [known[entry.name] for entry in entries if entry.name in known]
    if options.only or options.failed:
        print(json.dumps([dataclasses.asdict(found) for found in rows], indent=1))
    else:
        _write(options, rows)
    return int(not all(found.holds for found in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--small", action="store_true", help="the small networks only")
    add("--only", nargs="+", metavar="NAME", default=[], help="these, measured again; globs too")
    add("--failed", action="store_true", help="once more those whose last row does not hold")
    add("--fresh", action="store_true", help="measure again what is stored")
    add("--reuse-exports", action="store_true", help="take stored exports, whatever has changed")
    add("--report", action="store_true", help="measure nothing; a page of the last rows")
    add("--jobs", type=int, default=2, help="networks at a time (default 2)")
    add("--time-s", type=int, default=1200, help="limit per process (default 1200)")
    add("--memory-gib", type=float, default=10.0, help="limit per process (default 10)")
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[Entry]:
    entries = [entry for entry in ALL.values() if entry.small or not options.small]
    for pattern in options.only:
        if not fnmatch.filter(ALL, pattern):
            raise SystemExit(f"zoo: no entry is named {pattern}")
    if options.only:
        entries = [e for e in entries if any(fnmatch.fnmatch(e.name, p) for p in options.only)]
    if options.failed:
        last = stored(None)
        entries = [e for e in entries if e.name in last and not last[e.name].holds]
    return entries


def stored(digest: str | None) -> dict[str, AnyFindings]:
    """The last row of every network, of this program or (None) of any."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {
        row["name"]: kind_of(ALL[row["name"]]).from_json(row["findings"])
        for row in rows
        if row["name"] in ALL and (digest is None or row["digest"] == digest)
    }


def _is_open(entry: Entry, known: dict[str, AnyFindings], options: argparse.Namespace) -> bool:
    found = known.get(entry.name)
    return found is None or (options.failed and not found.holds)


def _measure(
    entries: Sequence[Entry], digest: str, options: argparse.Namespace
) -> Iterator[AnyFindings]:
    """The rows of these entries, as they come; ``options.jobs`` at a time."""
    RUNS.mkdir(parents=True, exist_ok=True)
    waiting = [*reversed(entries)]
    running: list[Row] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            running.append(Row(waiting.pop(), options))
        connection.wait([row.process.sentinel for row in running], timeout=1.0)
        for row in [row for row in running if row.is_complete()]:
            running.remove(row)
            found, spent = row.findings(), time.perf_counter() - row.start
            line = {
                "name": found.name,
                "digest": digest,
                "export": export_digest(row.entry),
                "findings": dataclasses.asdict(found),
            }
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            words = [f"{found.name}: {spent:.0f} s", *found.shortfalls]
            print("; ".join(words), file=sys.stderr, flush=True)
            yield found


class Row:
    """An entry on its way through its one or two processes.

    They are forks of this one, which has imported everything and computed nothing.
    """

    def __init__(self, entry: Entry, options: argparse.Namespace) -> None:
        self.entry = entry
        self.kind = kind_of(entry)
        self.options = options
        self.start = time.perf_counter()
        self.crash: tuple[str, str] | None = None
        self.partial = WORK / f"{entry.stem}.json"
        self.partial.unlink(missing_ok=True)
        ready = self.kind.prepare is None or is_prepared(entry, options.reuse_exports)
        self._launch("examine" if ready else "prepare")

    def _launch(self, stage: str) -> None:
        self.stage = stage
        self.deadline = time.perf_counter() + self.options.time_s
        self.words, sender = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(stage, self.entry, self.options.memory_gib, sender), daemon=True
        )
        self.process.start()
        sender.close()

    def is_complete(self) -> bool:
        """Whether there is nothing left to wait for; launches what comes next."""
        if self.process.is_alive():
            if time.perf_counter() < self.deadline:
                return False
            self.process.kill()
            self.crash = (self.stage, f"no result in {self.options.time_s} s")
        self.process.join()
        if self.crash is None and self.process.exitcode:
            self.crash = (self.stage, self._last_words())
        if self.crash is None and self.stage == "prepare":
            self._launch("examine")
            return False
        return True

    def _last_words(self) -> str:
        """What a process said that failed; its exit code where it was killed or crashed."""
        try:
            return str(self.words.recv())
        except EOFError:
            return f"exit {self.process.exitcode}"

    def findings(self) -> AnyFindings:
        """What was found before the end, and what ended it."""
        found = self.kind.blank(self.entry)
        if self.partial.exists():
            found = self.kind.from_json(json.loads(self.partial.read_text()))
        if self.crash is not None:
            stage, says = self.crash
            found.crashes[self.kind.first_stage if stage == "prepare" else stage] = says
        return found


def _work(stage: str, entry: Entry, memory_gib: float, sender: connection.Connection) -> None:
    """In the process of its own."""
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    WORK.mkdir(parents=True, exist_ok=True)
    log = os.open(WORK / f"{entry.stem}.{stage}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        prepare = kind_of(entry).prepare
        if stage == "prepare" and prepare is not None:
            prepare(entry)
            note_memory(entry, _memory_mib())
        else:
            _examine(entry)
    except BaseException as error:
        words = str(error).strip().splitlines() or [""]
        sender.send(f"{type(error).__name__}: {words[0][:400]}")
        raise


def _examine(entry: Entry) -> None:
    def note(found: AnyFindings) -> None:
        found.memory_mib["examine"] = _memory_mib()
        (WORK / f"{entry.stem}.json").write_text(json.dumps(dataclasses.asdict(found)))

    note(kind_of(entry).examine(entry, note))


def _memory_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _extent(options: argparse.Namespace, rows: Sequence[AnyFindings]) -> str:
    """How much of the zoo the page holds, and whether one program measured it."""
    wanted = sum(entry.small or not options.small for entry in ALL.values())
    words = f"{len(rows)} of {wanted} entries were measured"
    if options.report:
        last = {row["name"]: row["digest"] for row in map(json.loads, RESULTS.open())}
        programs = {last[found.name] for found in rows}
        words += f", by {len(programs)} states of the program"
    return words + "."


def _write(options: argparse.Namespace, rows: Sequence[AnyFindings]) -> None:
    name = "coverage-small" if options.small else "coverage"
    networks = [found for found in rows if isinstance(found, Findings)]
    page = report(
        "small networks" if options.small else "the zoo",
        "python tools/zoo" + " --small" * options.small + " --report" * options.report,
        dt.datetime.now(dt.UTC).date().isoformat(),
        {"Python": platform.python_version(), **versions()},
        f"{os.cpu_count()} cores. {_extent(options, rows)}",
        networks,
    )
    others = file_sections(
        [found for found in rows if type(found) is FileFindings],
        [found for found in rows if isinstance(found, DecoderFindings)],
        [found for found in rows if isinstance(found, SmallFindings)],
        [found for found in rows if isinstance(found, PeerFindings)],
    )
    (ROOT / "docs" / f"{name}.md").write_text(page + "\n".join([*others, ""] if others else []))


if __name__ == "__main__":
    sys.exit(main())
