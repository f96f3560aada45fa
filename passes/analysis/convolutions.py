"""Convolutions, and at which widths ONNX Runtime computes them in blocks of channels.

Its layout of blocks (*nchwc*) holds blocks of 16 channels on processors with AVX-512, of 8 with
AVX2. Whether a convolution is computed there follows from its sizes (ONNX Runtime 1.20 to 1.32,
``core/optimizer/nchwc_transformer.cc``; the test beside reads it from optimized models):

===========  =================================================================
dense        it reads fewer channels than a block, or a multiple of 4
depthwise    it makes a multiple of 4
grouped      it reads and makes whole blocks in each of its groups
===========  =================================================================

Others are computed channel by channel, with a change of the layout before and behind. A depthwise
one takes about twice the time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.graph import ChannelGraph, analysis
from morphgraph.ops import facts_of
from morphgraph.passes.coupling.roles import roles

BLOCK = 16
"""Channels of a block in the widest layout."""
ALIGNED = 4
"""The layout is filled up where channels are a multiple of this."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution by the classes of its axes (numbers in ``ChannelGraph.vertex_class``).

    Attributes:
        name: of its node.
        reads, makes: the axes of channels before and behind.
        within: of a grouped one the channels that each group reads, and those that it makes.
        depthwise: every channel is read by itself.
        pointwise: its kernel has a single place.
        blocked: ONNX Runtime may compute it in blocks: it has two axes of space.
    """

    name: str
    reads: int
    makes: int
    within: tuple[int, ...]
    depthwise: bool
    pointwise: bool
    blocked: bool

    def fits_blocks(self, sizes: FloatArray) -> bool:
        """Whether it is computed in blocks where classes have these sizes, ``[classes]``."""
        if self.depthwise:
            return bool(sizes[self.makes] % ALIGNED == 0)
        if self.within:
            return all(sizes[each] % BLOCK == 0 for each in self.within)
        reads = float(sizes[self.reads])
        return reads < BLOCK or reads % ALIGNED == 0


@analysis
def convolutions(graph: ChannelGraph) -> tuple[Convolution, ...]:
    """The convolutions of a network, in its order; those without a stored kernel are left out.

    >>> from morphgraph.passes.lift import lift
    >>> from morphgraph.testing import model_from_text
    >>> graph = lift(model_from_text('''
    ... net (float[1,3,8,8] x, float[8,3,1,1] w, float[8,1,3,3] d) => (float[1,8,6,6] y) {
    ...     h = Conv(x, w)  y = Conv<group=8>(h, d) }'''))
    >>> [found.depthwise for found in convolutions(graph)]
    [False, True]
    """
    return tuple(_convolutions(graph))


def _convolutions(graph: ChannelGraph) -> Iterator[Convolution]:
    couplings, sums = graph.couplings, roles(graph.couplings).sums
    for op_index, op in enumerate(graph.ops):
        facts = facts_of(op.ir)
        if not facts.convolves:
            continue
        edges = graph.edges_of(op_index)
        # What stands on the kernel and on an image is a channel; a bias has no factor of its own.
        kernel = {edge.factor for edge in edges if couplings.on_weight(edge)}
        before = [e for e in edges if couplings.on_activation(e) and e.factor in kernel]
        behind = [e for e in edges if e.port < 0 and e.factor in kernel]
        if not before or not behind:
            continue
        wide = {e.factor for e in before if couplings.sizes[e.factor] > 1}
        summed = {factor for factor in wide if sums[factor]}
        parts = wide - summed
        made = {e.factor for e in behind} - parts
        within = tuple(int(graph.vertex_class[factor]) for factor in sorted(summed | made))
        places = next(
            graph.shapes[couplings.dims[e.dim].value][2:]
            for e in edges
            if couplings.on_weight(e) and e.factor in {each.factor for each in before}
        )
        rank = len(graph.shapes.get(couplings.dims[before[0].dim].value, ()))
        yield Convolution(
            op.name,
            int(graph.vertex_class[before[0].dim]),
            int(graph.vertex_class[behind[0].dim]),
            within if parts and summed else (),
            bool(parts) and not summed,
            prod(places) == 1,
            facts.blocked and rank == 4,
        )


def out_of_blocks(graph: ChannelGraph, widths: IntArray) -> list[Convolution]:
    """The convolutions that ONNX Runtime would compute outside of its layout of blocks.

    Args:
        graph: the network.
        widths: of its groups, ``[groups]``; convolutions of width 0 are gone.
    """
    sizes = graph.class_sizes(widths)
    return [
        each
        for each in convolutions(graph)
        if each.blocked and sizes[each.makes] > 0 and not each.fits_blocks(sizes)
    ]


def price_of_widths(graph: ChannelGraph, widths: IntArray) -> str | None:
    """What these widths cost in time, as a person would say it; ``None`` where that is nothing.

    Convolutions count that were in the layout of blocks, and are no more.
    """
    sizes = graph.class_sizes(graph.widths)
    found = [each for each in out_of_blocks(graph, widths) if each.fits_blocks(sizes)]
    if not found:
        return None
    depthwise = sum(each.depthwise for each in found)
    others = len(found) - depthwise
    counts = [f"{depthwise} depthwise"] * bool(depthwise) + [f"{others} other"] * bool(others)
    many = "s have widths" if len(found) > 1 else " has a width"
    twice = ", depthwise ones in about twice the time" if depthwise else ""
    return (
        f"{' and '.join(counts)} convolution{many} off the grid: ONNX Runtime computes these "
        f"outside of its blocked layout{twice}"
    )
