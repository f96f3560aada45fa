"""Functions that torch.fx takes for one operation, as it does torch's own."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def as_one_node(layer: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Let torch.fx see a layer as one operation, as it does torch's own (unpickling traces)."""

    @wraps(layer)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        leaves = pytree.tree_leaves(args)
        tensors = tuple(value for value in leaves if hasattr(value, "__torch_function__"))
        if has_torch_function(tensors):
            found: _Result = handle_torch_function(call, tensors, *args, **kwargs)
            return found
        return layer(*args, **kwargs)

    return call
