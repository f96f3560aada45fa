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
from morphgraph.passes.calibration.dense import Dense, Shown, dense_products, shares_of
from morphgraph.passes.calibration.few_bits import FewBits, Grid
from morphgraph.passes.calibration.fused import Fused
from morphgraph.passes.calibration.readers import Following
from morphgraph.passes.calibration.segments import Piece
from morphgraph.passes.calibration.stacks import Stack
from morphgraph.passes.calibration.visits import Chooser
from morphgraph.passes.refit.fit import WORTH, Fit, Fitted, Target
from morphgraph.passes.refit.network import Network

#: Places of those kept aside without which an expert keeps its kernel: too few to judge by.
FEWEST_ASIDE = 32


@dataclass
class ExpertFits:
    """The fits of all experts of a stack.

    Attributes:
        chosen: the product, or the mixture in one node, in the resized network.
        kept: the experts that stay, by the original's numbers.
        row: how many places beside each other are choices of one token, in any order.
        processes: that share the places.
    """

    chosen: Stack
    kept: IntArray
    row: int = 1
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
        for expert in range(len(self.fits)):
            at = there[choices[1][there] == expert]
            if not len(at):
                continue
            self.count(expert, rows[at], wanted[source[at]], aside)

    def count(self, expert: int, rows: Array, wanted: Array, aside: bool) -> None:
        """Count what one expert sees and is to give, ``[..., inputs]`` and ``[..., outputs]``."""
        fit = self.fits[expert]
        seen, target = (array.reshape(-1, 1, array.shape[-1]) for array in (rows, wanted))
        (fit.add_aside if aside else fit.add)(seen, Target(target))

    def write(self) -> tuple[float, float, int]:
        """Give the experts their kernels: the errors before and after, and the number of places."""
        matrices = self.chosen.matrices().astype(np.float64)
        before, after, places, store = 0.0, 0.0, 0, self.chosen.store
        grids = store.grids() if isinstance(store, FewBits) else []
        for expert, fit in enumerate(self.fits):
            found = fit.solve()
            seen_aside = sum(len(rows) for rows, _ in fit.aside)
            is_known = fit.places >= fit.start.shape[2] and seen_aside >= FEWEST_ASIDE
            error = found.before
            if is_known and grids:
                grids[expert], error = _in_bits(grids[expert], fit, found)
            elif is_known:
                matrices[expert], error = found.matrix[0], found.after
            places += fit.places
            before += fit.places * found.before
            after += fit.places * error
        if isinstance(store, FewBits):
            store.write_grids(grids)
        else:
            self.chosen.write(matrices)
        return before / max(places, 1), after / max(places, 1), places


def _in_bits(grid: Grid, fit: Fit, found: Fitted) -> tuple[Grid, float]:
    """The kernel in few bits that is as good as any near the fitted one, and its error."""
    best, error = grid, found.before * WORTH
    if found.after >= found.before:
        return grid, found.before
    for each in grid.ways(found.matrix[0], fit.covariance):
        if (left := fit.error(each.array()[None])) < error:
            best, error = each, left
    return best, found.before if best is grid else error


Networks = tuple[Network, Network]
"""The original and the resized one, both in front of where kernels of experts are read."""


def fit_experts(
    networks: Networks,
    graph: ChannelGraph,
    stacks: tuple[Stack, Stack],
    selection: AxisSelection,
    choosers: Mapping[str, Chooser],
    then: str | None,
) -> ExpertFits:
    """What a stack is to give and sees: the original runs up to the next stop.

    Args:
        networks: the original and the resized one, both in front of where the kernels are read.
        graph: of the original.
        stacks: the same one in both.
        selection: which positions of the original stay.
        choosers: of the places to fit to and of those kept aside.
        then: the node in front of which the next stop is.
    """
    original, stack = stacks
    if isinstance(original, Fused) and isinstance(stack, Fused):
        return _fit_fused(networks, (original, stack), selection, choosers, then)
    if isinstance(original, Dense) and isinstance(stack, Dense):
        return _fit_dense(networks, (original, stack), selection, choosers, then)
    assert isinstance(original, Chosen)
    assert isinstance(stack, Chosen)
    row = choices_in_a_row(graph, original.numbers)
    return _fit_chosen(networks, row, (original, stack), selection, choosers, then)


def _fit_chosen(
    networks: Networks,
    row: int,
    products: tuple[Chosen, Chosen],
    selection: AxisSelection,
    choosers: Mapping[str, Chooser],
    then: str | None,
) -> ExpertFits:
    """Where a gather takes them; ``row`` as of :class:`ExpertFits`."""
    (big, small), (original, chosen) = networks, products
    ahead, given = big.ahead(then), [_name(original.numbers), _name(original.result)]
    whole = Piece(big.model, big.live, [*ahead, *given], big.threads)
    there = [_name(chosen.numbers), _name(chosen.operand)]
    part = Piece(small.model, small.live, there, small.threads)
    experts = _staying(original, selection, 0)
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


