"""Tables in terminals: what gives way where there is no room, and what never does."""

import pytest

from morphgraph.report.tables import Cell, Column, Report, Table, number_column, plain, render

COLUMNS = [
    Column("model"),
    number_column("least time", plain, minor=2),
    number_column("p50", plain),
    Column("interval"),
    number_column("FLOPs ratio", plain, minor=1),
    Column("note"),
]
ROWS: list[list[Cell]] = [
    ["efficientnet_b0_at_half.onnx", 10.123, 12.345, "1.714 to 2.573", 2.001, "unstable"],
    ["b.onnx", 1.5, 2.25, None, None, None],
]


def _lines(width: int | None) -> list[str]:
    return render(Report(None, [Table(COLUMNS, ROWS)]), "table", width=width).splitlines()


@pytest.mark.parametrize("width", [48, 60, 70, 80, 100])
def test_no_number_is_broken_and_no_line_too_long(width: int) -> None:
    lines = _lines(width)
    text = "\n".join(lines)
    assert max(map(len, lines[:-1])) <= width
    assert "12.345" in text
    for title, number in (("least time", "10.123"), ("FLOPs ratio", "2.001")):
        told = title in lines[-1] and "--format json" in lines[-1]
        assert (number in text) != told


def test_columns_go_in_order() -> None:
    assert _lines(66)[-1] == "no room for least time: --format json has all"
    assert _lines(50)[-1] == "no room for least time, FLOPs ratio: --format json has all"


def test_names_and_intervals_stay_whole_while_others_can_go() -> None:
    text = "\n".join(_lines(70))
    assert "1.714 to 2.573" in text
    assert "unstable" in text


def test_a_file_has_everything() -> None:
    lines = _lines(None)
    assert len(lines) == 2 + len(ROWS)
    assert "10.123" in lines[2]
    assert "efficientnet_b0_at_half.onnx" in lines[2]


def test_what_cannot_go_is_broken_between_words_or_letters_but_not_numbers() -> None:
    names: list[list[Cell]] = [["a" * 30, "b" * 30, "c" * 30, 1234.5678]]
    table = Table([*map(Column, "xyz"), number_column("n", plain)], names)
    lines = render(Report(None, [table]), "table", width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert "1234.5678" in "\n".join(lines)
    assert sum(line.count("a") for line in lines) == 30
