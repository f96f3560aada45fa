"""Free the batch size of a network that was exported with a fixed one.

An export with a batch of 1 writes that 1 into every shape: ``reshape(x, (1, 512))``. Which axis of
which value is the batch is found by running the network on shapes alone, at the batch of the export
and at three times as much: axes that grow carry it. A reshape keeps samples apart exactly if the
positions that come before the batch in row-major order stay before it; that tells where in the new
shape the batch stands:

    (1, 3, 49, 96) -> (1, 49, 288)     nothing before it: axis 0, (-1, 49, 288)
    (49, 1, 512)   -> (49, 8, 64)      49 before it: axis 1, (49, -1, 64)

Whatever cannot be decided so leaves the network as it was, with a reason.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

Shape = tuple[int, ...]

_GROWTH = 3


class _Fixed(Exception):
    """The batch cannot be freed; the message says why."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Where a value carries the batch: on ``axis``, behind ``outer`` other positions there."""

    axis: int
    outer: int = 1


def free_batch(net: fx.GraphModule, examples: list[torch.Tensor], dynamic: bool) -> str:
    """Let a network take any batch size; returns ``"free"`` or why it does not.

    Args:
        net: in ``eval`` mode; its graph is edited where a shape holds the batch.
        examples: one tensor per input, of the exported shape; only shape and type are read.
        dynamic: the model itself leaves the batch open, so that shapes that run are right.
    """
    sizes = {tuple(example.shape[:1]) for example in examples}
    if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
        return "the inputs have no leading axis of one size"
    (batch,) = sizes.pop()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        before = _Shapes(net)
        before.run(*(torch.empty(e.shape, dtype=e.dtype) for e in examples))
        after = _Freed(net, before.shapes, batch, dynamic)
        try:
            grown = ((_GROWTH * batch, *e.shape[1:]) for e in examples)
            inputs = (torch.empty(s, dtype=e.dtype) for s, e in zip(grown, examples, strict=True))
            after.run(*inputs)
        except _Fixed as reason:
            return str(reason)
    after.apply()
    return "free"


