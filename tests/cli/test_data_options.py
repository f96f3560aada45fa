"""Options about calibration data, and progress on stderr."""

import io
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from morphgraph.calibration import Samples
from morphgraph.cli import console, progress
from morphgraph.cli.command import command
from morphgraph.cli.console import OutputSettings
from morphgraph.cli.data_options import DataOptions
from morphgraph.cli.progress import ProgressLines
from morphgraph.testing import model_from_text

MODEL = model_from_text("net (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }", ("x",))


def _run(data: Path, *arguments: str) -> Samples:
    def act(data: Path, *, options: DataOptions) -> Samples:
        return options.read(data, MODEL, 0)

    line = [str(data), *arguments]
    found = command(act).main(line, standalone_mode=False, obj=OutputSettings())
    assert isinstance(found, Samples)
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for number in range(4):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def test_options_say_what_is_done_to_images(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--samples 3 --mean 100,110,120.5 --std 50 --channels BGR --resize crop --size 8x8"
    samples = _run(image, *line.split())
    (feed,) = samples.batches(8)
    pixels = np.asarray(Image.open(image / "0.png"), np.float32)[..., ::-1]
    wanted = ((pixels - [100, 110, 120.5]) / 50).transpose(2, 0, 1)
    np.testing.assert_allclose(feed["x"], np.stack([wanted] * 3), atol=1e-5)
    said = capsys.readouterr().err
    assert said == (
        f"calibration data: 3 images of {image}, resized and cropped to 8x8, not divided by 255, "
        "mean 100,110,120.5, std 50, BGR (as given)\n"
    )


@pytest.mark.parametrize(
    ("flags", "factor"), [((), 255), (("--scale",), 255), (("--no-scale",), 1)]
)
def test_the_scale_has_two_flags(flags: tuple[str, ...], factor: int, image: Path) -> None:
    (feed,) = _run(image, "--mean", "0", *flags).batches(8)
    pixels = np.asarray(Image.open(image / "0.png"), np.float32) / factor
    np.testing.assert_allclose(feed["x"][0], pixels.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--size 8", "'8' is no size of images; write 224x224"),
        ("--size 1x3x8x8", "is no size of images"),
        ("--mean a,b", "'a,b' is no list of numbers; write 0.485"),
        ("--std nan", "'nan' is no list of numbers"),
        ("--samples 0", "0 is not in the range"),
        ("--layout HWC", "'HWC' is not one of"),
    ],
)
def test_what_cannot_be_parsed(line: str, message: str, image: Path) -> None:
    with pytest.raises(click.BadParameter, match=message):
        _run(image, *line.split())


# ---- progress


class _Stream(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def _told(
    monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, seconds: float, verbosity: int = 0
) -> str:
    """What is said of a hundred steps, each of which takes so long, and of a note behind."""
    stream, clock = _Stream(is_terminal), [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "monotonic", lambda: clock[0])

    def work() -> None:
        lines = ProgressLines()
        for done in range(101):
            lines("reading", done, 100)
            clock[0] += seconds
        console.note("done")

    context: dict[str, Any] = {"obj": OutputSettings(verbosity=verbosity)}
    command(work).main([], standalone_mode=False, **context)
    return stream.getvalue()


def test_a_log_gets_a_line_for_every_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _told(monkeypatch, is_terminal=False, seconds=3.0).splitlines()
    assert lines[0] == "reading: 10 of 100, 4 min left"
    assert lines[-2:] == ["reading: 90 of 100, 31 s left", "done"]
    assert len(lines) == 10
    assert _told(monkeypatch, is_terminal=False, seconds=0.01) == "done\n"


def test_a_terminal_gets_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _told(monkeypatch, is_terminal=True, seconds=1.0)
    assert "\rreading: 40 of 100, 1 min left" in text
    assert text.count("\n") == 1
    last, note = text.rsplit("\r", 1)
    assert note == "done\n"
    assert last.endswith(" " * 10)  # what stood there was cleared


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (True, False):
        told = _told(monkeypatch, is_terminal=is_terminal, seconds=3.0, verbosity=-1)
        assert told == ""


def test_options_load_neither_torch_nor_runtimes() -> None:
    import subprocess

    code = "import sys, morphgraph.cli.data_options as d; "
    code += "print({'torch', 'onnxruntime', 'PIL'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
