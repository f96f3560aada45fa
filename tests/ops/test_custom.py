"""Operators that users teach: lines, attributes, shapes, files, plugins."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import morphgraph as mg
from morphgraph.errors import ArgumentError, FileError, ModelError, MorphWarning, UnsupportedError
from morphgraph.notation import NotationError, result_shapes
from morphgraph.ops import entry_of
from morphgraph.ops.custom import load_ops, register
from morphgraph.ops.op import _REGISTRY
from morphgraph.ops.plugins import load_plugins
from morphgraph.testing import model_from_text, random_plan
from morphgraph.torch_io.running import run

HEAD = '<ir_version: 10, opset_import: ["": 20, "com.acme": 1]>'


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test teaches is forgotten behind it."""
    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)
    load_plugins.cache_clear()


def lower_gate(b: Any, n: Any) -> Any:
    return b.call(torch.mul, b.tensor(n, 0), b.method("reshape", b.tensor(n, 1), (-1, 1, 1)))


def lower_shuffle(b: Any, n: Any, *, groups: int) -> Any:
    return b.call(torch.nn.functional.channel_shuffle, b.tensor(n, 0), groups)


GATED = """
net (float[N,3,4,4] x, float[8,3,1,1] w1, float[8] g, float[2,8,1,1] w2) => (float[N,2,4,4] y) {
  a = Conv(x, w1)
  b = com.acme.Gate(a, g)
  y = Conv(b, w2)
}"""
SHUFFLED = """
net (float[1,3,4,4] x, float[12,3,1,1] w1, float[2,12,1,1] w2) => (float[1,2,4,4] y) {
  a = Conv(x, w1)
  b = com.acme.Shuffle<groups=3>(a)
  y = Conv(b, w2)
}"""


def teach_gate() -> None:
    register("com.acme::Gate", "N c *S, c -> N c *S", gate=True, lower=lower_gate)


def teach_shuffle() -> None:
    register(
        "com.acme::Shuffle",
        "N (g c) *S -> N (c g) *S",
        sizes={"g": "groups"},
        prefer="c g",
        lower=lower_shuffle,
    )


@pytest.mark.parametrize(
    ("text", "teach", "width"), [(GATED, teach_gate, 8), (SHUFFLED, teach_shuffle, 4)]
)
def test_a_taught_operator_is_resized_right(text: str, teach: Any, width: int) -> None:
    """PyTorch is the oracle; a wrong slice of a kernel is rejected."""
    teach()
    graph = mg.lift(model_from_text(HEAD + text))
    (group,) = [group for group in graph.groups if group.resizable]
    assert group.width == width
    for seed in range(3):
        plan = random_plan(graph, seed)
        small = mg.apply(graph, plan)
        report = mg.verify(graph, plan, small)
        assert report.ok
        assert report.by == "PyTorch"
        assert report.sensitivity > 1e-2
        value = small.graph.initializers["w2"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01))
        assert not mg.verify(graph, plan, small).ok


def test_an_attribute_that_holds_a_size_follows() -> None:
    register("com.acme::Shuffle", "N (g c) *S -> N (c g) *S", sizes={"g": "groups"}, prefer="g c")
    graph = mg.lift(model_from_text(HEAD + SHUFFLED))
    assert graph.group("Conv_a").width == 3  # whole groups
    small = mg.apply(graph, mg.uniform(graph, 0.67), verify=False)
    (node,) = [node for node in small.graph if node.op_type == "Shuffle"]
    assert node.attributes["groups"].as_int() == 2


def test_a_resize_hook_sees_old_and_new() -> None:
    heard = []

    def resize(n: Any, new: Any, *, groups: int) -> None:
        heard.append((groups, n.shape(0)[1], new.shape(0)[1], list(new.positions(0, 1))))
        with pytest.warns(DeprecationWarning, match="positions"):
            assert list(new.kept(0, 1)) == list(new.positions(0, 1))

    register("com.acme::Shuffle", "N c *S -> N c *S", resize=resize)
    graph = mg.lift(model_from_text(HEAD + SHUFFLED))
    plan = mg.uniform(graph, 0.5, round_to=1)
    mg.apply(graph, plan, verify=False)
    (kept,) = plan.keep_channels(graph).values()
    assert heard == [(3, 12, 6, list(kept))]


def test_several_products_are_added() -> None:
    register("com.acme::Gate", "N c *S, c -> N c *S", macs="N c *S + c")
    graph = mg.lift(model_from_text(HEAD + GATED))
    assert graph.batch == 2
    convolutions = 16 * 3 * 8 + 16 * 8 * 2
    assert mg.cost(graph, "macs").total == convolutions + 16 * 8 + 8 / 2  # per sample


