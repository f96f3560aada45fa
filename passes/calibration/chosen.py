"""Pass ``chosen``: products with kernels that the network chooses from a stack for every place.

The experts of a mixture: a stack of kernels ``[experts, ...]``, of which a gather takes one for
each place, by numbers that a router gives, and a product that multiplies each place with its own.
For the places of one expert the product is a linear map like any other.
"""

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, IntArray
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import dtype_of, is_float, static_shape
from morphgraph.ops import OpNode, describe, facts_of
from morphgraph.ops.description import Place, factors_at
from morphgraph.passes.analysis.evaluate import evaluate
from morphgraph.passes.calibration.kernels import Stacked, Store, stored


@dataclass(frozen=True)
class Chosen(Stacked):
    """A product with chosen kernels.

    Attributes:
        node: the product.
        gather: what takes the kernels.
        numbers: which one each place gets.
        operand: what is mapped, ``[places..., ...]``.
        store: where the stack is stored.
        reduced: the axis of the operand that is summed over.
        made: the axis of the result that holds the outputs.
        turned: the stack holds ``[experts, inputs, outputs]``.
    """

    node: ir.Node
    gather: ir.Node
    numbers: ir.Value
    operand: ir.Value
    store: Store
    reduced: int
    made: int
    turned: bool

    @property
    def name(self) -> str:
        """Of the product."""
        return self.node.name or ""

    @property
    def stack(self) -> str:
        """The stack's name, as it is gathered from."""
        value = self.gather.inputs[0]
        return "" if value is None else value.name or ""

    @property
    def result(self) -> ir.Value:
        """What it gives."""
        return self.node.outputs[0]

    @property
    def port(self) -> int:
        """That of the operand, which is no kernel."""
        return self.node.inputs.index(self.operand)

    @property
    def taker(self) -> tuple[str, int]:
        """Who reads the stack: a node's name, and which of its operands that is."""
        return self.gather.name or "", 0

    @property
    def leading(self) -> int:
        """How many of the first axes tell places apart."""
        return len(static_shape(self.gather.outputs[0])) - 2

    def within(self, node: ir.Node, model: ir.Model) -> "Chosen | None":
        """The same in a copy of the model, or of a part of it, whose node takes the kernels."""
        stack = node.inputs[0]
        store = None if stack is None else stored(stack, model)
        return None if store is None else replace(self, store=store)

    def choice(self, numbers: Array) -> IntArray:
        """The expert of every place, ``[places]``."""
        return numbers.reshape(-1) % self.store.shape[0]

    def rows(self, operand: Array) -> Array:
        """What each place's map sees, ``[places, rows, inputs]``."""
        return _by_place(operand, self.reduced, self.leading)

    def results(self, result: Array) -> Array:
        """What it gives, ``[places, rows, outputs]``."""
        return _by_place(result, self.made, self.leading)


def _by_place(array: Array, axis: int, leading: int) -> Array:
    last = np.moveaxis(array, axis, -1)
    places = int(np.prod(last.shape[:leading]))
    return last.reshape(places, -1, last.shape[-1])


def chosen_products(model: ir.Model, weights: frozenset[str]) -> dict[str, Chosen]:
    """All of a model by the names of their nodes, in topological order.

    Args:
        model: canonical.
        weights: names of the values that no graph input reaches.
    """
    found: dict[str, Chosen] = {}
    for node in model.graph:
        if len(node.inputs) != 2 or None in node.inputs or not node.outputs[0].name:
            continue
        for port in (0, 1):
            taken = _taken(cast("ir.Value", node.inputs[port]), model, weights)
            product = None if taken is None else _product(node, port, weights)
            if taken is not None and product is not None:
                gather, numbers, store, swapped = taken
                reduced, made, turned = product
                operand = cast("ir.Value", node.inputs[1 - port])
                each = Chosen(
                    node, gather, numbers, operand, store, reduced, made, turned != swapped
                )
                found[each.name] = each
    return found


def _taken(
    kernel: ir.Value, model: ir.Model, weights: frozenset[str]
) -> tuple[ir.Node, ir.Value, Store, bool] | None:
    """What takes kernels from a stack, by which numbers, the stack, and whether they are turned."""
    rank = len(kernel.shape or ())
    plain, turned = tuple(range(rank)), (*range(rank - 2), rank - 1, rank - 2)
    swapped, value = False, kernel
    while rank > 2 and is_float(value) and len(value.uses()) == 1 and not value.is_graph_output():
        maker = value.producer()
        if maker is None or maker.inputs[0] is None:
            return None
        facts = facts_of(maker)
        if facts.permutation is not None:
            order: tuple[int, ...] = facts.call(facts.permutation, maker, OpNode(maker))
            if order not in (plain, turned):
                return None
            swapped, value = swapped != (order == turned), maker.inputs[0]
            continue
        port = _first_axis_indexed(maker, weights) if facts.moves else None
        numbers = None if port is None else maker.inputs[port]
        stack = maker.inputs[0]
        if numbers is None or len(static_shape(stack)) != 3:
            return None
        if np.prod(static_shape(numbers)) != np.prod(static_shape(value)[:-2]):
            return None  # an index of its own for every element
        store = stored(stack, model)
        return None if store is None else (maker, numbers, store, swapped)
    return None


