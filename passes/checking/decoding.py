"""The inputs of a check for a network with a cache: as generation runs it, in two steps.

First a prompt behind an empty cache, then one token behind the cache that the first step has left.
A wrong slice of what a cache holds shows in the second step; and kernels such as
GroupQueryAttention take no other inputs than those that generation has.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, Shape
from morphgraph.onnx_io import EXPECTED_KEY
from morphgraph.onnx_io.runtime import Draw, random_inputs
from morphgraph.passes.canonical.caches import caches, capacities
from morphgraph.passes.canonical.join_files import layouts
from morphgraph.passes.canonical.symbols import Symbol, input_shapes, input_symbols

_MAX_CHOICES = 8
_PROMPT = 8  # tokens, or as many as a cache has room for: more would show nothing else


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
            expected, name = value.meta.get(EXPECTED_KEY), value.name or ""
            if expected is None or expected.kind != "length" or name not in feeds:
                continue
            if feeds[name].ndim < 2 and expected.high == expected.low + 1:
                feeds[name] = np.full_like(feeds[name], expected.low + self.longer[step])
        if before is not None:
            feeds |= {past: before[present] for past, present in self.pairs.items()}
        return feeds


def decodings(model: ir.Model) -> Iterator[Decoding]:
    """How to run a canonical model in two steps; none where it has no cache that may grow.

    Several where it is not plain which open sizes count new tokens, and which all that a mask may
    mark: the first that runs is right.
    """
    pairs, room = caches(model), capacities(model)
    symbols = [_with_room(symbol, room) for symbol in input_symbols(model)]
    inner = [symbol for symbol in symbols if not symbol.is_batch]
    rings = {symbol.name for symbol in inner if _inputs(symbol) & room.keys()}
    pasts = {s.name for s in inner if _inputs(s) & pairs.keys()} - rings
    lengths = [s.name for s in inner if s.name not in rings | pasts]
    if not (pasts or rings) or not lengths:
        return
    # Where a cache has room for more than there is, it may hold anything.
    prompt = max(_PROMPT, *room.values()) if room else _PROMPT
    for whole in list(product((True, False), repeat=len(lengths) - 1))[:_MAX_CHOICES]:
        steps = []
        for past, tokens in ((0, prompt), (prompt, 1)):
            sizes = dict.fromkeys(pasts, past) | {lengths[0]: tokens}
            for name, is_whole in zip(lengths[1:], whole, strict=True):
                sizes[name] = past + tokens if is_whole else tokens
            steps.append([replace(s, size=sizes.get(s.name, s.size)) for s in symbols])
        counted = {min(pasts, default=""), lengths[0]}
        keys = [sum(s.size for s in each if s.name in counted) for each in (symbols, *steps)]
        shapes = [
            {name: tuple(shape) for name, shape in input_shapes(model, each).items()}
            for each in steps
        ]
        yield Decoding(model, pairs, shapes, [number - keys[0] for number in keys[1:]])


def joined_shapes(model: ir.Model) -> Iterator[Mapping[str, Shape]]:
    """Shapes of inputs with which a network of several files is run; none where it is one file's.

    As a step is run that has a prompt before it: there may be no more positions than those of both.
    Several, where files may take one token alone: the first that runs is right.
    """
    noted = layouts(model)
    if noted is None:
        return
    symbols = input_symbols(model)
    pasts = {part.name for part in noted.parts if noted.takes_of_others(part)}
    for tokens in (_PROMPT, 1):
        sized = []
        for symbol in symbols:
            names = {name.partition("/")[0] for name in _inputs(symbol)}
            size = symbol.size if symbol.is_batch else tokens if names <= pasts else _PROMPT
            sized.append(replace(symbol, size=size))
        yield {name: tuple(shape) for name, shape in input_shapes(model, sized).items()}


def _inputs(symbol: Symbol) -> set[str]:
    return {name for name, _ in symbol.axes}


def _with_room(symbol: Symbol, room: Mapping[str, int]) -> Symbol:
    """A symbol at the size that a cache needs which keeps the latest positions alone."""
    least = max((room.get(name, 0) for name in _inputs(symbol)), default=0)
    return replace(symbol, size=least) if least and not symbol.is_batch else symbol
