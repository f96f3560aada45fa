"""Pass ``readers``: linear operators whose kernels may be fitted anew, and what follows them.

A *reader* sums over the channels of a group: a convolution, a matrix product, the input side of a
recurrent layer (:mod:`morphgraph.ops.linear`). Its kernel can be written where one initializer
holds it, as it is or transposed, and nobody else reads that, or readers alone do that take it for
the same matrices: they are *peers*, and get one kernel that suits all of them.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, FloatArray
from morphgraph.edit import array_of
from morphgraph.onnx_io import COPIES_KEY, is_float, static_shape
from morphgraph.ops import Linear, Op, OpNode, facts_of
from morphgraph.ops.linear import Channelwise
from morphgraph.passes.calibration.kernels import Store, Whole, held, stored


@dataclass(frozen=True)
class Reader:
    """A linear operator of a model, and where its kernel stands.

    Attributes:
        node: the operator.
        linear: as a linear map.
        store: where its kernel is stored.
        peers: names of the readers of this kernel, itself among them, in the model's order; empty
            where it alone reads it.
    """

    node: ir.Node
    linear: Linear
    store: Store
    peers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the node."""
        return self.node.name or ""

    @property
    def operand(self) -> ir.Value:
        """The activation that it maps."""
        return cast("ir.Value", self.node.inputs[self.linear.operand])

    @property
    def result(self) -> ir.Value:
        """What it gives."""
        return self.node.outputs[0]

    @property
    def is_norm(self) -> bool:
        """Whether it sums over nothing, but scales and shifts what is normalized."""
        return isinstance(self.linear, Channelwise)

    def kernel(self) -> Array:
        """The numbers that the operator multiplies with."""
        return self.store.array()

    def matrix(self) -> FloatArray:
        """As matrices with their factor, ``[groups, outputs, inputs, taps]``."""
        kernel = self.kernel().astype(np.float64)
        return self.linear.matrix(kernel) * self.linear.factor

    def kernel_of(self, matrix: FloatArray) -> Array:
        """The kernel that has these matrices, as the operator reads it."""
        kernel = self.kernel()
        return self.linear.kernel(matrix / self.linear.factor, kernel.shape).astype(kernel.dtype)

    def write(self, matrix: FloatArray) -> None:
        """Give the operator another kernel, in place."""
        self.store.write(self.kernel_of(matrix))

    def bias(self) -> FloatArray:
        """What the operator adds by itself, ``[groups, outputs]``; zeros where it has no bias."""
        groups, outputs = self.matrix_shape[:2]
        facts = facts_of(self.node)
        port = facts.offset if self.is_norm else facts.shift
        value = None
        if port is not None and port < len(self.node.inputs):
            value = self.node.inputs[port]
        if value is None or value.const_value is None or self.linear.inside:
            return np.zeros((groups, outputs))
        factor = self.node.attributes.get(facts.shift_factor)
        scale = 1.0 if factor is None else factor.as_float()
        vector = array_of(value).astype(np.float64).reshape(-1) * scale
        return np.broadcast_to(vector, (groups * outputs,)).reshape(groups, outputs)

    @property
    def matrix_shape(self) -> tuple[int, int, int, int]:
        """``(groups, outputs, inputs, taps)``."""
        nothing: Array = np.broadcast_to(np.zeros(1), self.store.shape)
        shape = self.linear.matrix(nothing).shape
        return shape[0], shape[1], shape[2], shape[3]


def readers(model: ir.Model, weights: frozenset[str]) -> dict[str, Reader]:
    """The readers of kernels that nobody else reads, by the names of their nodes.

    In topological order.

    Args:
        model: canonical.
        weights: names of the values that no graph input reaches.
    """
    tied = set(model.meta.get(COPIES_KEY, {}))
    tied |= set(model.meta.get(COPIES_KEY, {}).values())
    found: dict[str, Reader] = {}
    for node in model.graph:
        reader = _reader(node, weights, model)
        if reader is not None and not reader.store.names & tied:
            found[reader.name] = reader
    return found


def peers(model: ir.Model, weights: frozenset[str]) -> dict[str, Reader]:
    """The readers that share their kernels with others of their kind, in topological order.

    All that read the kernel take it for the same matrices, give their results, and see rows of
    their own.

    Args:
        model: canonical.
        weights: names of the values that no graph input reaches.
    """
    families: dict[str, list[Reader]] = {}
    for node in model.graph:
        reader = _reader(node, weights, model, shared=True)
        if reader is not None and not reader.linear.inside and not reader.is_norm:
            (name,) = reader.store.names
            families.setdefault(name, []).append(reader)
    found: dict[str, Reader] = {}
    for name, family in families.items():
        if len(family) < 2 or len({each.linear.reading for each in family}) > 1:
            continue
        places = {each.operand for each in family}
        if len(places) < len(family) or not _alike([each.store for each in family]):
            continue
        if _read_by(model.graph.initializers[name]) == {each.node for each in family}:
            names = tuple(each.name for each in family)
            found |= {each.name: replace(each, peers=names) for each in family}
    return {node.name: found[node.name] for node in model.graph if node.name in found}


def all_readers(model: ir.Model, weights: frozenset[str]) -> dict[str, Reader]:
    """All readers of a model, with and without :func:`peers`, in topological order.

    Args:
        model: canonical.
        weights: names of the values that no graph input reaches.
    """
    found = readers(model, weights) | peers(model, weights)
    return {node.name: found[node.name] for node in model.graph if node.name in found}


