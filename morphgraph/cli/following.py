"""What comes after a command: a next one that can be run as it stands, and what one would do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from morphgraph.cli.console import show
from morphgraph.cli.models import Lifting

if TYPE_CHECKING:
    from morphgraph.options import Format
    from morphgraph.passes.checking.verdict import VerifyReport
    from morphgraph.plans import Change


def unused(name: str, folder: Path = Path()) -> Path:
    """A file name that nothing has yet: ``plan.json``, else ``plan-2.json`` and so on."""
    path = folder / name
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return path if not path.exists() else next(each for each in names if not each.exists())


def lifting_words(lifting: Lifting, *, planned: bool = False) -> list[str]:
    """The options that lift a model in the same way.

    Args:
        lifting: how it was lifted.
        planned: leave out what a plan remembers.
    """
    words = [word for path in lifting.ops for word in ("--ops", _from_here(path))]
    if planned:
        return words
    if lifting.attention is not None:
        words += ["--attention", lifting.attention]
    for name, sizes in lifting.input_shapes:
        words += ["--input-shape", f"{name}={'x'.join(map(str, sizes))}"]
    if lifting.fixed:
        from morphgraph.onnx_io.fixed import fixed_words

        words += [part for word in fixed_words(dict(lifting.fixed)) for part in ("--fix", word)]
    return words


def _from_here(path: str) -> str:
    """A path as a person in this folder would write it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def shape_words(lifting: Lifting) -> list[str]:
    """The options that give open inputs the same sizes, for commands that lift by no plan."""
    return lifting_words(replace(lifting, attention=None))


def bench_words(
    model: Path, slim: Path, lifting: Lifting, check: "VerifyReport | None" = None
) -> list[str | Path]:
    """The command that times two models beside each other.

    Where the check says that ONNX Runtime does not run them, the one that compares them.
    """
    from morphgraph.folders.found import model_place

    verb = "diff" if check is not None and check.by != "ONNX Runtime" else "bench"
    return [verb, *map(model_place, (model, slim)), *shape_words(lifting)]


def budget_words(budgets: Iterable[tuple[str, str]]) -> list[str]:
    """Budgets as options."""
    return [word for kind, amount in budgets for word in ("--budget", f"{kind}={amount}")]


def tell_intention(
    command: str,
    steps: Sequence[str],
    files: Iterable[Path | None],
    output_format: "Format",
    costs: "Mapping[str, Change] | None" = None,
) -> None:
    """Show what a command would do (``--dry-run``)."""
    from morphgraph.report.intention import intention

    show(intention(command, steps, files, costs), output_format)
