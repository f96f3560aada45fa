"""The pass for Olive: within Olive where it is installed, else against what it takes of Olive."""

import importlib
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

import morphgraph as mg
from morphgraph.errors import ArgumentError
from morphgraph.testing.examples import image, residual_cnn

pytestmark = pytest.mark.filterwarnings("ignore")


class Param:
    """A parameter of a pass, as Olive keeps it."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        self.default_value = facts.get("default_value")


class Pass:
    """Olive's base class: it asks for the parameters, and calls the pass with their values."""

    _default_config: ClassVar[Any]
    _run_for_config: Any

    def run(self, model: Any, output: str, **given: Any) -> Any:
        known = {name: p.default_value for name, p in self._default_config(None).items()}
        assert given.keys() <= known.keys()
        return self._run_for_config(model, SimpleNamespace(**(known | given)), output)


def resolved(path: str, name: str) -> str:
    if path.endswith(".onnx"):
        return path
    Path(path).mkdir(parents=True, exist_ok=True)
    return str(Path(path, name))


def stand_in(folder: Path) -> dict[str, dict[str, Any]]:
    """By module of Olive the names that the pass takes from it."""
    (folder / "passes.json").write_text('{"passes": {"OnnxFloatToFloat16": {}}}')

    class Data:
        model_validate = staticmethod(lambda entry: Data.of(entry))

        @staticmethod
        def of(entry: Any) -> Any:
            container = SimpleNamespace(create_dataloader=lambda: entry["batches"])
            return SimpleNamespace(to_data_container=lambda: container)

    def handler(model_path: Any, onnx_file_name: str | None = None) -> Any:
        path = Path(model_path["path"])
        return SimpleNamespace(model_path=str(path / onnx_file_name if onnx_file_name else path))

    return {
        "common.config_utils": {"ParamCategory": SimpleNamespace(PATH="path")},
        "data.config": {"DataConfig": Data},
        "model": {"ONNXModelHandler": handler},
        "model.utils": {"resolve_onnx_path": resolved},
        "package_config": {
            "OlivePackageConfig": SimpleNamespace(
                get_default_config_path=lambda: str(folder / "passes.json")
            )
        },
        "passes": {"Pass": Pass},
        "passes.pass_config": {"PassConfigParam": Param},
        "resource_path": {"LocalFile": dict, "LocalFolder": dict},
        "search.search_parameter": {"Categorical": list},
    }


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``morphgraph.olive`` with the stand-in."""
    for name, facts in stand_in(tmp_path).items():
        parts = ["olive", *name.split(".")]
        for length in range(1, len(parts) + 1):
            path = ".".join(parts[:length])
            if not isinstance(sys.modules.get(path), Fake):
                monkeypatch.setitem(sys.modules, path, Fake(path))
        vars(sys.modules[f"olive.{name}"]).update(facts)
    monkeypatch.delitem(sys.modules, "morphgraph.olive", raising=False)
    yield importlib.import_module("morphgraph.olive")
    sys.modules.pop("morphgraph.olive", None)


class Fake(ModuleType):
    """A module of the stand-in."""

    __path__: list[str] = []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("model") / "a.onnx"
    mg.save(mg.export(residual_cnn((8, 16)), (image(),), dynamic_batch=True), path)
    return SimpleNamespace(model_path=str(path))


INPUTS = np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("way", ["weights", "data", "data_config"])
def test_the_result_fits_the_budget(module: Any, model: Any, tmp_path: Path, way: str) -> None:
    np.savez(tmp_path / "inputs.npz", x=INPUTS)
    batches = [({"x": part}, np.zeros(len(part))) for part in np.split(INPUTS, 4)]  # with labels
    given = {"data": str(tmp_path / "inputs.npz"), "data_config": {"batches": batches}}
    chosen = {way: given[way]} if way in given else {}
    budget = "flops=60%, params=80%"
    made = module.MorphgraphShrink().run(
        model, str(tmp_path / "cache"), budget=budget, round_to="4", **chosen
    )
    assert made.model_path == str(tmp_path / "cache" / "a.onnx")
    graph, small = mg.lift(model.model_path), mg.lift(made.model_path)
    for cost, share in (("flops", 0.6), ("params", 0.8)):
        assert mg.cost(small, cost).total <= share * mg.cost(graph, cost).total
    plan = mg.Plan.load(tmp_path / "cache" / "a.plan.json")
    assert {width % 4 for width in plan.widths(graph).tolist()} <= {0, 1, 2}
    if way == "weights":
        assert mg.verify(graph, plan, made.model_path).ok


def test_a_wrong_workflow_is_told(module: Any, model: Any, tmp_path: Path) -> None:
    run = module.MorphgraphShrink().run
    for budget in ("60%", "flops", "flops=", "flops=60%,"):
        with pytest.raises(ArgumentError, match="no amount of a cost"):
            run(model, str(tmp_path / "out"), budget=budget)
    with pytest.raises(ArgumentError, match="give one of them"):
        run(model, str(tmp_path / "out"), data="a.npz", data_config={"batches": []})


def test_olives_passes_are_kept(module: Any) -> None:
    config = module.package_config()
    assert set(config["passes"]) == {"OnnxFloatToFloat16", "MorphgraphShrink"}
    path, _, name = config["passes"]["MorphgraphShrink"]["module_path"].rpartition(".")
    assert getattr(importlib.import_module(path), name) is module.MorphgraphShrink


@pytest.mark.long
@pytest.mark.skipif(find_spec("olive") is None, reason="pip install 'morphgraph[olive]'")
def test_within_olive(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from olive.workflows import run

    from morphgraph.olive import package_config

    np.savez("inputs.npz", x=INPUTS)
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": model.model_path},
        "passes": {"s": {"type": "MorphgraphShrink", "budget": "flops=60%", "data": "inputs.npz"}},
        "output_dir": "out",
        "cache_dir": "cache",
    }
    Path("passes.json").write_text(json.dumps(package_config()))
    result = run(workflow, package_config="passes.json").get_best_candidate()
    share = mg.cost(mg.lift(result.model_path), "flops").total
    assert share <= 0.6 * mg.cost(mg.lift(model.model_path), "flops").total
