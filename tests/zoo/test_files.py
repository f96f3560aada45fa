"""The zoo's checks on files of others, small models and peers, on networks made here."""

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

TOOL = Path(__file__).resolve().parents[2] / "tools" / "zoo"
NAMES = (
    *(
        "entry",
        "decoders",
        "findings",
        "prepare",
        "examine",
        "report",
        "vision",
        "sequences",
        "files",
    ),
    *("others", "file_findings", "examine_file", "small_models", "peers", "file_report"),
    *("entries", "kinds"),
)


@pytest.fixture(scope="module")
def zoo() -> Iterator[dict[str, ModuleType]]:
    """The modules of the tool, which is a folder of scripts."""
    sys.path.insert(0, str(TOOL))
    try:
        yield {name: import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(TOOL))
        for name in NAMES:
            sys.modules.pop(name, None)


def _file(path: Path, opset: int = 17) -> dict[str, np.ndarray[Any, Any]]:
    """Two convolutions and a linear layer."""
    rng = np.random.default_rng(0)
    shapes = {"a": (24, 3, 3, 3), "b": (16, 24, 3, 3), "c": (16, 5)}
    weights = [
        numpy_helper.from_array((rng.standard_normal(s) / 5).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "b"], ["s"], "second"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "c"], ["y"], "last"),
    ]
    x = helper.make_tensor_value_info("x", 1, ["N", 3, 12, 12])
    y = helper.make_tensor_value_info("y", 1, ["N", 5])
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return {"x": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)}


@pytest.mark.parametrize("treatment", ["as it is", "extended", "static", "dynamic", "float16"])
def test_a_file_is_examined_under_every_treatment(
    zoo: dict[str, ModuleType], tmp_path: Path, treatment: str
) -> None:
    feeds = _file(tmp_path / "net.onnx")
    target = tmp_path / "treated.onnx"
    zoo["others"].TREATMENTS[treatment](tmp_path / "net.onnx", target, feeds)
    row = zoo["file_findings"].FileFindings("files/net", "cnn", "net", treatment)
    found = zoo["examine_file"].FileExamination(row, target, feeds, lambda _: None).run()
    assert not found.unmade
    assert found.lifted
    assert found.resizable == 2
    assert found.equal
    assert found.unexpected <= 1e-5
    assert found.felt > 0.01
    assert found.ratio <= 0.5
    assert len(found.bytes) == 2
    assert not found.larger
    assert found.allowed < 0.9


