"""Networks that several parts of the tests look at."""

import onnx_ir as ir
import pytest

from morphgraph.testing import model_from_text

ATTENTION = """
net (float[2,5,8] x, float[8,12] wq, float[8,12] wk, float[8,12] wv, float[12,8] wo)
    => (float[2,5,8] y) <int64[4] heads = {2, 5, 3, 4}, float scale = {0.5}, int64[3] flat = {0, 0,
    -1}> { q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    qh = Reshape(q, heads)  kh = Reshape(k, heads)  vh = Reshape(v, heads)
    qt = Transpose<perm=[0,2,1,3]>(qh)  kt = Transpose<perm=[0,2,3,1]>(kh)
    vt = Transpose<perm=[0,2,1,3]>(vh)
    s = MatMul(qt, kt)  t = Mul(s, scale)  p = Softmax<axis=-1>(t)  z = MatMul(p, vt)
    zt = Transpose<perm=[0,2,1,3]>(z)  zf = Reshape(zt, flat)  y = MatMul(zf, wo)
}"""


@pytest.fixture
def attention_model() -> ir.Model:
    """An attention of three heads of size 4, written out."""
    return model_from_text(ATTENTION)
