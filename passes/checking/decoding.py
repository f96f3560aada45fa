"""The inputs of a check for a network with a cache: as generation runs it, in two steps.

First a prompt behind an empty cache, then one token behind the cache that the first step has left.
A wrong slice of what a cache holds shows in the second step; and kernels such as
GroupQueryAttention take no other inputs than those that generation has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, Shape
from morphgraph.onnx_io import EXPECTED_KEY
from morphgraph.onnx_io.runtime import Draw, random_inputs
from morphgraph.passes.canonical.symbols import Symbol, input_shapes, input_symbols
from morphgraph.passes.coupling.caches import caches

_PROMPT = 8  # tokens; nothing but their number would differ with more


@dataclass(frozen=True)
class Decoding:
    """What two steps of a network with a cache need.

    Attributes:
        model: canonical.
        pairs: by the input that is a cache the output that continues it.
        shapes: of the inputs, for each step.
        longer: by how much more keys there are in each step than where the model was analysed.
    """

    model: ir.Model
    pairs: Mapping[str, str]
    shapes: Sequence[Mapping[str, Shape]]
    longer: Sequence[int]

    def inputs(
        self, step: int, seed: int, draw: Draw, before: Mapping[str, Array] | None = None
    ) -> Arrays:
        """Random inputs of a step, with the cache that results of the step before are."""
        feeds = random_inputs(self.model, seed + step, draw, self.shapes[step])
        for value in self.model.graph.inputs:
            expected = value.meta.get(EXPECTED_KEY)
            array = feeds.get(value.name or "")
            is_number = expected is not None and expected.kind == "length" and array is not None
            if is_number and array.ndim < 2 and expected.high == expected.low + 1:
                number = expected.low + self.longer[step]
                feeds[value.name or ""] = np.full_like(array, number)
        if before is not None:
            feeds |= {past: before[present] for past, present in self.pairs.items()}
        return feeds


def decoding(model: ir.Model) -> Decoding | None:
    """How to run a canonical model in two steps; ``None`` where it has no cache that may grow."""
    pairs = caches(model)
    symbols = input_symbols(model)
    pasts = {
        s.name for s in symbols if not s.is_batch and {name for name, _ in s.axes} & set(pairs)
    }
    lengths = [s for s in symbols if not s.is_batch and s.name not in pasts]
    if not pasts or not lengths:
        return None
    steps = [
        [_sized(symbol, pasts, past, tokens) for symbol in symbols]
        for past, tokens in ((0, _PROMPT), (_PROMPT, 1))
    ]
    keys = [_keys(each, pasts) for each in (symbols, *steps)]
    shapes = [
        {name: tuple(shape) for name, shape in input_shapes(model, each).items()} for each in steps
    ]
    return Decoding(model, pairs, shapes, [number - keys[0] for number in keys[1:]])


def _sized(symbol: Symbol, pasts: set[str], past: int, tokens: int) -> Symbol:
    if symbol.is_batch:
        return symbol
    return replace(symbol, size=past if symbol.name in pasts else tokens)


def _keys(symbols: Sequence[Symbol], pasts: set[str]) -> int:
    """The keys of a run: those of the past, and the new ones."""
    past = max(symbol.size for symbol in symbols if symbol.name in pasts)
    return past + max(s.size for s in symbols if not s.is_batch and s.name not in pasts)
