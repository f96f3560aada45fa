"""``bench`` on chains of matrix products, whose cost is known, in ONNX Runtime."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.benchmark.sessions import random_feeds
from morphgraph.runtimes import find_runtime


def _chain(
    products: int,
    batch: int | str = 64,
    name: str = "chain",
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Model:
    """So many products with one 128x128 matrix, one after the other."""
    x = ir.val("x", dtype=dtype, shape=[batch, 128])
    weight = np.random.default_rng(0).standard_normal((128, 128)) / 12
    w = ir.val("w", const_value=ir.tensor(weight.astype(dtype.numpy()), name="w"))
    nodes: list[ir.Node] = []
    value = x
    for index in range(products):
        nodes.append(ir.node("MatMul", [value, w], name=f"product{index}"))
        value = nodes[-1].outputs[0]
        value.name = f"y{index}"
        value.dtype, value.shape = dtype, ir.Shape([batch, 128])
    graph = ir.Graph([x], [value], nodes=nodes, initializers=[w], opset_imports={"": 20}, name=name)
    return ir.Model(graph, ir_version=10)


def test_a_quarter_of_the_work_is_several_times_as_fast() -> None:
    long, short = _chain(32, name="long"), _chain(8, name="short")
    result = mg.bench([long, short], seconds=0.3, flops=[32.0, 8.0])
    base, other = result.models
    assert other.speedup is not None
    assert other.speedup_interval is not None
    assert 2.5 < other.speedup < 5.0
    assert other.speedup_interval[0] <= other.speedup <= other.speedup_interval[1]
    assert other.flops_ratio == 4.0
    assert base.speedup is base.flops_ratio is base.unstable is None
    assert base.min_ms <= base.p50_ms <= base.p90_ms <= base.p99_ms
    assert base.runs == other.runs >= 10
    assert base.p50_ms == base.cpu_p50_ms
    assert result.clock == "cpu"
    assert other.unstable or "short is" in result.verdict
    assert "short" in result.verdict
    assert "long takes" in result.verdict


def test_several_threads_are_timed_by_the_wall(tmp_path: Path) -> None:
    path = tmp_path / "chain.onnx"
    mg.save(_chain(4), path)
    before = path.read_bytes()
    result = mg.bench([path], seconds=0.05, threads=2)
    assert result.clock == "wall"
    assert result.models[0].p50_ms == result.models[0].wall_p50_ms
    assert result.models[0].name == "chain.onnx"
    assert result.self_ratio is None
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["chain.onnx"]


def test_json_has_the_published_keys() -> None:
    result = mg.bench([_chain(2), _chain(1)], seconds=0.01)
    data = msgspec.json.decode(msgspec.json.encode(result))
    assert {"schema_version", "models", "verdict", "clock", "threads"} <= data.keys()
    wanted = {"min_ms", "p50_ms", "p90_ms", "p99_ms", "runs", "cv", "speedup", "unstable"}
    assert wanted | {"speedup_interval", "flops_ratio"} <= data["models"][1].keys()
    assert [model["name"] for model in data["models"]] == ["chain (1)", "chain (2)"]


def test_an_open_batch_is_filled_and_inputs_are_reproducible(tmp_path: Path) -> None:
    path = tmp_path / "chain.onnx"
    mg.save(_chain(1, batch="batch"), path)
    session = find_runtime("ort").session(path)
    for batch, rows in ((None, 1), (5, 5)):
        feeds = random_feeds(session, "chain", batch, seed=1)
        assert feeds["x"].shape == (rows, 128)
        assert np.array_equal(feeds["x"], random_feeds(session, "chain", batch, seed=1)["x"])
        assert not np.array_equal(feeds["x"], random_feeds(session, "chain", batch, seed=2)["x"])
    more = mg.bench([path], seconds=0.1, batch=512).models[0].p50_ms
    assert more > 3 * mg.bench([path], seconds=0.1, batch=16).models[0].p50_ms


def test_inputs_that_call_a_size_the_same_follow_a_given_shape() -> None:
    """A shape of one input says the samples of the others, which ONNX Runtime would refuse."""
    model = onnx.parser.parse_model(
        """
        <opset_import: ["": 20], ir_version: 9>
        pair (float[N,4] x, float[N,4] z, float[M,4] w) => (float[N,4] y, float[M,4] v) {
            y = Add(x, z)  v = Relu(w)
        }"""
    )
    session = find_runtime("ort").session(model)
    feeds = random_feeds(session, "pair", None, seed=0, shapes={"x": (3, 4)})
    assert {name: array.shape[0] for name, array in feeds.items()} == {"x": 3, "z": 3, "w": 1}
    feeds = random_feeds(session, "pair", 5, seed=0, shapes={"w": (2, 4)})
    assert {name: array.shape[0] for name, array in feeds.items()} == {"x": 5, "z": 5, "w": 2}
    with pytest.raises(mg.ModelError, match=r"'z' has as many samples as input 'x'.* 3, and"):
        random_feeds(session, "pair", 5, seed=0, shapes={"x": (3, 4)})
    assert mg.bench([model], seconds=0.01, input_shapes={"x": (3, 4)}).models[0].runs >= 10


def test_integers_are_valid_indices(tmp_path: Path) -> None:
    x = ir.val("tokens", dtype=ir.DataType.INT64, shape=["N", 7])
    table = ir.val("table", const_value=ir.tensor(np.eye(2, dtype=np.float32), name="table"))
    node = ir.node("Gather", [table, x])
    node.outputs[0].name = "y"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["N", 7, 2])
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[table], opset_imports={"": 20}, name="embed"
    )
    assert mg.bench([ir.Model(graph, ir_version=10)], seconds=0.01).models[0].runs >= 10


def test_batches_must_agree() -> None:
    with pytest.raises(mg.ModelError, match=r"long: takes a batch of 8, chain one of 64"):
        mg.bench([_chain(1), _chain(1, batch=8, name="long")], seconds=0.01)
    with pytest.raises(mg.ModelError, match=r"input 'x' has a fixed batch of 64, not 2"):
        mg.bench([_chain(1)], seconds=0.01, batch=2)


def test_an_open_inner_axis_is_asked_for() -> None:
    model = _chain(1)
    model.graph.inputs[0].shape = ir.Shape([64, "width"])
    with pytest.raises(mg.ModelError, match=r"input 'x' leaves axis 1 open \('width'\)"):
        mg.bench([model], seconds=0.01)


def test_what_the_runtime_refuses_is_one_line() -> None:
    model = _chain(1)
    model.graph[0].domain = "com.acme"
    with pytest.raises(mg.UnsupportedError, match="chain: ONNX Runtime does not run it") as caught:
        mg.bench([model], seconds=0.01)
    assert "\n" not in str(caught.value)


def test_broken_files_and_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(mg.FileError, match=r"missing\.onnx"):
        mg.bench([tmp_path / "missing.onnx"])
    (tmp_path / "page.onnx").write_text("<html>404</html>")
    with pytest.raises(mg.ModelError, match=r"page\.onnx"):
        mg.bench([tmp_path / "page.onnx"])
    wrong: tuple[dict[str, Any], ...] = (
        {"threads": 0},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"batch": 0},
        {"flops": [1.0, 2.0]},
        {"flops": [0.0]},
    )
    for arguments in wrong:
        with pytest.raises(mg.UnsupportedError, match=f"bench: {next(iter(arguments))}"):
            mg.bench([_chain(1)], **arguments)
    with pytest.raises(mg.UnsupportedError, match="no model"):
        mg.bench([])
