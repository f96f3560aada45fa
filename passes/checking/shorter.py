"""Networks of fewer positions, where tables and targets hold sizes: they prove the same.

A vision transformer adds a table of positions, and its Reshapes name the number of tokens, so that
it takes no smaller image. But every token goes the same way. So the networks that are compared,
the original, the masked and the resized one, all are given the same smaller sizes: tables lose
their last rows, targets name fewer tokens. What ``smaller`` asks of inputs must hold of them, and

- no axis has one position only that had several, for a sum or a softmax over one says little;
- only what is no size of channels changes: a target must name the original's size there, in the
  resized model as in the original;
- of a table that loses rows all that the resized model has, lost ones included, is what the plan
  keeps of the original's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from morphgraph.arrays import IntArray, Shape
from morphgraph.edit import Editor, replace_array
from morphgraph.graph import ChannelGraph, analysis
from morphgraph.onnx_io import is_float
from morphgraph.ops import facts_of
from morphgraph.ops.reshape import blocks
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking.compare import kept
from morphgraph.passes.checking.smaller import (
    inferred,
    inputs_of,
    keeps_channels,
    proves_the_same,
    shares,
    windows_of,
    written,
)
from morphgraph.passes.coupling.roles import roles

Sizes = dict[int, int]
"""By size of an axis without channels the smaller one."""

_MOST_ROUNDS = 8
"""Sizes that follow from each other: of a map, of its patches, of these and a token more."""

_POSITIONS = 2
"""How many there are at least where there were several."""


@dataclass(frozen=True)
class Shorter:
    """How networks get fewer positions.

    Attributes:
        graph: the lifted original.
        inputs: smaller shapes of the inputs, by name.
        targets: by name of a result whose sizes an operand holds the axes that become smaller.
        tables: by name of an initializer the same.
        sizes: the smaller ones.
    """

    graph: ChannelGraph
    inputs: Mapping[str, Shape]
    targets: Mapping[str, tuple[int, ...]]
    tables: Mapping[str, tuple[int, ...]]
    sizes: Mapping[int, int]

    def of(self, model: ir.Model) -> ir.Model | None:
        """A copy of a network, the original or one made of it; ``None``: it holds other sizes."""
        return self.change(model.clone())

    def change(self, model: ir.Model) -> ir.Model | None:
        """The same of a network that is nobody else's: it is changed, and returned."""
        editor = Editor(model)
        made = {value.name: value for node in model.graph for value in node.outputs}
        for name, axes in self.targets.items():
            if name in made and not self._retarget(editor, made[name], axes):
                return None
        for name, axes in self.tables.items():
            if name in model.graph.initializers and not self._cut(model, name, axes):
                return None
        return model

    def agrees(self, original: ir.Model, small: ir.Model, selection: AxisSelection) -> bool:
        """Whether the resized model has of all tables what the plan keeps, bit by bit."""
        for name in self.tables:
            old, new = (m.graph.initializers.get(name) for m in (original, small))
            if new is None:
                continue
            if old is None or old.const_value is None or new.const_value is None:
                return False
            stays = kept(selection, name, old.const_value.numpy())
            if not np.array_equal(stays, new.const_value.numpy(), equal_nan=is_float(old)):
                return False
        return True

    def _retarget(self, editor: Editor, value: ir.Value, axes: tuple[int, ...]) -> bool:
        node, full = value.producer(), self.graph.shapes[value.name or ""]
        assert node is not None
        port, numbers = _target(node)
        if numbers is None or len(numbers) != len(full):
            return False
        if any(numbers[axis] != full[axis] for axis in axes):
            return False
        numbers[list(axes)] = [self.sizes[full[axis]] for axis in axes]
        node.replace_input_with(port, editor.constant(f"{value.name}_target", numbers))
        return True

    def _cut(self, model: ir.Model, name: str, axes: tuple[int, ...]) -> bool:
        value = model.graph.initializers[name]
        full = self.graph.shapes[name]
        if value.const_value is None or len(value.const_value.shape) != len(full):
            return False
        array = value.const_value.numpy()
        for axis in axes:
            if array.shape[axis] != full[axis]:
                return False
            array = np.take(array, range(self.sizes[full[axis]]), axis=axis)
        replace_array(value, array)
        return True


def shorter(graph: ChannelGraph) -> Shorter | None:
    """How the network gets fewer positions; ``None``: not so that a comparison proves the same."""
    windows = windows_of(graph)
    for share in shares(windows):
        inputs = inputs_of(graph, _POSITIONS * share)
        if inputs is None:
            return None
        found = _fitting(graph, inputs)
        if found is not None:
            plan, shapes = found
            several = all(
                after >= min(before, _POSITIONS)
                for name, full in graph.shapes.items()
                for before, after in zip(full, shapes.get(name, full), strict=True)
            )
            if several and proves_the_same(graph, windows, shapes):
                return plan
    return None


