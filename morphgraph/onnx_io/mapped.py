"""Weights that stay in their file until they are read, and then pass by block after block.

External data is mapped into memory, and what was read of a map counts as memory of the process.
Here reading goes in blocks, and a map's pages are given back behind each: a model of many gigabytes
is scored, resized and written in a few dozen megabytes.
"""

import mmap
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray

Cut = tuple[int, IntArray]
"""An axis, and the positions on it that are taken."""

BLOCK_ELEMENTS = 2**20
_CAN_RELEASE = hasattr(mmap, "MADV_DONTNEED")  # Windows cannot


class StoredTensor(ir.LazyTensor):
    """A tensor in a file, or a part of one, that is read anew whenever somebody asks for it.

    Args:
        source: the tensor whose data stands in a file.
        cuts: what is taken of it; an axis that is left out stays whole.
    """

    __slots__ = ("_cuts", "_source")

    def __init__(self, source: ir.TensorProtocol, cuts: Sequence[Cut] = (), name: str = "") -> None:
        sizes = list(source.shape.numpy())
        for axis, positions in cuts:
            sizes[axis] = len(positions)
        super().__init__(
            self._read,
            source.dtype,
            ir.Shape(sizes),
            name=name or source.name,
            doc_string=source.doc_string,
            metadata_props=dict(source.metadata_props),
        )
        self._source = source
        self._cuts = tuple(cuts)

    def _read(self) -> ir.TensorProtocol:
        array = np.array(take(self._source.numpy(), self._cuts))
        release_pages(self._source)
        return ir.Tensor(array, dtype=self.dtype, name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        """Write the data, little-endian, a block of the first axis at a time."""
        if self.dtype.bitwidth < 8 or not self.size:
            super().tofile(file)
            return
        whole = self._source.numpy()
        read_ahead(self._source)
        cuts = dict(self._cuts)
        rows = cuts.pop(0, None)
        count = self.shape.numpy()[0] if self.shape.rank() else 1
        step = max(1, BLOCK_ELEMENTS * count // self.size)
        for start in range(0, count, step):
            part = slice(start, start + step)
            picked = whole[part if rows is None else rows[part]] if self.shape.rank() else whole
            block = take(picked, list(cuts.items()))
            file.write(block.astype(block.dtype.newbyteorder("<"), copy=False).tobytes())
            release_pages(self._source)

    @property
    def source(self) -> ir.TensorProtocol:
        """The tensor whose data stands in a file."""
        return self._source

    def release(self) -> None:
        """Give back the memory of what was read."""
        release_pages(self._source)


def take(array: Array, cuts: Sequence[Cut]) -> Array:
    """The array's part at these positions; one that repeats a number keeps taking no memory.

    >>> take(np.arange(12).reshape(3, 4), [(0, np.array([0, 2])), (1, np.array([1, 2]))])
    array([[ 1,  2],
           [ 9, 10]])
    """
    if array.size and not any(array.strides):
        sizes = list(array.shape)
        for axis, positions in cuts:
            sizes[axis] = len(positions)
        return np.broadcast_to(array.reshape(-1)[0], sizes)
    for axis, positions in cuts:
        array = np.take(array, positions, axis=axis)
    return array


def shared(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same data under a name of its own; an initializer gives its tensor its name."""
    if is_stored(tensor):
        return StoredTensor(tensor)
    return ir.LazyTensor(lambda: tensor, tensor.dtype, ir.Shape(tensor.shape.numpy()))


def is_stored(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a tensor's data stands in a file beside the model."""
    kind: type = type(tensor)
    return _stands_in_file(kind)


@cache  # it is asked for every weight again and again, and classes of onnx_ir are slow to ask
def _stands_in_file(kind: type) -> bool:
    return issubclass(kind, ir.ExternalTensor | StoredTensor)


def release_pages(tensor: ir.TensorProtocol) -> None:
    """Give back the memory that a mapped tensor takes; whoever reads it next reads the file again.

    The map itself stays, so that the data is still there when the file has been replaced.
    """
    if isinstance(tensor, StoredTensor):
        tensor.release()
    elif isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None and _CAN_RELEASE:
        tensor.raw.madvise(mmap.MADV_DONTNEED)


def read_ahead(tensor: ir.TensorProtocol) -> None:
    """Say that a mapped tensor will be read from its beginning to its end."""
    while isinstance(tensor, StoredTensor):
        tensor = tensor.source
    if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None and _CAN_RELEASE:
        tensor.raw.madvise(mmap.MADV_SEQUENTIAL)


def blocks(tensor: ir.TensorProtocol, axis: int = 0) -> Iterator[tuple[slice, Array]]:
    """A tensor in pieces, as ``(positions on the axis, [before, positions, after])``.

    What comes before and after the axis is flattened; numbers are of the tensor's own type, and
    stand where the tensor has them. Whoever computes with them does so in double precision, as
    ``dtype=np.float64`` has numpy do piece by piece, without an array of them.

    Args:
        tensor: the tensor.
        axis: one of its axes.

    >>> tensor = ir.tensor(np.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> [(part.start, block.tolist()) for part, block in blocks(tensor, 1)]
    [(0, [[[1.0], [2.0]], [[3.0], [4.0]]])]
    """
    array = tensor.numpy()
    read_ahead(tensor)
    shape = array.shape or (1,)
    sizes = int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :]))
    grid = array.reshape(sizes)
    after = max(1, min(sizes[2], BLOCK_ELEMENTS))
    along = max(1, min(sizes[1], BLOCK_ELEMENTS // after))
    before = max(1, BLOCK_ELEMENTS // (after * along))
    starts = (range(0, size, step) for size, step in zip(sizes, (before, along, after)))
    for i, j, k in product(*starts):
        part = slice(j, j + along)
        yield part, grid[i : i + before, part, k : k + after]
        release_pages(tensor)
