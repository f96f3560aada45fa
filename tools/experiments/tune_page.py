"""The page ``docs/from-trained.md``: a table for each network and budget, from rows."""

import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from arms import standard_error
from tune_rows import BUDGETS, FAMILY, NETWORKS, Row

OURS = "from trained"
ARMS = (
    OURS,
    FAMILY,
    "shrink + tuning",
    "l2 + tuning",
    "width multiplier",
    "Torch-Pruning, Taylor",
    "Torch-Pruning, group norm",
    "onnxsim + tuning",
)

HEAD = """# From a trained network

{made}

Networks are trained on CIFAR-10 (averaged to 16x16 pixels; figures are not comparable with
published ones) for 15 epochs, and then brought to a part of their FLOPs with 4 more. All arms of
a seed have the same 19 epochs over the same images. The 4 epochs are SGD with Nesterov momentum
0.9, batch 128, peak rate 0.03, 15 % warm-up, then linearly to 0, weight decay 5e-4 on kernels,
random crops and flips, in all arms; bfloat16 but for the MobileNet and the ViT. FLOPs are counted
by this program in what came out. Figures are test accuracies in percent, means over seeds with
their standard errors. *ahead* is how far `from trained` is above the arm, seed by seed.

- `from trained`: `mg.morph(start="trained", data=...)` with its defaults, 1,000 training images
  as `data`.
- `family`: `mg.family` for both budgets at once, each network tuned for 4 epochs.
- `shrink + tuning`: `mg.shrink` with the same images, then tuned with the labels alone.
- `l2 + tuning`: the channels of the smallest kernels go, then the same tuning.
- `width multiplier`: new weights, trained for all 19 epochs at the rate of the original's
  training.
- `Torch-Pruning, Taylor`: first-order importance of the 1,000 images, over all layers, then the
  same tuning. `group norm`: its group-norm pruner, whose regularizer takes 2 of the 4 epochs.
- `onnxsim + tuning`: its calibrated pruning, one ratio for all layers. It folds BatchNorm, so
  that the tuning has none.
"""


def write(rows: Sequence[Row], path: Path, findings: Path) -> None:
    """Write the page; ``findings`` is what people have read from the tables, in Markdown."""
    parts = [HEAD.format(made=_made(rows))]
    if findings.exists():
        parts.append("\n" + findings.read_text())
    parts += [table for network in NETWORKS for table in _tables(network, rows)]
    path.write_text("".join(parts))
    print(f"{path}: {len(rows)} rows")


def _made(rows: Sequence[Row]) -> str:
    days = sorted({row["day"] for row in rows}) or [""]
    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, number in row["versions"].items():
            versions.setdefault(name, {})[number] = None
    hours = sum(row.get("cpu_seconds", 0) for row in rows) / 3600
    told = (
        f"Made by `make experiments-trained DATA=cifar10_16px.npz` from rows of {days[0]} to "
        f"{days[-1]}, on {' and '.join(dict.fromkeys(row['machine'] for row in rows))}; "
        + ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
        + ". Every row is in [from-trained.jsonl](from-trained.jsonl). Missing "
        f"ones are computed. They took {hours:.1f} hours of the processor, without that of "
        "the originals."
    )
    return textwrap.fill(told, 100, break_long_words=False, break_on_hyphens=False)


def _tables(network: str, rows: Sequence[Row]) -> Iterator[str]:
    for budget in BUDGETS:
        chosen = [row for row in rows if (row["network"], row["budget"]) == (network, budget)]
        by_arm = {arm: {r["seed"]: r for r in chosen if r["arm"] == arm} for arm in ARMS}
        if any(by_arm.values()):
            yield f"\n## {network} at {budget} % of its FLOPs\n\n"
            yield "| arm | seeds | accuracy | ahead | FLOPs % | parameters % | CPU s |\n"
            yield "|---|---:|---:|---:|---:|---:|---:|\n"
            yield from _lines(by_arm)


def _lines(by_arm: dict[str, dict[int, Row]]) -> Iterator[str]:
    ours = _accuracies(by_arm[OURS])
    original = {s: 100 * r["original"] for a in by_arm.values() for s, r in a.items() if _ran(r)}
    yield _line("original", original, ours)
    for arm, found in by_arm.items():
        ran = [row for row in found.values() if _ran(row)]
        if ran:
            means = [
                statistics.mean(100 * row["share"]["flops"] for row in ran),
                statistics.mean(100 * row["share"]["params"] for row in ran),
            ]
            seconds = statistics.mean(row["cpu_seconds"] for row in ran)
            more = [*(f"{mean:.1f}" for mean in means), f"{seconds:.0f}"]
            yield _line(f"`{arm}`", _accuracies(found), {} if arm == OURS else ours, more)
        elif found:
            told = next(iter(found.values()))["cannot"]
            yield f"| `{arm}` | | {told} | | | | |\n"


def _line(
    name: str, numbers: dict[int, float], ours: dict[int, float], more: Sequence[str] = ("", "", "")
) -> str:
    ahead = [ours[seed] - number for seed, number in numbers.items() if seed in ours]
    cells = [
        name,
        str(len(numbers)),
        _mean(list(numbers.values())),
        _mean(ahead, "+") if ahead else "",
        *more,
    ]
    return f"| {' | '.join(cells)} |\n"


def _ran(row: Row) -> bool:
    return "accuracy" in row


def _accuracies(found: dict[int, Row]) -> dict[int, float]:
    return {seed: 100 * row["accuracy"] for seed, row in found.items() if _ran(row)}


def _mean(numbers: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(numbers):{sign}.2f}"
    error = standard_error(list(numbers))
    return mean if math.isnan(error) else f"{mean} ± {error:.2f}"
