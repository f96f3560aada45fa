"""The pages for users run as they stand, and every command line in the documentation is one."""

import doctest
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import torchvision

import morphgraph as mg
from morphgraph.cli import COMMANDS, cli
from morphgraph.testing import model_from_text
from morphgraph.testing.examples import image, residual_cnn
from tests.pages import ROOT, Page

DOCS = ROOT / "docs"
QUICK = ("quickstart", "concepts", "operators", "does-not-shrink")
LONG = ("train-in-pytorch", "five-ms", "faq")
NEEDS = {"transformer-config": "transformers", "olive": "olive"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.pages) for name in (*LONG, *NEEDS))],
)
def test_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    page = Page(DOCS / f"{name}.md")
    page.run()
    assert page.printed or len(page.names) > 1 or ">>>" in page.text or "](concept" in page.text


# Of the guide: networks that are not here, and trainings; test_the_long_commands_of_the_guide runs
# them, and tests/train/test_distributed.py those of several processes.
ELSEWHERE = (
    r"resnet18|mobilenet|vgg|trained|(^| )(n|open|acme|even)\.onnx|morph model|sweep|slice|torchrun"
)


def small_language_model() -> dict[str, Any]:
    """What the guide's programs are given."""
    text = """
    net (int64[1,4] ids, float[9000,4] table, float[4,9000] head) => (float[1,4,9000] logits) {
      a = Gather(table, ids)
      logits = MatMul(a, head)
    }"""
    return {
        "numpy": np,
        "mg": mg,
        "ids_of_a_text": np.arange(9000),
        "vocabulary_size": 9000,
        "special_ids": [0, 1],
        "model": model_from_text(text, inputs=["ids"]),
    }


