"""What a command would do: the answer to ``--dry-run``."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost, is_known_here
from morphgraph.plans import Change, Plan
from morphgraph.report.analysis import path_text
from morphgraph.report.tables import Cell, Report, Table, change, columns
from morphgraph.version import __version__

SCHEMA_VERSION = 1


class Intention(msgspec.Struct, frozen=True):
    """What a command would do; ``cost`` is what is known of its result's before it is made.

    ``writes`` are files and folders, ``replaces`` those of them that exist.
    """

    command: str
    steps: list[str]
    writes: list[str]
    replaces: list[str]
    cost: dict[str, Change]
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__


def intention(
    command: str,
    steps: Sequence[str],
    files: Iterable[Path | None],
    costs: Mapping[str, Change] | None = None,
) -> Report:
    """A report of what a command would do.

    Args:
        command: its name.
        steps: what it would do, one line each.
        files: that it would write, as far as they were asked for.
        costs: before and after, as far as they are known.
    """
    paths = [path for path in files if path is not None]
    told = Intention(
        command=command,
        steps=list(steps),
        writes=[path_text(path) for path in paths],
        replaces=[path_text(path) for path in paths if path.exists()],
        cost=dict(costs or {}),
    )
    rows: list[list[Cell]] = [["would", step] for step in steps]
    rows += [[kind, change(each.before, each.after)] for kind, each in told.cost.items()]
    for path in paths:
        rows.append(["would replace" if path.exists() else "would write", str(path)])
    table = Table(columns("what", "which"), rows)
    return Report(told, [table], foot=["nothing was done (--dry-run)"])


def costs_of(graph: ChannelGraph, plan: Plan) -> dict[str, Change]:
    """The costs that people ask about and those of the plan's budgets, before and after."""
    widths, convention = plan.widths(graph), plan.convention
    found = {}
    for kind in dict.fromkeys(["macs", "flops", "params", "weight_bytes", *plan.cost]):
        if not is_known_here(kind):
            found[kind] = plan.cost[kind]
            continue
        each = cost(graph, kind, convention=convention)
        found[kind] = Change(each.total, each.at(widths))
    return found
