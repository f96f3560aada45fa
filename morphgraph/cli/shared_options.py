"""Options and argument types that several commands share."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import click
from msgspec import Meta

from morphgraph.errors import FileError, MorphError
from morphgraph.options import Format, option
from morphgraph.words import escape

_Value = TypeVar("_Value")

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


def width_or_share(text: str) -> int | str:
    """A number of channels, or a share of a group's.

    >>> width_or_share("48"), width_or_share("50%")
    (48, '50%')
    """
    if text.endswith("%"):
        if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,10})?%", text):
            raise click.BadParameter(f"'{text}' is no share; write 50%")
        return text
    return width(text)


def fixed_value(text: str) -> bool | int | float | list[bool | int | float]:
    """The value of an input: a flag, a number, or several with commas between them.

    >>> fixed_value("true"), fixed_value("16000"), fixed_value("0.5,1e-3")
    (True, 16000, [0.5, 0.001])
    """
    words: dict[str, bool] = {"true": True, "false": False}
    found: list[bool | int | float] = []
    for part in text.split(","):
        word = part.strip().lower()
        if word in words:
            found.append(words[word])
        elif re.fullmatch("[+-]?[0-9]{1,19}", word):
            found.append(int(word))
        elif re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?", word):
            found.append(float(word))
        else:
            raise click.BadParameter(f"'{text}' is no value; write true, false, 16000 or 0.5,1")
    return found if len(found) > 1 else found[0]


def indices(text: str) -> list[int]:
    """The numbers in ``0,3,7-9``.

    >>> indices("0,3,7-9")
    [0, 3, 7, 8, 9]
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if match is None:
            raise click.BadParameter(f"'{text}' is no list of indices; write 0,3,7 or 0-9")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def indices_of_output(text: str) -> tuple[str, list[int]]:
    """The output, empty where there is none, and the numbers in ``OUTPUT=0,3,7``.

    >>> indices_of_output("logits=0,3"), indices_of_output("0,3")
    (('logits', [0, 3]), ('', [0, 3]))
    """
    name, _, rest = text.rpartition("=")
    return name, indices(rest)


indices_of_output.__name__ = "indices"


def file_of_table(text: str) -> tuple[str, Path]:
    """The table, empty where there is none, and the file in ``TABLE=FILE``.

    >>> file_of_table("word.weight=ids.txt")[0], file_of_table("ids.txt")[0]
    ('word.weight', '')
    """
    table, _, path = text.rpartition("=")
    return table, Path(path)


file_of_table.__name__ = "file"

OutputFormat = Annotated[Format, option("How results are printed.", "--format")]

InputShapes = Annotated[
    tuple[tuple[str, tuple[int, ...]], ...],
    option(
        "The size of an input that the file leaves open; may be repeated.",
        "--input-shape",
        type=assignment(shape, "NAME=1x3x224x224"),
        metavar="NAME=1x3x224x224",
    ),
]

FixedInputs = Annotated[
    tuple[tuple[str, Any], ...],
    option(
        "Fix an input to a value, as use_cache_branch=true or sr=16000: the network is the one for "
        "this value, and does not take the input any more; may be repeated. A plan remembers it.",
        "--fix",
        type=assignment(fixed_value, "sr=16000"),
        metavar="NAME=VALUE",
    ),
]


def _run_ops(
    _ctx: click.Context, _param: click.Parameter, paths: tuple[Path, ...]
) -> tuple[str, ...]:
    if paths:
        from morphgraph.ops.custom import load_ops

        for path in paths:
            load_ops(path)
    return tuple(str(path.resolve()) for path in paths)


Ops = Annotated[
    tuple[str, ...],
    option(
        "A Python file of yours that teaches operators with mg.register; may be repeated.",
        type=click.Path(path_type=Path),
        metavar="my_ops.py",
        callback=_run_ops,
    ),
]

InputFiles = Annotated[
    Path | None,
    option(
        "What the check runs on, instead of random numbers: arrays by the names of inputs, or a "
        "folder of .npz files (one set each) or of .npy files (named after the inputs).",
        "--inputs",
        type=click.Path(path_type=Path),
        metavar="FILE.npz|DIR",
    ),
]

Overwrite = Annotated[bool, option("Replace an existing output file.")]

DryRun = Annotated[
    bool,
    option("Say what would be done, what it would cost and which files it would write; no more."),
]

Seed = Annotated[int, option("Of random numbers.", ge=0)]


def output_file(example: str) -> Meta:
    """``-o``: the file that is written."""
    return option("The file to write.", "-o", "--output", metavar=example)


def budget_option(example: str, description: str) -> Meta:
    """``--budget COST=AMOUNT``, which may be repeated."""
    extra = {"flags": ("--budget",), "type": assignment(str, example), "metavar": "COST=AMOUNT"}
    return Meta(description=description, extra=extra)


def refuse_repeated(budgets: tuple[tuple[str, str], ...]) -> None:
    """Refuse two budgets on one cost; one of them would be ignored."""
    repeated = [key for key, count in Counter(key for key, _ in budgets).items() if count > 1]
    if repeated:
        raise click.UsageError(f"--budget {repeated[0]} is given twice")


def check_output(output: Path | None, overwrite: bool, *inputs: Path) -> None:
    """Refuse an output file before any work is done for it.

    Raises:
        FileError: it exists already (without ``overwrite``), is an input, or has no folder.
    """
    from morphgraph.onnx_io.files import data_file, files_of

    if output is None:
        return
    where = escape(str(output))
    written = [path for path in (output, data_file(output)) if path.exists()]
    for path in inputs:
        read = [path] if path.exists() and written else []
        if read and overwrite and path.suffix == ".onnx":
            with suppress(MorphError):  # said again, and better, when the model is read
                read = files_of(path)
        if any(target.samefile(file) for target in written for file in read if file.exists()):
            raise FileError(f"{where}: is an input, which is never changed; choose another name")
    if output.is_dir():
        raise FileError(f"{where}: is a folder; give a file name in it")
    if output.exists() and not output.is_file():
        raise FileError(f"{where}: is not an ordinary file, and is not replaced; choose another")
    if output.exists() and not overwrite:
        raise FileError(f"{where}: exists already; choose another name or pass --overwrite")
    if not output.absolute().parent.is_dir():
        raise FileError(f"{where}: there is no such folder; make it first")


DeviceFile = Annotated[
    Path | None,
    option(
        "The device that latency is of: a file that `calibrate` has written, or a table of "
        "measurements.",
        "--device",
        metavar="device.json|.csv",
    ),
]

Measure = Annotated[
    bool,
    option(
        "Time the result beside the model in the device's runtime, and plan again until it takes "
        "the time that was asked for."
    ),
]
