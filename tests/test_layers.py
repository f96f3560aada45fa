"""Imports point one way, and torch stays out of the lower layers."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

PACKAGE = Path(__file__).parent.parent / "morphgraph"

# From the bottom up. A unit (a module of the package, a folder, or a stage of the passes) imports
# itself and lower layers.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {"_moved", "arrays", "collector", "errors", "options", "tolerances", "version", "words"}
    ),
    frozenset({"notation"}),
    frozenset({"onnx_io"}),
    frozenset({"device", "runtimes"}),
    frozenset({"calibration"}),
    frozenset({"edit", "graph"}),
    frozenset({"ops"}),
    frozenset({"passes.canonical"}),
    frozenset({"passes.coupling"}),
    frozenset({"passes.lift"}),
    frozenset({"passes.analysis"}),
    frozenset({"plans"}),
    frozenset({"passes.planning"}),
    frozenset({"passes.rewrite"}),
    frozenset({"passes.calibration"}),
    frozenset({"passes.refit"}),
    frozenset({"passes.checking"}),
    frozenset({"passes"}),
    frozenset({"testing", "torch_io"}),
    frozenset({"labels"}),
    frozenset({"origin"}),
    frozenset({"workflow"}),
    frozenset({"folders"}),
    frozenset({"benchmark", "train"}),
    frozenset({"integrations"}),
    frozenset({"shrinker"}),
    frozenset({"shrinking"}),
    frozenset({"steps"}),
    frozenset({"olive", "trained"}),
    frozenset({"learning"}),
    frozenset({"slicing"}),
    frozenset({"recipes"}),
    frozenset({"report"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
# A lowering stands with its operator; the type of the builder that it is given lies above.
FOR_TYPES = {("ops", "torch_io")}
WITHOUT_TORCH = (
    "calibration",
    "device",
    "edit",
    "graph",
    "options",
    "notation",
    "onnx_io",
    "ops",
    "passes",
    "plans",
    "benchmark",
    "runtimes",
)


def _sources() -> dict[str, str]:
    """Dotted name -> source of every module but the package's own table of names."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "passes").rglob("*.py")]
    found = {}
    for file in files:
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = file.read_text(encoding="utf-8")
    del found["morphgraph"]
    return found


def _imported(node: ast.AST) -> list[str]:
    """The modules that one statement imports.

    In ``from morphgraph import x`` the unit is x, elsewhere the first two parts say it all.
    """
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "morphgraph":
        return [f"morphgraph.{alias.name}" for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def _unit(name: str) -> str:
    """Of a dotted name: ``ops`` for ``morphgraph.ops.pool``, and passes by their stage."""
    parts = name.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["passes"] else 1])


def upward_imports(sources: dict[str, str]) -> list[str]:
    """Imports inside the package that do not point down, in functions as well.

    Those for type checkers alone may where ``FOR_TYPES`` says so.
    """
    wrong = []
    for name, source in sources.items():
        unit = _unit(name)
        tree = ast.parse(source)
        typing = set(_for_type_checkers(tree))
        for node in ast.walk(tree):
            for imported in _imported(node):
                target = _unit(imported)
                points_down = target == unit or RANK.get(target, len(LAYERS)) < RANK.get(unit, -1)
                is_type = (unit, target) in FOR_TYPES and node in typing
                if imported.split(".")[0] == "morphgraph" and not points_down and not is_type:
                    wrong.append(f"{name} imports {imported}")
    return wrong


