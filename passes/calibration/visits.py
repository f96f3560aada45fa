"""The walk of a network over calibration inputs, from where something is looked at to the next.

Readers that map the same rows of the same value (queries, keys and values of an attention; gate and
units of an MLP) are looked at together: their moments are the same.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray, Shape
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.calibration.progress import Progress
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.readers import Reader
from morphgraph.passes.calibration.segments import Lifetimes, Piece

#: Places at which a reader is looked at, per input of its map, and their bounds.
PLACES_PER_INPUT = 4
FEWEST_PLACES = 8192
MOST_PLACES = 20000


Choose: TypeAlias = Callable[[str, int], IntArray]
"""Which of so many places are looked at, for who has that name."""
_Seen = TypeVar("_Seen")
_Seen_co = TypeVar("_Seen_co", covariant=True)


class Looking(Protocol[_Seen_co]):
    """Something that is looked at on the walk.

    Attributes:
        stop: the node in front of which that is.
        asked: names of the values that it takes to see it.
    """

    @property
    def stop(self) -> str:
        """The node."""
        ...

    @property
    def asked(self) -> list[str]:
        """The names."""
        ...

    def enough(self, chooser: "Chooser", batches: int) -> int:
        """How many places of each of so many batches are looked at."""
        ...

    def rows(self, found: Arrays, choose: Choose) -> _Seen_co:
        """What is seen at some places of a batch."""
        ...


@dataclass(frozen=True)
class Look:
    """Readers that see the same rows.

    Attributes:
        readers: in the model's order, at least one. Those of shared kernels all have their peers
            together in other looks.
    """

    readers: tuple[Reader, ...]

    @property
    def family(self) -> tuple[str, ...]:
        """What looks at the same kernels have in common: the first reader's peers, or itself."""
        return self.readers[0].peers or (self.name,)

    @property
    def name(self) -> str:
        """Of the first reader."""
        return self.readers[0].name

    @property
    def stop(self) -> str:
        """The node in front of which it is looked at."""
        return self.name

    def enough(self, chooser: "Chooser", batches: int) -> int:
        """How many places of each of so many batches are looked at."""
        inputs, taps = self.readers[0].matrix_shape[2:]
        return chooser.enough(inputs * taps, batches)

    @property
    def by_result(self) -> bool:
        """Whether the places are those of the results, not of the operand."""
        return self.readers[0].linear.by_result

    @property
    def asked(self) -> list[str]:
        """What the readers map, and what the first one gives where that says what it sees."""
        first = self.readers[0]
        return [value.name or "" for value in (first.operand, first.result)[: 1 + self.by_result]]

    def rows(self, found: Arrays, choose: Choose) -> Array:
        """What is seen at some places of a batch, ``[places, maps, inputs]``.

        Args:
            found: what was asked for.
            choose: which of so many places are looked at.
        """
        first = self.readers[0]
        operand = found[first.operand.name or ""]
        shape = (found[first.result.name or ""] if self.by_result else operand).shape
        places = choose(self.name, first.linear.places(operand.shape, shape))
        rows = first.linear.rows(operand, shape, places)
        return rows.reshape(len(rows), first.matrix_shape[0], -1)

    def matrix(self) -> FloatArray:
        """The readers' matrices, outputs behind each other, ``[maps, outputs, inputs * taps]``."""
        parts = []
        for reader in self.readers:
            maps, outputs = reader.matrix_shape[:2]
            parts.append(reader.matrix().reshape(maps, outputs, -1))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def parted(self, array: Array) -> dict[str, Array]:
        """Something with all outputs on its second axis, by the readers' names."""
        sizes = [reader.matrix_shape[1] for reader in self.readers]
        parts = np.split(array, np.cumsum(sizes)[:-1], axis=1)
        return {reader.name: part for reader, part in zip(self.readers, parts, strict=True)}


def looks(found: Mapping[str, Reader], names: Iterable[str]) -> list[Look]:
    """Readers by what they see, in the model's order.

    Args:
        found: all readers by name, in the model's order.
        names: those that are looked at.
    """
    wanted, together = set(names), dict[object, list[Reader]]()
    for name, reader in found.items():
        if name in wanted:
            # Where the kernel stands and what it is multiplied with does not change the rows.
            views = [
                (each.operand.name, replace(each.linear, weight=0, factor=1.0))
                for each in [found[peer] for peer in reader.peers] or [reader]
            ]
            # Of shared kernels those are together whose peers are, too.
            own = reader.peers.index(name) if reader.peers else 0
            together.setdefault((own, *views), []).append(reader)
    ordered = (sorted(each, key=lambda r: r.peers[:1]) for each in together.values())
    return [Look(tuple(each)) for each in ordered]


