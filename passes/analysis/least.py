"""How many channels a group must have: operators that choose k of them need k to choose from."""

from collections.abc import Mapping

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
    matrix = graph.per_channel
    for vertex, count in graph.couplings.least.items():
        axis_class = int(graph.vertex_class[vertex])
        start, stop = matrix.indptr[axis_class : axis_class + 2]
        for index, per in zip(matrix.indices[start:stop], matrix.data[start:stop], strict=True):
            asked = int(np.ceil((count - graph.fixed_size[axis_class]) / per))
            least[index] = max(least[index], min(asked, graph.groups[index].width))
    return least


def require_least(graph: ChannelGraph, keep: Mapping[int, IntArray]) -> None:
    """Do nothing if all groups that are left have channels enough.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay.

    Raises:
        PlanError: names the group, and how many it needs.
    """
    least = least_widths(graph)
    for index, kept in keep.items():
        if 0 < len(kept) < least[index]:
            group = graph.groups[index]
            raise PlanError(
                f"{group.id} '{escape(group.name)}': keeps {len(kept)} of {group.width} channels, "
                f"but the network chooses {least[index]} of them at a time; keep at least as many"
            )
