"""Rows of the page on shrinking: where they are stored, and what computes those of one subject."""

import datetime as dt
import json
import os
import platform
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import torch
from shrink_arms import Arm, made
from shrink_networks import CIFAR, Material, Subject, material
from shrink_peers import CannotError, counted

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS = ROOT / "runs" / "experiments"
ROWS = RUNS / "shrinking.jsonl"
KEPT = ROOT / "docs" / "shrinking.jsonl"

Row = dict[str, Any]
Job = tuple[tuple[Subject, ...], tuple[Arm, ...], Path | None]


def key(subject: Subject, arm: Arm, budget: int) -> str:
    """What tells a row from all others."""
    return f"{subject.title} | {subject.seed} | {arm.name} | {budget}"


def suits(arm: Arm, subject: Subject) -> bool:
    """Whether an arm can be computed for a subject."""
    if arm.method == "torch-pruning":
        return subject.network in CIFAR and subject.form == "nodes"
    if arm.attention is not None:
        return subject.network == "MiniLM"
    return arm.method != "l2 + bn" or subject.form == "nodes"


def asked(subject: Subject, arms: Sequence[Arm]) -> list[tuple[Arm, int]]:
    """The arms of a subject at its budgets."""
    return [(arm, budget) for arm in arms if suits(arm, subject) for budget in subject.budgets]


def stored() -> dict[str, Row]:
    """All rows that there are, by their keys; later ones in place of earlier ones."""
    return {row["key"]: row for path in (KEPT, ROWS) for row in _rows(path)}


def forget(keys: set[str]) -> None:
    """Drop stored rows, so that they are computed again."""
    for path in (KEPT, ROWS):
        others = [json.dumps(row) + "\n" for row in _rows(path) if row["key"] not in keys]
        if path.exists():
            path.write_text("".join(others))


def _rows(path: Path) -> Iterator[Row]:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # the process was killed within a line


def compute(job: Job) -> tuple[str, float]:
    """Compute what is missing of some subjects, and append each row when it is there.

    A subject whose package is missing, and an arm that fails, are named and left out.

    Args:
        job: the forms of one network that is trained once, the arms, and CIFAR-10 at 16x16 pixels.

    Returns:
        The network and its seed, and the seconds.
    """
    subjects, arms, data = job
    torch.set_num_threads(1)
    began, known = time.perf_counter(), stored()
    for subject in subjects:
        todo = [pair for pair in asked(subject, arms) if key(subject, *pair) not in known]
        if not todo:
            continue
        try:
            given = material(subject, data, RUNS)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            print(f"{subject.title}, seed {subject.seed}: left out: {error}", flush=True)
            continue
        for arm, budget in todo:
            _append(subject, given, arm, budget)
    return f"{subjects[0].network}, seed {subjects[0].seed}", time.perf_counter() - began


def _append(subject: Subject, given: Material, arm: Arm, budget: int) -> None:
    title = f"{subject.title}, seed {subject.seed}, {arm.name} at {budget} %"
    row = _about(subject, arm, budget)
    try:
        row |= _computed(subject, given, arm, budget)
    except CannotError as error:
        row["cannot"] = str(error)
    except Exception as error:  # noqa: BLE001  # another program's failure stops no other arm
        print(f"{title}: left out", flush=True)
        traceback.print_exception(error, limit=-3)
        return
    line = json.dumps(row) + "\n"
    with ROWS.open("a") as lines:
        lines.write(line)  # one short write: rows of two processes do not mix
    print(f"{title}: {_told(row)}", flush=True)


def _about(subject: Subject, arm: Arm, budget: int) -> Row:
    """What a row says whatever comes of it."""
    return {
        "key": key(subject, arm, budget),
        "network": subject.network,
        "form": subject.form,
        "seed": subject.seed,
        "arm": arm.name,
        "budget": budget,
        "day": dt.date.today().isoformat(),
        "machine": machine(),
        "versions": dict(versions()),
    }


def _computed(subject: Subject, given: Material, arm: Arm, budget: int) -> Row:
    result = made(arm, given, budget / 100, subject.seed)
    shares = {}
    for kind in ("flops", "params"):
        whole, rest = counted(onnx.load(given.path), kind), counted(result.model, kind)
        shares[f"{kind}_share"] = rest / whole
    return {
        "original": given.measures(given.expected, given.expected),
        "measures": given.judged(result.model),
        **shares,
        "setting": result.setting,
        "cpu_seconds": round(result.seconds, 1),
    }


def _told(row: Row) -> str:
    if "cannot" in row:
        return str(row["cannot"])
    measures = [f"{name} {number:.4f}" for name, number in row["measures"].items()]
    return " ".join([*measures, row["setting"]])


def machine() -> str:
    """The processor and how many of its cores there are."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


def versions() -> Iterator[tuple[str, str]]:
    """Of Python and of the packages that figures depend on."""
    yield "python", platform.python_version()
    for name in ("numpy", "onnxruntime", "onnxsim", "torch", "torch-pruning"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
