"""Channels that others can give are removed without loss, whatever reads them.

Half of a group's channels repeat the other half, or are sums of others: a resized network that is
right exists. Oracle: the original in ONNX Runtime, on inputs that nobody has seen.
"""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from morphgraph.arrays import Array, Arrays, IntArray
from morphgraph.edit import array_of, replace_array
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.lift import lift
from morphgraph.plans import Plan, make_plan
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import ShrinkResult, finish
from morphgraph.testing import model_from_text

OPSET = '<ir_version: 9, opset_import: ["": 20]> '

# A network, and the axes that make the group's channels.
NETWORKS: dict[str, tuple[str, list[tuple[str, int]]]] = {
    "dense convolution": (
        """net (float[N,3,6,6] x, float[8,3,3,3] a, float[8] c, float[5,8,3,3] b)
        => (float[N,5,4,4] y) { p = Conv<pads=[1,1,1,1]>(x, a, c)  r = Relu(p)  y = Conv(r, b) }""",
        [("a", 0), ("c", 0)],
    ),
    "strided, dilated, padded": (
        """net (float[N,3,9,9] x, float[8,3,1,1] a, float[5,8,3,3] b) => (float[N,5,h,w] y) {
            p = Conv(x, a)  r = Sigmoid(p)
            y = Conv<strides=[2,1], dilations=[1,2], pads=[0,1,2,1]>(r, b)
        }""",
        [("a", 0)],
    ),
    "padded to the same size": (
        """net (float[N,3,7,6] x, float[8,3,1,1] a, float[5,8,2,3] b) => (float[N,5,h,w] y) {
            p = Conv(x, a)  r = Relu(p)  y = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(r, b)
        }""",
        [("a", 0)],
    ),
    "grouped convolution": (
        """net (float[N,3,6,6] x, float[8,3,3,3] a, float[6,4,3,3] b, float[6] d, float[2,6,1,1] e)
        => (float[N,2,4,4] y) {
            p = Conv<pads=[1,1,1,1]>(x, a)  r = Relu(p)  q = Conv<group=2>(r, b, d)  s = Relu(q)
            y = Conv(s, e)
        }""",
        [("a", 0)],
    ),
    "depthwise chain": (
        """net (float[N,3,6,6] x, float[8,3,1,1] a, float[8,1,3,3] b, float[8] c, float[4,8,1,1] d)
        => (float[N,4,4,4] y) {
            p = Conv(x, a)  r = Relu(p)  q = Conv<group=8>(r, b, c)  s = Relu(q)  y = Conv(s, d)
        }""",
        [("a", 0), ("b", 0), ("c", 0)],
    ),
    "transposed convolution": (
        """net (float[N,3,4,4] x, float[8,3,1,1] a, float[8,5,3,3] b, float[5] c)
        => (float[N,5,h,w] y) {
            p = Conv(x, a)  r = Relu(p)
            y = ConvTranspose<strides=[2,2], pads=[1,0,1,1], output_padding=[1,0]>(r, b, c)
        }""",
        [("a", 0)],
    ),
    "transposed and grouped": (
        """net (float[N,3,4,4] x, float[8,3,1,1] a, float[8,3,2,2] b) => (float[N,6,h,w] y) {
            p = Conv(x, a)  r = Relu(p)  y = ConvTranspose<strides=[2,2], group=2>(r, b)
        }""",
        [("a", 0)],
    ),
    "one dimension": (
        """net (float[N,3,9] x, float[8,3,3] a, float[5,8,3] b) => (float[N,5,5] y) {
            p = Conv(x, a)  r = Relu(p)  y = Conv(r, b)
        }""",
        [("a", 0)],
    ),
    "three dimensions": (
        """net (float[N,2,4,4,4] x, float[6,2,1,1,1] a, float[3,6,2,2,2] b)
        => (float[N,3,3,3,3] y) { p = Conv(x, a)  r = Relu(p)  y = Conv(r, b) }""",
        [("a", 0)],
    ),
    "flattened": (
        """net (float[N,2,4,4] x, float[6,2,3,3] a, float[5,24] b, float[5] c) => (float[N,5] y) {
            p = Conv(x, a)  r = Relu(p)  f = Flatten(r)  y = Gemm<transB=1>(f, b, c)
        }""",
        [("a", 0)],
    ),
    "scaled product": (
        """net (float[N,6] x, float[6,8] a, float[8] c, float[8,5] b, float[5] d)
        => (float[N,5] y) {
            p = Gemm<alpha=2.0>(x, a, c)  r = Relu(p)  y = Gemm<alpha=0.5, beta=2.0>(r, b, d)
        }""",
        [("a", 1), ("c", 0)],
    ),
    "transposed kernels": (
        """net (float[N,4,6] x, float[8,6] a, float[8] c, float[5,8] b, float[5] d)
        => (float[N,4,5] y) {
            at = Transpose<perm=[1,0]>(a)  p = MatMul(x, at)  pc = Add(p, c)  r = Relu(pc)
            bt = Transpose<perm=[1,0]>(b)  q = MatMul(r, bt)  y = Add(q, d)
        }""",
        [("a", 0), ("c", 0)],
    ),
    "an equation": (
        """net (float[N,4,6] x, float[6,8] a, float[5,8] b) => (float[N,4,5] y) {
            p = Einsum<equation="bsi,io->bso">(x, a)  r = Relu(p)
            y = Einsum<equation="...i,oi->...o">(r, b)
        }""",
        [("a", 1)],
    ),
    "residual stream": (
        """net (float[N,3,4,4] x, float[8,3,1,1] s, float[6,8,3,3] a, float[8,6,3,3] b,
            float[8] g, float[4,8,1,1] c, float[6,8,3,3] d)
        => (float[N,4,4,4] y, float[N,6,4,4] z) {
            t = Conv(x, s)  p = Conv<pads=[1,1,1,1]>(t, a)  r = Relu(p)
            q = Conv<pads=[1,1,1,1]>(r, b, g)  u = Add(t, q)  v = Relu(u)  y = Conv(v, c)
            z = Conv<pads=[1,1,1,1]>(v, d)
        }""",
        [("s", 0), ("b", 0), ("g", 0)],
    ),
    "several concatenated": (
        """net (float[N,3,4,4] x, float[6,3,1,1] a, float[4,6,3,3] b, float[5,10,1,1] c,
            float[2,15,1,1] d) => (float[N,2,4,4] y) {
            p = Conv(x, a)  r = Relu(p)  q = Conv<pads=[1,1,1,1]>(r, b)  s = Relu(q)
            u = Concat<axis=1>(r, s)  v = Conv(u, c)  w = Relu(v)  k = Concat<axis=1>(r, s, w)
            y = Conv(k, d)
        }""",
        [("a", 0)],
    ),
    "normalized": (
        """net (float[N,3,6,6] x, float[8,3,3,3] a, float[8] s, float[8] h, float[8] m, float[8] v,
            float[5,8,3,3] b, float[5] s2, float[5] h2, float[5] m2, float[5] v2, float[2,5,1,1] c)
        => (float[N,2,2,2] y) {
            p = Conv(x, a)  n = BatchNormalization(p, s, h, m, v)  r = Relu(n)
            q = Conv(r, b)  k = BatchNormalization(q, s2, h2, m2, v2)  t = Relu(k)  y = Conv(t, c)
        }""",
        [("a", 0), ("s", 0), ("h", 0), ("m", 0), ("v", 0)],
    ),
    "LSTM": (
        """net (float[5,N,6] x, float[6,8] a, float[1,12,8] w, float[1,12,3] u, float[1,24] b)
        => (float[5,1,N,3] y) {
            p = MatMul(x, a)  r = Tanh(p)  y = LSTM<hidden_size=3>(r, w, u, b)
        }""",
        [("a", 1)],
    ),
    "GRU of two directions, without a bias": (
        """net (float[5,N,6] x, float[6,8] a, float[2,9,8] w, float[2,9,3] u)
        => (float[5,2,N,3] y) {
            p = MatMul(x, a)  r = Tanh(p)
            y = GRU<hidden_size=3, direction="bidirectional">(r, w, u)
        }""",
        [("a", 1)],
    ),
    "heads": (
        """net (float[N,5,6] x, float[6,12] wq, float[6,12] wk, float[6,12] wv, float[12,6] wo)
        => (float[N,5,6] y) <int64[4] heads = {0, 5, 4, 3}, int64[3] flat = {0, 5, -1}> {
            q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
            qh = Reshape(q, heads)  kh = Reshape(k, heads)  vh = Reshape(v, heads)
            qt = Transpose<perm=[0,2,1,3]>(qh)  kt = Transpose<perm=[0,2,3,1]>(kh)
            vt = Transpose<perm=[0,2,1,3]>(vh)
            s = MatMul(qt, kt)  p = Softmax<axis=-1>(s)  z = MatMul(p, vt)
            zt = Transpose<perm=[0,2,1,3]>(z)  zf = Reshape(zt, flat)  y = MatMul(zf, wo)
        }""",
        [("wq", 1), ("wk", 1), ("wv", 1)],
    ),
    "embedding": (
        """net (int64[N,5] x, float[11,8] a, float[8,6] b) => (float[N,5,6] y) {
            p = Gather(a, x)  r = Relu(p)  y = MatMul(r, b)
        }""",
        [("a", 1)],
    ),
}


