"""Inputs of the user's own: read, held against the model, and used by the check."""

from pathlib import Path

import numpy as np
import pytest

import morphgraph as mg
from morphgraph.errors import FileError, ModelError
from morphgraph.onnx_io.inputs import fit_inputs, read_inputs
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


def test_a_set_of_a_folder_is_named_by_its_file(graph: mg.ChannelGraph, tmp_path: Path) -> None:
    plan = random_plan(graph, 0)
    small = mg.apply(graph, plan)
    np.savez(tmp_path / "first.npz", **arrays(1))  # type: ignore[arg-type]
    for name, given, message in [
        ("second.npz", {"x": arrays(2)["x"]}, r"second\.npz: input 'ids' is missing"),
        (
            "third.npz",
            {**arrays(2), "q": arrays(2)["x"]},
            r"third\.npz: the model has no input 'q'",
        ),
        ("fourth.npz", {**arrays(2), "ids": np.zeros((2, 3), int)}, r"fourth\.npz: input 'ids' is"),
    ]:
        np.savez(tmp_path / name, **given)  # type: ignore[arg-type]
        for use in (
            lambda sets: mg.verify(graph, plan, small, inputs=sets),
            lambda sets: mg.sensitivity(graph, sets),
        ):
            with pytest.raises(ModelError, match=message):
                use(read_inputs(tmp_path))
        (tmp_path / name).unlink()
    for name, array in {**arrays(1), "x": np.zeros((1, 3, 4))}.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "first.npz").unlink()
    with pytest.raises(ModelError, match=rf"{tmp_path.name}: input 'x' is float64"):
        mg.verify(graph, plan, small, inputs=read_inputs(tmp_path))


def test_samples_are_cut_into_runs_of_the_size_that_the_model_has() -> None:
    text = NET.replace("[N,3,4,4]", "[2,3,4,4]").replace("[N,2]", "[2,2]").replace("-1, ", "2, ")
    graph = mg.lift(model_from_text(text.replace("[N,2,4,4]", "[2,2,4,4]"), ("x", "ids")))
    sets = fit_inputs(arrays(6), graph.model)
    assert [each["x"].shape[0] for each in sets] == [2, 2, 2]
    np.testing.assert_array_equal(np.concatenate([s["ids"] for s in sets]), arrays(6)["ids"])
    plan = random_plan(graph, 0)
    assert mg.verify(graph, plan, mg.apply(graph, plan), inputs=arrays(6)).ok
    one = {**arrays(6), "ids": arrays(2)["ids"]}
    assert [each["ids"].tolist() for each in fit_inputs(one, graph.model)] == [
        one["ids"].tolist()
    ] * 3
    with pytest.raises(ModelError, match=r"input 'ids' has samples for 2 runs, another .* 3"):
        fit_inputs({**arrays(6), "ids": arrays(4)["ids"]}, graph.model)
    with pytest.raises(ModelError, match="input 'x' is float32"):
        fit_inputs(arrays(3), graph.model)


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
