"""Channels to space and back, and repetition: movements that a line of notation describes."""

from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, from_line, op


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


@op("Tile")
class Tile(Op):
    """Whole axes are repeated, one copy behind the other."""

    moves = True

    @staticmethod
    def describe(n: OpNode) -> Description:
        repeats = n.sizes(1)
        computed = [axis for axis, count in enumerate(repeats) if count is None]
        axes = range(len(repeats))
        before = " ".join(f"{'A' if axis in computed else 'a'}{axis}" for axis in axes)
        after = " ".join(f"B{axis}" if axis in computed else f"(R{axis} a{axis})" for axis in axes)
        sizes = {f"R{axis}": count for axis, count in enumerate(repeats) if count is not None}
        description = from_line(n, f"{before}, _ -> {after}", sizes)
        for axis in computed:
            for name in (f"A{axis}", f"B{axis}"):
                description.factors[name].pinned = "repeated as often as is computed at run time"
        return description

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        repeats = b.numbers(n, 1)
        if repeats is None:
            b.fail(n, "its repeats are computed from values")
        return b.method("repeat", b.tensor(n, 0), *repeats)