class _Shapes(fx.Interpreter):
    """Runs the graph and notes the shape of every tensor."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net, garbage_collect_values=False)
        self.shapes: dict[fx.Node, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


class _Freed(_Shapes):
    """Runs the graph at the larger batch and collects the edits that make it fit."""

    def __init__(
        self, net: fx.GraphModule, old: dict[fx.Node, Shape], batch: int, dynamic: bool
    ) -> None:
        super().__init__(net)
        self.old, self.batch, self.dynamic = old, batch, dynamic
        self.carried: dict[fx.Node, _Batch] = {}
        self.reshapes: dict[fx.Node, Shape] = {}
        self.expansions: list[tuple[fx.Node, fx.Node, int, fx.Node, _Batch]] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            self.carried[n] = _Batch(0)
        elif n.op == "output":
            return super().run_node(n)
        sources = [source for source in n.all_input_nodes if source in self.carried]
        if not sources:
            return super().run_node(n)
        try:
            result = self._run(n, sources)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise _Fixed(f"{n.name}: {str(error).splitlines()[0]}") from error
        if isinstance(result, torch.Tensor):
            self.shapes[n] = tuple(result.shape)
            if n not in self.carried:
                self._carry(n, sources)
        elif n.target == "split":
            self._check_split(n, sources[0])
            self.carried[n] = self.carried[sources[0]]
        return result

    def _run(self, n: fx.Node, sources: list[fx.Node]) -> Any:
        if n.target in ("reshape", "flatten"):
            return self._reshape(n, sources[0])
        if n.target is torch.cat:
            return self._concatenate(n, sources)
        return fx.Interpreter.run_node(self, n)

    def _reshape(self, n: fx.Node, source: fx.Node) -> torch.Tensor:
        """Rows stay with their sample; a shape that says otherwise is rewritten."""
        carried, old_in, old_out = self.carried[source], self.old[source], self.old[n]
        ahead = prod(old_in[: carried.axis]) * carried.outer
        open_batch = self.dynamic or n.target == "flatten"
        if open_batch:
            try:
                result: torch.Tensor = fx.Interpreter.run_node(self, n)
            except RuntimeError:
                open_batch = False
        if open_batch:
            axis = _grown_axis(n, old_out, tuple(result.shape))
            place = _Batch(axis, _outer(n, ahead, old_out, axis))
        else:
            place = _landing(n, ahead, carried.axis, old_in, old_out, self.batch)
            shape = tuple(-1 if k == place.axis else size for k, size in enumerate(old_out))
            self.reshapes[n] = shape
            value: torch.Tensor = self.env[source]
            result = value.reshape(shape)
        self.carried[n] = place
        return result

    def _concatenate(self, n: fx.Node, sources: list[fx.Node]) -> torch.Tensor:
        """Constants that stand beside samples, such as class tokens, are repeated for each."""
        operands, axis = n.args[0], n.args[1]
        assert isinstance(operands, tuple) and isinstance(axis, int)
        axis %= len(self.old[n])
        place = self.carried[sources[0]]
        if place.axis == axis:
            same = len(sources) == len(operands) and {self.old[s][axis] for s in sources}
            if same != {self.batch}:
                raise _Fixed(f"{n.name} joins along the batch")
            self.carried[n] = _Batch(axis, len(operands))
        values = []
        for operand in operands:
            assert isinstance(operand, fx.Node)
            value = self.env[operand]
            if operand not in self.carried:
                if self.old[operand][place.axis] != 1:
                    raise _Fixed(f"{n.name} joins samples with as many constants")
                self.expansions.append((n, operand, place.axis, sources[0], place))
                sizes = [-1] * value.ndim
                sizes[place.axis] = self.shapes[sources[0]][place.axis]
                value = value.expand(sizes)
            values.append(value)
        return torch.cat(values, axis)

    def _check_split(self, n: fx.Node, source: fx.Node) -> None:
        axis = n.args[2]
        assert isinstance(axis, int)
        if axis % len(self.old[source]) == self.carried[source].axis:
            raise _Fixed(f"{n.name} splits the batch")

    def _carry(self, n: fx.Node, sources: list[fx.Node]) -> None:
        """The result of any other operation carries the batch where it grew."""
        outers = {self.carried[source].outer for source in sources}
        if len(outers) != 1:
            raise _Fixed(f"{n.name} combines values that order the samples differently")
        self.carried[n] = _Batch(_grown_axis(n, self.old[n], self.shapes[n]), outers.pop())

    def apply(self) -> None:
        """Write the edits into the graph."""
        graph = self.module.graph
        for node, shape in self.reshapes.items():
            node.args = (node.args[0], shape)
        for node, operand, axis, source, place in self.expansions:
            with graph.inserting_before(node):
                size = graph.call_method("size", (source, place.axis))
                sizes = [-1] * len(self.old[operand])
                wanted = [*sizes[:axis], size, *sizes[axis + 1 :]]
                repeated = graph.call_method("expand", (operand, *wanted))
            operands = node.args[0]
            assert isinstance(operands, tuple)
            node.args = (tuple(repeated if o is operand else o for o in operands), node.args[1])
        self.module.recompile()


def _grown_axis(n: fx.Node, old: Shape, new: Shape) -> int:
    """The one axis that grew by as much as the batch."""
    if len(old) != len(new):
        raise _Fixed(f"{n.name} has {len(new)} axes instead of {len(old)} at a larger batch")
    grown = [axis for axis, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    if len(grown) != 1:
        what = "mixes or picks samples" if not grown else "carries the batch on two axes"
        raise _Fixed(f"{n.name} {what}")
    (axis,) = grown
    if new[axis] != old[axis] * _GROWTH:
        raise _Fixed(f"{n.name}: axis {axis} does not grow as the batch does")
    return axis


def _outer(n: fx.Node, ahead: int, shape: Shape, axis: int) -> int:
    """Positions of an axis that come before the batch, when ``ahead`` positions do in all."""
    outer, rest = divmod(ahead, prod(shape[:axis]))
    if rest or not outer:
        raise _Fixed(f"{n.name} mixes samples")
    return outer


def _landing(
    n: fx.Node, ahead: int, axis: int, old_in: Shape, old_out: Shape, batch: int
) -> _Batch:
    """Where the batch stands in a new shape, ``ahead`` positions coming before it.

    Axes of size 1 leave a choice; the batch then keeps its distance from the last larger axis.
    """
    exact = [
        k
        for k, size in enumerate(old_out)
        if prod(old_out[:k]) == ahead and size % batch == 0 and size
    ]
    if exact:
        first = next(k for k in range(len(old_in)) if prod(old_in[:k]) == prod(old_in[:axis]))
        return _Batch(exact[min(axis - first, len(exact) - 1)])
    for k, size in enumerate(old_out):
        outer, rest = divmod(ahead, prod(old_out[:k]))
        if not rest and 1 < outer < size and size % (outer * batch) == 0:
            return _Batch(k, outer)
    raise _Fixed(f"{n.name} reshapes across samples")
