"""Who reads how long a cache is: when its heads are gone another cache tells the same."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from morphgraph.graph import ChannelGraph, analysis
from morphgraph.ops import facts_of
from morphgraph.passes.canonical.caches import caches, of_same_lengths


@dataclass(frozen=True)
class Pasts:
    """The caches of a network.

    Attributes:
        values: by name the inputs that are caches.
        presents: names of the outputs that continue them.
        askers: by name of an input the nodes that read its sizes alone, by place.
        sizes: names of values that follow from sizes and weights alone, whatever the inputs hold.
    """

    values: Mapping[str, ir.Value]
    presents: frozenset[str]
    askers: Mapping[str, Sequence[int]]
    sizes: frozenset[str]

    def stand_in(self, past: str, gone: Collection[str]) -> str | None:
        """The first cache that is left and as long as one that is gone; ``None``: none is.

        Args:
            past: the name of the input that is gone.
            gone: names of values, all such inputs among them.
        """
        left = (name for name in self.values if name not in gone)
        one = self.values[past]
        return next((name for name in left if of_same_lengths(one, self.values[name])), None)


@analysis
def pasts(graph: ChannelGraph) -> Pasts:
    """The caches of a network, and who asks how long they are."""
    pairs, weights = caches(graph.model), graph.couplings.input_independent
    values = {value.name or "": value for value in graph.model.graph.inputs if value.name in pairs}
    askers: dict[str, list[int]] = {}
    sizes: set[str] = set()
    for op_index, op in enumerate(graph.ops):
        operands = [value.name or "" for value in op.ir.inputs if value is not None]
        operands = [name for name in (*operands, *op.captured) if name not in weights]
        asks = facts_of(op.ir).reads_sizes
        if asks or (operands and sizes.issuperset(operands) and op.opaque is None):
            sizes.update(value.name for value in op.ir.outputs if value.name)
        for name in operands if asks else ():
            if name in values:
                askers.setdefault(name, []).append(op_index)
    return Pasts(values, frozenset(pairs.values()), askers, frozenset(sizes))
