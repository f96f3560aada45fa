"""A model taken apart at some of its nodes, and run piece by piece.

What a later piece needs of the earlier ones, the values that are *live* at the cut between them, is
kept for all samples, in memory or in files, so that every node runs once however many cuts there
are.
"""

from collections.abc import Collection, Sequence

import onnx_ir as ir

from morphgraph.arrays import Arrays
from morphgraph.edit import array_of
from morphgraph.onnx_io import subgraphs
from morphgraph.onnx_io.runtime import session


def live_values(nodes: Sequence[ir.Node], cut: int, outputs: Collection[str]) -> list[str]:
    """Names of what is there before node ``cut`` and is needed by it, by later ones or at the end.

    What follows from constants alone is none of it, the outputs apart: it is computed where it is
    needed, from the constants that the model has then.

    Args:
        nodes: in topological order.
        cut: the number of the first node of the later piece.
        outputs: names of the graph's outputs.
    """
    later = nodes[cut:]
    made = {value.name for node in later for value in node.outputs}
    reached: set[ir.Value] = set()
    for node in nodes[:cut]:
        if any(value.is_graph_input() or value in reached for value in _read(node)):
            reached.update(node.outputs)
    read = (value for node in later for value in _read(node))
    needed = (v.name for v in read if v.name and (v in reached or v.is_graph_input()))
    return list(dict.fromkeys(name for name in (*needed, *outputs) if name not in made))


def _read(node: ir.Node) -> list[ir.Value]:
    """What a node reads of the graph that it stands in, its subgraphs included."""
    found = [value for value in node.inputs if value is not None]
    for graph in subgraphs(node):
        inner = [value for each in graph for value in _read(each)] + list(graph.outputs)
        own = {*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)}
        found += [value for value in inner if value not in own]
    return found


class Piece:
    """The part of a model between some values, ready to run.

    Args:
        model: the model; it is not changed.
        given: names of the values that are fed.
        wanted: names of those that are asked for; some may be among the given ones.
        threads: of ONNX Runtime.
    """

    def __init__(
        self, model: ir.Model, given: Sequence[str], wanted: Sequence[str], threads: int = 0
    ) -> None:
        self.wanted = list(dict.fromkeys(wanted))
        stored = model.graph.initializers
        constants = [n for n in self.wanted if n in stored and not stored[n].is_graph_input()]
        self.stored = {name: array_of(stored[name]) for name in constants}
        self.computed = [n for n in self.wanted if n not in given and n not in self.stored]
        self.session = None
        if self.computed:
            graph = ir.convenience.extract(model.graph, list(given), self.computed)
            part = ir.Model(graph, ir_version=model.ir_version)
            self.session = session(part, threads)
            self.fed = [source.name for source in self.session.get_inputs()]

    def run(self, arrays: Arrays) -> Arrays:
        """What is asked for, from what is given."""
        found: Arrays = {**self.stored}  # outputs that are constants
        if self.session is not None:
            results = self.session.run(self.computed, {name: arrays[name] for name in self.fed})
            found |= zip(self.computed, results, strict=True)
        return {name: found[name] if name in found else arrays[name] for name in self.wanted}