def _fitting(
    graph: ChannelGraph, inputs: Mapping[str, Shape]
) -> tuple[Shorter, dict[str, Shape]] | None:
    """What must change for these inputs, and the shapes that all values have then.

    Each round finds sizes that follow from those before, and gives them to tables and targets.
    """
    message = onnx.ModelProto.FromString(written(graph).message(inputs))
    targets, tables = _holders(graph)
    sizes: Sizes = {}
    for _ in range(_MOST_ROUNDS):
        found = inferred(message, strict=False)
        new = None if found is None else _new_sizes(graph, found, sizes)
        if new is None or found is None:
            return None
        if not new:
            break
        sizes |= new
        _restate(graph, message, targets, tables, sizes)
    found = inferred(message)
    if found is None or not sizes:
        return None
    plan = Shorter(
        graph,
        inputs,
        {name: axes for name, full in targets.items() if (axes := _smaller(full, sizes))},
        {name: axes for name, full in tables.items() if (axes := _smaller(full, sizes))},
        sizes,
    )
    after = {
        name: tuple(sizes.get(n, n) if k in axes else n for k, n in enumerate(graph.shapes[name]))
        for name, axes in plan.tables.items()
    }
    return plan, {**found, **after}


Holders = Mapping[str, Mapping[int, int]]
"""By name of a value those axes, with their sizes, whose size stands in the model."""


def _smaller(axes: Mapping[int, int], sizes: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(axis for axis, size in axes.items() if size in sizes)


@analysis
def _holders(graph: ChannelGraph) -> tuple[Holders, Holders]:
    """Results whose sizes stand in a target, and tables; their axes without channels."""
    targets = {}
    for node in graph.model.graph:
        _, numbers = _target(node)
        name = node.outputs[0].name or ""
        if numbers is not None and len(numbers) == len(graph.shapes.get(name, ())):
            targets[name] = {
                axis: size for axis, size in _without_channels(graph, name) if numbers[axis] == size
            }
    return targets, _tables(graph)


def _tables(graph: ChannelGraph) -> Holders:
    """Initializers with axes that stand beside an activation's, and in the result, as they are."""
    couplings, role = graph.couplings, roles(graph.couplings)
    beside: dict[int, bool] = {}
    for edge in couplings.edges:
        name = couplings.dims[edge.dim].value
        if edge.port >= 0 and name in graph.model.graph.initializers:
            passes = bool(
                edge.whole and role.on_activations[edge.factor] and role.on_results[edge.factor]
            )
            beside[edge.dim] = passes and beside.get(edge.dim, True)
    return {
        name: axes
        for name in graph.model.graph.initializers
        if name in graph.shapes
        and (
            axes := {
                axis: size
                for axis, size in _without_channels(graph, name)
                if beside.get(graph.dim(name, axis))
            }
        )
    }


def _without_channels(graph: ChannelGraph, name: str) -> Iterator[tuple[int, int]]:
    for axis, size in enumerate(graph.shapes[name]):
        if size > 1 and not graph.groups_on(graph.dim(name, axis)):
            yield axis, size


def _new_sizes(graph: ChannelGraph, found: Mapping[str, Shape], known: Sizes) -> Sizes | None:
    """Smaller sizes that follow from the shapes found; ``None``: one would have two."""
    new: Sizes = {}
    for name, small in found.items():
        full = graph.shapes.get(name)
        if full is None or full == small:
            continue
        if not keeps_channels(graph, name, full, small):
            return None
        new |= {a: b for a, b in zip(full, small, strict=True) if a != b}
    for node in graph.model.graph:
        if facts_of(node).target is not None:
            new |= _regrouped(graph, node, found)
    if any(known.get(size, smaller) != smaller for size, smaller in new.items()):
        return None
    return {size: smaller for size, smaller in new.items() if size not in known}


def _regrouped(graph: ChannelGraph, node: ir.Node, found: Mapping[str, Shape]) -> Sizes:
    """What axes that become one are together, if they have become smaller."""
    operand, result = node.inputs[0], node.outputs[0]
    old = graph.shapes.get(operand.name or "") if operand is not None else None
    small = found.get(operand.name or "") if operand is not None else None
    new = graph.shapes.get(result.name or "")
    if old is None or new is None or small is None or prod(old) != prod(new):
        return {}
    sizes: Sizes = {}
    for before, after in blocks(old, new):
        size = prod(small[axis] for axis in before)
        if len(after) == 1 and size != new[after[0]]:
            sizes[new[after[0]]] = size
    return sizes


def _restate(
    graph: ChannelGraph, message: onnx.ModelProto, targets: Holders, tables: Holders, sizes: Sizes
) -> None:
    """Write smaller sizes into the message that shapes are inferred of."""
    initializers = {tensor.name: tensor for tensor in message.graph.initializer}
    for name, axes in tables.items():
        for axis in _smaller(axes, sizes):
            initializers[name].dims[axis] = sizes[axes[axis]]
    for node, proto in zip(graph.model.graph, message.graph.node, strict=True):
        axes = targets.get(proto.output[0], {}) if proto.output else {}
        smaller = _smaller(axes, sizes)
        if not smaller:
            continue
        port, numbers = _target(node)
        assert numbers is not None
        numbers[list(smaller)] = [sizes[axes[axis]] for axis in smaller]
        name = f"{proto.output[0]}/target"
        if name not in initializers:
            initializers[name] = message.graph.initializer.add()
        initializers[name].CopyFrom(onnx.numpy_helper.from_array(numbers, name))
        proto.input[port] = name


def _target(node: ir.Node) -> tuple[int, IntArray | None]:
    """The operand that holds the sizes of a node's result, and its numbers if they are constant."""
    port = facts_of(node).target
    target = None if port is None or port >= len(node.inputs) else node.inputs[port]
    if port is None or target is None or target.const_value is None:
        return -1, None
    return port, target.const_value.numpy().copy()
