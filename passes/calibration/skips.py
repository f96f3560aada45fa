"""Pass ``skips``: what it does to the outputs when a whole branch gives its mean and no more.

That is what is left of a branch that goes (:mod:`morphgraph.passes.analysis.branches`): a constant
per channel. The loss is the error of the outputs as a share of their variance, in the unit of the
curves (:mod:`morphgraph.passes.calibration.curves`), so that widths and branches are weighed on one
scale. One session serves all branches: each has a gate, a number that is fed.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.edit import Editor
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import dtype_of
from morphgraph.onnx_io.runtime import session
from morphgraph.passes.analysis.branches import Branch
from morphgraph.passes.calibration.batches import Batches
from morphgraph.passes.calibration.outputs import output_error
from morphgraph.passes.calibration.segments import run_all


def measure_skips(
    graph: ChannelGraph,
    parts: Sequence[Branch],
    fitted: Iterable[Arrays],
    feeds: Iterable[Arrays],
    *,
    threads: int = 0,
    progress: Progress = no_progress,
) -> dict[tuple[int, ...], float]:
    """By the groups of a branch or block the error of the outputs without it.

    Args:
        graph: the lifted network.
        parts: to be left out, each alone.
        fitted: the inputs over which means are taken.
        feeds: those on which the error is measured.
        threads: of ONNX Runtime.
        progress: told of every run.
    """
    values = list(dict.fromkeys(value for part in parts for value in part.values))
    means = _means(graph, values, fitted, threads)
    gated = _Gated(graph, means, threads)
    expected, found = Batches(), dict[tuple[int, ...], float]()
    for outputs in gated.run(feeds, ()):
        expected.append(outputs)
    for done, part in enumerate(parts):
        progress("branches", done, len(parts))
        found[part.groups] = output_error(expected, gated.run(feeds, part.values))
    progress("branches", len(parts), len(parts))
    return found


def _means(
    graph: ChannelGraph, values: Sequence[str], feeds: Iterable[Arrays], threads: int
) -> dict[str, Array]:
    """The means of values over all axes but those of channels, which are kept with size 1."""
    model = graph.model.clone()
    editor, by_name = Editor(model), _results(model)
    names = {}
    for name in values:
        value = by_name[name]
        mean = _reduced(editor, value, _other_axes(graph, name))
        names[mean.name or ""] = name
        model.graph.outputs.append(mean)
    sums: dict[str, Array] = dict.fromkeys(values, np.zeros(()))
    count = 0
    for batch, found in _with_feeds(model, feeds, threads):
        samples = len(next(iter(batch.values())))
        count += samples
        for output, name in names.items():
            sums[name] = sums[name] + samples * found[output].astype(np.float64)
    return {
        name: np.asarray(total / max(count, 1), dtype_of(by_name[name]))
        for name, total in sums.items()
    }


def _with_feeds(
    model: ir.Model, feeds: Iterable[Arrays], threads: int
) -> Iterator[tuple[Arrays, Arrays]]:
    kept = list[Arrays]()

    def remembered() -> Iterator[Arrays]:
        for feed in feeds:
            kept.append(feed)
            yield feed

    for found in run_all(model, remembered(), threads):
        yield kept.pop(0), found


def _results(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name: value for node in model.graph for value in node.outputs if value.name}


def _other_axes(graph: ChannelGraph, name: str) -> list[int]:
    first = graph.couplings.first_dim[name]
    return [axis for axis in range(len(graph.shapes[name])) if not graph.groups_on(first + axis)]


def _reduced(editor: Editor, value: ir.Value, axes: Sequence[int]) -> ir.Value:
    """The mean of a value over some axes; from opset 18 on these are an operand."""
    node = value.producer()
    assert node is not None
    name, operands, attributes = f"{value.name}_mean", [value], dict[str, object](keepdims=1)
    if editor.graph.opset_imports.get("", 0) >= 18:
        operands.append(editor.sizes(f"{value.name}_axes", axes))
    else:
        attributes["axes"] = list(axes)
    return editor.insert(
        "ReduceMean",
        operands,
        attributes,
        name=name,
        result=name,
        like=value,
        sizes=dict.fromkeys(axes, 1),
        after=node,
    )


class _Gated:
    """A network in which values pass at a gate of 1, and are their means at a gate of 0."""

    def __init__(self, graph: ChannelGraph, means: dict[str, Array], threads: int) -> None:
        model = graph.model.clone()
        self.gates: dict[str, tuple[str, Array]] = {}
        editor, by_name = Editor(model), _results(model)
        for name, mean in means.items():
            value = by_name[name]
            self._insert(editor, value, mean)
        self.session = session(model, threads)
        taken = {source.name for source in self.session.get_inputs()}
        self.inputs = taken - {gate for gate, _ in self.gates.values()}
        self.outputs = [output.name for output in self.session.get_outputs()]

    def _insert(self, editor: Editor, value: ir.Value, mean: Array) -> None:
        name, node = value.name or "", value.producer()
        assert node is not None
        gate = ir.Value(
            name=editor.value_name(f"{name}_gate"),
            shape=ir.Shape(()),
            type=ir.TensorType(value.dtype or ir.DataType.FLOAT),
        )
        editor.graph.inputs.append(gate)
        users = list(value.uses())
        center = editor.constant(f"{name}_center", mean)
        # value' = center + gate * (value - center)
        insert = partial(editor.insert, name=f"{name}_gated", result=f"{name}_gated", like=value)
        apart = insert("Sub", [value, center], after=node)
        scaled = insert("Mul", [apart, gate], after=apart.producer())
        result = insert("Add", [scaled, center], after=scaled.producer())
        for user, port in users:
            user.replace_input_with(port, result)
        self.gates[name] = gate.name or "", np.ones((), dtype_of(value))

    def run(self, feeds: Iterable[Arrays], closed: Sequence[str]) -> Iterator[Arrays]:
        """The outputs, batch by batch, with some values at their means."""
        gates = {
            gate: np.zeros_like(one) if name in closed else one
            for name, (gate, one) in self.gates.items()
        }
        for feed in feeds:
            given = {name: array for name, array in feed.items() if name in self.inputs} | gates
            yield dict(zip(self.outputs, self.session.run(self.outputs, given), strict=True))
