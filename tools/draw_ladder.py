"""Draws ``docs/ladder.svg``: one channel of a convolution, from a letter to kept positions.

The network is lifted and a plan made, so that every id in the picture is one that the program
gives. ``docs/architecture.md`` shows the picture, and tests/test_docs.py holds it up to date.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

import morphgraph as mg
from morphgraph.arrays import IntArray
from morphgraph.graph import ChannelGraph, Dim, OpFactor
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.testing import model_from_text

PAGE = Path(__file__).parent.parent / "docs" / "ladder.svg"
TEXT = """<ir_version: 10, opset_import: ["": 20]>
net (float[1,3,2,2] x, float[4,3,1,1] w1, float[5,16] w2) => (float[1,5] y) {
  a = Conv(x, w1)
  f = Flatten(a)
  y = Gemm<transB=1>(f, w2)
}"""
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


def cells(x: float, y: float, labels: Sequence[object], marked: Iterable[int], gone: str) -> str:
    """A row of numbered boxes; marked ones are coloured, or struck out where they are gone."""
    chosen = set(marked)
    parts = []
    for place, label in enumerate(labels):
        left = x + place * CELL
        fill = (GONE if gone else MARKED) if place in chosen else PLAIN
        parts.append(
            f'<rect x="{left:g}" y="{y:g}" width="{CELL}" height="{CELL}" fill="{fill}" '
            f'stroke="#33507a" stroke-width="0.8"/>'
            f'<text x="{left + CELL / 2:g}" y="{y + 13:g}" font-size="9.5" text-anchor="middle" '
            f'fill="{INK}">{label}</text>'
        )
        if gone and place in chosen:
            parts.append(f'<path d="M{left:g} {y + CELL:g}l{CELL} -{CELL}" stroke="#a33"/>')
    return "".join(parts)


def rungs(graph: ChannelGraph) -> list[tuple[str, str, str, str]]:
    """Name, explanation, source, and drawing (relative to 0, 0) of every form."""
    vertices = [*graph.couplings.dims, *graph.couplings.factors]
    vertex = vertices.index(OpFactor("Conv_a", "o"))
    dims = [vertices.index(Dim(*axis)) for axis in (("a", 1), ("w1", 0), ("f", 1), ("w2", 1))]
    small, large = (int(graph.vertex_class[dims[k]]) for k in (0, 2))
    atoms = {c: np.arange(*graph.class_start[c : c + 2]) for c in (small, large)}
    group = graph.group("Conv_a")
    channel = int(group.channels[CHANNEL])
    members = {c: np.flatnonzero(graph.atom_channel[atoms[c]] == channel) for c in atoms}
    keep = {group.index: np.delete(np.arange(group.width), CHANNEL)}
    kept = AxisSelection(graph, keep)
    plan = {
        value: np.setdiff1d(np.arange(graph.couplings.sizes[dim]), stays)
        for value, dim in (("w1", dims[1]), ("w2", dims[3]))
        if (stays := kept.vertex(dim)) is not None
    }
    named = f"{graph.couplings.sizes[vertex]} elements; on axis 0 of w1 and axis 1 of a"
    joined = ", ".join(f"{name}.{axis}" for name, axis in (("a", 1), ("w1", 0)))
    flat = ", ".join(f"{name}.{axis}" for name, axis in (("f", 1), ("w2", 1)))
    pairs = {c: [f"{p}" for p in range(len(atoms[c]))] for c in atoms}

    def two(y: float, gone: str = "", at: dict[int, IntArray] | None = None) -> str:
        at = at or members
        return cells(LEFT, y, pairs[small], at[small], gone) + cells(
            RIGHT, y, pairs[large], at[large], gone
        )

    return [
        ("1  letter", "in an operator's line", "ops/contraction.py",
         code(0, 22, "Conv   N i *S, o i *K, o -> N o *T")
         + code(0, 42, "the letter o: output channels", ink=SOFT)),
        ("2  Factor", "a letter bound to sizes", "ops/description.py: from_line",
         code(0, 22, f"o: {named}")),
        ("3  vertex id", "one numbering, dims first", "coupling/couple.py",
         code(0, 22, f"vertex {vertex} = OpFactor('Conv_a', 'o')")
         + code(0, 42, "edges to " + ", ".join(
               f"{d} = {graph.couplings.dims[d].value}.{graph.couplings.dims[d].axis}"
               for d in sorted(dims[:2])), ink=SOFT)),
        ("4  class", "vertices joined by identity maps", "coupling/factorize_axes.py",
         code(0, 22, f"class {small} ∋ {joined}, Conv_a.o, Flatten_f.f0")
         + code(0, 42, f"class {large} ∋ {flat}, Gemm_y.i", ink=SOFT)),
        ("5  atom", "a position of a class", "graph.py: class_start",
         code(0, 24, f"class {small}") + code(RIGHT - 62, 24, f"class {large}") + two(10, at={
             small: np.array([CHANNEL]), large: np.zeros(0, np.int64)})),
        ("6  channel", "atoms that the other maps tie", "coupling/group.py",
         code(0, 24, f"class {small}") + code(RIGHT - 62, 24, f"class {large}") + two(10)
         + code(0, 48, f"channel {channel} = atom {CHANNEL} of class {small} and atoms "
                        f"{members[large][0]} to {members[large][-1]} of class {large}", ink=SOFT)),
        ("7  group", "channels with equal members", "coupling/group.py",
         code(0, 22, f"{group.id} '{group.name}': channels {', '.join(map(str, group.channels))}")
         + code(0, 42, "per channel: " + ", ".join(
             f"{m.per_channel} of {m.value}.{m.axis}" for m in group.members), ink=SOFT)),
        ("8  kept positions", "what the plan leaves of an axis", "analysis/selection.py",
         code(0, 24, "w1.0") + code(RIGHT - 62, 24, "w2.1")
         + two(10, "gone", {small: plan["w1"], large: plan["w2"]})
         + code(0, 48, f"plan: {group.id} keeps [[0, 1], [2, 4]]", ink=SOFT)),
    ]  # fmt: skip


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
