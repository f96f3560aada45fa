"""Activations: element by element, each a torch module, so that hooks and readers find it."""

import math

from morphgraph.ops.elementwise import Unary
from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import OpNode, op


@op("HardSwish", "Mish", "Softsign", "Tanh")
class Activation(Unary):
    """Activations without attributes."""

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode) -> "fx.Node":
        from torch import nn

        other_names = {"HardSwish": "Hardswish", "Relu": "ReLU"}
        module = getattr(nn, other_names.get(n.op_type, n.op_type))()
        return b.module(n, module, b.tensor(n, 0))


@op("Relu")
class Relu(Activation):
    @staticmethod
    def clamp(n: OpNode) -> tuple[float, float]:
        return 0.0, math.inf


@op("Sigmoid", "Softplus")
class OpenActivation(Activation):
    """Those of them that are not zero at zero."""

    open_at_zero = True


@op("Gelu")
class Gelu(Unary):
    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, approximate: str = "none") -> "fx.Node":
        from torch import nn

        return b.module(n, nn.GELU(approximate), b.tensor(n, 0))


@op("Swish")
class Swish(Unary):
    """``x * sigmoid(alpha * x)``."""

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, alpha: float = 1.0) -> "fx.Node":
        import torch
        from torch import nn

        x = b.tensor(n, 0)
        if alpha == 1.0:
            return b.module(n, nn.SiLU(), x)
        return b.call(torch.mul, x, b.call(torch.sigmoid, b.call(torch.mul, x, b.decimal(alpha))))


@op("Elu", "Celu")
class Elu(Unary):
    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, alpha: float = 1.0) -> "fx.Node":
        from torch import nn

        make = nn.ELU if n.op_type == "Elu" else nn.CELU
        return b.module(n, make(b.decimal(alpha)), b.tensor(n, 0))


@op("Selu")
class Selu(Unary):
    @staticmethod
    def lower(
        b: "TorchBuilder", n: OpNode, *, alpha: float = 1.67326319, gamma: float = 1.05070098
    ) -> "fx.Node":
        import torch
        from torch import nn
        from torch.nn import functional as F

        if abs(alpha - 1.67326319) < 1e-6 and abs(gamma - 1.05070098) < 1e-6:
            return b.module(n, nn.SELU(), b.tensor(n, 0))
        return b.call(torch.mul, b.call(F.elu, b.tensor(n, 0), b.decimal(alpha)), b.decimal(gamma))


@op("LeakyRelu")
class LeakyRelu(Unary):
    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, alpha: float = 0.01) -> "fx.Node":
        from torch import nn

        return b.module(n, nn.LeakyReLU(b.decimal(alpha)), b.tensor(n, 0))


@op("HardSigmoid")
class HardSigmoid(Unary):
    open_at_zero = True

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, alpha: float = 0.2, beta: float = 0.5) -> "fx.Node":
        import torch
        from torch import nn

        x = b.tensor(n, 0)
        if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
            return b.module(n, nn.Hardsigmoid(), x)
        line = b.call(torch.add, b.call(torch.mul, x, b.decimal(alpha)), b.decimal(beta))
        return b.call(torch.clamp, line, 0.0, 1.0)


@op("ThresholdedRelu")
class ThresholdedRelu(Unary):
    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, alpha: float = 1.0) -> "fx.Node":
        from torch import nn

        return b.module(n, nn.Threshold(b.decimal(alpha), 0.0), b.tensor(n, 0))


@op("Shrink")
class Shrink(Unary):
    """``x + bias`` below ``-lambd``, ``x - bias`` above ``lambd``, else 0."""

    @staticmethod
    def lower(b: "TorchBuilder", n: OpNode, *, bias: float = 0.0, lambd: float = 0.5) -> "fx.Node":
        import torch
        from torch import nn
        from torch.nn import functional as F

        x = b.tensor(n, 0)
        if bias == lambd:
            return b.module(n, nn.Softshrink(b.decimal(lambd)), x)
        kept = b.module(n, nn.Hardshrink(b.decimal(lambd)), x)
        if bias == 0:
            return kept
        outside = b.call(torch.sign, b.call(F.hardshrink, x, b.decimal(lambd)))
        return b.call(torch.sub, kept, outside, alpha=b.decimal(bias))