def _first_axis_indexed(node: ir.Node, weights: frozenset[str]) -> int | None:
    """The operand whose numbers point at positions of the first axis of the first operand."""
    description = describe(OpNode(node, weights))
    for name, port in description.indexed.items():
        if Place(0, 0) in description.factors[name].places:
            return port
    return None


def _product(node: ir.Node, port: int, weights: frozenset[str]) -> tuple[int, int, bool] | None:
    """Of a product of matrices for each place the axis that is summed over, and the one made.

    And whether the kernel, at this port, is ``[inputs, outputs]``.
    """
    description = describe(OpNode(node, weights))
    if len(description.contracted) != 1 or not description.macs:
        return None
    (inputs,) = description.contracted
    axes = {place: factors_at(description, place) for place in (port, 1 - port, ~0)}
    kernel, operand, result = axes[port], axes[1 - port], axes[~0]
    leading = len(kernel) - 2
    if leading < 1 or kernel[:leading] != operand[:leading] or kernel[:leading] != result[:leading]:
        return None
    last = kernel[leading:]
    outputs = next((name for name in last if name != inputs), "")
    if inputs not in last or operand.count(inputs) != 1 or outputs in operand:
        return None
    if "" in (*kernel, outputs) or result.count(outputs) != 1 or inputs in result:
        return None
    return operand.index(inputs), result.index(outputs), last[0] == inputs


def places_of_choices(choice: IntArray, other: IntArray, kept: IntArray, row: int) -> IntArray:
    """For each place of a resized network the one at which the original chose the same; -1: none.

    Args:
        choice: of the original, by its numbers, ``[places]``.
        other: of the resized network, by its own.
        kept: the experts that stay, by the original's numbers.
        row: how many places beside each other may have been chosen in another order.

    >>> places_of_choices(np.array([0, 2, 1, 2]), np.array([1, 0, 1, 0]), np.array([0, 2]), 2)
    array([ 1,  0,  3, -1])
    """
    one, two = choice.reshape(-1, row), kept[other].reshape(-1, row)
    same = two[:, :, None] == one[:, None, :]  # [tokens, of the resized, of the original]
    places = same.argmax(axis=2) + np.arange(len(one))[:, None] * row
    return np.where(same.any(axis=2), places, -1).reshape(-1)


def choices_in_a_row(graph: ChannelGraph, numbers: ir.Value) -> int:
    """How many places beside each other are choices of one token; 1 where that is not known.

    It is tried where the numbers of a ranking have come to: those of its tokens stand for them.
    """
    tokens: Arrays = {}
    for value, axis in _rankings(graph, numbers).items():
        shape = static_shape(value)
        others = [1 if k == axis else size for k, size in enumerate(shape)]
        each = np.arange(np.prod(others, dtype=int)).reshape(others)
        tokens[value.name or ""] = np.broadcast_to(each, shape).astype(dtype_of(value))
    if not tokens:
        return 1
    try:
        (image,) = evaluate([numbers.name or ""], tokens, graph.model).values()
    except UnsupportedError:
        return 1
    found = image.reshape(-1)
    count = len(found) // len(np.unique(found))
    in_order = np.arange(len(found)) // max(count, 1)
    return count if np.array_equal(found, in_order) else 1


def _rankings(graph: ChannelGraph, numbers: ir.Value) -> dict[ir.Value, int]:
    """The results of rankings from which numbers have come, and the axis of a token's choices.

    None where something else comes into them at run time.
    """
    couplings = graph.couplings
    ranked = {
        op.ir.outputs[result]: (op_index, factor)
        for op_index, results in couplings.numbered.items()
        for result, factor in results.items()
        for op in (couplings.ops[op_index],)
    }
    found: dict[ir.Value, int] = {}
    pending, seen = [numbers], {numbers}
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in ranked:
            op_index, factor = ranked[value]
            dims = [e.dim for e in graph.edges_of(op_index) if e.factor == factor]
            axes = {couplings.dims[dim].axis for dim in dims}
            if len(axes) != 1 or len(graph.shapes[couplings.dims[dims[0]].value]) != len(
                static_shape(value)
            ):
                return {}
            found[value] = axes.pop()
        elif node is None and not value.is_initializer():
            return {}
        elif node is not None:
            fresh = {v for v in node.inputs if v is not None} - seen
            seen |= fresh
            pending += fresh
    return found