def _alike(stores: Sequence[Store]) -> bool:
    """Whether all permute what is stored in the same way."""
    return len({store.order for store in stores if isinstance(store, Whole)}) == 1


def _read_by(value: ir.Value) -> set[ir.Node | None]:
    """Who reads an initializer, also behind permutations; ``None``: it is an output as well."""
    found: set[ir.Node | None] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            found.add(None)
        for user, _ in value.uses():
            if facts_of(user).permutation is None:
                found.add(user)
            else:
                pending += user.outputs
    return found


def tied_readers(
    model: ir.Model, weights: frozenset[str], found: Collection[str]
) -> dict[str, Reader]:
    """Linear operators that are no readers since others share their kernels: a tied head.

    Others that do something else with it, as an embedding.

    Args:
        model: canonical.
        weights: names of the values that no graph input reaches.
        found: names of the readers.
    """
    others = (node for node in model.graph if node.name not in found)
    tied = (_reader(node, weights, model, shared=True) for node in others)
    return {each.name: each for each in tied if each is not None and not each.is_norm}


def _reader(
    node: ir.Node, weights: frozenset[str], model: ir.Model, shared: bool = False
) -> Reader | None:
    facts = facts_of(node)
    if facts.linear is None or not node.outputs[0].name:
        return None
    linear: Linear | None = facts.call(facts.linear, node, OpNode(node, weights))
    if linear is None:
        return None
    kernel = node.inputs[linear.weight]
    if kernel is None or not is_float(node.outputs[0]):
        return None
    store = held(kernel) if shared else stored(kernel, model)
    return None if store is None else Reader(node, linear, store)


@dataclass(frozen=True)
class Following:
    """What comes behind a reader, element by element: ``clamp(scale * result + shift + added)``.

    Attributes:
        scale, shift: per output, ``[groups, outputs]``.
        added: names of activations of the same shape that are added.
        low, high: the range beyond which nobody sees how far the value is.
        nodes: names of the operators that make the scale, the shift and the sums.
    """

    scale: FloatArray
    shift: FloatArray
    added: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    nodes: frozenset[str] = frozenset()

    @property
    def clamps(self) -> bool:
        """Whether there is such a range."""
        return self.low > -math.inf or self.high < math.inf


def following(reader: Reader, within: Collection[str] | None = None) -> Following:
    """What comes behind a reader, as far as its result alone is passed on.

    Args:
        reader: the reader.
        within: names of the operators that may be among it, by default all.
    """
    groups, outputs = reader.matrix_shape[:2]
    scale, shift = np.ones(groups * outputs), np.zeros(groups * outputs)
    value, ends = reader.result, (-math.inf, math.inf)
    added: list[str] = []
    nodes: set[str] = set()
    shape = static_shape(value)
    axis = -1 if reader.linear.inside else reader.linear.output_axis(len(shape))
    while axis >= 0 and len(value.uses()) == 1 and not value.is_graph_output():
        (use,) = value.uses()
        node, facts = use.node, facts_of(use.node)
        if within is not None and node.name not in within:
            break
        if facts.clamp is not None:
            found = facts.call(facts.clamp, node, OpNode(node))
            ends = ends if found is None else found
            break
        step = _affine(node, use.idx, facts, axis, len(scale), len(shape))
        if step is not None and (not added or (step[0] == 1).all()):
            scale, shift = scale * step[0], shift * step[0] + step[1]
            nodes.add(node.name or "")
        elif facts.adds and len(node.inputs) == 2:
            other = node.inputs[1 - use.idx]
            if other is None or other.is_initializer() or static_shape(other) != shape:
                break
            added.append(other.name or "")
            nodes.add(node.name or "")
        elif not (facts.inert and use.idx == 0):
            break
        value = node.outputs[0]
    form = (groups, outputs)
    vectors = scale.reshape(form), shift.reshape(form)
    return Following(*vectors, tuple(added), *ends, frozenset(nodes))


def _affine(
    node: ir.Node, port: int, facts: type[Op], axis: int, size: int, rank: int
) -> tuple[FloatArray, FloatArray] | None:
    """Scale and shift of an operator that multiplies and adds constants per output."""
    if facts.statistics and port == 0:
        constants = [_vector(v, None, size, rank) for v in node.inputs[1:5]]
        if any(constant is None for constant in constants):
            return None
        gamma, beta, mean, variance = cast("list[FloatArray]", constants)
        epsilon = node.attributes.get("epsilon")
        spread = np.sqrt(variance + (1e-5 if epsilon is None else epsilon.as_float()))
        return gamma / spread, beta - mean * gamma / spread
    if len(node.inputs) != 2 or not (facts.adds or facts.multiplies):
        return None
    constant = _vector(node.inputs[1 - port], axis, size, rank)
    if constant is None:
        return None
    if facts.adds:
        return np.ones(size), constant
    return constant, np.zeros(size)


def _vector(value: ir.Value | None, axis: int | None, size: int, rank: int) -> FloatArray | None:
    """A constant that varies along one axis of a result only, ``[size]``."""
    if value is None or value.const_value is None:
        return None
    array = array_of(value).astype(np.float64)
    if axis is not None:
        if array.ndim > rank:
            return None
        array = array.reshape((1,) * (rank - array.ndim) + array.shape)
        if any(n != 1 for k, n in enumerate(array.shape) if k != axis):
            return None
    return np.broadcast_to(array.reshape(-1), (size,)) if array.size in (1, size) else None
