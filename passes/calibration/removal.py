"""Which channels of a group go first if those that stay take over: block optimal brain surgeon.

A reader that loses the inputs ``c`` (all taps of a channel) and changes its other weights for the
best has the additional error (Hassibi & Stork 1993, for blocks: Kurtic et al. 2022)::

    W_c (P_cc)^-1 W_c',   P = (covariance of the inputs)^-1

and its weights become ``W - W_c (P_cc)^-1 P_c:``. Channels leave in the order of what that costs
all readers of their group together, each in shares of what it gives, after every few removals anew
(backward elimination, as OSSCAR, Meng et al. 2024, has it for one layer).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from morphgraph.arrays import FloatArray, IntArray
from morphgraph.passes.calibration.moments import Statistics

#: So many times the order of removal is looked at anew.
ROUNDS = 64
#: Matrices lose the rows of what has gone when so large a share is left: the work is a third.
COMPACT = 0.85
#: So many times more outputs than inputs has a matrix of which only the products of its columns are
#: carried along: costs need no more.
MANY_OUTPUTS = 2
DAMPING = 1e-4
FEW_DAMPING = 0.05


@dataclass
class Seen:
    """What a group's channels are to one of its readers.

    Attributes:
        inverse: of the covariance, damped, ``[groups, inputs, inputs]``; ``None`` where that is too
            large: then nothing takes over, and a channel costs what it contributes.
        matrix: ``[groups, outputs, inputs]``, each output in the unit in which errors count; of no
            outputs where there is no inverse.
        blocks: inputs of every channel, ``[channels, inputs per channel]``.
        energy: of what the reader gives, in that unit; costs are shares of it.
        alone: what each channel contributes, a share of the energy, where there is no inverse.
    """

    inverse: FloatArray | None
    matrix: FloatArray
    blocks: IntArray
    energy: float
    alone: FloatArray | None = None

    def __post_init__(self) -> None:
        self.inputs = self.matrix.shape[2]
        self.columns = np.arange(self.inputs)  # those inputs that are still looked at
        self.place = np.arange(self.inputs)  # and where each of all inputs stands among them
        self.gone: list[IntArray] = []  # inputs of the channels that went
        #: Products of the columns of the matrix as it is now, and the inverse as it was; the matrix
        #: stays what it was then.
        self.gram: FloatArray | None = None
        self.first: FloatArray | None = None
        if self.inverse is not None and self.matrix.shape[1] > MANY_OUTPUTS * self.inputs:
            self.gram = self.matrix.swapaxes(1, 2) @ self.matrix
            self.first = self.inverse.copy()

    def whole_matrix(self) -> FloatArray:
        """The matrix with zeros for what has gone, ``[groups, outputs, inputs]``."""
        if self.first is not None:
            return self._made_up()
        whole = np.zeros((*self.matrix.shape[:2], self.inputs))
        whole[:, :, self.columns] = self.matrix
        return whole

    def _made_up(self) -> FloatArray:
        """The matrix after all removals at once, which is what one after the other come to."""
        assert self.first is not None
        whole = self.matrix.copy()
        if self.gone:
            gone = np.concatenate(self.gone)
            for inverse, matrix in zip(self.first, whole, strict=True):
                rows = inverse[gone]
                matrix -= matrix[:, gone] @ np.linalg.solve(rows[:, gone], rows)
                matrix[:, gone] = 0.0
        return whole

    def compact(self, alive: IntArray) -> None:
        """Look at the inputs of these channels, and of no group's, alone."""
        gone = np.ones(len(self.blocks), dtype=bool)
        gone[alive] = False
        dead = np.zeros(self.inputs, dtype=bool)
        dead[self.blocks[gone].ravel()] = True
        stays = ~dead[self.columns]
        if self.inverse is None or stays.mean() > COMPACT:
            return
        self.columns = self.columns[stays]
        self.place[self.columns] = np.arange(len(self.columns))
        self.inverse = np.ascontiguousarray(self.inverse[:, stays][:, :, stays])
        if self.gram is not None:
            self.gram = np.ascontiguousarray(self.gram[:, stays][:, :, stays])
        else:
            self.matrix = np.ascontiguousarray(self.matrix[:, :, stays])