def opened(text: str) -> ir.Model:
    """The network of a text, with random weights."""
    return model_from_text(OPSET + text)


def of_axis(graph: ChannelGraph, name: str, axis: int) -> int:
    """The index of the group whose channels stand along an axis of a weight."""
    for group in graph.groups:
        if (
            group.resizable
            and _positions(graph, group.index, np.array([0]), name, axis) is not None
        ):
            return group.index
    raise AssertionError(f"no group along axis {axis} of {name}")


def _positions(
    graph: ChannelGraph, index: int, channels: IntArray, name: str, axis: int
) -> IntArray | None:
    return AxisSelection(graph, {index: channels}).axis(name, axis)


def with_copies(model: ir.Model, axes: Sequence[tuple[str, int]]) -> tuple[ChannelGraph, int]:
    """The network with the second half of a group's channels made as the first half is."""
    graph = lift(model)
    index = of_axis(graph, *axes[0])
    half = graph.groups[index].width // 2
    for name, axis in axes:
        value = model.graph.initializers[name]
        array = array_of(value).copy()
        first = _positions(graph, index, np.arange(half), name, axis)
        second = _positions(graph, index, np.arange(half, 2 * half), name, axis)
        assert first is not None
        assert second is not None
        moved = np.moveaxis(array, axis, 0)
        moved[second] = moved[first]
        replace_array(value, array)
    return lift(model), index


