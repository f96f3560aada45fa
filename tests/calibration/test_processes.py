"""Processes that share a calibration come to the plan and the weights of one."""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.arrays import Arrays, FloatArray
from morphgraph.calibration.processes import ALONE, Processes
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.plans import Plan
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import ShrinkResult, finish
from morphgraph.testing import model_from_text
from tests.passes.experts import FORMS, TOKENS

_Item = TypeVar("_Item")
ROOT = Path(__file__).parents[2]
DENSE = """net (float[N,8] x, float[8,40] a, float[40,40] b, float[40,3] c) => (float[N,3] y) {
  h = MatMul(x, a) r = Relu(h) g = MatMul(r, b) s = Sigmoid(g) y = MatMul(s, c) }"""
CONVOLVED = """net (float[N,3,6,6] x, float[12,3,3,3] a, float[10,12,3,3] b, float[4,10,1,1] c)
=> (float[N,4,2,2] y) { h = Conv(x, a) r = Relu(h) g = Conv(r, b) s = Relu(g) y = Conv(s, c) }"""
REPEATED = """net (float[N,8] x, float[8,20] a, float[20] ab, float[20,8] b, float[8,3] c)
=> (float[N,3] y) {
  h = MatMul(x, a) i = Add(h, ab) r = Relu(i) g = MatMul(r, b) s = Add(x, g)
  j = MatMul(s, a) k = Add(j, ab) t = Relu(k) m = MatMul(t, b) y = MatMul(m, c) }"""
LANGUAGE = """lm (int64[N,T] input_ids, float[20,8] table, float[8,24] up, float[24,8] down)
=> (float[N,T,20] logits) { x = Gather(table, input_ids) h = MatMul(x, up) r = Tanh(h)
  d = MatMul(r, down) s = Add(x, d) back = Transpose<perm=[1,0]>(table)
  logits = MatMul(s, back) }"""

NORMED = """net (float[N,6,8] x, float[8,16] wq, float[8,16] wk, float[8,16] wv, float[8] qs,
  float[8] ks, float[16,3] wo) => (float[N,6,3] y)
<int64[4] by_head = {0, 6, 2, 8}, int64[3] flat = {0, 6, 16}> {
  q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
  q1 = Reshape(q0, by_head) k1 = Reshape(k0, by_head) v1 = Reshape(v0, by_head)
  q2 = SimplifiedLayerNormalization<axis=-1>(q1, qs)
  k2 = SimplifiedLayerNormalization<axis=-1>(k1, ks)
  q = Transpose<perm=[0,2,1,3]>(q2) k = Transpose<perm=[0,2,3,1]>(k2)
  v = Transpose<perm=[0,2,1,3]>(v1)
  l = MatMul(q, k) p = Softmax<axis=-1>(l) a = MatMul(p, v) b = Transpose<perm=[0,2,1,3]>(a)
  c = Reshape(b, flat) y = MatMul(c, wo) }"""
TURNED = """<ir_version: 10, opset_import: ["": 23]>
lm (float[N,9,12] x, float[12,32] wq, float[12,32] wk, float[12,32] wv, float[32,12] wo,
    float[9,8] cos, float[9,8] sin) => (float[N,9,12] y)
<int64[4] heads = {0, 9, 4, 8}, int64[3] flat = {0, 9, 32}, float scale = {0.35}> {
  q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1)
  k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k = Transpose<perm=[0,2,1,3]>(k1)
  v0 = MatMul(x, wv) v1 = Reshape(v0, heads) v = Transpose<perm=[0,2,1,3]>(v1)
  qa, qb = Split<axis=-1, num_outputs=2>(q) qn = Neg(qb) qt = Concat<axis=-1>(qn, qa)
  qc = Mul(q, cos) qs = Mul(qt, sin) qr = Add(qc, qs)
  ka, kb = Split<axis=-1, num_outputs=2>(k) kn = Neg(kb) kt = Concat<axis=-1>(kn, ka)
  kc = Mul(k, cos) ks = Mul(kt, sin) kr = Add(kc, ks)
  turned = Transpose<perm=[0,1,3,2]>(kr) l = MatMul(qr, turned) s = Mul(l, scale)
  p = Softmax<axis=-1>(s) r = MatMul(p, v) r1 = Transpose<perm=[0,2,1,3]>(r)
  r2 = Reshape(r1, flat) o = MatMul(r2, wo) y = Add(o, x) }"""


class Forked(Processes):
    """A process of a test; its parent passes on what each has brought."""

    def __init__(self, rank: int, count: int, parent: Connection) -> None:
        self.rank, self.count, self.parent = rank, count, parent

    def total(self, array: FloatArray) -> FloatArray:
        return cast("FloatArray", np.sum(self.gather(array), axis=0))

    def gather(self, item: _Item) -> list[_Item]:
        self.parent.send((False, item))
        return cast("list[_Item]", self.parent.recv())


def shrunk(graph: mg.ChannelGraph, data: Arrays, processes: Processes) -> ShrinkResult:
    shrinker = Shrinker(graph, data, threads=1, processes=processes)
    shrinker.batch = 16
    return finish(shrinker, shrinker.plan({"params": "70%"}))


Found = tuple[dict[int, list[int]], list[int], Arrays]


