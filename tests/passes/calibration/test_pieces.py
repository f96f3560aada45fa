"""Networks run in pieces, and changed ones carried along: against ONNX Runtime on the whole."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import morphgraph as mg
from morphgraph import shrinker
from morphgraph.arrays import Array, Arrays
from morphgraph.passes.calibration import carried, statistics
from morphgraph.passes.calibration.curves import changed_kernels, measure
from morphgraph.passes.calibration.outputs import output_error
from morphgraph.passes.calibration.segments import cuts_by_weight, run_all
from morphgraph.passes.calibration.statistics import calibrate
from morphgraph.passes.calibration.visits import looks
from morphgraph.shrinker import Shrinker
from morphgraph.testing.decoder import DecoderShape, write_decoder

SHAPE = DecoderShape(width=32, units=48, heads=4, shared=2, blocks=3, ids=64, longest=16)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("decoder") / "decoder.onnx", SHAPE)


def feeds(count: int = 3, seed: int = 0) -> list[Arrays]:
    generator = np.random.default_rng(seed)
    return [{"input_ids": generator.integers(64, size=(4, 16))} for _ in range(count)]


def whole(model: ir.Model | Path, given: list[Arrays]) -> list[Arrays]:
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    return [{"logits": session.run(["logits"], feed)[0]} for feed in given]


@pytest.mark.parametrize("most", [2000, 10_000, 40_000])
def test_a_network_in_pieces_gives_what_it_gives_as_a_whole(path: Path, most: int) -> None:
    model = mg.lift(path).model
    cuts = cuts_by_weight(model, most)
    assert len(cuts) > 1
    assert cuts == sorted(set(cuts))
    found = list(run_all(model, feeds(), 1, most))
    for one, other in zip(found, whole(path, feeds()), strict=True):
        np.testing.assert_allclose(one["logits"], other["logits"], rtol=0, atol=1e-4)


def test_readers_of_one_value_are_looked_at_together(path: Path) -> None:
    """Queries, keys and values; gate and units."""
    graph = mg.lift(path)
    found = calibrate(graph, feeds(), stops=lambda group: [group.width // 2], threads=1)
    together = [[r.name for r in look.readers] for look in looks(found.readers, found.readers)]
    assert [f"block0.{part}" for part in "qkv"] in together
    assert ["block1.gate", "block1.up"] in together
    assert ["block2.down"] in together


def silenced(path: Path, changes: dict[str, tuple[Array, Array]]) -> ir.Model:
    """The file's model with other kernels and a bias behind them, by hand."""
    model = ir.load(path)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    for name, (matrix, shift) in changes.items():
        (node,) = (n for n in model.graph if n.name == name)
        weight, result = node.inputs[1], node.outputs[0]
        assert weight is not None
        assert weight.const_value is not None
        weight.const_value = ir.tensor(matrix[0, :, :, 0].T.astype(np.float32), name=weight.name)
        bias = ir.val(f"{name}.bias", const_value=ir.tensor(shift.reshape(-1).astype(np.float32)))
        bias.name = f"{name}.bias"
        model.graph.register_initializer(bias)
        moved = ir.node("Add", [result, bias], name=f"{name}.moved")
        moved.outputs[0].name = f"{name}.moved_out"
        for user, port in list(result.uses()):
            user.replace_input_with(port, moved.outputs[0])
        model.graph.insert_after(node, moved)
        moved.replace_input_with(0, result)
    return model


@pytest.mark.parametrize("pieces", [1, 3, 100])
@pytest.mark.parametrize("together", [statistics.MOST_TOGETHER, 0], ids=["made up for", "not"])
def test_what_a_width_costs_is_measured_on_the_whole_network(
    path: Path, pieces: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every changed network run by itself; without covariances channels go as they are."""
    monkeypatch.setattr(carried, "PIECES", pieces)
    monkeypatch.setattr(carried, "IN_MEMORY", 100)
    monkeypatch.setattr(statistics, "MOST_TOGETHER", together)
    graph = mg.lift(path)
    found = calibrate(graph, feeds(seed=1), stops=lambda group: [group.width // 2], threads=1)
    inside = [k for k in found.groups if found.groups[k].complete]
    assert len(inside) == 6  # heads and units of three blocks; only the stream is normalized
    stops = {k: [graph.groups[k].width // 2] for k in inside}
    points = measure(found, feeds(2), stops, threads=1)
    for index in inside:
        (width,) = stops[index]
        changes = changed_kernels(found, index, width)
        (name,) = changes
        matrix = changes[name][0]
        gone = found.removals[index].order[: graph.groups[index].width - width]
        assert not matrix[:, :, found.groups[index].blocks[name][gone].ravel()].any()
        kept = found.readers[name].matrix()
        unchanged = np.array_equal(matrix[matrix != 0], kept[matrix != 0])
        assert unchanged == (together == 0)
        expected = output_error(whole(path, feeds(2)), whole(silenced(path, changes), feeds(2)))
        assert points[index][width] == pytest.approx(expected, rel=1e-3)
        assert expected > 1e-4


@pytest.mark.parametrize(("enough", "sequences"), [(64, 4), (10_000, 16)])
def test_tokens_count_as_places_of_the_outputs(
    path: Path, enough: int, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four sequences of 16 tokens are 64 places."""
    monkeypatch.setattr(shrinker, "CURVE_RUNS", 0.1)
    monkeypatch.setattr(shrinker, "ENOUGH_PLACES", enough)
    seen: list[int] = []

    def counted(
        _calibration: Any, batches: Any, stops: dict[int, list[int]], **_options: Any
    ) -> dict[int, dict[int, float]]:
        seen.append(sum(len(batch["input_ids"]) for batch in batches))
        return {index: dict.fromkeys(widths, 0.5) for index, widths in stops.items()}

    monkeypatch.setattr(shrinker, "measure", counted)
    ids = np.random.default_rng(0).integers(64, size=(100, 16))
    Shrinker(mg.lift(path), {"input_ids": ids}, threads=1).scores()
    assert seen == [sequences]
