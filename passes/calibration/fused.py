"""Pass ``fused``: mixtures of experts in one node, and what is seen inside of them.

What their units give is no value of the graph. But the node adds up, for every token, products of
each expert's last kernel with its units, times its share: with another kernel it shows them. With
one that is zero but for the identity, of one expert, its result is that expert's units times its
share; with zeros and a bias of one, the share. Which functions stand before is the node's affair.
In few bits the identity is a step above the zero point.

The first kernels see the tokens, which are values of the graph: with the shares, that is all that
it takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnxruntime

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.edit import array_of
from morphgraph.onnx_io import is_float, static_shape
from morphgraph.onnx_io.runtime import session
from morphgraph.ops import OpNode, facts_of
from morphgraph.ops.op import Experts, Stacked
from morphgraph.passes.calibration.few_bits import FewBits, packed
from morphgraph.passes.calibration.kernels import Store, stored


@dataclass(frozen=True)
class Fused:
    """The first or the last kernels of a mixture in one node.

    Attributes:
        node: the mixture.
        experts: which of its operands hold what.
        is_first: whether these are the first kernels.
        store: where they are stored, ``[experts, outputs, inputs]``.
        opset: versions of the operators, by domain.
    """

    node: ir.Node
    experts: Experts
    is_first: bool
    store: Store
    opset: dict[str, int]

    @property
    def name(self) -> str:
        """Of the node, with what tells its first kernels from its last."""
        return f"{self.node.name} (first kernels)" if self.is_first else self.node.name or ""

    @property
    def kernels(self) -> Stacked:
        """The operands with the kernels."""
        return self.experts.first if self.is_first else self.experts.last

    @property
    def taker(self) -> tuple[str, int]:
        """Who reads the kernels: a node's name, and which of its operands they are."""
        return self.node.name or "", self.kernels.kernel

    @property
    def stack(self) -> str:
        """The name of the kernels, as they are read."""
        return self.operand(self.kernels.kernel).name or ""

    @property
    def inputs(self) -> int:
        """Of each expert's kernel: the features of a token, or the units inside of it."""
        return self.store.shape[2]

    @property
    def asked(self) -> list[str]:
        """Names of the tokens, and of the numbers of which each takes the largest."""
        return [self.operand(port).name or "" for port in self.experts.tokens]

    def operands(self, found: Arrays) -> list[Array]:
        """What there is for each token, ``[tokens, ...]`` each, the tokens themselves first.

        Args:
            found: values by name.
        """
        tokens, ranked, *others = (found[name] for name in self.asked)
        return [tokens.reshape(len(ranked), -1), ranked, *others]

    def matrices(self) -> Array:
        """The kernels, ``[experts, outputs, inputs]``."""
        return self.store.array()

    def write(self, matrices: FloatArray) -> None:
        """Give the experts other kernels, in place."""
        self.store.write(matrices.astype(self.store.array().dtype))

    def within(self, node: ir.Node, model: ir.Model) -> "Fused | None":
        """The same in a copy of the model, or of a part of it, that has this node."""
        store = _store(node, self.kernels, model)
        return None if store is None else replace(self, node=node, store=store)

    def added(self) -> Array:
        """What is added behind the kernels, ``[experts, outputs]``."""
        port = self.kernels.added
        if _has(self.node, port):
            return array_of(self.operand(port))
        return np.zeros(self.store.shape[:2], np.float32)

    def shown(self, threads: int = 0) -> "Shown":
        """What shows what the kernels see: a session of ONNX Runtime that holds the node's weights.

        Args:
            threads: of ONNX Runtime.
        """
        return Shown(self, threads)

    def operand(self, port: int) -> ir.Value:
        """What the node reads there."""
        value = self.node.inputs[port]
        assert value is not None
        return value


