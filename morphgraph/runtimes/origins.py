"""Which nodes of a model a runtime's kernel computes.

A runtime fuses nodes, drops some and adds others, but it keeps the names of most values. What a
kernel computes is then what lies in the model between the values that it makes and those that other
kernels make: the walk goes back from the one to the others. Nodes that constants alone feed are no
part of it; the runtime has computed them beforehand.
"""

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from morphgraph.onnx_io import escape

_ENDLESS = sys.maxsize


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a model: its name and type, and the values that it reads and makes."""

    name: str
    op_type: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


class Nodes:
    """The nodes of a model's main graph that depend on its inputs, in topological order."""

    def __init__(self, graph: ir.Graph) -> None:
        """Read a graph."""
        fed = {value.name for value in graph.inputs if not value.is_initializer()}
        self.nodes: list[Node] = []
        self.makers: dict[str, int] = {}
        self.named: dict[str, int] = {}
        self.readers: dict[str, list[int]] = {}
        for node in graph:
            reads = tuple(name for name in _reads(node) if name in fed)
            if not reads:
                continue
            makes = tuple(value.name for value in node.outputs if value.name)
            fed.update(makes)
            for name in reads:
                self.readers.setdefault(name, []).append(len(self.nodes))
            self.makers.update(dict.fromkeys(makes, len(self.nodes)))
            for name in filter(None, (node.name, node_name(node))):
                self.named[name] = len(self.nodes)
            self.nodes.append(Node(node_name(node), node.op_type, reads, makes))

    def named_after(self, name: str) -> Node | None:
        """The node of a name, or of what stands before a slash in it: ``layer/MatMulAddFusion``.

        A node without a name goes by its result's.
        """
        while name:
            position = self.named.get(name, self.makers.get(name))
            if position is not None:
                return self.nodes[position]
            name = name.rpartition("/")[0]
        return None

    def behind(self, value: str, taken: Collection[str] = (), most: int = _ENDLESS) -> str:
        """The last value of a chain of nodes, each the only reader of the one before.

        It ends before a node that makes one of the values ``taken``, and after ``most`` nodes.
        """
        for _ in range(most):
            readers = self.readers.get(value, ())
            makes = self.nodes[readers[0]].makes if len(readers) == 1 else ()
            if len(makes) != 1 or makes[0] in taken:
                break
            value = makes[0]
        return value

    def between(self, ends: Collection[str], starts: Collection[str]) -> list[Node]:
        """The nodes that the values ``ends`` need, back to the values ``starts``, in order.

        An end may be a start too: it stops the walk from other ends only.
        """
        found: set[int] = set()
        ahead = [self.makers[end] for end in ends if end in self.makers]
        while ahead:
            position = ahead.pop()
            if position in found:
                continue
            found.add(position)
            ahead += [
                self.makers[name]
                for name in self.nodes[position].reads
                if name in self.makers and name not in starts
            ]
        return [self.nodes[position] for position in sorted(found)]


def layer_of(op_type: str, origins: Sequence[Node]) -> str:
    """The node that a kernel is for: the last of its own kind, else the last.

    >>> conv, relu = Node("conv1", "Conv", ("x",), ("a",)), Node("relu1", "Relu", ("a",), ("y",))
    >>> layer_of("FusedConv", [conv, relu]), layer_of("Subgraph", [conv, relu])
    ('conv1', 'relu1')
    """
    alike = [node for node in origins if node.op_type in op_type]
    return [*origins, *alike][-1].name if origins else ""


def node_name(node: ir.Node) -> str:
    """A node's name; where it has none, its first result's."""
    return escape(node.name or f"output '{node.outputs[0].name if node.outputs else ''}'")


def _reads(node: ir.Node) -> Iterator[str]:
    """The values that a node reads, those of its subgraphs included."""
    for value in node.inputs:
        if value is not None and value.name:
            yield value.name
    for attribute in node.attributes.values():
        for graph in subgraphs(attribute):
            for inner in graph:
                yield from _reads(inner)


def subgraphs(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    """The graphs that an attribute holds."""
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    if attribute.type == ir.AttributeType.GRAPHS:
        return tuple(attribute.as_graphs())
    return ()
