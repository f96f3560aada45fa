"""Report pages for commands: the option, the command line that made it, and the file."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from morphgraph.cli.console import note, settings, step
from morphgraph.errors import UnsupportedError, warn
from morphgraph.options import option
from morphgraph.words import escape

if TYPE_CHECKING:
    from morphgraph.report.pages.facts import Facts

ReportFile = Annotated[
    Path | None,
    option("Show it as one HTML file, too.", "--report", metavar="report.html"),
]


def write_page(output: Path, facts: "Facts", overwrite: bool) -> None:
    """Draw a page and write it.

    Raises:
        FileError: it cannot be written.
        UnsupportedError: Plotly is not installed.
    """
    from morphgraph.onnx_io import write_atomically
    from morphgraph.report.pages.page import report_page

    with step("drawing the page"):
        page = report_page(facts)
    write_atomically(output, page, overwrite=overwrite)
    note(f"wrote {escape(str(output))}; open it in a browser")


def write_picture(path: Path, draw: Callable[[], str]) -> bool:
    """Draw curves and write them; without Vega say what to install, for the numbers are there."""
    from morphgraph.onnx_io import write_atomically

    try:
        write_atomically(path, draw(), overwrite=True)
    except UnsupportedError as error:
        warn(str(error))
        return False
    return True


def command_line() -> str:
    """The command that runs, as a person would repeat it."""
    return shlex.join(["morphgraph", *settings().arguments])
