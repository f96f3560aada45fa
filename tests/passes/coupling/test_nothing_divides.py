"""Attributes by which channels are shared out are never 0: refused in one line."""

import onnx
import pytest

import morphgraph as mg
from morphgraph.errors import MorphError

NODES = {
    "Conv": ("Conv <group = 0> (x, w)", "float[8,8,3,3] w"),
    "ConvTranspose": ("ConvTranspose <group = 0> (x, w)", "float[8,8,3,3] w"),
    "ConvInteger": ("ConvInteger <group = 0> (i, v)", "uint8[1,8,6,6] i, uint8[8,8,3,3] v"),
    "DepthToSpace": ("DepthToSpace <blocksize = 0> (x)", ""),
    "SpaceToDepth": ("SpaceToDepth <blocksize = 0> (x)", ""),
    "GroupNormalization": ("GroupNormalization <num_groups = 0> (x, s, s)", "float[8] s"),
    "FusedConv": ("com.microsoft.FusedConv <group = 0> (x, w)", "float[8,8,3,3] w"),
    "MultiHeadAttention": (
        "com.microsoft.MultiHeadAttention <num_heads = 0> (q, q, q)",
        "float[1,4,8] q",
    ),
    "GroupQueryAttention": (
        "com.microsoft.GroupQueryAttention <num_heads = 0, kv_num_heads = 0> (q, q, q, , , n, n)",
        "float[1,4,8] q, int32[1] n",
    ),
}


@pytest.mark.parametrize("kind", NODES)
def test_a_zero_is_refused(kind: str) -> None:
    call, more = NODES[kind]
    given = ", ".join(["float[1,8,6,6] x", *([more] if more else [])])
    head = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{head} net ({given}) => (y) {{ y = {call} }}")
    with pytest.raises(MorphError) as caught:
        mg.lift(proto)
    assert "\n" not in str(caught.value)
