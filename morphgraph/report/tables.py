"""Reports, and the one renderer that prints them as tables, JSON, CSV or Markdown.

A cell holds the value itself; its column says how a person wants to read it. JSON gets the report's
data, CSV the values of the first table, and tables and Markdown the readable form. Names come from
files that anybody may have written: they are escaped, and never taken for markup.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from morphgraph.onnx_io import escape
from morphgraph.options import Format as Format
from morphgraph.plans import readable_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

Cell = str | int | float | None
_Item = TypeVar("_Item")

_ENDLESS = 10_000  # columns: a line in a file is never broken
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plain(value: Cell) -> str:
    """A cell as it is; nothing for ``None``."""
    return "" if value is None else escape(str(value))


def amount(value: Cell) -> str:
    """A count of three or four digits.

    >>> amount(1_814_073_344), amount(64), amount(0.25), amount(None)
    ('1.81 G', '64', '0.25', '')
    """
    if value is None or isinstance(value, str):
        return plain(value)
    for scale, prefix in _PREFIXES:
        if abs(value) >= scale:
            digits = ".3g" if abs(value) < 999.5 * scale else ".0f"
            return f"{value / scale:{digits}} {prefix}"
    return f"{value:.4g}"


def size(value: Cell) -> str:
    """An amount of bytes.

    >>> size(928), size(46_800_000)
    ('928 B', '46.8 MB')
    """
    shown = amount(value)
    return f"{shown}B" if shown[-1:].isalpha() else f"{shown} B"


def share(value: Cell) -> str:
    """A share of 1 in percent.

    >>> share(0.5), share(0.00071)
    ('50.0 %', '0.07 %')
    """
    if value is None or isinstance(value, str):
        return plain(value)
    digits = 1 if abs(value) >= 0.01 or value == 0 else 2
    return f"{100 * value:.{digits}f} %"


_TITLES = {
    "flops": "FLOPs",
    "params": "parameters",
    "memory": "activation memory",
    "latency": "latency",
}


def cost_title(unit: str) -> str:
    """A cost as people call it.

    >>> cost_title("flops"), cost_title("flops+20*params")
    ('FLOPs', 'flops+20*params')
    """
    return _TITLES.get(unit, unit)


def percent(value: Cell) -> str:
    """An accuracy, or a difference between two.

    >>> percent(0.98765), percent(None)
    ('98.77%', '')
    """
    return f"{value:.2%}" if isinstance(value, float) else plain(value)


def change(before: float, after: float) -> str:
    """Two amounts and how the second compares with the first.

    >>> change(200e6, 50e6)
    '200 M -> 50 M (25.0 %)'
    """
    part = f" ({share(after / before)})" if before else ""
    return f"{amount(before)} -> {amount(after)}{part}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title and how its values are read; numbers stand to the right.

    Attributes:
        minor: a terminal without room leaves it out, the column with the highest number first; it
            stays at 0.
    """

    title: str
    show: Callable[[Cell], str] = plain
    right: bool = False
    minor: int = 0


def number_column(title: str, show: Callable[[Cell], str] = amount, *, minor: int = 0) -> Column:
    """A column of numbers."""
    return Column(title, show, right=True, minor=minor)


