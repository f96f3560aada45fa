"""Reductions over axes."""

from collections.abc import Sequence

from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, UnsupportedFormError, from_line, op


def reduced_axes(
    n: OpNode, axes: Sequence[int] | None, noop_with_empty_axes: int = 0
) -> tuple[int, ...]:
    """The axes that a reduction runs over, non-negative and ascending."""
    rank = len(n.shape(0))
    if axes is None and n.has(1) and n.const(1) is None:
        raise UnsupportedFormError(f"{n.op_type} over axes that are computed at run time")
    given = n.ints(1, axes) or ()
    if not given:
        return () if noop_with_empty_axes else tuple(range(rank))
    return tuple(sorted(axis % rank for axis in given))


def _reduction(
    n: OpNode, keepdims: int, axes: Sequence[int] | None, noop_with_empty_axes: int
) -> tuple[str, str]:
    """The line of a reduction, and the names of the factors that it sums over."""
    reduced = reduced_axes(n, axes, noop_with_empty_axes)
    names = [f"a{k}" for k in range(len(n.shape(0)))]
    out = ["1" if k in reduced else name for k, name in enumerate(names)]
    if not keepdims:
        out = [name for name in out if name != "1"]
    return f"{' '.join(names)}, _ -> {' '.join(out)}", " ".join(names[k] for k in reduced)


# Sums, to which a channel at zero contributes nothing; of the others, means and extremes, one
# channel fewer changes the result.
_SUMS = ("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2")
_STATISTICS = (
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceLogSum",
    "ReduceLogSumExp",
)


@op(*_SUMS, *_STATISTICS)
class Reduction(Op):
    @staticmethod
    def describe(
        n: OpNode,
        *,
        keepdims: int = 1,
        axes: Sequence[int] | None = None,
        noop_with_empty_axes: int = 0,
    ) -> Description:
        line, reduced = _reduction(n, keepdims, axes, noop_with_empty_axes)
        if n.op_type in _SUMS:
            return from_line(n, line, contracted=reduced)
        return from_line(n, line, statistical=reduced)

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        keepdims: int = 1,
        axes: Sequence[int] | None = None,
        noop_with_empty_axes: int = 0,
    ) -> "fx.Node":
        reduced = reduced_axes(n, axes, noop_with_empty_axes)
        return _reduced(b, n, b.tensor(n, 0), reduced, bool(keepdims))


@op("ReduceMean")
class Mean(Reduction):
    mean_power = 1.0


def _reduced(
    b: "TorchBuilder", n: OpNode, x: "fx.Node", axes: tuple[int, ...], keepdim: bool
) -> "fx.Node":
    """The torch form of a reduction; over no axes it still maps each element."""
    import torch

    op_type = n.op_type
    if op_type == "ReduceSumSquare":
        x = b.method("square", x)
    elif op_type == "ReduceL1":
        x = b.method("abs", x)
    if not axes:
        return b.method("abs", x) if op_type == "ReduceL2" else x
    if op_type == "ReduceProd":
        for axis in reversed(axes):
            x = b.method("prod", x, axis, keepdim=keepdim)
        return x
    if op_type == "ReduceL2":
        return b.call(torch.linalg.vector_norm, x, 2, axes, keepdim=keepdim)
    if op_type == "ReduceLogSum":
        return b.method("log", b.method("sum", x, axes, keepdim=keepdim))
    method = {
        "ReduceMean": "mean",
        "ReduceMax": "amax",
        "ReduceMin": "amin",
        "ReduceLogSumExp": "logsumexp",
    }.get(op_type, "sum")
    return b.method(method, x, axes, keepdim=keepdim)
