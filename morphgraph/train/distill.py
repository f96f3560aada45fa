"""Self-distillation: a resized network is tuned to answer as its original does, without labels.

The original is the teacher (Hinton, Vinyals and Dean 2015), the resized network the student, and
inputs are all that it takes. The student learns the outputs and, where it is known which positions
of every value stay, the results of all layers inside at these positions (hints, Romero et al.
2015): with few inputs that is worth more than the outputs alone, for every layer is told what it
should have computed.

    loss = mean over outputs of E(output) + 10 * mean over layers of E(result)
    E(v) = |v - v of the original|^2 / |v of the original - its mean|^2

Rates are relative to the size of every tensor's numbers, so that the same few serve networks whose
weights are large or small (folded norms, for instance). Which of them, and whether norms take the
statistics of the batch meanwhile, is tried in short runs and judged at held-out inputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import cos, inf, isfinite, pi

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from morphgraph.arrays import Array, Arrays
from morphgraph.calibration import Progress, Samples
from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.onnx_io import is_float
from morphgraph.onnx_io.runtime import session
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.torch_io.weights import with_weights
from morphgraph.train.pair import BATCH, Network, Pair

_TOKENS = 4096  # tokens per step, where samples are sequences of them
_CHUNK = 8  # samples that are read, and stay, together
_HELD = 256 * 2**20  # bytes of inputs that are held in memory at a time
_TRIAL = 0.2  # share of the steps that each way is tried for
_ENOUGH = 16  # samples at once from which on norms may take statistics of a batch
_SIZES = (1e-2, 1.0)  # bounds on what a tensor's rate is multiplied with
_WARM = 0.05  # share of the steps in which the rate rises
_CLIP = 1.0  # largest norm of a gradient


@dataclass(frozen=True)
class Distilled:
    """A tuned network, or the one that was given where tuning did not help.

    Attributes:
        model: the network.
        before: relative error of every output at the held-out inputs, by name, of the given one:
            the root of its mean square, as a share of the standard deviation of the original's.
        after: the same of what the tuning made.
        reason: why the given network was returned; empty where it is the tuned one.
        rate: the learning rate, see :func:`distill`.
    """

    model: ir.Model
    before: Mapping[str, float]
    after: Mapping[str, float]
    reason: str
    rate: float


def distill(
    original: ir.Model,
    resized: ir.Model,
    samples: Samples,
    *,
    steps: int,
    held_out: Samples | None = None,
    selection: AxisSelection | None = None,
    seed: int = 0,
    lr: float | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Train a resized network for some steps to answer as its original does.

    Args:
        original: the network before it was resized; it is not changed.
        resized: the network that is tuned; it is not changed.
        samples: calibration inputs.
        steps: how often the weights are changed, by :data:`BATCH` inputs each time, or by
            sequences of :data:`_TOKENS` tokens together.
        held_out: inputs that show whether it helped; a fifth of the samples by default.
        selection: which positions of every value of ``selection.graph`` the resized network still
            has: with it, the values inside are learned, too. Its graph is of ``original``.
        seed: of the order of the inputs.
        lr: the highest learning rate, relative to the size of every tensor's numbers; by default
            the best of three, each tried for a fifth of the steps. The step count includes the
            winner's trial, not the others'.
        progress: is told how far it is.

    Raises:
        ArgumentError: there are no steps, or no float output to learn.
        DataError: there are too few samples to hold some out.
        UnsupportedError: an operator has no PyTorch form; names the node.
    """
    if steps < 1:
        raise ArgumentError(f"{steps} steps tune nothing; give 1 or more")
    if held_out is None:
        samples, held_out = samples.split()
    before_model, after_model = in_single_precision(original), in_single_precision(resized)
    pair = Pair(before_model, after_model, selection)
    before = relative_errors(before_model, after_model, held_out, selection)
    if not pair.trained:
        return Distilled(resized, before, before, "it has no weights that may change", 0.0)
    run = _Run(pair, samples, held_out, seed, progress or _silent)
    way = run.best_way(steps, lr)
    run.train(way, steps - run.done, "tune", run.done, steps)
    tuned = with_weights(resized, pair.student.net)
    after = relative_errors(before_model, in_single_precision(tuned), held_out, selection)
    if _mean(after) < _mean(before):
        return Distilled(tuned, before, after, "", way.rate)
    reason = (
        f"tuning did not help: relative error {_mean(before):.3g} before, {_mean(after):.3g} after "
        "it, at held-out inputs; give more inputs or steps"
    )
    return Distilled(resized, before, after, reason, way.rate)


