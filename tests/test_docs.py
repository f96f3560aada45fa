"""The documentation says what the code says, and its links lead somewhere.

The examples in it are run by ``make docs``.
"""

import doctest
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from morphgraph.errors import MorphError
from morphgraph.ops import described_ops
from morphgraph.ops.plugins import GROUP
from morphgraph.passes.analysis.cost import _BUILDERS

ROOT = Path(__file__).parent.parent
_WRITTEN = ROOT / "docs" / "_repository"  # by a build of the site
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "findings").glob("*.md"),
    )
    if not path.is_relative_to(_WRITTEN)
)

_LINK = re.compile(r"(?<!`)\[[^\]\[]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def links(page: str) -> list[str]:
    """The targets of a page's links, code blocks left out."""
    return _LINK.findall(_FENCE.sub("", page))


def anchors(page: str) -> set[str]:
    """What a page's headings are called in links, as GitHub makes them."""
    headings = _HEADING.findall(_FENCE.sub("", page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_anchors_are_found() -> None:
    page = "# A title, with `code`\n[a](b.md#c) `[x](y)`\n```\n[no](link)\n# no heading\n```\n"
    assert links(page) == ["b.md#c"]
    assert anchors(page) == {"a-title-with-code"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path: Path) -> None:
    broken = []
    for link in links(path.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("index", ["docs/index.md", "docs/decisions/README.md"])
def test_the_index_names_every_page(index: str) -> None:
    page = ROOT / index
    listed = {link.partition("#")[0] for link in links(page.read_text(encoding="utf-8"))}
    assert {path.name for path in page.parent.glob("*.md")} - {page.name} <= listed


def test_every_finding_has_its_form() -> None:
    """A section with versions, a script that can be started and does not use this program."""
    folder = ROOT / "findings"
    page = (folder / "README.md").read_text(encoding="utf-8")
    scripts = sorted(folder.glob("*.sh"))
    assert scripts
    assert {path.stem for path in scripts} == set(re.findall(r"^## ([a-z-]+)$", page, re.MULTILINE))
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert os.access(path, os.X_OK), path.name
        assert "set -euo pipefail" in text
        assert "morphgraph" not in text
        section = page.partition(f"## {path.stem}\n")[2].partition("\n## ")[0]
        for name, version in re.findall(r"(\w+)==([\d.]+)", text):
            if f"{name} " in section:
                assert f"{name} {version}" in section, (path.name, name)


def test_functions_that_the_architecture_names_stand_in_their_files() -> None:
    page = ROOT / "docs" / "architecture.md"
    named = re.findall(r"\[`(\w+)`\]\(([^)]+\.py)\)", page.read_text(encoding="utf-8"))
    assert len(named) > 20
    for name, target in named:
        source = (page.parent / target).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE), (name, target)


def test_every_example_stands_in_a_fence_that_hides_nothing() -> None:
    """Doctest takes a fence right behind a result for a part of the result."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert ">>>" not in _FENCE.sub("", text), path.name
        for block in re.findall(r"^ *```pycon\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            assert block.endswith("\n\n"), f"{path.name}: {block[-80:]}"


def test_the_operator_table_is_current() -> None:
    """If not: python tools/write_reference.py."""
    tool = runpy.run_path(str(ROOT / "tools" / "write_reference.py"))
    page = tool["PAGE"].read_text(encoding="utf-8")
    assert tool["BEGIN"] in page
    assert tool["END"] in page
    assert page == tool["updated"](page)


def test_the_operator_table_says_what_a_line_says() -> None:
    table = runpy.run_path(str(ROOT / "tools" / "write_reference.py"))["table"]()
    assert "| Gemm | `N i, o i, o -> N o` | `N i o` | `i` |" in table
    assert "| CastLike | `*a, _ -> *a` |" in table


def test_the_reference_lists_every_cost() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert all(f"| `{kind}` |" in reference for kind in _BUILDERS)


def test_the_reference_lists_every_exit_code() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    table = reference.partition("## Exit codes")[2].partition("## ")[0]
    for error in MorphError.__subclasses__():
        if error.__module__ == MorphError.__module__:
            (row,) = [line for line in table.splitlines() if f"`{error.__name__}`" in line]
            assert row.startswith(f"| {error.exit_code} |"), row


def test_the_ladder_is_what_the_program_gives() -> None:
    """If not: python tools/draw_ladder.py."""
    tool = runpy.run_path(str(ROOT / "tools" / "draw_ladder.py"))
    assert tool["PAGE"].read_text(encoding="utf-8") == tool["drawing"]()


_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.long
def test_the_example_of_own_operators_runs_as_it_stands(tmp_path: Path) -> None:
    """Files are written as the page shows them, commands print what it says they print."""
    page = (ROOT / "docs" / "custom-op.md").read_text(encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=str(ROOT))

    def start(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.stdout

    ran = 0
    for language, block in _BLOCK.findall(page):
        if language == "python":
            name = block.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(block, encoding="utf-8")
            if name == "make_model.py":
                assert start(name) == ""
        elif language == "console":
            for command, expected in re.findall(
                r"^\$ morphgraph (.*)\n((?:[^$].*\n|\n)*)", block, re.M
            ):
                found = start("-m", "morphgraph", *shlex.split(command))
                check = doctest.OutputChecker().check_output
                assert check(expected, found, doctest.ELLIPSIS), (command, found)
                ran += 1
    assert ran == 6
    (toml,) = [block for language, block in _BLOCK.findall(page) if language == "toml"]
    assert list(tomllib.loads(toml)["project"]["entry-points"]) == [GROUP]


_FIGURE = re.compile(r"[\d.]+( [kMG](?= ))?|=+|(?<=\n)─+")


@pytest.mark.pages
def test_the_page_for_onnx_files_runs_as_it_stands(tmp_path: Path) -> None:
    """Commands print what the page shows, but for figures, which depend on the machine."""
    page = (ROOT / "docs" / "from-an-onnx-file.md").read_text(encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    found: dict[str, str] = {}

    def start(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        notes = done.stderr.splitlines(keepends=True)
        first = [line for line in notes if line.startswith("calibration data")]
        return "".join([*first, done.stdout, *(line for line in notes if line not in first)])

    for language, block in _BLOCK.findall(page):
        if language == "python":
            name = block.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(block, encoding="utf-8")
            if name == "make_model.py":
                assert start(name) == ""
        elif language == "console":
            for command, expected in re.findall(r"^\$ (.*)\n((?:[^$].*\n|\n)*)", block, re.M):
                program, *arguments = shlex.split(command)
                given = ["-m", program] if program == "morphgraph" else []
                found[command] = start(*given, *arguments)
                one, other = (
                    _FIGURE.sub("#", text.replace("...\n", "ANYTHING\n"))
                    for text in (expected, found[command])
                )
                check = doctest.OutputChecker().check_output
                options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                assert check(one.replace("ANYTHING", "..."), other, options), (
                    command,
                    found[command],
                )
    assert len(found) == 8
    (told,) = (text for command, text in found.items() if "accuracy" in command)
    accuracy = [float(share) for share in re.findall(r"([\d.]+)%", told)]
    assert accuracy[0] > 90
    assert accuracy[1] > max(accuracy[0] - 3, accuracy[2] + 10)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("page_name", "framework"),
    [
        ("accelerate", "accelerate"),
        ("language-models", "transformers"),
        ("lightning", "lightning"),
        ("timm", "timm"),
        ("transformers", "transformers"),
    ],
)
def test_the_page_of_a_framework_runs_as_it_stands(
    page_name: str, framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one program ends with an assertion about what it is for."""
    pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / f"{page_name}.md").read_text(encoding="utf-8")
    (block,) = (block for language, block in _BLOCK.findall(page) if language == "python")
    assert "\nassert " in block
    program = tmp_path / "program.py"
    program.write_text(f"import torch\ntorch.manual_seed(0)\n{block}", encoding="utf-8")
    runpy.run_path(str(program))


def test_what_the_limits_call_opaque_is_not_described() -> None:
    page = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    section = page.partition("Among them:")[2].partition("Some forms")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert named
    assert not named & set(described_ops())
