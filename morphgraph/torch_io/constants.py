"""Numbers that a network computes from nothing that it is given.

The masks of shifted windows are written part by part by hundreds of operators. Each becomes a dozen
nodes, and all of them are folded into one tensor later. PyTorch computes that tensor in no time.
Only operators take part whose results are the same bit by bit, whoever computes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from morphgraph.passes.canonical.fold_values import FOLD_LIMIT_BYTES

aten = torch.ops.aten  # whose operators begin with an underscore where PyTorch names them so

_TYPES = (torch.float32, torch.int64, torch.int32, torch.bool)

_OF_SIZES = frozenset(
    {
        *(aten.zeros.default, aten.ones.default, aten.full.default, aten.scalar_tensor.default),
        *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
        *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
    }
)
"""What reads no number of a tensor."""

_MOVING = frozenset(
    {
        *(aten.slice.Tensor, aten.slice_scatter.default),
        *(aten.select.int, aten.select_scatter.default),
        *(aten.view.default, aten._unsafe_view.default, aten.permute.default),  # noqa: SLF001
        *(aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default),
        *(aten.alias.default, aten.fill.Tensor),
    }
)
_COMPARING = frozenset(
    {
        *(aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.gt.Tensor),
        *(aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.gt.Scalar),
    }
)
_COMPUTING = frozenset(
    {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.masked_fill.Scalar, *_COMPARING}
)


@dataclass(frozen=True, eq=False)
class Known:
    """Stands in a graph for an operator whose results are known.

    Attributes:
        func: the operator.
        tensor: what it computes, where somebody needs it; else it leads to such a tensor.
    """

    func: OpOverload
    tensor: torch.Tensor | None
    __name__ = "known"

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor | None:
        """The tensor; a graph takes nothing for an operator that cannot be called."""
        return self.tensor

    def __str__(self) -> str:
        return str(self.func)


def mark_known(graph: fx.Graph, constants: Mapping[fx.Node, torch.Tensor]) -> bool:
    """Put :class:`Known` in the place of operators whose results are constants.

    Args:
        graph: whose nodes have tensors in ``meta["val"]`` that tell their types and sizes.
        constants: placeholders of tensors that stand in the forward.

    Returns:
        Whether there are some.
    """
    # Of floating-point vectors nobody knows whether they are to be trained: they are not folded.
    found = {
        node: tensor
        for node, tensor in constants.items()
        if tensor.ndim == 0 or not tensor.is_floating_point()
    }
    for node in graph.nodes:
        if node.op == "call_function" and _is_computed(node, found):
            found[node] = _computed(node, found)
    known: dict[fx.Node, Known] = {}
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node not in found:
            continue
        if all(user in known for user in node.users):
            known[node] = Known(node.target, None)
        elif not _may_do_nothing(node) and all(user.op != "output" for user in node.users):
            known[node] = Known(node.target, found[node])
    for node, target in known.items():
        node.target = target
    return bool(known)


def unmark_known(graph: fx.Graph) -> None:
    """Put the operators back."""
    for node in graph.nodes:
        if isinstance(node.target, Known):
            node.target = node.target.func


def _is_computed(node: fx.Node, found: Mapping[fx.Node, torch.Tensor]) -> bool:
    """Whether a node's result is known, and of a type and size that are folded."""
    result = node.meta["val"]
    if not isinstance(result, torch.Tensor) or result.dtype not in _TYPES:
        return False
    if result.numel() * result.element_size() > FOLD_LIMIT_BYTES:
        return False
    if node.target in _OF_SIZES:
        return True
    if node.target not in _MOVING | _COMPUTING:
        return False
    if not all(source in found for source in node.all_input_nodes):
        return False
    if node.target in _COMPARING or node.target is aten.fill.Tensor:
        return True
    return {found[source].dtype for source in node.all_input_nodes} <= {result.dtype, torch.bool}


def _computed(node: fx.Node, found: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    """What a node computes."""

    def operand(source: fx.Node) -> torch.Tensor:
        if source in found:
            return found[source]
        form = source.meta["val"]  # of which nothing else is read
        return torch.empty((), dtype=form.dtype).expand(form.shape)

    assert isinstance(node.target, OpOverload)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
    result: torch.Tensor = node.target(*args, **kwargs)
    return result


def _may_do_nothing(node: fx.Node) -> bool:
    """Whether a node may become one that is left out, so that its operand keeps its name."""
    source = node.args[0] if node.args else None
    if node.target not in _MOVING or not isinstance(source, fx.Node):
        return False
    return bool(source.meta["val"].shape == node.meta["val"].shape)
