"""Which channels live together, what groups are called, and why some keep their size."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.graph import ChannelGraph, Group
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text, prove

OPSET = '<ir_version: 10, opset_import: ["": 20, "com.acme": 1, "com.microsoft": 1]>'


def of_text(text: str, **options: Any) -> ChannelGraph:
    return lift(model_from_text(OPSET + text), **options)


def free(graph: ChannelGraph) -> list[Group]:
    return [group for group in graph.groups if group.resizable]


def test_attention_shrinks_by_heads(attention_model: ir.Model) -> None:
    graph = lift(attention_model)
    (heads,) = free(graph)
    assert heads.width == 3
    assert heads.producers == ("MatMul_q", "MatMul_k", "MatMul_v")
    per_channel = {(m.value, m.axis): m.per_channel for m in heads.members}
    assert {name: per_channel[name, 1] for name in ("wq", "wk", "wv")} == dict.fromkeys(
        ("wq", "wk", "wv"), 4
    )
    assert per_channel["wo", 0] == 4
    prove(graph)


def test_attention_shrinks_by_head_size_where_asked(attention_model: ir.Model) -> None:
    graph = lift(attention_model, attention="head-dim")
    assert [(g.width, g.producers) for g in free(graph)] == [
        (4, ("MatMul_q", "MatMul_k")),
        (4, ("MatMul_v",)),
    ]
    assert all(m.per_channel in (1, 3) for g in free(graph) for m in g.members)
    prove(graph)


@pytest.mark.parametrize(("groups", "width", "statistical"), [(2, 2, False), (1, 8, True)])
def test_group_norm_loses_whole_groups_where_it_has_some(
    groups: int, width: int, statistical: bool
) -> None:
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8] s, float[8] h, float[2,8,1,1] w2)
    => (float[1,2,4,4] y) {{
        a = Conv(x, w1)  n = GroupNormalization<num_groups={groups}>(a, s, h)  y = Conv(n, w2)
    }}"""
    graph = lift(model_from_text(text))
    (group,) = free(graph)
    assert (group.width, group.statistical) == (width, statistical)
    prove(graph)


STANDARDIZED = {
    "mean and deviation": """m = ReduceMean(w2, over)  c = Sub(w2, m)  q = Mul(c, c)
        v = ReduceMean(q, over)  d = Sqrt(v)  k = Div(c, d)""",
    "mean alone": "m = ReduceMean(w2, over)  k = Sub(w2, m)",
    "a norm": "f = Flatten(w2)  u = LpNormalization<axis=1>(f)  sh = Shape(w2)  k = Reshape(u, sh)",
}


@pytest.mark.parametrize("how", STANDARDIZED)
@pytest.mark.parametrize(("groups", "widths"), [(4, [4]), (2, [2]), (8, [8])])
def test_group_norm_loses_whole_groups_before_standardized_kernels(
    how: str, groups: int, widths: list[int]
) -> None:
    """Those normalize over all of their input channels, whichever factor of them goes."""
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8] s, float[8] h, float[2,8,1,1] w2)
    => (float[1,2,4,4] y) <int64[3] over = {{1, 2, 3}}> {{
        a = Conv(x, w1)  n = GroupNormalization<num_groups={groups}>(a, s, h)  r = Relu(n)
        {STANDARDIZED[how]}  y = Conv(r, k)
    }}"""
    graph = lift(model_from_text(text))
    assert [group.width for group in free(graph)] == widths
    prove(graph)


def test_group_norm_of_single_channels_loses_whole_groups() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8] s, float[8] h, float[2,8,1,1] w2)
    => (float[1,2,4,4] y) {
        a = Conv(x, w1)  n = GroupNormalization<num_groups=8>(a, s, h)  y = Conv(n, w2)
    }"""
    graph = lift(model_from_text(text))
    assert [group.width for group in free(graph)] == [8]
    prove(graph)