def columns(*titles: Column | str) -> list[Column]:
    """Columns of a table; a title alone stands for a column of text."""
    return [Column(title) if isinstance(title, str) else title for title in titles]


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns.

    Attributes:
        most: how many rows a terminal shows; the other formats have all.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    most: int | None = None

    def readable(self) -> list[list[str]]:
        """The rows as a person reads them."""
        return [
            [column.show(cell) for column, cell in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


def table_of(
    items: Iterable[_Item],
    *cells: tuple[Column | str, Callable[[_Item], Cell]],
    title: str = "",
) -> Table:
    """A table with a row per item; every column comes with how its cell is read off an item.

    >>> table_of(["conv1", "fc"], ("layer", str), (number_column("letters"), len)).readable()
    [['conv1', '5'], ['fc', '2']]
    """
    rows = [[read(item) for _, read in cells] for item in items]
    return Table(columns(*(column for column, _ in cells)), rows, title)


@dataclass(frozen=True)
class Report:
    """What a command answers.

    Attributes:
        data: the whole answer for programs, which msgspec can encode.
        tables: for people; the first one is also what CSV gets.
        head: pairs of a short title and a line, printed above the tables.
        foot: lines printed below.
    """

    data: Any
    tables: Sequence[Table] = ()
    head: Sequence[tuple[str, str]] = ()
    foot: Sequence[str] = ()


def render(report: Report, kind: Format, *, color: bool = False, width: int | None = None) -> str:
    """A report as text that ends with a line break; the same report gives the same text.

    Args:
        report: what to print.
        kind: the format.
        color: whether tables may hold terminal colors.
        width: columns of the terminal; ``None`` leaves lines as long as they are.

    >>> table = Table([Column("layer"), number_column("MACs")], [["conv1", 118_013_952]])
    >>> print(render(Report(None, [table]), "md"), end="")
    | layer | MACs |
    |:---|---:|
    | conv1 | 118 M |
    """
    match kind:
        case "json":
            return readable_json(report.data).decode()
        case "csv":
            return _csv(report.tables[0])
        case "md":
            return _markdown(report)
        case "table":
            return _text(report, color, width)


def _csv(table: Table) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(column.title for column in table.columns)
    for row in table.rows:
        writer.writerow(escape(cell) if isinstance(cell, str) else cell for cell in row)
    return stream.getvalue()


def _markdown(report: Report) -> str:
    parts = ["\n".join(f"- {title}: {_md(line)}" for title, line in report.head)]
    for table in report.tables:
        lines = [f"### {_md(table.title)}\n"] if table.title else []
        lines.append(_md_row([_md(column.title) for column in table.columns]))
        lines.append("|" + "|".join("---:" if c.right else ":---" for c in table.columns) + "|")
        lines += [_md_row([_md(cell) for cell in row]) for row in table.readable()]
        parts.append("\n".join(lines))
    parts += [_md(line) for line in report.foot]
    return "\n\n".join(part for part in parts if part) + "\n"


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join("\\" + char if char in "\\`*_{}[]<>|#" else char for char in text)


def _text(report: Report, color: bool, width: int | None) -> str:
    from rich.console import Console
    from rich.text import Text

    stream = io.StringIO()
    console = Console(
        file=stream,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        width=width or _ENDLESS,
        legacy_windows=False,
        soft_wrap=True,
    )
    indent = max((len(title) for title, _ in report.head), default=0)
    for title, line in report.head:
        console.print(Text.assemble((f"{title:<{indent}}  ", "bold"), line), soft_wrap=True)
    for table in report.tables:
        if report.head or table is not report.tables[0]:
            console.print()
        if table.title:
            console.print(Text(table.title, "bold"))
        fitting, narrow = _fitting(table, console.width)
        console.print(_rich_table(fitting, console), soft_wrap=False, crop=False)
        if narrow:
            titles = ", ".join(narrow)
            console.print(Text(f"no room for {titles}: --format json has all"), soft_wrap=True)
        left_out = len(table.rows) - len(table.rows[: table.most])
        if left_out:
            console.print(Text(f"and {left_out} more, which --format json lists"), soft_wrap=True)
    if report.foot and (report.tables or report.head):
        console.print()
    for line in report.foot:
        console.print(Text(line), soft_wrap=True)
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())


_BETWEEN = 3
"""Columns of a terminal between two of a table."""
_LEAST = 4
"""Characters of a column whose words are broken, for want of room."""
_LONG_WORD, _SHORT_CELL = 20, 14
"""Characters up to which a word is not broken, as a layer's name, and up to which a cell is not."""


def _fitting(table: Table, width: int) -> tuple[Table, list[str]]:
    """The table without the minor columns that there is no room for, and the titles of these."""
    least, kept = _least_widths(table), [*range(len(table.columns))]
    left_out: list[int] = []
    while sum(least[place] + _BETWEEN for place in kept) - _BETWEEN > width:
        last = max(kept, key=lambda place: table.columns[place].minor)
        if not table.columns[last].minor:
            break
        kept.remove(last)
        left_out.append(last)
    fitting = replace(
        table,
        columns=[table.columns[place] for place in kept],
        rows=[[row[place] for place in kept] for row in table.rows],
    )
    return fitting, [table.columns[place].title for place in sorted(left_out)]


def _least_widths(table: Table) -> list[int]:
    """Per column the characters without which a number or a word is broken."""
    rows = table.readable()[: table.most]
    widths = []
    for place, column in enumerate(table.columns):
        words = [row[place] for row in rows]
        if not column.right:
            parts = [[cell] if len(cell) <= _SHORT_CELL else cell.split() for cell in words]
            words = [word[:_LONG_WORD] for part in parts for word in part]
        widths.append(max(map(len, [*column.title.split(), *words]), default=0))
    return widths


def _widths(table: Table, least: Sequence[int], room: int) -> list[int]:
    """The widths of columns that fit into the room: text gets what is left, the longest first."""
    widths = [*least]
    rows = [[column.title for column in table.columns], *table.readable()[: table.most]]
    wanted = [
        least[place] if column.right else max(len(row[place]) for row in rows)
        for place, column in enumerate(table.columns)
    ]
    for _ in range(room - sum(least)):
        short = [want - width for want, width in zip(wanted, widths, strict=True)]
        if max(short) <= 0:
            break
        widths[short.index(max(short))] += 1
    return widths


def _rich_table(table: Table, console: "Console") -> "RichTable":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    rows = table.readable()[: table.most]
    shown = RichTable(
        box=SIMPLE_HEAD, pad_edge=False, show_edge=False, safe_box=console.color_system is None
    )
    for column in table.columns:
        shown.add_column(
            Text(column.title), justify="right" if column.right else "left", overflow="fold"
        )
    for row in rows:
        shown.add_row(*map(Text, row))
    unbounded = console.options.update(width=_ENDLESS)
    if console.measure(shown, options=unbounded).maximum > console.width:
        # Titles of numbers break first, so that names keep the room; numbers never break.
        least = _least_widths(table)
        room = console.width - _BETWEEN * (len(least) - 1)
        if sum(least) > room:
            pairs = zip(table.columns, least, strict=True)
            least = [width if column.right else min(width, _LEAST) for column, width in pairs]
        for each, width in zip(shown.columns, _widths(table, least, room), strict=True):
            each.width = width
    return shown
