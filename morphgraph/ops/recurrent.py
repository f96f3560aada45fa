"""Recurrent layers: LSTM, GRU, RNN.

The hidden state is one set of units in three roles. The layer makes them (``h``: the gates' rows of
both kernels, biases, peepholes), sums over them at the next step (``k``: the columns of the
recurrent kernel), and takes them from outside for the first one (``s``: initial states). All three
stand on the result, so that they live and die together; a removed unit is one whose columns of the
recurrent kernel are zero. Gates and directions are pinned: both directions keep the same units.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from morphgraph.ops.op import Description, Op, OpNode, Place, Resizing, from_line, op

if TYPE_CHECKING:
    from torch import fx

    from morphgraph.torch_io.builder import TorchBuilder


def _describe(n: OpNode, gates: int, states: int, layout: int) -> Description:
    """The factors of a layer with some gates, that carries one or two states from step to step."""
    x, state, y, last = (
        ("N T i", "N D s", "N T D h", "N D h")
        if layout
        else ("T N i", "D N s", "T D N h", "D N h")
    )
    operands = [x, "D (G h) i", "D (G h) k", "D (Q h)", "N", *[state] * states]
    if states == 2:
        operands.append("D (P h)")
    line = f"{', '.join(operands)} -> {', '.join([y, *[last] * states])}"
    sizes = {"G": gates, "Q": 2 * gates}
    description = from_line(n, line, sizes, macs="T N D G h i", contracted="i k")
    factors = description.factors
    description.macs += (("T", "N", "D", "G", "h", "k"),)
    (result, *_) = (place for place in factors["h"].places if place.port < 0)
    for name in {"k", "s"} & factors.keys():
        factors[name].places.append(result)
    if factors["h"].size == 1:
        # Nothing tells a single unit from the gates that it stands beside: no place to grow at.
        factors["h"].pinned = f"{n.op_type} of one unit"
    return description


def _resize(n: OpNode, new: Resizing) -> None:
    new.set_attribute("hidden_size", new.size("h"))


@op("LSTM")
class LSTM(Op):
    """Arithmetic: both kernels, per step and direction; ``T N (|W| + |R|)`` in all."""

    @staticmethod
    def describe(n: OpNode, *, layout: int = 0) -> Description:
        return _describe(n, 4, 2, layout)

    resize = staticmethod(_resize)


@op("GRU")
class GRU(Op):
    @staticmethod
    def describe(n: OpNode, *, layout: int = 0) -> Description:
        return _describe(n, 3, 1, layout)

    resize = staticmethod(_resize)


@op("RNN")
class RNN(Op):
    @staticmethod
    def describe(n: OpNode, *, layout: int = 0) -> Description:
        return _describe(n, 1, 1, layout)

    resize = staticmethod(_resize)
