"""Whole networks through the checks of tools/zoo.py; the long list is `make zoo-small`."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "zoo.py"


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo_tool"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_every_check_holds(zoo: ModuleType, name: str) -> None:
    found = zoo.examine(zoo.ENTRIES[name], seeds=(0,))
    assert found.failures == []
    assert found.opaque == []
    assert found.shrinkable > 0.99
    assert found.lowest < 0.02
    assert all(reason.startswith("graph ") for reason in found.pinned)


def test_failures_are_put_into_words(zoo: ModuleType) -> None:
    good = zoo.Findings(
        "net",
        export_error=1e-7,
        macs=10.0,
        torch_macs=10.0,
        ratios=[0.49],
        errors=[1e-7],
        felt=[0.5],
        planted=3,
        torch_errors=[1e-7],
    )
    assert good.failures == []
    wrong = {
        "export_error": (float("nan"), "export is off by nan"),
        "torch_macs": (11.0, "10 MACs, torch counts 11"),
        "ratios": ([0.51], "plans at 51.0%"),
        "errors": ([1e-7, 1e-3], "resized is off by 1.0e-03"),
        "felt": ([0.5, 1e-4], "felt only 1.0e-04"),
        "planted": (0, "passed wrongly: nothing planted"),
        "passed_wrongly": (["w axis 0 shifted"], "passed wrongly: w axis 0 shifted"),
        "torch_errors": ([0.1], "to_torch is off by 1.0e-01"),
        "without_gradient": (["fc.bias"], "no gradient: fc.bias"),
        "crash": ("killed", "killed"),
    }
    for name, (value, words) in wrong.items():
        findings = zoo.Findings(**{**zoo.dataclasses.asdict(good), name: value})
        assert findings.failures == [words]
    page = zoo.report("small networks", "python tools/zoo.py", [good, findings])
    assert "1 of 2 networks pass every check." in page
    assert "- net: killed" in page