def planned(graph: ChannelGraph, keep: dict[int, IntArray]) -> Plan:
    return make_plan(graph, keep, {}, [cost(graph, "flops")])


def data_for(model: ir.Model, count: int, seed: int = 0) -> Arrays:
    """Normal numbers, or small whole ones."""
    generator = np.random.default_rng(seed)
    feeds: Arrays = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = [size if isinstance(size, int) else count for size in value.shape]
        whole = value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
        array = generator.integers(0, 11, shape) if whole else generator.normal(size=shape)
        assert value.dtype is not None
        feeds[value.name or ""] = array.astype(value.dtype.numpy())
    return feeds


def answers(model: ir.Model, feeds: Arrays) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    running = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(each) for each in running.run(None, feeds)]


def distance(original: ir.Model, other: ir.Model, feeds: Arrays) -> float:
    """The largest relative error of an output."""
    pairs = zip(answers(original, feeds), answers(other, feeds), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)


def fitted(graph: ChannelGraph, keep: dict[int, IntArray], count: int = 400) -> ShrinkResult:
    feeds = data_for(graph.model, count)
    return finish(Shrinker(graph, feeds, threads=1), planned(graph, keep), verify=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_of_channels_are_removed_without_loss(name: str) -> None:
    text, axes = NETWORKS[name]
    graph, index = with_copies(opened(text), axes)
    half = graph.groups[index].width // 2
    # Of each pair one stays, here the first and there the second.
    keep = {index: np.sort(np.arange(half) + half * (np.arange(half) % 2))}
    result = fitted(graph, keep)
    unseen = data_for(graph.model, 50, seed=9)
    assert max(check.error for check in result.before) > 0.05
    assert distance(graph.model, result.model, unseen) < 1e-3


@pytest.mark.parametrize("name", ["dense convolution", "transposed kernels", "flattened"])
def test_sums_of_channels_are_removed_without_loss(name: str) -> None:
    """Without an activation in between, a channel may be any combination of others."""
    text, axes = NETWORKS[name]
    model = opened(text.replace("Relu", "Identity"))
    generator = np.random.default_rng(0)
    width = array_of(model.graph.initializers[axes[0][0]]).shape[axes[0][1]]
    mixing = generator.normal(size=(2, width - 2))
    for weight, axis in axes:
        value = model.graph.initializers[weight]
        moved = np.moveaxis(array_of(value).copy(), axis, 0)
        moved[:2] = np.tensordot(mixing, moved[2:], 1)
        replace_array(value, np.ascontiguousarray(np.moveaxis(moved, 0, axis)))
    graph = lift(model)
    result = fitted(graph, {of_axis(graph, *axes[0]): np.arange(2, width)})
    assert max(check.error for check in result.before) > 0.05
    assert distance(graph.model, result.model, data_for(model, 50, seed=9)) < 1e-3
