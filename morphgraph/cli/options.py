"""Options and argument types that several commands share."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from morphgraph.cli.console import settings
from morphgraph.errors import FileError

if TYPE_CHECKING:
    from morphgraph.graph import Attention

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Value = TypeVar("_Value")
Decorator = Callable[[_Command], _Command]

MODEL = click.Path(path_type=Path)

_MAX_RANK = 16


def shape(text: str) -> tuple[int, ...]:
    """The sizes in ``1x3x224x224``.

    >>> shape("1x3x224x224")
    (1, 3, 224, 224)
    """
    sizes = text.split("x")
    if len(sizes) > _MAX_RANK or not all(re.fullmatch("[1-9][0-9]{0,9}", size) for size in sizes):
        raise click.BadParameter(f"'{text}' is no shape; write 1x3x224x224")
    return tuple(map(int, sizes))


def assignment(value: Callable[[str], _Value], example: str) -> Callable[[str], tuple[str, _Value]]:
    """The type of ``NAME=VALUE``; the last ``=`` separates, for names may hold some.

    >>> assignment(int, "'layer1*=48'")("layer1*=48")
    ('layer1*', 48)
    """

    def convert(text: str) -> tuple[str, _Value]:
        name, _, rest = text.rpartition("=")
        if not name or not rest:
            raise click.BadParameter(f"'{text}' is no assignment; write {example}")
        return name, value(rest)

    convert.__name__ = "assignment"
    return convert


def width(text: str) -> int:
    """A number of channels.

    >>> width("48")
    48
    """
    if not re.fullmatch("[0-9]{1,10}", text):
        raise click.BadParameter(f"'{text}' is no width; give a whole number from 0")
    return int(text)


def common(command: _Command) -> _Command:
    """``-q``, ``-v``, ``--debug`` and ``--no-color``."""
    for option in (
        click.option(
            "--no-color",
            is_flag=True,
            expose_value=False,
            callback=_set_color,
            help="Plain text, also in a terminal (as does the variable NO_COLOR).",
        ),
        click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            callback=_set_debug,
            help="Show where in the program an error arose.",
        ),
        click.option(
            "-v",
            "--verbose",
            count=True,
            expose_value=False,
            callback=_add_verbosity,
            help="Say on stderr what is done; twice, what other libraries log.",
        ),
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            expose_value=False,
            callback=_set_quiet,
            help="No notes and warnings on stderr, only errors.",
        ),
    ):
        command = option(command)
    return command


def _set_color(_ctx: click.Context, _param: click.Parameter, plain: bool) -> None:
    if plain:
        settings().color = False


def _set_debug(_ctx: click.Context, _param: click.Parameter, debug: bool) -> None:
    settings().debug = debug


def _add_verbosity(_ctx: click.Context, _param: click.Parameter, count: int) -> None:
    settings().verbosity += count


def _set_quiet(_ctx: click.Context, _param: click.Parameter, quiet: bool) -> None:
    if quiet:
        settings().verbosity = -1


format_option: Decorator[Any] = click.option(
    "--format",
    "kind",
    type=click.Choice(["table", "json", "csv", "md"]),
    default="table",
    show_default=True,
    help="How results are printed.",
)


@dataclass(frozen=True, slots=True)
class Lifting:
    """How the user wants models lifted; ``None`` and no shapes where a plan, or the default, says.

    Attributes:
        input_shapes: sizes of inputs that files leave open.
        attention: whether attentions shrink by ``"heads"`` or by ``"head-dim"``.
        ops: Python files that teach operators; they have run already.
    """

    input_shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    attention: "Attention | None" = None
    ops: tuple[str, ...] = ()


def lift_options(command: _Command) -> _Command:
    """``--input-shape``, ``--attention`` and ``--ops``; the command gets them as ``lifting``."""

    @wraps(command)
    def with_lifting(*args: Any, input_shapes: Any, attention: Any, **options: Any) -> Any:
        ops = click.get_current_context().meta.get(_OPS, ())
        return command(*args, lifting=Lifting(input_shapes, attention, ops), **options)

    decorated: Any = ops_option(attention_option(input_shape_option(with_lifting)))
    return decorated  # type: ignore[no-any-return]


input_shape_option: Decorator[Any] = click.option(
    "--input-shape",
    "input_shapes",
    type=assignment(shape, "NAME=1x3x224x224"),
    multiple=True,
    metavar="NAME=1x3x224x224",
    help="The size of an input that the file leaves open; may be repeated.",
)

attention_option: Decorator[Any] = click.option(
    "--attention",
    type=click.Choice(["heads", "head-dim"]),
    help="Shrink attentions by whole heads (the default) or by the size of every head. A plan "
    "remembers the choice.",
)


_OPS = f"{__name__}.ops"


def _run_ops(ctx: click.Context, _param: click.Parameter, paths: tuple[Path, ...]) -> None:
    ctx.meta[_OPS] = tuple(str(path.resolve()) for path in paths)
    if paths:
        from morphgraph.ops.custom import load_ops

        for path in paths:
            load_ops(path)


ops_option: Decorator[Any] = click.option(
    "--ops",
    type=MODEL,
    multiple=True,
    metavar="my_ops.py",
    expose_value=False,
    callback=_run_ops,
    help="A Python file of yours that teaches operators with mg.register; may be repeated.",
)

overwrite_option: Decorator[Any] = click.option(
    "--overwrite", is_flag=True, help="Replace an existing output file."
)

convention_option: Decorator[Any] = click.option(
    "--convention",
    type=click.Choice(["default", "morphnet"]),
    default="default",
    show_default=True,
    help="How costs are counted.",
)

seed_option: Decorator[Any] = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random numbers."
)


def refuse_repeated(budgets: tuple[tuple[str, str], ...]) -> None:
    """Refuse two budgets on one cost; the wider one would be lost in silence."""
    repeated = [key for key, count in Counter(key for key, _ in budgets).items() if count > 1]
    if repeated:
        raise click.UsageError(f"--budget {repeated[0]} is given twice")


def output_option(example: str, required: bool = True) -> Decorator[Any]:
    """``-o``: the file that is written."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=required,
        metavar=example,
        help="The file to write.",
    )


def check_output(output: Path | None, overwrite: bool, *inputs: Path) -> None:
    """Refuse an output file before any work is done for it.

    Raises:
        FileError: it exists already (without ``overwrite``), is an input, or has no folder.
    """
    from morphgraph.onnx_io import escape

    if output is None:
        return
    where = escape(str(output))
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise FileError(f"{where}: is an input, which is never changed; choose another name")
    if output.is_dir():
        raise FileError(f"{where}: is a folder; give a file name in it")
    if output.exists() and not overwrite:
        raise FileError(f"{where}: exists already; choose another name or pass --overwrite")
    if not output.absolute().parent.is_dir():
        raise FileError(f"{where}: there is no such folder; make it first")
