"""Which operators and values are eliminated, or become constant, when whole groups of channels go.

With the groups that keep no channel, every axis has a new size, and factor notation alone decides:

- a value with an axis of size 0 is *empty*, and a node all of whose results are empty is gone;
- where an operand is empty and the result is not, its empty factor is summed over: the result is
  *constant*, what the operator gives for zeros (a bias);
- or it is a segment of the result's axis (a concatenation): the operand goes, the others stay;
- or the operator averages, normalizes or competes over it, and a mean over nothing is *undefined*.

A node that computes with constants alone is constant too, and so is what multiplies by zeros: the
shares by which a router weights experts that sum over nothing. What nobody reads any more goes. A
removal is refused where an output of the graph would be constant, undefined or empty. A cache is no
such output: it goes with its heads, and so does the input that it continues.
"""

from collections.abc import Iterable, Mapping, Sequence, Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from morphgraph.errors import PlanError
from morphgraph.graph import ChannelGraph, analysis
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.deaths import (
    Deaths,
    operand_names as operand_names,
    passes,
    result_names as result_names,
)
from morphgraph.passes.analysis.past import pasts

_REMEMBERED = 64  # results per graph; a removal path asks for the same sets again and again
_BASES = 4  # of these so many, the latest, are looked at for one from which little is left to do


@dataclass(frozen=True)
class Liveness:
    """What stays and what goes when some groups keep no channel.

    Attributes:
        state: the network after these deaths; not to be changed.
        refusal: why no network would be left; ``None``: this removal is possible.
    """

    state: Deaths = field(repr=False)
    refusal: str | None = None

    @property
    def graph(self) -> ChannelGraph:
        """The network."""
        return self.state.graph

    @property
    def dead(self) -> frozenset[int]:
        """Indices of the groups that keep no channel."""
        return self.state.dead

    @property
    def empty(self) -> AbstractSet[str]:
        """Values with an axis of size 0."""
        return self.state.empty

    @property
    def constant(self) -> AbstractSet[str]:
        """Values that depend on no graph input any more, weights and empty ones apart."""
        return self.state.constant

    @property
    def zero(self) -> AbstractSet[str]:
        """Those among them that are zero whatever the inputs are."""
        return self.state.zero

    @property
    def live(self) -> AbstractSet[int]:
        """Places of the nodes that stay, in ``graph.ops``."""
        return self.state.live

    @property
    def bias_only(self) -> AbstractSet[int]:
        """Places of the nodes that sum over nothing: what they give for zeros is constant."""
        return self.state.bias_only

    @property
    def folded(self) -> AbstractSet[int]:
        """Places of the nodes that compute with constants alone."""
        return self.state.folded

    @property
    def dropped(self) -> Mapping[int, tuple[int, ...]]:
        """Per node the operands that go while it stays."""
        return self.state.dropped

    @property
    def vanished_values(self) -> AbstractSet[str]:
        """Results and initializers that are no longer there (inputs and outputs stay)."""
        return self.state.vanished

    @property
    def passed_through(self) -> AbstractSet[str]:
        """Results that equal an operand, now that one part is left: of a concatenation, a split."""
        return self.state.passed

    @property
    def gone_outputs(self) -> AbstractSet[str]:
        """Outputs that are caches without heads; the inputs that they continue are empty."""
        return pasts(self.graph).presents & self.empty

    def stand_in(self, past: str) -> str | None:
        """A cache that is left and as long as one that is gone."""
        return pasts(self.graph).stand_in(past, self.empty)

    @property
    def orphaned_groups(self) -> AbstractSet[int]:
        """Other groups that stand on nothing that is left: constant there, or unread."""
        return self.state.orphaned

    def passes(self, op_index: int) -> bool:
        """Whether a node has one segment left, so that it does nothing."""
        return passes(self.state, op_index)

    @cached_property
    def removed_layers(self) -> tuple[str, ...]:
        """Names of the layers all of whose nodes are gone, in the model's order."""
        layers: dict[str, bool] = {}
        for op_index, op in enumerate(self.graph.ops):
            layers[op.layer] = layers.get(op.layer, True) and op_index not in self.live
        return tuple(layer for layer, gone in layers.items() if gone)


def liveness(graph: ChannelGraph, dead: Iterable[int]) -> Liveness:
    """What becomes of every node and value when these groups keep no channel.

    Args:
        graph: the lifted network.
        dead: indices of groups.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> inside = next(group for group in graph.groups if len(group.producers) == 1)
    >>> liveness(graph, [inside.index]).refusal is None
    True
    """
    key = frozenset(dead)
    known = _remembered(graph)
    if key not in known:
        none = known[frozenset()]
        latest = [none, *islice(reversed(known.values()), _BASES)]
        base = max((each for each in latest if each.dead <= key), key=lambda each: len(each.dead))
        state = base.state.after(key)
        if len(known) >= _REMEMBERED:
            known.clear()
            known[none.dead] = none
        known[base.dead] = known.pop(base.dead, base)  # the next question may begin there, too
        known[key] = Liveness(state, _refusal(state))
    return known[key]


@analysis
def _remembered(graph: ChannelGraph) -> dict[frozenset[int], Liveness]:
    none = Deaths.none(graph)
    return {none.dead: Liveness(none, _refusal(none))}


def _refusal(state: Deaths) -> str | None:
    presents = pasts(state.graph).presents
    for value in state.graph.model.graph.outputs:
        name = value.name or ""
        if name in presents and name in state.empty:
            continue
        if name in state.undefined:
            return f"output '{name}' needs them: {state.undefined[name]}"
        if name in state.empty:
            return f"output '{name}' would have no channel"
        if name in state.constant and name not in state.graph.couplings.input_independent:
            return f"output '{name}' would no longer depend on any input"
    return None


def with_orphans(
    graph: ChannelGraph, dead: Iterable[int], allowed: Iterable[int]
) -> frozenset[int]:
    """Dead groups, and those of ``allowed`` that become useless with them."""
    removed, may = frozenset(dead), frozenset(allowed)
    while True:
        more = liveness(graph, removed).orphaned_groups & may
        grown = removed | more
        if not more or liveness(graph, grown).refusal is not None:
            return removed
        removed = grown


def is_viable(graph: ChannelGraph, dead: Iterable[int]) -> bool:
    """Whether a network is left when these groups keep no channel."""
    return liveness(graph, dead).refusal is None


def require_viable(graph: ChannelGraph, dead: Sequence[int]) -> None:
    """Do nothing if a network is left when these groups keep no channel.

    Raises:
        PlanError: names the group, and what would go with it.
    """
    refusal = liveness(graph, dead).refusal
    if refusal is None:
        return
    alone = [index for index in dead if not is_viable(graph, [index])]
    culprits = [graph.groups[index] for index in (alone or dead)[:3]]
    names = ", ".join(f"{group.id} '{escape(group.name)}'" for group in culprits)
    raise PlanError(f"width 0 of {names}: {escape(refusal)}; keep at least one channel")
