"""Branches that can go as a whole: of ``x + f(x)`` what computes ``f``.

A branch is what feeds one operand of a sum and nothing else, beside another operand that comes from
the same values. It goes when groups inside it keep no channel: what it adds is a constant then
(:mod:`morphgraph.passes.analysis.liveness`). Which groups these are is asked of the graph: one of
them where that does (the heads of an attention, the units of an MLP, the channels inside a
bottleneck), all of them where not (paths side by side), and those that stand on nothing after that.

Branches that come again and again in the same order form *blocks*: a block of a transformer is an
attention and an MLP.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from morphgraph.graph import ChannelGraph, GraphOp, analysis
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.deaths import operand_names, result_names
from morphgraph.passes.analysis.liveness import liveness, with_orphans
from morphgraph.passes.analysis.past import pasts

MOST_IN_A_BLOCK = 8


@dataclass(frozen=True)
class Branch:
    """A part of a residual network that can go as a whole.

    Attributes:
        name: of the layers in it, as a person would say it.
        groups: indices of the groups that die together.
        kind: the same number for branches of which the same operators do the work.
        values: by what it joins the rest: operands of sums that become constant.
        joins: indices of those sums.
        parts: the branches that a block consists of; itself where it is one branch.
    """

    name: str
    groups: tuple[int, ...]
    kind: int = 0
    values: tuple[str, ...] = ()
    joins: tuple[int, ...] = ()
    parts: tuple["Branch", ...] = field(default=(), repr=False)


@analysis
def branches(graph: ChannelGraph, mortal: frozenset[int]) -> tuple[Branch, ...]:
    """The branches of a network that can go, in its order.

    Args:
        graph: the lifted network.
        mortal: indices of the groups that may keep no channel.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> found = branches(graph, frozenset(g.index for g in graph.groups if g.resizable))
    >>> [branch.name for branch in found]
    ['blocks.0', 'blocks.1', 'blocks.2']
    """
    found: dict[frozenset[int], Branch] = {}
    kinds: dict[tuple[str, ...], int] = {}
    for join, value, inside in _residual(graph):
        groups = _dying(graph, value, inside, mortal)
        if groups and groups not in found:
            working = [graph.ops[k].ir.op_type for k in inside if graph.ops[k].macs]
            kind = tuple(working or [graph.ops[k].ir.op_type for k in inside])
            number = kinds.setdefault(kind, len(kinds))
            name = _name(graph, inside) or graph.groups[min(groups)].name
            found[groups] = Branch(name, tuple(sorted(groups)), number, (value,), (join,))
    return tuple(found.values())


def blocks(found: Sequence[Branch]) -> tuple[Branch, ...]:
    """What repeats in branches that stand one behind the other: blocks of several, or of one.

    Branches inside of another one are left out.
    """
    whole = [set(branch.groups) for branch in found]
    outer = [a for a, own in zip(found, whole, strict=True) if not any(own < b for b in whole)]
    made: list[Branch] = []
    place = 0
    while place < len(outer):
        size, count = _repeats([branch.kind for branch in outer[place:]])
        for _ in range(count):
            made.append(_joined(outer[place : place + size]))
            place += size
    return tuple(made)


def _repeats(kinds: Sequence[int]) -> tuple[int, int]:
    """How many of these kinds come again right behind, in the same order, and how many times."""
    for size in range(1, MOST_IN_A_BLOCK + 1):
        count = 1
        while list(kinds[count * size : (count + 1) * size]) == list(kinds[:size]):
            count += 1
        if count > 1:
            return size, count
    return 1, 1


def _joined(parts: Sequence[Branch]) -> Branch:
    if len(parts) == 1:
        return parts[0]
    groups = tuple(sorted({index for part in parts for index in part.groups}))
    name = _common([part.name for part in parts]) or " + ".join(part.name for part in parts)
    values = tuple(value for part in parts for value in part.values)
    joins = tuple(join for part in parts for join in part.joins)
    return Branch(name, groups, parts[0].kind, values, joins, tuple(parts))


def _residual(graph: ChannelGraph) -> Iterator[tuple[int, str, list[int]]]:
    """Sums, an operand of each, and the places of the nodes that serve that operand alone.

    Those where the other operands come from the same values as the nodes.
    """
    weights = graph.couplings.input_independent
    uses = _uses(graph)
    for op_index, op in enumerate(graph.ops):
        summed = [name for name in _summands(op) if name not in weights]
        if len(set(summed)) < 2:
            continue
        inside = {name: _serving(graph, name, uses) for name in dict.fromkeys(summed)}
        # Masks and lengths, which have no channels, serve everything, and relate nothing.
        sources = {
            name: {
                _node_of(graph, source)
                for source in {*_sources(graph, nodes), name}
                if _groups_of(graph, source)
            }
            for name, nodes in inside.items()
        }
        for name, nodes in inside.items():
            others = set().union(*(sources[other] for other in inside if other != name))
            if nodes and sources[name] & others:
                yield op_index, name, nodes


def _node_of(graph: ChannelGraph, value: str) -> str:
    """The first result of what makes a value: a sum and its norm may be results of one node."""
    maker = graph.makers.get(value)
    return value if maker is None else result_names(graph.ops[maker])[0]


def _summands(op: GraphOp) -> list[str]:
    """Names of the operands that an operator adds up, whatever it does to the sum."""
    facts = facts_of(op.ir)
    ports = range(len(op.ir.inputs)) if facts.adds else facts.summands
    operands = [op.ir.inputs[port] for port in ports if port < len(op.ir.inputs)]
    return [value.name for value in operands if value is not None and value.name]


@analysis
def _uses(graph: ChannelGraph) -> dict[str, int]:
    """By value how many nodes read it; an output is read from outside, too, but for a cache."""
    counts: dict[str, int] = {}
    for op in graph.ops:
        for name in set(operand_names(op)):
            counts[name] = counts.get(name, 0) + 1
    presents = pasts(graph).presents
    for value in graph.model.graph.outputs:
        if value.name not in presents:
            counts[value.name or ""] = counts.get(value.name or "", 0) + 1
    return counts


def _serving(graph: ChannelGraph, value: str, uses: dict[str, int]) -> list[int]:
    """Places of the nodes whose results reach the network's outputs by one reader of a value alone.

    In the network's order; none where others read the value, or what is made with it: of a norm
    that is fused with a sum both are results.
    """
    if uses[value] > 1 or value not in graph.makers:
        return []
    beside = result_names(graph.ops[graph.makers[value]])
    if any(uses.get(name) for name in beside if name != value):
        return []
    makers, found = graph.makers, {graph.makers[value]}
    read: dict[str, int] = {}  # by nodes that are found
    pending = [makers[value]]
    while pending:
        for name in set(operand_names(graph.ops[pending.pop()])):
            read[name] = read.get(name, 0) + 1
            maker = makers.get(name)
            if maker is None or maker in found:
                continue
            results = result_names(graph.ops[maker])
            if all(read.get(each, 0) == uses.get(each, 0) for each in results):
                found.add(maker)
                pending.append(maker)
    weights = graph.couplings.input_independent
    return sorted(k for k in found if not weights.issuperset(result_names(graph.ops[k])))


def _sources(graph: ChannelGraph, inside: Sequence[int]) -> set[str]:
    """What nodes read of the values that depend on an input, but for what they make themselves."""
    read = {name for k in inside for name in operand_names(graph.ops[k])}
    made = {name for k in inside for name in result_names(graph.ops[k])}
    return read - made - graph.couplings.input_independent


def _dying(
    graph: ChannelGraph, value: str, inside: Sequence[int], mortal: frozenset[int]
) -> frozenset[int]:
    """The groups that have to die for a value to become constant; none where that cannot be."""
    inner = _inner_groups(graph, inside, mortal)
    for dead in ([index] for index in inner) if len(inner) > 1 else ():
        if _silences(graph, dead, value):
            return with_orphans(graph, dead, mortal)
    if inner and _silences(graph, inner, value):
        return with_orphans(graph, inner, mortal)
    return frozenset()


def _silences(graph: ChannelGraph, dead: Sequence[int], value: str) -> bool:
    outcome = liveness(graph, dead)
    return outcome.refusal is None and value in outcome.constant


def _inner_groups(graph: ChannelGraph, inside: Sequence[int], mortal: frozenset[int]) -> list[int]:
    """Groups none of whose activations is made by other nodes, in the order of the nodes.

    A cache that they read belongs to them. Of groups that stand on weights alone, as inside of a
    fused operator, nobody else reads these.
    """
    counts: dict[int, int] = {}
    known = pasts(graph)
    for op_index in inside:
        op = graph.ops[op_index]
        own = [name for name in operand_names(op) if name in known.values]
        own = [name for name in own if op_index not in known.askers.get(name, ())]
        for name in (*own, *result_names(op)):
            for index in _groups_of(graph, name) & mortal:
                counts[index] = counts.get(index, 0) + 1
    everywhere, there = _activations(graph), set(inside)
    hidden = {k: ops for k, ops in _readers(graph).items() if not everywhere[k] and k in mortal}
    within = [k for k, ops in hidden.items() if ops <= there]
    return [k for k, count in counts.items() if count == everywhere[k]] + within


@analysis
def _readers(graph: ChannelGraph) -> dict[int, set[int]]:
    """By group the places of the nodes at which it stands on a weight."""
    found: dict[int, set[int]] = {}
    for edge in graph.couplings.edges:
        if edge.port >= 0 and graph.couplings.on_weight(edge):
            for index in graph.groups_on(edge.dim):
                found.setdefault(index, set()).add(edge.op_index)
    return found


@analysis
def _activations(graph: ChannelGraph) -> np.ndarray:
    """On how many values that depend on an input every group stands, ``[groups]``."""
    counts = np.zeros(len(graph.groups), dtype=np.int64)
    for name in graph.couplings.first_dim:
        if name not in graph.couplings.input_independent:
            counts[list(_groups_of(graph, name))] += 1
    return counts


def _groups_of(graph: ChannelGraph, value: str) -> frozenset[int]:
    first = graph.couplings.first_dim.get(value)
    if first is None:
        return frozenset()
    dims = range(first, first + len(graph.shapes[value]))
    return frozenset().union(*(graph.groups_on(dim) for dim in dims))


def _name(graph: ChannelGraph, inside: Sequence[int]) -> str:
    """What the layers that compute have in common: ``layers.3.mlp``."""
    layers = [graph.ops[k].layer for k in inside if graph.ops[k].macs]
    return _common(list(dict.fromkeys(layers)))


def _common(names: Sequence[str]) -> str:
    common: list[str] = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
