"""How many channels a group must have: at least so many, or a multiple of a number.

Operators that choose k channels need k to choose from; kernels of fused attentions take sizes of
heads that are multiples of 8 or 16.
"""

from collections.abc import Mapping
from math import gcd, lcm

import numpy as np

from morphgraph.arrays import IntArray
from morphgraph.errors import PlanError
from morphgraph.graph import ChannelGraph, analysis
from morphgraph.onnx_io import escape


@analysis
def least_widths(graph: ChannelGraph) -> IntArray:
    """The least width of every group that is there at all, ``[groups]``; 1 where nothing asks.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> set(least_widths(graph).tolist())
    {1}
    """
    least = np.ones(len(graph.groups), dtype=np.int64)
    for vertex, count in graph.couplings.least.items():
        axis_class = int(graph.vertex_class[vertex])
        for index, per in graph.members_in(axis_class):
            asked = int(np.ceil((count - graph.fixed_size[axis_class]) / per))
            least[index] = max(least[index], min(asked, graph.groups[index].width))
    return least


@analysis
def multiples(graph: ChannelGraph) -> IntArray:
    """What the width of every group must be a multiple of, ``[groups]``; 1 where nothing asks.

    A group whose own width is none keeps that: what stands beside it makes up for the rest.
    """
    found = [1] * len(graph.groups)
    for vertex, number in graph.couplings.multiples.items():
        axis_class = int(graph.vertex_class[vertex])
        for index, per in graph.members_in(axis_class):
            found[index] = lcm(found[index], number // gcd(number, int(per)))
    widths = graph.widths.tolist()
    whole = [n if width % n == 0 else width for n, width in zip(found, widths, strict=True)]
    return np.array(whole, dtype=np.int64)


def require_sizes(
    graph: ChannelGraph, keep: Mapping[int, IntArray], added: Mapping[int, int]
) -> None:
    """Do nothing if all groups that are left have as many channels as operators ask for.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay.
        added: per group index how many are added.

    Raises:
        PlanError: names the group, and how many it needs.
    """
    least, pitch = least_widths(graph), multiples(graph)
    for index in sorted({*keep, *added}):
        group = graph.groups[index]
        width = len(keep.get(index, range(group.width))) + added.get(index, 0)
        if width % pitch[index]:
            raise PlanError(
                f"{group.id} '{escape(group.name)}': keeps {width} of {group.width} channels, but "
                f"the kernels of an attention take multiples of {pitch[index]}; keep such a number"
            )
    for index, kept in keep.items():
        if 0 < len(kept) < least[index]:
            group = graph.groups[index]
            raise PlanError(
                f"{group.id} '{escape(group.name)}': keeps {len(kept)} of {group.width} channels, "
                f"but the network chooses {least[index]} of them at a time; keep at least as many"
            )
