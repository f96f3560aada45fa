"""A model taken apart at some of its nodes, and run piece by piece.

What a later piece needs of the earlier ones, the values that are *live* at the cut between them, is
kept for all samples, in memory or in files, so that every node runs once however many cuts there
are.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from math import prod

import onnx_ir as ir

from morphgraph.arrays import Arrays
from morphgraph.edit import array_of
from morphgraph.onnx_io import subgraphs
from morphgraph.onnx_io.mapped import release_pages
from morphgraph.onnx_io.runtime import session
from morphgraph.passes.calibration.batches import Batches

#: Bytes of weights that one piece holds of a model that is too large to run as a whole.
PIECE_BYTES = 2**28


class Lifetimes:
    """From where to where each value of a graph is live.

    What follows from constants alone is none of it, the outputs apart: it is computed where it is
    needed, from the constants that the model has then.

    Args:
        nodes: of the graph, in topological order.
        outputs: names of the graph's outputs.

    >>> import numpy as np
    >>> from morphgraph.testing import model_from_text
    >>> model = model_from_text('''
    ... net (float[1,3] x) => (float[1,3] y) { a = Relu(x)  b = Neg(a)  y = Add(a, b) }''')
    >>> lifetimes = Lifetimes(list(model.graph), ["y"])
    >>> [lifetimes.at(cut) for cut in range(4)]
    [['x'], ['a'], ['a', 'b'], ['y']]
    """

    def __init__(self, nodes: Sequence[ir.Node], outputs: Collection[str]) -> None:
        self.nodes, self.outputs = nodes, outputs
        #: By name of a value that an input reaches the first cut at which it is there, and the
        #: last one behind which it is read.
        self._spans: dict[str, list[int]] = {}
        self._values: dict[str, ir.Value] = {}
        made: dict[str, int] = {}
        for number, node in enumerate(nodes):
            reached = False
            for value in values_read(node):
                name = value.name or ""
                if name and value.is_graph_input():
                    self._spans.setdefault(name, [0, 0])
                    self._values[name] = value
                if name in self._spans:
                    self._spans[name][1] = number
                    reached = True
            for value in node.outputs:
                name = value.name or ""
                made[name] = number + 1
                if name and reached:
                    self._spans[name] = [number + 1, number]
                    self._values[name] = value
        for name in outputs:  # constants among them are live from where they are made
            self._spans[name] = [made.get(name, 0), len(nodes)]

    def at(self, cut: int) -> list[str]:
        """Names of what is there before a node and is needed by it, by later ones or at the end.

        Args:
            cut: the number of the first node of the later piece.
        """
        return [name for name, (first, last) in self._spans.items() if first <= cut <= last]

    def behind(self, changed: Collection[str], cut: int) -> set[str]:
        """Those live at a cut that follow from the results of some nodes.

        Args:
            changed: names of the nodes.
            cut: as of :meth:`at`.
        """
        found: set[str] = set()
        for node in self.nodes[:cut]:
            if node.name in changed or any(value.name in found for value in values_read(node)):
                found.update(value.name or "" for value in node.outputs)
        return found.intersection(self.at(cut))

    def narrowest(self, first: int, last: int) -> int:
        """The cut between two at which the fewest numbers are live; sizes that are open count 1."""

        def numbers(cut: int) -> int:
            shapes = (self._values[n].shape for n in self.at(cut) if n in self._values)
            return sum(prod(n for n in shape or () if isinstance(n, int)) for shape in shapes)

        return min(range(last, first - 1, -1), key=numbers)


def values_read(node: ir.Node) -> list[ir.Value]:
    """What a node reads of the graph that it stands in, its subgraphs included."""
    found = [value for value in node.inputs if value is not None]
    for graph in subgraphs(node):
        inner = [value for each in graph for value in values_read(each)] + list(graph.outputs)
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
        change: what is done to the part before it runs; the model's tensors are not its own.
    """

    def __init__(
        self,
        model: ir.Model,
        given: Sequence[str],
        wanted: Sequence[str],
        threads: int = 0,
        change: Callable[[ir.Model], None] | None = None,
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
            part.meta.update(model.meta)
            if change is not None:
                change(part)
            self.session = session(part, threads)
            self.fed = [source.name for source in self.session.get_inputs()]
            self._weights = [v.const_value for v in graph.initializers.values()]

    def run(self, arrays: Arrays) -> Arrays:
        """What is asked for, from what is given."""
        found: Arrays = {**self.stored}  # outputs that are constants
        if self.session is not None:
            results = self.session.run(self.computed, {name: arrays[name] for name in self.fed})
            found |= zip(self.computed, results, strict=True)
        return {name: found[name] if name in found else arrays[name] for name in self.wanted}

    def through(self, kept: Batches) -> Batches:
        """What is asked for, of all batches; what was given is dropped, and so is the piece."""
        later = Batches()
        for arrays in kept:
            later.append(self.run(arrays))
        kept.close()
        self.close()
        return later

    def close(self) -> None:
        """Give back the memory of weights that were read from files."""
        if self.session is not None:
            self.session = None
            for tensor in self._weights:
                if tensor is not None:
                    release_pages(tensor)


def run_all(
    model: ir.Model, feeds: Iterable[Arrays], threads: int = 0, most: int = PIECE_BYTES
) -> Iterator[Arrays]:
    """What a model gives, batch by batch; feeds may hold more than it takes.

    Args:
        model: the model.
        feeds: its inputs.
        threads: of ONNX Runtime.
        most: bytes of weights that are looked at together. A model of more passes piece after
            piece, what is live between them in files.
    """
    outputs = [value.name or "" for value in model.graph.outputs]
    cuts = cuts_by_weight(model, most)
    if not cuts:
        running = session(model, threads)
        names = [output.name for output in running.get_outputs()]
        fed = {source.name for source in running.get_inputs()}
        for feed in feeds:
            given = {name: array for name, array in feed.items() if name in fed}
            yield dict(zip(names, running.run(names, given), strict=True))
        return
    nodes = list(model.graph)
    lifetimes = Lifetimes(nodes, outputs)
    kept, here = Batches(), lifetimes.at(0)
    for feed in feeds:
        kept.append({name: feed[name] for name in here if name in feed})
    for cut in cuts:
        ahead = lifetimes.at(cut)
        kept, here = Piece(model, here, ahead, threads).through(kept), ahead
    last = Piece(model, here, outputs, threads)
    for arrays in kept:
        yield last.run(arrays)
    kept.close()
    last.close()


def cuts_by_weight(model: ir.Model, most: int) -> list[int]:
    """Where a model is cut so that no piece holds more than some bytes of weights, if it can be."""
    sizes = [
        sum(
            value.const_value.nbytes
            for value in values_read(node)
            if value.is_initializer() and value.const_value is not None
        )
        for node in model.graph
    ]
    if sum(sizes) <= 2 * most:
        return []
    lifetimes = Lifetimes(list(model.graph), [value.name or "" for value in model.graph.outputs])
    cuts, start, total = [0], 0, 0
    for number, size in enumerate(sizes):
        if total + size > most and number > cuts[-1]:
            cuts.append(lifetimes.narrowest(max(start, cuts[-1] + 1), number))
            total = sum(sizes[cuts[-1] : number])
        total += size
        if total < most // 2:
            start = number + 1
    return cuts[1:]
