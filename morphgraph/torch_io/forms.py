"""What operators give for tensors without memory, asked of the kernels that know the sizes.

``FakeTensorMode`` finds the same by way of rules, of a memory of calls, and of decompositions in
Python, which takes several times as long. What it does beyond that concerns other devices, open
sizes, and operators that are not listed here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch._dispatch.python import no_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

aten = torch.ops.aten  # whose operators begin with an underscore where PyTorch names them so

KNOWN = frozenset(
    {
        *(aten.slice.Tensor, aten.slice_scatter.default, aten.select.int, aten.alias.default),
        *(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default),  # noqa: SLF001
        *(aten.permute.default, aten.transpose.int, aten.clone.default, aten.fill.Tensor),
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.eq.Tensor, aten.ne.Tensor),
        *(aten.relu.default, aten.gelu.default, aten.softmax.int, aten.masked_fill.Scalar),
        *(aten.linear.default, aten.matmul.default, aten.layer_norm.default),
        *(aten.cat.default, aten.mean.dim, aten.hardswish.default, aten.squeeze.dim),
    }
)
"""Operators with one result, whose tensors are arguments of their own, or the first a list."""

_CPU = torch.device("cpu")


def form_of(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operator; ``None``: of another one, or of tensors of another kind."""
    if func not in KNOWN:
        return None
    operands = (*args[0], *args[1:]) if isinstance(args[0], list | tuple) else args
    tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    fakes = [tensor for tensor in tensors if type(tensor) is FakeTensor]
    if len(fakes) < len(tensors) or any(fake.fake_device != _CPU for fake in fakes):
        return None
    mode = fakes[0].fake_mode
    # Nothing is to be differentiated, and a result that is could not be written to.
    below_autograd = torch._C._AutoDispatchBelowAutograd()  # noqa: SLF001
    with no_python_dispatcher(), below_autograd, in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)
    return FakeTensor(mode, result, _CPU)
