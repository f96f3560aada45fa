"""Axes of a picture: round numbers, and where they stand."""

import html
import math
from dataclasses import dataclass

_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 12, 54  # margins of a panel
_TICKS = 6  # wanted at most


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` with a tick at every ``step``."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, low: float, high: float) -> "Axis":
        """The axis from a round number below to one above, with a little room.

        >>> Axis.around(24.8, 100.0)
        Axis(low=20.0, high=120.0, step=20.0)
        >>> Axis.around(91.2, 91.2).ticks()
        [91.0, 91.2, 91.4]
        """
        room = (high - low) * 0.03 or 0.1
        low, high = low - room, high + room
        step = _round_step((high - low) / _TICKS)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(round(first * step, 10), round(last * step, 10), step)

    def ticks(self) -> list[float]:
        """Where a number is written."""
        count = round((self.high - self.low) / self.step)
        return [round(self.low + k * self.step, 10) for k in range(count + 1)]

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
            parts.append(_text(x, bottom + 18, f"{value:g}", "middle"))
        for value in self.up.ticks():
            y = self.y(value)
            parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="#e3e8ef"/>')
            parts.append(_text(left - 8, y + 4, f"{value:g}", "end"))
        parts.append(
            f'<path d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}" fill="none" '
            'stroke="#44546a"/>'
        )
        parts.append(_text((left + right) / 2, bottom + 40, across, "middle", 12.5))
        middle = (top + bottom) / 2
        turned = _text(self.corner[0] + 18, middle, up, "middle", 12.5)
        turn = f'<text transform="rotate(-90 {self.corner[0] + 18:.1f} {middle:.1f})"'
        parts.append(turned.replace("<text", turn, 1))
        return parts


def _text(x: float, y: float, words: str, anchor: str, size: float = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="#14243c">{html.escape(words)}</text>'
    )
