"""A picture of a report page, as a figure of Plotly's in JSON.

Colors are names of the page's own style (``"@before"``), which its script replaces by those of a
light or a dark page. Texts are escaped: names come from files that anybody may have written, and
Plotly reads some tags in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from morphgraph.onnx_io import escape
from morphgraph.report.tables import Table

BAR = 20
"""Pixels of a row of bars."""
COLORS = 8
"""Colors of groups in the page's style."""
LEGEND = {"orientation": "h", "y": 1, "yanchor": "top", "yref": "container"}


@dataclass(frozen=True)
class Figure:
    """A picture: its heading, what it shows in words, Plotly's data, and the same as a table."""

    key: str
    title: str
    says: str
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    table: Table

    @property
    def spec(self) -> str:
        """Data and layout as JSON within a script element, which no name in it can end early."""
        text = msgspec.json.encode({"data": self.data, "layout": self.layout}).decode()
        return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def plain_text(text: str) -> str:
    """A text that Plotly shows as it is: it knows tags and entities.

    >>> plain_text("<b>x</b> & y")
    '&lt;b&gt;x&lt;/b&gt; &amp; y'
    """
    return escape(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def short_label(text: str, most: int = 44) -> str:
    """A label that fits beside a bar: the end of a long name says most."""
    return text if len(text) <= most else "…" + text[1 - most :]
