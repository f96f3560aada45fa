"""Pass ``shares``: how much each place counts of a product whose results are mixed afterwards.

A token's experts count by the router's shares: what one of them gives is multiplied with a number
of its place before all are added, or as they are. Where a share is small, an error is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.onnx_io import static_shape
from morphgraph.ops import OpNode, describe, facts_of
from morphgraph.ops.description import Description, factors_at
from morphgraph.passes.calibration.arrivals import moved
from morphgraph.passes.calibration.chosen import Chosen


@dataclass(frozen=True)
class ByPlace:
    """A value with something for each place.

    Attributes:
        value: the value.
        axis: that is the first of the places' axes, elsewhere; ``None``: places are in order.
    """

    value: ir.Value
    axis: int | None

    @property
    def name(self) -> str:
        """Of the value."""
        return self.value.name or ""

    def of(self, array: Array, places: int) -> Array:
        """What it holds for each place, ``[places, numbers]``."""
        moved = array if self.axis is None else np.moveaxis(array, self.axis, 0)
        return moved.reshape(places, -1)


@dataclass(frozen=True)
class Mixed:
    """What is added up of the results of a product.

    Attributes:
        shares: a number for each place.
        given: what is multiplied with these: the results, and what is added behind them.
    """

    shares: ByPlace
    given: ByPlace


Places: TypeAlias = Array
"""For every number of a value the place that it belongs to."""


def mixed(model: ir.Model, chosen: Chosen) -> Mixed | None:
    """What becomes of a product's results; ``None`` where they are not multiplied with shares.

    Args:
        model: canonical.
        chosen: the product.
    """
    shape = static_shape(chosen.result)
    places = prod(shape[: chosen.leading])
    by_place = np.arange(places, dtype=np.float32).reshape(-1, *[1] * (len(shape) - chosen.leading))
    at = np.broadcast_to(by_place.reshape(*shape[: chosen.leading], *by_place.shape[1:]), shape)
    return mixed_places(model, chosen.result, at, places)


def mixed_places(model: ir.Model, value: ir.Value, at: Places, places: int) -> Mixed | None:
    """The same of any value.

    It is followed to the first product with one number for each place, through what moves it and
    biases that are added.

    Args:
        model: canonical.
        value: results.
        at: the place of each of its numbers.
        places: how many there are.
    """
    if places < 2:  # any number would be one for each
        return None
    while len(value.uses()) == 1 and not value.is_graph_output():
        (use,) = value.uses()
        found = shared(use.node, use.idx, at, places)
        if found is not None:
            return found
        after = _passed(model, use.node, use.idx, at)
        if after is None:
            return None
        value, at = use.node.outputs[0], after
    return None


def _passed(model: ir.Model, node: ir.Node, port: int, at: Places) -> Places | None:
    """The place of every number of a node's result; ``None`` where places mix, or errors change."""
    facts = facts_of(node)
    if facts.adds or ((facts.inert or facts.converts) and port == 0):
        return at if static_shape(node.outputs[0]) == at.shape else None
    if not facts.moves or port or any(value.name for value in node.outputs[1:]):
        return None
    found = moved(model, node, {0: at})
    return None if found is None else found[0]


def shared(node: ir.Node, port: int, at: Places, places: int) -> Mixed | None:
    """A product of one operand with one number for each place; ``None``: the node is none.

    Args:
        node: the node.
        port: that of the operand, one of two.
        at: the place of each of its numbers.
        places: how many there are.
    """
    if len(node.inputs) != 2 or None in node.inputs:
        return None
    operand, other = node.inputs[port], node.inputs[1 - port]
    assert operand is not None
    assert other is not None
    if prod(static_shape(other)) != places or other is operand:
        return None
    description = describe(OpNode(node))
    if not facts_of(node).multiplies and not description.macs:
        return None
    of_other = _places_of(description, (port, 1 - port), at, static_shape(other))
    if of_other is None:
        return None
    axes = _first_axis(of_other, places), _first_axis(at, places)
    if axes[0] is False or axes[1] is False:
        return None
    return Mixed(ByPlace(other, axes[0]), ByPlace(operand, axes[1]))


def _places_of(
    description: Description, ports: tuple[int, int], at: Places, shape: Sequence[int]
) -> Places | None:
    """The place of each number of the other operand; ``None`` where it meets several places."""
    mine, others = (factors_at(description, port) for port in ports)
    mine += [""] * (at.ndim - len(mine))
    others += [""] * (len(shape) - len(others))
    left = at
    for axis, name in enumerate(mine):
        if name and name in others and shape[others.index(name)] == at.shape[axis]:
            continue
        least = left.min(axis=axis, keepdims=True)
        if not np.array_equal(least, left.max(axis=axis, keepdims=True)):
            return None
        left = least
    order = [mine.index(name) for name in others if name in mine]
    rest = [axis for axis in range(at.ndim) if axis not in order]
    turned = left.transpose(order + rest)
    return turned.reshape(shape) if turned.size == prod(shape) else None


def _first_axis(at: Places, places: int) -> "int | bool | None":
    """The axis that stands before the others where places are in order; ``False``: there is none.

    ``None`` where they are as they stand.
    """
    in_order = np.arange(places, dtype=at.dtype)[:, None]
    axes: list[int | None] = [None, *range(1, at.ndim)]
    for axis in axes:
        turned = at if axis is None else np.moveaxis(at, axis, 0)
        if (turned.reshape(places, -1) == in_order).all():
            return axis
    return False
