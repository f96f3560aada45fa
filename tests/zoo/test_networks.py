"""Whole networks through the checks of tools/zoo; `make zoo` and `make zoo-small` have more."""

import dataclasses
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "zoo"


@pytest.fixture(scope="module")
def zoo() -> Iterator[dict[str, ModuleType]]:
    """The modules of the tool, which is a folder of scripts."""
    sys.path.insert(0, str(TOOL))
    names = (
        *("entry", "findings", "prepare", "examine", "report", "vision", "sequences", "files"),
        *("file_findings", "others", "examine_file", "small_models", "peers"),
    )
    try:
        yield {name: import_module(name) for name in (*names, "entries")}
    finally:
        sys.path.remove(str(TOOL))
        for name in (*names, "entries"):
            sys.modules.pop(name, None)


DEEP = ("mobilenet_v3_small", "shufflenet_v2_x0_5")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resnet18", marks=pytest.mark.long),
        *(pytest.param(name, marks=pytest.mark.slow) for name in DEEP),
    ],
)
def test_every_check_holds(
    zoo: dict[str, ModuleType], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo["prepare"], "MODELS", tmp_path)
    entry = zoo["entries"].ENTRIES[f"torchvision/{name}"]
    zoo["prepare"].prepare(entry)
    assert zoo["prepare"].is_prepared(entry, any_version=False)
    found = zoo["examine"].Examination(entry, lambda found: None).run()
    assert found.shortfalls == []
    assert found.exported
    assert found.resized
    assert found.returns
    assert found.trainable
    assert found.opaque == {}
    assert found.macs == found.torch_macs
    assert found.shrinkable > 0.99
    assert found.lowest < 0.02
    assert all(reason.startswith("graph ") for reason in found.pinned)


def test_the_entries_are_those_of_the_libraries(zoo: dict[str, ModuleType]) -> None:
    from torchvision import models

    entries = zoo["entries"].ENTRIES
    modules = (models, models.segmentation, models.video)
    names = [f"torchvision/{name}" for module in modules for name in models.list_models(module)]
    names += [f"torchvision/{n}.backbone" for n in models.list_models(models.detection)]
    assert set(names) == {name for name in entries if name.startswith("torchvision/")}
    assert {e.family for e in entries.values()} == {"cnn", "transformer", "recurrent", "other"}
    assert len({entry.stem for entry in entries.values()}) == len(entries)


def test_an_export_depends_on_its_network_alone(zoo: dict[str, ModuleType]) -> None:
    entries, digest = zoo["entries"].ENTRIES, zoo["entry"].export_digest
    digests = [digest(entries[name]) for name in ("lstm_tagger", "gru_tagger", "timm/dla34")]
    assert len(set(digests)) == 3
    changed = dataclasses.replace(entries["timm/dla34"], options={"name": "dla60"})
    assert digest(changed) != digests[2]


def _good(zoo: dict[str, ModuleType]) -> dict[str, object]:
    """The fields of a row that lacks nothing."""
    return {
        "name": "net",
        "family": "cnn",
        "route": "dynamo",
        "export_error": 1e-7,
        "macs": 10.0,
        "torch_macs": 10.0,
        "groups": 3,
        "resizable": 2,
        "shrinkable": 0.9,
        "lowest": 0.1,
        "binding": {"graph output 'y'": 0.1},
        "target": 0.5,
        "ratio": 0.49,
        "recounted": 0.49,
        "error": 1e-7,
        "felt": 0.5,
        "planted": 3,
        "torch_errors": {"base": 1e-7, "resized": 1e-7},
        "seconds": {"lift": 0.1, "resize": 0.2},
    }


_FALLS_SHORT = [
    ({"export_error": 0.1}, "the export is off by 1.0e-01", "exported"),
    ({"torch_macs": 11.0}, "10 MACs, torch counts 11", ""),
    ({"opaque": {"If: barrier": 2}}, "opaque: If: barrier (2)", ""),
    (
        {"ratio": 0.41, "coarsest": "one channel of 'a' is 9.0% of the MACs"},
        "the plan for 50.0% lands at 41.0%: one channel of 'a' is 9.0% of the MACs",
        "resized",
    ),
    ({"ratio": 1.0, "recounted": 1.0}, "nothing shrank", "resized"),
    ({"recounted": 0.5}, "the plan says 49.0000% of the FLOPs, it is 50.0000%", "resized"),
    ({"error": 1e-3}, "resized is off by 1.0e-03", "resized"),
    ({"error": float("inf")}, "resized is off by inf", "resized"),
    ({"felt": 1e-4}, "the removal is felt only 1.0e-04", "resized"),
    ({"passed_wrongly": ["w axis 0 shifted"]}, "planted and not rejected: w axis 0 shifted", ""),
    (
        {"torch_errors": {"base": 0.1, "resized": 1e-7}},
        "to_torch of the base is off by 1.0e-01",
        "returns",
    ),
    ({"without_gradient": ["fc.bias (base)"]}, "no gradient for 1: fc.bias (base)", "trainable"),
    ({"crashes": {"lift": "no"}}, "lift: no", "lifted"),
]


@pytest.mark.parametrize(("change", "words", "lost"), _FALLS_SHORT)
def test_what_falls_short_is_put_into_words(
    zoo: dict[str, ModuleType], change: dict[str, object], words: str, lost: str
) -> None:
    good = zoo["findings"].Findings(**_good(zoo))
    assert good.shortfalls == []
    for holds in ("exported", "lifted", "resized", "returns", "trainable", "holds"):
        assert getattr(good, holds)
    bad = zoo["findings"].Findings(**{**_good(zoo), **change})
    if change.get("ratio") and "recounted" not in change:
        bad.recounted = bad.ratio
    assert bad.shortfalls == [words]
    assert not lost or not getattr(bad, lost)
    assert bad.holds == (words[:10] in ("10 MACs, t", "opaque: If"))


def test_a_model_that_cannot_reach_half_says_what_binds_it(zoo: dict[str, ModuleType]) -> None:
    bound = {"lowest": 0.7, "target": 0.7, "ratio": 0.7, "recounted": 0.7}
    row = zoo["findings"].Findings(**{**_good(zoo), **bound})
    assert row.resized
    assert row.shortfalls == ["cannot be planned at 50%: 10% graph output 'y'"]


def test_the_page_counts_and_names(zoo: dict[str, ModuleType]) -> None:
    rows = [
        zoo["findings"].Findings(**_good(zoo)),
        zoo["findings"].Findings("lost", "transformer", crashes={"export": "killed"}),
    ]
    page = zoo["report"].report("t", "python tools/zoo", "today", {"x": "1"}, "2 cores", rows)
    assert "- exported: 1 of 2 (50.0%); lifted: 1 of 2 (50.0%)" in page
    assert "- **lost**: export: killed." in page
    assert "median 90.0%, worst 90.0% (net)" in page
    assert "| net | dynamo 1e-07 |  | 0.000 = | 2 of 3 | 90.0% | 10.0% | 49.00% | 1e-07 |" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
