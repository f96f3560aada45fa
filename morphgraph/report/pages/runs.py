"""The facts of a report page on a run: its networks, and how the training went."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from morphgraph.errors import FileError
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.reading import from_json, read_bounded
from morphgraph.recipes.results import Result
from morphgraph.report.pages.facts import Curve, CurvePoint, Epoch, Facts, GroupStrengths
from morphgraph.report.pages.gather import Resized, made_by, resized_facts
from morphgraph.report.runs import NAMES, arms_table, budget_text
from morphgraph.report.tables import percent


def run_result(folder: Path) -> Result:
    """The result of a finished run.

    Raises:
        FileError: the folder holds none.
    """
    path = folder / "result.json"
    if not path.exists():
        raise FileError(
            f"{escape(str(path))}: there is no such file; a report is made of a finished run "
            "(`morphgraph morph ... --resume` goes on with one)"
        )
    return Result.from_json(read_bounded(path, FileError), str(path))


def chosen_arm(result: Result) -> str:
    """The network that a page of a run is about: the smallest that it made by learning."""
    if result.family:
        return result.family[-1].name
    return next((name for name in ("slim", *reversed(result.arms)) if name in result.arms), "base")


def run_facts(folder: Path, result: Result, resized: Resized) -> Facts:
    """The facts of a run: those of its network, and how it came about."""
    events = _events(folder / "events.jsonl")
    name = chosen_arm(result)
    seconds = result.seconds
    made = [
        ("data", f"{result.data}, seed {result.seed}"),
        ("budget", budget_text(result.budget)),
        ("took", f"{seconds:.0f} s"),
        *made_by(resized),
    ]
    return resized_facts(
        resized,
        title=f"{folder.name}: {budget_text(result.budget)} on {result.data}",
        curve=_run_curve(result, name),
        epochs=_epochs(events),
        strengths=_strengths(folder, result),
        tables=[replace(arms_table(result), title="Networks of the run")],
        made=made,
    )


def arm_quality(result: Result, name: str) -> list[tuple[str, str, str]]:
    """The accuracy of the original and of another network of a run."""
    base = result.arms.get("base")
    if base is None or name == "base":
        return []
    return [("test accuracy", percent(base.accuracy), percent(result.arms[name].accuracy))]


def _title(name: str) -> str:
    return NAMES.get(name, name)


def _run_curve(result: Result, chosen: str) -> Curve | None:
    base = next(iter(result.arms.values()))
    family = {member.name for member in result.family}
    points = [
        CurvePoint(
            series=_title("slim") if name in family else _title(name),
            share=arm.macs / base.macs,
            value=arm.accuracy,
            label=_title(name),
        )
        for name, arm in result.arms.items()
        if base.macs
    ]
    return Curve("MACs", "test accuracy", points, _title(chosen)) if points[1:] else None


def _events(path: Path) -> list[Mapping[str, Any]]:
    """The events of a run; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    found: list[Mapping[str, Any]] = []
    for line in read_bounded(path, FileError).splitlines():
        try:
            found.append(from_json(line, dict[str, Any]))
        except ValueError:
            continue
    return found


def _epochs(events: Sequence[Mapping[str, Any]]) -> list[Epoch]:
    by_place: dict[tuple[str, int], Epoch] = {}
    for event in events:
        if event.get("event") == "epoch":  # an epoch that was done again after a stop counts once
            key = event["phase"], event["number"]
            by_place[key] = Epoch(*key, event["loss"], event["live_share"], event["weight"])
    return list(by_place.values())


def _strengths(folder: Path, result: Result) -> list[GroupStrengths]:
    """The strengths at the end of the last shrink phase; older runs kept none."""
    if not result.iterations:
        return []
    path = folder / Path(result.iterations[-1].plan).with_name("strengths.json")
    if not path.is_file():
        return []
    try:
        return from_json(read_bounded(path, FileError), list[GroupStrengths])
    except ValueError as error:
        raise FileError(f"{escape(str(path))}: is no list of strengths ({error})") from None
