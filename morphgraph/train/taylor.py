"""First-order Taylor scores: by how much the loss would change if a channel were silenced.

A gate of 1 stands before every operator that sums over a channel. The derivative of the loss by the
gates of all of a channel's readers together, taken with respect to one common number, is to first
order what closing them would change (Molchanov et al. 2017 and 2019):

    score(channel) = mean over samples of | sum over readers of dL/d(gate) |
    dL/d(gate) = sum over positions of activation * dL/d(activation as this reader sees it)

The magnitude is taken per sample, since the derivatives of a trained network average out over many,
and behind the sum over readers, since tied channels go together: these are the places at which
``mask`` silences a channel.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.edit import Editor
from morphgraph.errors import ArgumentError, ModelError
from morphgraph.graph import ChannelGraph, Edge
from morphgraph.onnx_io import DEFAULT_KEY, escape, is_float, static_shape
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.passes.coupling.roles import Roles, roles
from morphgraph.torch_io.to_torch import canonical_network
from morphgraph.train.pair import fed

Loss = Callable[[Any, Tensor], Tensor]
"""From the network's outputs, a tensor or a tuple of them, and labels to a number."""


def taylor(
    graph: ChannelGraph,
    samples: Iterable[tuple[Mapping[str, Array] | Array, Array]],
    loss: Loss | Literal["cross_entropy"] = "cross_entropy",
) -> FloatArray:
    """How much the loss would change if a channel were silenced, to first order, ``[channels]``.

    The numbers are on one scale for the whole network, and are scores for ``plan``. What changes in
    norms over channels, whose statistics a removal changes too, is not counted. Channels that
    nothing sums over count 1, as in ``score``.

    Args:
        graph: the lifted network, with trained weights.
        samples: pairs of inputs, by name or of the only input, and labels; both hold samples along
            their first axes. Every sample is run by itself, or as many as the model's fixed batch.
        loss: ``"cross_entropy"`` of the first output ``[batch, classes, ...]``, scores or
            probabilities, with labels ``[batch, ...]``; or a function of the outputs (tensors, as
            ``to_torch`` gives them) and labels.

    Raises:
        ArgumentError: there are no samples, or labels do not fit them or the outputs.
        ModelError: an input is missing.
        UnsupportedError: an operator has no PyTorch form; names the node.

    >>> from morphgraph.passes.lift import lift
    >>> from morphgraph.testing import model_from_text
    >>> graph = lift(model_from_text('''
    ... net (float[1,2] x) => (float[1,2] y)
    ... <float[3,2] v = {1,0, 0,1, 1,1}, float[2,3] w = {1,0,0, 0,2,0}> {
    ...     h = Gemm<transB=1>(x, v)  a = Relu(h)  y = Gemm<transB=1>(a, w)
    ... }'''))
    >>> x, labels = np.array([[1, 1]], dtype=np.float32), np.array([0])
    >>> scores = taylor(graph, [(x, labels)])
    >>> scores[graph.group("g1").channels].round(2)    # nobody reads the third
    array([0.73, 1.46, 0.  ])
    """
    gated = _Gated(graph)
    function = _cross_entropy if loss == "cross_entropy" else loss
    total, count = np.zeros(len(graph.channel_group)), 0
    for inputs, labels in samples:
        for feeds, own in gated.runs(inputs, labels):
            total += np.abs(gated.changes(feeds, own, function))
            count += 1
    if not count:
        raise ArgumentError("there are no samples; give pairs of inputs and labels")
    return np.where(gated.is_read, total / count, 1.0)


@dataclass(frozen=True)
class _Reader:
    """An operand's axis that an operator sums over, with the channel at every position."""

    op_index: int
    port: int
    axis: int
    channels: IntArray


def _readers(graph: ChannelGraph) -> Iterator[_Reader]:
    """Where channels are read, each once: at one operand of every operator that sums over them."""
    role = roles(graph.couplings)
    for op_index, op in enumerate(graph.ops):
        by_factor: dict[int, list[Edge]] = defaultdict(list)
        for edge in graph.edges_of(op_index):
            if edge.port >= 0 and _is_read(role, edge.factor):
                by_factor[edge.factor].append(edge)
        seen = set()
        for edges in by_factor.values():
            place = _place(graph, role, edges)
            if place is None or (place.port, place.dim) in seen:
                continue
            seen.add((place.port, place.dim))
            channels = graph.channels_of(place.dim)
            operand = op.ir.inputs[place.port]
            if (
                operand is not None
                and is_float(operand)
                and (graph.channel_group[channels] >= 0).any()
            ):
                axis = graph.couplings.dims[place.dim].axis
                yield _Reader(op_index, place.port, axis, channels)


def _is_read(role: Roles, factor: int) -> bool:
    """Whether an operator sums over a factor, or takes a statistic that has not its channels."""
    return bool(role.runs[factor] and role.reads[factor] and not role.keeps[factor])


def _place(graph: ChannelGraph, role: Roles, edges: list[Edge]) -> Edge | None:
    """Where a gate closes what an operator reads of a factor.

    A recurrent layer sums over its own state, which is a result of it: there the gate stands on the
    kernel that maps the state onto the state. A product of two activations is closed at the first.
    """
    of_state = role.on_results[edges[0].factor] > 0
    chosen = graph.couplings.on_weight if of_state else graph.couplings.on_activation
    return next(filter(chosen, edges), None)


