"""A report as one HTML file that needs no other: its script, style and data stand in it."""

from functools import cache
from importlib import resources

from jinja2 import Environment, FunctionLoader

from morphgraph.errors import UnsupportedError
from morphgraph.report.pages.facts import Facts
from morphgraph.report.pages.figures import figures
from morphgraph.version import __version__


def report_page(facts: Facts) -> str:
    """The page as text; the same facts give the same text.

    It asks for nothing over the network, and forbids its own script to. Names are escaped: they
    come from files that anybody may have written.

    Raises:
        UnsupportedError: Plotly is not installed.
    """
    return (
        _environment()
        .get_template("page.html")
        .render(
            facts=facts,
            figures=figures(facts),
            style=_part("page.css"),
            script=_part("page.js"),
            plotly=_plotly(),
            version=__version__,
        )
    )


def _part(name: str) -> str:
    """A file that stands beside this one."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UnsupportedError(
            "the pictures of a report need Plotly; install it with "
            "`pip install 'morphgraph[report]'`"
        ) from None
    return str(get_plotlyjs())


@cache
def _environment() -> Environment:
    return Environment(loader=FunctionLoader(_part), autoescape=True)