def test_a_file_of_two_networks_is_examined_as_the_one_that_its_input_is_fixed_to(
    zoo: dict[str, ModuleType], tmp_path: Path
) -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 20]>
        net (float[2,24] x, int64 sr) => (float[2,24] y) <float[24,32] a, float[32,24] b> {
        r = Constant<value = int64 {16000}>()  c = Equal(sr, r)
        y = If (c) <
            then_branch = t () => (float[2,24] p) {
                h = MatMul(x, a)  g = Relu(h)  p = MatMul(g, b) },
            else_branch = e () => (float[2,24] q) { q = Tanh(x) }> }""")
    rng = np.random.default_rng(0)
    del model.graph.value_info[:]
    for name, shape in {"a": (24, 32), "b": (32, 24)}.items():
        array = rng.standard_normal(shape).astype(np.float32) / 5
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "net.onnx")
    feeds = {"x": rng.standard_normal((2, 24)).astype(np.float32), "sr": np.array(16000)}
    for fixed in ((), ("sr",)):
        row = zoo["file_findings"].FileFindings("files/net", "other", "net", "as it is")
        examination = zoo["examine_file"].FileExamination(
            row, tmp_path / "net.onnx", feeds, lambda _: None, fixed=fixed
        )
        found = examination.run()
        assert found.resized == bool(fixed)
        assert found.unexpected <= 1e-5
        assert not found.not_run
    assert found.macs == 2 * 24 * 32


def test_a_wrong_resize_is_called_wrong(
    zoo: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = _file(tmp_path / "net.onnx")
    examine = zoo["examine_file"]
    right = examine.resize

    def shifted(graph: Any, keep: Any) -> Any:
        small = right(graph, keep)
        value = small.graph.initializers["b"]
        value.const_value = type(value.const_value)(
            np.roll(value.const_value.numpy(), 1, axis=1), name="b"
        )
        return small

    monkeypatch.setattr(examine, "resize", shifted)
    row = zoo["file_findings"].FileFindings("files/net", "cnn", "net", "as it is")
    found = examine.FileExamination(row, tmp_path / "net.onnx", feeds, lambda _: None).run()
    assert found.wrong
    assert not found.holds
    assert any(words.startswith("resized is off by") for words in found.shortfalls)


def test_a_copy_of_a_weight_makes_a_file_larger(zoo: dict[str, ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    big = np.ones((300, 300), np.float32)
    x, y = (helper.make_tensor_value_info(name, 1, [1, 300]) for name in "xy")
    for name, tensors in {"net": "ww", "twice": "wv"}.items():
        nodes = [
            helper.make_node("MatMul", ["x", tensors[0]], ["a"], "first"),
            helper.make_node("MatMul", ["a", tensors[1]], ["y"], "second"),
        ]
        weights = [numpy_helper.from_array(big, tensor) for tensor in sorted(set(tensors))]
        graph = helper.make_graph(nodes, "net", [x], [y], weights)
        onnx.save(helper.make_model(graph, ir_version=8), tmp_path / f"{name}.onnx")
    twice = tmp_path / "twice.onnx"
    row = zoo["file_findings"].FileFindings("files/net", "other")
    row.bytes = [path.stat().st_size, twice.stat().st_size]
    row.allowed = zoo["examine_file"]._allowed(path, twice)
    assert 0.99 < row.allowed <= 1
    assert row.larger


def test_nan_where_nan_is_expected_is_no_error(zoo: dict[str, ModuleType]) -> None:
    error_of = zoo["examine_file"].error_of
    expected = [np.array([math.nan, 2.0])]
    assert error_of([np.array([math.nan, 2.0])], expected) == 0
    assert error_of([np.array([1.0, 2.0])], expected) == math.inf
    assert error_of([np.array([1.0])], expected) == math.inf


_GOOD: dict[str, Any] = {
    "name": "files/net",
    "family": "cnn",
    "source": "net",
    "treatment": "as it is",
    "bytes": [1_000_000, 400_000],
    "macs": 10.0,
    "lowest": 0.1,
    "target": 0.5,
    "ratio": 0.49,
    "allowed": 0.4,
    "error": 1e-7,
    "noise": 1e-7,
    "felt": 0.5,
    "accepted": True,
    "unexpected": 0.0,
}
_SHORT: list[tuple[dict[str, Any], str]] = [
    ({"crashes": {"lift": "no"}}, "lift: no"),
    ({"unexpected": 0.1}, "the lifted model is off by 1.0e-01 from the file"),
    ({"accepted": False}, "apply calls it wrong, it is off by 1.0e-07"),
    ({"ratio": 0.3}, "the plan for 50.0% lands at 30.0%: "),
    ({"felt": 1e-5}, "the removal is felt only 1.0e-05"),
    (
        {"bytes": [1_000_000, 650_000]},
        "65% of the bytes for 49% of the MACs, where its tensors allow 40%",
    ),
]


@pytest.mark.parametrize(("change", "words"), _SHORT)
def test_what_falls_short_of_a_file_is_put_into_words(
    zoo: dict[str, ModuleType], change: dict[str, Any], words: str
) -> None:
    kind = zoo["file_findings"].FileFindings
    good = kind(**_GOOD)
    assert good.holds
    assert good.shortfalls == []
    bad = kind(**{**_GOOD, **change})
    assert bad.shortfalls == [words]
    assert bad.holds == words.startswith("the removal")


def test_what_a_tool_did_not_make_is_no_fault(zoo: dict[str, ModuleType]) -> None:
    kind = zoo["file_findings"].FileFindings
    unmade = kind("files/net+static", "cnn", "net", "static", crashes={"treat": "no"})
    refused = kind("files/net+float16", "cnn", "net", "float16", not_run="invalid")
    page = "\n".join(zoo["file_report"].file_sections([kind(**_GOOD), unmade, refused], [], [], []))
    assert unmade.holds
    assert refused.holds
    assert "| all | 1 of 3 | 1 | 1 | 0 | 0 | 0 |" in page
    assert "static: net; float16: net" in page
    rows = [line for line in page.splitlines() if line.startswith("| net")]
    assert len(rows) == 1


def test_the_files_are_of_many_kinds(zoo: dict[str, ModuleType]) -> None:
    sources = zoo["others"].SOURCES
    assert len(sources) >= 20
    assert len(zoo["others"].FILES) == 5 * len(sources)
    pins = (TOOL / "packages.txt").read_text().splitlines()
    assert all("==" in line for line in pins if not line.startswith("#"))
    packages = {line.split("==")[0].replace("-", "_").lower() for line in pins}
    folders = {
        source.path.split("/")[0].replace("-", "_").lower() for _, source in sources.values()
    }
    assert folders <= packages


def test_there_are_140_small_models(zoo: dict[str, ModuleType]) -> None:
    small = zoo["small_models"]
    assert sum(len(small.listed(folder)) for folder in small.FOLDERS) == 140
    path = (
        small.DATA / "pytorch-converted" / "test_MaxPool2d_stride_padding_dilation" / "model.onnx"
    )
    row = zoo["file_findings"].FileFindings("test_MaxPool2d_stride_padding_dilation", "other")
    assert small.examine_one(row, path).unexpected <= 1e-6


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(torch.relu(self.a(x))).mean((2, 3)))


def test_a_peer_is_held_against_the_masked_original(
    zoo: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = zoo["peers"]
    torch.manual_seed(0)
    net, example = _Net().eval(), torch.randn(1, 3, 9, 9)
    kept, error = peers._torch_pruning(net, (example,), None)
    assert 0.2 < kept < 0.4
    assert error < 1e-5
    monkeypatch.setattr(peers, "_without", lambda whole, left, axis: whole)
    assert peers._torch_pruning(net, (example,), None)[1] > 0.01


def test_channels_are_told_by_their_values(zoo: dict[str, ModuleType]) -> None:
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((6, 9, 3, 3)).astype(np.float32)
    left = whole[[0, 2, 5]][:, [1, 2, 3, 7]]
    masked = zoo["peers"]._without(whole, left, 1)
    assert np.flatnonzero(np.abs(masked).sum((0, 2, 3))).tolist() == [1, 2, 3, 7]
