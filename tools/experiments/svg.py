"""An SVG file, and text on it."""

import html
from collections.abc import Sequence

_INK = "#14243c"


def svg_page(width: float, height: float, label: str, elements: Sequence[str]) -> str:
    """An SVG file of this size in pixels that needs no other file, nor a particular font.

    Args:
        width: of the page.
        height: of the page.
        label: what the picture shows, for those who hear it.
        elements: what stands on the page, from the back to the front.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif" '
        f'role="img" aria-label="{html.escape(label)}">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(elements)
        + "\n</svg>\n"
    )


def svg_text(
    x: float,
    y: float,
    text: str,
    size: float,
    *,
    anchor: str = "",
    weight: int | None = None,
    color: str = _INK,
    rotated: bool = False,
) -> str:
    """A line of text that begins at ``x``, or has its ``anchor`` there (``middle``, ``end``).

    >>> svg_text(16, 26.04, "a < b", 14, weight=600)
    '<text x="16" y="26.0" font-size="14" font-weight="600" fill="#14243c">a &lt; b</text>'
    """
    at_x, at_y = (str(v) if isinstance(v, int) else f"{v:.1f}" for v in (x, y))
    attributes: dict[str, str | float | None] = {
        "transform": f"rotate(-90 {at_x} {at_y})" if rotated else "",
        "x": at_x,
        "y": at_y,
        "text-anchor": anchor,
        "font-size": size,
        "font-weight": weight,
        "fill": color,
    }
    written = " ".join(f'{name}="{value}"' for name, value in attributes.items() if value)
    return f"<text {written}>{html.escape(text)}</text>"
