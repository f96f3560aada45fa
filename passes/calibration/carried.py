"""Pass ``carried``: one network with a change at a time, for many changes, in one walk.

All changed networks are carried from piece to piece beside the original: every piece of the model
is made ready once for all of them, and only what differs from the original is kept of each.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, repeat

import onnx_ir as ir

from morphgraph.arrays import Arrays
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.outputs import Energies, OutputErrors
from morphgraph.passes.calibration.segments import (
    PIECE_BYTES,
    Lifetimes,
    Piece,
    cuts_by_weight,
)

#: Pieces into which a network is cut at most, beside those that its weights ask for.
PIECES = 12
#: Of each of many changed networks little is kept in memory.
IN_MEMORY = 2**20


@dataclass
class Changed:
    """A network in which some nodes compute something else.

    Attributes:
        nodes: their names.
        write: gives a copy of the model, or of a part of it, those that are in it and named.
    """

    nodes: frozenset[str]
    write: Callable[[ir.Model, frozenset[str]], None]
    kept: Batches | None = field(default=None, repr=False)
    errors: OutputErrors = field(default_factory=OutputErrors)


class Carried:
    """Changed networks on their way through a model.

    Args:
        model: the original.
        changes: each alone.
        threads: of ONNX Runtime.
        tell: called with how many pieces all networks have passed, of ``total``.
    """

    def __init__(
        self,
        model: ir.Model,
        changes: Sequence[Changed],
        threads: int,
        tell: Callable[[int], None],
    ) -> None:
        self.model, self.changes = model, changes
        self.threads, self.tell = threads, tell
        self.nodes = list(model.graph)
        self.lifetimes = Lifetimes(self.nodes, [v.name or "" for v in model.graph.outputs])
        place = {node.name: number for number, node in enumerate(self.nodes)}
        self.first = [min(place[name] for name in change.nodes) for change in changes]
        self.cuts = self._cuts()
        #: Pieces that the networks pass, all counted; the last one counts once.
        self.total = sum(sum(cut > first for cut in self.cuts[:-1]) for first in self.first) + 1

    def _cuts(self) -> list[int]:
        starts = sorted(set(self.first))
        step = max(-(-len(starts) // PIECES), 1)
        found = {*starts[::step], *cuts_by_weight(self.model, PIECE_BYTES)}
        return sorted({0, len(self.nodes), *found})

    def run(self, feeds: Iterable[Arrays]) -> list[float]:
        """The errors of the outputs of each, as shares of their variance."""
        kept = Batches()
        for feed in feeds:
            kept.append({name: feed[name] for name in self.lifetimes.at(0) if name in feed})
        done = 0
        for here, there in pairwise(self.cuts):
            self.tell(done)
            names = self.lifetimes.at(here), self.lifetimes.at(there)
            inside = frozenset(node.name or "" for node in self.nodes[here:there])
            going = [c for c, first in zip(self.changes, self.first, strict=True) if first < there]
            piece = Piece(self.model, *names, self.threads)
            if there == len(self.nodes):
                return self._end(piece, names, inside, kept)
            for change in going:
                own = self._own(change, names, inside)
                self._on(change, own or piece, kept, there)
                if own is not None:
                    own.close()
                done += 1
                self.tell(done)
            kept = piece.through(kept)
        return [0.0 for _ in self.changes]

    def _own(
        self, change: Changed, names: tuple[list[str], list[str]], inside: frozenset[str]
    ) -> Piece | None:
        """The piece as one of the networks has it; ``None`` where it is the original's."""
        here = change.nodes & inside
        if not here:
            return None
        return Piece(self.model, *names, self.threads, lambda part: change.write(part, here))

    def _on(self, change: Changed, piece: Piece, kept: Batches, there: int) -> None:
        """Carry one of the networks to the end of a piece."""
        later, own = Batches(IN_MEMORY), self.lifetimes.behind(change.nodes, there)
        for arrays, mine in zip(kept, change.kept or repeat({})):
            found = piece.run(arrays | mine)
            later.append({name: found[name] for name in own})
        if change.kept is not None:
            change.kept.close()
        change.kept = later

    def _end(
        self,
        piece: Piece,
        names: tuple[list[str], list[str]],
        inside: frozenset[str],
        kept: Batches,
    ) -> list[float]:
        """Errors of the outputs, none of which is kept: they may be larger than all before."""
        energies = Energies()
        alike = [change for change in self.changes if not change.nodes & inside]
        for number, arrays in enumerate(kept):
            expected = piece.run(arrays)
            energies.add(expected)
            for change in alike:
                mine = {} if change.kept is None else change.kept[number]
                change.errors.add(expected, piece.run(arrays | mine))
        for change in self.changes:
            own = self._own(change, names, inside)
            if own is None:
                continue
            for number, arrays in enumerate(kept):
                mine = {} if change.kept is None else change.kept[number]
                change.errors.add(piece.run(arrays), own.run(arrays | mine))
            own.close()
        piece.close()
        kept.close()
        for change in self.changes:
            if change.kept is not None:
                change.kept.close()
        return [change.errors.share(energies) for change in self.changes]
