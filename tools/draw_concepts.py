"""Draws the pictures of ``docs/concepts.md``: a group, its cost, a plan, the check.

    python tools/draw_concepts.py

Names, widths and costs are those that the program gives for the small network of that page;
tests/test_docs.py holds the pictures up to date.
"""

from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path

import torch

import morphgraph as mg
from morphgraph.graph import ChannelGraph, Group
from morphgraph.plans import Plan
from morphgraph.testing.examples import image, residual_cnn

FOLDER = Path(__file__).parent.parent / "docs"
BUDGET = {"flops": "50%"}
BOX, CELL, MARKED, GONE = "#eef3fb", "#7ba3dc", "#f2c46d", "#e3e6ea"
INK, SOFT, LINE = "#14243c", "#44546a", "#33507a"
TALL = 46


@cache
def network() -> tuple[ChannelGraph, Plan]:
    """The network of the page, and its plan."""
    torch.manual_seed(0)
    graph = mg.lift(mg.export(residual_cnn(), (image(),), dynamic_batch=True))
    return graph, mg.plan(graph, BUDGET)


def text(
    x: float, y: float, words: str, size: float = 12, *, at: str = "start", weight: int = 400
) -> str:
    """A line of text; ``at`` says which of its ends stands at x."""
    ink = INK if size >= 12 else SOFT
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" '
        f'text-anchor="{at}" fill="{ink}">{escape(words)}</text>'
    )


def box(x: float, y: float, wide: float, words: str, below: str = "", fill: str = BOX) -> str:
    """A rounded box with one or two lines in its middle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{TALL}" rx="7" fill="{fill}" '
        f'stroke="{LINE}"/>'
        + text(x + wide / 2, y + (20 if below else 28), words, 12.5, at="middle", weight=600)
        + (text(x + wide / 2, y + 36, below, 10.5, at="middle") if below else "")
    )


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A line with a head."""
    return (
        f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{LINE}" stroke-width="1.4" '
        'fill="none" marker-end="url(#head)"/>'
    )


def cells(x: float, y: float, side: float, fills: list[str]) -> str:
    """A row of channels."""
    return "".join(
        f'<rect x="{x + place * side:g}" y="{y:g}" width="{side - 2:g}" height="{side - 2:g}" '
        f'rx="2" fill="{fill}"/>'
        for place, fill in enumerate(fills)
    )


def page(wide: float, tall: float, label: str, parts: Iterator[str]) -> str:
    """A picture, with what a screen reader says of it."""
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{LINE}"/></marker></defs>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {tall:g}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif" aria-label="{escape(label)}">',
            f'<rect width="{wide:g}" height="{tall:g}" fill="#ffffff"/>',
            head,
            *parts,
            "</svg>\n",
        ]
    )


def kept(group: Group, plan: Plan) -> list[bool]:
    """Per channel of a group whether it stays."""
    entry = plan.groups.get(group.id)
    if entry is None:
        return [True] * group.width
    return [any(a <= k < b for a, b in entry.keep) for k in range(group.width)]


def coupling() -> str:
    """One group: who makes its channels, who reads them, and which of them go."""
    graph, plan = network()
    group = next(group for group in graph.groups if group.width == 16 and len(group.producers) > 1)
    tall = 62 * max(len(group.producers), len(group.readers)) + 60

    def parts() -> Iterator[str]:
        yield text(20, 26, "make the channels", 10.5) + text(700, 26, "read the channels", 10.5)
        yield text(255, 26, f"group {group.id}: {group.width} channels that go one by one", 10.5)
        middle = tall / 2 + 8
        for k, name in enumerate(group.producers):
            top = 42 + 62 * k
            yield box(20, top, 150, name) + arrow(172, top + TALL / 2, 250, middle)
        for k, name in enumerate(group.readers):
            top = 42 + 62 * k
            yield arrow(652, middle, 696, top + TALL / 2) + box(700, top, 180, name)
        marks = [CELL if stays else GONE for stays in kept(group, plan)]
        yield cells(255, middle - 12, 24.5, marks)
        yield text(255, middle + 34, "blue stays, grey goes: from every maker and reader at once")

    return page(900, tall, "The makers and readers of one group of channels", parts())


