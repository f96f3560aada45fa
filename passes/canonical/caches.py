"""Caches: inputs that hold keys and values of earlier positions, outputs that hold more of them.

What a run gives as a cache the next run takes, so both change together, and nobody else reads them:
their heads and head sizes are no interface but channels.
"""

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from morphgraph.onnx_io import DYNAMIC_AXES_KEY, static_shape
from morphgraph.ops import facts_of
from morphgraph.passes.canonical.join_files import free_outputs


def caches(model: ir.Model) -> Mapping[str, str]:
    """By the input of a canonical model that is a cache the output that continues it."""
    return {
        past.name or "": present.name or ""
        for past, present in continued(model)
        if _axes(past, present)
    }


def of_same_lengths(past: ir.Value, other: ir.Value) -> bool:
    """Whether what follows the inputs is as long in two caches, whatever is run."""
    if past.shape is None or other.shape is None or len(past.shape) != len(other.shape):
        return False
    return all(
        isinstance(before, int) == isinstance(after, int)
        and (isinstance(before, int) or before == after)
        for before, after in zip(past.shape, other.shape, strict=True)
    )


def continued(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Inputs that are caches by what is done with them, each with the output that continues it."""
    for node in _readers_of_inputs(model):
        for port, k in _extended(node):
            past, present = _input(node.inputs[port]), _output(node.outputs[k])
            if past is None or present is None or past.dtype not in (present.dtype, None):
                continue
            if present.uses() or not facts_of(node).joins:  # who joins only to return is none
                yield past, present


def capacities(model: ir.Model) -> Mapping[str, int]:
    """By the input that is a cache of the latest positions alone how many it has room for."""
    return {
        value.name or "": number
        for node in _readers_of_inputs(model)
        if (entry := facts_of(node)).capacity is not None
        for port, number in entry.call(entry.capacity, node).items()
        if port < len(node.inputs) and (value := _input(node.inputs[port])) is not None
    }


def following_axes(model: ir.Model) -> Mapping[str, frozenset[int]]:
    """By name of an input or output the axes that hold channels, and are no interface.

    Those of caches, and all axes of what only other files of the same network take.
    """
    values = {v.name or "": v for v in (*model.graph.inputs, *model.graph.outputs)}
    found = {
        name: frozenset(range(len(values[name].shape or ())))
        for name in free_outputs(model)
        if name in values
    }
    for past, present in caches(model).items():
        axes = _axes(values[past], values[present])
        found |= {past: axes, present: axes}
    return found


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a value, by another name too; a file may name an input anew."""
    for use in value.uses():
        if _renames(use.node):
            yield from _readers(use.node.outputs[0])
        else:
            yield use.node


def _renames(node: ir.Node) -> bool:
    return node.op_type == "Identity" and not node.domain


def _readers_of_inputs(model: ir.Model) -> list[ir.Node]:
    """The nodes that read inputs, in the model's order."""
    readers = {node for value in model.graph.inputs for node in _readers(value)}
    return [node for node in model.graph if node in readers]


def _extended(node: ir.Node) -> Iterator[tuple[int, int]]:
    """Operands of which a result is a longer one, with that result."""
    facts = facts_of(node)
    pairs = dict.fromkeys(range(len(node.inputs)), 0) if facts.joins else facts.extends
    for port, k in pairs.items():
        if port < len(node.inputs) and k < len(node.outputs):
            yield port, k


def _input(value: ir.Value | None) -> ir.Value | None:
    """The input that a value is, if nobody else reads more than its size."""
    while value is not None and (maker := value.producer()) is not None and _renames(maker):
        value = maker.inputs[0]
    if value is None or not value.is_graph_input():
        return None
    readers = [node for node in _readers(value) if not facts_of(node).reads_sizes]
    return value if len(readers) == 1 else None


def _output(value: ir.Value) -> ir.Value | None:
    return value if value.is_graph_output() else None


def _axes(past: ir.Value, present: ir.Value) -> frozenset[int]:
    """The axes behind the batch that are as long in both, whatever is run."""
    before, after = static_shape(past), static_shape(present)
    moving = past.meta.get(DYNAMIC_AXES_KEY, frozenset())
    if len(before) != len(after):
        return frozenset()
    return frozenset(
        axis for axis in range(1, len(before)) if before[axis] == after[axis] and axis not in moving
    )
