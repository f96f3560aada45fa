"""Which numbers of which parameters a computed weight holds, found by moving positions about."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from morphgraph.arrays import IntArray


class Origins:
    """The origin of every number of a weight that is computed by movements alone.

    Attributes:
        positions: where each number stands among all parameters, laid end to end; of the weight's
            shape.

    >>> net = torch.nn.Linear(2, 4)
    >>> graph = fx.Graph()
    >>> rows = graph.call_method("flip", (graph.create_node("get_attr", "weight"), 0))
    >>> found = Origins(rows, net.get_parameter)
    >>> found.parameter(found.positions), found.parameter(found.positions[::-1])
    (None, 'weight')
    """

    def __init__(self, weight: fx.Node, tensor_at: Callable[[str], torch.Tensor]) -> None:
        self._tensor_at = tensor_at
        self._names: dict[int, str] = {}
        self._start = 0
        self._seen: dict[fx.Node, Any] = {}
        self.positions: IntArray = self._run(weight).numpy()

    def parameter(self, part: IntArray) -> str | None:
        """The parameter that a part of the positions is, as a whole and in order."""
        name = self._names.get(int(part.flat[0])) if part.size else None
        if name is None or self._tensor_at(name).shape != part.shape:
            return None
        whole = np.arange(part.flat[0], part.flat[0] + part.size)
        return name if np.array_equal(part.ravel(), whole) else None

    def _run(self, node: fx.Node) -> Any:
        if node not in self._seen:
            if node.op == "get_attr":
                self._seen[node] = self._number(str(node.target))
            else:
                args, kwargs = map_arg((node.args, node.kwargs), self._run)
                function = node.target if callable(node.target) else _method(str(node.target))
                self._seen[node] = function(*args, **kwargs)
        return self._seen[node]

    def _number(self, name: str) -> torch.Tensor:
        tensor, start = self._tensor_at(name), self._start
        if not tensor.is_floating_point():
            return tensor  # indices of a choice
        shape = tensor.shape
        self._start += shape.numel()
        self._names[start] = name
        return torch.arange(start, self._start).reshape(shape)


def _method(name: str) -> Any:
    return getattr(torch.Tensor, name)
