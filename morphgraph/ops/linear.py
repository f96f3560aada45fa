"""Operators as linear maps of one operand: rows in, rows out, and the kernel as matrices.

A convolution, a matrix product or the input side of a recurrent layer computes at every *place* (a
sample and a position of its result)::

    result[place, g, o] = sum over inputs i and taps k of matrix[g, o, i, k] * rows[place, g, i, k]

and adds its bias. Least squares need nothing else of it. ``g`` counts independent maps (the groups
of a convolution), ``i`` the channels that one of them sums over, ``k`` the positions of a kernel,
``o`` the channels that it makes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar

import numpy as np

from morphgraph.arrays import Array, Flags, IntArray, Shape


@dataclass(frozen=True, kw_only=True)
class Linear(ABC):
    """An operator as a linear map.

    Attributes:
        operand: the port of what it maps, an activation.
        weight: the port of its kernel.
        factor: what the kernel is multiplied with beside (``alpha`` of a Gemm).
        inside: the operator keeps what the map gives to itself (the gates of a recurrent layer):
            ``results`` cannot be asked, and there is no bias to correct.
        by_result: places are those of the result, whose shape the rows depend on; else those of the
            operand.
    """

    by_result: ClassVar[bool] = False

    operand: int
    weight: int
    factor: float = 1.0
    inside: bool = False

    @abstractmethod
    def places(self, operand: Shape, result: Shape) -> int:
        """How many places an operand and a result of these shapes have."""

    @abstractmethod
    def rows(self, operand: Array, result: Shape, chosen: IntArray) -> Array:
        """What the map sees at some places, ``[places, groups, inputs, taps]``."""

    @abstractmethod
    def results(self, result: Array, chosen: IntArray) -> Array:
        """The operator's result at some places, ``[places, groups, outputs]``."""

    @abstractmethod
    def matrix(self, kernel: Array) -> Array:
        """The kernel as matrices, ``[groups, outputs, inputs, taps]``, without the factor."""

    @abstractmethod
    def kernel(self, matrix: Array, like: Shape) -> Array:
        """Matrices as a kernel of this shape: the inverse of ``matrix``."""

    @abstractmethod
    def input_axis(self, rank: int) -> int:
        """The axis of the operand, of this rank, that is summed over."""

    @abstractmethod
    def output_axis(self, rank: int) -> int:
        """The axis of the result, of this rank, that holds the outputs of all groups."""

    @property
    def reading(self) -> tuple[object, ...]:
        """How a kernel is taken for matrices: operators with the same take one for the same."""
        return (type(self), self.factor)

    def spread(self, vector: Array, rank: int) -> Array:
        """A number for each of ``[groups, outputs]`` as it broadcasts against the result."""
        shape = [1] * rank
        shape[self.output_axis(rank)] = vector.size
        return vector.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Product(Linear):
    """A matrix product with a kernel.

    Attributes:
        reduced: the axis of the operand that is summed over, from behind.
        made: the axis of the result that holds the outputs, from behind.
        transposed: the kernel is ``[inputs, outputs]``, not ``[outputs, inputs]``.
    """

    reduced: int = -1
    made: int = -1
    transposed: bool = False

    def places(self, operand: Shape, result: Shape) -> int:
        return prod(operand) // operand[self.reduced]

    def rows(self, operand: Array, result: Shape, chosen: IntArray) -> Array:
        return _flat(operand, self.reduced)[chosen][:, None, :, None]

    def results(self, result: Array, chosen: IntArray) -> Array:
        return _flat(result, self.made)[chosen][:, None, :]

    @property
    def reading(self) -> tuple[object, ...]:
        return (*super().reading, self.transposed)

    def matrix(self, kernel: Array) -> Array:
        plain = kernel.reshape(kernel.shape[-2:])
        return (plain.T if self.transposed else plain)[None, :, :, None]

    def kernel(self, matrix: Array, like: Shape) -> Array:
        plain = matrix[0, :, :, 0]
        return (plain.T if self.transposed else plain).reshape(like)

    def input_axis(self, rank: int) -> int:
        return rank + self.reduced

    def output_axis(self, rank: int) -> int:
        return rank + self.made


