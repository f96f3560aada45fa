"""Kernels as a runtime executes them: what a run time depends on, read off type and shapes.

Nothing here knows a model: an operator's type, its layout and the shapes that it gets and makes are
all that a profile of any runtime tells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import FloatArray, Shape

BYTES = 4.0
"""Bytes of a number: what is measured is single precision."""

LEAST_AROUND = 2.0**20
"""Bytes around that are in the nearest cache anyway."""


def around(total: float) -> float:
    """So many bytes in steps of a factor of 1.4: finer ones make no difference.

    >>> around(100.0), around(127.0), around(0.0)
    (90.50966799187809, 128.0, 0.0)
    """
    return 2.0 ** (round(2 * math.log2(total)) / 2) if total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel with its sizes.

    Attributes:
        op_type: as the runtime calls it.
        layout: ``"blocked"``, ``"plain"`` or empty.
        inputs: shapes of its tensors, weights included.
        outputs: shapes of what it makes.
        around: bytes of weights and results of the whole network: what passes through the caches
            between two runs of the kernel, and drives its weights out of them. 0: not known.
        activation: the operator that is fused behind it; empty for none.

    >>> Kernel("Conv", "plain", ((1, 8, 4, 4), (16, 8, 3, 3)), ((1, 16, 4, 4),)).kind
    'Conv dense plain'
    """

    op_type: str
    layout: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    around: float = 0.0
    activation: str = ""

    @property
    def kind(self) -> str:
        """Kernels of one kind run alike: what is measured of some says something of all."""
        if (convolution := _convolution(self)) is not None:
            return f"Conv {convolution.form} {self.layout or 'plain'}"
        if (product := _product(self)) is not None:
            return "products" if product[0] > 1 else "product"
        if _is_recurrent(self):
            return self.op_type
        name = self.op_type.removeprefix("Fused")
        if self.layout:  # a pooling
            return f"{name} {self.layout}"
        if _turns(self):
            return f"{name} across"
        return f"{name} spread" if _spreads(self) else name

    def work(self, block: int = 1) -> FloatArray:
        """What its time is made of, ``[5]``.

        A start, multiply-adds, weights, other numbers moved, and results that go through an
        activation which takes a pass of its own.

        Args:
            block: channels are computed in blocks of so many, filled up where they are fewer.
        """
        weights = 0.0
        arithmetic = 0.0
        moved = float(sum(map(math.prod, self.outputs)) + sum(map(math.prod, self.inputs)))
        if (convolution := _convolution(self)) is not None:
            weights, arithmetic = math.prod(self.inputs[1]), convolution.macs(block)
        elif (product := _product(self)) is not None:
            batch, rows, inner, columns = product
            arithmetic = float(batch * rows * inner * _padded(columns, block))
            weights = float(inner * columns)
        elif _is_recurrent(self):
            weights = float(sum(math.prod(shape) for shape in self.inputs[1:3]))
            arithmetic = weights * self.inputs[0][0]
        moved -= weights
        passed = float(sum(map(math.prod, self.outputs))) if self.passes_again else 0.0
        return np.array([1.0, arithmetic, weights, max(moved, 0.0), passed])

    @property
    def passes_again(self) -> bool:
        """Whether results are read once more for a fused activation.

        A maximum with 0 is done where they are made. Of others ONNX Runtime computes all results
        first: with a ``Clip`` a depthwise convolution takes 1.3 to 1.4 times as long. What it
        costs is for the measurements to say; where it is free its price is 0.
        """
        return self.activation not in ("", "Relu")

    def passes(self) -> float:
        """Numbers of its weights and results."""
        return float(self.work()[2]) + sum(map(math.prod, self.outputs))

    def features(self, block: int) -> FloatArray:
        """Numbers that a run time varies smoothly with, ``[features]``, by kind equally many.

        The last is the logarithm of what is around.

        Args:
            block: channels are computed in blocks of so many: within one, width costs nothing.
        """
        return np.append(self._sizes(block), math.log2(max(self.around, LEAST_AROUND)))

    def _sizes(self, block: int) -> FloatArray:
        if (convolution := _convolution(self)) is not None:
            sizes = convolution.features(block, len(self.inputs) > _WITH_SUM)
            return np.append(sizes, float(self.passes_again))
        if (product := _product(self)) is not None:
            batch, rows, inner, columns = product
            return np.array([*map(math.log2, (batch, rows, inner, _padded(columns, block)))])
        shape = max((*self.inputs, *self.outputs), key=math.prod, default=())
        size = math.log2(max(math.prod(shape), 1))
        if _is_recurrent(self):
            steps, per_step = self.inputs[0][0], math.log2(math.prod(self.inputs[2]))
            return np.array([math.log2(max(steps, 1)), per_step])
        last = math.log2(max(shape[-1], 1)) if shape else 0.0
        made = math.log2(max(sum(map(math.prod, self.outputs)), 1))
        return np.array([size, last, size - made])


