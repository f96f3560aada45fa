"""Pass ``numbers``: axes whose positions are numbered, and the axes that are read by these numbers.

A router ranks the experts of a mixture and gives their numbers (TopK, ArgMax). Scores and kernels
are read by them, or a mask is one where a position has that number. Where all who read the numbers
read such an axis, a position may go: the others are numbered anew, and the axes that are read lose
the same one. Where nobody reads them, only the largest elements are wanted.

Numbers move, and are joined with others. These must come from rankings, too: a number that is held
as a constant would point elsewhere afterwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from morphgraph.graph import GraphOp
from morphgraph.ops import facts_of

Indexed = Mapping[ir.Node, Mapping[int, int]]
"""By node and operand the factor at whose elements that operand's numbers point."""


@dataclass(frozen=True)
class Numbering:
    """Factors that are one axis, as far as numbers say.

    Attributes:
        ranked: whose elements are numbered; several where their numbers are joined.
        followers: at whose elements the numbers point.
    """

    ranked: tuple[int, ...]
    followers: tuple[int, ...]


def numberings(
    ops: Sequence[GraphOp], numbered: Mapping[int, Mapping[int, int]], indexed: Indexed
) -> list[Numbering]:
    """The numberings of which every reader is known.

    Args:
        ops: the network's operators.
        numbered: by operator, which of its results hold positions of which factor.
        indexed: who reads by numbers.
    """
    ranked = {
        ops[op_index].ir.outputs[result]: factor
        for op_index, results in numbered.items()
        for result, factor in results.items()
    }
    found: list[Numbering] = []
    visited: set[ir.Value] = set()
    for value in ranked:
        if value in visited:
            continue
        held_in, followers = _walk(value, ranked, indexed)
        visited |= held_in
        if followers is not None:
            sources = tuple(factor for v, factor in ranked.items() if v in held_in)
            found.append(Numbering(sources, tuple(sorted(followers))))
    return found


def _walk(
    start: ir.Value, ranked: Mapping[ir.Value, int], indexed: Indexed
) -> tuple[set[ir.Value], set[int] | None]:
    """All values that hold these numbers, and the factors that are read by them.

    ``None`` for the factors if others read the numbers, or it is not known where some come from.
    """
    seen, followers, known, pending = {start}, set[int](), True, [start]
    while pending:
        value = pending.pop()
        near: list[ir.Value] = []
        if value not in ranked:
            node = value.producer()
            operands = () if node is None else enumerate(node.inputs)
            near += [v for k, v in operands if v is not None and node and _passes(node, k)]
            known &= bool(near)
        known &= not value.is_graph_output()
        for use in value.uses():
            follower = indexed.get(use.node, {}).get(use.idx)
            if follower is not None:
                followers.add(follower)
            elif _passes(use.node, use.idx):
                near += use.node.outputs
            else:
                known &= facts_of(use.node).reads_sizes
        fresh = set(near) - seen
        seen |= fresh
        pending += fresh
    return seen, followers if known else None


def _passes(node: ir.Node, operand: int) -> bool:
    """Whether a node's results hold the numbers of an operand as they are."""
    facts = facts_of(node)
    return facts.joins or (operand == 0 and (facts.moves or facts.converts or facts.inert))
