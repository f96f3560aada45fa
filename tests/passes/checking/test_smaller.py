"""The check on smaller inputs: they prove the same, or there are none."""

import pytest

import morphgraph as mg
from morphgraph.arrays import Shape
from morphgraph.graph import ChannelGraph
from morphgraph.passes.checking import verify as verifying
from morphgraph.passes.checking.smaller import smaller_inputs
from morphgraph.testing import model_from_text, prove

RESIDUAL = """net (float[1,3,96,96] x, float[12,3,7,7] w0, float[12] b0, float[12,12,3,3] w1,
     float[8,12,3,3] w2, float[8,12,1,1] w3, float[8,1,3,3] w4, float[5,8] fc) => (float[1,5] y)
<int64[2] axes = {2,3}> {
    a = Conv<kernel_shape=[7,7], strides=[2,2], pads=[3,3,3,3]>(x, w0, b0)
    r = Relu(a)
    c = Conv<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r, w1)
    d = Relu(c)
    e = Conv<kernel_shape=[3,3], strides=[4,4], pads=[1,1,1,1]>(d, w2)
    f = Conv<kernel_shape=[1,1], strides=[4,4]>(d, w3)
    g = Add(e, f)
    h = Conv<kernel_shape=[3,3], pads=[2,2,2,2], dilations=[2,2], group=8>(g, w4)
    m = ReduceMean<keepdims=0>(h, axes)
    y = Gemm<transB=1>(m, fc)
}"""

UPWARDS = """net (float[1,2,64] x, float[6,2,5] w0, float[6,4,4] w1, float[2,4,9] w2)
    => (float[1,2,64] y) {
    a = Conv<kernel_shape=[5], strides=[2], pads=[2,2]>(x, w0)
    r = Relu(a)
    b = ConvTranspose<kernel_shape=[4], strides=[2], pads=[1,1]>(r, w1)
    s = Relu(b)
    y = Conv<kernel_shape=[9], pads=[4,4]>(s, w2)
}"""

GATED = """net (float[1,4,48,64] x, float[10,4,3,3] w0, float[3,10,1,1] w1, float[10,3,1,1] w2,
     float[6,10,1,1] w3) => (float[1,6,24,32] y) {
    a = Conv<kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER">(x, w0)
    p = GlobalAveragePool(a)
    q = Conv<kernel_shape=[1,1]>(p, w1)
    r = Relu(q)
    s = Conv<kernel_shape=[1,1]>(r, w2)
    g = Sigmoid(s)
    m = Mul(a, g)
    y = Conv<kernel_shape=[1,1]>(m, w3)
}"""

FLATTENED = """net (float[1,3,32,32] x, float[6,3,3,3] w0, float[5,1536] fc) => (float[1,5] y) {
    a = Conv<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x, w0)
    f = Flatten(a)
    y = Gemm<transB=1>(f, fc)
}"""

POSITIONED = """net (float[1,3,32,32] x, float[6,3,4,4] w0, float[1,6,8,8] places,
     float[5,6,1,1] w1) => (float[1,5,8,8] y) {
    a = Conv<kernel_shape=[4,4], strides=[4,4]>(x, w0)
    b = Add(a, places)
    y = Conv<kernel_shape=[1,1]>(b, w1)
}"""

# A target that holds a size, which shape inference does not count.
RESHAPED = """net (float[1,3,32,32] x, float[6,3,4,4] w0, float[6,5] w1) => (float[1,64,5] y)
<int64[3] target = {1,6,64}> {
    a = Conv<kernel_shape=[4,4], strides=[4,4]>(x, w0)
    r = Reshape(a, target)
    t = Transpose<perm=[0,2,1]>(r)
    y = MatMul(t, w1)
}"""

# A kernel that is computed from the input is not known to slide.
COMPUTED = """net (float[1,3,32,32] x, float[6,3,3,3] w0, float[5,6,3,3] w1)
    => (float[1,5,32,32] y) <int64[3] axes = {1,2,3}> {
    k = ReduceMean<keepdims=1>(x, axes)
    w = Mul(w0, k)
    a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    b = Relu(a)
    y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(b, w1)
}"""

# Over one position a norm gives zero, whatever it is given.
NORMED = """net (float[1,3,32,32] x, float[6,3,4,4] w0, float[6] g, float[6] b, float[5,6,1,1] w1)
    => (float[1,5,8,8] y) {
    a = Conv<kernel_shape=[4,4], strides=[4,4]>(x, w0)
    n = InstanceNormalization(a, g, b)
    y = Conv<kernel_shape=[1,1]>(n, w1)
}"""


@pytest.mark.parametrize(
    ("text", "sizes"), [(RESIDUAL, (48, 48)), (UPWARDS, (6,)), (GATED, (4, 6))]
)
def test_wrong_slices_are_found_on_smaller_inputs(
    text: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = mg.lift(model_from_text(text))
    shapes = smaller_inputs(graph)
    assert shapes is not None
    assert shapes["x"][2:] == sizes
    monkeypatch.setattr(verifying, "_MOST_NUMBERS", 0)
    taken = []

    def noted(graph: ChannelGraph) -> dict[str, Shape] | None:
        taken.append(graph)
        return smaller_inputs(graph)

    monkeypatch.setattr(verifying, "smaller_inputs", noted)
    prove(graph, seeds=(0, 1))
    assert taken


@pytest.mark.parametrize("text", [FLATTENED, RESHAPED, POSITIONED, COMPUTED])
def test_where_something_holds_a_size_there_are_none(text: str) -> None:
    assert smaller_inputs(mg.lift(model_from_text(text))) is None


def test_a_norm_still_has_several_terms() -> None:
    assert smaller_inputs(mg.lift(model_from_text(NORMED))) == {"x": (1, 3, 8, 8)}
