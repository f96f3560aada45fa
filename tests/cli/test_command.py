"""Options follow from parameters and from fields of dataclasses."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
from msgspec import Meta

from morphgraph.cli import cli
from morphgraph.cli.command import Fields, command
from morphgraph.train.config import SearchConfig


@dataclass(frozen=True)
class Grid:
    round_to: Annotated[int, Meta(ge=1, description="Multiples.", extra={"metavar": "N"})] = 1
    names: tuple[str, ...] = ()
    fill: Annotated[bool, Meta(extra={"flags": ("--fill/--no-fill",)})] = True


def _run(function: Any, *arguments: str) -> Any:
    return command(function).main(list(arguments), standalone_mode=False, obj=None)


def test_a_parameter_is_an_argument_and_a_keyword_parameter_is_an_option() -> None:
    def act(model: Path, *, by: Literal["a", "b"] = "a", top: int | None = None) -> Any:
        return model, by, top

    assert _run(act, "m.onnx") == (Path("m.onnx"), "a", None)
    assert _run(act, "m.onnx", "--by", "b", "--top", "3") == (Path("m.onnx"), "b", 3)
    with pytest.raises(click.BadParameter):
        _run(act, "m.onnx", "--by", "c")
    with pytest.raises(click.UsageError):
        _run(act)


def test_a_choice_that_may_be_left_out_is_a_choice() -> None:
    def act(*, by: Literal["a", "b"] | None = None) -> Any:
        return by

    assert [_run(act), _run(act, "--by", "b")] == [None, "b"]
    with click.Context(command(act)) as ctx:
        assert "--by [a|b]" in command(act).get_help(ctx)
    with pytest.raises(click.BadParameter, match=r"'B' is not one of 'a', 'b' \(did you mean 'b'"):
        _run(act, "--by", "B")


def test_a_number_or_a_word_says_both() -> None:
    def act(*, to: Annotated[int | Literal["auto"], Meta(ge=1)] = "auto") -> Any:
        return to

    assert [_run(act), _run(act, "--to", "8"), _run(act, "--to", "auto")] == ["auto", 8, "auto"]
    for given, said in (("0", "x>=1, nor 'auto'"), ("Auto", "nor 'auto' .did you mean 'auto'")):
        with pytest.raises(click.BadParameter, match=said):
            _run(act, "--to", given)


@pytest.mark.parametrize("name", cli.list_commands(click.Context(cli)))
def test_no_option_hides_its_choices(name: str) -> None:
    one = cli.get_command(click.Context(cli), name)
    assert one is not None
    with click.Context(one) as ctx:
        assert "NUMBER" not in one.get_help(ctx)


def test_a_dataclass_stands_for_its_fields() -> None:
    def act(*, grid: Grid, wide: bool = False) -> Any:
        return grid, wide

    assert _run(act) == (Grid(), False)
    chosen = _run(act, "--round-to", "8", "--names", "x", "--names", "y", "--no-fill", "--wide")
    assert chosen == (Grid(8, ("x", "y"), False), True)
    with pytest.raises(click.BadParameter):
        _run(act, "--round-to", "0")


def test_some_fields_of_a_dataclass_make_a_dict() -> None:
    def act(*, grid: Annotated[dict[str, Any], Fields(Grid, "round_to", "names")]) -> Any:
        return grid

    assert _run(act, "--names", "x") == {"round_to": 1, "names": ("x",)}
    with pytest.raises(click.NoSuchOption):
        _run(act, "--no-fill")


def test_help_says_what_the_annotation_says() -> None:
    def act(*, grid: Grid) -> None:
        """Do it."""

    with click.Context(command(act)) as ctx:
        text = command(act).get_help(ctx)
    assert "Do it." in text
    assert "--round-to N" in text
    assert "Multiples.  [default: 1; x>=1]" in text


@pytest.mark.parametrize("name", ["morph", "sweep"])
def test_every_field_of_the_search_is_an_option(name: str) -> None:
    training = cli.get_command(click.Context(cli), name)
    assert training is not None
    arguments = ["m.onnx", "--data", "digits", "--budget", "flops=50%", "-o", "runs"]
    values = training.make_context(name, arguments).params
    for field in fields(SearchConfig):
        if field.name not in ("budget", "cost"):
            assert values[field.name] == field.default
