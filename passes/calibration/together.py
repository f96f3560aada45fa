"""Pass ``together``: an order of a model's nodes in which peers stand beside each other.

Peers read one kernel (:func:`morphgraph.passes.calibration.readers.peers`), so that it can be
fitted when all of them have been reached, and none has been passed. Where what one gives reaches
another, by whichever way, over whichever other kernels (a block that runs several times), there is
no such order.
"""

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from scipy import sparse
from scipy.sparse import csgraph

from morphgraph.arrays import IntArray
from morphgraph.passes.calibration.readers import Reader
from morphgraph.passes.calibration.segments import values_read


def repeated(nodes: Sequence[ir.Node], found: Mapping[str, Reader]) -> frozenset[str]:
    """Names of the readers of which none stands beside its peers in any order.

    Args:
        nodes: of a model, in topological order.
        found: its readers.
    """
    tips, ends = _edges(nodes)
    families = _families(nodes, found)
    size = len(nodes)
    joined: IntArray = np.arange(size)
    for family in families.values():
        joined[family] = family[0]
    graph = sparse.coo_matrix((np.ones(len(tips)), (joined[tips], joined[ends])), (size, size))
    _, component = csgraph.connected_components(graph, directed=True, connection="strong")
    members = np.bincount(component[np.unique(joined)], minlength=component.max(initial=0) + 1)
    itself = {*joined[tips[joined[tips] == joined[ends]]].tolist()}
    again = [
        family
        for family in families.values()
        if members[component[family[0]]] > 1 or family[0] in itself
    ]
    return frozenset(nodes[place].name or "" for family in again for place in family)


def in_order(
    nodes: Sequence[ir.Node], found: Mapping[str, Reader], rank: Mapping[str, int]
) -> list[ir.Node]:
    """The nodes of a model in an order in which peers come one after the other.

    Args:
        nodes: in topological order.
        found: the readers; those of :func:`repeated` without peers.
        rank: of nodes by name, which come in this order as far as it goes; others come as soon as
            they can.
    """
    families = _families(nodes, found)
    family_of = {place: family for family in families.values() for place in family}
    tips, ends = _edges(nodes)
    waits = np.bincount(ends, minlength=len(nodes))
    behind: list[list[int]] = [[] for _ in nodes]
    for tip, end in zip(tips.tolist(), ends.tolist(), strict=True):
        behind[tip].append(end)
    ready = [(rank.get(nodes[k].name or "", -1), k) for k in np.flatnonzero(waits == 0).tolist()]
    heapq.heapify(ready)
    left = {family[0]: len(family) for family in families.values()}
    order: list[int] = []
    while ready:
        _, place = heapq.heappop(ready)
        family = family_of.get(place, [place])
        if place in family_of:
            left[family[0]] -= 1
            if left[family[0]]:
                continue
        order += family
        for follower in (each for member in family for each in behind[member]):
            waits[follower] -= 1
            if not waits[follower]:
                heapq.heappush(ready, (rank.get(nodes[follower].name or "", -1), follower))
    return [nodes[place] for place in order]


def _families(nodes: Sequence[ir.Node], found: Mapping[str, Reader]) -> dict[str, list[int]]:
    """By name of the first reader of a kernel the places of all."""
    families: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        reader = found.get(node.name or "")
        if reader is not None and reader.peers:
            families.setdefault(reader.peers[0], []).append(place)
    return families


def _edges(nodes: Sequence[ir.Node]) -> tuple[IntArray, IntArray]:
    """Which node reads what which node makes: places of makers, and of readers."""
    makers = {value: place for place, node in enumerate(nodes) for value in node.outputs}
    pairs = {
        (makers[value], place)
        for place, node in enumerate(nodes)
        for value in values_read(node)
        if value in makers
    }
    both = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]
