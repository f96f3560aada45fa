"""Bad data get one line that says where, what is wrong, and what to do."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.calibration import ImageOptions, Samples
from morphgraph.errors import ArgumentError, DataError, FileError, ModelError, MorphError
from morphgraph.testing import model_from_text

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def model() -> ir.Model:
    text = "net (float[N,3] x, int32[N] ids) => (float[N,3] y) { y = Relu(x) }"
    return model_from_text(text, ("x", "ids"))


@pytest.fixture(scope="module")
def single() -> ir.Model:
    return model_from_text("net (float[N,3] x) => (float[N,3] y) { y = Relu(x) }", ("x",))


def arrays(**change: Array | None) -> dict[str, Array]:
    given = {"x": np.ones((4, 3), np.float32), "ids": np.arange(4), **change}
    return {name: array for name, array in given.items() if array is not None}


def with_number(number: float, *place: int) -> Array:
    array = np.ones((4, 3))
    array[place] = number
    return array


WRONG: list[tuple[dict[str, Array | None], type[MorphError], str]] = [
    ({"x": None}, ModelError, "input 'x' is missing; the model takes"),
    ({"x": np.ones((4, 5))}, ModelError, r"'x' is float64 \[4,5\]; the model takes 'x'"),
    ({"x": np.ones((4, 3, 1))}, ModelError, r"'x' is float64 \[4,3,1\]"),
    ({"x": np.ones((4, 3), int)}, ModelError, r"'x' is int64 \[4,3\].*convert it with .astype"),
    ({"ids": np.ones(4)}, ModelError, r"'ids' is float64 \[4\]; the model takes 'ids' \(INT32"),
    ({"x": with_number(np.nan, 2, 1)}, DataError, r"input 'x' is nan at \[2, 1\].*leave that"),
    ({"x": with_number(-np.inf, 3, 0)}, DataError, r"input 'x' is -inf at \[3, 0\]"),
    ({"x": with_number(1e300, 1, 2)}, DataError, r"input 'x' is 1e\+300 at \[1, 2\].*FLOAT"),
    ({"ids": np.array([0, 1, 2**40, 3])}, DataError, r"'ids' is 1099511627776 at \[2\].*INT32"),
    ({"x": np.ones((0, 3)), "ids": np.ones(0, int)}, DataError, "there are no samples"),
]


@pytest.mark.parametrize(
    ("declared", "shape", "advice"),
    [
        ("N,3,8,9", (5, 8, 9, 3), "; move the channels: .transpose(0, 3, 1, 2)"),
        ("N,8,9,3", (5, 3, 8, 9), "; move the channels: .transpose(0, 2, 3, 1)"),
        ("N,3,H,W", (5, 8, 9, 3), "; move the channels: .transpose(0, 3, 1, 2)"),
        ("N,3,8,9", (5, 8, 9, 4), ""),
        ("N,3,8,9", (5, 9, 9), ""),
    ],
)
def test_images_with_channels_elsewhere(declared: str, shape: tuple[int, ...], advice: str) -> None:
    model = model_from_text(f"net (float[{declared}] x) => (float[A,B,C,D] y) {{ y = Relu(x) }}")
    with pytest.raises(ModelError) as refused:
        Samples.of(np.ones(shape, np.float32), model)
    assert str(refused.value).endswith(f"(FLOAT [{declared}]){advice}")
    if advice:
        order = tuple(map(int, advice.partition("(")[2].rstrip(")").split(",")))
        Samples.of(np.ones(shape, np.float32).transpose(order), model)


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda each: str(each)[:30])
def test_arrays_that_the_model_does_not_take(
    model: ir.Model,
    change: dict[str, Array | None],
    error: type[MorphError],
    message: str,
    tmp_path: Path,
) -> None:
    given = arrays(**change)
    file = tmp_path / "calib.npz"
    np.savez_compressed(file, **given)  # type: ignore[arg-type]

    def passed(data: object) -> None:
        list(Samples.of(data, model).batches(2))

    with pytest.raises(error, match=message):
        passed(given)
    with pytest.raises(error, match=rf"calib\.npz: .*{message}"):
        passed(file)
    if "no samples" not in message:
        with pytest.raises(error, match="sample 1 of the data: "):
            passed([arrays(), given])


def test_a_file_has_arrays_of_inputs_alone(model: ir.Model, tmp_path: Path) -> None:
    """Of what a loader hands out labels are left out; a file that is written for it has none."""
    file = tmp_path / "calib.npz"
    np.savez_compressed(file, **arrays(z=np.ones(4)))  # type: ignore[arg-type]
    words = r"calib\.npz: .*no input 'z'; it takes 'x' \(FLOAT \[N,3\]\), 'ids'"
    with pytest.raises(ModelError, match=words):
        list(Samples.of(file, model).batches(2))


def _text(path: Path) -> None:
    path.write_text("x,ids\n1,2\n")


def _empty(path: Path) -> None:
    path.touch()


def _pickled(path: Path) -> None:
    np.savez(path, x=np.array([{"a": 1}], dtype=object))


def _no_arrays(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "no array")


def _cut_zip(path: Path) -> None:
    np.savez(path, **arrays())  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:200])


def _damaged(path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4000, 3)).astype(np.float32)
    np.savez_compressed(path, x=x, ids=np.arange(4000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def _false_header(path: Path) -> None:
    np.savez(path, **arrays())  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes().replace(b"(4, 3)", b"(9, 3)"))


@pytest.mark.parametrize(
    "make", [_text, _empty, _pickled, _no_arrays, _cut_zip, _damaged, _false_header]
)
def test_files_that_cannot_be_read(
    model: ir.Model, make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "calib.npz"
    make(path)
    with pytest.raises(DataError, match=r"calib\.npz: cannot be read as arrays .*numpy\.savez"):
        list(Samples.of(path, model).batches(2))


def test_an_npy_file_that_is_cut_short(single: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones((40, 3)))
    assert Samples.of(path, single).count == 40
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"x\.npy: .*take 960 bytes, 952 are there"):
        Samples.of(path, single)


def test_a_file_with_one_array_for_two_inputs(model: ir.Model, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((4, 3)))
    with pytest.raises(ModelError, match=r"x\.npy: holds the samples of one input.*'x', 'ids'"):
        Samples.of(tmp_path / "x.npy", model)


def test_paths_that_lead_nowhere(model: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.npz: .*; check the path"):
        Samples.of(tmp_path / "none.npz", model)
    with pytest.raises(DataError, match=r"holds no files; give a folder of images \(\.bmp"):
        Samples.of(tmp_path, model)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.csv").touch()
    (tmp_path / "more" / "a.txt").touch()
    with pytest.raises(DataError, match=r"holds 2 \.txt, 1 \.csv; give a folder"):
        Samples.of(tmp_path, model)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (17, ArgumentError, "data is of type int; give a path, arrays"),
        ([], DataError, "there are no samples"),
        (iter([]), DataError, "an iterator can be read once only"),
        (
            [{"x": "text"}],
            DataError,
            "sample 0 of the data: what is of type str is no array of numbers",
        ),
        ([{"x": [[1.0], [1.0, 2.0]]}], DataError, "lists of different lengths are no array"),
        ([None], DataError, "what is of type NoneType is no array"),
    ],
)
def test_objects_that_are_no_samples(
    single: ir.Model, given: object, error: type[MorphError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Samples.of(given, single)


def test_too_few_to_split(single: ir.Model) -> None:
    with pytest.raises(DataError, match=r"1 sample: one sample is too few.*at least 2"):
        Samples.of(np.ones((1, 3)), single).split()
    assert [part.count for part in Samples.of(np.ones((2, 3)), single).split()] == [1, 1]


def test_a_limit_of_none(single: ir.Model) -> None:
    with pytest.raises(ArgumentError, match="limit=0: give the most samples"):
        Samples.of(np.ones((4, 3)), single, limit=0)


def test_options_for_images_are_not_ignored(single: ir.Model) -> None:
    with pytest.raises(ArgumentError, match="--size, --mean, --std and the like are for images"):
        Samples.of(np.ones((4, 3)), single, images=ImageOptions(mean=(0.5,)))


def test_networks_that_read_text() -> None:
    x = ir.val("words", ir.DataType.STRING, ["N"])
    model = ir.Model(ir.Graph([x], [], nodes=[]), ir_version=10)
    with pytest.raises(MorphError, match="networks that read text cannot be calibrated"):
        Samples.of({"words": np.array([1])}, model)


def test_an_endless_iterator_is_read_as_far_as_needed(single: ir.Model) -> None:
    def endless() -> Any:
        while True:
            yield np.ones(3)

    assert Samples.of(endless(), single, limit=9).count == 9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_of_half_precision(dtype: str) -> None:
    import torch

    kind = ir.DataType[dtype.upper()]
    x = ir.val("x", kind, ["N", 3])
    model = ir.Model(ir.Graph([x], [], nodes=[]), ir_version=10)
    values = np.array([[0.5, 1.0, 3.0]] * 4, np.float32)
    halves = values.astype(kind.numpy())
    for given in (values, halves, torch.from_numpy(values).bfloat16(), list(halves)):
        (feed,) = Samples.of(given, model).batches(4)
        assert feed["x"].dtype == kind.numpy()
        np.testing.assert_array_equal(feed["x"].astype(np.float32), values)
