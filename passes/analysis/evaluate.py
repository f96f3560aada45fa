"""Running a part of a model: constants that a rewrite needs are computed, not derived again."""

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.edit import part_of


def nodes_by_result(model: ir.Model) -> dict[str, ir.Node]:
    """By value the node that makes it."""
    return {value.name: node for node in model.graph for value in node.outputs if value.name}


def needed_for(
    wanted: Iterable[str], makers: Mapping[str, ir.Node], given: Iterable[str] = ()
) -> set[str]:
    """Names of the results that are needed to compute values, themselves included.

    Args:
        wanted: names of values.
        makers: by value the node that makes it.
        given: names of values that need not be computed.
    """
    known, needed = set(given), set[str]()
    pending = list(wanted)
    while pending:
        name = pending.pop()
        node = makers.get(name)
        if node is not None and name not in needed and name not in known:
            needed.add(name)
            pending += [value.name or "" for value in node.inputs if value is not None]
    return needed


def evaluate(wanted: Sequence[str], given: Mapping[str, Array], model: ir.Model) -> Arrays:
    """Compute values of a model in ONNX Runtime from given ones and from initializers.

    Raises:
        UnsupportedError: ONNX Runtime does not run one of the operators.
    """
    from morphgraph.onnx_io.runtime import run

    if not wanted:
        return {}
    return run(part_of(model, given, wanted), {})
