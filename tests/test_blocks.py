"""Blocks of pages whose inputs a reader brings along: run with small ones of the same kind."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

import morphgraph as mg
from morphgraph.benchmark import meeting
from morphgraph.device import load_profile
from morphgraph.onnx_io import save
from morphgraph.testing import model_from_text
from morphgraph.testing.examples import residual_cnn
from tests.folders.test_folders import VOCABULARY, make_folder
from tests.merged import BLOCKS, HEADS, IDS, write_merged
from tests.pages import BLOCK, ROOT, Page, commands, start
from tests.sided import write_sided

DOCS = ROOT / "docs"
pytestmark = pytest.mark.filterwarnings("ignore")

# Blocks of plain text with commands or programs for a person, and what runs them.
TEXT = {
    ("does-not-shrink", "morphgraph: error"): "the guide's page, which shows the command",
    ("from-an-onnx-file", "morphgraph: warning"): "tests/test_fixed.py, with an If of its own",
    ("milliseconds", "op_type,inputs"): "test_a_table_of_measurements_is_read_as_the_page_has_it",
    ("olive", 'python -c "import json'): "test_a_workflow_of_olive_on_the_command_line",
    ("optimum", "from optimum.onnx"): "tests/test_examples.py, where Optimum is installed",
    ("optimum", "morphgraph plan exported"): "test_several_files_go_as_the_page_says",
    ("quickstart", "git clone"): "tools/time_quickstart.py, from a fresh clone",
}


def test_every_block_of_plain_text_has_what_runs_it() -> None:
    found = [
        (path.stem, block)
        for path in sorted(DOCS.glob("*.md"))
        for language, block in BLOCK.findall(path.read_text("utf-8"))
        if language == "text"
    ]
    assert [page for page, _ in found] == [page for page, _ in TEXT]
    for (page, block), (_, first) in zip(found, TEXT, strict=True):
        assert block.startswith(first), page


def images(folder: Path, mode: str, size: int, count: int = 60) -> None:
    """Noise as pictures."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    shape = (count, size, size, 3) if mode == "RGB" else (count, size, size)
    for number, pixels in enumerate(rng.integers(0, 255, shape, dtype=np.uint8)):
        Image.fromarray(pixels, mode).save(folder / f"{number}.png")


@pytest.mark.pages
def test_the_page_about_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small network, and a machine that is measured in short."""
    import torch

    monkeypatch.chdir(tmp_path)
    example = (torch.zeros(1, 1, 16, 16),)
    mg.save(mg.export(residual_cnn(widths=(64, 64, 64)), example), "model.onnx")
    images(tmp_path / "images", "L", 16)
    monkeypatch.setattr(meeting, "SECONDS", 0.1)  # of a measurement
    short = {"calibrate -o": "calibrate --kernels 60 --minutes 0.2 -o"}
    again = {r"^morphgraph (plan|apply|shrink) ": r"morphgraph \1 --overwrite "}
    page = Page(DOCS / "milliseconds.md", shorter=short | again)
    page.run()
    assert len(page.printed) == 5
    for name in ("device.json", "plan.json", "slim.onnx"):
        assert Path(name).exists()


def test_a_table_of_measurements_is_read_as_the_page_has_it(tmp_path: Path) -> None:
    page = (DOCS / "milliseconds.md").read_text("utf-8")
    (table,) = (block for language, block in BLOCK.findall(page) if language == "text")
    (tmp_path / "phone.csv").write_text(table)
    profile = load_profile(tmp_path / "phone.csv")
    assert [(each.kernel.op_type, each.microseconds) for each in profile.kernels] == [
        *(("Conv", 410.5), ("Gemm", 61.0)),
    ]


PICTURES = """net (float[N,3,16,16] x, float[12,3,3,3] a, float[16,12,3,3] b, float[5,16] c)
=> (float[N,5] y) {
    p = Conv(x, a)  q = Relu(p)  r = Conv(q, b)  s = Relu(r)
    g = GlobalAveragePool(s)  f = Flatten(g)  y = Gemm <transB = 1> (f, c)
}"""


def test_the_page_for_onnx_files_takes_photographs_and_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    page = (DOCS / "from-an-onnx-file.md").read_text("utf-8")
    shell = [block for language, block in BLOCK.findall(page) if language == "sh"]
    of_images, of_text = (line for block in shell for line in commands(block))
    save(model_from_text(PICTURES, ("x",)), Path("model.onnx"))
    images(tmp_path / "photos", "RGB", 20)
    assert "error" in start(of_images)
    words = {f"w{k}": k for k in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")
    drawn = np.random.default_rng(0).integers(0, VOCABULARY, 20_000)
    Path("text.txt").write_text(" ".join(f"w{k}" for k in drawn))
    make_folder(tmp_path / "large")
    Path("large/model.onnx").replace("model.onnx")
    assert "body_params" in start(f"{of_text} --length 16 --round-to 1")
    assert Path("slim.onnx").exists()


def test_the_page_about_optimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder on, which Optimum would have written."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "exported")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (40, 6))
    np.savez("inputs.npz", input_ids=ids)
    page = Page(DOCS / "optimum.md", shorter={"$": " --round-to 2"})
    page.run()
    assert len(page.printed) == 1
    before, after = (
        json.loads(Path(x, "config.json").read_text())["intermediate_size"]
        for x in ("exported", "small")
    )
    assert after < before


def test_several_files_go_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = write_sided(tmp_path / "exported")
    texts = [text for _, text in BLOCK.findall((DOCS / "optimum.md").read_text(encoding="utf-8"))]
    (block,) = (text for text in texts if text.startswith("morphgraph plan exported"))
    for line in commands(block):
        start(line.replace(" -o plan", " --round-to 1 -o plan"))
    for path in files.glob("*.onnx"):
        before, after = (
            sum(math.prod(weight.dims) for weight in onnx.load(each).graph.initializer)
            for each in (path, tmp_path / "small" / path.name)
        )
        assert after < 0.8 * before


@pytest.mark.pages
@pytest.mark.skipif(find_spec("olive") is None, reason="pip install 'morphgraph[olive]'")
def test_a_workflow_of_olive_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Page(DOCS / "olive.md")
    page.run()
    Path("workflow.json").write_text(json.dumps(page.names["workflow"]))
    for left in ("out", "cache", ".olive-cache"):  # by Python
        shutil.rmtree(left, ignore_errors=True)
    (block,) = (text for language, text in BLOCK.findall(page.text) if language == "text")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = dict(os.environ, PATH=path, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        ["bash", "-e", "-c", block], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    small = next(Path("out").rglob("*.onnx"))
    assert re.search("float16|FLOAT16", str(next(iter(mg.load(small).graph.initializers.values()))))
    share = mg.cost(mg.lift(small), "flops").total / mg.cost(mg.lift("model.onnx"), "flops").total
    assert share <= 0.6


def test_the_page_on_language_models_takes_a_merged_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("whole", "onnx")
    folder.mkdir(parents=True)
    write_merged(folder / "decoder_model_merged.onnx")
    config = {"model_type": "gpt2", "n_embd": 8, "n_head": HEADS, "n_layer": BLOCKS, "n_inner": 12}
    config["vocab_size"] = IDS
    Path("whole", "config.json").write_text(json.dumps(config))
    page = (DOCS / "language-models.md").read_text("utf-8")
    (block,) = (block for language, block in BLOCK.findall(page) if language == "sh")
    _, printed = map(start, commands(block))
    assert "computes what the masked original computes" in printed
    assert Path("small", "onnx", "decoder_model_merged.onnx").exists()
    assert json.loads(Path("small", "config.json").read_text()) != config
