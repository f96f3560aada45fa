"""Inputs of the user's own: read, held against the model, and used by the check."""

from pathlib import Path

import numpy as np
import pytest

import morphgraph as mg
from morphgraph.errors import FileError, ModelError
from morphgraph.onnx_io.inputs import read_inputs
from morphgraph.testing import model_from_text, random_plan

NET = """net (float[N,3,4,4] x, int64[N,2] ids, float[6,3,1,1] w1, float[2,6,1,1] w2,
    float[9,2] table) => (float[N,2,4,4] y) <int64[4] four = {-1, 2, 2, 1}> {
    a = Conv(x, w1)  r = Relu(a)  z = Conv(r, w2)  e = Gather(table, ids)
    f = Reshape(e, four)  g = ReduceMean<keepdims=1>(f)  y = Add(z, g)
}"""


@pytest.fixture(scope="module")
def graph() -> mg.ChannelGraph:
    return mg.lift(model_from_text(NET, ("x", "ids")))


def arrays(batch: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch)
    return {
        "x": random.standard_normal((batch, 3, 4, 4)).astype(np.float32),
        "ids": random.integers(0, 9, (batch, 2)),
    }


def test_the_check_runs_on_what_is_given(graph: mg.ChannelGraph) -> None:
    plan = random_plan(graph, 0)
    small = mg.apply(graph, plan, inputs=arrays(5))
    one, other = (mg.verify(graph, plan, small, inputs=arrays(n)) for n in (1, 4))
    both = mg.verify(graph, plan, small, inputs=[arrays(1), arrays(4)])
    assert one.ok
    assert one.worst.scale != other.worst.scale
    assert both.worst.scale in {one.worst.scale, other.worst.scale}


def test_files_and_folders(graph: mg.ChannelGraph, tmp_path: Path) -> None:
    sets, loose = tmp_path / "sets", tmp_path / "loose"
    sets.mkdir()
    loose.mkdir()
    for batch in (1, 2):
        np.savez(sets / f"{batch}.npz", **arrays(batch))  # type: ignore[arg-type]
    for name, array in arrays(3).items():
        np.save(loose / f"{name}.npy", array)
    batches = [found["x"].shape[0] for found in read_inputs(sets)]
    batches += [found["x"].shape[0] for found in read_inputs(loose)]
    batches += [found["x"].shape[0] for found in read_inputs(sets / "2.npz")]
    assert batches == [1, 2, 3, 2]
    plan = random_plan(graph, 0)
    assert mg.verify(graph, plan, mg.apply(graph, plan), inputs=read_inputs(sets)).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": np.zeros(1)}, r"no input 'z'; it takes 'x' \(FLOAT \[N,3,4,4\]\), 'ids'"),
        ({"x": None}, r"input 'x' is missing; the model takes"),
        ({"x": np.zeros((2, 4, 4, 3))}, r"input 'x' is float64 \[2,4,4,3\]; the model takes 'x'"),
        (
            {"ids": np.zeros((2, 2))},
            r"input 'ids' is float64 \[2,2\]; the model takes 'ids' \(INT64",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    graph: mg.ChannelGraph, change: dict[str, np.ndarray | None], message: str
) -> None:
    given = {k: v for k, v in {**arrays(2), **change}.items() if v is not None}
    plan = random_plan(graph, 0)
    with pytest.raises(ModelError, match=message):
        mg.apply(graph, plan, inputs=given)
    with pytest.raises(ModelError, match="set 1 of inputs: "):
        mg.apply(graph, plan, inputs=[arrays(1), given])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    bad, bare, objects = tmp_path / "bad.npz", tmp_path / "bare.npy", tmp_path / "o.npz"
    bad.write_bytes(b"PK nothing")
    np.save(bare, np.zeros(3))
    np.savez(objects, x=np.array([{}], dtype=object))
    for path, message in [
        (tmp_path / "none.npz", r"none\.npz: .*check the path"),
        (bad, r"bad\.npz: not an \.npz file"),
        (bare, r"bare\.npy: holds one array without a name"),
        (objects, r"o\.npz: not an \.npz file of plain arrays"),
    ]:
        with pytest.raises(FileError, match=message):
            read_inputs(path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileError, match=r"holds neither \.npz nor \.npy files"):
        read_inputs(empty)


def test_a_canonical_model_lifted_at_a_fixed_size_has_no_dynamic_pins() -> None:
    """The axis of an open length may be resized once its size is given."""
    text = """net (float[1,N,4] x, float[4,6] w1, float[6,2] w2) => (float[1,N,2] y) {
        a = MatMul(x, w1)  r = Relu(a)  y = MatMul(r, w2)
    }"""
    canonical = mg.lift(model_from_text(text)).model
    fixed = mg.lift(canonical, input_shapes={"x": (1, 5, 4)})
    assert not any(
        value.meta.get("dynamic_axes") for node in fixed.model.graph for value in node.outputs
    )
    assert not any("dynamic" in str(group.reason) for group in fixed.groups)
