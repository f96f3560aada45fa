"""The parts of the page about files of others, small models and peers."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from file_findings import OF_NOISE, SIZE_BYTES, SIZE_SLACK, TREATED, DecoderFindings, FileFindings
from findings import BUDGET, TOLERANCE
from peers import LIMIT_S, PeerFindings
from small_models import SmallFindings

FILES = """
## Files of others

{count} ONNX files from packages for Python (`tools/zoo/packages.txt` has their versions), as they
are, and again after ONNX Runtime's optimizer at the extended level, after its static (QDQ) and its
dynamic quantization, and in float16 (`onnxruntime.transformers.float16`). Each is read as it is,
planned at {budget:.0%} of its FLOPs with random scores, resized, saved, and run. Of silero-vad,
whose `sr` chooses between two networks, that input is fixed (`--fix sr=16000`).

- **error**: resized against masked, computed in single precision; **rounding**: the masked model
  against itself with inputs moved by 1e-6 (by 1e-3 where the file quantizes or is in half
  precision) and after ONNX Runtime's optimizations. An error above {tolerance:.0e} and
  {of_noise:g} times the rounding is **wrong**. **apply**: whether `mg.apply`, which checks,
  calls the result right.
- **bytes**: the file saved against the file that came. **allowed**: the same less what was cut
  from its own tensors. **Larger** is what exceeds that by more than {slack:.0%} and {bytes} KiB, as
  where shared weights are stored twice.
"""

COUNTS = """
| treatment | made, run | lifted | resized, equal, called so | nothing can shrink | wrong | larger |
|---|---:|---:|---:|---:|---:|---:|
"""

ROWS = """
| file | written by | opaque | MMACs | groups | shrinkable | lowest | planned | allowed | bytes \
| error | rounding | apply |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""

DECODERS = """
## Files of language models

Small decoders with random weights as ONNX Runtime GenAI's model builder and Optimum write them
(`tools/zoo/optimum.txt` has its versions), with their sizes left open; planned and judged like the
files above. **merged** are both networks of a decoder in one file (`merge_decoders`), read with
`--fix use_cache_branch=true`.
**apply** checks in two steps of generation where there is a cache: a prompt behind an empty one,
then a token behind what that has left.
"""

SMALL = """
## Small models of the onnx package

{count} files of opset 6 to 12 in `onnx/backend/test/data`, planned at the lowest that they can
reach. What the lifted model computes is held against the outputs that are stored beside the file.
"""

PEERS = """
## Peers at half the width

The same networks with random weights. morphgraph gives every group half of its width
(`mg.uniform`); onnxsim's `apply_structured_pruning` (after `simplify`) and Torch-Pruning's
`MagnitudePruner` (the last layer ignored) remove half of the channels of what they can. **kept**:
share of the multiply-adds. **error**: against the original in which the readers of the removed
channels have zeros there, which channels those are being read off the weights; "-" where that
cannot be said, since a LayerNorm computes its statistics over fewer channels. A program that has no
result in {limit} s has none. On these networks halving every group leaves a quarter and what the
inputs and outputs hold.

| network | morphgraph: kept | error | onnxsim: kept | error | Torch-Pruning: kept | error |
|---|---:|---:|---:|---:|---:|---:|
"""


def file_sections(
    files: Sequence[FileFindings],
    decoders: Sequence[DecoderFindings],
    small: Sequence[SmallFindings],
    peers: Sequence[PeerFindings],
) -> list[str]:
    """The lines of all four; parts without rows are left out."""
    lines: list[str] = []
    if files:
        lines += _files(files)
    if decoders:
        lines += _decoders(decoders)
    if small:
        lines += _small([row for found in small for row in found.rows])
    if peers:
        lines += [PEERS.format(limit=LIMIT_S).rstrip("\n"), *map(_peer, peers)]
    return lines


def _files(files: Sequence[FileFindings]) -> list[str]:
    text = FILES.format(
        count=len({f.source for f in files}),
        budget=BUDGET,
        tolerance=TOLERANCE,
        of_noise=OF_NOISE,
        slack=SIZE_SLACK,
        bytes=SIZE_BYTES // 1024,
    )
    lines = [text.rstrip("\n"), COUNTS.rstrip("\n")]
    lines += [
        _counts(treatment, [f for f in files if f.treatment == treatment])
        for treatment in ("as it is", *TREATED)
    ]
    lines += [_counts("all", files), ROWS.rstrip("\n"), *(_file(f) for f in files if not f.unmade)]
    unmade = defaultdict(list)
    for found in files:
        if found.unmade:
            unmade[found.treatment].append(found.source)
    words = [f"{treatment}: {', '.join(names)}" for treatment, names in unmade.items()]
    if words:
        lines += ["", f"The tools made no file that runs of these. {'; '.join(words)}."]
    return [*lines, "", "What falls short:", "", *_shortfalls(files)]