OPAQUE = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[5,6,1,1] w2,
    float[7,5,1,1] w4, float[2,7,1,1] w5) => (float[1,2,4,4] y)
    <float[1,5,4,4] c> {
    a = Conv(x, w1)  ra = Relu(a)  b = Conv(ra, w2)  c = com.microsoft.Trilu(b)  d = Conv(c, w4)
    rd = Relu(d)  y = Conv(rd, w5)
}"""


def test_an_unknown_operator_pins_what_it_touches_and_nothing_else() -> None:
    reason = "no notation for operator com.microsoft::Trilu"
    graph = of_text(OPAQUE)
    assert [group.width for group in free(graph)] == [6, 7]
    pinned = {group.producers: group.reason for group in graph.groups if not group.resizable}
    assert pinned["Conv_b",] == reason
    assert [node.opaque for node in graph.ops if node.opaque] == [reason]
    prove(graph)


def test_a_custom_operator_is_a_barrier() -> None:
    graph = of_text(
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[5,6,1,1] w2, float[2,5,1,1] w3)
        => (float[1,2,4,4] y) <float[1,5,4,4] c> {
            a = Conv(x, w1)  ra = Relu(a)  b = Conv(ra, w2)  c = com.acme.Foo(b)  y = Conv(c, w3)
        }"""
    )
    assert [group.width for group in free(graph)] == [6]
    (reason,) = {group.reason for group in graph.groups if group.producers == ("Conv_b",)}
    assert reason == "no notation for operator com.acme::Foo"


