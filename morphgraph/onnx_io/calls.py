"""Which local functions call which: a small file may stand for more nodes than any memory holds."""

from collections import Counter
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

import onnx

from morphgraph.errors import ModelError
from morphgraph.onnx_io.check import escape

MAX_INLINED_NODES = 1_000_000

Identifier = tuple[str, str, str]
"""Domain, name and overload of an operator or function."""


def check_functions(proto: onnx.ModelProto) -> None:
    """Check a message's local functions before anybody puts their nodes in place of the calls.

    Raises:
        ModelError: one calls itself, or they grow beyond all bounds.
    """
    if proto.functions:
        check_calls(
            {(f.domain, f.name, f.overload): _called(f.node) for f in proto.functions},
            _called(proto.graph.node),
        )


def check_calls(
    calls: Mapping[Identifier, Mapping[Identifier, int]], main: Mapping[Identifier, int]
) -> None:
    """Refuse functions that call themselves, or grow beyond all bounds once inlined.

    Args:
        calls: by function, how often it calls which operators.
        main: the same of the main graph.

    Raises:
        ModelError: names the function.
    """
    sizes: dict[Identifier, int] = {}
    try:
        for identifier in TopologicalSorter(calls).static_order():  # callees first
            if identifier in calls:
                sizes[identifier] = _inlined(calls[identifier], sizes)
    except CycleError as error:
        raise ModelError(
            f"function '{escape(error.args[1][0][1])}': calls itself; ONNX does not allow recursion"
        ) from error
    if _inlined(main, sizes) > MAX_INLINED_NODES:
        raise ModelError(
            f"local functions expand to more than {MAX_INLINED_NODES} nodes; export without them"
        )


def _inlined(calls: Mapping[Identifier, int], sizes: Mapping[Identifier, int]) -> int:
    return sum(count * sizes.get(callee, 1) for callee, count in calls.items())


def _called(nodes: Iterable[onnx.NodeProto]) -> Counter[Identifier]:
    """How often nodes, and those in their subgraphs, call which operators."""
    found: Counter[Identifier] = Counter()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        found[node.domain, node.op_type, node.overload] += 1
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting += graph.node
    return found
