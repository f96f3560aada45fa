"""Pass ``fused``: mixtures of experts in one node, and what is seen inside of them.

What their units give is no value of the graph. But the node adds up, for every token, products of
each expert's last kernel with its units, times its share: with another kernel it shows them. With
one that is zero but for the identity, of one expert, its result is that expert's units times its
share; with zeros and a bias of one, the share. Which functions stand before is the node's affair.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.edit import array_of
from morphgraph.onnx_io import is_float
from morphgraph.onnx_io.runtime import session
from morphgraph.ops import facts_of
from morphgraph.passes.calibration.kernels import Store, stored


@dataclass(frozen=True)
class Fused:
    """A mixture in one node.

    Attributes:
        node: the mixture.
        store: where the last kernels are stored, ``[experts, outputs, inputs]``.
        opset: versions of the operators, by domain.
    """

    node: ir.Node
    store: Store
    opset: dict[str, int]

    @property
    def name(self) -> str:
        """Of the node."""
        return self.node.name or ""

    @property
    def taker(self) -> tuple[str, int]:
        """Who reads the kernels: a node's name, and which of its operands they are."""
        return self.name, _ports(self.node)[0]

    @property
    def stack(self) -> str:
        """The name of the kernels, as they are read."""
        return self._operand(_ports(self.node)[0]).name or ""

    @property
    def inputs(self) -> int:
        """Of each expert's last kernel: the units inside of it."""
        return self.store.shape[2]

    @property
    def asked(self) -> list[str]:
        """Names of the tokens, and of the numbers of which each takes the largest."""
        return [self._operand(port).name or "" for port in (0, 1)]

    def operands(self, found: Arrays) -> tuple[Array, Array]:
        """Both, ``[tokens, features]`` and ``[tokens, experts]``.

        Args:
            found: values by name.
        """
        tokens, ranked = (found[name] for name in self.asked)
        return tokens.reshape(len(ranked), -1), ranked

    def matrices(self) -> Array:
        """The last kernels, ``[experts, outputs, inputs]``."""
        return self.store.array()

    def write(self, matrices: FloatArray) -> None:
        """Give the experts other last kernels, in place."""
        self.store.write(matrices.astype(self.store.array().dtype))

    def added(self) -> Array:
        """What is added behind the kernels, ``[experts, outputs]``."""
        port = _ports(self.node)[1]
        if _has(self.node, port):
            return array_of(self._operand(port))
        return np.zeros(self.store.shape[:2], self.store.array().dtype)

    def seen(
        self, tokens: Array, ranked: Array, threads: int = 0
    ) -> Iterator[tuple[int, IntArray, Array, Array]]:
        """By expert the tokens that take it, their shares, and its units times these.

        Args:
            tokens: what the node sees, ``[tokens, features]``.
            ranked: the numbers of which each token takes the largest, ``[tokens, experts]``.
            threads: of ONNX Runtime.

        Yields:
            The expert, places of tokens, ``[places]``, ``[places]``, ``[places, inputs]``.
        """
        running = self._session(threads)
        kind = np.result_type(tokens.dtype, np.float32)  # what is made of them is summed
        experts, outputs, inputs = self.store.shape
        kernels = np.zeros((experts, outputs, inputs), tokens.dtype)
        nothing = np.zeros((experts, outputs), tokens.dtype)
        shares = np.concatenate(
            [
                _run(running, tokens, ranked, kernels, np.eye(experts, outputs, -first))
                for first in range(0, experts, outputs)
            ],
            axis=1,
        )[:, :experts]
        for expert, share in enumerate(shares.T):
            there = np.flatnonzero(share)
            parts = [np.zeros((len(there), 0), tokens.dtype)]
            for first in range(0, inputs if len(there) else 0, outputs):
                kernels[expert] = np.eye(outputs, inputs, first)
                parts.append(_run(running, tokens[there], ranked[there], kernels, nothing))
            kernels[expert] = 0.0
            if len(there):
                units = np.concatenate(parts, axis=1)[:, :inputs]
                yield expert, there, share[there], units.astype(kind, copy=False)

    def _operand(self, port: int) -> ir.Value:
        value = self.node.inputs[port]
        assert value is not None
        return value

    def _session(self, threads: int) -> onnxruntime.InferenceSession:
        """The node by itself, that is fed tokens, what is ranked, last kernels and biases."""
        fed = (0, 1, *_ports(self.node))
        count = max(len(self.node.inputs), fed[-1] + 1)
        operands: list[ir.Value | None] = [None] * count
        kind = self._operand(0).type
        for port in range(count):
            if port in fed:
                rank = 3 if port == fed[2] else 2
                shape = ir.Shape([None] * rank)
                operands[port] = ir.Value(name=f"operand{port}", type=kind, shape=shape)
            elif _has(self.node, port):
                held = ir.tensor(array_of(self._operand(port)))
                operands[port] = ir.Value(name=f"operand{port}", const_value=held)
        result = ir.Value(name="result", type=kind)
        alone = ir.Node(
            self.node.domain,
            self.node.op_type,
            operands,
            list(self.node.attributes.values()),
            outputs=[result],
        )
        given = [value for port in fed if (value := operands[port]) is not None]
        rest = [value for value in operands if value is not None and value not in given]
        graph = ir.Graph(
            given, [result], nodes=[alone], initializers=rest, opset_imports=self.opset
        )
        return session(ir.Model(graph, ir_version=10), threads)


def fused_mixtures(model: ir.Model, weights: frozenset[str]) -> dict[str, Fused]:
    """All of a model by the names of their nodes, in topological order.

    Args:
        model: canonical.
        weights: names of the values that no graph input reaches.
    """
    found: dict[str, Fused] = {}
    for node in model.graph:
        if facts_of(node).experts is None:
            continue
        last, _ = _ports(node)
        others = [value for value in node.inputs[2:] if value is not None and value.name]
        held = all(value.name in weights and value.is_initializer() for value in others)
        kernels = node.inputs[last]
        store = None if kernels is None or not is_float(kernels) else stored(kernels, model)
        if held and store is not None:
            found[node.name or ""] = Fused(node, store, dict(model.graph.opset_imports))
    return found


def _ports(node: ir.Node) -> tuple[int, int]:
    ports = facts_of(node).experts
    assert ports is not None
    return ports


def _has(node: ir.Node, port: int) -> bool:
    value = node.inputs[port] if port < len(node.inputs) else None
    return value is not None and bool(value.name)


def _run(
    running: onnxruntime.InferenceSession, tokens: Array, ranked: Array, kernels: Array, bias: Array
) -> Array:
    names = [source.name for source in running.get_inputs()]
    given = (tokens, ranked, kernels, bias.astype(tokens.dtype))
    (found,) = running.run(None, dict(zip(names, given, strict=True)))
    return np.asarray(found)
