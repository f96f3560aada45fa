"""Pass ``recount``: means that counted dead channels, and the weights that make up for it.

A norm divides by the root of a mean over channels. Channels that training has made zero add nothing
to the mean's sum, and are counted all the same; in the resized network they are not, so that the
mean over the 26 that are left of 48 is 48 / 26 times what it was, and what a LayerNorm gives is
smaller by the root of that. Here every such mean is followed to the weights that scale what comes
of it (a norm's scale, or the kernels that read it), which take the inverse.

What keeps the division from failing, the epsilon, is added to the mean, so it is multiplied like
the mean: then it is exact for root mean squares, whether in one node or written out. A LayerNorm
also subtracts a mean: it is exact where the channels that are left have a mean of zero, and near it
otherwise. Where something else reads the mean, its weights stay as they are.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar, cast

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import IntArray
from morphgraph.edit import array_of
from morphgraph.graph import ChannelGraph, GraphOp
from morphgraph.onnx_io import is_float
from morphgraph.ops import OpNode, facts_of
from morphgraph.passes.analysis.zeros import NONE, Groups, zeros

_EPSILON = 1e-3
"""What is added to a mean, and is at most so large, may stay as it is where it cannot change."""

Numbers = TypeVar("Numbers")


@dataclass(frozen=True, slots=True)
class Recount:
    """A parameter that makes up for a mean, or what is added to one, and what multiplies it.

    Attributes:
        parameter: its name, or that of a constant.
        factor: of what the network reads.
        offset: what the network adds to the parameter before (1 in Gemma's norms).
    """

    parameter: str
    factor: float
    offset: float = 0.0

    def of(self, numbers: Numbers) -> Numbers:
        """The parameter's new numbers, an array or a tensor of the same type.

        >>> Recount("scale", 2.0, 1.0).of(np.array([0.0, 0.5]))
        array([1., 2.])
        """
        changed: Any = cast("Any", numbers) * self.factor + (self.factor - 1) * self.offset
        return cast("Numbers", changed)


@dataclass(frozen=True, slots=True)
class Epsilon:
    """The attribute ``epsilon`` of a norm, and by what it is multiplied.

    Attributes:
        op_index: the norm's place among the operators.
        factor: of the attribute.
    """

    op_index: int
    factor: float


def recounts(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    trained: Collection[str],
    *,
    epsilons: bool = False,
) -> list[Recount | Epsilon]:
    """What makes up for channels that were zero, and are not counted any more.

    Args:
        graph: the lifted network, with the weights that are resized.
        keep: per group index the channels that stay, ascending; groups left out stay whole.
        trained: names of the parameters that may be changed.
        epsilons: whether constants that are added to means, and attributes, may be changed too.
    """
    return _Recounter(graph, keep, trained, epsilons).run()


class _OtherReaderError(Exception):
    """Something reads a mean, or what comes of it, that no weight scales."""


class _Recounter:
    def __init__(
        self,
        graph: ChannelGraph,
        keep: Mapping[int, IntArray],
        trained: Collection[str],
        epsilons: bool,
    ) -> None:
        self.graph = graph
        self.removed = ~graph.alive(keep)
        self.trained, self.epsilons = trained, epsilons
        self.weights = graph.couplings.input_independent
        self.readers: dict[str, list[tuple[int, int]]] = {}
        for op_index, op in enumerate(graph.ops):
            for port, value in enumerate(op.ir.inputs):
                if value is not None:
                    self.readers.setdefault(_name(value), []).append((op_index, port))
        self.outputs = {value.name for value in graph.model.graph.outputs}

    def run(self) -> list[Recount | Epsilon]:
        found: dict[int, list[Recount | Epsilon]] = {}
        for op_index, counted in self._counted().items():
            try:
                found[op_index] = list(self._made_up_for(op_index, counted))
            except _OtherReaderError:
                continue
        return self._agreed(found)

    def _agreed(self, found: dict[int, list[Recount | Epsilon]]) -> list[Recount | Epsilon]:
        """Those of which every reader asks the same; what a mean needs is done whole or not.

        But for small numbers that are added to several means: these may stay.
        """
        while True:
            asked: dict[str, list[Recount]] = {}
            for one in (one for each in found.values() for one in each):
                if isinstance(one, Recount):
                    asked.setdefault(one.parameter, []).append(one)
            wrong = {
                name
                for name, every in asked.items()
                if len(set(every)) > 1 or len(every) != len(self.readers[name])
            }
            small = {name for name in wrong if self._is_epsilon(name)}
            kept = {
                op_index: [one for one in each if _name_in(one) not in small]
                for op_index, each in found.items()
                if (wrong - small).isdisjoint(map(_name_in, each))
            }
            if not wrong:
                changed = (one for each in found.values() for one in each)
                return list(dict.fromkeys(changed))
            found = kept

    # -- which means counted channels that were zero -------------------------------------------

    def _counted(self) -> dict[int, float]:
        """Per operator that takes a mean which share of what it counted is still there."""
        edges = [
            edge
            for op_index, op in enumerate(self.graph.ops)
            if facts_of(op.ir).mean_power
            for edge in self.graph.edges_of(op_index)
            if self.graph.couplings.on_activation(edge)
            and self.graph.couplings.factor(edge.factor).name in op.statistical
            and self.removed[self.graph.channels_of(edge.factor)].any()
        ]
        zero = zeros(self.graph, self._killed(), nearly=True) if edges else {}
        by_op: dict[int, list[float]] = {}
        for edge in edges:
            elements = self._removed_of(edge.factor, zero.get(edge.dim, NONE))
            share = 1 - len(elements) / len(self.graph.channels_of(edge.factor))
            by_op.setdefault(edge.op_index, []).append(share)
        return {
            op_index: prod(shares)
            for op_index, shares in by_op.items()
            if all(shares) and any(share < 1 for share in shares)
        }

    def _removed_of(self, vertex: int, groups: Groups) -> IntArray:
        """Positions of an axis, or elements of a factor, that go with some groups."""
        channels = self.graph.channels_of(vertex)
        there = np.isin(self.graph.channel_group[channels], list(groups))
        return np.flatnonzero(self.removed[channels] & there)

    def _killed(self) -> dict[int, Groups]:
        """By axis of a weight the groups all of whose channels that go are zero there."""
        couplings, initializers = self.graph.couplings, self.graph.model.graph.initializers
        found: dict[int, Groups] = {}
        for edge in (edge for edges in couplings.edges_of_ops for edge in edges):
            dim = couplings.dims[edge.dim]
            value = initializers.get(dim.value)
            if value is None or value.const_value is None or edge.dim in found:
                continue
            if not is_float(value):  # a number of few bits is no zero where it is stored as one
                continue
            groups = Groups(
                group
                for group in self.graph.groups_on(edge.dim)
                if len(positions := self._removed_of(edge.dim, Groups((group,))))
                and not array_of(value).take(positions, dim.axis).any()
            )
            found[edge.dim] = groups
        return found

    # -- who scales what comes of them ---------------------------------------------------------

    def _made_up_for(self, op_index: int, counted: float) -> Iterable[Recount | Epsilon]:
        """What makes up for an operator's mean over ``counted`` of the channels of before."""
        op = self.graph.ops[op_index]
        facts = facts_of(op.ir)
        ratio = counted**-facts.mean_power
        own: list[Recount | Epsilon] = []
        if self.epsilons and facts.epsilon is not None:
            own.append(Epsilon(op_index, 1 / counted))
        if facts.scale is not None:
            found = self._weight(_name(op.ir.inputs[facts.scale]), 1 / ratio)
            if found is not None:
                return [*own, found]
            if facts.offset is not None and self._holds(op, facts.offset):
                raise _OtherReaderError
        return [*own, *self._behind(_name(op.ir.outputs[0]), ratio)]

    def _behind(self, value: str, ratio: float) -> list[Recount]:
        """The weights that scale a value which is ``ratio`` times what it was.

        Raises:
            _OtherReaderError: somebody else reads it.
        """
        if value in self.outputs:
            raise _OtherReaderError
        return [
            found
            for op_index, port in self.readers.get(value, ())
            for found in self._read(self.graph.ops[op_index], port, ratio)
        ]

    def _read(self, op: GraphOp, port: int, ratio: float) -> list[Recount]:
        if (powers := self._powers(op, port)) is None:
            raise _OtherReaderError
        added = self._added(op, port, ratio)
        ratio = ratio ** powers[port]
        for other, power in powers.items():
            value = op.ir.inputs[other]
            if other != port and value is not None and value.name in self.weights:
                found = self._weight(value.name, ratio ** (-1 / power))
                if found is not None:
                    return [found]
        if any(self._holds(op, other) for other in facts_of(op.ir).added_behind or ()):
            raise _OtherReaderError
        return [*added, *self._behind(_name(op.ir.outputs[0]), ratio)]

    def _added(self, op: GraphOp, port: int, ratio: float) -> list[Recount]:
        """The number that is added to a value, which is to be multiplied like it."""
        if not (self.epsilons and facts_of(op.ir).adds):
            return []
        return [Recount(_name(op.ir.inputs[1 - port]), ratio)]

    def _powers(self, op: GraphOp, port: int) -> Mapping[int, float] | None:
        """By operand the power of it that an operator's result is proportional to; None: to none.

        What is added behind a product is left out.
        """
        facts = facts_of(op.ir)
        powers: Mapping[int, float] = {}
        if facts.powers is not None:
            powers = facts.call(facts.powers, op.ir, OpNode(op.ir))
        elif facts.multiplies:
            powers = {0: 1.0, 1: 1.0}
        elif facts.added_behind is not None:
            ports = set(range(len(op.ir.inputs))) - set(facts.added_behind)
            powers = dict.fromkeys(sorted(ports), 1.0)
        elif facts.moves or facts.converts or facts.negates:
            powers = {0: 1.0}
        elif (
            facts.adds
            and len(op.ir.inputs) == 2
            and self._may_be_added(_name(op.ir.inputs[1 - port]))
        ):
            powers = {port: 1.0}
        return powers if port in powers else None

    def _may_be_added(self, name: str) -> bool:
        """Whether a mean with this added to it is still that mean, or becomes it."""
        return self._number(name) is not None if self.epsilons else self._is_epsilon(name)

    def _is_epsilon(self, name: str) -> bool:
        number = self._number(name)
        return number is not None and 0 <= number <= _EPSILON

    def _holds(self, op: GraphOp, port: int) -> bool:
        """Whether an operator has an operand there that is not zero."""
        value = op.ir.inputs[port] if port < len(op.ir.inputs) else None
        if value is None:
            return False
        return value.const_value is None or bool(array_of(value).any())

    def _weight(self, name: str, factor: float) -> Recount | None:
        """What multiplies a weight, a parameter or made of one, by a factor; None: nothing does."""
        stored = self.graph.model.graph.initializers.get(name)
        if stored is not None:
            able = name in self.trained and is_float(stored)
            return Recount(name, factor) if able else None
        op_index = self.graph.makers.get(name)
        if op_index is None or len(self.readers.get(name, ())) > 1:
            return None
        op = self.graph.ops[op_index]
        facts = facts_of(op.ir)
        names = [_name(value) for value in op.ir.inputs if value is not None]
        if facts.moves or facts.converts or facts.negates:
            return self._weight(names[0], factor)
        for parameter, other in (names, names[::-1]) if facts.adds else ():
            number = self._number(other)
            if parameter in self.trained and number is not None:
                return Recount(parameter, factor, number)
        return None

    def _number(self, name: str) -> float | None:
        """The one number that a constant holds; None where it holds more, or is none."""
        value = self.graph.model.graph.initializers.get(name)
        if value is None or name in self.trained or value.const_value is None:
            return None
        array = array_of(value)
        return float(array.reshape(-1)[0]) if array.size == 1 else None


def _name_in(change: Recount | Epsilon) -> str:
    return change.parameter if isinstance(change, Recount) else ""


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
