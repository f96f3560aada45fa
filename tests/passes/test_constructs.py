"""One construct a network: resized equals masked, and the groups are as a person would say."""

import pytest

from morphgraph.graph import ChannelGraph
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text, prove

OPSET_21 = '<ir_version: 10, opset_import: ["": 21]>'

# Every network: inputs x, weights as further inputs. `widths` are those of the resizable groups.
NETWORKS: dict[str, tuple[str, list[int]]] = {
    "dense": (
        """net (float[1,3,6,6] x, float[8,3,3,3] w1, float[8] b1, float[5,8,3,3] w2, float[2,5,1,1]
        w3) => (float[1,2,2,2] y) {
            a = Conv(x, w1, b1)  ra = Relu(a)  b = Conv(ra, w2)  y = Conv(b, w3)
        }""",
        [8, 5],
    ),
    "batch norm": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8] s, float[8] h, float[8] m, float[8] v,
             float[2,8,1,1] w2) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  n = BatchNormalization(a, s, h, m, v)  r = Relu(n)  y = Conv(r, w2)
        }""",
        [8],
    ),
    "residual": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[5,6,3,3] w2, float[6,5,1,1] w3,
             float[2,6,1,1] w4) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  b = Conv<pads=[1,1,1,1]>(a, w2)  rb = Relu(b)  c = Conv(rb, w3)
            d = Add(a, c)  e = Relu(d)  y = Conv(e, w4)
        }""",
        [6, 5],
    ),
    "grouped": (
        """net (float[1,3,4,4] x, float[12,3,1,1] w1, float[8,3,1,1] w2, float[2,8,1,1] w3)
        => (float[1,2,4,4] y) {
            a = Conv(x, w1)  ra = Relu(a)  b = Conv<group=4>(ra, w2)  rb = Relu(b)  y = Conv(rb, w3)
        }""",
        [3, 2],
    ),
    "4 groups feed 6": (
        """net (float[1,3,4,4] x, float[16,3,1,1] w0, float[24,4,1,1] w1, float[12,4,1,1] w2,
             float[2,12,1,1] w3) => (float[1,2,4,4] y) {
            a = Conv(x, w0)  b = Conv<group=4>(a, w1)  rb = Relu(b)
            c = Conv<group=6>(rb, w2)  rc = Relu(c)  y = Conv(rc, w3)
        }""",
        [4, 2, 2],
    ),
    "depthwise": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8,1,3,3] w2, float[8] b2, float[2,8,1,1]
        w3) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  ra = Relu(a)  b = Conv<group=8, pads=[1,1,1,1]>(ra, w2, b2)
            rb = Relu(b)  y = Conv(rb, w3)
        }""",
        [8],
    ),
    "depthwise, multiplier 2": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[12,1,3,3] w2, float[2,12,1,1] w3)
        => (float[1,2,2,2] y) {
            a = Conv(x, w1)  b = Conv<group=6>(a, w2)  rb = Relu(b)  y = Conv(rb, w3)
        }""",
        [6],
    ),
    "depthwise on the input, multiplier 4": (
        """net (float[1,3,4,4] x, float[12,1,3,3] w1, float[2,12,1,1] w2) => (float[1,2,2,2] y) {
            a = Conv<group=3>(x, w1)  ra = Relu(a)  y = Conv(ra, w2)
        }""",
        [4],
    ),
    "transposed": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6,5,2,2] w2, float[5] b2, float[2,5,1,1]
        w3) => (float[1,2,8,8] y) {
            a = Conv(x, w1)  ra = Relu(a)  b = ConvTranspose<strides=[2,2]>(ra, w2, b2)
            rb = Relu(b)  y = Conv(rb, w3)
        }""",
        [6, 5],
    ),
    "transposed, grouped": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6,4,2,2] w2, float[2,8,1,1] w3)
        => (float[1,2,8,8] y) {
            a = Conv(x, w1)  ra = Relu(a)  b = ConvTranspose<strides=[2,2], group=2>(ra, w2)
            rb = Relu(b)  y = Conv(rb, w3)
        }""",
        [3, 4],
    ),
    "transposed, depthwise": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6,1,2,2] w2, float[2,6,1,1] w3)
        => (float[1,2,8,8] y) {
            a = Conv(x, w1)  ra = Relu(a)  b = ConvTranspose<strides=[2,2], group=6>(ra, w2)
            rb = Relu(b)  y = Conv(rb, w3)
        }""",
        [6],
    ),
    "channel shuffle": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8,1,3,3] w2, float[6,8,1,1] w3,
             float[2,6,1,1] w4) => (float[1,2,4,4] y)
        <int64[5] five = {1, 2, 4, 4, 4}, int64[4] four = {1, 8, 4, 4}> {
            a = Conv(x, w1)  b = Reshape(a, five)  c = Transpose<perm=[0,2,1,3,4]>(b)
            d = Reshape(c, four)  e = Conv<group=8, pads=[1,1,1,1]>(d, w2)  re = Relu(e)
            f = Conv(re, w3)  rf = Relu(f)  y = Conv(rf, w4)
        }""",
        [4, 6],
    ),
    "unequal split": (
        """net (float[1,3,4,4] x, float[10,3,1,1] w1, float[5,3,1,1] w2, float[5,7,1,1] w3,
             float[2,5,1,1] w4) => (float[1,2,4,4] y) <int64[2] parts = {3, 7}> {
            a = Conv(x, w1)  ra = Relu(a)  p, q = Split<axis=1>(ra, parts)
            b = Conv(p, w2)  c = Conv(q, w3)  d = Add(b, c)  rd = Relu(d)  y = Conv(rd, w4)
        }""",
        [7, 3, 5],
    ),
    "even split by number": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2,4,1,1] w2, float[2,4,1,1] w3)
        => (float[1,2,4,4] y) {
            a = Conv(x, w1)  ra = Relu(a)  p, q = Split<axis=1, num_outputs=2>(ra)
            b = Conv(p, w2)  c = Conv(q, w3)  y = Add(b, c)
        }""",
        [4, 4],
    ),
    "split with parts of size 0": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2,8,1,1] w2) => (float[1,2,4,4] y)
        <int64[3] parts = {8, 0, 0}> {
            a = Conv(x, w1)  p, q, r = Split<axis=1>(a, parts)  c = Concat<axis=1>(q, p, r)
            rc = Relu(c)  y = Conv(rc, w2)
        }""",
        [8],
    ),
    "concat": (
        """net (float[1,3,4,4] x, float[5,3,1,1] w1, float[7,3,1,1] w2, float[6,12,1,1] w3,
             float[2,6,1,1] w4) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  b = Conv(x, w2)  c = Concat<axis=1>(a, b)  rc = Relu(c)
            d = Conv(rc, w3)  rd = Relu(d)  y = Conv(rd, w4)
        }""",
        [5, 7, 6],
    ),
    "concat with the input": (
        """net (float[1,3,4,4] x, float[5,3,1,1] w1, float[2,8,1,1] w2) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  ra = Relu(a)  b = Concat<axis=-3>(x, ra)  y = Conv(b, w2)
        }""",
        [5],
    ),
    "concat crossing an add": (
        """net (float[1,3,4,4] x, float[5,3,1,1] w1, float[7,3,1,1] w2, float[7,3,1,1] w3,
             float[5,3,1,1] w4, float[2,12,1,1] w5) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  b = Conv(x, w2)  c = Concat<axis=1>(a, b)
            d = Conv(x, w3)  e = Conv(x, w4)  f = Concat<axis=1>(d, e)
            g = Add(c, f)  rg = Relu(g)  y = Conv(rg, w5)
        }""",
        [5, 2, 5],
    ),
    "c2f": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[4,4,3,3] w2, float[4,4,3,3] w3,
             float[6,12,1,1] w4, float[2,6,1,1] w5) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  ra = Relu(a)  p, q = Split<axis=1, num_outputs=2>(ra)
            b = Conv<pads=[1,1,1,1]>(q, w2)  rb = Relu(b)  c = Conv<pads=[1,1,1,1]>(rb, w3)
            d = Add(q, c)  e = Concat<axis=1>(p, q, d)  f = Conv(e, w4)  rf = Relu(f)
            y = Conv(rf, w5)
        }""",
        [4, 4, 4, 6],
    ),
    "tied weights": (
        """net (float[1,4,4,4] x, float[6,4,1,1] w0, float[6,6,3,3] w1, float[2,6,1,1] w2)
        => (float[1,2,4,4] y) {
            a = Conv(x, w0)  ra = Relu(a)  b = Conv<pads=[1,1,1,1]>(ra, w1)  rb = Relu(b)
            c = Conv<pads=[1,1,1,1]>(rb, w1)  rc = Relu(c)  y = Conv(rc, w2)
        }""",
        [6],
    ),
    "a layer used on two tensors": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w0, float[6,3,1,1] w1, float[5,6,1,1] w2,
             float[2,5,1,1] w3) => (float[1,2,4,4] y) {
            a = Conv(x, w0)  b = Conv(x, w1)  c = Conv(a, w2)  d = Conv(b, w2)
            rc = Relu(c)  rd = Sigmoid(d)  e = Mul(rc, rd)  y = Conv(e, w3)
        }""",
        [6, 5],
    ),
    "glu": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2,4,1,1] w2) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  p, q = Split<axis=1, num_outputs=2>(a)
            g = Sigmoid(q)  m = Mul(p, g)  y = Conv(m, w2)
        }""",
        [4],
    ),
    "padded shortcut (option A)": (
        """net (float[1,3,4,4] x, float[4,3,1,1] w1, float[8,4,1,1] w2, float[2,8,1,1] w3)
        => (float[1,2,4,4] y) <int64[8] pads = {0, 2, 0, 0, 0, 2, 0, 0}> {
            a = Conv(x, w1)  ra = Relu(a)  b = Conv(ra, w2)  p = Pad(ra, pads)
            c = Add(b, p)  rc = Relu(c)  y = Conv(rc, w3)
        }""",
        [4, 4],
    ),
    "padded with a constant that is not 0": (
        """net (float[1,3,4,4] x, float[4,3,1,1] w1, float[2,9,1,1] w2) => (float[1,2,4,4] y)
        <int64[2] pads = {2, 3}, float value = {0.7}, int64[1] axes = {1}> {
            a = Conv(x, w1)  ra = Relu(a)  p = Pad(ra, pads, value, axes)  y = Conv(p, w2)
        }""",
        [4, 5],
    ),
    "permuted by gather": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6,1,1,1] w2, float[2,6,1,1] w3)
        => (float[1,2,4,4] y) <int64[6] order = {4, 0, -1, 2, 1, 3}> {
            a = Conv(x, w1)  b = Gather<axis=1>(a, order)  c = Conv<group=6>(b, w2)  rc = Relu(c)
            y = Conv(rc, w3)
        }""",
        [6],
    ),
    "picked by gather": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,4,1,1] w2, float[2,6,1,1] w3)
        => (float[1,2,4,4] y) <int64[4] chosen = {5, 0, 0, 2}> {
            a = Conv(x, w1)  ra = Relu(a)  b = Gather<axis=1>(ra, chosen)
            c = Conv(b, w2)  d = Conv(ra, w3)  y = Add(c, d)
        }""",
        [3, 2, 1],
    ),
    "sliced backwards": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[1,2,4,4] y)
        <int64[1] start = {-1}, int64[1] stop = {-9223372036854775807}, int64[1] axis = {1},
         int64[1] step = {-1}> {
            a = Conv(x, w1)  ra = Relu(a)  b = Slice(ra, start, stop, axis, step)
            s = Sigmoid(b)  c = Add(ra, s)  rc = Relu(c)  y = Conv(rc, w2)
        }""",
        [3],
    ),
    "sliced with a stride": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2,4,1,1] w2, float[2,8,1,1] w3)
        => (float[1,2,4,4] y)
        <int64[1] start = {1}, int64[1] stop = {8}, int64[1] axis = {1}, int64[1] step = {2}> {
            a = Conv(x, w1)  ra = Relu(a)  b = Slice(ra, start, stop, axis, step)
            c = Conv(b, w2)  d = Conv(ra, w3)  y = Add(c, d)
        }""",
        [4, 4],
    ),
    "sliced with a stride on two axes": (
        """net (float[1,3,4,4] x, float[11,3,1,1] w1, float[2,5,1,1] w2, float[2,11,2,1] w3)
        => (float[1,2,2,4] y)
        <int64[2] from = {1, 0}, int64[2] to = {11, 4}, int64[2] at = {1, 2}, int64[2] by = {2, 2}>
        {
            a = Conv(x, w1)  b = Relu(a)  s = Slice(b, from, to, at, by)  c = Conv(s, w2)
            d = Conv<strides=[2,1]>(b, w3)  y = Add(c, d)
        }""",
        [6, 5],
    ),
    "flatten to linear": (
        """net (float[2,3,4,4] x, float[6,3,3,3] w1, float[5,24] w2, float[5] b2, float[3,5] w3)
        => (float[2,3] y) {
            a = Conv(x, w1)  ra = Relu(a)  f = Flatten<axis=1>(ra)
            l = Gemm<transB=1>(f, w2, b2)  rl = Relu(l)  y = Gemm<transB=1>(rl, w3)
        }""",
        [6, 5],
    ),
    "flatten by reshape, channels last": (
        """net (float[2,3,4,4] x, float[6,3,3,3] w1, float[24,5] w2, float[5,3] w3)
        => (float[2,3] y) <int64[2] flat = {2, -1}> {
            a = Conv(x, w1)  ra = Relu(a)  t = Transpose<perm=[0,2,3,1]>(ra)
            f = Reshape(t, flat)  l = Gemm(f, w2)  rl = Relu(l)  y = MatMul(rl, w3)
        }""",
        [6, 5],
    ),
    "squeeze and excite": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[4,8,1,1] w2, float[4] b2, float[8,4,1,1]
        w3,
             float[2,8,1,1] w4) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  ra = Relu(a)  g = GlobalAveragePool(ra)  s = Conv(g, w2, b2)
            rs = Relu(s)  e = Conv(rs, w3)  z = Sigmoid(e)  m = Mul(ra, z)  y = Conv(m, w4)
        }""",
        [8, 4],
    ),
    "prelu and a buffer that scales channels": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6,1,1] slope, float[1,6,1,1] scale,
             float[2,6,1,1] w2) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  p = PRelu(a, slope)  m = Mul(p, scale)  y = Conv(m, w2)
        }""",
        [6],
    ),
    "broadcast add": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[1,3,1,1] w2, float[2,6,1,1] w3)
        => (float[1,2,4,4] y) {
            a = Conv(x, w1)  b = Conv(x, w2)  c = Add(a, b)  rc = Relu(c)  y = Conv(rc, w3)
        }""",
        [6],
    ),
    "channels last": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6] g, float[6] h, float[6,5] w2, float[5]
        b2,
             float[2,5,1,1] w3) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  t = Transpose<perm=[0,2,3,1]>(a)  n = LayerNormalization(t, g, h)
            l = MatMul(n, w2)  lb = Add(l, b2)  r = Gelu(lb)  u = Transpose<perm=[0,3,1,2]>(r)
            y = Conv(u, w3)
        }""",
        [6, 5],
    ),
    "conv 1d": (
        """net (float[1,3,9] x, float[6,3,3] w1, float[4,3,3] w2, float[2,4,1] w3) => (float[1,2,5]
        y) {
            a = Conv(x, w1)  ra = Relu(a)  b = Conv<group=2>(ra, w2)  rb = Relu(b)  y = Conv(rb, w3)
        }""",
        [3, 2],
    ),
    "conv 3d": (
        """net (float[1,2,4,4,4] x, float[6,2,3,3,3] w1, float[2,6,1,1,1] w2) => (float[1,2,2,2,2]
        y) {
            a = Conv(x, w1)  ra = Relu(a)  y = Conv(ra, w2)
        }""",
        [6],
    ),
    "group norm": (
        OPSET_21
        + """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8] s, float[8] h, float[2,8,1,1] w2)
        => (float[1,2,4,4] y) {
            a = Conv(x, w1)  n = GroupNormalization<num_groups=2>(a, s, h)  y = Conv(n, w2)
        }""",
        [2],
    ),
    "group norm of which the result is padded": (
        OPSET_21
        + """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[8] s, float[8] h, float[2,10,1,1] w2)
        => (float[1,2,4,4] y) <int64[8] pads = {0, 1, 0, 0, 0, 1, 0, 0}> {
            a = Conv(x, w1)  n = GroupNormalization<num_groups=1>(a, s, h)  p = Pad(n, pads)
            y = Conv(p, w2)
        }""",
        [8, 2],
    ),
    "group norm by reshape": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[4] one, float[4] zero, float[8,1,1] s,
             float[8,1,1] h, float[2,8,1,1] w2) => (float[1,2,4,4] y)
        <int64[3] three = {1, 4, -1}, int64[4] four = {1, 8, 4, 4}> {
            a = Conv(x, w1)  r = Reshape(a, three)  n = InstanceNormalization(r, one, zero)
            u = Reshape(n, four)  m = Mul(u, s)  b = Add(m, h)  rb = Relu(b)  y = Conv(rb, w2)
        }""",
        [4],
    ),
    "group norm, one scale per group": (
        """net (float[1,3,4,4] x, float[8,3,1,1] w1, float[2] s, float[2] h, float[2,8,1,1] w2)
        => (float[1,2,4,4] y) {
            a = Conv(x, w1)  n = GroupNormalization<num_groups=2>(a, s, h)  y = Conv(n, w2)
        }""",
        [2],
    ),
    "rms norm, written out": (
        """net (float[2,5,3] x, float[3,6] w1, float[6] g, float[6,2] w2) => (float[2,5,2] y)
        <float two = {2.0}, float tiny = {0.01}, int64[1] last = {-1}> {
            a = MatMul(x, w1)  p = Pow(a, two)  m = ReduceMean(p, last)  e = Add(m, tiny)
            s = Sqrt(e)  r = Reciprocal(s)  n = Mul(a, r)  f = Mul(n, g)  y = MatMul(f, w2)
        }""",
        [6],
    ),
    "normalized by a norm": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  n = LpNormalization<axis=1, p=1>(a)  y = Conv(n, w2)
        }""",
        [6],
    ),
    "mean and variance over channels and space": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  n = MeanVarianceNormalization<axes=[1,2,3]>(a)  y = Conv(n, w2)
        }""",
        [6],
    ),
    "einsum": (
        """net (float[2,5,3] x, float[6,3] w1, float[4,6] w2, float[4] s, float[2,4] w3)
        => (float[2,5,2] y) {
            a = Einsum<equation="bti,oi->bto">(x, w1)  ra = Relu(a)
            b = Einsum<equation="...I,oI">(ra, w2)  rb = Relu(b)
            c = Einsum<equation="nTC,C->nTC">(rb, s)  y = Einsum<equation="...i,oi->...o">(c, w3)
        }""",
        [6, 4],
    ),
    "einsum of three, with a sum of one": (
        """net (float[2,5,3] x, float[3,6] u, float[3,6,4] v, float[6,4,2] w) => (float[2,2] y) {
            y = Einsum<equation="bti,io,ioe,oef->bf">(x, u, v, w)
        }""",
        [6, 4],
    ),
    "matmul with a raw parameter": (
        """net (float[2,5,3] x, float[3,6] w1, float[6,4] w2, float[4,2] w3) => (float[2,5,2] y) {
            a = MatMul(x, w1)  ra = Relu(a)  b = MatMul(ra, w2)  rb = Relu(b)  y = MatMul(rb, w3)
        }""",
        [6, 4],
    ),
    "linear on three axes, transposed": (
        """net (float[2,5,3] x, float[6,3] w1, float[6] b1, float[2,6] w2) => (float[2,5,2] y) {
            t1 = Transpose<perm=[1,0]>(w1)  a = MatMul(x, t1)  b = Add(a, b1)  r = Relu(b)
            t2 = Transpose<perm=[1,0]>(w2)  y = MatMul(r, t2)
        }""",
        [6],
    ),
    "a weight read in both directions": (
        """net (float[2,4] x, float[6,4] w, float[6] b) => (float[2,4] y) {
            a = Gemm<transB=1>(x, w, b)  r = Sigmoid(a)  y = Gemm(r, w)
        }""",
        [6],
    ),
    "embedding": (
        """net (int64[2,5] x, float[9,6] table, float[6] g, float[6] h, float[6,3] w)
        => (float[2,5,3] y) {
            a = Gather(table, x)  n = LayerNormalization(a, g, h)  y = MatMul(n, w)
        }""",
        [6],
    ),
    "positions added": (
        """net (float[2,5,3] x, float[3,6] w1, float[1,5,6] position, float[1,1,6] token,
             float[6,2] w2)
        => (float[2,6,2] y) <int64[3] shape = {2, 1, 6}> {
            a = MatMul(x, w1)  p = Add(a, position)  t = Expand(token, shape)
            c = Concat<axis=1>(t, p)  r = Gelu(c)  y = MatMul(r, w2)
        }""",
        [6],
    ),
    "softmax over channels": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[1,2,4,4] y) {
            a = Conv(x, w1)  s = Softmax<axis=1>(a)  y = Conv(s, w2)
        }""",
        [6],
    ),
    "spatial attention by mean and max": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[1,2,1,1] w2, float[2,6,1,1] w3)
        => (float[1,2,4,4] y) <int64[1] axes = {1}> {
            a = Conv(x, w1)  m = ReduceMean(a, axes)  k = ReduceMax(a, axes)
            c = Concat<axis=1>(m, k)  d = Conv(c, w2)  s = Sigmoid(d)  e = Mul(a, s)  y = Conv(e,
            w3)
        }""",
        [6],
    ),
    "norm over channels": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[1,2,4,4] y)
        <int64[1] axes = {1}> {
            a = Conv(x, w1)  n = ReduceL2(a, axes)  d = Div(a, n)  y = Conv(d, w2)
        }""",
        [6],
    ),
    "weight norm": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[6,1,1,1] g1, float[5,6,1,1] w2,
             float[5,1,1,1] g2, float[2,5,1,1] w3) => (float[1,2,4,4] y)
        <int64[3] axes = {1, 2, 3}> {
            n1 = ReduceL2(w1, axes)  d1 = Div(w1, n1)  v1 = Mul(d1, g1)  a = Conv(x, v1)
            ra = Relu(a)  n2 = ReduceL2(w2, axes)  d2 = Div(w2, n2)  v2 = Mul(d2, g2)
            b = Conv(ra, v2)  rb = Relu(b)  y = Conv(rb, w3)
        }""",
        [6, 5],
    ),
    "pixel shuffle": (
        """net (float[1,3,4,4] x, float[12,3,1,1] w1, float[2,3,1,1] w2) => (float[1,2,8,8] y)  {
            a = Conv(x, w1)  b = DepthToSpace<blocksize=2, mode="CRD">(a)  rb = Relu(b)
            y = Conv(rb, w2)
        }""",
        [3],
    ),
    "space to depth": (
        """net (float[1,3,4,4] x, float[5,3,1,1] w1, float[2,20,1,1] w2) => (float[1,2,2,2] y)  {
            a = Conv(x, w1)  ra = Relu(a)  b = SpaceToDepth<blocksize=2>(ra)  y = Conv(b, w2)
        }""",
        [5],
    ),
    "upsampled": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[1,2,8,8] y)
        <float[4] scales = {1, 1, 2, 2}> {
            a = Conv(x, w1)  u = Resize<mode="nearest">(a, , scales)  r = Relu(u)  y = Conv(r, w2)
        }""",
        [6],
    ),
    "upsampled to a size": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2) => (float[1,2,8,8] y)
        <int64[4] sizes = {1, 6, 8, 8}> {
            a = Conv(x, w1)  u = Resize<mode="linear">(a, , , sizes)  r = Relu(u)  y = Conv(r, w2)
        }""",
        [6],
    ),
    "expanded": (
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[1,3,1,1] w2, float[2,6,1,1] w3)
        => (float[1,2,4,4] y) <int64[4] shape = {1, 6, 4, 4}> {
            a = Conv(x, w1)  b = Conv(x, w2)  e = Expand(b, shape)  m = Mul(a, e)  y = Conv(m, w3)
        }""",
        [6],
    ),
    "tiled": (
        """net (float[1,3,4,4] x, float[4,3,1,1] w1, float[2,8,1,1] w2) => (float[1,2,4,4] y)
        <int64[4] repeats = {1, 2, 1, 1}> {
            a = Conv(x, w1)  ra = Relu(a)  t = Tile(ra, repeats)  y = Conv(t, w2)
        }""",
        [4],
    ),
    "tiled, of size 1": (  # as many copies as their readers have channels
        """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[1,3,1,1] w2, float[2,6,1,1] w3)
        => (float[1,2,4,4] y) <int64[4] repeats = {1, 6, 1, 1}> {
            a = Conv(x, w1)  b = Conv(x, w2)  t = Tile(b, repeats)  m = Mul(a, t)  y = Conv(m, w3)
        }""",
        [6],
    ),
    "tiled, what may not go": (  # whole copies of the input do
        """net (float[1,3,4,4] x, float[12,3,1,1] w1, float[2,12,1,1] w2) => (float[1,2,4,4] y)
        <int64[4] repeats = {1, 4, 1, 1}> {
            t = Tile(x, repeats)  a = Conv(x, w1)  m = Mul(a, t)  y = Conv(m, w2)
        }""",
        [4],
    ),
    "unbind": (
        """net (float[1,3,4] x, float[8,3,1] w1, float[2,4,1] w2) => (float[1,2,4] y)
        <int64[4] four = {1, 4, 2, 4}, int64[1] axis = {2}> {
            a = Conv(x, w1)  r = Reshape(a, four)  p, q = Split<axis=2, num_outputs=2>(r)
            ps = Squeeze(p, axis)  qs = Squeeze(q, axis)  g = Sigmoid(qs)  m = Mul(ps, g)
            y = Conv(m, w2)
        }""",
        [4],
    ),
    "lstm": (
        """net (float[5,2,3] x, float[1,24,3] w, float[1,24,6] r, float[1,48] b, float[6,4] w2)
        => (float[5,1,2,4] y) {
            a = LSTM<hidden_size=6>(x, w, r, b)  y = MatMul(a, w2)
        }""",
        [6],
    ),
    "gru, its last state only": (
        """net (float[5,2,3] x, float[1,18,3] w, float[1,18,6] r, float[1,36] b, float[6,4] w2)
        => (float[1,2,4] y) {
            , a = GRU<hidden_size=6>(x, w, r, b)  y = MatMul(a, w2)
        }""",
        [6],
    ),
    "gru, linear before reset": (
        """net (float[5,2,3] x, float[1,18,3] w, float[1,18,6] r, float[1,36] b, float[6,4] w2)
        => (float[5,1,2,4] y) {
            a = GRU<hidden_size=6, linear_before_reset=1>(x, w, r, b)  y = MatMul(a, w2)
        }""",
        [6],
    ),
    "rnn, two of unequal size": (
        """net (float[5,2,3] x, float[1,6,3] w, float[1,6,6] r, float[1,5,6] w2, float[1,5,5] r2,
             float[5,4] w3) => (float[5,1,2,4] y) <int64[1] axis = {1}> {
            a = RNN<hidden_size=6>(x, w, r)  s = Squeeze(a, axis)
            b = RNN<hidden_size=5, activations=["Relu"]>(s, w2, r2)  y = MatMul(b, w3)
        }""",
        [6, 5],
    ),
    "both directions, stacked": (
        """net (float[5,2,3] x, float[2,24,3] w, float[2,24,6] r, float[2,48] b, float[2,20,12] w2,
             float[2,20,5] r2, float[2,40] b2, float[10,4] w3) => (float[5,2,4] y)
        <int64[3] flat = {0, 0, -1}> {
            a = LSTM<hidden_size=6, direction="bidirectional">(x, w, r, b)
            t = Transpose<perm=[0,2,1,3]>(a)  s = Reshape(t, flat)
            c = LSTM<hidden_size=5, direction="bidirectional">(s, w2, r2, b2)
            u = Transpose<perm=[0,2,1,3]>(c)  v = Reshape(u, flat)  y = MatMul(v, w3)
        }""",
        [6, 5],
    ),
    "lstm in every form": (
        """net (float[5,2,3] x, float[1,24,3] w, float[1,24,6] r, float[1,48] b, float[1,2,6] h0,
             float[1,2,6] c0, float[1,18] p, float[6,4] w2) => (float[5,1,2,4] y)
        <int32[2] steps = {3, 5}> {
            a, h, c = LSTM<hidden_size=6, direction="reverse", clip=2.0, input_forget=1,
                activations=["HardSigmoid", "Softsign", "Elu"]>(x, w, r, b, steps, h0, c0, p)
            s = Add(h, c)  z = Mul(a, s)  y = MatMul(z, w2)
        }""",
        [6],
    ),
    "states from elsewhere": (
        """net (float[5,2,3] x, float[3,6] w1, float[1,24,3] w, float[1,24,6] r, float[1,18,6] w2,
             float[1,18,6] r2, float[6,4] w3) => (float[5,1,2,4] y)
        <int64[1] axis = {0}, int64[1] one = {1}> {
            m = ReduceMean<keepdims=1>(x, axis)  h0 = MatMul(m, w1)
            a, h, c = LSTM<hidden_size=6>(x, w, r, , , h0, h0)  s = Squeeze(a, one)
            b = GRU<hidden_size=6>(s, w2, r2, , , h)  y = MatMul(b, w3)
        }""",
        [6],
    ),
    "gates in another order": (
        """net (float[5,2,3] x, float[18,3] w, float[18,6] r, float[6,4] w2) => (float[5,1,2,4] y)
        <int64[1] axis = {0}, int64[3] parts = {6, 6, 6}> {
            w0, w1, w3 = Split<axis=0>(w, parts)  r0, r1, r3 = Split<axis=0>(r, parts)
            wj = Concat<axis=0>(w1, w0, w3)  rj = Concat<axis=0>(r1, r0, r3)
            wu = Unsqueeze(wj, axis)  ru = Unsqueeze(rj, axis)
            a = GRU<hidden_size=6>(x, wu, ru)  y = MatMul(a, w2)
        }""",
        [6],
    ),
    "an embedding, tied to the output": (
        """net (int64[5,2] x, float[9,6] table, float[1,20,6] w, float[1,20,5] r, float[5,6] w2)
        => (float[5,2,9] y) <int64[1] axis = {1}> {
            e = Gather(table, x)  a = LSTM<hidden_size=5>(e, w, r)  s = Squeeze(a, axis)
            o = MatMul(s, w2)  t = Transpose<perm=[1,0]>(table)  y = MatMul(o, t)
        }""",
        [6, 5],
    ),
}


def graph_of(name: str) -> ChannelGraph:
    return lift(model_from_text(NETWORKS[name][0]))


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_and_slices(name: str) -> None:
    graph = graph_of(name)
    assert [group.width for group in graph.groups if group.resizable] == NETWORKS[name][1]
    prove(graph, faults=100)
