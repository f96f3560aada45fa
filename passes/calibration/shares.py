"""Pass ``shares``: how much each place counts of a product whose results are mixed afterwards.

A token's experts count by the router's shares: what one of them gives is multiplied with a number
of its place before all are added. Where a share is small, an error is.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.onnx_io import static_shape
from morphgraph.ops import facts_of
from morphgraph.passes.calibration.arrivals import moved
from morphgraph.passes.calibration.chosen import Chosen


@dataclass(frozen=True)
class Mixed:
    """What is added up of the results of a product.

    Attributes:
        shares: a number for each place, in order.
        parts: the results times these, all of a place beside each other, places in order.
    """

    shares: ir.Value
    parts: ir.Value


def mixed(model: ir.Model, chosen: Chosen) -> Mixed | None:
    """What becomes of a product's results; ``None`` where they are not multiplied with shares.

    They are followed to the first product, through what moves them and biases that are added.

    Args:
        model: canonical.
        chosen: the product.
    """
    value = chosen.result
    shape = static_shape(value)
    places = prod(shape[: chosen.leading])
    if places < 2:  # any number would be one for each
        return None
    by_place = np.arange(places, dtype=np.float32).reshape(-1, *[1] * (len(shape) - chosen.leading))
    at = np.broadcast_to(by_place.reshape(*shape[: chosen.leading], *by_place.shape[1:]), shape)
    while len(value.uses()) == 1 and not value.is_graph_output():
        (use,) = value.uses()
        if facts_of(use.node).multiplies:
            return _shared(use.node, use.idx, at, places)
        after = _passed(model, use.node, use.idx, at)
        if after is None:
            return None
        value, at = use.node.outputs[0], after
    return None


def _passed(model: ir.Model, node: ir.Node, port: int, at: Array) -> Array | None:
    """The place of every number of a node's result; ``None`` where places mix, or errors change."""
    facts = facts_of(node)
    if facts.adds or ((facts.inert or facts.converts) and port == 0):
        return at if static_shape(node.outputs[0]) == at.shape else None
    if not facts.moves or port or any(value.name for value in node.outputs[1:]):
        return None
    found = moved(model, node, {0: at})
    return None if found is None else found[0]


def _shared(node: ir.Node, port: int, at: Array, places: int) -> Mixed | None:
    """What a product with one other number for each place makes of results at known places."""
    other, result = node.inputs[1 - port], node.outputs[0]
    if other is None or static_shape(result) != at.shape or prod(static_shape(other)) != places:
        return None
    in_order = np.arange(places, dtype=at.dtype)
    given = np.broadcast_to(in_order.reshape(static_shape(other)), at.shape)
    apart = at.reshape(places, -1) == in_order[:, None]
    return Mixed(other, result) if apart.all() and np.array_equal(given, at) else None
