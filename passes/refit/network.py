"""One of the two networks that a refit runs in lockstep, with what is live where it stands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.segments import Lifetimes, Piece


@dataclass
class Network:
    """A network that has run up to some node.

    Attributes:
        model: the network.
        live: names of the values that are needed from there on.
        fitted: these values for the inputs to fit to, batch by batch.
        aside: for those kept aside.
        threads: of ONNX Runtime.
        order: of the nodes that the model has now, topological.
    """

    model: ir.Model
    live: list[str]
    fitted: Batches
    aside: Batches
    threads: int = 0
    order: Callable[[ir.Model], Sequence[ir.Node]] = lambda model: list(model.graph)

    def ahead(self, name: str | None) -> list[str]:
        """What is live in front of a node; at the end the outputs."""
        nodes = self.order(self.model)
        place = {node.name: number for number, node in enumerate(nodes)}
        cut = len(nodes) if name is None else place[name]
        outputs = [value.name or "" for value in self.model.graph.outputs]
        return Lifetimes(nodes, outputs).at(cut)

    def go(self, name: str | None) -> None:
        """Run up to a node."""
        ahead = self.ahead(name)
        piece = Piece(self.model, self.live, ahead, self.threads)
        for kind in ("fitted", "aside"):
            before, later = getattr(self, kind), Batches()
            for arrays in before:
                later.append(piece.run(arrays))
            before.close()
            setattr(self, kind, later)
        self.live = ahead