def _decoders(files: Sequence[DecoderFindings]) -> list[str]:
    lines = [DECODERS.rstrip("\n"), ROWS.rstrip("\n"), *(_file(f) for f in files if not f.unmade)]
    for found in files:
        if found.unmade:
            lines += ["", f"{found.name}: not made, {found.crashes.get('treat', found.not_run)}."]
    return [*lines, "", "What falls short:", "", *_shortfalls(files)]


def _counts(treatment: str, files: Sequence[FileFindings]) -> str:
    made = [f for f in files if not f.unmade]

    def number(holds: Callable[[FileFindings], bool]) -> int:
        return sum(map(holds, made))

    cells = (
        treatment,
        f"{len(made)} of {len(files)}",
        number(lambda f: f.lifted),
        number(lambda f: f.resized),
        number(lambda f: f.nothing_to_shrink),
        number(lambda f: f.wrong),
        number(lambda f: f.larger),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _file(f: FileFindings) -> str:
    verdict = {True: "right", False: "wrong", None: ""}[f.accepted]
    cells = [
        f.name.removeprefix("files/").removeprefix("decoders/"),
        f.producer,
        ", ".join(f"{op.split(':')[0]} ({count})" for op, count in f.opaque.items()),
        _number(f.macs / 1e6, ".3f") if f.lifted else "**not lifted**",
        f"{f.resizable} of {f.groups}" if f.lifted else "",
        _number(f.shrinkable, ".1%"),
        _number(f.lowest, ".1%"),
        _number(f.ratio, ".1%"),
        _number(f.allowed, ".1%"),
        f"{f.bytes[1] / f.bytes[0]:.1%}" if len(f.bytes) > 1 else "",
        _number(f.error, ".0e"),
        _number(f.noise, ".0e"),
        verdict,
    ]
    return "| " + " | ".join(cells) + " |"


def _shortfalls(files: Sequence[FileFindings]) -> list[str]:
    lines = [f"- **{f.name}**: {'; '.join(f.shortfalls)}." for f in files if f.shortfalls]
    return lines or ["Nothing."]


def _small(rows: Sequence[FileFindings]) -> list[str]:
    outcomes: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        outcomes[_outcome(row)].append(row.name.removeprefix("test_").removeprefix("operator_"))
    lines = [SMALL.format(count=len(rows)), "| outcome | files | which |", "|---|---:|---|"]
    for outcome, names in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {outcome} | {len(names)} | {', '.join(names)} |")
    equal = sum(row.unexpected <= TOLERANCE for row in rows)
    ran = sum(row.unexpected == row.unexpected for row in rows)
    lines += ["", f"Of {ran} lifted models that run, {equal} compute what is stored."]
    return [*lines, "", "What falls short:", "", *_shortfalls(rows)]


def _outcome(row: FileFindings) -> str:
    if not row.lifted:
        return "**refused**"
    if row.resized:
        return "resized at the lowest, equal"
    if not row.macs > 0:
        return "nothing to shrink: no multiply-adds"
    if row.nothing_to_shrink:
        kinds = sorted({reason.split(" '")[0] for reason in row.pinned})
        return f"nothing can shrink: {', '.join(kinds)}"
    return "**falls short**"


def _peer(f: PeerFindings) -> str:
    cells = [f.name.removeprefix("peers/")]
    for program in ("morphgraph", "onnxsim", "Torch-Pruning"):
        if program in f.crashes:
            cells += [_short(f.crashes[program]), ""]
        else:
            cells += [_number(f.kept.get(program, float("nan")), ".3f")]
            cells += [_number(f.errors.get(program, float("nan")), ".0e") or "-"]
    return "| " + " | ".join(cells) + " |"


def _short(error: str) -> str:
    """A refusal in a cell: its kind, or that there is no result."""
    return "no result" if error.startswith("TimeoutError") else error.split(":")[0]


def _number(value: float, spec: str) -> str:
    """A number, or nothing where it was not found."""
    return format(value, spec) if value == value else ""
