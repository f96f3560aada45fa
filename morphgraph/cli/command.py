"""Commands from functions: every option is spelled once, as a parameter or as a dataclass's field.

A positional parameter is an argument of the command, a keyword parameter an option. An annotation
gives the type, the bounds and the help text of a value, a default is the option's default:

    width: Annotated[int, option("Channels.", ge=1, metavar="N")] = 1

The fields of a parameter whose type is a dataclass are options too; the command gets the dataclass.
What :func:`morphgraph.options.option` is given for click overrides what follows from the type.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from msgspec import Meta

from morphgraph.cli.console import settings
from morphgraph.words import did_you_mean

_Values = dict[str, Any]
_Build = Callable[[_Values], Any]  # takes the values of its options out of all values


@dataclass(frozen=True, slots=True)
class Fields:
    """Some fields of a dataclass as options, as an annotation of a ``dict`` that holds them.

    Attributes:
        struct: the dataclass.
        first, last: names of fields; those from the first to the last are taken.
    """

    struct: type
    first: str
    last: str


def command(function: Callable[..., Any]) -> click.Command:
    """A command whose arguments and options are the parameters of a function."""
    hints = get_type_hints(function, include_extras=True)
    parameters: list[click.Parameter] = []
    builds: dict[str, _Build] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            options, builds[name] = _options(name, hints[name], parameter.default)
            parameters += options
        else:
            parameters.append(click.Argument([name], **_argument(hints[name])))

    def callback(**values: Any) -> Any:
        built = {name: build(values) for name, build in builds.items()}
        return function(**values, **built)  # what is left are arguments

    return click.Command(
        function.__name__,
        callback=callback,
        params=[*parameters, *_common()],
        help=inspect.getdoc(function),
    )


def _options(name: str, hint: Any, default: Any) -> tuple[Sequence[click.Parameter], _Build]:
    """The options of a parameter, and how its value is made of theirs."""
    part = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Fields)), None)
    if part is not None:
        return _group(part.struct, dict, part.first, part.last)
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        return _group(hint, hint)
    return [_option(name, hint, default)], lambda values: values.pop(name)


def _group(
    struct: Any, make: Callable[..., Any], first: str | None = None, last: str | None = None
) -> tuple[Sequence[click.Parameter], _Build]:
    """The options of a dataclass, or of its fields from ``first`` to ``last``."""
    hints = get_type_hints(struct, include_extras=True)
    fields = {field.name: field.default for field in dataclasses.fields(struct)}
    names = list(fields)
    taken = names[names.index(first or names[0]) : names.index(last or names[-1]) + 1]
    parameters: list[click.Parameter] = []
    builds: dict[str, _Build] = {}
    for name in taken:
        options, builds[name] = _options(name, hints[name], fields[name])
        parameters += options
    return parameters, lambda values: make(**{k: build(values) for k, build in builds.items()})


def _unpacked(hint: Any) -> tuple[Any, Meta]:
    """The type behind an annotation, ``X`` for ``X | None``, and what is said about it."""
    value_type, meta = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, Meta())
    if get_origin(value_type) in (Union, UnionType):
        types = [each for each in get_args(value_type) if each is not NoneType]
        if len(types) == 1 or not any(get_origin(each) is Literal for each in types):
            value_type = types[0]
    return value_type, meta


def _argument(hint: Any) -> dict[str, Any]:
    value_type, meta = _unpacked(hint)
    several = {"nargs": -1, "required": True} if get_origin(value_type) is tuple else {}
    return {"type": _click_type(value_type, meta), **several, **(meta.extra or {})}


def _option(name: str, hint: Any, default: Any) -> click.Option:
    value_type, meta = _unpacked(hint)
    attributes: dict[str, Any] = {"help": meta.description, **(meta.extra or {})}
    flags = attributes.pop("flags", (f"--{name.replace('_', '-')}",))
    attributes.setdefault("multiple", get_origin(value_type) is tuple)
    if value_type is bool and default is None:  # neither yes nor no: the program decides
        flags = tuple(f"{flag}/{flag.replace('--', '--no-', 1)}" for flag in flags)
        attributes |= {"is_flag": True, "default": None}
    elif value_type is bool:
        attributes.setdefault("is_flag", True)
    else:
        attributes.setdefault("type", _click_type(value_type, meta))
    if default in (inspect.Parameter.empty, dataclasses.MISSING):
        attributes.setdefault("required", True)
    elif not any(default is nothing for nothing in (None, False, ())):
        attributes = {"default": default, "show_default": True} | attributes
    return click.Option([*flags, name], **attributes)


def _click_type(value_type: Any, meta: Meta) -> Any:
    """What click is to make of an argument's text."""
    low = meta.ge if meta.gt is None else meta.gt
    if get_origin(value_type) in (Union, UnionType):
        number, words = get_args(value_type)
        return _NumberOrWord(_click_type(number, meta), get_args(words))
    if get_origin(value_type) is tuple:
        return _click_type(get_args(value_type)[0], meta)
    if get_origin(value_type) is Literal:
        return _Choice(get_args(value_type))
    if value_type is Path:
        return click.Path(path_type=Path)
    if value_type is int and low is not None:
        return click.IntRange(int(low))
    if value_type is float:
        return click.FloatRange(low, meta.le, min_open=meta.gt is not None)
    return value_type


class _Choice(click.Choice[str]):
    """A choice that says which of its words may have been meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word, if it is one of the choice.

        Raises:
            BadParameter: it is none.
        """
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = did_you_mean(str(value), map(str, self.choices))
            self.fail(error.message.rstrip(".") + hint, param, ctx)


class _NumberOrWord(click.ParamType[Any]):
    """A type of click's, or one of a few words instead."""

    name = "number"

    def __init__(self, number: click.ParamType[Any], words: Sequence[str]) -> None:
        self.number = number
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word, or the number.

        Raises:
            BadParameter: it is neither.
        """
        if value in self.words:
            return value
        try:
            return self.number.convert(value, param, ctx)
        except click.BadParameter as error:
            words = " or ".join(map(repr, self.words))
            hint = did_you_mean(str(value), self.words)
            self.fail(f"{error.message.rstrip('.')}, nor {words}{hint}", param, ctx)


def _common() -> list[click.Parameter]:
    """``-q``, ``-v``, ``--debug`` and ``--no-color``, which every command has."""

    def common(*flags: str, callback: Callable[..., None], **attributes: Any) -> click.Parameter:
        return click.Option(flags, expose_value=False, callback=callback, **attributes)

    return [
        common(
            "-q",
            "--quiet",
            is_flag=True,
            callback=_setting(verbosity=-1),
            help="No notes and warnings on stderr, only errors.",
        ),
        common(
            "-v",
            "--verbose",
            count=True,
            callback=_add_verbosity,
            help="Say on stderr what is done; twice, what other libraries log.",
        ),
        common(
            "--debug",
            is_flag=True,
            callback=_setting(debug=True),
            help="Show where in the program an error arose.",
        ),
        common(
            "--no-color",
            is_flag=True,
            callback=_setting(color=False),
            help="Plain text, also in a terminal (as does the variable NO_COLOR).",
        ),
    ]


def _setting(**changes: Any) -> Callable[..., None]:
    """A callback that changes settings where its flag is given."""

    def callback(_ctx: click.Context, _param: click.Parameter, is_given: bool) -> None:
        for name, value in changes.items() if is_given else ():
            setattr(settings(), name, value)

    return callback


def _add_verbosity(_ctx: click.Context, _param: click.Parameter, count: int) -> None:
    settings().verbosity += count
