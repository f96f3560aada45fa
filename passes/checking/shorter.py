"""Networks of fewer positions, where tables and targets hold sizes: they prove the same.

A vision transformer adds a table of positions, and its Reshapes name the number of tokens, so that
it takes no smaller image. But every token goes the same way. So the networks that are compared,
the original, the masked and the resized one, all are given the same smaller sizes: tables lose
their last rows, targets name fewer tokens. What ``smaller`` asks of inputs must hold of them, and

- no axis has one position only that had several, for a sum or a softmax over one says little;
- only what is no size of channels changes: what states sizes (``following`` tells where they stand)
  must state the original's there, in the resized model as in the original;
- of a table that loses rows all that the resized model has, lost ones included, is what the plan
  keeps of the original's; where a table is computed, all weights that it is computed of.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.edit import Editor, replace_array
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import is_float, static_shape
from morphgraph.onnx_io.copies import copied
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking.compare import kept
from morphgraph.passes.checking.following import (
    POSITIONS,
    Following,
    following,
    stated,
    statements_of,
    window_sizes,
)
from morphgraph.passes.checking.smaller import (
    Sliding,
    inputs_of,
    proves_the_same,
    shares,
    windows_of,
)

_WINDOWS = (3, 4)
"""Heights and widths of windows for which everything is worked out.

Maps of two windows that are shifted by half of one fall apart there into pieces of several rows.
"""


@dataclass(frozen=True)
class Shorter:
    """How networks get fewer positions.

    Attributes:
        graph: the lifted original.
        inputs: smaller shapes of the inputs, by name.
        parts: what becomes smaller with them.
    """

    graph: ChannelGraph
    inputs: Mapping[str, Shape]
    parts: Following

    def of(self, model: ir.Model) -> ir.Model | None:
        """A copy of a network, the original or one made of it; ``None``: it holds other sizes."""
        return self.change(copied(model))

    def change(self, model: ir.Model) -> ir.Model | None:
        """The same of a network that is nobody else's: it is changed, and returned."""
        editor, constants = Editor(model), dict[bytes, ir.Value]()
        made = _results(model)
        for name, axes in self.parts.stated.items():
            if name in made and not self._restate(editor, constants, made[name], axes):
                return None
        for name, axes in self.parts.computed.items():
            if name in made and not self._cut_behind(editor, made[name], axes):
                return None
        for name, axes in self.parts.tables.items():
            if name in model.graph.initializers and not self._cut(model, name, axes):
                return None
        return model

    def agrees(self, original: ir.Model, small: ir.Model, selection: AxisSelection) -> bool:
        """Whether the resized model has of all tables what the plan keeps, bit by bit."""
        for name in [*self.parts.tables, *_weights_behind(original, self.parts.computed)]:
            old, new = (m.graph.initializers.get(name) for m in (original, small))
            if new is None:
                continue
            if old is None or old.const_value is None or new.const_value is None:
                return False
            stays = kept(selection, name, old.const_value.numpy())
            if not np.array_equal(stays, new.const_value.numpy(), equal_nan=is_float(old)):
                return False
        return True

    def _restate(
        self,
        editor: Editor,
        constants: dict[bytes, ir.Value],
        value: ir.Value,
        axes: Mapping[int, int],
    ) -> bool:
        """Write smaller sizes into what states the original's, where it does."""
        node = value.producer()
        assert node is not None
        expected, found = statements_of(self.graph)[value.name or ""], stated(node)
        if [(e.port, e.at(axes)) for e in expected] != [(e.port, e.at(axes)) for e in found]:
            return False
        for each in found:
            numbers = each.moved(axes, self.parts.sizes)
            key = numbers.dtype.str.encode() + numbers.tobytes()  # many nodes state the same
            if key not in constants:
                constants[key] = editor.constant(f"{value.name}_smaller_{each.port}", numbers)
            node.replace_input_with(each.port, constants[key])
        return True

    def _cut_behind(self, editor: Editor, value: ir.Value, axes: Mapping[int, int]) -> bool:
        """Let those who read what is computed of weights find fewer positions."""
        sizes, node = static_shape(value), value.producer()
        assert node is not None
        if any(axis >= len(sizes) or sizes[axis] != size for axis, size in axes.items()):
            return False
        smaller = [self.parts.sizes[size] for size in axes.values()]
        bounds = [[0] * len(axes), smaller, list(axes)]
        operands = [editor.constant(f"{value.name}_cut", np.array(b, np.int64)) for b in bounds]
        users = list(value.uses())
        cut = editor.insert(
            "Slice",
            [value, *operands],
            name=f"{node.name}_cut",
            result=f"{value.name}_cut",
            like=value,
            sizes=dict(zip(axes, smaller, strict=True)),
            after=node,
        )
        for user, index in users:
            user.replace_input_with(index, cut)
        return True

    def _cut(self, model: ir.Model, name: str, axes: Mapping[int, int]) -> bool:
        """Take a table's last positions away."""
        value = model.graph.initializers[name]
        if value.const_value is None or len(value.const_value.shape) != len(
            self.graph.shapes[name]
        ):
            return False
        array = value.const_value.numpy()
        for axis, size in axes.items():
            if array.shape[axis] != size:
                return False
            array = np.take(array, range(self.parts.sizes[size]), axis=axis)
        replace_array(value, array)
        return True


def _results(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for node in model.graph for value in node.outputs}


def _weights_behind(model: ir.Model, names: Mapping[str, object]) -> list[str]:
    """The initializers that values are computed of, without those that state sizes alone."""
    made = _results(model)
    pending, found = [made[name] for name in names], dict[str, None]()
    seen = set(pending)
    while pending:
        node = pending.pop().producer()
        for port, operand in () if node is None else enumerate(node.inputs):
            states = node is not None and port == facts_of(node).target
            if operand is not None and operand not in seen and not states:
                seen.add(operand)
                pending.append(operand)
                if operand.is_initializer():
                    found[operand.name or ""] = None
    return list(found)


def shorter(graph: ChannelGraph) -> Shorter | None:
    """How the network gets fewer positions; ``None``: not so that a comparison proves the same."""
    windows = windows_of(graph)
    for share in _shares(graph, windows):
        inputs = inputs_of(graph, share)
        if inputs is None:
            return None
        found = following(graph, inputs)
        if found is not None:
            parts, shapes = found
            several = all(
                after >= min(before, POSITIONS)
                for name, full in graph.shapes.items()
                for before, after in zip(full, shapes.get(name, full), strict=True)
            )
            if several and proves_the_same(graph, windows, shapes, parts.computed):
                return Shorter(graph, inputs, parts)
    return None


def _shares(graph: ChannelGraph, windows: Sequence[Sliding]) -> Iterator[float]:
    """Shares of heights and widths to try, the least first.

    Where maps are taken apart into windows, all of these keep their number, and get fewer
    positions.
    """
    sizes = window_sizes(graph)
    if not sizes:
        yield from (POSITIONS * share for share in shares(windows))
    for size in sizes[:1]:
        yield from (count / size for count in _WINDOWS if count < size)