def visit(
    model: ir.Model,
    looked_at: Sequence[Looking[_Seen]],
    batches: Iterable[Arrays],
    chooser: "Chooser",
    threads: int,
    progress: Progress,
) -> Iterator[tuple[Looking[_Seen], Iterator[_Seen]]]:
    """Run a model over batches, and stop where something is looked at: what is seen, by batch.

    What is seen at one stop must be used up before the next.
    """
    place, lifetimes, kept = beginning(model, batches)
    cuts = [place[look.stop] for look in looked_at]
    for number, (look, cut) in enumerate(zip(looked_at, cuts, strict=True)):
        progress("statistics", number, len(looked_at))
        if not number:
            kept = advance(model, lifetimes, kept, (0, cut), threads)
        # Behind the last one nothing is asked for any more.
        last = number + 1 == len(looked_at)
        ahead = [] if last else lifetimes.at(cuts[number + 1])
        piece = Piece(model, lifetimes.at(cut), [*ahead, *look.asked], threads)
        later = Batches()
        yield look, _rows(look, piece, kept, later, ahead, chooser)
        piece.close()
        kept.close()
        kept = later
    kept.close()
    progress("statistics", len(looked_at), len(looked_at))


def beginning(
    model: ir.Model, batches: Iterable[Arrays]
) -> tuple[dict[str | None, int], Lifetimes, Batches]:
    """The places of the nodes by name, what is live in front of each, and the batches, kept."""
    nodes = list(model.graph)
    kept = Batches()
    for batch in batches:
        kept.append(batch)
    return (
        {node.name: number for number, node in enumerate(nodes)},
        Lifetimes(nodes, [value.name or "" for value in model.graph.outputs]),
        kept,
    )


def advance(
    model: ir.Model, lifetimes: Lifetimes, kept: Batches, cuts: tuple[int, int], threads: int
) -> Batches:
    """What is live at the second cut, from what is live at the first."""
    here, ahead = (lifetimes.at(cut) for cut in cuts)
    return kept if here == ahead else Piece(model, here, ahead, threads).through(kept)


def _rows(
    look: Looking[_Seen],
    piece: Piece,
    kept: Batches,
    later: Batches,
    ahead: Sequence[str],
    chooser: "Chooser",
) -> Iterator[_Seen]:
    enough = look.enough(chooser, len(kept))
    for number, arrays in enumerate(kept):
        found = piece.run(arrays)
        later.append({name: found[name] for name in ahead})
        yield look.rows(found, partial(chooser.some, enough=enough, number=number))


def places_for(inputs: int) -> int:
    """How many places are looked at for a map of so many inputs: several for each of them."""
    return int(np.clip(PLACES_PER_INPUT * inputs, FEWEST_PLACES, MOST_PLACES))


@dataclass(frozen=True)
class Chooser:
    """Which places of a batch are looked at: the same ones, whichever process has the batch.

    Attributes:
        seed: of the choice.
        processes: that share the batches.
    """

    seed: int
    processes: Processes = ALONE

    def enough(self, inputs: int, batches: int) -> int:
        """How many places of a batch are looked at for a map of so many inputs.

        Args:
            inputs: of the map.
            batches: of this process.
        """
        everywhere = int(self.processes.total(np.array([float(batches)]))[0])
        return -(-places_for(inputs) // max(everywhere, 1))

    def choose(
        self, reader: Reader, operand: Shape, result: Shape, enough: int, number: int
    ) -> IntArray:
        """Some places of a batch, the given one of this process, or all."""
        return self.some(reader.name, reader.linear.places(operand, result), enough, number)

    def some(self, name: str, there: int, enough: int, number: int) -> IntArray:
        """So many of the places that are there, for who has that name; or all."""
        if there <= enough:
            return np.arange(there)
        key = [self.seed, zlib.crc32(name.encode()), self.processes.place(number)]
        return np.sort(np.random.default_rng(key).choice(there, enough, replace=False))
