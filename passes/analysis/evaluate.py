"""Running a part of a model: constants that a rewrite needs are computed, not derived again."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.edit import part_of


def ancestors(wanted: Iterable[str], maker: Callable[[str], ir.Node | None]) -> list[str]:
    """Names of what is needed to compute values, themselves included."""
    found: dict[str, None] = {}
    pending = list(wanted)
    while pending:
        name = pending.pop()
        node = maker(name)
        if name not in found and node is not None:
            found[name] = None
            pending += [value.name or "" for value in node.inputs if value is not None]
    return list(found)


def evaluate(
    wanted: Sequence[str],
    makers: Mapping[str | None, ir.Node],
    given: Mapping[str, Array],
    model: ir.Model,
) -> dict[str, Array]:
    """Compute values of a model in ONNX Runtime from given ones and from initializers.

    Raises:
        UnsupportedError: ONNX Runtime does not run one of the operators.
    """
    from morphgraph.onnx_io.runtime import run

    if not wanted:
        return {}
    needed = ancestors(wanted, lambda name: None if name in given else makers.get(name))
    nodes = [node for node in model.graph if any(v.name in needed for v in node.outputs)]
    return run(part_of(model, nodes, given, wanted), {})
