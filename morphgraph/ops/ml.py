"""Operators of the domain ``ai.onnx.ml`` that treat every feature alone, as sklearn2onnx writes.

Their numbers stand in attributes: one for all features, or one for each.
"""

from collections.abc import Sequence

from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, Resizing, UnsupportedFormError, from_line, op

_DOMAIN = "ai.onnx.ml"


def _kept(new: Resizing, name: str, numbers: Sequence[float]) -> None:
    """The numbers of the features that stay."""
    if len(numbers) > 1:
        new.set_attribute(name, [float(numbers[k]) for k in new.positions(0, 1)])


@op("Scaler", domain=_DOMAIN)
class Scaler(Op):
    """``(x - offset) * scale``."""

    open_at_zero = True

    @staticmethod
    def describe(n: OpNode) -> Description:
        return from_line(n, "N c -> N c" if len(n.shape(0)) == 2 else "*S -> *S")

    @staticmethod
    def resize(
        n: OpNode, new: Resizing, *, offset: Sequence[float] = (), scale: Sequence[float] = ()
    ) -> None:
        _kept(new, "offset", offset)
        _kept(new, "scale", scale)

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        offset: Sequence[float] = (),
        scale: Sequence[float] = (),
    ) -> "fx.Node":
        import torch

        x = b.method("float", b.tensor(n, 0))
        x = b.call(torch.sub, x, b.buffer(n, "offset", torch.tensor(offset)))
        return b.call(torch.mul, x, b.buffer(n, "scale", torch.tensor(scale)))


@op("Imputer", domain=_DOMAIN)
class Imputer(Op):
    """Puts a number where a certain one stands, that of a missing value."""

    open_at_zero = True

    @staticmethod
    def describe(n: OpNode, *, imputed_value_int64s: Sequence[int] = ()) -> Description:
        if imputed_value_int64s:
            raise UnsupportedFormError("Imputer of whole numbers")
        return from_line(n, "N c -> N c" if len(n.shape(0)) == 2 else "*S -> *S")

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, imputed_value_floats: Sequence[float] = ()) -> None:
        _kept(new, "imputed_value_floats", imputed_value_floats)

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        imputed_value_floats: Sequence[float] = (),
        replaced_value_float: float = 0.0,
    ) -> "fx.Node":
        import torch

        if not imputed_value_floats:
            b.fail(n, "whole numbers")
        x, missing = b.tensor(n, 0), b.decimal(replaced_value_float)
        given = b.buffer(n, "given", torch.tensor(imputed_value_floats))
        absent = b.call(torch.isnan, x) if missing != missing else b.call(torch.eq, x, missing)
        return b.call(torch.where, absent, given, x)