def squares() -> str:
    """What a layer costs: the product of two widths, so that halves make a quarter."""
    graph, _ = network()
    layers = mg.cost(graph, "macs").by_layer
    half = mg.apply(graph, mg.uniform(graph, 0.5), verify=False)
    name = "blocks.0.conv2"
    before, after = layers[name], mg.cost(mg.lift(half), "macs").by_layer[name]

    def parts() -> Iterator[str]:
        side = 13
        for row in range(16):
            stays = [MARKED if row < 8 and k < 8 else BOX for k in range(16)]
            yield cells(120, 40 + row * side, side, stays)
        yield text(120, 30, "16 channels in") + text(28, 150, "16 channels") + text(28, 166, "out")
        yield text(370, 90, f"{name}: a kernel between every pair", 13, weight=600)
        yield text(370, 116, f"as it is: {before:,.0f} multiply-adds")
        yield text(370, 140, f"both widths halved: {after:,.0f}, {after / before:.0%} of them")
        yield text(370, 168, "Costs are exact products of widths. What a channel saves", 12)
        yield text(370, 186, "depends on how wide its neighbours are by then.", 12)

    return page(900, 262, "Half the width is a quarter of the arithmetic", parts())


def widths() -> str:
    """A plan: the width of every group before and after."""
    graph, plan = network()
    largest = max(group.width for group in graph.groups)
    tall = 30 * len(graph.groups) + 60

    def parts() -> Iterator[str]:
        yield text(20, 26, "group", 10.5) + text(260, 26, "channels: blue stays, grey goes", 10.5)
        for k, group in enumerate(graph.groups):
            y, stays = 40 + 30 * k, sum(kept(group, plan))
            scale = 430 / largest
            yield text(20, y + 15, f"{group.id}  {group.name}")
            for count, fill in ((group.width, GONE), (stays, CELL)):
                ground = fill if group.resizable else "#b9c1cc"
                yield (
                    f'<rect x="260" y="{y}" width="{count * scale:g}" height="20" rx="3" '
                    f'fill="{ground}"/>'
                )
            says = f"{group.width} -> {stays}" if group.resizable else f"{group.width}, stays: "
            says += "" if group.resizable else str(group.reason)
            yield text(260 + group.width * scale + 8, y + 15, says, 11)
        cost = plan.cost["flops"]
        yield text(20, tall - 8, f"FLOPs left: {cost.after / cost.before:.1%}", 12, weight=600)

    return page(900, tall, "Widths of all groups before and after a plan", parts())


def check() -> str:
    """The masked original and the resized network must give the same."""

    def parts() -> Iterator[str]:
        yield box(20, 78, 120, "same inputs", "random, or yours")
        yield box(230, 24, 290, "original, removed channels masked", "their weights do not count")
        yield box(230, 132, 290, "resized network", "they are not there")
        yield box(640, 78, 200, "equal outputs?", "and values inside", MARKED)
        yield arrow(142, 96, 226, 50) + arrow(142, 106, 226, 152)
        yield arrow(522, 48, 636, 94) + arrow(522, 156, 636, 108)
        yield text(640, 150, "no: nothing is written", 12)

    return page(
        900, 200, "The check compares the masked original with the resized network", parts()
    )


def drawings() -> dict[str, str]:
    """The text of every picture by its file's name."""
    drawn = {"coupling": coupling, "cost": squares, "widths": widths, "check": check}
    return {f"concept-{name}.svg": draw() for name, draw in drawn.items()}


if __name__ == "__main__":
    for name, drawing in drawings().items():
        (FOLDER / name).write_text(drawing, encoding="utf-8")
        print(f"docs/{name}")
