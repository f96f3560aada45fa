"""Pass ``few_bits``: stacks of kernels in few bits as real numbers, and the nearest to others.

A weight is ``(step - zero) * scale``: a step of few bits, with a scale and a zero point that a row
or a block of its columns shares. What is near is what gives nearly the same: with the second
moments ``M`` of what a kernel sees, ``W`` is as far from ``B`` as ``tr((W - B) M (W - B)')``. Steps
are chosen one column after the other, each by what the others leave (QuantEase, Behdin et al.
2023); scales, of given steps, are a least squares of as many numbers as a row has blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, FloatArray, IntArray, Shape
from morphgraph.edit import array_of, like_tensor
from morphgraph.onnx_io import static_shape
from morphgraph.passes.calibration.kernels import Store

#: Of the mean of the moments' diagonal, that is added to it.
DAMPING = 0.01
#: Rounds over all columns, and columns that are gone through at a time.
ROUNDS = 3
TOGETHER = 64


@dataclass(frozen=True)
class Grid:
    """One kernel, ``[rows, columns]``.

    Attributes:
        steps: ``[rows, columns]``.
        scales, zeros: ``[rows, blocks]``.
        most: the largest step; the least is 0.
    """

    steps: IntArray
    scales: FloatArray
    zeros: FloatArray
    most: int

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        columns, blocks = self.steps.shape[1], self.scales.shape[1]
        return int(-(-columns // blocks))

    def by_column(self, by_block: FloatArray) -> FloatArray:
        """A number of each block for each of its columns, ``[rows, columns]``."""
        return np.repeat(by_block, self.block, axis=1)[:, : self.steps.shape[1]]

    def array(self) -> FloatArray:
        """As real numbers."""
        return (self.steps - self.by_column(self.zeros)) * self.by_column(self.scales)

    def nearest(self, wanted: FloatArray) -> "Grid":
        """With the steps that are nearest to a kernel, whatever it sees."""
        scales = self.by_column(self.scales)
        safe = np.where(scales == 0, 1.0, scales)
        steps = np.where(scales == 0, self.steps, wanted / safe + self.by_column(self.zeros))
        return replace(self, steps=np.clip(np.rint(steps), 0, self.most).astype(np.int64))

    def stepped(self, wanted: FloatArray, moments: FloatArray) -> "Grid":
        """With other steps, that give nearly what a kernel gives.

        Args:
            wanted: the kernel, ``[rows, columns]``.
            moments: of what it sees, positive definite, ``[columns, columns]``.
        """
        scales, zeros = self.by_column(self.scales), self.by_column(self.zeros)
        safe, columns = np.where(scales == 0, 1.0, scales), self.steps.shape[1]
        now, steps = wanted.copy(), self.steps.copy()
        left = np.zeros_like(now)  # (now - wanted) @ moments
        for _ in range(ROUNDS):
            former = steps.copy()
            for first in range(0, columns, TOGETHER):
                part = np.arange(first, min(first + TOGETHER, columns))
                inside, before = moments[np.ix_(part, part)], now[:, part].copy()
                here = left[:, part].copy()
                for k, column in enumerate(part):
                    best = now[:, column] - here[:, k] / inside[k, k]
                    step = np.rint(best / safe[:, column] + zeros[:, column])
                    step = np.where(scales[:, column] == 0, steps[:, column], step)
                    steps[:, column] = np.clip(step, 0, self.most)
                    value = (steps[:, column] - zeros[:, column]) * scales[:, column]
                    here += np.outer(value - now[:, column], inside[k])
                    now[:, column] = value
                left += (now[:, part] - before) @ moments[part]
            if np.array_equal(steps, former):
                break
        return replace(self, steps=steps)

    def scaled(self, wanted: FloatArray, moments: FloatArray) -> "Grid":
        """With other scales of the same steps; arguments as of :meth:`stepped`."""
        plain = self.steps - self.by_column(self.zeros)
        starts = np.arange(0, plain.shape[1], self.block)
        against = np.add.reduceat(plain * (wanted @ moments), starts, axis=1)
        rows, blocks = against.shape
        products = np.empty((rows, blocks, blocks))
        for k, start in enumerate(starts):
            part = slice(start, start + self.block)
            products[:, k] = np.add.reduceat(plain * (plain[:, part] @ moments[part]), starts, 1)
        diagonal = products.diagonal(axis1=1, axis2=2)
        damping = 1e-6 * diagonal.mean(axis=1, keepdims=True) + 1e-30
        products[:, range(blocks), range(blocks)] += damping
        # Towards those that there are, where steps say nothing.
        against = against + damping * self.scales
        found = np.linalg.solve(products, against[:, :, None])[:, :, 0]
        return replace(self, scales=np.where(found * self.scales > 0, found, self.scales))

    def ways(self, wanted: FloatArray, moments: FloatArray | None) -> Iterator["Grid"]:
        """Kernels near to one, of which the best may be chosen on other inputs.

        Args:
            wanted: the kernel, ``[rows, columns]``.
            moments: of what it sees, ``[columns, columns]``; ``None``: they are not known.
        """
        if moments is None:
            yield self.nearest(wanted)
            return
        damped = moments.copy()
        damped[np.diag_indices_from(damped)] += DAMPING * max(np.diag(moments).mean(), 1e-30)
        yield self.scaled(wanted, damped)
        stepped = self.stepped(wanted, damped)
        yield stepped
        yield stepped.scaled(wanted, damped).stepped(wanted, damped)


def without(grid: Grid, wanted: FloatArray, moments: FloatArray) -> FloatArray:
    """What is left of a kernel in few bits gives as nearly as it can what the whole one gives.

    Steps are other ones where that helps, and scales stay.

    Args:
        grid: the whole kernel.
        wanted: what would be best in real numbers; columns of zeros are gone.
        moments: of what the whole one sees, positive definite, ``[columns, columns]``.
    """
    gone, whole = ~wanted.any(axis=0), grid.array()
    left = moments.copy()  # nothing is seen there, so that the others cannot count on it
    left[gone], left[:, gone] = 0.0, 0.0
    left[gone, gone] = np.diag(moments)[gone]
    near = [grid.nearest(wanted).array(), grid.stepped(wanted, left).array()]
    kernels = [np.where(gone, 0.0, kernel) for kernel in (whole, *near)]
    errors = [float(np.sum((whole - kernel) @ moments * (whole - kernel))) for kernel in kernels]
    return kernels[int(np.argmin(errors))]


@dataclass(frozen=True)
class FewBits(Store):
    """A stack of kernels of whole numbers, several in a byte, the lowest bits first.

    Attributes:
        value: the bytes, ``[experts, rows, bytes]``.
        scale: ``[experts, rows]``, or by blocks of columns ``[experts, rows, blocks]``.
        zero: the zero points in bytes, along the last axis; ``None``: half of the range.
        bits: of a number.
    """

    value: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    bits: int

    @property
    def shape(self) -> Shape:
        """``(experts, rows, columns)``."""
        experts, rows, width = static_shape(self.value)
        return experts, rows, width * 8 // self.bits

    @property
    def names(self) -> frozenset[str]:
        """Of the initializers."""
        held = (self.value, self.scale, self.zero)
        return frozenset(value.name or "" for value in held if value is not None)

    def array(self) -> Array:
        """The kernels as real numbers."""
        return np.stack([grid.array() for grid in self.grids()]).astype(np.float32)

    def write(self, kernel: Array) -> None:
        """Store the nearest numbers to other kernels, in place; the scales stay."""
        both = zip(self.grids(), kernel, strict=True)
        self.write_grids([grid.nearest(each.astype(np.float64)) for grid, each in both])

    def grids(self) -> list[Grid]:
        """The kernel of every expert."""
        experts, rows, _ = self.shape
        steps = unpacked(array_of(self.value), self.bits)
        scales = array_of(self.scale).astype(np.float64).reshape(experts, rows, -1)
        if self.zero is None:
            zeros = np.full(scales.shape, 2.0 ** (self.bits - 1))
        else:
            whole = unpacked(array_of(self.zero), self.bits).astype(np.float64)
            by_row = whole.ndim == 2
            zeros = whole[:, :rows, None] if by_row else whole[:, :, : scales.shape[2]]
        most = 2**self.bits - 1
        return [Grid(*each, most) for each in zip(steps, scales, zeros, strict=True)]

    def write_grids(self, grids: Sequence[Grid]) -> None:
        """Store the steps and scales of every expert, in place; zero points stay."""
        steps = np.stack([grid.steps for grid in grids])
        scales = np.stack([grid.scales for grid in grids])
        _write(self.value, packed(steps, self.bits))
        _write(self.scale, scales.reshape(static_shape(self.scale)))


def unpacked(held: Array, bits: int) -> IntArray:
    """What bytes hold, the lowest bits first.

    >>> unpacked(np.array([0x21, 0x43], np.uint8), 4)
    array([1, 2, 3, 4])
    """
    parts = [(held >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*held.shape[:-1], -1).astype(np.int64)


def packed(numbers: IntArray, bits: int) -> Array:
    """The bytes that hold numbers, the lowest bits first; the last axis fills whole bytes.

    >>> packed(np.array([1, 2, 3, 4]), 4).tolist()
    [33, 67]
    """
    parts = numbers.reshape(*numbers.shape[:-1], -1, 8 // bits).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    held: Array = np.bitwise_or.reduce(parts << shifts, axis=-1)
    return held


def _write(value: ir.Value, array: Array) -> None:
    tensor = value.const_value
    assert tensor is not None
    kind = array_of(value).dtype
    value.const_value = like_tensor(tensor, np.ascontiguousarray(array.astype(kind)))
