"""The page ``docs/experiments.md``: a table for each question, from rows."""

import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from arms import Arm, Row, Study, standard_error
from pictures import before_and_after, curves
from questions import Question

from morphgraph.train.config import SHRINK_TO

HEAD = """# Experiments

Made by `{command}` from the rows of {first} to {last}, on {machine}; Python {python},
torch {torch}, torch-pruning {pruning}. Every row is in [experiments.jsonl](experiments.jsonl);
`make experiments` computes those that are missing there. Seconds are wall time of one thread beside
whatever else the machine did, with the phase that shrinks counted once, in the first arm that needs
it; all rows together took {hours:.1f} hours, two processes half of that.

Every arm is trained by one recipe: SGD with Nesterov momentum 0.9, batch 128, peak rate 0.1 (0.02
for the ViT), 15 % warm-up, then linearly to 0, weight decay 5e-4 on kernels,
random crops, and flips for photographs; bfloat16 but for the MobileNets and the ViT. *Epochs* are
those of this training, which starts from new weights, over the same batches in all arms of a seed,
unless a row says `weights=keep`. MorphNet's arms have learned their structure before in a phase of
its own (*n+m* epochs: n for the training, m for that phase), at a constant rate. `bn`
(Torch-Pruning's BN-scale pruner, network slimming) and `l2` (magnitude) have theirs from the seed
network trained for n epochs. Every arm's widths are filled up to its budget by the same rule.
*gain* is in points over the arm named there, seed by seed, with its standard error.

*live* is the share of the cost that the phase itself came to, before the plan trims it to the
{share} that were asked for and the widths are scaled. Test accuracies are those after the last
epoch. CIFAR-10 is averaged to 16x16 pixels: figures are not comparable with published ones.

All arms end at {lowest:.1f} to {highest:.2f} % of their budgets. After the phases that a controller
led, the plan had at most {trimmed:.2f} % of the seed's cost to trim, on average {typical:.2f} %.
"""


BEGIN, END = "<!-- written by make experiments -->", "<!-- end -->"


def write(
    questions: Iterable[Question],
    rows: Sequence[Row],
    path: Path,
    command: str,
    findings: Path | None = None,
) -> None:
    """Write the page; studies without rows are named as missing.

    ``findings`` is what people have read from the tables, in Markdown.
    """
    days = sorted({row.get("day", "") for row in rows}) or [""]
    parts = [
        HEAD.format(
            command=command,
            share=f"{100 * SHRINK_TO:g} %",
            first=days[0],
            last=days[-1],
            machine=_machine(),
            python=platform.python_version(),
            torch=version("torch"),
            pruning=version("torch-pruning"),
            hours=sum(row["seconds"] for row in rows) / 3600,
            **_budgets_met(rows),
        )
    ]
    if findings is not None:
        parts.append(findings.read_text())
    known = {row["key"]: row for row in rows}
    for number, question in enumerate(questions, 1):
        parts.append(f"\n## {number}. {question.title}\n\n{question.text}\n")
        for studies in _by_title(question.studies):
            folder, name = path.with_suffix(""), f"{number} {studies[0].title}"
            parts.append(_table(studies, known))
            parts.append(curves(studies, known, folder, name))
            parts.append(before_and_after(studies, known, folder, name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts))
    print(f"{path}: {len(rows)} rows")


def _budgets_met(rows: Iterable[Row]) -> dict[str, float]:
    """How near to their budgets the arms end, and what was trimmed for that, in percent."""
    shares = {"flops": "macs_share", "params": "params_share"}
    met = [
        100 * 100 * row[shares[row["cost"]]] / row["budget"]
        for row in rows
        if row["method"] != "seed"
    ]
    trimmed = [100 * row["trimmed"] for row in rows if row["method"] == "morph"]
    return {
        "lowest": min(met, default=math.nan),
        "highest": max(met, default=math.nan),
        "trimmed": max(trimmed, default=math.nan),
        "typical": statistics.fmean(trimmed) if trimmed else math.nan,
    }


def _by_title(studies: Iterable[Study]) -> list[list[Study]]:
    found: dict[str, list[Study]] = {}
    for study in studies:
        found.setdefault(study.title, []).append(study)
    return list(found.values())


def _table(studies: Sequence[Study], known: dict[str, Row]) -> str:
    """One network on one dataset: a line per arm, over the seeds that there are."""
    if not any(study.key(arm) in known for study in studies for arm in study.arms):
        return ""
    lines = [
        f"\n### {studies[0].network}, {Path(studies[0].data).stem}, "
        f"{studies[0].epochs}+{studies[0].shrink_epochs} epochs\n\n",
        "| arm | seeds | accuracy % | FLOPs % | parameters % | gain | over | live % | seconds |\n",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|\n",
    ]
    missing = 0
    for arm in studies[0].arms:
        rows = {s.seed: known[s.key(arm)] for s in studies if s.key(arm) in known}
        missing += sum(arm in study.arms for study in studies) - len(rows)
        if not rows:
            continue
        lines.append(_line(arm.name, rows, _rival(studies, arm, known)))
    if missing:
        lines.append(f"\n{missing} rows of this table are missing.\n")
    widths = _widths(studies, known)
    return "".join([*lines, "\n", widths])