@pytest.mark.parametrize(
    ("line", "operands", "expected"),
    [
        ("N c *S, c -> N c *S", [(2, 8, 4, 4), (8,)], [(2, 8, 4, 4)]),
        ("N i, i o -> N o, o", [(2, 3), (3, 5)], [(2, 5), (5,)]),
        ("*a, *a -> *a", [(4, 1, 3), (5, 3)], [(4, 5, 3)]),
        ("N c *S -> N c 1", [(2, 8)], [(2, 8, 1)]),
        ("N c *S -> N c *T", [(2, 8, 4)], [None]),
        ("N c -> N d, N", [(2, 8)], [None, (2,)]),
        ("N c, *a -> N *a", [(2, 8), None], [None]),
    ],
)
def test_result_shapes(line: str, operands: list[Any], expected: list[Any]) -> None:
    assert result_shapes(line, operands) == expected


def test_a_shape_function_gets_shapes_and_attributes() -> None:
    def shape(x: tuple[int, ...], *, stride: int = 1) -> list[tuple[int, ...]]:
        return [(x[0], x[1], x[2] // stride, x[3] // stride), x[:1]]

    register("com.acme::Pool", "N c *S -> N c *T, N", shape=shape)
    text = """net (float[N,3,4,6] x) => (float[N,3,2,3] y) {
        a, b = com.acme.Pool<stride=2>(x)  y = Relu(a)
    }"""
    graph = mg.lift(model_from_text(HEAD + text))
    assert graph.shapes["a"] == (2, 3, 2, 3)
    assert graph.shapes["b"] == (2,)


def test_shapes_that_the_model_declares_stay() -> None:
    register("com.acme::Gate", "N c *S, _ -> N c *T", shape=lambda *_: (9, 9, 9, 9))
    text = GATED.replace(" {", " <float[N,8,4,4] b> {", 1).replace("N,", "1,")
    assert mg.lift(model_from_text(HEAD + text)).shapes["b"] == (1, 8, 4, 4)


@pytest.mark.parametrize(
    ("line", "shape", "words"),
    [
        ("N c *S, d c -> N c *S", None, "'N c *S, d c -> N c *S' does not fit shapes 2x8x4x4, 8"),
        ("N c *S, c -> N c *S", lambda x: x, "its entry raised TypeError"),
        ("N c *S, c -> N c *S", lambda x, g: (*x, 3), "does not fit shapes"),
    ],
)
def test_a_line_that_does_not_fit_names_itself_the_node_and_its_file(
    line: str, shape: Any, words: str
) -> None:
    register("com.acme::Gate", line, shape=shape)
    with pytest.raises(ModelError, match="Gate_b") as caught:
        mg.lift(model_from_text(HEAD + GATED))
    assert words in str(caught.value)
    assert f"{Path(__file__).name}:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_anybody_who_knows_the_shape_the_message_says_what_to_do() -> None:
    with pytest.warns(mg.MorphWarning, match=r"teach the operator .*--ops.*value_info"):
        mg.lift(model_from_text(HEAD + GATED))
    register("com.acme::Gate", "N c *S, c -> N c *T")
    with pytest.warns(mg.MorphWarning, match=rf"{Path(__file__).name}:\d+\) a shape function"):
        mg.lift(model_from_text(HEAD + GATED))


@pytest.mark.parametrize("option", ["macs", "statistical", "contracted", "prefer"])
def test_a_factor_that_the_line_has_not_is_refused_at_once(option: str) -> None:
    wrong: dict[str, Any] = {option: "d"}
    with pytest.raises(NotationError, match="has no factor 'd'"):
        register("com.acme::Gate", "N c *S, c -> N c *S", **wrong)
    assert entry_of("Gate", "com.acme") is None


def test_an_attribute_without_a_size_leaves_the_node_opaque() -> None:
    register("com.acme::Shuffle", "N (g c) *S -> N (c g) *S", sizes={"g": "parts"})
    text = SHUFFLED.replace(" {", " <float[1,12,4,4] b> {", 1)
    (node,) = [n for n in mg.lift(model_from_text(HEAD + text)).ops if n.opaque]
    assert node.opaque == "attribute 'parts' holds no size"


def test_who_may_teach_an_operator_again() -> None:
    for _ in range(2):
        teach_gate()  # the same statement
    with pytest.raises(ValueError, match=rf"already, made in .*{Path(__file__).name}:\d+"):
        register("com.acme::Gate", "N c *S, c -> N c *S")
    with pytest.raises(
        ValueError, match=r"ai.onnx::Relu has an entry already, of the program's own"
    ):
        register("Relu", "*a -> *a")
    cell = "register('com.acme::Cell', 'N c -> N c', gate={})"
    for number in range(2):  # a notebook gives every version of a cell a name, and no file
        exec(compile(cell.format(bool(number)), f"<cell {number}>", "exec"), {"register": register})
    entry = entry_of("Cell", "com.acme")
    assert entry is not None
    assert entry.origin == "<cell 1>:1"


def test_a_model_that_nobody_can_run_says_both_reasons() -> None:
    register("com.acme::Gate", "N c *S, c -> N c *S")
    graph = mg.lift(model_from_text(HEAD + GATED))
    with pytest.raises(UnsupportedError, match=r"ONNX Runtime.*PyTorch.*Gate_b.*--no-verify"):
        mg.apply(graph, mg.uniform(graph, 0.5))


def test_torch_runs_what_onnx_runtime_runs() -> None:
    from morphgraph.onnx_io.runtime import random_inputs, run as run_in_ort

    text = """net (float[2,3,4,4] x, float[8,3,1,1] w) => (float[2,8,4,4] y, float[2,8] z) {
        a = Conv(x, w)  y = Relu(a)  p = GlobalAveragePool(y)  z = Flatten(p)
    }"""
    model = mg.lift(model_from_text(HEAD + text)).model
    feeds = random_inputs(model)
    expected = run_in_ort(model, feeds)
    found = run(model, feeds)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)


# -- files and plugins ----------------------------------------------------------------------------

GATE_FILE = """
import morphgraph as mg
mg.register("com.acme::Gate", "N c *S, c -> N c *S", gate=True)
"""


def test_a_file_teaches_and_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_ops.py").write_text("LINE = 'N c *S, c -> N c *S'\n")
    file = tmp_path / "ops.py"
    file.write_text(
        "import morphgraph as mg\nfrom neighbour_of_ops import LINE\n"
        "mg.register('com.acme::Gate', LINE)\n"
    )
    before = list(sys.path)
    load_ops(file)
    assert sys.path == before
    entry = entry_of("Gate", "com.acme")
    assert entry is not None
    assert entry.origin == f"{file}:3"
    load_ops(file)  # the same file again


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\nraise RuntimeError('no luck')\n", "ops.py:2: RuntimeError: no luck"),
        ("x = (\n", "ops.py:1: SyntaxError"),
        ("import no_such_module_anywhere\n", "ops.py:1: ModuleNotFoundError"),
        ("from morphgraph import register\nregister('A', 'N c')\n", "ops.py:2: NotationError"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, source: str, words: str) -> None:
    file = tmp_path / "ops.py"
    file.write_text(source)
    with pytest.raises(ArgumentError) as caught:
        load_ops(file)
    assert words in str(caught.value)
    with pytest.raises(FileError, match="no such file"):
        load_ops(tmp_path / "nobody.py")


def install(folder: Path, name: str, target: str, source: str) -> None:
    """A package with an entry point, as pip would leave it."""
    module = target.partition(":")[0]
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[morphgraph.ops]\n{name} = {target}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins.cache_clear()
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("acme_module", GATE_FILE),
        ("acme_function:teach", "def teach():\n" + GATE_FILE.replace("\n", "\n    ")),
    ],
)
def test_a_plugin_is_found(site: Path, target: str, source: str) -> None:
    install(site, "acme", target, source)
    graph = mg.lift(model_from_text(HEAD + GATED))
    assert graph.group("Conv_a").resizable


