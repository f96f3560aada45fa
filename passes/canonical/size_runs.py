"""One model canonicalized at several input sizes: what differs between the runs is dynamic.

Both ways to keep sizes dynamic (``dynamic_batch`` and ``dynamic_sizes``) compare such runs, write
the operands that hold a dynamic size anew, and then give every value of the first run its symbolic
shape.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.onnx_io import (
    DYNAMIC_AXES_KEY,
    STATIC_SHAPE_KEY,
    is_unsized,
    mark_unsized,
    static_shape,
    values_of,
)
from morphgraph.passes.canonical.symbols import Symbol, expression

Digests = Mapping[str, object]
"""By the name of a value that was folded, something that is equal where its content is."""

Fold = Callable[[ir.Model, frozenset[str]], Digests]
"""Fold a model with static inputs in place, but not the nodes that make these values."""


class SizeRuns:
    """Runs of the recipe over one model; the first is the one that is written.

    Args:
        models: canonical at the analysis sizes, then with each symbol enlarged in turn. They have
            the same structure.
        symbols: the dynamic sizes.
    """

    def __init__(self, models: Sequence[ir.Model], symbols: Sequence[Symbol]) -> None:
        self.model = models[0]
        self.symbols = symbols
        self._shapes: dict[str, list[Shape]] = {}
        for model in models:
            for value in values_of(model.graph):
                if value.name:
                    self._shapes.setdefault(value.name, []).append(static_shape(value))
        self._forget_unsized()
        self.varying_constants = [
            value
            for name, value in self.model.graph.initializers.items()
            if any(not _same_content(value, m.graph.initializers[name]) for m in models[1:])
        ]

    def _forget_unsized(self) -> None:
        """What has no known size in one run has none."""
        for value in values_of(self.model.graph):
            shapes = self._shapes.get(value.name or "", [])
            if any(len(shape) != len(shapes[0]) for shape in shapes):
                shapes[:] = [()] * len(shapes)
                mark_unsized(value)

    def shapes(self, value: ir.Value | None) -> list[Shape]:
        """The shapes of a value in all runs."""
        assert value is not None
        return self._shapes[value.name or ""]

    def varying_axes(self, value: ir.Value) -> list[int]:
        """The axes of a value whose size is not the same in all runs."""
        first, *others = self.shapes(value)
        return [axis for axis, size in enumerate(first) if any(o[axis] != size for o in others)]

    def expand_target(self, node: ir.Node) -> tuple[list[int], list[int]]:
        """What an Expand may have for its shape operand, and the axes where that would be wrong.

        Returns:
            sizes: 1 where the other operand has the size already, which Expand leaves as it is.
            dynamic: the axes that really grow, to a dynamic size.
        """
        before, after = self.shapes(node.inputs[0]), self.shapes(node.outputs[0])
        added = len(after[0]) - len(before[0])  # Expand aligns the last axes
        target = [
            1
            if k >= added and all(b[k - added] == a[k] for b, a in zip(before, after, strict=True))
            else size
            for k, size in enumerate(after[0])
        ]
        return target, [k for k in self.varying_axes(node.outputs[0]) if target[k] != 1]

    def write_shapes(self, source: ir.Model) -> None:
        """Give every value its shape with symbolic sizes, and note what it is analysed with.

        Args:
            source: the model that was canonicalized; inputs have the sizes that it declares.
        """
        declared = {value.name: ir.Shape(value.shape or ()) for value in source.graph.inputs}
        outputs = {value.name: value.shape for value in source.graph.outputs}
        results = (value for node in self.model.graph for value in node.outputs if value.name)
        for value in (*self.model.graph.inputs, *results):
            if is_unsized(value):
                value.shape = outputs.get(value.name)
                continue
            sizes = static_shape(value)
            runs = self._shapes.get(value.name or "", [sizes])  # new values are the same in all
            value.meta[STATIC_SHAPE_KEY] = sizes
            # The batch may share an axis with heads or windows, which can be resized there.
            others = [run for run, s in zip(runs[1:], self.symbols) if not s.is_batch]
            value.meta[DYNAMIC_AXES_KEY] = frozenset(
                axis for axis, size in enumerate(sizes) if any(run[axis] != size for run in others)
            )
            value.shape = (
                declared[value.name]
                if value.name in declared
                else ir.Shape(
                    expression(self.symbols, run_sizes) for run_sizes in zip(*runs, strict=True)
                )
            )


def same_structure(models: Sequence[ir.Model]) -> bool:
    """Whether models have the same nodes, and initializers of the same names."""
    nodes = [[(node.name, node.op_identifier()) for node in model.graph] for model in models]
    names = [model.graph.initializers.keys() for model in models]
    return all(n == nodes[0] for n in nodes) and all(n == names[0] for n in names)


def _same_content(value: ir.Value, other: ir.Value) -> bool:
    """Whether two initializers hold the same."""
    a, b = value.const_value, other.const_value
    assert a is not None
    assert b is not None
    # Weights are shared by all runs; only what was folded needs a look inside.
    return a is b or (a.shape == b.shape and np.array_equal(a.numpy(), b.numpy(), equal_nan=True))
