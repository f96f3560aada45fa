"""The findings as a page of Markdown."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from findings import BUDGET, FELT, TOLERANCE, Findings

HEADER = """# Coverage: {title}

`{command}`, {date}. {versions}. One process and one thread per network, {machine}

Networks are built with random weights (`morphgraph.testing.randomize_weights`: biases, scales,
running statistics random, layers evened out), or come from others with their own; exported,
lifted, planned at {budget:.0%} of their FLOPs with random scores (at the lowest reachable, where
that is more), resized, and held against the original with the removed channels masked. Errors are
shares of the scale of the output that is furthest off; {tolerance:.0e} passes.

- **export**: by way of torch.export (dynamo) or TorchScript, or the file's own; its error against
  PyTorch in float64. **opaque**: operators without a description.
- **MMACs**: multiply-adds of one sample; `=` where torch's counter finds the same, `-` where it
  cannot count (recurrent layers, files).
- **shrinkable**: 1 - (MACs in cost terms of which no factor belongs to a resizable group) / MACs.
  **lowest**: MACs with every resizable group at width 1. **planned**: where the plan lands.
- **error**: resized against masked. **felt**: masked against original; more than {felt:.0e} passes.
  **wrong**: planted wrong slices that were rejected, one for each axis of three kernels; kernels
  that make no difference to the outputs are left out.
- **torch**: `to_torch` against ONNX Runtime, base / resized; in brackets what PyTorch itself loses
  in float32 against float64. `*`: PyTorch computed in float64, since its float32 was further off.
  **grad**: whether every parameter of both has a gradient, but for those that the network froze.
- **s**: seconds to export / lift, group, cost and resize / verify.

| network | export | opaque | MMACs | groups | shrinkable | lowest | planned | error | felt \
| wrong | torch | grad | s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""

#: Stages whose seconds count as lift, group, cost and resize.
COMPILE = ("lift", "cost", "resize")


def report(
    title: str,
    command: str,
    date: str,
    versions: Mapping[str, str],
    machine: str,
    rows: Sequence[Findings],
) -> str:
    """The whole page."""
    header = HEADER.format(
        title=title,
        command=command,
        date=date,
        versions=", ".join(f"{tool} {number}" for tool, number in versions.items()),
        machine=machine,
        budget=BUDGET,
        tolerance=TOLERANCE,
        felt=FELT,
    )
    return header + "\n".join([*map(row, rows), *summary(rows), *reasons(rows), ""])


def row(f: Findings) -> str:
    """One line of the table."""
    if not f.route:
        return f"| {f.name} | **no** |" + " |" * 12
    counted = "=" if f.macs == f.torch_macs else "-" if f.torch_macs != f.torch_macs else "!"
    planted = f"{f.planted - len(f.passed_wrongly)} of {f.planted}" if f.planted else ""
    returned = " / ".join(
        f"{error:.0e}{'*' * (which in f.in_float64)}" for which, error in f.torch_errors.items()
    )
    seconds = (f.seconds.get("export", 0.0), compile_seconds(f), f.seconds.get("verify", 0.0))
    cells = [
        f.name,
        f.route if f.structure_only else f"{f.route} {_number(f.export_error, '.0e')}",
        ", ".join(f"{op.split(':')[0]} ({count})" for op, count in f.opaque.items()),
        f"{_number(f.macs / 1e6, '.3f')} {counted}" if f.lifted else "**not lifted**",
        f"{f.resizable} of {f.groups}" if f.lifted else "",
        _number(f.shrinkable, ".1%"),
        _number(f.lowest, ".1%"),
        _number(f.ratio, ".2%"),
        "not run" if f.structure_only else _number(f.error, ".0e"),
        _number(f.felt, ".2f"),
        planted,
        returned + (f" ({f.rounding:.0e})" if f.rounding == f.rounding else ""),
        ("yes" if f.trainable else "**no**") if f.torch_errors else "",
        " / ".join(f"{s:.2f}" for s in seconds),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float, spec: str) -> str:
    """A number, or nothing where it was not found."""
    return format(value, spec) if value == value else ""


def compile_seconds(f: Findings) -> float:
    """To lift, group, cost and resize."""
    return sum(f.seconds.get(stage, 0.0) for stage in COMPILE)


def summary(rows: Sequence[Findings]) -> list[str]:
    """How many rows are as wanted, medians, and the worst."""
    verified = [f for f in rows if not f.structure_only]

    def count(of: Sequence[Findings], holds: Callable[[Findings], bool]) -> str:
        number = sum(map(holds, of))
        return f"{number} of {len(of)} ({number / len(of):.1%})" if of else "none"

    lines = [
        "",
        "## Summary",
        "",
        f"- exported: {count(rows, lambda f: f.exported)}; "
        f"lifted: {count(rows, lambda f: f.lifted)}",
        f"- resized and equal: {count(verified, lambda f: f.resized)}; "
        f"wrong: {sum(f.wrong for f in rows)}; silently unshrunk: {sum(f.unshrunk for f in rows)}",
        f"- `to_torch` exact: {count(verified, lambda f: f.returns)}; "
        f"exact and trainable: {count(verified, lambda f: f.returns and f.trainable)}",
        f"- all of that: {count(rows, lambda f: f.holds)}; "
        f"without a word below: {count(rows, lambda f: not f.shortfalls)}",
    ]
    for family in ("cnn", "transformer", "recurrent", "other"):
        lines += _extremes(
            f"share of the MACs that can shrink, {family}",
            {f.name: f.shrinkable for f in rows if f.family == family},
            ".1%",
            min,
        )
    times = {f.name: compile_seconds(f) for f in rows if f.lifted}
    lines += _extremes("seconds to lift, group, cost and resize", times, ".2f", max)
    lines += _extremes("error", {f.name: f.error for f in rows}, ".1e", max)
    return lines


def _extremes(
    what: str, values: Mapping[str, float], spec: str, worst: Callable[..., str]
) -> list[str]:
    known = {name: value for name, value in values.items() if value == value}
    if not known:
        return []
    name = worst(known, key=known.__getitem__)
    median = statistics.median(known.values())
    return [f"- {what}: median {median:{spec}}, worst {known[name]:{spec}} ({name})"]


def reasons(rows: Sequence[Findings]) -> list[str]:
    """What falls short of what is wanted, and what keeps its size."""
    lines = ["", "## What falls short, and why", ""]
    short = [f"- **{f.name}**: {'; '.join(f.shortfalls)}." for f in rows if f.shortfalls]
    lines += short or ["Nothing."]
    lines += [
        "",
        "## What keeps its size",
        "",
        "Shares of the MACs, by the reason of the group.",
        "",
    ]
    lines += [f"- **{f.name}**: {f.bound_by}." for f in rows if f.binding]
    return lines