def test_a_broken_plugin_is_named_and_the_others_work(site: Path) -> None:
    install(site, "aaa", "acme_broken", "raise SystemExit('out of luck')\n")
    install(site, "bbb", "acme_missing:nobody", "x = 1\n")
    install(site, "ccc", "acme_good", GATE_FILE)
    with pytest.warns(MorphWarning) as caught:
        assert mg.lift(model_from_text(HEAD + GATED)).group("Conv_a").resizable
    words = [str(warning.message) for warning in caught]
    assert len(words) == 2
    assert "plugin 'aaa' of aaa (acme_broken): SystemExit: out of luck" in words[0]
    assert "plugin 'bbb'" in words[1]
    mg.lift(model_from_text(HEAD + GATED))  # and warned once


def test_nobody_looks_for_plugins_without_need(site: Path) -> None:
    install(site, "acme", "acme_loud", "raise RuntimeError\n")
    text = "net (float[1,3] x, float[3,4] w) => (float[1,4] y) { y = MatMul(x, w) }"
    mg.lift(model_from_text(HEAD + text))
    assert load_plugins.cache_info().currsize == 0
    assert "acme_loud" not in sys.modules


def test_what_the_user_teaches_wins_over_a_plugin(site: Path) -> None:
    install(site, "acme", "acme_other", GATE_FILE)
    teach_gate()
    with pytest.warns(MorphWarning, match=r"plugin 'acme'.*has an entry already"):
        assert entry_of("Unheard", "com.acme") is None
    entry = entry_of("Gate", "com.acme")
    assert entry is not None
    assert Path(entry.origin.rpartition(":")[0]) == Path(__file__)
