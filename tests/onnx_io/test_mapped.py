"""Weights in files pass block by block: against numpy, and against a bound on memory."""

import io
import runpy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.onnx_io import mapped as stored
from morphgraph.onnx_io.mapped import StoredTensor, blocks, take


def in_file(folder: Path, array: np.ndarray, dtype: ir.DataType) -> ir.ExternalTensor:
    (folder / "w.bin").write_bytes(b"before" * 8 + array.tobytes())
    return ir.ExternalTensor(
        "w.bin", 48, array.nbytes, dtype, shape=ir.Shape(array.shape), name="w", base_dir=folder
    )


@pytest.mark.parametrize("block", [1, 7, 10_000])
@pytest.mark.parametrize("kind", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT8"])
@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_a_part_of_a_stored_tensor(
    axes: tuple[int, ...], kind: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "BLOCK_ELEMENTS", block)
    dtype = ir.DataType[kind]
    array = np.arange(6 * 5 * 4).reshape(6, 5, 4).astype(dtype.numpy())
    positions = {0: np.array([5, 0, 0]), 1: np.array([1, 3, 4]), 2: np.array([0, 3])}
    part = StoredTensor(in_file(tmp_path, array, dtype), [(axis, positions[axis]) for axis in axes])
    expected = array[
        np.ix_(*(positions[a] if a in axes else range(array.shape[a]) for a in range(3)))
    ]
    assert part.shape == expected.shape
    np.testing.assert_array_equal(part.numpy(), expected)
    file = io.BytesIO()
    part.tofile(file)
    assert file.getvalue() == expected.tobytes() == part.tobytes()


def test_a_part_of_a_part_and_a_scalar(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    part = StoredTensor(in_file(tmp_path, array, ir.DataType.FLOAT), [(0, np.array([3, 1]))])
    inner = StoredTensor(part, [(1, np.array([2]))])
    np.testing.assert_array_equal(inner.numpy(), [[11], [5]])
    scalar = StoredTensor(in_file(tmp_path, np.array(7, np.float32), ir.DataType.FLOAT))
    file = io.BytesIO()
    scalar.tofile(file)
    assert file.getvalue() == scalar.tobytes() == np.float32(7).tobytes()


def test_what_was_read_survives_the_file(tmp_path: Path) -> None:
    """Pages that are given back come again from the file that was mapped, not from its heir."""
    array = np.arange(5000, dtype=np.float32)
    tensor = in_file(tmp_path, array, ir.DataType.FLOAT)
    assert tensor.numpy()[0] == 0
    (tmp_path / "new").write_bytes(bytes(48 + array.nbytes))
    (tmp_path / "new").replace(tmp_path / "w.bin")
    stored.release_pages(tensor)
    np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("size", [1, 5, 12, 10_000])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_blocks(axis: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_ELEMENTS", size)
    array = np.random.default_rng(0).standard_normal((3, 4, 5))
    sums, seen = np.zeros(array.shape[axis]), 0
    for part, block in blocks(ir.tensor(array), axis):
        assert block.size <= size
        seen += block.size
        sums[part] += block.sum(axis=(0, 2))
    assert seen == array.size
    np.testing.assert_allclose(sums, np.moveaxis(array, axis, 0).reshape(len(sums), -1).sum(1))


def test_a_repeated_number_takes_no_memory() -> None:
    part = take(
        np.broadcast_to(np.float32(2), (1000, 1000)), [(0, np.arange(5)), (1, np.arange(7))]
    )
    assert part.shape == (5, 7)
    assert not any(part.strides)
    assert ir.Tensor(part).tobytes() == np.full((5, 7), 2, np.float32).tobytes()


TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "large_model.py"))


@pytest.mark.parametrize(
    ("gigabytes", "most"),
    [
        pytest.param(0.4, 0.25e9, marks=pytest.mark.long),
        pytest.param(3.0, 1.5e9, marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded(gigabytes: float, most: float, tmp_path: Path) -> None:
    """Weights pass from file to file; the resident set stays far below them."""
    source, target = TOOL["write_model"](tmp_path, int(gigabytes * 1e9)), tmp_path / "small.onnx"
    used = TOOL["measure"](source, target)
    assert used["resident"] < most
    written = Path(f"{target}.data").stat().st_size
    assert 0.4 < written / Path(f"{source}.data").stat().st_size < 0.6
    if gigabytes < 1:
        graph = mg.lift(source)
        plan = mg.plan(graph, budget={"flops": "50%"})
        report = mg.verify(graph, plan, mg.load(target))
        assert report.ok
        assert report.sensitivity > 1e-2