def _rival(studies: Sequence[Study], arm: Arm, known: dict[str, Row]) -> tuple[str, dict[int, Row]]:
    """What an arm is measured against: the multiplier at the same cost, at 100 % the seed."""
    if arm.method == "seed" or (arm.method == "uniform" and arm.budget < 100):
        return "", {}
    for other in studies[0].arms:
        at_whole = arm.budget == 100 and other.method == "seed"
        same = other.method == "uniform" and (other.budget, other.cost) == (arm.budget, arm.cost)
        if (at_whole or same) and other.extra_epochs == arm.extra_epochs:
            rows = {s.seed: known[s.key(other)] for s in studies if s.key(other) in known}
            return other.name, rows
    return "", {}


def _line(name: str, rows: dict[int, Row], rival: tuple[str, dict[int, Row]]) -> str:
    over, others = rival
    both = [seed for seed in rows if seed in others]
    gains = [100 * (rows[s]["accuracy"] - others[s]["accuracy"]) for s in both]
    live = [100 * row["live"] for row in rows.values() if "live" in row]
    cells = [
        name,
        str(len(rows)),
        _mean([100 * row["accuracy"] for row in rows.values()]),
        f"{statistics.mean(100 * row['macs_share'] for row in rows.values()):.2f}",
        f"{statistics.mean(100 * row['params_share'] for row in rows.values()):.1f}",
        _mean(gains, "+") if gains else "",
        over if gains else "",
        f"{statistics.mean(live):.1f}" if live else "",
        f"{statistics.mean(row['seconds'] for row in rows.values()):.0f}",
    ]
    return "| " + " | ".join(cells) + " |\n"


def _mean(numbers: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(numbers):{sign}.2f}"
    return mean if len(numbers) < 2 else f"{mean} ± {standard_error(list(numbers)):.2f}"


def _widths(studies: Sequence[Study], known: dict[str, Row]) -> str:
    """The widths of the learned structures, of the first seed."""
    lines = []
    for arm in studies[0].arms:
        row = known.get(studies[0].key(arm))
        if row and arm.method in ("seed", "morph", "bn") and len(row["widths"]) <= 16:
            numbers = " ".join(str(width) for width in row["widths"].values())
            lines.append(f"- {arm.name}: {numbers}\n")
    return ("Widths, seed 0:\n\n" + "".join(lines)) if lines else ""


def _machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


def write_summary(question: Question, rows: Sequence[Row], path: Path) -> None:
    """Put the first question's answer, in short, between the two marks of a page."""
    known = {row["key"]: row for row in rows}
    budgets = (100.0, 50.0, 25.0)
    heads = "".join(f" at {budget:g} % of the FLOPs |" for budget in budgets)
    lines = [
        f"| network, data |{heads} parameters |\n",
        "|---|" + "---:|" * (len(budgets) + 1) + "\n",
    ]
    for studies in _by_title(question.studies):
        cells = [_gain(studies, budget, known) for budget in budgets]
        if any(cells):
            data = Path(studies[0].data).stem.replace("_", " ")
            whole = [s.key(Arm("morph")) for s in studies if s.key(Arm("morph")) in known]
            params = [100 * known[key]["params_share"] for key in whole]
            cells.append(f"{statistics.mean(params):.0f} %" if params else "")
            lines.append(f"| {' | '.join([f'{studies[0].network}, {data}', *cells])} |\n")
    text = path.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text("".join([before, BEGIN, "\n", *lines, END, after]))


def _gain(studies: Sequence[Study], budget: float, known: dict[str, Row]) -> str:
    """The accuracy at a budget, and the gain over the multiplier; nothing before three seeds."""
    arm = Arm("morph", budget)
    if arm not in studies[0].arms:
        return ""
    _, others = _rival(studies, arm, known)
    own = {s.seed: known[s.key(arm)] for s in studies if s.key(arm) in known}
    both = [seed for seed in own if seed in others]
    if len(both) < 3:
        return ""
    accuracy = statistics.mean(100 * own[seed]["accuracy"] for seed in both)
    gains = [100 * (own[seed]["accuracy"] - others[seed]["accuracy"]) for seed in both]
    return f"{accuracy:.1f} ({_mean(gains, '+')}, n={len(both)})"
