"""Index maps and positions: what operators that move data share."""

from collections.abc import Iterable

import numpy as np

from morphgraph.arrays import IntArray, Shape
from morphgraph.ops.op import Description, IndexMap, OpNode, Place, Resizing

OPEN_ADVICE = "pass input_shapes"  # to who meets a form that PyTorch has at known sizes alone


def pass_axes(
    description: Description, shape: Shape, pairs: Iterable[tuple[int, int]], port: int = 0
) -> None:
    """Axes that pass unchanged from an operand to the first result, as (axis, result axis)."""
    for axis, out_axis in pairs:
        description.add(f"a{axis}", shape[axis], [Place(port, axis), Place(~0, out_axis)])


def joined(n: OpNode, whole: int, parts: Iterable[int], axis: int) -> Description:
    """The parts stand side by side along one axis of the whole; all other axes are shared.

    ``whole`` and ``parts`` are ports: of a Concat the result and its operands, of a Split the
    operand and its results.
    """
    description, shape = Description(), n.shape(whole)
    ports = sorted((whole, *parts), key=lambda port: port < 0)  # operands come first
    axis, offset = axis % len(shape), 0
    for other, size in enumerate(shape):
        if other != axis:
            description.add(f"a{other}", size, [Place(port, other) for port in ports])
    for part in (port for port in ports if port != whole):
        size = n.shape(part)[axis]
        places = [Place(part, axis), Place(whole, axis, IndexMap(offset=offset))]
        name = f"c{part if part >= 0 else ~part}"
        description.add(name, size, places if whole < 0 else reversed(places))
        offset += size
    return description


def gathered(
    description: Description, axis: int, out_axis: int, indices: IntArray, reason: str | None = None
) -> None:
    """Result position ``p`` of an axis is operand position ``indices[p]``."""
    kept, elements = np.unique(indices, return_inverse=True)
    into = IndexMap(table=(np.arange(len(kept)), kept))
    out = IndexMap(table=(elements, np.arange(len(indices))))
    description.add(f"a{axis}", len(kept), [Place(0, axis, into), Place(~0, out_axis, out)], reason)


def ranks(kept: IntArray, positions: IntArray, results: IntArray) -> IntArray:
    """Where the old positions that results read stand among those that stay.

    ``results`` are the old positions of the results. One that comes twice is an added channel: its
    second copy reads the second copy.
    """
    order = np.argsort(kept, kind="stable")
    found: IntArray = order[np.searchsorted(kept[order], positions) + _copies(results)]
    return found


def _copies(values: IntArray) -> IntArray:
    """How often each value has come before."""
    order = np.argsort(values, kind="stable")
    first = np.searchsorted(values[order], values[order])
    copies = np.empty(len(values), dtype=np.int64)
    copies[order] = np.arange(len(values)) - first
    return copies


def stays(new: Resizing, axis: int, size: int) -> bool:
    """Whether an axis of the first operand keeps all of its positions, and gets no others."""
    return np.array_equal(new.positions(0, axis), np.arange(size))


def wrapped(indices: IntArray, size: int) -> IntArray:
    """Indices from the start; ONNX counts negative ones from the end."""
    return np.where(indices < 0, indices + size, indices)
