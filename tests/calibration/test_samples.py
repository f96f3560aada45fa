"""Samples from everywhere: the same numbers, in the same order, as often as anybody likes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.calibration import Samples
from morphgraph.errors import ModelError, MorphWarning
from morphgraph.testing import model_from_text

OPEN = "net (float[N,3,4,4] x, int64[N,2] ids) => (float[N,3,4,4] y) { y = Relu(x) }"


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return model_from_text(OPEN, ("x", "ids"))


def arrays(count: int = 30) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(count)
    return {
        "x": random.standard_normal((count, 3, 4, 4)).astype(np.float32),
        "ids": random.integers(0, 9, (count, 2)),
    }


def joined(samples: Samples, size: int = 7) -> dict[str, np.ndarray[Any, Any]]:
    feeds = list(samples.batches(size))
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def _npz(folder: Path) -> str:
    np.savez(folder / "stored.npz", **arrays())  # type: ignore[arg-type]
    return str(folder / "stored.npz")


def _packed(folder: Path) -> Path:
    np.savez_compressed(folder / "packed.npz", **arrays())  # type: ignore[arg-type]
    return folder / "packed.npz"


def _by_columns(folder: Path) -> Path:
    given = {name: np.asfortranarray(array) for name, array in arrays().items()}
    np.savez(folder / "columns.npz", **given)  # type: ignore[arg-type]
    return folder / "columns.npz"


def _npy_files(folder: Path) -> Path:
    for name, array in arrays().items():
        np.save(folder / f"{name}.npy", array)
    return folder


def _npz_files(folder: Path) -> Path:
    for start in range(0, 30, 10):
        part = {name: array[start : start + 10] for name, array in arrays().items()}
        np.savez_compressed(folder / f"{start:02}.npz", **part)  # type: ignore[arg-type]
    return folder


def _doubles(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": arrays()["x"].astype(np.float64), "ids": arrays()["ids"].astype(np.int32)}


def _feeds(folder: Path) -> list[dict[str, np.ndarray[Any, Any]]]:
    return [{n: a[start : start + 4] for n, a in arrays().items()} for start in range(0, 30, 4)]


def _single(folder: Path) -> list[dict[str, np.ndarray[Any, Any]]]:
    return [{name: array[row] for name, array in arrays().items()} for row in range(30)]


def _tuples(folder: Path) -> Iterator[tuple[np.ndarray[Any, Any], list[int], int]]:
    given = arrays()
    yield from ((given["x"][row], given["ids"][row].tolist(), 5) for row in range(30))


def _loader(folder: Path) -> object:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    x, ids = (torch.from_numpy(array) for array in arrays().values())
    labels = torch.zeros(30, dtype=torch.int64)
    return DataLoader(TensorDataset(x.requires_grad_(), ids, labels), batch_size=8)


def _dataset(folder: Path) -> object:
    return _loader(folder).dataset  # type: ignore[attr-defined]


def _batches_of_dicts(folder: Path) -> object:
    from torch.utils.data import DataLoader

    items = [({name: array[row] for name, array in arrays().items()}, 5) for row in range(30)]
    return DataLoader(items, batch_size=9)  # type: ignore[arg-type]  # a list is a dataset


def _only_iterated(folder: Path) -> object:
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return _tuples(folder)

        def __len__(self) -> int:
            return 30

    return Stream()


def _lists(folder: Path) -> Iterator[object]:
    given = arrays()
    yield from ([given["x"][row].tolist(), given["ids"][row].tolist()] for row in range(30))


SOURCES: list[Callable[[Path], object]] = [
    _npz,
    _packed,
    _by_columns,
    _npy_files,
    _npz_files,
    _doubles,
    _feeds,
    _single,
    _tuples,
    _loader,
    _dataset,
    _batches_of_dicts,
    _only_iterated,
    _lists,
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_source_gives_the_same(
    source: Callable[[Path], object], model: ir.Model, tmp_path: Path
) -> None:
    samples = Samples.of(source(tmp_path), model)
    assert samples.count == 30
    for size in (1, 7, 7, 64):
        found = joined(samples, size)
        for name, array in arrays().items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    assert [len(feed["x"]) for feed in samples.batches(8)] == [8, 8, 8, 6]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_a_limit_and_a_split_take_rows_as_they_are(
    source: Callable[[Path], object], model: ir.Model, tmp_path: Path
) -> None:
    samples = Samples.of(source(tmp_path), model, limit=12, seed=3)
    rows = {array.tobytes(): row for row, array in enumerate(arrays()["x"])}
    all_ids = arrays()["ids"]

    def numbers(part: Samples) -> list[int]:
        found = joined(part, 5)
        taken = [rows[array.tobytes()] for array in found["x"]]
        np.testing.assert_array_equal(found["ids"], all_ids[taken])
        return taken

    rest, held = samples.split(0.25)
    assert (samples.count, rest.count, held.count) == (12, 9, 3)
    assert sorted(numbers(rest) + numbers(held)) == numbers(samples)
    again = Samples.of(source(tmp_path), model, limit=12, seed=3).split(0.25)
    assert [numbers(part) for part in again] == [numbers(rest), numbers(held)]
    if source not in (_tuples, _loader, _batches_of_dicts, _only_iterated, _lists):
        assert max(numbers(samples)) > 24  # spread over all of them


def _with_labels(folder: Path) -> object:
    """As Hugging Face's datasets: inputs, what the loss takes, and where they are from."""
    named = [{name: array[row] for name, array in arrays().items()} for row in range(30)]
    return [row | {"labels": k % 3, "text": "a line"} for k, row in enumerate(named)]


def _whole_with_labels(folder: Path) -> object:
    return arrays() | {"labels": np.zeros(7)}


@pytest.mark.parametrize("source", [_with_labels, _whole_with_labels])
def test_what_is_no_input_is_left_out_and_said(
    source: Callable[[Path], object], model: ir.Model, tmp_path: Path
) -> None:
    with pytest.warns(MorphWarning, match="'labels'") as said:
        samples = Samples.of(source(tmp_path), model)
    assert len(said) == 1
    for name, array in arrays().items():
        np.testing.assert_array_equal(joined(samples, 7)[name], array)
    with pytest.raises(ModelError, match="no input 'y'; it takes 'x'"):  # misspelt
        Samples.of([{"y": row} for row in arrays()["x"]], model)


def test_progress_is_told_where_reading_takes_time(tmp_path: Path) -> None:
    model = model_from_text("net (float[N,500] x) => (float[N,500] y) { y = Relu(x) }", ("x",))
    given = np.zeros((3000, 500), np.float32)  # 6 MB
    np.savez_compressed(tmp_path / "x.npz", x=given)

    def told(data: object) -> list[tuple[str, int, int]]:
        states: list[tuple[str, int, int]] = []
        Samples.of(data, model, progress=lambda *state: states.append(state))
        return states

    unpacked = told(tmp_path / "x.npz")
    assert unpacked == sorted(unpacked)
    assert unpacked[-1] == ("unpacking x.npy (MB)", 6, 6)
    assert told(list(given[:3])) == [("reading samples", done, 3) for done in (1, 2, 3)]
    assert told(iter(given[:3])) == [("reading samples", done, 0) for done in (1, 2, 3)]
