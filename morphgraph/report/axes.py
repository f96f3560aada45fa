"""Pictures in SVG: a page, text on it, and panels with axes whose numbers are round."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 12, 54  # margins of a panel
_TICKS = 6  # wanted at most
_INK = "#14243c"


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` with a tick at every ``step``."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, low: float, high: float) -> "Axis":
        """An axis with a little room on both sides, and ticks at round numbers.

        >>> Axis.around(25.0, 100.0).ticks()
        [20.0, 40.0, 60.0, 80.0, 100.0]
        >>> Axis.around(91.2, 91.2).ticks()
        [91.0, 91.1, 91.2, 91.3, 91.4]
        """
        room = (high - low) * 0.08 or 0.2
        low, high = low - room, high + room
        return cls(low, high, _round_step((high - low) / _TICKS))

    def ticks(self) -> list[float]:
        """Where a number is written."""
        first = math.ceil(self.low / self.step - 1e-9)
        last = math.floor(self.high / self.step + 1e-9)
        return [round(k * self.step, 10) for k in range(first, last + 1)]

    def write(self, tick: float) -> str:
        """A tick's number, with as many digits as its neighbours.

        >>> Axis(98, 99.5, 0.25).write(99.5)
        '99.50'
        """
        digits = next(d for d in range(10) if round(self.step, d) == round(self.step, 9))
        return f"{tick:.{digits}f}"

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Frame:
    """A panel of a picture: its upper left corner, its size with labels, and its axes."""

    corner: tuple[float, float]
    size: tuple[float, float]
    across: Axis
    up: Axis

    def x(self, value: float) -> float:
        """Where a value stands from the left."""
        width = self.size[0] - _LEFT - _RIGHT
        return self.corner[0] + _LEFT + width * self.across.place(value)

    def y(self, value: float) -> float:
        """Where a value stands from the top."""
        height = self.size[1] - _TOP - _BOTTOM
        return self.corner[1] + _TOP + height * (1 - self.up.place(value))

    def draw(self, across: str, up: str) -> list[str]:
        """Grid, numbers and titles as elements of an SVG."""
        left, right = self.x(self.across.low), self.x(self.across.high)
        bottom, top = self.y(self.up.low), self.y(self.up.high)
        parts = []
        for value in self.across.ticks():
            x = self.x(value)
            parts.append(f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="#e3e8ef"/>')
            parts.append(svg_text(x, bottom + 18, self.across.write(value), 11, anchor="middle"))
        for value in self.up.ticks():
            y = self.y(value)
            parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="#e3e8ef"/>')
            parts.append(svg_text(left - 8, y + 4, self.up.write(value), 11, anchor="end"))
        parts.append(
            f'<path d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}" fill="none" '
            'stroke="#44546a"/>'
        )
        centre, middle, edge = (left + right) / 2, (top + bottom) / 2, self.corner[0] + 18.0
        parts.append(svg_text(centre, bottom + 40, across, 12.5, anchor="middle"))
        parts.append(svg_text(edge, middle, up, 12.5, anchor="middle", rotated=True))
        return parts


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