class _Gated:
    """The network with gates before all readers, in PyTorch."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.readers = list(_readers(graph))
        self.channels = len(graph.channel_group)
        self.is_read = np.zeros(self.channels, dtype=bool)
        for reader in self.readers:
            self.is_read[reader.channels] = True
        model = graph.model.clone()
        inputs = len([v for v in model.graph.inputs if v.const_value is None])
        nodes, editor = list(model.graph), Editor(model)
        gates = [_insert_gate(editor, nodes[r.op_index], r) for r in self.readers]
        model.graph.inputs.extend(gates)
        single = in_single_precision(model)
        self.inputs = [v for v in single.graph.inputs if v.const_value is None][:inputs]
        self.gates = [torch.ones(static_shape(gate)) for gate in gates]
        self.net: fx.GraphModule = canonical_network(single)

    def changes(self, feeds: Mapping[str, Array], labels: Tensor, loss: Loss) -> FloatArray:
        """What opening all gates of a channel further would add to the loss, ``[channels]``."""
        gates = [gate.requires_grad_() for gate in self.gates]
        with torch.enable_grad():
            results = self.net(*(fed(value, feeds) for value in self.inputs), *gates)
            number = loss(results, labels)
        found = torch.autograd.grad(number, gates, allow_unused=True) if gates else ()
        total = np.zeros(self.channels)
        for reader, gradient in zip(self.readers, found, strict=True):
            if gradient is not None:
                numbers = gradient.double().flatten().numpy()
                total += np.bincount(reader.channels, numbers, minlength=self.channels)
        return total

    def runs(
        self, inputs: Mapping[str, Array] | Array, labels: Array
    ) -> Iterator[tuple[Arrays, Tensor]]:
        """Inputs and labels sample by sample, or by as many as the model's batch.

        Raises:
            ArgumentError: there are more or fewer labels than samples.
            ModelError: an input is missing.
        """
        feeds = self._by_name(inputs)
        sizes = {v.name or "": _batch(v) for v in self.inputs}
        counts = {name: len(a) // sizes[name] for name, a in feeds.items() if sizes[name]}
        count = max(counts.values(), default=1)
        labels = np.asarray(labels)
        lead = labels.shape[0] if labels.ndim else 1
        if lead % max(count, 1) or not lead:
            raise ArgumentError(f"{lead} labels do not fit {count} samples; give one for each")
        each = lead // count
        for k in range(count):
            part = {
                name: a[k * sizes[name] : (k + 1) * sizes[name]] if counts.get(name) == count else a
                for name, a in feeds.items()
            }
            own = labels[k * each : (k + 1) * each] if labels.ndim else labels
            yield part, torch.from_numpy(np.array(own))

    def _by_name(self, inputs: Mapping[str, Array] | Array) -> Arrays:
        if not isinstance(inputs, Mapping):
            inputs = {self.inputs[0].name or "": inputs}
        needed = [v.name or "" for v in self.inputs if DEFAULT_KEY not in v.meta]
        for name in needed:
            if name not in inputs:
                raise ModelError(f"input '{escape(name)}' is missing; give arrays by name")
        known = {v.name for v in self.inputs}
        return {name: np.asarray(array) for name, array in inputs.items() if name in known}


def _insert_gate(editor: Editor, node: ir.Node, reader: _Reader) -> ir.Value:
    """Let an operator read an operand times a new value, a gate per position of an axis."""
    operand = node.inputs[reader.port]
    assert operand is not None
    name = editor.value_name(f"{operand.name}_gate")
    behind = len(operand.shape or ()) - reader.axis - 1
    gate = ir.val(name, operand.dtype, [len(reader.channels), *[1] * behind])
    gated = editor.insert(
        "Mul",
        [operand, gate],
        name=f"{node.name}_gate",
        result=f"{operand.name}_gated",
        like=operand,
        before=node,
    )
    node.replace_input_with(reader.port, gated)
    return gate


def _batch(value: ir.Value) -> int:
    """Samples of an input that one run takes: those of a fixed batch, else one; 0 of a scalar."""
    lead = value.shape[0] if value.shape else 0
    return lead if isinstance(lead, int) else 1


def _cross_entropy(results: Any, labels: Tensor) -> Tensor:
    """Of the first output, scores or probabilities ``[batch, classes, ...]``."""
    scores: Tensor = results if isinstance(results, Tensor) else results[0]
    classes = scores.shape[1] if scores.ndim > 1 else 0
    is_class = labels.dtype.is_floating_point or (labels.numel() and int(labels.max()) < classes)
    if not classes or not is_class:
        raise ArgumentError(
            f"labels up to {labels.max() if labels.numel() else '?'} are none of the output's "
            f"{classes} classes; give loss=function"
        )
    with torch.no_grad():
        adds_up = bool((scores.sum(1) - 1).abs().max() < _ROUNDED and scores.min() >= 0)
    logarithms = scores.clamp_min(_LEAST).log() if adds_up else scores.log_softmax(1)
    if labels.dtype.is_floating_point:
        return -(labels * logarithms).sum(1).mean()
    return F.nll_loss(logarithms, labels.long())


_ROUNDED = 1e-3  # how far probabilities may be from 1 together
_LEAST = 1e-12  # of a probability whose logarithm is taken
