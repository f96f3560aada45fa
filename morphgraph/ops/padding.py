"""Pad: positions are added before and after, or cut off."""

from collections.abc import Sequence

import numpy as np

from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import (
    Description,
    IndexMap,
    Op,
    OpNode,
    Place,
    Resizing,
    UnsupportedFormError,
    op,
)
from morphgraph.ops.positions import pass_axes
from morphgraph.ops.window import torch_padding


def _pads(n: OpNode, pads: Sequence[int] | None) -> list[tuple[int, int]]:
    """Positions added before and after every axis."""
    given = n.ints(1, pads)
    if given is None:
        raise UnsupportedFormError("Pad by amounts that are computed at run time")
    rank = len(n.shape(0))
    listed = n.ints(3)
    axes = range(rank) if listed is None else [a % rank for a in listed]
    amounts = [(0, 0)] * rank
    for k, axis in enumerate(axes):
        amounts[axis] = (given[k], given[k + len(axes)])
    return amounts


@op("Pad")
class Pad(Op):
    """Padded positions are a factor of their own: a padded channel may go with its partners."""

    @staticmethod
    def describe(
        n: OpNode, *, mode: str = "constant", pads: Sequence[int] | None = None
    ) -> Description:
        description = Description()
        for axis, (before, after) in enumerate(_pads(n, pads)):
            size, out = n.shape(0)[axis], n.out()[axis]
            if (before, after) == (0, 0):
                pass_axes(description, n.shape(0), [(axis, axis)])
            elif mode != "constant" or before < 0 or after < 0:
                reason = f"padded in mode {mode}" if mode != "constant" else "cropped by Pad"
                description.pin(0, axis, size, reason)
                description.pin(~0, axis, out, reason)
            else:
                moved = Place(~0, axis, IndexMap(offset=before))
                description.add(f"a{axis}", size, [Place(0, axis), moved])
                added = np.delete(np.arange(out), np.s_[before : before + size])
                place = Place(~0, axis, IndexMap(table=(np.arange(len(added)), added)))
                description.add(f"p{axis}", len(added), [place])
        return description

    @staticmethod
    def resize(
        n: OpNode, new: Resizing, *, mode: str = "constant", pads: Sequence[int] | None = None
    ) -> None:
        amounts = _pads(n, pads)
        for axis, (before, after) in enumerate(amounts):
            if mode == "constant" and before >= 0 and after >= 0:
                kept = new.positions(~0, axis)
                size = n.shape(0)[axis]
                amounts[axis] = (
                    int((kept < before).sum()),
                    int((kept >= before + size).sum()),
                )
        listed = n.ints(3)
        rank = len(amounts)
        axes = range(rank) if listed is None else [a % rank for a in listed]
        flat = [amounts[a][0] for a in axes] + [amounts[a][1] for a in axes]
        if n.opset < 11:
            new.set_attribute("pads", flat)
        else:
            new.set_constant(1, np.array(flat, dtype=np.int64))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        mode: str = "constant",
        pads: Sequence[int] | None = None,
    ) -> "fx.Node":
        from torch.nn import functional as F

        amounts, x = _pads(n, pads), b.tensor(n, 0)
        while amounts and amounts[0] == (0, 0) and mode == "constant":
            amounts.pop(0)
        if mode == "constant":
            fill = b.operand(n, 2) if n.has(2) else 0.0
            if not isinstance(fill, float | int):
                b.fail(n, "its value is computed at run time")
            padding = torch_padding(*zip(*amounts, strict=True)) if amounts else []
            return b.call(F.pad, x, padding, value=fill) if amounts else x
        rank = len(amounts)
        spatial = 3 <= rank <= 5 and all(a == (0, 0) for a in amounts[:2])
        if spatial and min(min(a) for a in amounts) >= 0:
            torch_mode = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}[mode]
            padding = torch_padding(*zip(*amounts[2:], strict=True))
            return b.call(F.pad, x, padding, torch_mode)
        for axis, (before, after) in enumerate(amounts):
            if (before, after) != (0, 0):
                positions = _padded_positions(n.shape(0)[axis], before, after, mode)
                index = b.positions(n, axis, positions)
                x = b.method("index_select", x, axis, index)
        return x


@op("CenterCropPad")
class CenterCropPad(Op):
    """Axes that change are cropped or padded around their centre; the others pass."""

    @staticmethod
    def describe(n: OpNode) -> Description:
        if n.const(1) is None:
            raise UnsupportedFormError("CenterCropPad to a size that is computed at run time")
        description = Description()
        for axis, (size, out) in enumerate(zip(n.shape(0), n.out(), strict=True)):
            if size == out:
                pass_axes(description, n.shape(0), [(axis, axis)])
            else:
                description.pin(0, axis, size, "cropped or padded around its centre")
                description.pin(~0, axis, out, "cropped or padded around its centre")
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, axes: Sequence[int] | None = None) -> None:
        out = new.shape(~0)
        sizes = out if axes is None else [out[axis] for axis in axes]
        new.set_constant(1, np.array(sizes, dtype=np.int64))

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        from torch.nn import functional as F

        before, after = [], []
        for size, out in zip(n.shape(0), n.out(), strict=True):
            first = -((size - out) // 2) if size > out else (out - size) // 2
            before.append(first)
            after.append(out - size - first)
        return b.call(F.pad, b.tensor(n, 0), torch_padding(before, after))


def _padded_positions(
    size: int, before: int, after: int, mode: str
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Which position each padded position repeats; negative pads cut positions off."""
    kept = np.arange(size)[max(-before, 0) : size - max(-after, 0)]
    added = (max(before, 0), max(after, 0))
    if mode == "edge":
        return np.pad(kept, added, "edge")
    return np.pad(kept, added, "reflect") if mode == "reflect" else np.pad(kept, added, "wrap")
