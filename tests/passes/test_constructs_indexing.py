"""Reading, writing and choosing at indexed positions: resized equals masked."""

import pytest

from morphgraph.graph import ChannelGraph
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text, prove

# 6 channels are made, something is done to them, they are read.
FRAME = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2{more}) => (float[1,2,4,4] y)
        <{constants}> {{
            a = Conv(x, w1)  r = Relu(a)
            {body}
            y = Conv(b, w2)
        }}"""
NAMES = [f"c{k}" for k in range(6)]


def framed(body: str, constants: str = "int64 unused = {0}", more: str = "") -> str:
    return FRAME.format(body=body, constants=constants, more=more)


def numbers(name: str, shape: str, values: str) -> str:
    return f"int64[{shape}] {name} = {{{values}}}"


ROLLED = ", ".join(f"{row}" for row in (2, 3, 0, 1) for _ in range(4))
EVERY_CHANNEL = ", ".join([ROLLED] * 6)
FLIPPED = ", ".join(str(5 - c) for c in range(6) for _ in range(16))

NETWORKS: dict[str, tuple[str, list[int]]] = {
    "rolled in space by elements": (
        framed("b = GatherElements<axis=2>(r, i)", numbers("i", "1,6,4,4", EVERY_CHANNEL)),
        [6],
    ),
    "channels flipped by elements": (
        framed(
            "f = GatherElements<axis=-3>(r, i)  s = Sigmoid(f)  b = Add(r, s)",
            numbers("i", "1,6,4,4", FLIPPED),
        ),
        [3],
    ),
    "a corner by elements": (
        framed(
            "e = GatherElements<axis=3>(r, i)  c = ConvTranspose<strides=[2,2]>(e, w3)"
            "  b = Add(c, r)",
            numbers("i", "1,4,2,2", "1, 3, 0, 2, 3, 0, 2, 1, 1, 0, 2, 3, 3, 1, -3, -2"),
            ", float[4,6,2,2] w3",
        ),
        [2, 4],
    ),
    "elements found at run time": (
        framed(
            "t, i = TopK<axis=2>(r, four)  b = GatherElements<axis=2>(a, i)", "int64[1] four = {4}"
        ),
        [6],
    ),
    "positions by index tuples": (
        framed(
            "t = Transpose<perm=[2,3,1,0]>(r)  g = GatherND(t, i)"
            "  b = Transpose<perm=[3,2,0,1]>(g)",
            numbers(
                "i",
                "4,4,2",
                ", ".join(f"{h}, {w}" for h in (1, 2, 3, 0) for w in (3, -2, 0, 0)),
            ),
        ),
        [6],
    ),
    "channels by index tuples": (
        framed(
            "t = Transpose<perm=[1,0,2,3]>(r)  g = GatherND(t, i)  s = Sigmoid(g)"
            "  u = Transpose<perm=[1,0,2,3]>(s)  b = Add(r, u)",
            numbers("i", "6,1", "1, 2, 0, -2, -1, 3"),
        ),
        [2],
    ),
    "a table by index tuples": (
        framed(
            "e = GatherND(table, i)  t = Transpose<perm=[2,0,1]>(e)  b = Add(r, t)",
            numbers("i", "4,4,1", ", ".join(str(k % 7) for k in range(16))),
            ", float[7,6] table",
        ),
        [6],
    ),
    "index tuples found at run time": (
        framed(
            "m = ArgMax<axis=3>(x)  c = ReduceMax(m)  v = Reshape(c, one)"
            "  t = Transpose<perm=[2,1,0,3]>(r)  g = GatherND(t, v)"
            "  u = Transpose<perm=[2,1,0,3]>(g)  b = Sub(r, u)",
            "int64[2] one = {1, 1}",
        ),
        [6],
    ),
    "index tuples behind a batch": (
        framed(
            "t = Transpose<perm=[0,2,1,3]>(r)  g = GatherND<batch_dims=1>(t, i)"
            "  b = Transpose<perm=[0,2,1,3]>(g)",
            numbers("i", "1,4,1", "3, 1, 1, 0"),
        ),
        [6],
    ),
    "channels written by index tuples": (
        framed(
            "p = Conv(x, w3)  t = Transpose<perm=[1,0,2,3]>(r)  u = Transpose<perm=[1,0,2,3]>(p)"
            '  g = ScatterND<reduction="add">(t, i, u)  b = Transpose<perm=[1,0,2,3]>(g)',
            numbers("i", "3,1", "4, 0, -1"),
            ", float[3,3,1,1] w3",
        ),
        [3, 3],
    ),
    "space written by index tuples": (
        framed(
            "s = Sigmoid(r)  t = Transpose<perm=[2,3,1,0]>(r)  u = Transpose<perm=[2,3,1,0]>(s)"
            '  v = Slice(u, zero, two, axes)  g = ScatterND<reduction="add">(t, i, v)'
            "  b = Transpose<perm=[3,2,0,1]>(g)",
            numbers("i", "2,2,2", "0, 1, 0, 3, 3, 1, 3, 3")
            + ", int64[2] zero = {0, 0}, int64[2] two = {2, 2}, int64[2] axes = {0, 1}",
        ),
        [6],
    ),
    "written position by position": (
        framed(
            "s = Sigmoid(r)  t = Transpose<perm=[2,3,1,0]>(r)  u = Transpose<perm=[2,3,1,0]>(s)"
            "  v = Slice(u, zero, one, axes)  w = Squeeze(v, zero)  g = ScatterND(t, i, w)"
            "  b = Transpose<perm=[3,2,0,1]>(g)",
            numbers("i", "4,2", "0, 1, 1, 3, 3, 1, 2, 2")
            + ", int64[1] zero = {0}, int64[1] one = {1}, int64[1] axes = {0}",
        ),
        [6],
    ),
    "channels written by elements": (
        framed(
            'p = Conv(x, w3)  b = ScatterElements<axis=1, reduction="add">(r, i, p)',
            numbers("i", "1,2,4,4", ", ".join(["4"] * 16 + ["1"] * 16)),
            ", float[2,3,1,1] w3",
        ),
        [4, 2],
    ),
    "a corner written by elements": (
        framed(
            's = Slice(a, zero, two, axes)  b = ScatterElements<axis=2, reduction="add">(r, i, s)',
            numbers("i", "1,3,2,4", ", ".join(str((5 * k + 1) % 4) for k in range(24)))
            + ", int64[2] zero = {0, 0}, int64[2] two = {3, 2}, int64[2] axes = {1, 2}",
        ),
        [3, 3],
    ),
    "summed up": (
        framed("s = CumSum<reverse=1>(r, axis)  b = Relu(s)", "int64 axis = {1}"),
        [6],
    ),
    "summed up in space": (framed("b = CumSum<exclusive=1>(r, axis)", "int64 axis = {3}"), [6]),
    "multiplied up": (
        '<ir_version: 10, opset_import: ["": 26]>'
        + framed("c = Add(r, half)  b = CumProd(c, axis)", "float half = {0.5}, int64 axis = {1}"),
        [6],
    ),
    "best in space": (
        framed(
            "t, i = TopK<axis=2>(r, two)  j = Cast<to=1>(i)  s = Mul(t, j)"
            "  b = Concat<axis=2>(s, t)",
            "int64[1] two = {2}",
        ),
        [6],
    ),
    "numbered in space": (
        framed("i = ArgMax<axis=2, keepdims=1>(r)  j = Cast<to=1>(i)  b = Add(r, j)"),
        [6],
    ),
    "classes marked": (
        framed(
            "i = ArgMin<axis=2, keepdims=0, select_last_index=1>(r)"
            "  b = OneHot<axis=2>(i, four, offon)",
            "int64 four = {4}, float[2] offon = {0.25, 1.5}",
        ),
        [6],
    ),
    "triangle": (framed("b = Trilu<upper=0>(r, k)", "int64 k = {1}"), [6]),
    "reversed": (
        framed(
            "t = Transpose<perm=[2,0,1,3]>(r)  v = ReverseSequence(t, n)"
            "  b = Transpose<perm=[1,2,0,3]>(v)",
            "int64[1] n = {3}",
        ),
        [6],
    ),
    "determinant": (
        framed("d = Det(r)  e = Unsqueeze(d, axes)  b = Add(r, e)", "int64[2] axes = {2, 3}"),
        [6],
    ),
    "transformed": (
        framed(
            "u = Unsqueeze(r, last)  d = DFT(u, , axis)  s = ReduceSum<keepdims=0>(d, last)"
            "  b = Sigmoid(s)",
            "int64[1] last = {-1}, int64 axis = {-2}",
        ),
        [6],
    ),
}


def graph_of(name: str) -> ChannelGraph:
    return lift(model_from_text(NETWORKS[name][0]))


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_and_slices(name: str) -> None:
    graph = graph_of(name)
    assert [group.width for group in graph.groups if group.resizable] == NETWORKS[name][1]
    prove(graph, faults=30)


MIXED = ", ".join(str(7 * k % 6) for k in range(96))


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        ("b, i = TopK<axis=1>(r, six)", "int64[1] six = {6}", "ranked by TopK"),
        (
            "i = ArgMax<axis=1>(r)  j = Cast<to=1>(i)  b = Mul(r, j)",
            "float unused = {0}",
            "numbered by ArgMax",
        ),
        (
            "t, i = TopK<axis=1>(x, two)  g = GatherElements<axis=1>(a, i)"
            "  b = Concat<axis=1>(g, g, g)",
            "int64[1] two = {2}",
            "indexed at run time",
        ),
        (
            "b = GatherElements<axis=1>(r, i)",
            numbers("i", "1,6,4,4", MIXED),
            "indexed position by position",
        ),
        (
            "u = Unsqueeze(r, last)  d = DFT(u, , axis)  b = ReduceSum<keepdims=0>(d, last)",
            "int64[1] last = {-1}, int64 axis = {1}",
            "transformed by DFT",
        ),
        (
            "b = RandomNormalLike(r)",
            "float unused = {0}",
            "RandomNormalLike draws random numbers, others for every size",
        ),
        (
            "q = SequenceConstruct(r, r)  b = SequenceAt(q, zero)",
            "int64 zero = {0}",
            "SequenceConstruct deals with sequences or optional values, which have no axes",
        ),
    ],
)
def test_what_cannot_shrink_says_why(body: str, constants: str, reason: str) -> None:
    text = framed(body, constants).replace("<int64", "<float[1,6,4,4] b, int64", 1)
    text = text.replace("<float ", "<float[1,6,4,4] b, float ", 1)
    graph = lift(model_from_text(text))
    assert reason in [g.reason for g in graph.groups if "Conv_a" in g.producers]
