"""The examples do what they say: a checked network within its budget that does its task.

Each ends with a check by itself: ``mg.apply`` and ``mg.resize_module`` compare with ONNX Runtime.
"""

import importlib.util
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

EXAMPLES = Path(__file__).parent.parent / "examples"
# steps, and what the result must be at least (accuracies; of the Llama, at most: a loss)
QUICK = {
    "audio": (60, 0.8),
    "detector": (50, 0.2),
    "frozen_backbone": (100, 0.9),
    "lstm_tagger": (90, 0.8),
    "segmentation": (45, 0.7),
}
# of the frameworks also the steps between two checkpoints
FRAMEWORKS = {
    "accelerate_llama": (50, 20, 2.0),
    "lightning_digits": (80, 30, 0.9),
    "timm_classifier": (60, 20, 0.6),
    "transformers_bert": (140, 40, 0.8),
}
# of tools for files: the package that is needed, steps, and the accuracy
FILES = {"olive_workflow": ("olive", 150, 0.85), "optimum_export": ("optimum", 200, 0.8)}
DISTILLED = "distill_decoder"
pytestmark = pytest.mark.filterwarnings("ignore::morphgraph.MorphWarning", "ignore:::lightning.*")


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run() -> None:
    names = QUICK.keys() | FRAMEWORKS.keys() | FILES.keys() | {DISTILLED}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == names


@pytest.mark.parametrize("name", QUICK)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps, wanted = QUICK[name]
    share, accuracy = example(name).main(steps)
    assert 0.4 < share <= 0.5
    assert accuracy >= wanted
    assert " -> " in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_example_with_a_tool_for_files(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed, steps, wanted = FILES[name]
    if find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; the example says what it needs")
    share, accuracy = example(name).main(steps)
    assert 0.4 < share <= 0.6
    assert accuracy >= wanted
    assert " -> " in capsys.readouterr().out


@pytest.mark.long
def test_a_decoder_learns_from_its_original(tmp_path: Path) -> None:
    """Distilled it is nearer to the original than resized, and loads by its class."""
    share, (before, resized, distilled) = example(DISTILLED).main(60, folder=tmp_path)
    assert 0.5 < share <= 0.6
    assert before < distilled < resized
    assert distilled - before < 0.7 * (resized - before)
    assert (tmp_path / "config.json").is_file()


class KilledError(BaseException):
    """What no framework takes for an error of the training."""


@pytest.fixture
def count_steps() -> Iterator[Callable[[int | None], list[int]]]:
    """Counts the steps of all optimizers from then on, and kills the training at one of them."""
    handles: list[Any] = []

    def counting(kill_at: int | None) -> list[int]:
        seen: list[int] = []

        def hook(*_: Any) -> None:
            seen.append(1)
            if len(seen) == kill_at:
                raise KilledError

        for handle in handles:
            handle.remove()
        handles.append(register_optimizer_step_post_hook(hook))
        return seen

    yield counting
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_example_of_a_framework(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    count_steps: Callable[[int | None], list[int]],
) -> None:
    """Killed between two checkpoints, and gone on with from the one before."""
    framework = name.partition("_")[0]
    for needed in {framework, *(["transformers"] * (framework == "accelerate"))}:
        if find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: pip install 'morphgraph[{framework}]'")
    steps, every, wanted = FRAMEWORKS[name]
    program = example(name)
    count_steps(every + every // 2)
    with pytest.raises(KilledError):
        program.main(steps, tmp_path, every)
    seen = count_steps(None)
    share, result = program.main(steps, tmp_path, every)
    assert len(seen) == steps - every + steps // 3
    assert 0.4 < share <= 0.5
    assert result <= wanted if name == "accelerate_llama" else result >= wanted
    assert " -> " in capsys.readouterr().out