def seen_by(
    statistics: Statistics,
    matrix: FloatArray,
    units: FloatArray,
    blocks: IntArray,
    energy: float | None = None,
) -> Seen:
    """What channels are to a reader.

    The covariance is used up: a large one would not fit into memory three times.

    Args:
        statistics: of what it sees and gives.
        matrix: of the reader, ``[groups, outputs, inputs]``.
        units: in which errors of its outputs count, ``[groups, outputs]``.
        blocks: inputs of every channel.
        energy: of which costs are shares, if not that of all that it gives.
    """
    inverse = statistics.covariance
    # The fewer places there are for each input, the less their covariance can be trusted.
    damping = DAMPING + FEW_DAMPING * inverse.shape[1] / max(statistics.count, 1)
    diagonal = np.diag_indices(inverse.shape[1])
    for group, covariance in enumerate(inverse):
        spread = np.trace(covariance) / max(len(covariance), 1)
        covariance[diagonal] += damping * max(spread, 1e-30)
        # Of the transpose, which is the same and stands in memory as LAPACK wants it.
        factor, _ = linalg.lapack.dpotrf(covariance.T, lower=1, overwrite_a=1)
        half, _ = linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
        lower, own = np.tril(half, -1), np.diagonal(half).copy()  # LAPACK worked in place
        inverse[group] = lower
        inverse[group] += lower.T
        inverse[group][diagonal] = own
    if energy is None:
        energy = _energy(statistics, units)
    return Seen(inverse, matrix * units[:, :, None], blocks, energy)


def _energy(statistics: Statistics, units: FloatArray) -> float:
    return max(float((statistics.energy * units**2).sum()), 1e-30)


def seen_alone(
    own: Statistics,
    whole: Statistics,
    matrix: FloatArray,
    units: FloatArray,
    blocks: IntArray,
    energy: float | None = None,
) -> Seen:
    """The same without compensation, where a reader has too many inputs for its covariance.

    Args:
        own: of every channel by itself, for each of the reader's maps.
        whole: of what the reader gives.
        matrix, units, blocks, energy: as for :func:`seen_by`.
    """
    if energy is None:
        energy = _energy(whole, units)
    products = column_products(matrix * units[:, :, None], blocks)
    alone = np.maximum(contributions(own.covariance, products), 0.0) / energy
    return Seen(None, np.zeros((len(matrix), 0, matrix.shape[2])), blocks, energy, alone)


def column_products(matrix: FloatArray, blocks: IntArray) -> FloatArray:
    """Products of the columns of each channel, ``[groups, channels, block, block]``.

    Args:
        matrix: of a reader, ``[groups, outputs, inputs]``.
        blocks: inputs of every channel.
    """
    if blocks.shape[1] == 1:
        squares: FloatArray = np.einsum("goi,goi->gi", matrix, matrix)
        return squares[:, blocks][:, :, :, None]
    weights = matrix[:, :, blocks].transpose(0, 2, 3, 1)  # [groups, channels, block, outputs]
    found: FloatArray = weights @ weights.swapaxes(2, 3)
    return found


def contributions(spread: FloatArray, products: FloatArray) -> FloatArray:
    """The variance of what each channel adds to what a reader gives, ``[channels]``.

    Args:
        spread: the covariance of every channel's inputs, ``[groups * channels, block, block]``.
        products: of the channels' columns.
    """
    found: FloatArray = np.einsum("gcbd,gcbd->c", products, spread.reshape(products.shape))
    return found


@dataclass(frozen=True, eq=False)
class Removal:
    """How a group shrinks, one channel after the other.

    Attributes:
        order: channels of the group, 0-based, the first to go first.
        losses: of all readers together, after each of them, in shares of what they give.
        matrices: by number of channels that stay the readers' matrices, compensated, in the units
            in which errors count; of no outputs where nothing takes over.
    """

    order: IntArray
    losses: FloatArray
    matrices: dict[int, list[FloatArray]]


