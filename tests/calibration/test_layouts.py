"""Models whose samples stand elsewhere than along an open first axis."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from morphgraph.calibration import Samples
from morphgraph.errors import DataError, ModelError
from morphgraph.onnx_io.runtime import session
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text

Array = np.ndarray[Any, Any]


def numbers(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def feeds_that_run(samples: Samples, model: ir.Model, size: int) -> list[dict[str, Array]]:
    """The feeds, after ONNX Runtime has taken each."""
    running = session(model)
    feeds = list(samples.batches(size))
    for feed in feeds:
        running.run(None, feed)
    return feeds


FIXED = "net (float[4,2] x) => (float[4,2] y) { y = Relu(x) }"
ALONE = "net (float[3,8,8] x) => (float[3,8,8] y) { y = Relu(x) }"
FLAT = "net (float[6] x) => (float[6] y) { y = Relu(x) }"
LENGTHS = """net (float[batch,T,2] x, int64[batch] n) => (float[batch,T,2] y) {
    y = Relu(x) m = Neg(n)
}"""
SEQUENCE = "net (float[T,batch,2] x) => (float[T,batch,2] y) { y = Relu(x) }"
FRAMES = "net (float[frames,2] x) => (float[frames,2] y) { y = Relu(x) }"


@pytest.mark.parametrize(
    "given",
    [
        {"x": numbers(10, 2)},
        numbers(10, 2),
        [numbers(3, 2), numbers(3, 2) + 6, numbers(3, 2) + 12, numbers(1, 2) + 18],
        list(numbers(10, 2)),
        [(row,) for row in numbers(10, 2)],
    ],
)
def test_a_fixed_batch_gets_as_many_as_it_takes(given: object) -> None:
    model = model_from_text(FIXED, ("x",))
    samples = Samples.of(given, model)
    feeds = feeds_that_run(samples, model, 64)
    assert samples.count == 8  # of ten; two are no batch
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds]), numbers(8, 2))
    assert [part.count for part in samples.split()] == [4, 4]
    assert Samples.of(given, model, limit=5).count == 4


def test_runs_of_a_fixed_batch_may_be_stacked() -> None:
    model = model_from_text(FIXED, ("x",))
    feeds = feeds_that_run(Samples.of({"x": numbers(3, 4, 2)}, model), model, 1)
    np.testing.assert_array_equal([f["x"] for f in feeds], numbers(3, 4, 2))


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (15, 8, 8)])
def test_images_without_a_batch(shape: tuple[int, ...]) -> None:
    model = model_from_text(ALONE, ("x",))
    samples = Samples.of(numbers(*shape), model)
    assert samples.count == 5
    found = [feed["x"] for feed in feeds_that_run(samples, model, 8)]
    np.testing.assert_array_equal(found, numbers(5, 3, 8, 8))


@pytest.mark.parametrize("given", [numbers(5, 6), numbers(30), list(numbers(5, 6))])
def test_vectors_without_a_batch(given: object) -> None:
    model = model_from_text(FLAT, ("x",))
    found = [feed["x"] for feed in feeds_that_run(Samples.of(given, model), model, 8)]
    np.testing.assert_array_equal(found, numbers(5, 6))


def test_samples_of_other_lengths_stand_in_other_runs() -> None:
    model = model_from_text(LENGTHS, ("x", "n"))
    lengths = [3, 5, 3, 4, 5, 3, 3]
    items = [{"x": numbers(t, 2) + k, "n": np.int64(t)} for k, t in enumerate(lengths)]
    samples = Samples.of(items, model)
    feeds = feeds_that_run(samples, model, 3)
    assert samples.count == 7
    assert [feed["x"].shape for feed in feeds] == [(3, 3, 2), (1, 3, 2), (2, 5, 2), (1, 4, 2)]
    assert [feed["n"].tolist() for feed in feeds] == [[3, 3, 3], [3], [5, 5], [4]]
    assert sorted(float(x[0, 0]) for feed in feeds for x in feed["x"]) == list(range(7))


def test_the_batch_may_be_another_axis(tmp_path: Path) -> None:
    model = model_from_text(SEQUENCE, ("x",))
    given = numbers(4, 6, 2)
    np.savez(tmp_path / "x.npz", x=given)
    np.savez_compressed(tmp_path / "p.npz", x=given)
    np.save(tmp_path / "x.npy", given)
    for data in (given, tmp_path / "x.npz", tmp_path / "p.npz", tmp_path / "x.npy", [given]):
        samples = Samples.of(data, model)
        assert samples.count == 6
        feeds = feeds_that_run(samples, model, 4)
        np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds], 1), given)


def test_a_dimension_denoted_as_the_batch_is_it() -> None:
    model = model_from_text(SEQUENCE.replace("batch", "K"), ("x",))
    assert Samples.of(numbers(4, 6, 2), model).count == 1  # nobody says where samples stand
    x = model.graph.inputs[0]
    x.shape = ir.Shape(["T", "K", 2], denotations=[None, "DATA_BATCH", None])
    assert Samples.of(numbers(4, 6, 2), model).count == 6


@pytest.mark.parametrize(
    ("first", "count"),
    [("batch-size", 6), ("s77", 6), ("unk__0", 6), ("BS", 6), ("num_frames", 1), ("2*k", 1)],
)
def test_the_first_axis_is_the_batch_unless_its_name_says_otherwise(first: str, count: int) -> None:
    model = model_from_text(FRAMES, ("x",))
    model.graph.inputs[0].shape = ir.Shape([first, 2])
    assert Samples.of(numbers(6, 2), model).count == count


def test_a_length_is_not_cut() -> None:
    model = model_from_text(FRAMES, ("x",))
    samples = Samples.of([numbers(4, 2), numbers(7, 2)], model)
    assert samples.count == 2
    assert [f["x"].shape for f in feeds_that_run(samples, model, 8)] == [(4, 2), (7, 2)]


def test_a_graph_is_one_sample() -> None:
    text = """net (float[N,2] x, int64[1,edges] e) => (float[1,edges,2] z) { z = Gather(x, e) }"""
    model = model_from_text(text, ("x", "e"))
    items = [{"x": numbers(n, 2), "e": np.arange(n - 1)[None]} for n in (3, 5, 5)]
    samples = Samples.of(items, model)
    assert samples.count == 3
    assert [f["x"].shape for f in feeds_that_run(samples, model, 8)] == [(3, 2), (5, 2), (5, 2)]


CONSTANT = "net (float[N,3] x, float[3] scale) => (float[N,3] y) { y = Mul(x, scale) }"


def test_an_input_of_the_whole_run_is_given_once() -> None:
    model = model_from_text(CONSTANT, ("x", "scale"))
    one, two = np.array([1, 2, 3], np.float32), np.array([3, 2, 1], np.float32)
    samples = Samples.of({"x": numbers(5, 3), "scale": one}, model)
    assert [f["x"].shape for f in feeds_that_run(samples, model, 4)] == [(4, 3), (1, 3)]
    items = [{"x": numbers(2, 3), "scale": scale} for scale in (one, two, one)]
    feeds = feeds_that_run(Samples.of(items, model), model, 8)
    assert [(len(f["x"]), f["scale"].tolist()) for f in feeds] == [(4, [1, 2, 3]), (2, [3, 2, 1])]
    each = np.stack([one, one, two])
    feeds = feeds_that_run(Samples.of({"x": numbers(3, 3), "scale": each}, model), model, 8)
    assert sorted((len(f["x"]), f["scale"].tolist()) for f in feeds) == [
        (1, [1, 2, 3]),
        (1, [1, 2, 3]),
        (1, [3, 2, 1]),
    ]


def test_a_fixed_batch_beside_a_state() -> None:
    text = "net (float[2,3] x, float[1,2,3] h) => (float[1,2,3] y) { y = Add(x, h) }"
    model = model_from_text(text, ("x", "h"))
    given = {"x": numbers(6, 3), "h": numbers(3, 1, 2, 3)}
    feeds = feeds_that_run(Samples.of(given, model), model, 8)
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds]), given["x"])
    np.testing.assert_array_equal([f["h"] for f in feeds], given["h"])


def test_defaults_need_not_be_given() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        net (float[N,3] x, float s = {2.0}) => (float[N,3] y) { y = Mul(x, s) }"""
    )
    original = ir.from_proto(proto)
    canonical = lift(original).model
    for model in (original, canonical):
        for given in (numbers(4, 3), {"x": numbers(4, 3)}):
            feeds = list(Samples.of(given, model).batches(4))
            assert feeds[0]["x"].shape == (4, 3)
            assert "s" not in feeds[0] or feeds[0]["s"] == 2
    assert "s" in next(iter(Samples.of(numbers(4, 3), canonical).batches(4)))


@pytest.mark.parametrize(
    ("text", "given", "error", "message"),
    [
        (FIXED, numbers(3, 2), DataError, "has 3 samples, but the model takes 4 of one"),
        (FIXED, numbers(4, 3), ModelError, r"'x' is float32 \[4,3\]; the model takes 'x'"),
        (LENGTHS, numbers(4, 3, 2), ModelError, "one array is given, but the model takes 2"),
        (
            LENGTHS,
            {"x": numbers(4, 3, 2), "n": np.arange(3)},
            DataError,
            "input 'n' has 3 samples, input 'x' 4; give as many of each",
        ),
        (FRAMES, numbers(4, 3), ModelError, r"'x' is float32 \[4,3\]"),
    ],
)
def test_what_does_not_fit(text: str, given: object, error: type[Exception], message: str) -> None:
    names = ("x", "n") if "int64[batch] n" in text else ("x",)
    with pytest.raises(error, match=message):
        Samples.of(given, model_from_text(text, names))
