"""Labels of nodes: in metadata or doc strings, right for their own model, harmless to runtimes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import morphgraph as mg
from morphgraph.cli import main
from morphgraph.labels import label, unlabel
from morphgraph.onnx_io import save
from morphgraph.testing import model_from_text
from tests.conftest import ATTENTION
from tests.test_origin import CHAIN, CONCAT

MAKES, READS = "morphgraph.groups", "morphgraph.reads"


def labels(path: Path, key: str = MAKES) -> dict[str, str]:
    """By node what Netron would show."""
    found = {}
    for node in onnx.load(path).graph.node:
        said = {entry.key: entry.value for entry in node.metadata_props}
        lines = dict(line.split(": ", 1) for line in node.doc_string.split("\n") if ": " in line)
        if key in said or key in lines:
            found[node.output[0]] = said.get(key) or lines[key]
    return found


def runs(path: Path) -> Any:
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    feed = np.random.default_rng(0).standard_normal(source.shape).astype(np.float32)
    return session.run(None, {source.name: feed})[0]


@pytest.fixture(params=[8, 10, 11])
def ir_version(request: Any) -> int:
    version: int = request.param
    return version


def written(text: str, path: Path, ir_version: int) -> Path:
    save(model_from_text(text), path)
    proto = onnx.load(path)
    proto.ir_version = ir_version
    if ir_version < 10:
        proto.opset_import[0].version = min(proto.opset_import[0].version, 17)
    proto.graph.node[0].doc_string = "the user's own words"
    path.write_bytes(proto.SerializeToString())
    return path


def test_analyze_writes_a_labelled_copy(tmp_path: Path, ir_version: int) -> None:
    base = written(CHAIN, tmp_path / "base.onnx", ir_version)
    before, out = base.read_bytes(), tmp_path / "labelled.onnx"
    assert main(["analyze", str(base), "--annotate", str(out)]) == 0
    assert base.read_bytes() == before
    makes, reads = labels(out), labels(out, READS)
    assert makes["a"] == makes["b"] == reads["c"] == "g1 'Conv_a' (16 channels)"
    assert makes["c"] == makes["d"] == makes["e"] == makes["f"] == reads["y"]
    assert makes["y"].endswith("(10 channels, keeps its size: graph output 'y')")
    assert "b" not in reads  # what it reads stands on its results, too
    np.testing.assert_array_equal(runs(out), runs(base))
    found = onnx.load(out)
    assert found.ir_version == ir_version
    assert found.graph.node[0].doc_string.startswith("the user's own words")
    assert all(not node.metadata_props for node in found.graph.node) == (ir_version < 10)


@pytest.mark.parametrize("text", [CHAIN, CONCAT, ATTENTION], ids=["chain", "concat", "attention"])
def test_apply_labels_with_the_groups_of_the_result(
    text: str, tmp_path: Path, ir_version: int
) -> None:
    base = written(text, tmp_path / "base.onnx", ir_version)
    plan, slim, again, bare = (tmp_path / name for name in ("p.json", "s.onnx", "a.onnx", "b.onnx"))
    mg.uniform(mg.lift(base), 0.5, round_to=1).save(plan)
    assert main(["apply", str(base), str(plan), "-o", str(slim), "--annotate"]) == 0
    said = " ".join(labels(slim).values())
    changed = [group for group in mg.lift(slim).groups if group.resizable]
    assert changed
    assert all(f"{group.id} " in said for group in changed)
    assert all(f"({group.width} channel" in said for group in changed)
    runs(slim)
    # Labelled once more, and not: nothing is left of the labels before.
    assert main(["analyze", str(slim), "--annotate", str(again)]) == 0
    assert labels(again) == labels(slim)
    mg.uniform(mg.lift(slim), 0.5, round_to=1).save(plan, overwrite=True)
    assert main(["apply", str(slim), str(plan), "-o", str(bare)]) == 0
    assert not labels(bare)
    assert onnx.load(bare).graph.node[0].doc_string == "the user's own words"


def test_shrink_labels_too(tmp_path: Path) -> None:
    base, data, slim = tmp_path / "base.onnx", tmp_path / "x.npz", tmp_path / "slim.onnx"
    save(model_from_text(CHAIN), base)
    np.savez(data, x=np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32))
    line = ["shrink", str(base), "--data", str(data), "--budget", "flops=60%"]
    assert main([*line, "-o", str(slim), "--annotate"]) == 0
    assert len(labels(slim)) == len(onnx.load(slim).graph.node)


def test_names_in_labels_are_text(tmp_path: Path) -> None:
    model = model_from_text(CHAIN.replace("w1", "w_one"))
    weight = model.graph.initializers.pop("w_one")
    weight.name = "w\n\x1b[31m"
    model.graph.register_initializer(weight)
    label(model, mg.lift(model))
    notes = [note for node in model.graph for note in node.metadata_props.values()]
    assert notes
    assert not any("\x1b" in note or "\n" in note for note in notes)
    unlabel(model)
    assert not any(node.metadata_props for node in model.graph)