def _is_for_type_checkers(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _for_type_checkers(tree: ast.Module) -> Iterator[ast.AST]:
    """Everything that stands under ``if TYPE_CHECKING``."""
    for node in ast.walk(tree):
        if _is_for_type_checkers(node):
            for statement in node.body:
                yield from ast.walk(statement)


def _at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported: not those of functions or type checkers."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if _is_for_type_checkers(node):
            yield from _at_import_time(node.orelse)
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from _at_import_time(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from _at_import_time(handler.body)


def torch_at_import_time(sources: dict[str, str]) -> list[str]:
    """The modules that import torch before anybody calls them."""
    return [
        name
        for name, source in sources.items()
        for node in _at_import_time(ast.parse(source).body)
        for imported in _imported(node)
        if imported.split(".")[0] in {"torch", "torchvision"}
    ]


def _lower(sources: dict[str, str]) -> dict[str, str]:
    return {n: source for n, source in sources.items() if n.split(".")[1] in WITHOUT_TORCH}


def operator_names(source: str, known: frozenset[str]) -> list[str]:
    """Names of operators in a source, but for those of the nodes that it makes.

    A rewrite names what it inserts: the first strings that are given to the editor's ``insert`` and
    ``replace``, or to helpers of the pass that are called like them.
    """
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    makers = [c for c in calls if ast.unparse(c.func).split(".")[-1].strip("_") in _MAKERS]
    made = {id(argument) for call in makers for argument in call.args}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in known and id(node) not in made
    ]


_MAKERS = {"insert", "replace"}


def test_passes_ask_for_facts_not_for_names() -> None:
    """What an operator is stands in its entry; canonicalization alone deals with ONNX's own."""
    from morphgraph.ops import described_ops

    known = frozenset(described_ops())
    stages = ("morphgraph.passes.", "morphgraph.passes.canonical")
    found = {
        name: operator_names(source, known)
        for name, source in _sources().items()
        if name.startswith(stages[0]) and not name.startswith(stages[1])
    }
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("if node.op_type == 'Add': pass", ["Add"]),
        ("if node.op_type in ('Add', 'Sub'): pass", ["Add", "Sub"]),
        ("match node.op_type:\n    case 'Add': pass", ["Add"]),
        ("editor.insert('Gather', [x])", []),
        ("self._insert(node, 'Gather', [x])", []),
        ("editor.insert('Gather', [x] if node.op_type == 'Add' else [])", ["Add"]),
    ],
)
def test_the_name_of_an_operator_is_seen(source: str, names: list[str]) -> None:
    assert operator_names(source, frozenset({"Add", "Gather", "Sub"})) == names


def test_every_unit_has_a_layer() -> None:
    assert {_unit(name) for name in _sources()} == set(RANK)


def test_imports_point_down() -> None:
    assert upward_imports(_sources()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("morphgraph.graph", "from morphgraph.passes.analysis.cost import cost"),
        ("morphgraph.ops.pool", "import morphgraph.torch_io.builder"),
        ("morphgraph.ops.pool", "def lower():\n    import morphgraph.torch_io.builder"),
        ("morphgraph.plans", "if TYPE_CHECKING:\n    import morphgraph.torch_io.builder"),
        ("morphgraph.plans", "def lower():\n    import morphgraph.torch_io.builder"),
        ("morphgraph.passes.analysis.cost", "from morphgraph import train"),
        ("morphgraph.benchmark.timing", "from morphgraph.recipes.data import Dataset"),
        ("morphgraph.graph", "import morphgraph"),
        ("morphgraph.nobody_knows", "import morphgraph.errors"),
    ],
)
def test_an_import_that_points_up_is_seen(name: str, source: str) -> None:
    assert len(upward_imports({name: source})) == 1


def test_torch_stays_out_of_the_lower_layers() -> None:
    assert torch_at_import_time(_lower(_sources())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from torch import nn",
        "try:\n    import torch.fx\nexcept ImportError:\n    pass",
        "class A:\n    import torch",
        "if __debug__:\n    import torch",
        "try:\n    pass\nexcept ImportError:\n    import torch",
    ],
)
def test_an_import_of_torch_is_seen(source: str) -> None:
    assert torch_at_import_time({"morphgraph.graph": source}) == ["morphgraph.graph"]


@pytest.mark.parametrize(
    "source",
    [
        "def lower():\n    import torch",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    ],
)
def test_an_import_that_waits_is_fine(source: str) -> None:
    assert torch_at_import_time({"morphgraph.graph": source}) == []


def test_the_lower_layers_load_without_torch() -> None:
    """The same by experiment: a library in between might import torch."""
    names = sorted(_lower(_sources()))
    code = "import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(n)\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
