"""Pass ``stacks``: what channels are to kernels of which the network chooses one for every place.

Each expert is a map of its own, that sees the places that choose it. It has no bias that could make
up for a mean, so that its moments are those about zero, and what it gives counts by the share that
it is multiplied with: a mixture loses the sum over all experts of their errors at their places.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.calibration.processes import Processes
from morphgraph.errors import ModelError
from morphgraph.onnx_io import escape
from morphgraph.passes.calibration.chosen import Chosen, chosen_products
from morphgraph.passes.calibration.dense import (
    Dense,
    Shown,
    dense_products,
    mixed_dense,
    shares_of,
)
from morphgraph.passes.calibration.fused import Fused, fused_mixtures
from morphgraph.passes.calibration.moments import Moments, Statistics
from morphgraph.passes.calibration.removal import (
    Seen,
    column_products,
    contributions,
    seen_alone,
    seen_by,
)
from morphgraph.passes.calibration.shares import Mixed, mixed
from morphgraph.passes.calibration.visits import Choose, Chooser

#: In place of a group: all inputs of an expert are looked at together.
TOGETHER = -1
Stack = Chosen | Fused | Dense
"""Kernels of experts, one behind the other."""


def stacks(model: ir.Model, weights: frozenset[str]) -> dict[str, Stack]:
    """All of a model by the names of the nodes that multiply by their kernels.

    Args:
        model: canonical.
        weights: names of the values that no graph input reaches.
    """
    return {
        **chosen_products(model, weights),
        **fused_mixtures(model, weights),
        **dense_products(model, weights),
    }


@dataclass(frozen=True)
class Routed:
    """What is seen at some places.

    Attributes:
        rows: times their shares, ``[places, rows, inputs]``.
        experts: the one of every place, ``[places]``.
        energies: of what it gives, times its share, ``[places]``.
    """

    rows: Array
    experts: IntArray
    energies: FloatArray


@dataclass(frozen=True)
class StackLook:
    """A product with chosen kernels that is looked at.

    Attributes:
        chosen: the product.
        mixed: what is added up of its results, where that is known; else all count the same.
    """

    chosen: Chosen
    mixed: Mixed | None

    @property
    def name(self) -> str:
        """Of the product."""
        return self.chosen.name

    @property
    def stack(self) -> Chosen:
        """Its kernels."""
        return self.chosen

    @property
    def tells(self) -> bool:
        """Whether it says what the experts add."""
        return self.mixed is not None

    @property
    def stop(self) -> str:
        """Where its kernels are taken: behind it there is one for every place."""
        return self.chosen.gather.name or ""

    @cached_property
    def asked(self) -> list[str]:
        """What it sees, by which numbers, what it gives, and its shares."""
        given = [self.chosen.result]
        if self.mixed is not None:
            given = [self.mixed.given.value, self.mixed.shares.value]
        return [value.name or "" for value in (self.chosen.operand, self.chosen.numbers, *given)]

    def enough(self, chooser: Chooser, batches: int) -> int:
        """How many places of each of so many batches are looked at: for every expert enough."""
        return self.chosen.store.shape[0] * chooser.enough(self.chosen.inputs, batches)

    def rows(self, found: Arrays, choose: Choose) -> Routed:
        """What is seen at some places of a batch, and who sees it.

        Args:
            found: what was asked for.
            choose: which of so many places are looked at.
        """
        operand, numbers, given, *shares = (found[name] for name in self.asked)
        experts = self.chosen.choice(numbers)
        places = choose(self.name, len(experts))
        rows = self.chosen.rows(operand)[places]
        if self.mixed is None:
            parts = self.chosen.results(given).reshape(len(experts), -1)[places]
        else:
            share = self.mixed.shares.of(shares[0], len(experts))[places]
            parts = self.mixed.given.of(given, len(experts))[places] * share
            rows = rows * share[:, :, None].astype(rows.dtype)
        energies = np.einsum("po,po->p", parts, parts, dtype=np.float64)
        return Routed(rows, experts[places], energies)


@dataclass(frozen=True)
class FusedLook:
    """Kernels of a mixture in one node that are looked at.

    Attributes:
        stack: the kernels.
        threads: of ONNX Runtime.
    """

    stack: Fused
    threads: int = 0

    @property
    def name(self) -> str:
        """Of the kernels."""
        return self.stack.name

    @property
    def tells(self) -> bool:
        """Whether it says what the experts add."""
        return not self.stack.is_first

    @property
    def stop(self) -> str:
        """The node."""
        return self.stack.taker[0]

    @property
    def asked(self) -> list[str]:
        """The tokens, and of what each takes the largest."""
        return self.stack.asked

    def enough(self, chooser: Chooser, batches: int) -> int:
        """How many tokens of each of so many batches are looked at: for every expert enough."""
        return self.stack.store.shape[0] * chooser.enough(self.stack.inputs, batches)

    def rows(self, found: Arrays, choose: Choose) -> Routed:
        """What the kernels see for some tokens of a batch, and whose they are.

        Args:
            found: what was asked for.
            choose: which of so many tokens are looked at.
        """
        operands = self.stack.operands(found)
        places = choose(self.name, len(operands[0]))
        operands = [each[places] for each in operands]
        matrices, added = self.stack.matrices(), self.stack.added()
        rows = [np.zeros((0, self.stack.inputs), operands[0].dtype)]
        experts, energies = [np.zeros(0, np.int64)], [np.zeros(0)]
        for expert, there, shares, seen in self.stack.shown(self.threads).seen(operands):
            given = seen @ matrices[expert].T + shares[:, None] * added[expert]
            rows.append(seen)
            experts.append(np.full(len(there), expert))
            energies.append(np.einsum("po,po->p", given, given, dtype=np.float64))
        every = np.concatenate(rows)[:, None]
        return Routed(every, np.concatenate(experts), np.concatenate(energies))


@dataclass(frozen=True)
class DenseLook:
    """A product with a stack of kernels that is looked at where experts have shares.

    Attributes:
        stack: the product.
        shares: what its results are multiplied with at last; ``None``: that is not known.
        mixed: the same, where nothing but sums stands between: then it says what experts add.
    """

    stack: Dense
    shares: Mixed | None
    mixed: Mixed | None

    @property
    def name(self) -> str:
        """Of the product."""
        return self.stack.name

    @property
    def tells(self) -> bool:
        """Whether it says what the experts add."""
        return self.mixed is not None

    @property
    def stop(self) -> str:
        """The product."""
        return self.stack.name

    @property
    def asked(self) -> list[str]:
        """What it maps, the shares, and what is multiplied with them, or its results."""
        given = self.stack.result.name or "" if self.mixed is None else self.mixed.given.name
        return [*self._shown.asked, given]

    @property
    def _shown(self) -> Shown:
        return Shown(self.stack, None if self.shares is None else self.shares.shares)

    def enough(self, chooser: Chooser, batches: int) -> int:
        """How many places of each of so many batches are looked at: for every expert enough."""
        return self.stack.store.shape[0] * chooser.enough(self.stack.inputs, batches)

    def rows(self, found: Arrays, choose: Choose) -> Routed:
        """What is seen at some places of a batch that have shares, and who sees it.

        Args:
            found: what was asked for.
            choose: which of so many places are looked at.
        """
        rows, shares = self._shown.seen(found)
        experts, tokens = self._shown.some(shares)
        chosen = choose(self.name, len(experts))
        experts, tokens = experts[chosen], tokens[chosen]
        given = found[self.asked[-1]]
        if self.mixed is None:
            parts = self.stack.results(given)
        else:
            parts = self.mixed.given.of(given, shares.size).reshape(*shares.shape, -1)
        share = shares[experts, tokens][:, None].astype(rows.dtype)
        parts, seen = parts[experts, tokens] * share, rows[experts, tokens] * share
        energies = np.einsum("po,po->p", parts, parts, dtype=np.float64)
        return Routed(seen[:, None], experts, energies)


AnyStackLook: TypeAlias = StackLook | FusedLook | DenseLook
"""Any of those."""


def stack_looks(model: ir.Model, found: Mapping[str, Stack], threads: int) -> list[AnyStackLook]:
    """What there is to look at.

    Args:
        model: canonical.
        found: all of its stacks.
        threads: of ONNX Runtime.
    """
    dense = {name: each for name, each in found.items() if isinstance(each, Dense)}
    listed: list[AnyStackLook] = []
    for each in found.values():
        if isinstance(each, Fused):
            listed.append(FusedLook(each, threads))
        elif isinstance(each, Chosen):
            listed.append(StackLook(each, mixed(model, each)))
        else:
            listed.append(DenseLook(each, shares_of(model, dense, each), mixed_dense(model, each)))
    return listed


class StackMoments:
    """What all experts of a stack see, and what that means for what they give.

    Where the covariances of all experts' inputs are too large, those of every channel's inputs are
    taken by themselves: what channels contribute is known then, not what could take over for them.

    Args:
        stack: the kernels.
        samples: what is seen, batch by batch; used up.
        blocks: by group index the inputs of every channel; none where only experts are asked for.
        room: bytes that the covariances may take together.
        processes: that share the batches.

    Attributes:
        energies: of what each expert gives, times its shares, as shares of that of all,
            ``[experts]``.
        units: those in which errors of each expert count, ``[experts]``.
    """

    def __init__(
        self,
        stack: Stack,
        samples: Iterable[Routed],
        blocks: Mapping[int, IntArray],
        room: int,
        processes: Processes,
    ) -> None:
        self.blocks = blocks
        self.matrices = stack.matrices()
        experts, _, inputs = self.matrices.shape
        parts = dict(blocks)
        if blocks and experts * inputs**2 * 8 <= room:
            parts = {TOGETHER: np.arange(inputs)[None]}
        among = max(experts * len(parts), 1)
        counting = {
            key: [Moments(crossed=False, among=among) for _ in range(experts)] for key in parts
        }
        energies, places = _count(samples, counting, parts, experts)
        energies = processes.total(energies)
        numbers = self.matrices.sum(dtype=np.float64)
        if not processes.total(np.array([places]))[0] or not np.isfinite(numbers):
            raise ModelError(
                f"node '{escape(stack.name)}' sees or gives no finite numbers on the calibration "
                "inputs; repair the model's weights, or give inputs of the kind that it expects"
            )
        self.of: dict[int, list[Statistics]] = {
            key: [
                each.statistics((*parts[key].shape, 0)).shared(processes).about_zero()
                for each in by_expert
            ]
            for key, by_expert in counting.items()
        }
        every = max(float(energies.sum()), 1e-30)
        self.energies: FloatArray = energies / every
        first = next(iter(self.of.values()), [])
        # One that nobody chooses costs next to nothing.
        counts = np.maximum([each.count for each in first], 1e-9)
        self.units: FloatArray = np.sqrt(counts / every)

    def seen(self, index: int, is_last: bool) -> list[Seen]:
        """What a group's channels are to every expert.

        Args:
            index: of the group.
            is_last: whether no other group asks: then the covariances are used up.
        """
        blocks, found = self.blocks[index], []
        for matrix, unit, statistics in self._experts(index):
            units = np.full((1, matrix.shape[1]), unit)
            if TOGETHER in self.of:
                mine = statistics if is_last else statistics.copied()
                found.append(seen_by(mine, matrix, units, blocks, energy=1.0))
            else:
                own = statistics
                found.append(seen_alone(own, own, matrix, units, blocks, energy=1.0))
        return found

    def contributed(self, index: int) -> FloatArray:
        """What each of a group's channels gives, a share of all, ``[channels]``."""
        blocks = self.blocks[index]
        total = np.zeros(len(blocks))
        for matrix, unit, statistics in self._experts(index):
            spread = statistics.covariance
            if TOGETHER in self.of:
                spread = spread[:, blocks[:, :, None], blocks[:, None, :]]
            total += contributions(spread, column_products(matrix * unit, blocks))
        return np.maximum(total, 0.0)

    def _experts(self, index: int) -> Iterator[tuple[FloatArray, float, Statistics]]:
        """Every expert's matrix, ``[1, outputs, inputs]``, its unit, and what its inputs are."""
        of_each = self.of.get(TOGETHER) or self.of[index]
        for matrix, unit, statistics in zip(self.matrices, self.units, of_each, strict=True):
            yield matrix[None].astype(np.float64), float(unit), statistics