def _flat(array: Array, axis: int) -> Array:
    """``[places, size of the axis]``."""
    last = np.moveaxis(array, axis, -1)
    return last.reshape(-1, last.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Gates(Linear):
    """The input side of a recurrent layer, by a kernel ``[directions, gates * units, inputs]``."""

    inside: bool = True

    def places(self, operand: Shape, result: Shape) -> int:
        return prod(operand[:-1])

    def rows(self, operand: Array, result: Shape, chosen: IntArray) -> Array:
        return _flat(operand, -1)[chosen][:, None, :, None]

    def results(self, result: Array, chosen: IntArray) -> Array:
        raise NotImplementedError("a recurrent layer keeps its gates to itself")

    def matrix(self, kernel: Array) -> Array:
        return kernel.reshape(1, -1, kernel.shape[-1], 1)

    def kernel(self, matrix: Array, like: Shape) -> Array:
        return matrix.reshape(like)

    def input_axis(self, rank: int) -> int:
        return rank - 1

    def output_axis(self, rank: int) -> int:
        raise NotImplementedError("a recurrent layer keeps its gates to itself")


@lru_cache(maxsize=4096)  # of a network's convolutions most are alike
def _met(window: "Window", axis: int, given: int, made: int) -> Flags:
    seen = window.seen(axis, given, made, np.arange(made)) < given
    met = np.asarray(seen.any(axis=0), dtype=np.bool_)
    met.flags.writeable = False
    return met


@dataclass(frozen=True, kw_only=True)
class Window(Linear):
    """A convolution, or a transposed one.

    Attributes:
        size: of the kernel, per spatial axis.
        strides, dilations: likewise.
        before: positions added in front of every spatial axis (cut off, where it is transposed);
            ``None``: so that as much stands in front as behind.
        odd_first: then an odd one goes in front.
        extra: positions that a transposed one makes behind what it reaches; empty: none.
        groups: of channels.
        transposed: the kernel is ``[groups * inputs, outputs, *K]``.
    """

    by_result: ClassVar[bool] = True

    size: Shape
    strides: Shape
    dilations: Shape
    before: Shape | None
    odd_first: bool = False
    extra: Shape = ()
    groups: int = 1
    transposed: bool = False

    def places(self, operand: Shape, result: Shape) -> int:
        return operand[0] * prod(result[2:])

    def rows(self, operand: Array, result: Shape, chosen: IntArray) -> Array:
        sample, *at = _where(chosen, result[2:])
        rank = len(at)
        padded = np.pad(operand, [(0, 0), (0, 0), *[(0, 1)] * rank])
        index: list[IntArray | slice] = [sample.reshape(-1, *[1] * rank), slice(None)]
        for axis, positions in enumerate(at):
            seen = self.seen(axis, operand.shape[2 + axis], result[2 + axis], positions)
            shape = [1] * rank
            shape[axis] = self.size[axis]
            index.append(seen.reshape(len(seen), *shape))
        patches = np.moveaxis(padded[tuple(index)], -1, 1)  # [places, channels, *K]
        return patches.reshape(len(chosen), self.groups, operand.shape[1] // self.groups, -1)

    def seen(self, axis: int, given: int, made: int, positions: IntArray) -> IntArray:
        """Which position of the operand a place sees through every tap, ``[places, taps]``.

        The operand's size stands for none. A transposed convolution sends position ``p`` to
        ``p stride + tap dilation``.
        """
        width, stride, gap = self.size[axis], self.strides[axis], self.dilations[axis]
        reach = (width - 1) * gap + 1
        if self.before is not None:
            first = self.before[axis]
        else:
            few, many = (made, given) if not self.transposed else (given, made)
            more = self.extra[axis] if self.extra else 0
            total = max((few - 1) * stride + reach + more - many, 0)
            first = total - total // 2 if self.odd_first else total // 2
        taps = np.arange(width) * gap
        if self.transposed:
            seen, odd = np.divmod(positions[:, None] + first - taps, stride)
            inside = (odd == 0) & (seen >= 0) & (seen < given)
        else:
            seen = positions[:, None] * stride + taps - first
            inside = (seen >= 0) & (seen < given)
        return np.where(inside, seen, given)

    def met(self, axis: int, given: int, made: int) -> Flags:
        """Which taps along a spatial axis ever see a position of the operand, ``[taps]``.

        The axis has ``given`` positions in the operand and ``made`` in the result.

        >>> same = Window(operand=0, weight=1, size=(5,), strides=(1,), dilations=(1,), before=(2,))
        >>> same.met(0, 2, 2), same.met(0, 3, 3).all()
        (array([False,  True,  True,  True, False]), np.True_)
        """
        return _met(self, axis, given, made)

    def results(self, result: Array, chosen: IntArray) -> Array:
        sample, *at = _where(chosen, result.shape[2:])
        index: list[IntArray | slice] = [sample, slice(None), *at]
        found = result[tuple(index)]
        return found.reshape(len(chosen), self.groups, -1)

    @property
    def reading(self) -> tuple[object, ...]:
        return (*super().reading, self.groups, self.transposed)

    def matrix(self, kernel: Array) -> Array:
        first, second = kernel.shape[:2]
        parts = kernel.reshape(self.groups, first // self.groups, second, -1)
        return parts.transpose(0, 2, 1, 3) if self.transposed else parts

    def kernel(self, matrix: Array, like: Shape) -> Array:
        return (matrix.transpose(0, 2, 1, 3) if self.transposed else matrix).reshape(like)

    def input_axis(self, rank: int) -> int:
        return 1

    def output_axis(self, rank: int) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class Channelwise(Linear):
    """A norm's scale and shift: a map of its own for every channel, of what is normalized.

    Attributes:
        axis: of operand and result on which the channels stand.
        mean, unit: what is subtracted from every channel, and what that is multiplied with, of a
            norm that has statistics stored; else they are those of each place.
        epsilon: is added to the variance of a place.
    """

    axis: int
    mean: Array | None = None
    unit: Array | None = None
    epsilon: float = 0.0

    def places(self, operand: Shape, result: Shape) -> int:
        return prod(operand) // operand[self.axis]

    def rows(self, operand: Array, result: Shape, chosen: IntArray) -> Array:
        seen = _flat(operand, self.axis)[chosen].astype(np.float64)
        if self.mean is not None and self.unit is not None:
            normal = (seen - self.mean) * self.unit
        else:
            centered = seen - seen.mean(axis=1, keepdims=True)
            variance = np.square(centered).mean(axis=1, keepdims=True)
            normal = centered / np.sqrt(variance + self.epsilon)
        return normal[:, :, None, None]

    def results(self, result: Array, chosen: IntArray) -> Array:
        return _flat(result, self.axis)[chosen][:, :, None]

    def matrix(self, kernel: Array) -> Array:
        return kernel.reshape(-1, 1, 1, 1)

    def kernel(self, matrix: Array, like: Shape) -> Array:
        return matrix.reshape(like)

    def input_axis(self, rank: int) -> int:
        return self.axis % rank

    def output_axis(self, rank: int) -> int:
        return self.axis % rank


def _where(chosen: IntArray, sizes: Shape) -> tuple[IntArray, ...]:
    """Places as sample and position on every spatial axis."""
    rest, positions = chosen, []
    for size in reversed(sizes):
        rest, position = np.divmod(rest, size)
        positions.append(position)
    return (rest, *reversed(positions))
