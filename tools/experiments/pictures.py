"""Pictures of the page: accuracy against cost, and networks before and after."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import Arm, Row, Study
from bench import seed_graph
from graphs import Drawing, picture

from morphgraph.onnx_io import write_atomically
from morphgraph.recipes import sweep
from morphgraph.recipes.data import load_data
from morphgraph.report.curves import curves_svg


def curves(studies: Sequence[Study], known: dict[str, Row], folder: Path, name: str) -> str:
    """Accuracy against both costs, where there are three budgets at least; Markdown, or ''."""
    plain = [arm for arm in studies[0].arms if _plain(arm)]
    costs = dict.fromkeys(arm.cost for arm in plain)
    rows = [
        _point(arm, cost, known[study.key(arm)])
        for study in studies
        for arm in plain
        if study.key(arm) in known
        for cost in (costs if arm.method == "seed" else [arm.cost])
    ]
    if len({str(row.budget) for row in rows}) < 3:
        return ""
    title = f"{studies[0].network}, {Path(studies[0].data).stem.replace('_', ' ')}"
    return _written(curves_svg(rows, title), folder, name, "Accuracy against cost")


def _plain(arm: Arm) -> bool:
    """Whether only budget, cost and target tell it from others of its method."""
    return arm == Arm(arm.method, arm.budget, arm.cost, arm.target)


def _point(arm: Arm, cost: str, row: Row) -> sweep.Row:
    """The row as one of a sweep; the seed network is the multiplier at 1, whatever is budgeted."""
    method: Any = "uniform" if arm.method == "seed" else arm.method
    return sweep.Row(
        key=row["key"],
        method=method,
        budget={cost: f"{arm.budget:g}%"},
        cost=arm.target or cost,
        seed=row["seed"],
        accuracy=row["accuracy"],
        costs={"flops": 2 * row["macs"], "params": row["params"]},
        shares={"flops": row["macs_share"], "params": row["params_share"]},
        epochs=row["epochs"],
        folder="",
    )


def before_and_after(
    studies: Sequence[Study], known: dict[str, Row], folder: Path, name: str
) -> str:
    """The seed network and what became of it, seed 0; Markdown, or ''."""
    first = studies[0]
    found = {
        f"{arm.name}, seed {first.seed}": Drawing(**known[first.key(arm)]["drawing"])
        for arm in first.arms
        if "drawing" in known.get(first.key(arm), {})
    }
    if not found:
        return ""
    graph = seed_graph(first, load_data(first.data))
    return _written(picture(graph, found), folder, name, "The network before and after")


def _written(svg: str, folder: Path, name: str, told: str) -> str:
    path = folder / (re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + ".svg")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, svg, overwrite=True)
    return f"\n![{told}]({folder.name}/{path.name})\n"
