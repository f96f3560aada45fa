"""What is never done in the sources: unpickling, loading YAML objects, running what a file says."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    file
    for folder in ("morphgraph", "passes", "tools", "examples")
    for file in (ROOT / folder).rglob("*.py")
)

# Modules that build objects from bytes, whatever these say.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"} | {
    "marshal"
}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"} | {
    "pandas.read_pickle",
    "pd.read_pickle",
    "torch.jit.load",
    "shutil.unpack_archive",
}
# By the call, what an argument must be.
REQUIRED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}


def named(node: ast.expr) -> str:
    """A dotted name, as the source writes it."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(source: str) -> Iterator[str]:
    """What a source does that none may."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                modules = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), names=aliases):
                modules = [module, *(f"{module}.{alias.name}" for alias in aliases)]
            case _:
                modules = []
        for module in modules:
            if module.split(".")[0] in FORBIDDEN_MODULES:
                yield f"line {node.lineno}: imports {module}"  # type: ignore[attr-defined]
            if module in {*REQUIRED, *FORBIDDEN_CALLS, "torch.load", "numpy.load"}:
                yield f"line {node.lineno}: imports {module}"  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        name = named(node.func)
        if name in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: calls {name}"
        if name.endswith("Unpickler") or (name.endswith(".loads") and not name.startswith("json.")):
            yield f"line {node.lineno}: calls {name}"
        if name in REQUIRED:
            key, wanted = REQUIRED[name]
            given = {each.arg: each.value for each in node.keywords}
            value = given.get(key)
            if not isinstance(value, ast.Constant) or value.value is not wanted:
                yield f"line {node.lineno}: {name} without {key}={wanted}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_source_runs_what_a_file_says(file: Path) -> None:
    assert list(faults(file.read_text(encoding="utf-8"))) == []


BAD: dict[str, str] = {
    "import pickle": "imports pickle",
    "from pickle import loads": "imports pickle",
    "import numpy as np\nnp.load('a')": "allow_pickle=False",
    "import numpy as np\nnp.load('a', allow_pickle=True)": "allow_pickle=False",
    "from numpy import load": "imports numpy.load",
    "import torch\ntorch.load('a')": "weights_only=True",
    "import torch\ntorch.load('a', weights_only=False)": "weights_only=True",
    "flag = True\nimport torch\ntorch.load('a', weights_only=flag)": "weights_only=True",
    "from torch import load": "imports torch.load",
    "import yaml\nyaml.load(text)": "calls yaml.load",
    "eval('1')": "calls eval",
    "import cloudpickle as c\nc.loads(b'')": "imports cloudpickle",
}


@pytest.mark.parametrize("source", BAD)
def test_what_would_be_found(source: str) -> None:
    assert any(BAD[source] in words for words in faults(source))


def test_a_checkpoint_that_is_a_pickle_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    import torch

    from morphgraph.errors import FileError
    from morphgraph.recipes.checkpoint import Checkpoint

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (str(tmp_path / "run"),)

    for write in (
        lambda path: path.write_bytes(pickle.dumps(Trap())),
        lambda path: torch.save(Trap(), path),
        lambda path: torch.save({"model": Trap()}, path),
    ):
        write(tmp_path / "phase.pt")
        with pytest.raises(FileError, match=r"phase\.pt: no checkpoint of a run"):
            Checkpoint(tmp_path / "phase.pt").load(torch.device("cpu"))
        assert not (tmp_path / "run").exists()