@pytest.mark.filterwarnings("ignore")
def test_the_guide_shows_what_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs with a language model of two layers; its doctests are collected by pytest."""
    monkeypatch.chdir(tmp_path)
    page = Page(DOCS / "guide.md", without=ELSEWHERE)
    page.names |= small_language_model()
    page.run()
    assert len(page.printed) >= 11
    changed = page.names["plan"].groups.values()
    assert {sum(end - start for start, end in group.keep) for group in changed} == {8000}
    assert page.code == 1


@pytest.mark.pages
@pytest.mark.filterwarnings("ignore")
def test_the_long_commands_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with networks of torchvision in full, trainings of an epoch, small stand-ins else."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("cifar.npz", input=rng.normal(size=(100, 3, 16, 16)).astype(np.float32))
    np.save("images.npy", rng.normal(size=(40, 1, 8, 8)).astype(np.float32))
    shapes = {"vgg": (3, 16), "trained": (1, 8)}
    for name, (channels, size) in shapes.items():
        text = f"""net (float[N,{channels},{size},{size}] input, float[12,{channels},3,3] a,
            float[12] ab, float[16,12,3,3] b, float[16] bb, float[10,16] c, float[10] d)
            => (float[N,10] linear) {{
            p = Conv <pads = [1,1,1,1]> (input, a, ab)  q = Relu(p)
            r = Conv <pads = [1,1,1,1]> (q, b, bb)  s = Relu(r)
            t = GlobalAveragePool(s)  f = Flatten(t)  linear = Gemm <transB = 1> (f, c, d)
        }}"""
        mg.save(model_from_text(text, inputs=["input"]), f"{name}.onnx")
    sizes = (12, 16, 16, 4)
    layers = [torch.nn.Linear(*pair) for pair in pairwise(sizes)]
    net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    model = mg.export(net, (torch.zeros(1, 12),))
    next(iter(model.graph)).outputs[0].name = "hidden"
    model.graph.outputs[0].name = "linear"
    mg.save(model, "n.onnx")
    opened = "net (float[N,3,H,W] x, float[8,3,3,3] w) => (float[N,8,S,T] y) { y = Conv(x, w) }"
    mg.save(model_from_text(opened, inputs=["x"]), "open.onnx")
    mobilenet = torchvision.models.mobilenet_v2().eval()
    mg.save(mg.export(mobilenet, (torch.zeros(1, 3, 224, 224),)), "mobilenet_v2.onnx")
    seen = r"resnet18|mobilenet|vgg|trained|(^| )(n|open|even)\.onnx|morph model|sweep|slice"
    page = Page(
        DOCS / "guide.md",
        without=rf"^(?!.*({seen}|residual_cnn -o))|torchrun|latency",
        shorter={
            r"epochs \d+": "epochs 1",
            r"--seeds 3": "--seeds 1",
            r"flops=25%,50%,100% --method base,morph,uniform,l2": "flops=50% --method base,l2",
            r"--seconds 3|(bench resnet18.*)": r"\1 --seconds 0.2",
            r"^morphgraph (plan|apply|shrink|slice) ": r"morphgraph \1 --overwrite ",
        },
    )
    page.names |= small_language_model()
    page.run()
    assert len(page.printed) >= 20


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are given what a reader has: a model, inputs, a network and a training."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net, x = residual_cnn(widths=(8, 16)), torch.randn(64, 1, 8, 8)
    mg.save(mg.export(residual_cnn(), (image(),), dynamic_batch=True), "model.onnx")
    inputs = np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32)
    np.savez("inputs.npz", x=inputs)
    page = Page(ROOT / "README.md")
    page.names |= {
        "net": net.train(),
        "inputs": inputs,
        "example": image(),
        "batches": [(x[:16], torch.arange(16) % 10)] * 120,
        "criterion": torch.nn.CrossEntropyLoss(),
        "optimizer": torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0),
    }
    page.run()
    assert page.names["budget"].met
    assert len(page.printed) == 5
    for name in ("slim.onnx", "half.onnx", "fitted.onnx"):
        assert Path(name).stat().st_size < Path("model.onnx").stat().st_size


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def command_lines() -> Iterator[tuple[str, str]]:
    """Every command of this program in the documentation, by the page and the line."""
    line = re.compile(r"^ *(?:\$ )?(?:torchrun [-\w ]*-m )?morphgraph ((?:[a-z]|--).*)$", re.M)
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^ *```\w*\n[\s\S]*?^ *```|^    \S.*$", text, re.M)
        for found in line.finditer("\n".join(blocks)):
            yield page.name, found[1]
    inside = re.compile(r"`morphgraph ([a-z]+ [^`]*)`")
    for page in sorted(DOCS.glob("*.md")):
        for words in inside.findall(page.read_text(encoding="utf-8")):
            yield page.name, words.replace("\n", " ")


def parsed(words: str) -> None:
    """Whether a command line names a command and options that it has, with their values."""
    name, *arguments = shlex.split(re.split(r" [|>] ", words)[0], comments=True)
    if name.startswith("-"):
        return
    context = click.Context(cli, info_name="morphgraph")
    assert name in COMMANDS, f"there is no command {name}"
    command = cli.get_command(context, name)
    assert command is not None
    known = [word for word in arguments if word != "..."]
    command.make_parser(click.Context(command, parent=context)).parse_args(known)


def test_every_command_line_in_the_documentation_is_one() -> None:
    wrong, count = [], 0
    for page, words in command_lines():
        count += 1
        try:
            parsed(words)
        except (AssertionError, ValueError, click.UsageError) as error:
            wrong.append(f"{page}: morphgraph {words}: {error}")
    assert not wrong, "\n".join(wrong)
    assert count > 90


@pytest.mark.parametrize("words", ["plan a.onnx --bugdet flops=50%", "plann a.onnx", "plan --data"])
def test_a_wrong_command_line_is_seen(words: str) -> None:
    with pytest.raises((AssertionError, click.UsageError)):
        parsed(words)


def test_the_concepts_are_drawn_from_the_program() -> None:
    """If not: python tools/draw_concepts.py."""
    tool = runpy.run_path(str(ROOT / "tools" / "draw_concepts.py"))
    for name, drawing in tool["drawings"]().items():
        assert (DOCS / name).read_text(encoding="utf-8") == drawing, name
        assert f"]({name})" in (DOCS / "concepts.md").read_text(encoding="utf-8")


def test_the_python_reference_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)$", page, re.M)
    assert sorted(listed) == sorted(mg._HOMES)


def test_links_that_leave_the_documentation_are_led_to_pages() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "sphinx_pages.py"))
    folder, beside = DOCS / "decisions", tool["BESIDE"]
    text = "[a](../limits.md#files) [b](../../README.md)\n```\n[c](../../README.md)\n```\n"
    assert tool["rewritten"](text, folder) == text.replace(
        "[b](../../README.md)", "[b](../_repository/readme.md)"
    )
    assert tool["rewritten"]("[a](docs/guide.md#plan)", ROOT, beside) == "[a](../guide.md#plan)"
    assert tool["rewritten"]("[a](https://b.c) [d](#e)", ROOT) == "[a](https://b.c) [d](#e)"
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = "\n".join(tool["toctrees"](index, DOCS)).splitlines()
    pages = [found[1] for line in trees if (found := re.fullmatch(r".+ <(.+)>", line))]
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= set(pages)
    assert len(pages) == len(set(pages)), "a page stands in the navigation once"


def test_examples_of_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    result = doctest.testmod(importlib.import_module("sphinx_pages"))
    assert result.failed == 0
    assert result.attempted > 3


@pytest.mark.pages
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("index", "quickstart", "api", "_repository/readme"):
        page = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert "sidebar-tree" in page
        remote = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page)
        assert not remote, "the site needs no network"
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert 'id="morphgraph.shrink"' in api
    assert 'id="morphgraph.Budget.attach"' in api
