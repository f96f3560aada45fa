"""Channels to space and back, and repetition: movements that a line of notation describes."""

import re

from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, Resizing, from_line, op


@op("DepthToSpace")
class DepthToSpace(Op):
    """A block of channels becomes a block of positions (pixel shuffle: mode CRD)."""

    moves = True

    @staticmethod
    def describe(n: OpNode, *, blocksize: int, mode: str = "DCR") -> Description:
        channels = "(c P Q)" if mode == "CRD" else "(P Q c)"
        sizes = {"P": blocksize, "Q": blocksize}
        return from_line(n, f"N {channels} H W -> N c (H P) (W Q)", sizes)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, blocksize: int, mode: str = "DCR") -> "fx.Node":
        from torch import nn

        x = b.tensor(n, 0)
        if mode == "CRD":
            return b.module(n, nn.PixelShuffle(blocksize), x)
        _, channels, height, width = n.out()
        rows, columns = height // blocksize, width // blocksize
        split = b.method("reshape", x, (-1, blocksize, blocksize, channels, rows, columns))
        blocks = b.method("permute", split, (0, 3, 4, 1, 5, 2))
        return b.method("reshape", blocks, (-1, channels, height, width))


@op("SpaceToDepth")
class SpaceToDepth(Op):
    """A block of positions becomes a block of channels."""

    moves = True

    @staticmethod
    def describe(n: OpNode, *, blocksize: int) -> Description:
        sizes = {"P": blocksize, "Q": blocksize}
        return from_line(n, "N c (H P) (W Q) -> N (P Q c) H W", sizes)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, blocksize: int) -> "fx.Node":
        _, channels, height, width = n.shape(0)
        rows, columns = height // blocksize, width // blocksize
        split = (-1, channels, rows, blocksize, columns, blocksize)
        blocks = b.method("permute", b.method("reshape", b.tensor(n, 0), split), (0, 3, 5, 1, 2, 4))
        return b.method("reshape", blocks, (-1, *n.out()[1:]))


def _tiled(axis: int, size: int, count: int | None) -> tuple[str, str]:
    """An axis in front of a Tile and behind it; its copies may go where there are several."""
    if count is None:
        return f"A{axis}", f"B{axis}"
    if count < 2:
        return f"a{axis}", f"(R{axis} a{axis})"
    return ("1", f"r{axis}") if size == 1 else (f"a{axis}", f"(r{axis} a{axis})")


@op("Tile")
class Tile(Op):
    """Whole axes are repeated, one copy behind the other.

    Positions of an axis go in all of its copies; where they stay, whole copies may go. Of an axis
    of size 1 there are copies only, as many as their readers agree on.
    """

    moves = True

    @staticmethod
    def describe(n: OpNode) -> Description:
        counts, rank = n.sizes(1), len(n.shape(0))
        forms = [_tiled(axis, n.shape(0)[axis], counts[axis]) for axis in range(rank)]
        before, after = (" ".join(form[side] for form in forms) for side in (0, 1))
        sizes = {
            f"{'R' if count < 2 else 'r'}{axis}": count
            for axis, count in enumerate(counts)
            if count is not None
        }
        names = re.findall("[ar][0-9]+", after)
        prefer = " ".join(sorted(names, key=lambda name: name[0]))  # positions before copies
        description = from_line(n, f"{before}, _ -> {after}", sizes, prefer=prefer)
        for name, factor in description.factors.items():
            if name[0] in "AB":
                factor.pinned = "repeated as often as is computed at run time"
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing) -> None:
        counts = n.sizes(1)
        if any(count is not None and count > 1 for count in counts):
            copies = [
                new.size(f"r{axis}") if count is not None and count > 1 else count or 0
                for axis, count in enumerate(counts)
            ]
            new.set_sizes(1, copies)

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        repeats = b.numbers(n, 1)
        if repeats is None:
            b.fail(n, "its repeats are computed from values")
        return b.method("repeat", b.tensor(n, 0), *repeats)
