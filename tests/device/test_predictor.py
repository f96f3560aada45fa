"""Predictions: from measurements that follow a law, the law at other sizes."""

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from morphgraph.device import DeviceProfile, Kernel, Predictor, load_profile
from morphgraph.device.profile import measurements
from morphgraph.errors import FileError, ModelError

LAW = runpy.run_path(str(Path(__file__).parents[1] / "benchmark" / "lawful.py"))["law"]


def law(kernel: Kernel) -> float:
    """Microseconds of a kernel."""
    return float(LAW(kernel))


def drawn(count: int, seed: int, grid: int = 4) -> list[Kernel]:
    """Convolutions of random sizes."""
    random = np.random.default_rng(seed)
    kernels = []
    for _ in range(count):
        channels, filters = (int(n) * grid for n in random.integers(5, 300 // grid, 2))
        side, size = int(random.choice([7, 14, 28])), int(random.choice([1, 3]))
        shapes = (1, channels, side, side), (filters, channels, size, size), (filters,)
        kernels.append(Kernel("Conv", "blocked", shapes, ((1, filters, side, side),)))
    return kernels


def predictor(kernels: list[Kernel], noise: float = 0.0) -> Predictor:
    times = np.array([law(kernel) for kernel in kernels])
    random = np.random.default_rng(0)
    return Predictor(kernels, times * np.exp(noise * random.standard_normal(len(times))))


def test_the_block_is_found_and_other_sizes_are_predicted() -> None:
    found = predictor(drawn(80, 0), noise=0.02)
    assert {model.block for model in found.kinds.values()} == {16}
    others = drawn(200, 1)
    errors = np.abs(found.times(others) / [law(kernel) for kernel in others] - 1)
    assert np.percentile(errors, 90) < 0.05


def test_what_is_fused_behind_a_convolution_is_counted() -> None:
    random = np.random.default_rng(2)

    def some(count: int, seed: int) -> list[Kernel]:
        behind = random.choice(["", "Relu", "Clip", "LeakyRelu"], count)
        return [
            replace(kernel, activation=str(each))
            for kernel, each in zip(drawn(count, seed), behind, strict=True)
        ]

    others = some(200, 1)
    errors = np.abs(predictor(some(160, 0)).times(others) / [law(each) for each in others] - 1)
    assert np.percentile(errors, 90) < 0.03
    costs = [law(each) / law(replace(each, activation="")) for each in others]
    assert np.percentile(costs, 90) > 1.2  # without it a third of them would be wrong by more


def test_the_spread_says_where_it_was_not_measured() -> None:
    found = predictor([kernel for kernel in drawn(100, 0) if kernel.inputs[0][1] < 100])
    wide = [kernel for kernel in drawn(100, 1) if kernel.inputs[0][1] > 250]
    narrow = [kernel for kernel in drawn(100, 1) if kernel.inputs[0][1] < 100]
    (_, unsure), (_, sure) = (found.log_times(each) for each in (wide, narrow))
    assert np.median(unsure) > 1.5 * np.median(sure)


def test_a_kind_that_was_not_measured_costs_what_it_moves() -> None:
    copies = [Kernel("Relu", "", ((1, n),), ((1, n),)) for n in (100, 1000, 10000, 100000, 10**6)]
    found = Predictor(copies, np.array([law(kernel) for kernel in copies]))
    other = Kernel("Novelty", "", ((1, 5000),), ((1, 5000),))
    assert found.times([other])[0] == pytest.approx(law(other), rel=0.2)


def test_a_profile_predicts_the_same_after_it_was_stored(tmp_path: Path) -> None:
    kernels = drawn(40, 0)
    times = [law(kernel) for kernel in kernels]
    fresh = DeviceProfile("ort", 1, measurements(kernels, times))
    stored = DeviceProfile(
        "ort", 1, measurements(kernels, times), settings=fresh.predictor.settings
    )
    stored.save(tmp_path / "mine.json")
    loaded = load_profile(tmp_path / "mine.json")
    others = drawn(20, 1)
    assert loaded.name == "mine"
    np.testing.assert_allclose(
        loaded.predictor.times(others), fresh.predictor.times(others), rtol=1e-9
    )


def test_a_table_of_measurements(tmp_path: Path) -> None:
    kernels = drawn(30, 0)
    rows = ["op_type,inputs,outputs,microseconds,layout"]
    for kernel in kernels:
        inputs, outputs = (
            " ".join("x".join(map(str, shape)) for shape in shapes)
            for shapes in (kernel.inputs, kernel.outputs)
        )
        rows.append(f"Conv,{inputs},{outputs},{law(kernel)!r},blocked")
    path = tmp_path / "phone.csv"
    path.write_text("\n".join(rows))
    profile = load_profile(path)
    assert [each.kernel for each in profile.kernels] == kernels
    assert profile.predictor.times(kernels[:1])[0] == pytest.approx(law(kernels[0]), rel=0.05)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("d.json", "{", "is no device profile"),
        ("d.json", "[]", "is no device profile"),
        ("d.json", '{"runtime": "ort", "threads": 1, "kernels": []}', "has no measurements"),
        (
            "d.json",
            '{"runtime":"ort","threads":1,"kernels":[{"op_type":"Relu","inputs":[],"outputs":[],'
            '"microseconds":-1}]}',
            "not positive",
        ),
        ("d.csv", "", "has no column op_type"),
        ("d.csv", "op_type,inputs\nRelu,1x2", "has no column outputs"),
        ("d.csv", "op_type,inputs,outputs,microseconds\nRelu,1xa,1,3", "line 2"),
        ("d.csv", "op_type,inputs,outputs,microseconds\nRelu,1x2,1x2", "line 2"),
        ("d.csv", b"\xff\xfe\x00", "no table"),
    ],
)
def test_files_that_are_no_profiles(
    tmp_path: Path, name: str, text: str | bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=says):
        load_profile(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="check the path"):
        load_profile(tmp_path / "none.json")