def _fit_fused(
    networks: Networks,
    mixtures: tuple[Fused, Fused],
    selection: AxisSelection,
    choosers: Mapping[str, Chooser],
    then: str | None,
) -> ExpertFits:
    """In a mixture in one node, that shows what is inside times the shares of its tokens.

    What the original's experts give there is counted with the shares of the resized network: an
    error is where a share is.
    """
    (big, small), (original, fused) = networks, mixtures
    ahead = big.ahead(then)
    piece = Piece(big.model, big.live, ahead, big.threads)
    experts, outputs = (_staying(original, selection, axis) for axis in (0, 1))
    matrices = original.matrices()[experts][:, outputs]
    fits = ExpertFits(fused, experts, processes=choosers["fitted"].processes)
    one, other = original.shown(big.threads), fused.shown(small.threads)
    for kind, chooser in choosers.items():
        before, later = getattr(big, kind), Batches()
        enough = len(experts) * chooser.enough(fused.inputs, len(before))
        both = zip(before, getattr(small, kind), strict=True)
        for number, (arrays, others) in enumerate(both):
            later.append(piece.run(arrays))
            there = fused.operands(others)
            places = chooser.some(fused.name, len(there[0]), enough, number)
            tokens = [each[places] for each in original.operands(arrays)]
            whole = {expert: seen for expert, *seen in one.seen(tokens)}
            tokens = [each[places] for each in there]
            for expert, *seen in other.seen(tokens):
                if experts[expert] in whole:
                    rows, wanted = _same_tokens(seen, whole[experts[expert]], matrices[expert])
                    fits.count(expert, rows, wanted, kind == "aside")
        before.close()
        setattr(big, kind, later)
    big.live = ahead
    return fits


def _fit_dense(
    networks: Networks,
    products: tuple[Dense, Dense],
    selection: AxisSelection,
    choosers: Mapping[str, Chooser],
    then: str | None,
) -> ExpertFits:
    """Where all experts see every token: those count that the resized network gives shares."""
    (big, small), (original, dense) = networks, products
    result = original.result.name or ""
    ahead, model = big.ahead(then), small.model
    whole = Piece(big.model, big.live, [*ahead, result], big.threads)
    every = dense_products(model, selection.graph.couplings.input_independent)
    mixed = shares_of(model, every, dense)
    shown = Shown(dense, None if mixed is None else mixed.shares)
    part = Piece(model, small.live, shown.asked, small.threads)
    experts = _staying(original, selection, 0)
    fits = ExpertFits(dense, experts, processes=choosers["fitted"].processes)
    for kind, chooser in choosers.items():
        before, later = getattr(big, kind), Batches()
        enough = len(experts) * chooser.enough(dense.inputs, len(before))
        both = zip(before, getattr(small, kind), strict=True)
        for number, (arrays, others) in enumerate(both):
            found = whole.run(arrays)
            later.append({name: found[name] for name in ahead})
            wanted = original.results(take(found[result], selection.cuts(result)))
            rows, shares = shown.seen(part.run(others))
            chosen = chooser.some(dense.name, int(np.count_nonzero(shares)), enough, number)
            at, tokens = shown.some(shares, chosen)
            for expert in range(len(experts)):
                there = tokens[at == expert]
                share = shares[expert, there][:, None]
                seen = rows[expert, there] * share, wanted[expert, there] * share
                fits.count(expert, *seen, kind == "aside")
        before.close()
        setattr(big, kind, later)
    big.live = ahead
    return fits


def _same_tokens(seen: list[Array], whole: list[Array], matrix: Array) -> tuple[Array, Array]:
    """What an expert sees for the tokens that take it in both networks, and what it is to give.

    Both of places, shares and units times these.
    """
    (at, shares, units), (places, theirs, given) = seen, whole
    _, mine, original = np.intersect1d(at, places, assume_unique=True, return_indices=True)
    ratio = shares[mine] / theirs[original]
    return units[mine], given[original] @ matrix.T * ratio[:, None]


def _staying(original: Stack, selection: AxisSelection, axis: int) -> IntArray:
    """The positions of an axis of the kernels that stay."""
    kept = selection.axis(original.stack, axis)
    return np.arange(selection.graph.shapes[original.stack][axis]) if kept is None else kept


def _name(value: ir.Value) -> str:
    return value.name or ""
