"""Draws ``docs/ladder.svg``: one channel of a convolution, from a letter to kept positions.

The network is lifted and a plan made, so that every id in the picture is one that the program
gives. ``docs/architecture.md`` shows the picture, and tests/test_docs.py holds it up to date.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

import morphgraph as mg
from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph, OpFactor
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.testing import model_from_text

PAGE = Path(__file__).parent.parent / "docs" / "ladder.svg"
TEXT = """<ir_version: 10, opset_import: ["": 20]>
net (float[1,3,2,2] x, float[4,3,1,1] w1, float[5,16] w2) => (float[1,5] y) {
  a = Conv(x, w1)
  f = Flatten(a)
  y = Gemm<transB=1>(f, w2)
}"""
AXES = (("a", 1), ("w1", 0), ("f", 1), ("w2", 1))
CHANNEL = 1  # the one that is marked, and that the plan removes
WIDTH, ROW, CELL = 960, 74, 19
LEFT, RIGHT = 62, 240  # of the two rows of boxes
PLAIN, MARKED, GONE, INK, SOFT = "#f3f6fb", "#f2c46d", "#e3e6ea", "#14243c", "#44546a"


def text(
    x: float, y: float, words: str, size: float = 11, *, weight: int = 400, ink: str = INK
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" fill="{ink}">'
        f"{escape(words)}</text>"
    )


def code(x: float, y: float, words: str, *, ink: str = INK) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="11.5" font-family="Menlo, Consolas, monospace" '
        f'fill="{ink}" xml:space="preserve">{escape(words)}</text>'
    )


def cells(x: float, count: int, chosen: Iterable[int], cut: bool) -> str:
    """A row of numbered boxes; the chosen ones are coloured, or struck out where they are cut."""
    marked, parts = set(chosen), []
    for place in range(count):
        left, fill = x + place * CELL, PLAIN
        if place in marked:
            fill = GONE if cut else MARKED
        parts.append(
            f'<rect x="{left:g}" y="10" width="{CELL}" height="{CELL}" fill="{fill}" '
            f'stroke="#33507a" stroke-width="0.8"/>'
            f'<text x="{left + CELL / 2:g}" y="23" font-size="9.5" text-anchor="middle" '
            f'fill="{INK}">{place}</text>'
        )
        if cut and place in marked:
            parts.append(f'<path d="M{left:g} {10 + CELL}l{CELL} -{CELL}" stroke="#a33"/>')
    return "".join(parts)


def rungs(graph: ChannelGraph) -> list[tuple[str, str, str, str]]:
    """Name, explanation, source, and drawing (relative to 0, 0) of every form."""
    vertex = [*graph.couplings.dims, *graph.couplings.factors].index(OpFactor("Conv_a", "o"))
    axes = {f"{name}.{k}": graph.dim(name, k) for name, k in AXES}
    small, large = (int(graph.vertex_class[axes[name]]) for name in ("w1.0", "w2.1"))
    group = graph.group("Conv_a")
    channel = int(group.channels[CHANNEL])
    mine = {name: np.flatnonzero(graph.channels_of(dim) == channel) for name, dim in axes.items()}
    kept = AxisSelection(graph, {group.index: np.delete(np.arange(group.width), CHANNEL)})
    gone = {name: removed(graph, kept, dim) for name, dim in axes.items()}

    def in_class(axis_class: int) -> str:
        return ", ".join(
            name for name, dim in axes.items() if graph.vertex_class[dim] == axis_class
        )

    def rows(left: Iterable[int], right: Iterable[int], labels: tuple[str, str], cut: bool) -> str:
        """The positions of the two classes side by side."""
        sizes = [int(graph.couplings.sizes[axes[name]]) for name in ("w1.0", "w2.1")]
        return (
            code(0, 24, labels[0])
            + cells(LEFT, sizes[0], left, cut)
            + code(RIGHT - LEFT, 24, labels[1])
            + cells(RIGHT, sizes[1], right, cut)
        )

    classes = f"class {small}", f"class {large}"
    size = graph.couplings.sizes[vertex]
    edges = ", ".join(f"{axes[name]} = {name}" for name in ("a.1", "w1.0"))
    per_channel = ", ".join(f"{m.per_channel} of {m.value}.{m.axis}" for m in group.members)
    first, last = mine["w2.1"][0], mine["w2.1"][-1]
    tied = f"atom {CHANNEL} of class {small} and atoms {first} to {last} of class {large}"
    numbers = ", ".join(map(str, group.channels))
    return [
        (
            "1  letter", "in an operator's line", "ops/contraction.py",
            code(0, 22, "Conv   N i *S, o i *K, o -> N o *T")
            + code(0, 42, "the letter o: output channels", ink=SOFT),
        ),
        (
            "2  Factor", "a letter bound to sizes", "ops/description.py: from_line",
            code(0, 22, f"o: {size} elements; on axis 0 of w1 and axis 1 of a"),
        ),
        (
            "3  vertex id", "one numbering, dims first", "coupling/couple.py",
            code(0, 22, f"vertex {vertex} = OpFactor('Conv_a', 'o')")
            + code(0, 42, f"edges to {edges}", ink=SOFT),
        ),
        (
            "4  class", "vertices joined by identity maps", "coupling/factorize_axes.py",
            code(0, 22, f"class {small} \u220b {in_class(small)}, Conv_a.o, Flatten_f.f0")
            + code(0, 42, f"class {large} \u220b {in_class(large)}, Gemm_y.i", ink=SOFT),
        ),
        ("5  atom", "a position of a class", "graph.py: class_start",
         rows([CHANNEL], [], classes, False)),
        (
            "6  channel", "atoms that the other maps tie", "coupling/group.py",
            rows(mine["w1.0"], mine["w2.1"], classes, False)
            + code(0, 48, f"channel {channel} = {tied}", ink=SOFT),
        ),
        (
            "7  group", "channels with equal members", "coupling/group.py",
            code(0, 22, f"{group.id} '{group.name}': channels {numbers}")
            + code(0, 42, f"per channel: {per_channel}", ink=SOFT),
        ),
        (
            "8  kept positions", "what the plan leaves of an axis", "analysis/selection.py",
            rows(gone["w1.0"], gone["w2.1"], ("w1.0", "w2.1"), True)
            + code(0, 48, f"plan: {group.id} keeps [[0, 1], [2, 4]]", ink=SOFT),
        ),
    ]  # fmt: skip


def removed(graph: ChannelGraph, kept: AxisSelection, dim: int) -> IntArray:
    """Positions of an axis that do not stay."""
    stay = kept.vertex(dim)
    assert stay is not None
    return np.setdiff1d(np.arange(graph.couplings.sizes[dim]), stay)


def drawing() -> str:
    graph = mg.lift(model_from_text(TEXT))
    rows = rungs(graph)
    height = 40 + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="Eight forms of one '
        'channel: letter, factor, vertex id, class, atom, channel, group, kept positions">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text(24, 26, "a = Conv(x, w1)   f = Flatten(a)   y = Gemm(f, w2): channel 1 of the Conv",
             13, weight=600),
    ]  # fmt: skip
    for place, (name, explanation, source, picture) in enumerate(rows):
        y = 40 + place * ROW
        parts += [
            f'<line x1="24" y1="{y}" x2="{WIDTH - 24}" y2="{y}" stroke="#cdd5e0"/>',
            text(24, y + 24, name, 13.5, weight=600),
            text(24, y + 42, explanation, ink=SOFT),
            text(24, y + 58, source, 10, ink="#33507a"),
            f'<g transform="translate(268 {y + 6})">{picture}</g>',
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PAGE.write_text(drawing(), encoding="utf-8")
    print(f"wrote {PAGE}")