LARGEST_MULTIPLE = 64
"""Channels of a block are at most so many."""


def multiple_of(layouts: Sequence[tuple[str, int]]) -> int:
    """What divides the channels of all kernels that ran in blocks, and of no others; else 1.

    Args:
        layouts: of each kernel, with its channels.

    >>> multiple_of([("blocked", 16), ("blocked", 36), ("plain", 7), ("plain", 10)])
    4
    """
    blocked, plain = (
        {math.gcd(channels, LARGEST_MULTIPLE) for layout, channels in layouts if layout == each}
        for each in ("blocked", "plain")
    )
    if not blocked or not plain:
        return 1
    least = min(blocked)
    return least if max(plain) < least else 1


def dense_rule(layouts: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """Which dense convolutions run in blocks: a multiple of channels, and below how many any.

    Channels that are fewer than a block are no whole one, whatever their number: ONNX Runtime reads
    these one by one, and makes blocks of them.

    Args:
        layouts: of each convolution, with the channels that it reads.

    Returns:
        The multiple, 1 where none is seen; and the number below which any channels will do, 0 where
        none is seen.

    >>> dense_rule([("blocked", c) for c in (5, 11, 20, 32)] + [("plain", 17), ("plain", 30)])
    (4, 16)
    """
    least = min((channels for layout, channels in layouts if layout == "plain"), default=0)
    multiple = multiple_of([each for each in layouts if each[1] >= least])
    odd = [c for layout, c in layouts if layout == "blocked" and c < least and c % multiple]
    # A block has as many channels as a power of 2.
    return multiple, min(1 << max(odd).bit_length(), least) if odd else 0


_WITH_SUM = 3
"""Inputs of a convolution that nothing is added to: operand, weight, bias."""
_FILTER_SETS = 4
"""Blocks of output channels that a convolution computes together."""


@dataclass(frozen=True, slots=True)
class _Convolution:
    samples: int
    channels: int
    filters: int
    groups: int
    places: int
    row: int
    taps: int
    stride: float

    @property
    def form(self) -> str:
        if self.groups == 1:
            if self.taps == 1:
                return "pointwise"
            return "image" if self.channels <= _IMAGE_CHANNELS else "dense"
        return "depthwise" if self.groups == self.channels else "grouped"

    def macs(self, block: int) -> float:
        inner = self.channels // self.groups
        if self.groups < self.channels and self.channels > _IMAGE_CHANNELS:
            inner = _padded(inner, block)
        filters = _padded(self.filters, block)
        return float(self.samples * filters * inner * self.places * self.taps)

    def features(self, block: int, adds: bool) -> FloatArray:
        blocks = _padded(self.filters, block) // block
        return np.array(
            [
                math.log2(_padded(self.channels, block)),
                math.log2(_padded(self.filters, block)),
                math.log2(max(self.samples * self.places, 1)),
                math.log2(max(self.row, 1)),
                math.log2(self.taps),
                math.log2(self.stride),
                (blocks - 1) % _FILTER_SETS + 1.0 if blocks < 4 * _FILTER_SETS else _FILTER_SETS,
                float(adds),
                math.log2(max(self.channels // self.groups, 1)) if self.groups > 1 else 0.0,
            ]
        )


def _padded(count: int, block: int) -> int:
    return -(-count // block) * block


_IMAGE_CHANNELS = 4
"""Channels up to which a convolution reads an image."""


def _convolution(kernel: Kernel) -> _Convolution | None:
    if "Conv" not in kernel.op_type or len(kernel.inputs) < 2 or not kernel.outputs:
        return None
    (operand, weight), result = kernel.inputs[:2], kernel.outputs[0]
    if len(weight) == len(operand) + 1:  # groups have an axis of their own in OpenVINO
        weight = (weight[0] * weight[1], *weight[2:])
    if not len(operand) == len(weight) == len(result) > 2:
        return None
    if "Transpose" in kernel.op_type:
        operand, result = result, operand
    if not (all(operand) and all(weight) and all(result)):
        return None
    places = math.prod(result[2:])
    ratio = math.prod(operand[2:]) / places
    return _Convolution(
        samples=operand[0],
        channels=operand[1],
        filters=result[1],
        groups=max(round(operand[1] / weight[1]), 1),
        places=places,
        row=result[-1],
        taps=math.prod(weight[2:]),
        stride=max(float(round(ratio ** (1 / (len(operand) - 2)))), 1.0),
    )


def channels_of_a_group(kernel: Kernel) -> int:
    """What divides the channels that a group of a convolution reads and makes; 0 without groups.

    A depthwise convolution's groups have one channel: it is none of these.

    >>> channels_of_a_group(Kernel("Conv", "", ((1, 64, 9, 9), (96, 8, 3, 3)), ((1, 96, 9, 9),)))
    4
    """
    found = _convolution(kernel)
    if found is None or found.form != "grouped":
        return 0
    return math.gcd(found.channels // found.groups, found.filters // found.groups)


def reads_all(kernel: Kernel) -> bool:
    """Whether it is a convolution that reads all channels for each that it makes.

    >>> reads_all(Kernel("Conv", "", ((1, 64, 9, 9), (96, 8, 3, 3)), ((1, 96, 9, 9),)))
    False
    """
    found = _convolution(kernel)
    return found is not None and found.groups == 1


_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "FullyConnected")


def _product(kernel: Kernel) -> tuple[int, int, int, int] | None:
    """Batch, rows, inner size and columns of a matrix product."""
    if kernel.op_type not in _PRODUCTS or len(kernel.inputs) < 2 or not kernel.outputs:
        return None
    (left, right), result = kernel.inputs[:2], kernel.outputs[0]
    if not left or not right or not result or not all((*left, *right, *result)):
        return None
    # Sizes alone: runtimes transpose operands, batches included, as a part of the product.
    columns = result[-1]
    every_row = math.prod(result) // columns
    inner = math.prod(left) // every_row
    if inner * every_row != math.prod(left):  # one matrix on the left for many on the right
        inner = max(math.prod(right[-2:]) // columns, 1)
    batch = max(math.prod(right) // (inner * columns), 1)
    return batch, max(every_row // batch, 1), inner, columns


def _turns(kernel: Kernel) -> bool:
    """Whether numbers that lie side by side come to lie apart: a line is no longer copied whole."""
    if kernel.op_type != "Transpose" or not kernel.inputs or not kernel.outputs:
        return False
    return kernel.inputs[0][-1:] != kernel.outputs[0][-1:]


def _spreads(kernel: Kernel) -> bool:
    """Whether an operand's numbers are each used for several of the result, one apart."""
    if len(kernel.inputs) != 2 or len(kernel.outputs) != 1:
        return False
    (one, other), result = map(math.prod, kernel.inputs), math.prod(kernel.outputs[0])
    return max(one, other) == result and 1 < min(one, other) < result


def _is_recurrent(kernel: Kernel) -> bool:
    return kernel.op_type in ("LSTM", "GRU", "RNN") and len(kernel.inputs) > 2
