"""Groups that die one after the other leave what they leave when they die together."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
import torch

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.analysis.deaths import Deaths, operand_names, result_names
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text
from morphgraph.testing.examples import image, residual_cnn

INCEPTION = """net (float[1,3,4,4] x, float[4,3,1,1] aw, float[5,3,3,3] bw, float[6,5,1,1] cw,
    float[7,10,1,1] dw, float[7,3,1,1] ew, float[2,7,1,1] fw) => (float[1,2,4,4] y) {
    a = Conv(x, aw)  b = Conv<pads=[1,1,1,1]>(x, bw)  rb = Relu(b)  c = Conv(rb, cw)
    j = Concat<axis=1>(a, c)  d = Conv(j, dw)  e = Conv(x, ew)  t = Add(d, e)  y = Conv(t, fw)
}"""
SPLIT = """net (float[1,3,4,4] x, float[8,3,1,1] aw, float[4,4,1,1] bw, float[4,4,1,1] cw,
    float[2,4,1,1] dw) => (float[1,2,4,4] y) {
    a = Conv(x, aw)  p, q = Split<axis=1, num_outputs=2>(a)  b = Conv(p, bw)  c = Conv(q, cw)
    t = Add(b, c)  y = Conv(t, dw)
}"""


def encoder() -> ChannelGraph:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    net = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    return lift(mg.export(net, (torch.randn(1, 4, 8),)), pin_outputs=False)


GRAPHS = {
    "inception": lift(model_from_text(INCEPTION)),
    "split": lift(model_from_text(SPLIT)),
    "residual": lift(mg.export(residual_cnn(), (image(),))),
    "encoder": encoder(),
}


def facts(state: Deaths) -> list[object]:
    sets = (state.empty, state.constant, state.live, state.bias_only, state.folded, state.vanished)
    return [
        *(set(each) for each in sets),
        state.dropped,
        set(state.passed),
        set(state.orphaned),
        state.undefined,
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_one_after_the_other_is_all_together(graph: ChannelGraph, seed: int) -> None:
    generator = np.random.default_rng(seed)
    mortal = [group.index for group in graph.groups if group.can_change]
    none = Deaths.none(graph)
    before, state, dead = facts(none), none, list[int]()
    for index in generator.permutation(mortal).tolist():
        dead.append(index)
        state = state.after([index])
        assert facts(state) == facts(none.after(dead))
        assert _still_there(graph, state) == state.live
    assert facts(none) == before  # states are not changed by those that come after them


def _still_there(graph: ChannelGraph, state: Deaths) -> set[int]:
    """Nodes from which a way leads to an output, by walking back from there."""
    pending: Sequence[str] = [value.name or "" for value in graph.model.graph.outputs]
    found: set[int] = set()
    while pending:
        wanted = {n for n in pending if n not in state.empty and n not in state.constant}
        makers = {k for k, op in enumerate(graph.ops) if wanted.intersection(result_names(op))}
        more = makers - found
        found |= more
        pending = [n for k in more for n in operand_names(graph.ops[k], state.dropped.get(k, ()))]
    return found


LEARNED_MAP = """net (float[1,3,8,8] x, float[4,3,1,1] a, float[1,2,8,8] w, float[5,6,1,1] b,
    float[5,3,1,1] d) => (float[1,5,8,8] y) {{
    h = Conv(x, a)  c = Concat<axis=1>(h, w)  r = Conv(c, b)  {end}
}}"""


def learned_map(end: str) -> tuple[ChannelGraph, int]:
    """A learned map joined with a convolution's result, and the group of the latter."""
    graph = lift(model_from_text(LEARNED_MAP.format(end=end)))
    (branch,) = [group.index for group in graph.groups if group.name == "Conv_h"]
    return graph, branch


def test_what_weights_alone_are_left_of_does_not_depend_on_an_input() -> None:
    graph, branch = learned_map("y = Relu(r)")
    assert liveness(graph, [branch]).refusal == "output 'y' would no longer depend on any input"


def test_what_weights_alone_are_left_of_becomes_a_constant() -> None:
    """The oracle is ONNX Runtime with the kernels of the branch at zero."""
    graph, branch = learned_map("z = Conv(x, d)  y = Add(r, z)")
    x = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    small = resize(graph, {branch: np.array([], dtype=np.int64)})
    assert [node.op_type for node in small.graph].count("Conv") == 1
    kernel = graph.model.graph.initializers["a"]
    kernel.const_value = ir.tensor(np.zeros((4, 3, 1, 1), np.float32), name="a")
    (wanted,), (found,) = run(graph.model, x).values(), run(small, x).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
