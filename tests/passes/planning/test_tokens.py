"""Embeddings that keep rows by token id: the original's numbers, for tokens counted anew."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.cli import main
from morphgraph.errors import FileError, MorphError
from morphgraph.onnx_io.inputs import load_indices
from morphgraph.onnx_io.runtime import run

VOCABULARY, WIDTH = 20, 8
KEPT = [1, 3, 4, 11, 19]


class Language(nn.Module):
    """Token and position embeddings, a block, and a head: tied to the tokens, untied, or none."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(6, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, 5 if head == "none" else VOCABULARY, bias=False)
        if head == "tied":
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        y: Tensor = self.head(h + self.down(self.up(h).relu()))
        return y


class Bag(nn.Module):
    """Two inputs that number two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.kind = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(4, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        y: Tensor = self.head((self.word(ids) + self.kind(kinds)).mean(1).relu())
        return y


def lifted(net: nn.Module, *examples: Tensor) -> Any:
    return mg.lift(mg.export(net.eval(), examples), pin_outputs=False, pin_rows=False)


@pytest.mark.parametrize("budget", [{}, {"flops": "60%"}])
@pytest.mark.parametrize("head", ["tied", "untied", "none"])
def test_rows_stay_by_token_id_and_a_tied_head_follows(head: str, budget: dict[str, str]) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 19, 4, 3, 11, 1]])
    graph = lifted(Language(head), ids)
    made = mg.plan(graph, budget, keep_tokens=KEPT)
    small = mg.apply(graph, made)  # and checked
    (name,) = [str(value.name) for value in graph.model.graph.inputs]
    assert made.request["keep_tokens"] == KEPT
    if budget:
        return
    anew = np.array([[KEPT.index(int(token)) for token in ids[0]]])
    (whole,) = run(graph.model, {name: ids.numpy()}).values()
    (part,) = run(small, {name: anew}).values()
    wanted = whole[..., KEPT] if head == "tied" else whole
    np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=1e-5)
    rows = [v.shape for k, v in small.graph.initializers.items() if "tokens" in k]
    assert [tuple(shape) for shape in rows if shape is not None] == [(len(KEPT), WIDTH)]


def test_an_untied_head_keeps_the_same_tokens_by_classes() -> None:
    torch.manual_seed(0)
    graph = lifted(Language("untied"), torch.zeros(1, 6, dtype=torch.int64))
    made = mg.plan(graph, {}, keep_tokens=KEPT, keep_classes=KEPT)
    small = mg.apply(graph, made)
    assert tuple(small.graph.outputs[0].shape or ())[-1] == len(KEPT)


def test_of_two_tables_one_is_named() -> None:
    torch.manual_seed(0)
    ids, kinds = torch.tensor([[3, 4, 19]]), torch.tensor([[0, 3, 1]])
    graph = lifted(Bag(), ids, kinds)
    with pytest.raises(MorphError, match=r"say of which table; .*20 rows.*4 rows"):
        mg.plan(graph, {}, keep_tokens=KEPT)
    made = mg.plan(graph, {}, keep_tokens={"word.weight": KEPT})
    small = mg.apply(graph, made)
    first, second = (str(value.name) for value in graph.model.graph.inputs)
    (whole,) = run(graph.model, {first: ids.numpy(), second: kinds.numpy()}).values()
    anew = np.array([[KEPT.index(int(token)) for token in ids[0]]])
    (part,) = run(small, {first: anew, second: kinds.numpy()}).values()
    np.testing.assert_allclose(part, whole, rtol=1e-4, atol=1e-5)


def test_rows_never_go_by_a_budget() -> None:
    graph = lifted(Language("none"), torch.zeros(1, 6, dtype=torch.int64))
    made = mg.plan(graph, {"params": "50%"})
    tables = {"tokens.weight": VOCABULARY, "places.weight": 6}
    small = mg.apply(graph, made)
    for name, rows in tables.items():
        shape = small.graph.initializers[name].shape
        assert shape is not None
        assert shape[0] == rows


@pytest.mark.parametrize(
    ("tokens", "why"),
    [([0, 20], "from 0 to 19"), ([2, 2], "each once"), ({"up.weight": [1]}, "no input numbers")],
)
def test_tokens_that_are_none(tokens: Any, why: str) -> None:
    graph = lifted(Language("none"), torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(MorphError, match=why):
        mg.plan(graph, {}, keep_tokens=tokens)


def test_a_graph_that_keeps_its_rows_says_how_to_lift() -> None:
    net = Language("none").eval()
    graph = mg.lift(mg.export(net, (torch.zeros(1, 6, dtype=torch.int64),)))
    with pytest.raises(MorphError, match="pin_rows=False"):
        mg.plan(graph, {}, keep_tokens=KEPT)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"1\n3\n4\n11\n19\n"), ("a.json", b"[1, 3, 4, 11, 19]"), ("a.npy", None)],
)
def test_ids_from_a_file(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is None:
        np.save(path, np.array(KEPT))
    else:
        path.write_bytes(content)
    assert load_indices(path) == KEPT


@pytest.mark.parametrize("content", ["", "1\ntwo", "[1, -2]", "[1.5]", "[true]", "{}"])
def test_files_that_hold_no_ids(tmp_path: Path, content: str) -> None:
    (tmp_path / "ids").write_text(content)
    with pytest.raises(FileError, match="list of ids"):
        load_indices(tmp_path / "ids")


def test_tokens_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan lists the tokens that stay; applied and checked, the network has as many."""
    torch.manual_seed(0)
    model, ids, plan = (tmp_path / name for name in ("m.onnx", "ids.txt", "p.json"))
    net = Language("tied").eval()
    mg.save(mg.export(net, (torch.zeros(1, 6, dtype=torch.int64),)), model)
    ids.write_text("\n".join(map(str, reversed(KEPT))))
    asked = ["plan", model, "--keep-tokens", ids, "--budget", "flops=60%", "-o", plan]
    assert main(list(map(str, asked))) == 0
    assert json.loads(plan.read_bytes())["request"]["keep_tokens"] == KEPT
    small = tmp_path / "s.onnx"
    assert main(["apply", str(model), str(plan), "-o", str(small)]) == 0
    capsys.readouterr()
    assert tuple(mg.load(small).graph.outputs[0].shape or ())[-1] == len(KEPT)
