"""What is built is what lies in the repository, and ``passes/`` is imported under one name."""

import ast
import importlib.util
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import morphgraph as mg

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def _package_folders() -> dict[str, Path]:
    """Every folder with sources by the name it is imported under; follows morphgraph/passes."""
    package = ROOT / "morphgraph"
    folders = {"morphgraph": package}
    passes = package / "passes"  # a link, which rglob does not follow
    for folder in (*package.rglob("*"), passes, *passes.rglob("*")):
        if folder.is_dir() and folder.name != "__pycache__" and any(folder.glob("*.py")):
            folders[".".join(folder.relative_to(ROOT).parts)] = folder
    return folders


def test_the_packages_are_the_folders() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(_package_folders())


def test_every_package_has_an_init_and_every_data_file_is_packaged() -> None:
    for name, folder in _package_folders().items():
        assert (folder / "__init__.py").is_file(), name
        patterns = SETUPTOOLS["package-data"].get(name, [])
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in {".py", ".pyc"}:
                assert any(fnmatch(file.name, pattern) for pattern in patterns), file


def test_passes_is_a_link_that_packaging_knows() -> None:
    assert (ROOT / "morphgraph" / "passes").readlink() == Path("../passes")
    assert SETUPTOOLS["package-dir"] == {"morphgraph.passes": "passes"}


def test_every_dependency_has_a_tested_version() -> None:
    def names(lines: list[str]) -> set[str]:
        cut = [line.split("[")[0] for line in lines if line and not line.startswith("#")]
        return {"".join(c if c.isalnum() or c in "-_" else " " for c in x).split()[0] for x in cut}

    project = PYPROJECT["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += [line for line in extra if not line.startswith(project["name"])]
    pinned = names((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    assert {x.lower() for x in names(wanted)} <= {x.lower() for x in pinned}


# Imports every module of the package from the repository's root, where `import passes` would work.
_IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
assert any(name.startswith("morphgraph.passes.") for name in sys.modules), "nothing was imported"
print("passes" in sys.modules)
"""


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_passes_is_never_a_module_of_its_own() -> None:
    files = [file.relative_to(ROOT) for file in (ROOT / "passes").rglob("[!_]*.py")]
    modules = [".".join(("morphgraph", *file.with_suffix("").parts)) for file in files]
    assert _python(_IMPORT_ALL, *modules) == "False"
    assert _python("import passes\n" + _IMPORT_ALL, *modules) == "True"  # the check can fail


def test_public_names_exist_and_type_checkers_see_the_same_ones() -> None:
    tree = ast.parse((ROOT / "morphgraph" / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == mg._HOMES
    for name, home in mg._HOMES.items():
        assert getattr(mg, name) is getattr(sys.modules[home], name)
        assert name in dir(mg)
    with pytest.raises(AttributeError, match="no_such_name"):
        mg.no_such_name  # noqa: B018


def test_no_function_has_the_name_of_a_module() -> None:
    """Importing ``morphgraph.x`` binds the module as an attribute, in place of a function ``x``."""
    modules = {path.stem for path in (ROOT / "morphgraph").iterdir()}
    assert modules.isdisjoint(mg._HOMES)


def test_the_version_is_written_once() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "morphgraph.version.__version__"}
    assert mg.__version__.count(".") == 2


def _selections() -> dict[str, list[str]]:
    """The options of pytest, by the target of the Makefile that runs it on all test paths."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for target, recipe in re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)+)", makefile, re.M):
        for line in re.findall(r"-m pytest (.*)$", recipe, re.M):
            options = re.sub(r"-n \d|-q", "", line).split()
            if not options or options[0] == "-m":  # neither a folder nor coverage
                found[target] = options
    return found


@pytest.mark.long
def test_every_test_runs_in_one_target_of_make(tmp_path: Path) -> None:
    """pytest itself selects from tests of no, one and two markers."""
    options = PYPROJECT["tool"]["pytest"]["ini_options"]
    markers = [marker.partition(":")[0] for marker in options["markers"]]
    assert markers == ["long", "pages", "slow"]
    assert {"--strict-markers"} <= set(options["addopts"])  # so that there are no others
    sets = {
        "none": (),
        "long": ("long",),
        "pages": ("pages",),
        "slow": ("slow",),
        "both": ("long", "slow"),
    }
    lines = ["import pytest"]
    for name, marks in sets.items():
        lines += [*(f"@pytest.mark.{mark}" for mark in marks), f"def test_{name}(): pass"]
    (tmp_path / "test_all.py").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    selected = {
        target: set(re.findall(r"::test_(\w+)", _collected(tmp_path, chosen)))
        for target, chosen in _selections().items()
    }
    assert selected == {
        "test": {"none"},
        "test-slow": {"long", "both"},
        "docs": {"pages"},
        "zoo-small": {"slow", "both"},
    }


def _collected(folder: Path, options: list[str]) -> str:
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*line, *options, "test_all.py"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hooks_and_continuous_integration_run_what_make_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", makefile, re.M)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert re.findall(r"entry: (?:env )?(.+)", hooks) == commands
    targets = ["check", "test"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^make (\S+)", script, re.M) == targets
    workflow = (ROOT / ".github" / "workflows" / "check.yml").read_text(encoding="utf-8")
    assert re.findall(r"make (?:PYTHON=python )?(\S+)", workflow) == [*targets, "test-slow"]
    (versions,) = re.findall(r"python: \[(.+)\]", workflow)
    classifiers = " ".join(PYPROJECT["project"]["classifiers"])
    assert re.findall(r"3\.\d+", versions) == re.findall(r":: (3\.\d+)", classifiers)


@pytest.mark.long
def test_sdist_and_wheel_hold_what_they_must(tmp_path: Path) -> None:
    """All modules, data files, the license and py.typed; no tests; no second ``passes``."""
    pytest.importorskip("setuptools", "77")  # with which the build needs nothing from elsewhere
    tool = runpy.run_path(str(ROOT / "tools" / "check_wheel.py"))
    sdist, wheel = tool["build"](tmp_path, "--no-isolation")
    assert tool["missing"](sdist, wheel) == []
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"morphgraph/py.typed", "morphgraph/passes/lift.py", "morphgraph/olive.py"} <= names
    assert any(name.startswith("morphgraph/report/pages/") and ".html" in name for name in names)
    poor = tmp_path / "poor.whl"
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(poor, "w") as less:
        for name in names - {"morphgraph/py.typed", "morphgraph/ops/linear.py"}:
            less.writestr(name, whole.read(name))
        less.writestr("tests/x.py", "")
    assert sorted(tool["missing"](sdist, poor)) == [
        "wheel: no morphgraph/ops/linear.py",
        "wheel: no morphgraph/py.typed",
        "wheel: tests/x.py",
    ]


def test_modules_are_found_under_their_former_names() -> None:
    from morphgraph._moved import MOVED

    for old, new in MOVED.items():
        code = f"import warnings; warnings.simplefilter('error'); import {old}"
        if old == "morphgraph.ort":
            with pytest.raises(AssertionError, match=f"{old} is now {new}"):
                _python(code)
        assert importlib.util.find_spec(new) is not None, new
        assert importlib.util.find_spec(old) is not None, old
    code = "import morphgraph.ort, morphgraph.passes.mask as mask; from morphgraph.train import run"
    code += (
        "; from morphgraph.passes.rewrite import mask as new; print(mask is new, run.__spec__.name)"
    )
    assert _python(code) == "True morphgraph.recipes.run"
