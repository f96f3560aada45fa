"""Where channels cannot be followed: what keeps its size, and the reason that a user reads."""

import pytest

from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text, prove

# 6 channels enter the barrier, 6 leave it; 5 before it and 7 behind it may shrink.
NET = """net (float[1,3,4,4] x, bool which, float[5,3,1,1] w1, float[6,5,1,1] w2, float[7,6,1,1] w3,
    float[2,7,1,1] w4, float[6,3,1,1] w5, float[6] s6) => (float[1,2,4,4] y)
    <float[1,6,4,4] c, int64 two = {{2}}, bool yes = {{1}}, float[1,4,4] z = {zeros}> {{
        a = Conv(x, w1)  ra = Relu(a)  b = Conv(ra, w2)
        {barrier}
        d = Conv(c, w3)  rd = Relu(d)  y = Conv(rd, w4)
    }}"""
BODY = "has a body of its own, which is left as it is"


@pytest.mark.parametrize(
    ("barrier", "before", "behind"),
    [
        (
            """c = If(which) <
                then_branch = g () => (float[1,6,4,4] t) { t = Sigmoid(b) },
                else_branch = h () => (float[1,6,4,4] e) { e = Tanh(b) }>""",
            "read inside If 'If_c'",
            f"If {BODY}",
        ),
        (
            """s = Conv(x, w5)
            c = Loop(two, yes, s) <
                body = g (int64 i, bool on, float[1,6,4,4] q) => (bool more, float[1,6,4,4] r)
                { more = Identity(on) r = Add(q, b) }>""",
            "read inside Loop 'Loop_c'",
            f"Loop {BODY}",
        ),
        (
            """s = Sigmoid(b)
            l, c = Scan<num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1],
                body = g (float[1,4,4] q, float[1,4,4] v) => (float[1,4,4] r, float[1,4,4] w)
                { r = Add(q, v) w = Mul(r, v) }>(z, s)""",
            f"Scan {BODY}",
            f"Scan {BODY}",
        ),
        (
            "q = SplitToSequence<axis=1>(b, two)  c = ConcatFromSequence<axis=1>(q)",
            "SplitToSequence deals with sequences or optional values, which have no axes",
            "ConcatFromSequence deals with sequences or optional values, which have no axes",
        ),
        (
            "c, m, v = BatchNormalization<training_mode=1>(b, s6, s6, s6, s6)",
            "BatchNormalization in training mode; export the model in eval mode",
            "BatchNormalization in training mode; export the model in eval mode",
        ),
    ],
    ids=["if", "loop", "scan", "sequence", "training"],
)
def test_a_barrier_names_itself_and_the_rest_is_resized(
    barrier: str, before: str, behind: str
) -> None:
    text = NET.format(barrier=barrier, zeros=f"{{{', '.join('0' * 16)}}}")
    graph = lift(model_from_text(text, inputs=("x", "which")))
    assert [group.width for group in graph.groups if group.resizable] == [5, 7]
    assert {group.reason for group in graph.groups if group.width == 6} == {before, behind}
    prove(graph)