def test_what_a_subgraph_captures_keeps_its_size() -> None:
    graph = of_text(
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[5,3,1,1] w2, float[2,6,1,1] w3,
             float[2,5,1,1] w4) => (float[1,2,4,4] y) <float zero = {0}> {
            a = Conv(x, w1)  b = Conv(x, w2)  total = ReduceMean<keepdims=0>(x)
            which = Greater(total, zero)
            c = If (which) <
                then_branch = yes () => (float[1,6,4,4] t) { t = Relu(a) },
                else_branch = no () => (float[1,6,4,4] e) { e = Sigmoid(a) }
            >
            d = Conv(c, w3)  rb = Relu(b)  f = Conv(rb, w4)  y = Add(d, f)
        }"""
    )
    assert [group.width for group in free(graph)] == [5]
    reasons = {group.producers: group.reason for group in graph.groups}
    assert reasons["Conv_a",] == "read inside If 'If_c'"
    prove(graph)


def test_omitted_results_are_no_trouble() -> None:
    graph = of_text(
        """net (float[4,1,3] x, float[1,20,3] w, float[1,20,5] r, float[6,5] v, float[2,6] u)
        => (float[1,2] y) <int64[1] axis = {0}> {
            , h = LSTM<hidden_size=5>(x, w, r)  s = Squeeze(h, axis)  a = Gemm<transB=1>(s, v)
            ra = Relu(a)  y = Gemm<transB=1>(ra, u)
        }"""
    )
    assert [group.width for group in free(graph)] == [5, 6]
    prove(graph)


def test_channels_of_a_group_touch_the_same_axes_equally_often() -> None:
    graph = of_text(
        """net (float[1,3,4,4] x, float[12,3,1,1] w1, float[5,4,1,1] w2, float[5,8,1,1] w3)
        => (float[1,5,4,4] y) <int64[2] parts = {4, 8}> {
            a = Conv(x, w1)  p, q = Split<axis=1>(a, parts)  b = Conv(p, w2)  c = Conv(q, w3)
            y = Add(b, c)
        }"""
    )
    for group in graph.groups:
        for member in group.members:
            here = graph.channels_at(member.value, member.axis)
            counts = np.array([(here == channel).sum() for channel in group.channels])
            assert (counts == member.per_channel).all()
    channels = np.concatenate([group.channels for group in graph.groups])
    assert len(np.unique(channels)) == len(channels)


def test_names_are_what_a_person_would_say() -> None:
    graph = of_text(
        """net (float[1,3,4,4] x, float[6,3,1,1] "stem.weight", float[6,6,1,1]
        "layer1.0.conv.weight",
             float[6,6,1,1] "layer1.1.conv.weight", float[2,6,1,1] "head.weight")
        => (float[1,2,4,4] y) {
            a = Conv(x, "stem.weight")  b = Conv(a, "layer1.0.conv.weight")  c = Add(a, b)
            d = Conv(c, "layer1.1.conv.weight")  e = Add(c, d)  y = Conv(e, "head.weight")
        }"""
    )
    (group,) = free(graph)
    assert group.name == "stem (residual, 3 producers)"
    assert group.producers == ("stem", "layer1.0.conv", "layer1.1.conv")
    assert group.readers == ("layer1.0.conv", "layer1.1.conv", "head")
    assert [g.reason for g in graph.groups if not g.resizable] == [
        "graph input 'x'",
        "graph output 'y'",
    ]


def test_outputs_may_be_freed() -> None:
    text = "net (float[1,3,4,4] x, float[6,3,1,1] w) => (float[1,6,4,4] y) { y = Conv(x, w) }"
    assert not free(of_text(text))
    assert [group.width for group in free(of_text(text, pin_outputs=False))] == [6]


def test_ids_depend_on_the_model_alone(attention_model: ir.Model) -> None:
    first, second = lift(attention_model), lift(attention_model)
    assert [(g.id, g.name) for g in first.groups] == [(g.id, g.name) for g in second.groups]
    assert first.group("g1").id == first.group(first.group("g1").name).id == "g1"
    with pytest.raises(KeyError):
        first.group("nobody")


def test_of_several_reasons_the_graphs_own_is_told() -> None:
    text = """net (float[1,3,4,4] x, float[4,3,1,1] w1, float[4,3,1,1] w2, float[2,8,1,1] w3)
        => (float[1,2,4,4] y, float[1,4,4,4] g, float[1,4,4,4] s)
    <int64[1] zero = {0}, int64[1] four = {4}, int64[1] one = {1}> {
        a = Conv(x, w1)  g = com.acme.Gate(a)  b = Conv(x, w2)  z = Concat<axis=1>(a, b)
        s = Slice(z, zero, four, one)  y = Conv(z, w3)
    }"""
    opsets = '<ir_version: 10, opset_import: ["": 20, "com.acme": 1]>'
    graph = lift(model_from_text(opsets + text))
    assert graph.group("z").reason == "graph output 's'"


@pytest.mark.parametrize("how", STANDARDIZED)
def test_the_same_where_the_group_norm_is_written_out(how: str) -> None:
    """As exporters write it: rows of groups, an InstanceNormalization, scales."""
    text = f"""net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8,1,1] s, float[8,1,1] h,
    float[2,8,1,1] w2) => (float[1,2,4,4] y) <int64[3] over = {{1, 2, 3}},
    int64[3] rows = {{0, 4, -1}}, int64[4] back = {{1, 8, 4, 4}}, float[4] ones = {{1, 1, 1, 1}},
    float[4] zeros = {{0, 0, 0, 0}}> {{
        a = Conv(x, w1)  p = Reshape(a, rows)  i = InstanceNormalization(p, ones, zeros)
        b = Reshape(i, back)  bs = Mul(b, s)  bh = Add(bs, h)  r = Relu(bh)
        {STANDARDIZED[how]}  y = Conv(r, k)
    }}"""
    graph = lift(model_from_text(text))
    assert [group.width for group in free(graph)] == [4]
    prove(graph)


ALTERNATING = {
    "taken by a slice": "f = Slice(a, zero, eight, one, two)  g = Identity(a)",
    "taken by a gather": "f = Gather<axis=1>(a, even)  g = Identity(a)",
    "taken twice": "f = Slice(a, zero, eight, one, two)  g = Slice(a, one, eight, one, two)",
    "taken last": "g = Slice(a, one, eight, one, two)  f = Slice(a, zero, eight, one, two)",
}


@pytest.mark.parametrize("how", ALTERNATING)
@pytest.mark.parametrize("lost", [[0], [0, 1], [0, 1, 2], [1, 3]])
def test_groups_that_alternate_keep_their_order(how: str, lost: list[int]) -> None:
    """Whichever channels go, the ids and names of what is left are those of the original."""
    body = ALTERNATING[how]
    width = 4 if "Identity" not in body else 8
    text = f"""net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2,4,1,1] w2, float[2,{width},1,1] w3)
    => (float[1,2,4,4] y) <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}},
    int64[1] eight = {{8}}, int64[4] even = {{0, 2, 4, 6}}> {{
        a = Conv(x, w1)  {body}  r = Conv(f, w2)  s = Conv(g, w3)  y = Add(r, s)
    }}"""
    graph = lift(model_from_text(text))
    halves = free(graph)
    assert [group.width for group in halves] == [4, 4]
    for group in halves:
        kept = np.setdiff1d(np.arange(4), lost)
        again = lift(resize(graph, {group.index: kept}))
        widths = {g.name: len(kept) if g is group else g.width for g in graph.groups}
        assert {g.name: g.width for g in again.groups} == widths
        assert [(g.id, g.name) for g in again.groups] == [(g.id, g.name) for g in graph.groups]
