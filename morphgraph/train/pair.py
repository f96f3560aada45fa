"""Teacher and student of a self-distillation: two networks, and how far one is from the other."""

from collections.abc import Mapping, Sequence
from math import inf, prod

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from morphgraph.arrays import Array
from morphgraph.calibration.tokens import ids_input
from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import DEFAULT_KEY, dtype_of, is_float, static_shape
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.torch_io.batch import FREE
from morphgraph.torch_io.to_torch import batch_of, flat_network, value_nodes

BATCH = 64
"""Samples per step."""
_ACTIVATIONS = 2**30  # bytes of activations that one backward pass may need, roughly
_INSIDE = 10.0  # weight of the values inside; from 3 to 30 it makes little difference


class Network:
    """A network in PyTorch whose results are its float outputs and values inside of it."""

    def __init__(self, model: ir.Model) -> None:
        self.canonical = canonicalize(model)
        self.net = flat_network(self.canonical)
        self.nodes = value_nodes(self.net)
        self.outputs = [v.name or "" for v in self.canonical.graph.outputs if is_float(v)]

    def give(self, outputs: Sequence[str], inside: Sequence[str]) -> None:
        """From now on return a tuple: these of the outputs, then these values."""
        output = self.net.graph.output_node()
        results = output.args[0]
        results = results if isinstance(results, tuple) else (results,)
        floats = [
            node
            for node, value in zip(results, self.canonical.graph.outputs, strict=True)
            if value.name in outputs
        ]
        output.args = ((*floats, *(self.nodes[name] for name in inside)),)
        self.net.recompile()

    def __call__(self, feeds: Mapping[str, Array]) -> tuple[Tensor, ...]:
        """The results for some inputs, as :meth:`give` has it."""
        values = (v for v in self.canonical.graph.inputs if v.const_value is None)
        results: tuple[Tensor, ...] = self.net(*(fed(value, feeds) for value in values))
        return results

    @property
    def takes_any_batch(self) -> bool:
        """Whether samples can be joined along the first axes of all inputs."""
        return batch_of(self.net) == FREE

    @property
    def bytes_per_sample(self) -> float:
        """Of all results, roughly, in single precision."""
        values = [value for node in self.canonical.graph for value in node.outputs if value.name]
        batch = next(iter(static_shape(self.canonical.graph.inputs[0])), 1)
        return 4.0 * sum(prod(static_shape(value)) for value in values) / max(batch, 1)


def fed(value: ir.Value, feeds: Mapping[str, Array]) -> Tensor:
    """What an input is given, or what it is by default."""
    array = feeds.get(value.name or "")
    if array is None:
        array = value.meta[DEFAULT_KEY].numpy()
    return torch.from_numpy(np.array(array, dtype=dtype_of(value), order="C"))


class Pair:
    """Teacher and student, and how far the student's results are from the teacher's."""

    def __init__(
        self, original: ir.Model, resized: ir.Model, selection: AxisSelection | None
    ) -> None:
        self.teacher, self.student = Network(original), Network(resized)
        ids = ids_input(original)
        self.ids = "" if ids is None else ids.name or ""
        if not self.student.outputs:
            raise ArgumentError("the model has no floating-point output that could be learned")
        inside = [] if selection is None else self._shared(layer_results(selection.graph))
        # Caches of blocks that have gone are no outputs of the student.
        outputs = [name for name in self.teacher.outputs if name in self.student.outputs]
        self.outputs = len(outputs)
        # Per result the axes of the teacher's of which some positions stay.
        self.cuts: list[list[tuple[int, Tensor]]] = [
            [(axis, torch.from_numpy(kept)) for axis, kept in selection.cuts(name)]
            if selection is not None
            else []
            for name in (*outputs, *inside)
        ]
        for network in (self.teacher, self.student):
            network.give(outputs, inside)
        self.selection = selection
        self.spreads: list[float] | None = None
        self.trained = [p for p in self.student.net.parameters() if p.requires_grad]
        fitting = _ACTIVATIONS / max(2 * self.student.bytes_per_sample, 1.0)
        self.fitting = int(min(max(fitting, 1), BATCH))
        free = self.teacher.takes_any_batch and self.student.takes_any_batch
        self.at_once = self.fitting if free else 1

    def _shared(self, names: Sequence[str]) -> list[str]:
        """Those of these values that both networks compute, each for itself."""
        return [name for name in names if name in self.teacher.nodes and name in self.student.nodes]

    def targets(self, feeds: Mapping[str, Array]) -> list[Tensor]:
        """The teacher's results, at the positions that the student has."""
        with torch.no_grad():
            results = list(self.teacher(feeds))
        for k, cuts in enumerate(self.cuts):
            for axis, kept in cuts:
                results[k] = results[k].index_select(axis, kept)
        return results

    def errors(self, feeds: Mapping[str, Array]) -> Tensor:
        """Mean squared error of every result in units of the teacher's variance, ``[results]``."""
        targets = self.targets(feeds)
        if self.spreads is None:
            self.spreads = [_spread(target) for target in targets]
        found = self.student(self.selection.positions(feeds) if self.selection else feeds)
        return torch.stack(
            [
                _mean_square(one, target) / spread
                for one, target, spread in zip(found, targets, self.spreads, strict=True)
            ]
        )

    def loss(self, feeds: Mapping[str, Array]) -> Tensor:
        """What training lowers."""
        errors = self.errors(feeds)
        outputs, inside = errors[: self.outputs], errors[self.outputs :]
        return outputs.mean() + (_INSIDE * inside.mean() if len(inside) else 0.0)


def layer_results(graph: ChannelGraph) -> list[str]:
    """The floating-point results of all operators that count as arithmetic on activations."""
    independent = graph.couplings.input_independent
    return [
        value.name
        for op in graph.ops
        if op.macs
        for value in op.ir.outputs
        if value.name and value.name not in independent and is_float(value)
    ]


def _spread(target: Tensor) -> float:
    """The variance of all finite numbers; infinite where there is none, so that nothing counts."""
    numbers = target[target.isfinite()].double()
    variance = float(numbers.var(unbiased=False)) if numbers.numel() else 0.0
    return variance if variance > 0 else inf


def _mean_square(found: Tensor, target: Tensor) -> Tensor:
    """Of the difference, where both are finite."""
    if found.shape != target.shape:  # a value that the rewrite gave another form
        return found.new_zeros(())
    both = target.isfinite() & found.isfinite()
    return (found.where(both, 0.0) - target.where(both, 0.0)).square().mean()
