"""Trade-off curves: runs over budgets, methods and seeds, whose results are rows of a file.

    rows.jsonl       one row per run, as it is done; what is there is not computed again
    RUN/...          a folder of :mod:`morphgraph.recipes.run` for every run

A row's key is a hash of its settings, the model and the data. The same
call resumes a sweep that was stopped; a larger one computes what is missing. Where a row was
computed does not matter.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import msgspec
import torch

from morphgraph.errors import ArgumentError, FileError, MorphError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, load, write_atomically
from morphgraph.options import METHODS, Method
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.checking.fixing import require_fixed
from morphgraph.passes.lift import lift
from morphgraph.recipes.data import Dataset
from morphgraph.recipes.folder import make_folder, manifest_of
from morphgraph.recipes.results import Result
from morphgraph.recipes.run import require_classes
from morphgraph.recipes.settings import Settings
from morphgraph.recipes.workers import Job, Task, on_ray, on_this_machine
from morphgraph.train import distributed

ROWS = "rows.jsonl"


class Row(msgspec.Struct, frozen=True):
    """The result of one run.

    ``method``, ``budget``, ``cost`` (what the regularizer counted) and ``seed`` are what was asked.
    ``accuracy`` on the test images (0 to 1); ``costs`` counted on the file that was written, at
    least ``flops`` and ``params``, and ``shares`` of the original's; ``epochs`` trained.
    """

    key: str
    method: Method
    budget: dict[str, str]
    cost: str
    seed: int
    accuracy: float
    costs: dict[str, float]
    shares: dict[str, float]
    epochs: int
    folder: str

    def order(self) -> tuple[str, ...]:
        """The key that rows are sorted by."""
        return self.method, str(self.budget), self.cost, f"{self.seed:09}", self.key


def grid(
    settings: Settings,
    budgets: Mapping[str, Sequence[str]],
    methods: Sequence[Method] = ("morph", "uniform"),
    seeds: Sequence[int] = (0, 1, 2),
    costs: Sequence[str] = (),
) -> list[Settings]:
    """The runs of a sweep.

    Args:
        settings: what they have in common; budget, cost, method and seed are replaced.
        budgets: per cost the amounts or shares, each of which is one budget.
        methods: see :data:`~morphgraph.options.METHODS`.
        seeds: of every point.
        costs: what the regularizer counts; for every budget its own cost if not given. Methods
            without a regularizer are not repeated.

    >>> from morphgraph.train.config import SearchConfig
    >>> from morphgraph.recipes.trainer import Recipe
    >>> common = Settings(SearchConfig({"flops": "100%"}), Recipe(1), Recipe(1))
    >>> len(grid(common, {"flops": ["25%", "50%"]}, ["morph", "uniform", "base"], range(3)))
    15

    Raises:
        ArgumentError: there is no such method, or nothing to do.
    """
    for method in methods:
        if method not in METHODS:
            raise ArgumentError(f"method '{method}' is unknown; use {', '.join(METHODS)}")
    runs: dict[str, Settings] = {}
    for unit, amounts in budgets.items():
        for amount, method in product(amounts, methods):
            budget, counted = {unit: amount}, tuple(costs) if costs else (unit,)
            if method == "base":  # the same at every budget: one of them stands for all
                first = next(iter(budgets))
                budget, counted = {first: "100%"}, (first,)
            elif method != "morph":
                counted = (unit,)
            for counted_cost, seed in product(counted, seeds):
                aim = replace(settings.aim, budget=budget, cost=counted_cost)
                one = replace(settings, aim=aim, method=method, seed=seed, baselines=())
                runs[_text(one)] = one
    if not runs:
        raise ArgumentError("the sweep is empty; give at least one budget, method and seed")
    return list(runs.values())


def sweep(
    graph: ChannelGraph,
    dataset: Dataset,
    runs: Sequence[Settings],
    folder: Path,
    *,
    jobs: int = 1,
    ray: str | None = None,
    ops: Sequence[str] = (),
    on_row: Callable[[Row, int, int], None] | None = None,
) -> list[Row]:
    """Do runs that are not done yet; returns the rows of all of them, in their order.

    Processes are started anew, so a script that calls this must have its own work under ``if
    __name__ == "__main__":``.

    Args:
        graph: the lifted model.
        dataset: images of the model's size and channels.
        runs: see :func:`grid`.
        folder: made if missing.
        jobs: processes on this machine, each with one thread.
        ray: address of a Ray cluster, or ``"local"``; see
            :func:`~morphgraph.recipes.workers.on_ray`.
        ops: Python files that teach operators; each process runs them.
        on_row: called for each row that was missing, with how many runs are done and how many
            there are.

    Raises:
        ArgumentError: a setting makes no sense, or ``torchrun`` has started this.
        BudgetError: a budget cannot be met.
        FileError: the folder cannot be written, or holds something else.
        UnsupportedError: a run has failed (the others are done first), or a process was killed.
        VerificationError: the model computes something else than its file does for the values
            that inputs are fixed to.
    """
    if distributed.size() > 1:
        raise ArgumentError("a sweep starts its own processes; start it without torchrun")
    require_classes(graph, dataset)
    for settings in runs:
        settings.aim.check(graph)
    require_fixed(graph)  # its processes are given the network alone
    make_folder(folder)
    keys = _keys(graph, dataset, runs)
    known = _read(folder / ROWS)
    todo = {
        key: Job(settings, str((folder / _name(settings, key)).absolute()))
        for key, settings in keys.items()
        if key not in known
    }
    task = Task.of(graph, dataset, tuple(ops))
    done = on_this_machine(task, todo, jobs) if ray is None else on_ray(task, todo, ray, jobs)
    failed: list[MorphError] = []
    for key, outcome in done:
        if isinstance(outcome, MorphError):
            failed.append(type(outcome)(f"{Path(todo[key].folder).name}: {outcome}"))
            continue
        known[key] = row = _row(graph, key, todo[key], outcome)
        _append(folder / ROWS, row)
        if on_row is not None:
            on_row(row, sum(key in known for key in keys), len(keys))
    _write(folder / ROWS, sorted(known.values(), key=Row.order))
    if failed:
        raise failed[0]
    return [known[key] for key in keys]


def _text(settings: Settings) -> str:
    return json.dumps(asdict(settings), sort_keys=True)


def _keys(graph: ChannelGraph, dataset: Dataset, runs: Sequence[Settings]) -> dict[str, Settings]:
    manifest = manifest_of(graph, dataset, {}, torch.device("cpu"))
    common = json.dumps([manifest["model"], manifest["data"]], sort_keys=True)
    return {
        hashlib.sha256((common + _text(settings)).encode()).hexdigest()[:16]: settings
        for settings in runs
    }


def _name(settings: Settings, key: str) -> str:
    """A name for a run's folder that a person can read, and that is no other run's."""
    ((unit, amount),) = settings.aim.budget.items()
    counted = [settings.aim.regularized] if settings.aim.regularized != unit else []
    words = [settings.method, f"{unit}-{amount}", *counted, f"seed{settings.seed}", key[:8]]
    return "-".join(re.sub(r"[^\w.]+", "-", str(word)).strip("-") for word in words)


def _row(graph: ChannelGraph, key: str, job: Job, result: Result) -> Row:
    """A run's row; costs are counted on the network that it has written."""
    settings = job.settings
    arm = result.arms.get("slim") or next(iter(result.arms.values()))
    trained = lift(load(Path(job.folder) / arm.file), **graph.options.arguments())
    units = dict.fromkeys(["flops", "params", *settings.aim.budget, settings.aim.regularized])
    costs = {unit: cost(trained, unit).total for unit in units}
    return Row(
        key=key,
        method=settings.method,
        budget={unit: str(amount) for unit, amount in settings.aim.budget.items()},
        cost=settings.aim.regularized,
        seed=settings.seed,
        accuracy=arm.accuracy,
        costs=costs,
        shares={unit: value / cost(graph, unit).total for unit, value in costs.items()},
        epochs=arm.epochs,
        folder=Path(job.folder).name,
    )


def _read(path: Path) -> dict[str, Row]:
    """The rows of a file by their keys, up to a line that was cut short, which is dropped.

    Raises:
        FileError: a line is no row.
    """
    if not path.exists():
        return {}
    whole, _, cut = path.read_bytes().rpartition(b"\n")
    rows: dict[str, Row] = {}
    for line_number, line in enumerate(whole.splitlines(), 1):
        try:
            row = msgspec.json.decode(line, type=Row)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise FileError(
                f"{escape(str(path))}: line {line_number} is no row of a sweep ({error}); give "
                "another folder, or remove the line"
            ) from None
        rows[row.key] = row
    if cut:
        _write(path, list(rows.values()))
    return rows


def _append(path: Path, row: Row) -> None:
    """Add a row by one write, which is on the disk when this returns."""
    with path.open("ab", buffering=0) as file:
        file.write(msgspec.json.encode(row) + b"\n")
        os.fsync(file.fileno())


def _write(path: Path, rows: Sequence[Row]) -> None:
    content = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    write_atomically(path, content, overwrite=True)