def facts(made: ShrinkResult, graph: mg.ChannelGraph) -> Found:
    """Which channels stay, the places of every layer, the weights."""
    kept = {k: v.tolist() for k, v in made.plan.keep_channels(graph).items()}
    return kept, [each.places for each in made.layers], weights(made.model)


def together(count: int, work: Callable[[Processes], Found]) -> list[Found]:
    """What each of several processes comes to."""
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe() for _ in range(count)]

    def run(rank: int) -> None:
        here = ends[rank][1]
        here.send((True, work(Forked(rank, count, here))))

    children = [fork.Process(target=run, args=(rank,)) for rank in range(count)]
    for child in children:
        child.start()
    while True:
        for parent, _ in ends:
            assert parent.poll(60), "a process does not answer"
        brought = [parent.recv() for parent, _ in ends]
        if brought[0][0]:
            break
        for parent, _ in ends:
            parent.send([item for _, item in brought])
    for child in children:
        child.join()
    return [item for _, item in brought]


def weights(model: ir.Model) -> Arrays:
    stored = model.graph.initializers.items()
    return {name: v.const_value.numpy() for name, v in stored if v.const_value is not None}


@pytest.mark.parametrize(
    ("text", "shape", "count"),
    [
        (DENSE, (160, 8), 2),
        (DENSE, (40, 8), 3),
        (CONVOLVED, (96, 3, 6, 6), 2),
        (REPEATED, (160, 8), 2),
        (LANGUAGE, (80, 9), 2),
        (NORMED, (96, 6, 8), 2),
    ],
    ids=[
        "dense",
        "one has no batch",
        "convolutions",
        "a block twice",
        "language model",
        "norms of queries",
    ],
)
def test_several_come_to_what_one_comes_to(text: str, shape: tuple[int, ...], count: int) -> None:
    name = "input_ids" if text is LANGUAGE else "x"
    model = model_from_text(text, (name,))
    rng = np.random.default_rng(0)
    array = rng.integers(20, size=shape) if text is LANGUAGE else rng.normal(size=shape)
    data = {name: array.astype(np.int64 if text is LANGUAGE else np.float32)}
    graph = mg.lift(model, attention="head-dim")

    def work(processes: Processes) -> Found:
        return facts(shrunk(graph, data, processes), graph)

    found = together(count, work)
    kept, places, wanted = work(ALONE)
    assert len(found) == count
    for each in found:
        assert each[:2] == (kept, places)
        for key, weight in each[2].items():
            np.testing.assert_allclose(weight, wanted[key], rtol=1e-3, atol=2e-4)


def test_several_come_to_the_factors_of_turned_queries_of_one() -> None:
    model = model_from_text(TURNED)
    angles = np.outer(np.arange(9), 0.7 ** np.arange(4))
    for name, table in {"cos": np.cos(angles), "sin": np.sin(angles)}.items():
        both = np.tile(table, 2).astype(np.float32)
        model.graph.initializers[name].const_value = ir.tensor(both, name=name)
    graph = mg.lift(model, attention="head-dim")
    rng = np.random.default_rng(0)
    # Of few dimensions, so that pairs of elements can stand for others.
    x = rng.normal(size=(60, 9, 3)) @ rng.normal(size=(3, 12))
    bounds = WidthBounds(1, include=["MatMul_q0*"])

    def work(processes: Processes) -> Found:
        given = {"x": x.astype(np.float32)}
        shrinker = Shrinker(graph, given, bounds=bounds, threads=1, processes=processes)
        shrinker.batch = 4
        return facts(finish(shrinker, shrinker.plan({"params": "80%"})), graph)

    found = together(2, work)
    kept, places, wanted = work(ALONE)
    columns = [head * 8 + e for head in range(4) for pair in kept[1] for e in (pair, pair + 4)]
    assert 0 < len(columns) < 32
    sliced = weights(model)["wq"][:, np.sort(columns)]
    assert np.abs(wanted["wq"] - sliced).max() > 0.01  # there are factors
    for each in found:
        assert each[:2] == (kept, places)
        for key, weight in each[2].items():
            np.testing.assert_allclose(weight, wanted[key], rtol=1e-3, atol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["language model", "mixture of experts"])
def test_torchrun_writes_what_one_process_writes(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    if kind == "language model":
        ir.save(model_from_text(LANGUAGE, ("input_ids",)), tmp_path / "net.onnx")
        np.savez(tmp_path / "data.npz", input_ids=rng.integers(20, size=(300, 9)))
    else:
        onnx.save(FORMS["softmax first"](), tmp_path / "net.onnx")
        np.savez(tmp_path / "data.npz", x=rng.normal(size=(100 * TOKENS, 3)).astype(np.float32))
    command = [
        *("-m", "morphgraph", "shrink", "net.onnx", "--data", "data.npz", "--budget", "params=70%"),
        *("-o", "OUT.onnx", "--plan", "OUT.json"),
    ]
    launched = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", _port())
    for out, before in (("one", ()), ("two", launched)):
        given = [word.replace("OUT", out) for word in command]
        made = subprocess.run(
            [sys.executable, *before, *given],
            cwd=tmp_path,
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        assert made.stdout.count("What to expect") == 1  # the second process is silent
    one, two = (Plan.load(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one.groups == two.groups
    wanted = weights(ir.load(tmp_path / "one.onnx"))
    for name, weight in weights(ir.load(tmp_path / "two.onnx")).items():
        np.testing.assert_allclose(weight, wanted[name], rtol=1e-3, atol=2e-4)


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