def _count(
    samples: Iterable[Routed],
    counting: Mapping[int, Sequence[Moments]],
    parts: Mapping[int, IntArray],
    experts: int,
) -> tuple[FloatArray, float]:
    """Count what is seen, by expert; the energies of what each gives, and how many places.

    Args:
        samples: what is seen.
        counting: by group index, or for all together, the moments of every expert.
        parts: likewise the inputs of every channel.
        experts: how many there are.
    """
    energies, places = np.zeros(experts), 0.0
    for each in samples:
        good = np.isfinite(each.energies)
        places += float(good.sum())
        energies += np.bincount(each.experts[good], each.energies[good], experts)
        for expert, rows in _by_expert(each):
            for key, inputs in parts.items():
                seen = rows.reshape(-1, rows.shape[-1])[:, inputs]
                counting[key][expert].add(seen, seen[:, :, :0])
    return energies, places


def _by_expert(seen: Routed) -> Iterator[tuple[int, Array]]:
    """The rows of every expert that is there, ``[places, rows, inputs]``."""
    order = np.argsort(seen.experts, kind="stable")
    experts, first = np.unique(seen.experts[order], return_index=True)
    for expert, at in zip(experts.tolist(), np.split(order, first[1:]), strict=True):
        yield expert, seen.rows[at]
