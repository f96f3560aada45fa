"""The examples do what they say: a checked network within its budget that does its task.

Each ends with a check by itself: ``mg.apply`` and ``mg.resize_module`` compare with ONNX Runtime.
"""

import importlib.util
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# steps, and what the result must be at least (accuracies; of the Llama, at most: a loss)
QUICK = {
    "audio": (60, 0.8),
    "detector": (50, 0.2),
    "frozen_backbone": (100, 0.9),
    "lstm_tagger": (90, 0.8),
    "segmentation": (45, 0.7),
}
LONG = {
    "accelerate_llama": (60, 2.0),
    "lightning_digits": (150, 0.9),
    "timm_classifier": (100, 0.7),
    "transformers_bert": (150, 0.8),
}
pytestmark = pytest.mark.filterwarnings("ignore::morphgraph.MorphWarning", "ignore:::lightning.*")


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == QUICK.keys() | LONG.keys()


@pytest.mark.parametrize("name", QUICK)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps, wanted = QUICK[name]
    share, accuracy = example(name).main(steps)
    assert 0.4 < share <= 0.5
    assert accuracy >= wanted
    assert " -> " in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_example_of_a_framework(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for framework in {name.partition("_")[0], *(["transformers"] * (name == "accelerate_llama"))}:
        if find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
    steps, wanted = LONG[name]
    share, result = example(name).main(steps, tmp_path)
    assert 0.4 < share <= 0.5
    assert result <= wanted if name == "accelerate_llama" else result >= wanted
    assert " -> " in capsys.readouterr().out
