"""Local functions are inlined, and nodes stand behind what they read."""

from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.errors import ModelError
from morphgraph.onnx_io import escape, subgraphs
from morphgraph.onnx_io.calls import check_calls


def inline_functions(model: ir.Model) -> None:
    """Put the nodes of local functions where these are called, in place.

    Raises:
        ModelError: functions call themselves, grow beyond all bounds, or cannot be inlined.
    """
    if not model.functions:
        return
    check_calls(
        {
            identifier: Counter(node.op_identifier() for node in function.all_nodes())
            for identifier, function in model.functions.items()
        },
        Counter(node.op_identifier() for node in model.graph.all_nodes()),
    )
    try:
        common.InlinePass()(model)
    except ValueError as error:
        raise ModelError(f"local functions cannot be inlined: {escape(str(error))}") from error


def sort_nodes(graph: ir.Graph) -> None:
    """Put nodes behind those whose results they read, in place.

    Raises:
        ModelError: there is a cycle.
    """
    if _is_sorted(graph):
        return
    try:
        graph.sort()
    except ValueError as error:
        raise ModelError("the graph has a cycle; export the model again") from error


def _is_sorted(graph: ir.Graph) -> bool:
    """Whether nodes stand behind those whose results they read, as far as a quick look tells."""
    seen: set[ir.Node | None] = {None}
    for node in graph:
        makers = (value.producer() for value in node.inputs if value is not None)
        if not seen.issuperset(makers) or subgraphs(node):
            return False
        seen.add(node)
    return True