def _silent(_phase: str, _done: int, _total: int) -> None:
    """Tell nobody."""


def _mean(errors: Mapping[str, float]) -> float:
    mean = sum(errors.values()) / max(len(errors), 1)
    return mean if isfinite(mean) else inf


# -- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """How to train.

    Attributes:
        rate: the highest learning rate, relative to the size of every tensor's numbers.
        live: whether norms use the statistics of the batch, and update the running ones.
    """

    rate: float
    live: bool


_CAREFUL = 0.002  # the rate where larger ones do harm
_WAYS = (_Way(0.005, False), _Way(0.02, False), _Way(0.08, False))
_LIVE_WAYS = (_Way(0.1, True), _Way(0.03, True), _Way(0.03, False))


class _Run:
    """The student's training, and the choice of how it is trained."""

    def __init__(
        self, pair: Pair, samples: Samples, held_out: Samples, seed: int, progress: Progress
    ) -> None:
        self.pair, self.held_out, self.progress = pair, held_out, progress
        size = min(_CHUNK, pair.fitting)
        self.chunks = _chunks(samples, size, np.random.default_rng(seed))
        self.norms = [m for m in pair.student.net.modules() if isinstance(m, _BatchNorm)]
        if pair.at_once < _ENOUGH:
            self.norms = []
        self.done = 0

    def best_way(self, steps: int, rate: float | None) -> _Way:
        """Try some ways for a share of the steps, and leave the student as the best made it."""
        ways: tuple[_Way, ...] = _LIVE_WAYS if self.norms else _WAYS
        if rate is not None:
            ways = tuple(_Way(rate, live) for live in ((True, False) if self.norms else (False,)))
        trial = int(_TRIAL * steps)
        if trial < 1 or len(ways) == 1:
            return ways[0]
        start = self._state()
        best, least = start, self.error()
        chosen = None
        for number, way in enumerate(ways):
            self._restore(start)
            self.train(way, trial, "rate", trial * number, trial * len(ways))
            error = self.error()
            if error < least:
                best, chosen, least = self._state(), way, error
        self._restore(best)
        if chosen is None:  # the network is better than what any of them makes so soon
            return _Way(ways[0].rate if rate is not None else _CAREFUL, live=False)
        self.done = trial
        return chosen

    def error(self) -> float:
        """Mean of the outputs' errors at the held-out inputs."""
        total, count = 0.0, 0
        with torch.no_grad():
            for feeds in self.held_out.batches(self.pair.fitting):
                samples = _count(feeds)
                total += samples * float(self.pair.errors(feeds)[: self.pair.outputs].mean())
                count += samples
        error = total / max(count, 1)
        return error if isfinite(error) else inf

    def train(self, way: _Way, steps: int, phase: str, done: int, total: int) -> None:
        """So many steps, at a rate that rises for a moment and then falls to zero by a cosine."""
        trained = self.pair.trained
        optimizer = torch.optim.Adam([{"params": [p], "scale": _size(p)} for p in trained])
        warm = max(_WARM * steps, 1.0)
        for step in range(steps):
            share = min((step + 1) / warm, 1.0) * 0.5 * (1 + cos(pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = way.rate * share * group["scale"]
            optimizer.zero_grad()
            self._backward(way.live)
            # A step of numbers that are not finite would spoil all that follow.
            if bool(nn.utils.clip_grad_norm_(trained, _CLIP).isfinite()):
                optimizer.step()
            self.progress(phase, done + step + 1, total)
        self._use_batches(False)

    def _use_batches(self, live: bool) -> None:
        """Let norms take the statistics of what they are given, or the running ones."""
        for norm in self.norms:
            norm.train(live)

    def _backward(self, live: bool) -> None:
        """Add the gradients of one batch, as much of it at once as memory takes."""
        batch = [next(self.chunks)]
        wanted = _per_step(batch[0], self.pair.ids)
        while sum(map(_count, batch)) < wanted:
            batch.append(next(self.chunks))
        samples = sum(map(_count, batch))
        for feeds in _joined(batch, self.pair.at_once):
            self._use_batches(live and _count(feeds) > 1)  # one sample may have no variance
            with torch.enable_grad():
                torch.autograd.backward(self.pair.loss(feeds) * (_count(feeds) / samples))

    def _state(self) -> list[Tensor]:
        """A copy of all that training changes."""
        return [tensor.detach().clone() for tensor in self._tensors()]

    def _restore(self, state: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for tensor, numbers in zip(self._tensors(), state, strict=True):
                tensor.copy_(numbers)

    def _tensors(self) -> list[Tensor]:
        return [*self.pair.trained, *(b for norm in self.norms for b in norm.buffers())]


def _size(parameter: Tensor) -> float:
    """The root mean square of a parameter's numbers, within bounds."""
    return float(parameter.detach().square().mean().sqrt().clamp(*_SIZES))


# -- inputs --------------------------------------------------------------------------------------


def _chunks(samples: Samples, size: int, generator: np.random.Generator) -> Iterator[Arrays]:
    """Inputs without end, so many together, in random order among those that memory holds."""
    for window in _windows(samples, size):
        for k in generator.permutation(len(window)):
            yield window[k]


def _windows(samples: Samples, size: int) -> Iterator[list[Arrays]]:
    """All inputs again and again, in parts that memory holds; they are read once if all fit."""
    window: list[Arrays] = []
    all_fit = True
    while True:
        held = 0
        for feeds in samples.batches(size):
            window.append(feeds)
            held += sum(array.nbytes for array in feeds.values())
            if held >= _HELD:
                yield window
                window, held, all_fit = [], 0, False
        while all_fit:
            yield window
        if window:
            yield window
            window = []


def _count(feeds: Mapping[str, Array]) -> int:
    """The samples in one set of inputs."""
    return max((len(array) for array in feeds.values() if array.ndim), default=1)


def _joined(batch: Sequence[Arrays], at_once: int) -> Iterator[Arrays]:
    """Sets of inputs of the same sizes as one, of up to so many samples."""
    parts: dict[object, list[Arrays]] = {}
    for feeds in batch:
        leads = {array.shape[:1] for array in feeds.values()}
        alone = len(leads) > 1 or () in leads
        key = id(feeds) if alone else tuple((n, a.shape[1:]) for n, a in feeds.items())
        part = parts.setdefault(key, [])
        if part and sum(map(_count, part)) + _count(feeds) > at_once:
            yield _concatenated(part)
            part.clear()
        part.append(feeds)
    yield from map(_concatenated, parts.values())


def _concatenated(part: Sequence[Arrays]) -> Arrays:
    if len(part) == 1:
        return part[0]
    return {name: np.concatenate([feeds[name] for feeds in part]) for name in part[0]}


# -- what it came to -----------------------------------------------------------------------------


def _per_step(feeds: Arrays, ids: str) -> int:
    """Samples of a step: fewer where each is a sequence of many tokens."""
    if ids not in feeds or feeds[ids].ndim != 2:
        return BATCH
    return int(np.clip(_TOKENS // max(feeds[ids].shape[1], 1), _CHUNK, BATCH))


def relative_errors(
    original: ir.Model,
    model: ir.Model,
    samples: Samples,
    selection: AxisSelection | None = None,
) -> dict[str, float]:
    """How far a model's float outputs are from the original's, by name.

    The root of the mean square of the difference, as a share of the standard deviation of the
    original's numbers; measured in ONNX Runtime, or in PyTorch where that refuses the original.
    """
    sums: dict[str, Array] = {}
    expect, find = _runner(original), _runner(model)
    for feeds in samples.batches(BATCH):
        expected = expect(feeds)
        found = find(selection.positions(feeds) if selection else feeds)
        if selection is not None:
            expected = selection.positions(expected)
        for value in original.graph.outputs:
            name = value.name or ""
            if (
                not is_float(value)
                or name not in found
                or found[name].shape != expected[name].shape
            ):
                continue
            one, other = (np.asarray(r[name], dtype=np.float64) for r in (expected, found))
            finite = np.isfinite(one)
            numbers = one[finite]
            difference = other[finite] - numbers
            moments = (numbers.size, numbers.sum(), numbers @ numbers, difference @ difference)
            sums[name] = sums.get(name, np.zeros(4)) + moments
    return {name: _share(*moments) for name, moments in sums.items()}


def _share(count: float, total: float, squares: float, differences: float) -> float:
    spread = squares - total**2 / max(count, 1)
    if differences == 0:
        return 0.0
    return float(np.sqrt(differences / spread)) if spread > 0 else inf


def _runner(model: ir.Model) -> Callable[[Arrays], Arrays]:
    try:
        running = session(model)
    except UnsupportedError:
        net = Network(model)
        net.give(net.outputs, [])
        return lambda feeds: {
            name: result.detach().numpy()
            for name, result in zip(net.outputs, net(feeds), strict=True)
        }
    names = [output.name for output in running.get_outputs()]
    taken = {source.name for source in running.get_inputs()}
    return lambda feeds: dict(
        zip(names, running.run(names, {n: feeds[n] for n in feeds if n in taken}), strict=True)
    )
