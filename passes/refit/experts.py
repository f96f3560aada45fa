"""The least squares of a stack of kernels of which the network chooses one for every place.

Each expert is fitted by itself, to what the original's gives for the tokens for which both networks
choose it. The kernels have no bias of their own, so that none is added: the map goes through zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.mapped import take
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.chosen import Chosen, choices_in_a_row, places_of_choices
from morphgraph.passes.calibration.readers import Following
from morphgraph.passes.calibration.segments import Piece
from morphgraph.passes.calibration.visits import Chooser
from morphgraph.passes.refit.fit import Fit, Target
from morphgraph.passes.refit.network import Network

#: Places of those kept aside without which an expert keeps its kernel: too few to judge by.
FEWEST_ASIDE = 32


@dataclass
class ExpertFits:
    """The fits of all experts of a stack.

    Attributes:
        chosen: the product in the resized network.
        kept: the experts that stay, by the original's numbers.
        row: how many places beside each other are choices of one token, in any order.
        processes: that share the places.
    """

    chosen: Chosen
    kept: IntArray
    row: int
    processes: Processes = ALONE
    fits: list[Fit] = field(init=False)

    def __post_init__(self) -> None:
        matrices = self.chosen.matrices().astype(np.float64)
        count, outputs, _ = matrices.shape
        plain = Following(np.ones((1, outputs)), np.zeros((1, outputs)))
        nothing = np.zeros((1, outputs))
        self.fits = [
            Fit(each[None], nothing, plain, self.processes, biased=False, among=count)
            for each in matrices
        ]

    def add(
        self,
        choices: tuple[Array, Array],
        rows: Array,
        wanted: Array,
        places: IntArray,
        aside: bool,
    ) -> None:
        """Count some places.

        Args:
            choices: the numbers of the original and of the resized network, ``[places]``.
            rows: what the product sees in the resized network, ``[places, rows, inputs]``.
            wanted: what the original's gives, ``[places, rows, outputs]``.
            places: those that are looked at.
            aside: whether it is chosen on them.
        """
        source = places_of_choices(*choices, self.kept, self.row)
        there = places[source[places] >= 0]
        for expert, fit in enumerate(self.fits):
            at = there[choices[1][there] == expert]
            if not len(at):
                continue
            seen, target = (
                array.reshape(-1, 1, array.shape[2]) for array in (rows[at], wanted[source[at]])
            )
            (fit.add_aside if aside else fit.add)(seen, Target(target))

    def write(self) -> tuple[float, float, int]:
        """Give the experts their kernels: the errors before and after, and the number of places."""
        matrices = self.chosen.matrices().astype(np.float64)
        before, after, places = 0.0, 0.0, 0
        for expert, fit in enumerate(self.fits):
            found = fit.solve()
            seen_aside = sum(len(rows) for rows, _ in fit.aside)
            is_known = fit.places >= fit.start.shape[2] and seen_aside >= FEWEST_ASIDE
            if is_known:
                matrices[expert] = found.matrix[0]
            places += fit.places
            before += fit.places * found.before
            after += fit.places * (found.after if is_known else found.before)
        self.chosen.write(matrices)
        return before / max(places, 1), after / max(places, 1), places


def fit_experts(
    networks: tuple[Network, Network],
    graph: ChannelGraph,
    products: tuple[Chosen, Chosen],
    selection: AxisSelection,
    choosers: Mapping[str, Chooser],
    then: str | None,
) -> ExpertFits:
    """What a stack is to give and sees: the original runs up to the next stop.

    Args:
        networks: the original and the resized one, both in front of where the kernels are taken.
        graph: of the original.
        products: the same product in both.
        selection: which positions of the original stay.
        choosers: of the places to fit to and of those kept aside.
        then: the node in front of which the next stop is.
    """
    (big, small), (original, chosen) = networks, products
    ahead, given = big.ahead(then), [_name(original.numbers), _name(original.result)]
    whole = Piece(big.model, big.live, [*ahead, *given], big.threads)
    there = [_name(chosen.numbers), _name(chosen.operand)]
    part = Piece(small.model, small.live, there, small.threads)
    kept = selection.axis(original.stack, 0)
    experts = np.arange(original.store.shape[0]) if kept is None else kept
    row = choices_in_a_row(graph, original.numbers)
    fits = ExpertFits(chosen, experts, row, choosers["fitted"].processes)
    for kind, chooser in choosers.items():
        before, later = getattr(big, kind), Batches()
        enough = len(experts) * chooser.enough(chosen.matrices().shape[2], len(before))
        both = zip(before, getattr(small, kind), strict=True)
        for number, (arrays, others) in enumerate(both):
            found, seen = whole.run(arrays), part.run(others)
            later.append({name: found[name] for name in ahead})
            numbers = original.choice(found[given[0]]), chosen.choice(seen[there[0]])
            result = take(found[given[1]], selection.cuts(given[1]))
            rows, wanted = chosen.rows(seen[there[1]]), chosen.results(result)
            places = chooser.some(chosen.name, len(rows), enough, number)
            fits.add(numbers, rows, wanted, places, kind == "aside")
        before.close()
        setattr(big, kind, later)
    big.live = ahead
    return fits


def _name(value: ir.Value) -> str:
    return value.name or ""