def remove_in_order(
    seen: Sequence[Seen], stops: Sequence[int] = (), spread: FloatArray | None = None
) -> Removal:
    """Let all channels of a group go, the cheapest first.

    Args:
        seen: what the channels are to each of their readers; used up.
        stops: numbers of channels that stay at which the matrices are kept.
        spread: what those that go cost where nothing takes over: the sum of its numbers over all of
            their pairs, ``[channels, channels]``.
    """
    channels = len(seen[0].blocks)
    alive = np.ones(channels, dtype=bool)
    order: list[int] = []
    losses: list[float] = []
    kept: dict[int, list[FloatArray]] = {}
    step, lost, ahead = max(1, channels // ROUNDS), 0.0, sorted(set(stops))
    while alive.any():
        left = int(alive.sum())
        if ahead and left == ahead[-1]:
            kept[ahead.pop()] = [each.whole_matrix() for each in seen]
        there = np.flatnonzero(alive)
        costs = sum((_costs(each, there) for each in seen), np.zeros(len(there)))
        if spread is not None:
            costs += spread[there, there] + 2 * spread[np.ix_(there, ~alive)].sum(axis=1)
        count = min(step, left - (ahead[-1] if ahead else 0))
        chosen = np.argsort(costs, kind="stable")[:count]
        for each in seen:
            _remove(each, there[chosen])
        # What several cost together is not the sum; it is shared out by what each costs alone.
        for channel, cost in zip(there[chosen], costs[chosen], strict=True):
            lost += float(cost)
            order.append(int(channel))
            losses.append(lost)
        alive[there[chosen]] = False
        for each in seen:
            each.compact(np.flatnonzero(alive))
    if ahead and ahead[-1] == 0:
        kept[0] = [each.whole_matrix() for each in seen]
    return Removal(np.array(order, dtype=np.int64), np.array(losses), kept)


def _costs(seen: Seen, channels: IntArray) -> FloatArray:
    """What removing each of some channels alone costs a reader, a share of its energy."""
    if seen.inverse is None:
        assert seen.alone is not None
        return seen.alone[channels]
    blocks = seen.place[seen.blocks[channels]]
    total = np.zeros(len(channels))
    for number, inverse in enumerate(seen.inverse):
        own = inverse[blocks[:, :, None], blocks[:, None, :]]
        products = _products(seen, number, blocks)
        if blocks.shape[1] == 1:
            total += products[:, 0, 0] / np.maximum(own[:, 0, 0], 1e-30)
        else:
            total += np.trace(np.linalg.solve(own, products), axis1=1, axis2=2)
    return np.maximum(total, 0.0) / seen.energy


def _products(seen: Seen, number: int, blocks: IntArray) -> FloatArray:
    """Products of the columns of each channel, ``[channels, block, block]``."""
    if seen.gram is not None:
        carried: FloatArray = seen.gram[number]
        found: FloatArray = carried[blocks[:, :, None], blocks[:, None, :]]
        return found
    (found,) = column_products(seen.matrix[number][None], blocks)
    return found


def _remove(seen: Seen, channels: IntArray) -> None:
    """Take some channels from a reader, which changes its other weights for the best."""
    inputs = seen.place[seen.blocks[channels]].ravel()
    if seen.inverse is None:
        return
    seen.gone.append(seen.blocks[channels].ravel())
    for number, inverse in enumerate(seen.inverse):
        rows = inverse[inputs]  # [block, inputs]
        solved = np.linalg.solve(rows[:, inputs], rows)
        if seen.gram is not None:
            _remove_from(seen.gram[number], inputs, solved)
        else:
            matrix = seen.matrix[number]
            matrix -= matrix[:, inputs] @ solved
            matrix[:, inputs] = 0.0
        inverse -= rows.T @ solved
        inverse[inputs] = 0.0
        inverse[:, inputs] = 0.0
        inverse[inputs, inputs] = 1.0


def _remove_from(gram: FloatArray, inputs: IntArray, solved: FloatArray) -> None:
    """What the removal of some inputs does to the products of a matrix's columns, in place."""
    columns = gram[:, inputs]
    shared = columns @ solved
    corner = solved.T @ (columns[inputs] @ solved)
    corner -= shared
    corner -= shared.T
    gram += corner
    gram[inputs] = 0.0
    gram[:, inputs] = 0.0
