"""Pass ``refit``: the kernels of a resized network, fitted to what the original computes.

Both networks run over the calibration inputs in lockstep, from reader to reader. Each reader of the
resized network gets the kernel and the bias with which it comes nearest to the original's result,
from what it sees in the resized network, all earlier ones fitted already: errors do not add up, and
what removed channels gave on average moves into the bias. Where the result is added to another
value (a residual connection), the sum is what it is fitted to, so that a block also corrects what
is wrong in the stream that it adds to.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray, Shape
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.edit import Editor
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import PARAMETERS_KEY, static_shape
from morphgraph.onnx_io.mapped import take
from morphgraph.ops.parameters import layers_weights
from morphgraph.passes.analysis.changed import changed_values
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.calibration.bases import Turn, turns
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.compared import Compared
from morphgraph.passes.calibration.narrowed import mixed, narrowed, write_scales
from morphgraph.passes.calibration.readers import Following, Reader, all_readers, following
from morphgraph.passes.calibration.segments import Piece
from morphgraph.passes.calibration.stacks import stacks
from morphgraph.passes.calibration.together import in_order, repeated
from morphgraph.passes.calibration.visits import Chooser
from morphgraph.passes.coupling.roles import roles
from morphgraph.passes.refit.experts import fit_experts
from morphgraph.passes.refit.fit import Fit, Target
from morphgraph.passes.refit.network import Network
from morphgraph.passes.refit.shift import add_to_result, add_to_results, shift_result
from morphgraph.passes.refit.unfitted import unfitted
from morphgraph.passes.rewrite.bias import bias_of
from morphgraph.passes.rewrite.mask import mask
from morphgraph.passes.rewrite.resize import resize, restore_names

#: A scale behind a reader below this share of the largest does not carry a correction.
LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class LayerError:
    """The error of a reader on inputs kept aside, as shares of the variance of what it gives.

    Attributes:
        name: of the reader.
        before: with the sliced kernel, all earlier readers fitted.
        after: with the fitted one.
        places: at how many places it was fitted.
        inputs: numbers that one of its maps takes.
    """

    name: str
    before: float
    after: float
    places: int
    inputs: int


@dataclass(frozen=True)
class Refitted:
    """A resized network with fitted kernels.

    Attributes:
        model: the network.
        layers: the errors of its readers.
        expected: what the original gives for the inputs kept aside, batch by batch.
        found: what the resized network gives for them.
        slices: names of nodes whose kernels lose inputs, and are not fitted.
    """

    model: ir.Model
    layers: tuple[LayerError, ...]
    expected: Batches
    found: Batches
    slices: tuple[str, ...] = ()


def refit(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    batches: Iterable[Arrays],
    aside: Iterable[Arrays],
    *,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
    compared: Compared | None = None,
) -> Refitted:
    """Resize a network, and fit what is left to what the whole one computes.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay, ascending; groups left out stay whole.
        batches: feeds of the model, to fit to.
        aside: others, to choose the strength of the ridge on, and to report on.
        seed: of the places that are looked at where there are more than enough.
        threads: of ONNX Runtime.
        progress: told of every reader.
        processes: that share the batches to fit to; all have those kept aside.
        compared: products of queries and keys, whose bases may change.
    """
    fit = _Refit(graph, keep, seed, threads, progress, processes)
    fit.turn(compared or Compared())
    return fit.run(batches, aside)


def with_biases(graph: ChannelGraph, keep: Mapping[int, IntArray]) -> ir.Model:
    """A resized network with a bias wherever a fit may add one: the most that it can become.

    For what it costs; its numbers mean nothing.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay, as of :func:`refit`.
    """
    return _Refit(graph, keep, 0, 0, no_progress, ALONE).shifted()


class _Refit:
    def __init__(
        self,
        graph: ChannelGraph,
        keep: Mapping[int, IntArray],
        seed: int,
        threads: int,
        progress: Progress,
        processes: Processes,
    ) -> None:
        self.graph, self.keep = graph, keep
        self.threads, self.progress = threads, progress
        self.processes = processes
        self.choosers = {"fitted": Chooser(seed, processes), "aside": Chooser(seed + 1)}
        self.selection = AxisSelection(graph, keep)
        self.changed = changed_values(graph, self.selection)
        self.weights = graph.couplings.input_independent
        self.big = graph.model
        self.small = resize(graph, keep, restored=False)
        self.editor = Editor(self.small)
        self.errors: list[LayerError] = []
        self.originals = all_readers(self.big, self.weights)
        nodes = list(self.big.graph)
        #: Readers whose peers stand before and behind them: blocks that run several times.
        self.repeated = repeated(nodes, self.originals)
        #: Of the original's nodes, so that peers come one after the other.
        self.rank = {node.name or "": place for place, node in enumerate(nodes)}
        self.is_ranked = False
        self.rank = {node.name or "": k for k, node in enumerate(self._order(self.big))}
        self.is_ranked = True
        self.readers = all_readers(self.small, self.weights)
        self.turns: dict[str, Turn] = {}
        self.scaled: set[str] = set()
        #: Readers of which nobody can see what they are to be fitted to.
        self.left: set[str] = set()
        self.whole_stacks = stacks(self.big, self.weights)
        small = stacks(self.small, self.weights)
        self.stacks = {name: small[name] for name in small if name in self.whole_stacks}

    def turn(self, compared: Compared) -> None:
        """Make queries and keys in the bases in which their products change least."""
        there = self.readers
        known = [p for p in compared.products if {p.queries.reader, p.keys.reader} <= {"", *there}]
        seen = Compared(known, compared.moments)
        self.turns = turns(seen, self.originals, self.selection) | self._narrow(compared)
        for name, turn in self.turns.items():
            original, reader = self.originals[name], there[name]
            matrix, shift = turn.kernel(original, following(original))
            kernel = original.node.inputs[original.linear.weight]
            cuts = self.selection.cuts((kernel and kernel.name) or "")
            reader.store.write(take(original.kernel_of(matrix), cuts))
            add_to_result(self.editor, reader, shift[:, turn.kept])
        self.readers = all_readers(self.small, self.weights)  # some have a bias now

    def _narrow(self, compared: Compared) -> dict[str, Turn]:
        """Let norms of queries multiply with what changes their products with keys least.

        And the layers ahead of them make what does: they are what comes back.
        """
        if not compared.samples:
            return {}
        masked = mask(self.graph, self.keep), self.keep
        found = narrowed(self.graph, compared, self.originals, masked, self.threads)
        write_scales(self.small, found, self.selection)
        self.scaled = {each.product.scale.node for each in found if each.product.scale is not None}
        turned = mixed(found, self.originals, self.selection)
        return {name: turn for name, turn in turned.items() if name in self.readers}

    def _order(self, model: ir.Model) -> list[ir.Node]:
        """The nodes of one of the networks in an order in which peers come together."""
        is_big = model is self.big
        if is_big and self.is_ranked:
            return sorted(model.graph, key=lambda node: self.rank[node.name or ""])
        found = self.originals if is_big else self.readers
        own = {name: each for name, each in found.items() if name not in self.repeated}
        if not any(each.peers for each in own.values()):
            return list(model.graph)
        return in_order(list(model.graph), own, self.rank)

    def _peers(self, name: str) -> tuple[str, ...]:
        """Those that are fitted with a reader, in order, itself among them."""
        return self.readers[name].peers or (name,)

    def _names(self) -> list[str]:
        """The readers that are fitted, of peers the first one, in order."""
        # A norm right behind a reader has nothing to correct that the reader does not.
        covered = {
            name
            for each in self.originals.values()
            if not each.is_norm
            for name in following(each).nodes
        }
        covered |= self.scaled
        return [
            name
            for name in self.originals
            if name in self.readers and name not in covered and name == self._peers(name)[0]
        ]

    def _stops(self) -> list[tuple[str, str]]:
        """What is fitted, and the node in front of which it is looked at, in order.

        Of kernels that are taken from a stack that is where they are taken: behind it, there is one
        for every place.
        """
        place = self.rank
        stops = [(name, name) for name in self._names()]
        stops += [(name, each.taker[0]) for name, each in self.stacks.items()]
        return sorted(stops, key=lambda stop: place[stop[1]])

    def shifted(self) -> ir.Model:
        """The network with some bias at every reader that may get one, and nothing else fitted."""
        for name in self._names():
            if not any(map(self._may_shift, self._peers(name))):
                continue
            maps, outputs = self.readers[name].matrix_shape[:2]
            # No two numbers are the same, so that none is stored once for several channels.
            shift = np.linspace(1.0, 2.0, maps * outputs).reshape(1, maps, outputs)
            shift = np.repeat(shift, max(self._biases(self._peers(name))) + 1, axis=0)
            self._shift(name, shift, shift)
        self._finish()
        return self.small

    def _may_shift(self, name: str) -> bool:
        """Whether a reader's result, or what it is added to, is another than in the original.

        Or may be: queries and keys whose elements go are given another basis.
        """
        original = self.originals[name]
        seen = {original.result.name or "", *following(original).added}
        if self.selection.dead or seen & self.changed:
            return True
        role, classes = roles(self.graph.couplings), self.graph.vertex_class
        compared = set(classes[np.flatnonzero(role.sums & role.ties)].tolist())
        first = self.graph.couplings.first_dim[original.result.name or ""]
        dims = range(first, first + len(static_shape(original.result)))
        cut = {int(classes[dim]) for dim in dims if self.selection.vertex(dim) is not None}
        return bool(cut & compared)

    def run(self, batches: Iterable[Arrays], aside: Iterable[Arrays]) -> Refitted:
        big, small = self._start(batches, aside)
        stops = self._stops()
        cuts = [cut for _, cut in stops] + [None]
        big.go(cuts[0])
        small.go(cuts[0])
        for number, (name, _) in enumerate(stops):
            self.progress("refit", number, len(stops))
            # The original goes first: what its reader gives is what the other's is fitted to.
            if name in self.stacks:
                self._fit_experts(big, small, name, cuts[number + 1])
            else:
                fit = self._visit(big, small, name, cuts[number + 1])
                if fit is not None:
                    self._write(name, fit)
            small.go(cuts[number + 1])
        self.progress("refit", len(stops), len(stops))
        self._finish()
        for network in (big, small):
            network.fitted.close()
        fitted = {*self.readers, *(each.taker[0] for each in self.stacks.values())} - self.left
        slices = unfitted(self.graph, self.selection, self.small, fitted)
        return Refitted(self.small, tuple(self.errors), big.aside, small.aside, slices)

    def _finish(self) -> None:
        """Names as they were; biases that are new are parameters, where the model lists these."""
        restore_names(self.graph, self.keep, self.small, self.editor)
        notes = self.small.metadata_props
        if PARAMETERS_KEY in notes:
            former = self.graph.model.graph.initializers
            made = [name for name in sorted(layers_weights(self.small)) if name not in former]
            notes[PARAMETERS_KEY] = json.dumps([*json.loads(notes[PARAMETERS_KEY]), *made])

    def _start(self, batches: Iterable[Arrays], aside: Iterable[Arrays]) -> tuple[Network, Network]:
        big, small = (
            Network(
                model,
                [v.name or "" for v in model.graph.inputs if not v.is_initializer()],
                Batches(),
                Batches(),
                self.threads,
                self._order,
            )
            for model in (self.big, self.small)
        )
        for one, other, feeds in (
            (big.fitted, small.fitted, batches),
            (big.aside, small.aside, aside),
        ):
            for feed in feeds:
                one.append(feed)
                other.append(self.selection.positions(feed))
        return big, small

    def _visit(self, big: Network, small: Network, name: str, then: str | None) -> "Fit | None":
        """Run the original up to the next reader; collect what this one is fitted to.

        And its peers with it.
        """
        ahead = big.ahead(then)
        places = [_Place(self.originals[each], self.readers[each]) for each in self._peers(name)]
        asked = dict.fromkeys(ahead)
        for place in places:
            if not place.original.linear.inside:
                asked[place.original.result.name or ""] = None
            place.gone = self._gone(place.whole)
            asked |= dict.fromkeys(place.gone)
            # Of a block that runs several times the first place alone has been reached: at others
            # what the original sees there stands for what is not there yet.
            place.is_ahead = (place.reader.operand.name or "") not in small.live
            if place.is_ahead:
                asked[place.original.operand.name or ""] = None
            live = [[], []] if place.is_ahead else [big.live, small.live]
            place.after = self._following(place, *live)
        piece = Piece(self.big, big.live, [*asked], self.threads)
        fit = self._fit(places)
        for kind in ("fitted", "aside"):
            before, later = getattr(big, kind), Batches()
            chooser = self.choosers[kind]
            both = zip(before, getattr(small, kind), strict=True)
            inputs = prod(places[0].reader.matrix_shape[2:])
            enough = chooser.enough(inputs, len(before)) if fit is not None else 0
            for number, (arrays, others) in enumerate(both):
                found = piece.run(arrays)
                later.append({name: found[name] for name in ahead})
                if fit is None:
                    continue
                choose = partial(chooser.choose, enough=-(-enough // len(places)), number=number)
                for place_number, place in enumerate(places):
                    rows, target = self._rows(place, (arrays, others, found), choose)
                    target.place = place_number
                    (fit.add if kind == "fitted" else fit.add_aside)(rows, target)
            before.close()
            setattr(big, kind, later)
        big.live = ahead
        return fit

    def _fit(self, places: Sequence["_Place"]) -> "Fit | None":
        """What collects what is seen at all places where a kernel is read."""
        reader = places[0].reader
        after = [place.after for place in places if place.after is not None]
        if len(after) < len(places) or not all(map(self._is_seen, places)):
            self.left.update(place.reader.name for place in places)
            return None
        maps, outputs, inputs, taps = reader.matrix_shape
        matrix = reader.matrix().reshape(maps, outputs, inputs * taps)
        if len(places) == 1:
            return Fit(matrix, reader.bias(), after, self.processes)
        # Biases may differ from place to place: what is added to them is fitted.
        nothing, of_place = np.zeros((maps, outputs)), self._biases(reader.peers)
        after = [
            replace(each, shift=each.shift + each.scale * place.reader.bias())
            for each, place in zip(after, places, strict=True)
        ]
        for place, each in zip(places, after, strict=True):
            place.after, place.bias = each, place.reader.bias()
        return Fit(matrix, nothing, after, self.processes, bias_of=of_place)

    def _is_seen(self, place: "_Place") -> bool:
        """Whether what a reader sees is at hand: there, or a slice of what the original sees."""
        if not place.is_ahead:
            return True
        operand = static_shape(place.original.operand)
        cuts = self.selection.cuts(place.original.operand.name or "")
        left = take(np.broadcast_to(np.zeros(1), operand), cuts)
        return tuple(left.shape) == tuple(static_shape(place.reader.operand))

    def _biases(self, peers: Sequence[str]) -> list[int]:
        """Which bias each of some readers has, 0-based; those that have none get one together."""
        numbers: dict[ir.Value | None, int] = {}
        biases = (bias_of(self.readers[name].node) for name in peers)
        return [numbers.setdefault(bias, len(numbers)) for bias in biases]

    def _fit_experts(self, big: Network, small: Network, name: str, then: str | None) -> None:
        """Run the original up to the next stop; fit a stack of kernels to what its gives."""
        both, networks = (self.whole_stacks[name], self.stacks[name]), (big, small)
        fits = fit_experts(networks, self.graph, both, self.selection, self.choosers, then)
        before, after, places = fits.write()
        self.errors.append(LayerError(name, before, after, places, both[1].inputs))

    def _gone(self, whole: Following) -> list[str]:
        """What is added behind a reader of the original, and is no more in the resized network."""
        made = {value.name for node in self.small.graph for value in node.outputs}
        made.update(value.name for value in self.small.graph.inputs)
        return [name for name in whole.added if name not in made]

    def _following(self, place: "_Place", *live: list[str]) -> Following | None:
        """What comes behind a reader; an addend that is not there yet is none.

        Where addends of the original are ``gone``, what makes up the same sum now; ``None`` where
        that cannot be seen.
        """
        reader, whole, gone = place.reader, place.whole, place.gone
        after = following(reader)
        if gone:
            known = {node.name for node in self.big.graph}
            here = {node.name or "" for node in self.small.graph}
            within = {name for name in here if name in whole.nodes or name not in known}
            after = replace(following(reader, within), low=whole.low, high=whole.high)
            complete = after.nodes >= here & whole.nodes
            if not complete or {*after.added} != {*whole.added} - {*gone}:
                return None
        there = tuple(name for name in after.added if all(name in names for names in live))
        if there != after.added:  # a clamp would be of another sum
            return Following(after.scale, after.shift, there)
        return after

    def _rows(
        self,
        place: "_Place",
        values: tuple[Arrays, Arrays, Arrays],
        choose: Callable[[Reader, Shape, Shape], IntArray],
    ) -> tuple[Array, Target]:
        """What a reader sees in the resized network at some places, and what it is to give."""
        original, reader, whole, after = place.original, place.reader, place.whole, place.after
        before, others, found = values
        linear = reader.linear
        assert after is not None
        if place.is_ahead:
            source = original.operand.name or ""
            operand = take(found[source], self.selection.cuts(source))
        else:
            operand = others[reader.operand.name or ""]
        maps = reader.matrix_shape[0]
        if linear.inside:
            chosen = choose(reader, operand.shape, operand.shape)
            seen = linear.rows(before[original.operand.name or ""], operand.shape, chosen)
            wanted = np.einsum("ngik,goik->ngo", seen, self._whole_matrix(original))
            rows = linear.rows(operand, operand.shape, chosen)
            return rows.reshape(len(rows), maps, -1), Target(wanted)
        name = original.result.name or ""
        turn = self.turns.get(original.name)
        cuts = self.selection.cuts(name)
        if turn is not None:  # made of all outputs
            axis = linear.output_axis(found[name].ndim)
            cuts = [cut for cut in cuts if cut[0] != axis]
        result = take(found[name], cuts)
        chosen = choose(reader, operand.shape, result.shape)
        rows = linear.rows(operand, result.shape, chosen).reshape(len(chosen), maps, -1)
        wanted = linear.results(result, chosen)
        if turn is not None:
            wanted = turn.results(whole, after, wanted)
        size = np.abs(after.scale)
        scale = np.where(size < LEAST_SCALE * size.max(), np.inf, after.scale)
        # What is added has to be made up for: where it is another now, and where it is no more.
        missing: Array | float = 0.0
        base: Array | float = 0.0
        for added in after.added:
            other = linear.results(others[added], chosen)
            whole_other = take(before[added], self.selection.cuts(added))
            missing = missing + linear.results(whole_other, chosen) - other
            base = base + other
        for added in place.gone:
            lost = take(found[added], self.selection.cuts(added))
            missing = missing + linear.results(lost, chosen)
        if place.gone:
            missing = missing + self._kept(original, whole.shift, maps) - after.shift
            factor = self._kept(original, whole.scale, maps)
            missing = missing + wanted * (factor - after.scale)
        wanted = wanted + missing / scale
        if place.bias.any():
            wanted = wanted - place.bias.astype(wanted.dtype)
        return rows, Target(wanted, base)

    def _kept(self, original: Reader, vector: FloatArray, maps: int) -> FloatArray:
        """Of a number per output of the original those that stay, ``[maps, outputs]``."""
        rank = len(static_shape(original.result))
        axis = original.linear.output_axis(rank)
        cuts = self.selection.cuts(original.result.name or "")
        of_outputs = [cut for cut in cuts if cut[0] == axis]
        return take(original.linear.spread(vector, rank), of_outputs).reshape(maps, -1)

    def _whole_matrix(self, original: Reader) -> FloatArray:
        """The original's kernel with the outputs that stay, and all inputs."""
        axis = original.kernel().ndim - 1
        kernel = original.node.inputs[original.linear.weight]
        name = "" if kernel is None else kernel.name or ""
        cuts = [cut for cut in self.selection.cuts(name) if cut[0] != axis]
        return original.linear.matrix(take(original.kernel().astype(np.float64), cuts))

    def _write(self, name: str, fit: "Fit") -> None:
        """Give a reader of the resized network, and its peers, their kernel and biases."""
        reader = self.readers[name]
        fitted = fit.solve()
        places, inputs = fit.places, fit.start.shape[2]
        for each in self._peers(name):
            self.errors.append(LayerError(each, fitted.before, fitted.after, places, inputs))
        reader.write(fitted.matrix.reshape(reader.matrix_shape))
        self._shift(name, fitted.bias - fit.old_bias, fitted.bias)

    def _shift(self, name: str, shift: FloatArray, biases: FloatArray) -> None:
        """Add to what a reader and its peers give, ``[biases, maps, outputs]``."""
        peers = [self.readers[each] for each in self._peers(name)]
        if len(peers) == 1:
            shift_result(self.editor, peers[0], shift[0], biases[0])
            return
        of_peer = self._biases([peer.name for peer in peers])
        for number in range(max(of_peer) + 1):
            same = [p for p, bias in zip(peers, of_peer, strict=True) if bias == number]
            add_to_results(self.editor, same, shift[number])


@dataclass
class _Place:
    """A reader of the original, the same one of the resized network, and what comes behind."""

    original: Reader
    reader: Reader
    whole: Following = field(init=False)
    after: Following | None = None
    #: Whether it has not been reached when its kernel is fitted.
    is_ahead: bool = False
    #: What is added behind it in the original, and is no more.
    gone: list[str] = field(default_factory=list)
    #: Of the resized network's, where its results are counted without it, ``[maps, outputs]``.
    bias: FloatArray = field(default_factory=lambda: np.zeros((1, 1)))

    def __post_init__(self) -> None:
        self.whole = following(self.original)