class Shown:
    """A node by itself, that is fed other last kernels, and so shows what is inside of it."""

    def __init__(self, fused: Fused, threads: int) -> None:
        self.fused, self.node, self.last = fused, fused.node, fused.experts.last
        experts, outputs, width = static_shape(fused.operand(self.last.kernel))
        self.experts, self.outputs = experts, outputs
        self.inputs = width * 8 // self.last.bits if self.last.bits else width
        self.running = self._session(threads)

    def seen(self, operands: list[Array]) -> Iterator[tuple[int, IntArray, Array, Array]]:
        """By expert the tokens that take it, their shares, and what its kernel sees times these.

        Args:
            operands: what there is for each token, as of :meth:`Fused.operands`.

        Yields:
            The expert, places of tokens, ``[places]``, ``[places]``, ``[places, inputs]``.
        """
        kind = np.result_type(operands[0].dtype, np.float32)  # what is made of them is summed
        for expert, share in enumerate(self.shares(operands).T):
            there = np.flatnonzero(share)
            if not len(there):
                continue
            mine = [each[there] for each in operands]
            shares = share[there]
            is_first = self.fused.is_first
            rows = mine[0] * shares[:, None] if is_first else self.units(expert, mine)
            yield expert, there, shares, rows.astype(kind, copy=False)

    def shares(self, operands: list[Array]) -> Array:
        """Of every token and expert, ``[tokens, experts]``; 0 where it does not take it."""
        experts, outputs = self.experts, self.outputs
        kernels = self._zeros(operands)
        parts = [
            self._run(operands, kernels, np.eye(experts, outputs, -first))
            for first in range(0, experts, outputs)
        ]
        return np.concatenate(parts, axis=1)[:, :experts]

    def units(self, expert: int, operands: list[Array]) -> Array:
        """Those of an expert times its shares, ``[tokens, inputs]``, of tokens that take it."""
        outputs, inputs = self.outputs, self.inputs
        nothing = np.zeros((self.experts, outputs))
        kernels, parts = self._zeros(operands), []
        for first in range(0, inputs, outputs):
            kernels[expert] = np.eye(outputs, inputs, first)
            parts.append(self._run(operands, kernels, nothing))
        return np.concatenate(parts, axis=1)[:, :inputs]

    def _zeros(self, operands: list[Array]) -> Array:
        """Last kernels, ``[experts, outputs, inputs]``."""
        kind = np.uint8 if self.last.bits else operands[0].dtype
        return np.zeros((self.experts, self.outputs, self.inputs), kind)

    def _session(self, threads: int) -> onnxruntime.InferenceSession:
        """The node, that is fed what there is for each token, last kernels and biases."""
        last, node = self.last, self.node
        fed = (*self.fused.experts.tokens, last.kernel, last.added)
        count = max(len(node.inputs), last.added + 1)
        operands: list[ir.Value | None] = [None] * count
        real = self.fused.operand(0)
        for port in range(count):
            if port in fed:
                is_kernel = port == last.kernel
                shape = ir.Shape([None] * (3 if is_kernel else 2))
                few = ir.TensorType(ir.DataType.UINT8) if is_kernel and last.bits else None
                operands[port] = ir.Value(name=f"operand{port}", type=few or real.type, shape=shape)
            elif last.bits and port == last.zeros:
                continue  # half of the range
            elif _has(node, port):
                array = array_of(self.fused.operand(port))
                held = np.ones_like(array) if last.bits and port == last.scales else array
                operands[port] = ir.Value(name=f"operand{port}", const_value=ir.tensor(held))
        result = ir.Value(name="result", type=real.type)
        attributes = list(node.attributes.values())
        alone = ir.Node(node.domain, node.op_type, operands, attributes, outputs=[result])
        given = [value for port in fed if (value := operands[port]) is not None]
        rest = [value for value in operands if value is not None and value not in given]
        opset = self.fused.opset
        graph = ir.Graph(given, [result], nodes=[alone], initializers=rest, opset_imports=opset)
        return session(ir.Model(graph, ir_version=10), threads)

    def _run(self, operands: list[Array], kernels: Array, bias: Array) -> Array:
        """The result, with last kernels of zeros and ones and with a bias."""
        kind, bits = operands[0].dtype, self.last.bits
        stack = packed(kernels + 2 ** (bits - 1), bits) if bits else kernels
        names = [source.name for source in self.running.get_inputs()]
        given = (*operands, stack, bias.astype(kind))
        (found,) = self.running.run(None, dict(zip(names, given, strict=True)))
        return np.asarray(found)


def fused_mixtures(model: ir.Model, weights: frozenset[str]) -> dict[str, Fused]:
    """The kernels of all of a model by their names, in topological order.

    Args:
        model: canonical.
        weights: names of the values that no graph input reaches.
    """
    found: dict[str, Fused] = {}
    for node in model.graph:
        facts = facts_of(node)
        experts: Experts | None = None
        if facts.experts is not None:
            experts = facts.call(facts.experts, node, OpNode(node))
        if experts is None or any(not _has(node, port) for port in experts.tokens):
            continue
        others = [
            value
            for port, value in enumerate(node.inputs)
            if value is not None and value.name and port not in experts.tokens
        ]
        held = all(value.name in weights and value.is_initializer() for value in others)
        for is_first in (True, False):
            store = _store(node, experts.first if is_first else experts.last, model)
            if held and store is not None:
                opset = dict(model.graph.opset_imports)
                each = Fused(node, experts, is_first, store, opset)
                found[each.name] = each
    return found


def _store(node: ir.Node, kernels: Stacked, model: ir.Model) -> Store | None:
    """Where kernels of a mixture are stored; ``None`` where they cannot be changed there."""
    value = node.inputs[kernels.kernel]
    if value is None or not kernels.bits:
        return None if value is None or not is_float(value) else stored(value, model)
    scale, zero = node.inputs[kernels.scales], None
    if _has(node, kernels.zeros):
        zero = node.inputs[kernels.zeros]
    if scale is None or any(len(each.uses()) != 1 for each in (value, scale)):
        return None
    return FewBits(value, scale, zero, kernels.bits)


def _has(node: ir.Node, port: int) -> bool:
    value = node.inputs[port] if port < len(node.inputs) else None
    return value is not None and bool(value.name)
