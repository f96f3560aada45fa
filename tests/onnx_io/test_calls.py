"""Local functions that grow: a few lines may stand for more nodes than any memory holds."""

import onnx
import pytest
from onnx import helper

from morphgraph.errors import ModelError
from morphgraph.onnx_io import calls


def doubling(levels: int) -> onnx.ModelProto:
    """``2 ** levels`` nodes, each function calling the next one twice."""
    functions = []
    for level in range(levels):
        callee, domain = (f"F{level + 1}", "own") if level + 1 < levels else ("Relu", "")
        nodes = [
            helper.make_node(callee, ["x"], ["h"], domain=domain),
            helper.make_node(callee, ["h"], ["y"], domain=domain),
        ]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        functions.append(helper.make_function("own", f"F{level}", ["x"], ["y"], nodes, opsets))
    ends = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    main = [helper.make_node("F0", ["x"], ["y"], domain="own")]
    graph = helper.make_graph(main, "g", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=opsets, functions=functions)


@pytest.mark.parametrize("levels", [1, 4, 6])
def test_functions_may_grow_to_the_bound_and_no_further(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = doubling(levels)
    monkeypatch.setattr(calls, "MAX_INLINED_NODES", 2**levels)
    calls.check_functions(proto)
    monkeypatch.setattr(calls, "MAX_INLINED_NODES", 2**levels - 1)
    with pytest.raises(ModelError, match=f"more than {2**levels - 1} nodes"):
        calls.check_functions(proto)


def test_the_bound_is_less_than_any_memory_holds() -> None:
    assert 10_000 < calls.MAX_INLINED_NODES <= 10**7
