"""Pass ``dense``: products with a stack of kernels, all of which see every token.

Where a mixture computes all of its experts, and multiplies what they give with shares that are zero
for most: an expert stands at each position of an axis of the result, and is a linear map like any
other for the tokens that have a share of it. Places are those of a token and an expert, experts
first.
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray, IntArray
from morphgraph.onnx_io import is_float, static_shape
from morphgraph.ops import OpNode, describe, facts_of
from morphgraph.ops.description import factors_at
from morphgraph.passes.calibration.arrivals import moved
from morphgraph.passes.calibration.kernels import Stacked, Store, stored
from morphgraph.passes.calibration.shares import ByPlace, Mixed, Places, mixed_places, shared


@dataclass(frozen=True)
class Dense(Stacked):
    """A product with a stack of kernels.

    Attributes:
        node: the product.
        port: that of the operand, which is no kernel.
        store: where the stack is stored, ``[experts, ...]``.
        by_expert: the axis of the operand on which experts stand; ``None``: all see the same.
        reduced: the one that is summed over.
        experts_of: the axis of the result on which experts stand.
        made: the one that holds the outputs.
        turned: the stack holds ``[experts, inputs, outputs]``.
    """

    node: ir.Node
    port: int
    store: Store
    by_expert: int | None
    reduced: int
    experts_of: int
    made: int
    turned: bool

    @property
    def name(self) -> str:
        """Of the product."""
        return self.node.name or ""

    @property
    def operand(self) -> ir.Value:
        """What is mapped."""
        value = self.node.inputs[self.port]
        assert value is not None
        return value

    @property
    def result(self) -> ir.Value:
        """What it gives."""
        return self.node.outputs[0]

    @property
    def stack(self) -> str:
        """The stack's name, as it is read."""
        value = self.node.inputs[1 - self.port]
        return "" if value is None else value.name or ""

    @property
    def taker(self) -> tuple[str, int]:
        """Who reads the stack: a node's name, and which of its operands that is."""
        return self.name, 1 - self.port

    def within(self, node: ir.Node, model: ir.Model) -> "Dense | None":
        """The same in a copy of the model, or of a part of it, that has this node."""
        stack = node.inputs[1 - self.port]
        store = None if stack is None else stored(stack, model)
        return None if store is None else replace(self, node=node, store=store)

    def rows(self, operand: Array) -> Array:
        """What each expert's map sees, ``[experts, tokens, inputs]``; a view where all see one."""
        experts = self.store.shape[0]
        if self.by_expert is not None:
            return _by_expert(operand, self.by_expert, self.reduced)
        last = np.moveaxis(operand, self.reduced, -1)
        tokens = last.reshape(-1, last.shape[-1])
        return np.broadcast_to(tokens, (experts, *tokens.shape))

    def results(self, result: Array) -> Array:
        """What each gives, ``[experts, tokens, outputs]``."""
        return _by_expert(result, self.experts_of, self.made)

    def places(self, value: ir.Value, axis: int, last: int) -> Places:
        """The place of each number of the operand or result, by where experts and features are."""
        shape = list(static_shape(value))
        features = shape[last]
        first = [axis, *(k for k in range(len(shape)) if k not in (axis, last)), last]
        sizes = [shape[k] for k in first]
        flat = np.arange(prod(sizes[:-1]), dtype=np.float32)
        whole = np.broadcast_to(flat[:, None], (len(flat), features)).reshape(sizes)
        return whole.transpose(np.argsort(first))


def _by_expert(array: Array, axis: int, last: int) -> Array:
    others = [k for k in range(array.ndim) if k not in (axis, last)]
    ordered = array.transpose(axis, *others, last)
    return ordered.reshape(array.shape[axis], -1, array.shape[last])


def dense_products(model: ir.Model, weights: frozenset[str]) -> dict[str, Dense]:
    """All of a model by the names of their nodes, in topological order.

    Args:
        model: canonical.
        weights: names of the values that no graph input reaches.
    """
    found: dict[str, Dense] = {}
    for node in model.graph:
        for port in (0, 1) if len(node.inputs) == 2 else ():
            kernel, operand = node.inputs[1 - port], node.inputs[port]
            if kernel is None or operand is None or operand.name in weights:
                continue
            if kernel.name not in weights:
                continue
            if len(static_shape(kernel)) != 3 or not is_float(kernel) or not node.outputs[0].name:
                continue
            product = _product(node, port, weights)
            store = None if product is None else stored(kernel, model)
            if product is not None and store is not None:
                found[node.name or ""] = Dense(node, port, store, *product)
    return found


