"""GroupQueryAttention in PyTorch, as generation runs it; ONNX Runtime is the oracle."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.arrays import Array, Arrays
from morphgraph.onnx_io import runtime as ort
from morphgraph.testing import model_from_text

HEADS, SHARED, SIZE = 4, 2, 16
FULL = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return FULL.normal(size=shape).astype(np.float32)


def tables(pairs: int = SIZE // 2) -> Arrays:
    angles = np.arange(40)[:, None] / 100 ** (np.arange(pairs) / pairs)
    return {"c": np.cos(angles).astype(np.float32), "s": np.sin(angles).astype(np.float32)}


def attention(feeds: Arrays, held: Arrays, operands: str, **attributes: Any) -> onnx.ModelProto:
    """A single node; of its results the caches are told, too."""
    names = operands.replace(" ", "").split(",")
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "keys", "values"], name="gqa", domain="com.microsoft",
        num_heads=HEADS, kv_num_heads=SHARED, **attributes,
    )  # fmt: skip
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32,
             np.dtype(np.int64): TensorProto.INT64}  # fmt: skip
    given = [
        helper.make_tensor_value_info(name, kinds[array.dtype], array.shape)
        for name, array in feeds.items()
    ]
    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in ("y", "keys", "values")
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph([node], "net", given, made, stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def qkv(batch: int, length: int) -> Arrays:
    wide = {"q": HEADS, "k": SHARED, "v": SHARED}
    return {name: normal(batch, length, heads * SIZE) for name, heads in wide.items()}


def past(batch: int, length: int) -> Arrays:
    return {name: normal(batch, SHARED, length, SIZE) for name in ("pk", "pv")}


def in_torch(proto: onnx.ModelProto, feeds: Arrays) -> list[Array]:
    net = mg.to_torch(mg.lift(proto, pin_outputs=True).model)
    found = net(*(torch.from_numpy(array) for array in feeds.values()))
    return [each.detach().numpy() for each in found]


def lengths(*last: int, total: int) -> Arrays:
    return {"l": np.array(last, np.int32), "t": np.array(total, np.int32)}


ROTATED: dict[str, tuple[str, Arrays, dict[str, Any]]] = {
    "plain": ("", {}, {}),
    "halves": (", c, s", tables(), {"do_rotary": 1}),
    "neighbours": (", c, s", tables(), {"do_rotary": 1, "rotary_interleaved": 1}),
    "window": (", c, s", tables(), {"do_rotary": 1, "local_window_size": 4}),
    "softcap": ("", {}, {"softcap": 1.5, "scale": 0.4}),
    "sink": (", , , , , h", {"h": normal(HEADS)}, {}),
    "smooth": ("", {}, {"smooth_softmax": 1}),
}


@pytest.mark.parametrize("form", ROTATED)
@pytest.mark.parametrize("step", ["prompt", "token", "chunk"])
def test_steps_of_generation(step: str, form: str) -> None:
    """A prompt behind nothing, one token behind a cache, and several tokens behind one."""
    more, held, attributes = ROTATED[form]
    batch, old, new = {"prompt": (2, 0, 7), "token": (2, 6, 1), "chunk": (1, 6, 3)}[step]
    feeds = qkv(batch, new) | (past(batch, old) if old else {})
    held = held | lengths(*[old + new - 1] * batch, total=old + new)
    caches = "pk, pv" if old else ","
    proto = attention(feeds, held, f"q, k, v, {caches}, l, t{more}", **attributes)
    expected = list(ort.run(mg.lift(proto).model, feeds).values())
    for one, other in zip(in_torch(proto, feeds), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())


def test_samples_of_other_lengths() -> None:
    """A batch of which one sample has padding in its cache: lengths tell what counts."""
    feeds = qkv(2, 1) | past(2, 6)
    held = tables() | lengths(6, 3, total=7)
    proto = attention(feeds, held, "q, k, v, pk, pv, l, t, c, s", do_rotary=1)
    found = in_torch(proto, feeds)
    expected = list(ort.run(mg.lift(proto).model, feeds).values())
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6)
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(one[1, :, :4], other[1, :, :4], rtol=0, atol=1e-6)


def test_a_part_of_every_head_turns_and_positions_are_given() -> None:
    feeds = qkv(1, 3) | past(1, 2) | {"i": np.array([[2, 3, 4]])}
    held = tables(8)
    held = {name: array[:, :8] for name, array in held.items()} | lengths(4, total=5)
    proto = attention(feeds, held, "q, k, v, pk, pv, l, t, c, s, i", do_rotary=1)
    expected = list(ort.run(mg.lift(proto).model, feeds).values())
    for one, other in zip(in_torch(proto, feeds), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_norms_of_heads_are_those_in_front() -> None:
    """No kernel on a CPU has them: expected is what it computes of heads that are normalized."""
    feeds = qkv(2, 1) | past(2, 6)
    scales = {"a": np.abs(normal(SIZE)) + 0.5, "b": np.abs(normal(SIZE)) + 0.5}
    held = tables() | lengths(6, 6, total=7)
    operands = "q, k, v, pk, pv, l, t, c, s"
    proto = attention(
        feeds, held | scales, f"{operands}, , , , , , a, b", do_rotary=1, qk_norm_epsilon=1e-3
    )
    normed = dict(feeds)
    for name, scale in (("q", scales["a"]), ("k", scales["b"])):
        rows = feeds[name].reshape(2, 1, -1, SIZE)
        root = np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-3)
        normed[name] = (rows / root * scale).reshape(feeds[name].shape).astype(np.float32)
    plain = attention(normed, held, operands, do_rotary=1)
    expected = list(ort.run(mg.lift(plain).model, normed).values())
    for one, other in zip(in_torch(proto, feeds), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())


def test_a_cache_of_the_latest_positions_is_refused() -> None:
    feeds = qkv(1, 1) | past(1, 16)
    held = lengths(16, total=17)
    proto = attention(
        feeds, held, "q, k, v, pk, pv, l, t", local_window_size=16, sliding_window_cache=1
    )
    with pytest.raises(mg.UnsupportedError, match="a cache of the latest positions alone"):
        mg.to_torch(mg.lift(proto).model)


def test_a_decoder_without_a_kernel_is_checked_in_torch() -> None:
    """Norms in the node, as the model builder writes them for other devices than a CPU."""
    text = """<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
        net (int64[B,T] ids, int64[B,L] m, float[B,2,P,D] p, float[B,2,P,D] r, float[20,8] e,
        float[8,128] w1, float[64,8] w2, float[8,20] w3, float[99,8] c, float[99,8] s,
        float[16] g1, float[16] g2) => (float[B,T,20] y, float[B,2,L,D] k, float[B,2,L,D] v)
        <int64[1] one = {1}, int64 axis = {1}> {
            x = Gather(e, ids)
            sum = ReduceSum<keepdims=0>(m, one)  less = Sub(sum, one)  l = Cast<to=6>(less)
            shape = Shape(m)  size = Gather(shape, axis)  t = Cast<to=6>(size)
            q = MatMul(x, w1)
            a, k, v = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>
                (q, , , p, r, l, t, c, s, , , , , , g1, g2)
            o = MatMul(a, w2)  h = Add(x, o)  y = MatMul(h, w3) }"""
    graph = mg.lift(model_from_text(text, inputs=("ids", "m", "p", "r")))
    with pytest.raises(mg.UnsupportedError, match="norm_weight"):
        ort.run(graph.model, ort.random_inputs(graph.model))
    heads = next(group for group in graph.groups if group.width == 2 and group.resizable)
    plan = mg.plan(graph, {}, widths={heads.id: 1})
    small = mg.apply(graph, plan)
    assert mg.verify(graph, plan, small).ok
    weight = small.graph.initializers["w2"]
    assert weight.const_value is not None
    weight.const_value = ir.Tensor(np.roll(weight.const_value.numpy(), 1, 0), name="w2")
    assert not mg.verify(graph, plan, small).ok
