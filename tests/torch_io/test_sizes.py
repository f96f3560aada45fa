"""Sizes that a model reads off its input and computes with, in all spellings, at an open batch."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import morphgraph as mg
from morphgraph.errors import UnsupportedError
from morphgraph.testing import model_from_text

# Each computes u, the batch as [1] of int64.
SPELLINGS = {
    "a scalar index": """sh = Shape(x)  i = Constant<value = int64 {0}>()  s = Gather<axis=0>(sh, i)
        ax = Constant<value = int64[1] {0}>()  u = Unsqueeze(s, ax)""",
    "a negative index": """sh = Shape(x)  i = Constant<value = int64 {-3}>()
        s = Gather<axis=0>(sh, i)  ax = Constant<value = int64[1] {0}>()  u = Unsqueeze(s, ax)""",
    "start and end": "u = Shape<start=0, end=1>(x)",
    "Size": """n = Size(x)  a = Shape<start=1>(x)  p = ReduceProd<keepdims=0>(a)  d = Div(n, p)
        o = Constant<value = int64[1] {1}>()  u = Reshape(d, o)""",
    "a slice with steps": """sh = Shape(x)  st = Constant<value = int64[1] {-1}>()
        en = Constant<value = int64[1] {-100}>()  ax = Constant<value = int64[1] {0}>()
        sp = Constant<value = int64[1] {-2}>()  r = Slice(sh, st, en, ax, sp)
        i = Constant<value = int64[1] {1}>()  u = Gather(r, i)""",
    "Min and Max": """b = Shape<start=0, end=1>(x)  h = Constant<value = int64[1] {100}>()
        l = Min(b, h)  o = Constant<value = int64[1] {1}>()  u = Max(l, o)""",
    "a choice": """b = Shape<start=0, end=1>(x)  h = Constant<value = int64[1] {100}>()
        c = Less(b, h)  u = Where(c, b, h)""",
    "fractions": """sh = Shape(x)  i = Constant<value = int64 {0}>()  s = Gather<axis=0>(sh, i)
        f = Cast<to=1>(s)  t = Constant<value = float {2.0}>()  g = Mul(f, t)  k = Div(g, t)
        q = Cast<to=7>(k)  ax = Constant<value = int64[1] {0}>()  u = Unsqueeze(q, ax)""",
    "a split": """sh = Shape(x)  p = Constant<value = int64[3] {1, 1, 1}>()
        u, v, z = Split<axis=0>(sh, p)""",
    "Expand": """r = Shape<start=0, end=1>(x)  ax = Constant<value = int64[1] {0}>()
        s = Squeeze(r, ax)  o = Constant<value = int64[1] {1}>()  u = Expand(s, o)""",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_size_in_any_spelling(spelling: str) -> None:
    model = model_from_text(f"""
        net (float[B,T,2] x) => (float[B,T,3] y)
            <float[2,3] w = {{1, 2, 3, 4, 5, 6}}, float[1,1] one = {{1}}, int64[2] rest = {{1, 3}}>
        {{
            {SPELLINGS[spelling]}
            shape = Concat<axis=0>(u, rest)  e = Expand(one, shape)
            m = MatMul(x, w)  y = Add(m, e)
        }}""")
    net = mg.to_torch(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for batch in (1, 3):
        x = np.random.default_rng(0).standard_normal((batch, 4, 2)).astype("f")
        (expected,) = session.run(None, {"x": x})
        np.testing.assert_allclose(net(torch.from_numpy(x)).detach(), expected, rtol=1e-5)


LAST, FIRST = 2**63 - 1, -(2**63) + 1


@pytest.mark.parametrize(
    ("start", "end", "axis", "step"),
    [(-1, FIRST, 2, -1), (2, 0, 2, -1), (-1, FIRST, 1, -1), (LAST, FIRST, 0, -1), (3, 0, 2, -2)],
)
def test_slices_run_backwards_beside_open_sizes(start: int, end: int, axis: int, step: int) -> None:
    """Along a known size from anywhere; along an open one over all of it."""
    model = model_from_text(f"""
        net (float[B,T,4] x) => (float[B,T,L] y) <int64[1] s = {{{start}}}, int64[1] e = {{{end}}},
            int64[1] a = {{{axis}}}, int64[1] t = {{{step}}}>
        {{ r = Relu(x)  y = Slice(r, s, e, a, t) }}""")
    net = mg.to_torch(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for shape in ((1, 3, 4), (2, 5, 4)):
        x = np.random.default_rng(0).standard_normal(shape).astype("f")
        np.testing.assert_array_equal(net(torch.from_numpy(x)), session.run(None, {"x": x})[0])


def test_a_slice_backwards_along_a_part_of_an_open_size_is_refused() -> None:
    model = model_from_text("""
        net (float[B,T,4] x) => (float[B,L,4] y)
        <int64[1] s = {5}, int64[1] e = {0}, int64[1] a = {1}, int64[1] t = {-1}>
        { r = Relu(x)  y = Slice(r, s, e, a, t) }""")
    with pytest.raises(mg.UnsupportedError, match="backwards along axis 1") as refused:
        mg.to_torch(model)
    assert "export the network without it" in str(refused.value)


@pytest.mark.parametrize("operand", ["", "m"])
def test_causal_attention_at_open_lengths_behind_a_past(operand: str) -> None:
    """What a query must not see depends on how long the past is, and how many are new."""
    generator = np.random.default_rng(0)
    kernels = {name: generator.normal(size=(8, 8)).astype(np.float32) for name in "abc"}
    heads: dict[str, Any] = {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1}
    nodes = [onnx.helper.make_node("MatMul", ["x", each], [f"{each}x"]) for each in "abc"]
    operands = ["ax", "bx", "cx", operand, "k", "v"]
    nodes.append(onnx.helper.make_node("Attention", operands, ["y", "K", "V"], **heads))
    sizes: dict[str, Any] = {"x": [1, "T", 8], "k": [1, 2, "P", 4], "v": [1, 2, "P", 4]}
    sizes |= {"m": ["T", "L"]} if operand else {}
    results: dict[str, Any] = {"y": [1, "T", 8], "K": [1, 2, "L", 4], "V": [1, 2, "L", 4]}
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in each.items()]
        for each in (sizes, results)
    )
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in kernels.items()]
    graph = onnx.helper.make_graph(nodes, "net", inputs, outputs, stored)
    opset = [onnx.helper.make_opsetid("", 23)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    net = mg.to_torch(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for new, past in ((3, 2), (5, 1), (1, 7), (4, 0)):
        feeds = {"x": generator.normal(size=(1, new, 8)).astype(np.float32)}
        feeds |= {k: generator.normal(size=(1, 2, past, 4)).astype(np.float32) for k in "kv"}
        mask = generator.normal(size=(new, past + new)).astype(np.float32)
        feeds |= {"m": mask} if operand else {}
        found = net(*(torch.from_numpy(array) for array in feeds.values()))
        for one, other in zip(found, session.run(None, feeds), strict=True):
            np.testing.assert_allclose(one.detach().numpy(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ('mode = "linear", antialias = 1', "mode linear with half_pixel, antialias on 2"),
        ('mode = "cubic", cubic_coeff_a = -0.5', "with half_pixel, cubic_coeff_a -0.5 on 2"),
    ],
)
def test_what_torch_does_not_resize_so_is_named(attributes: str, words: str) -> None:
    model = model_from_text(f"""net (float[1, 4, 8, 8] x) => (float[1, 4, 5, 5] y)
        <int64[4] to = {{1, 4, 5, 5}}> {{ y = Resize<{attributes}>(x, , , to) }}""")
    with pytest.raises(UnsupportedError, match=words):
        mg.to_torch(model)