def _product(
    node: ir.Node, port: int, weights: frozenset[str]
) -> tuple[int | None, int, int, int, bool] | None:
    """The fields of :class:`Dense` from ``by_expert`` on."""
    description = describe(OpNode(node, weights))
    if len(description.contracted) != 1 or not description.macs:
        return None
    (inputs,) = description.contracted
    kernel, operand, result = (factors_at(description, at) for at in (1 - port, port, ~0))
    operand += [""] * (len(static_shape(node.inputs[port] or ir.Value())) - len(operand))
    if len(kernel) != 3 or "" in kernel or inputs not in kernel[1:]:
        return None
    expert, outputs = kernel[0], kernel[2 if kernel[1] == inputs else 1]
    once = (operand.count(inputs), result.count(outputs), result.count(expert)) == (1, 1, 1)
    if not once or outputs in operand or inputs in result or operand.count(expert) > 1:
        return None
    # The same tokens in the same order; an axis of size 1 is none.
    shape = static_shape(node.inputs[port] or ir.Value())
    tokens = [
        name
        for name, size in zip(operand, shape, strict=True)
        if name not in (expert, inputs) and (name or size != 1)
    ]
    if tokens != [name for name in result if name not in (expert, outputs)] or "" in tokens:
        return None
    by_expert = operand.index(expert) if expert in operand else None
    axes = operand.index(inputs), result.index(expert), result.index(outputs)
    return by_expert, *axes, kernel[1] == inputs


def mixed_dense(model: ir.Model, dense: Dense) -> Mixed | None:
    """What becomes of a product's results; ``None`` where they are not multiplied with shares."""
    at = dense.places(dense.result, dense.experts_of, dense.made)
    return mixed_places(model, dense.result, at, at.size // at.shape[dense.made])


def shares_of(model: ir.Model, products: dict[str, Dense], dense: Dense) -> Mixed | None:
    """What all that follows from a product's results is multiplied with at their places.

    Behind functions of its numbers, and products with other stacks, too: where a share is 0, nobody
    sees what they are. ``None`` where something else sees them.

    Args:
        model: canonical.
        products: all of it.
        dense: the one that is asked for.
    """
    at = dense.places(dense.result, dense.experts_of, dense.made)
    places = at.size // at.shape[dense.made]
    found: Mixed | None = None
    pending, known = [(dense.result, at)], {dense.result}
    while pending:
        value, at = pending.pop()
        if value.is_graph_output() or not value.uses():
            return None
        for use in list(value.uses()):
            here = shared(use.node, use.idx, at, places)
            if here is not None:
                if found is not None and here.shares != found.shares:
                    return None
                found = here
                continue
            after = _followed(model, products, use.node, use.idx, at)
            if after is None:
                return None
            pending += [each for each in after if each[0] not in known]
            known.update(result for result, _ in after)
    return found


def _followed(
    model: ir.Model, products: dict[str, Dense], node: ir.Node, port: int, at: Places
) -> list[tuple[ir.Value, Places]] | None:
    """The results that anybody reads, with their places; ``None`` where places mix."""
    other = products.get(node.name or "")
    if other is not None:
        if other.by_expert is None or port != other.port:
            return None
        if not np.array_equal(at, other.places(other.operand, other.by_expert, other.reduced)):
            return None
        return [(other.result, other.places(other.result, other.experts_of, other.made))]
    results = [value for value in node.outputs if value.name]
    if facts_of(node).moves:
        found = None if port else moved(model, node, {0: at})
        return None if found is None else list(zip(results, found, strict=True))
    description = describe(OpNode(node))
    inside = factors_at(description, port)
    apart = description.opaque is None and not description.statistical | description.contracted
    same = all(factors_at(description, ~0)[k : k + 1] == [name] for k, name in enumerate(inside))
    if not apart or not same or len(results) != 1 or static_shape(results[0]) != at.shape:
        return None
    return [(results[0], at)]


@dataclass(frozen=True)
class Shown:
    """What there is of a dense product at the places of a batch.

    Attributes:
        dense: the product.
        shares: at its places, of the same network; ``None``: all count the same.
    """

    dense: Dense
    shares: ByPlace | None

    @property
    def asked(self) -> list[str]:
        """Names of what it maps, and of the shares."""
        shares = [] if self.shares is None else [self.shares.name]
        return [self.dense.operand.name or "", *shares]

    def seen(self, found: Arrays) -> tuple[Array, FloatArray]:
        """What experts see, ``[experts, tokens, inputs]``, and shares, ``[experts, tokens]``."""
        rows = self.dense.rows(found[self.asked[0]])
        places = rows.shape[:2]
        if self.shares is None:
            return rows, np.ones(places)
        return rows, self.shares.of(found[self.shares.name], prod(places)).reshape(places)

    def some(self, shares: FloatArray, chosen: IntArray | None = None) -> tuple[IntArray, IntArray]:
        """Experts and tokens of the places that have a share, or of some of them."""
        there = np.flatnonzero(shares)
        there = there if chosen is None else there[chosen]
        return there // shares.shape[1], there % shares.shape[1]
