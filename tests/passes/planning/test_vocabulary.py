"""A smaller vocabulary gives the original's numbers for the tokens that stay, counted anew."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.cli import main
from morphgraph.errors import ArgumentError, UnsupportedError
from morphgraph.onnx_io.runtime import run

VOCABULARY, WIDTH, LENGTH = 24, 8, 6
KEPT = [0, 2, 3, 9, 15, 23]


class Decoder(nn.Module):
    """A causal block; the head tied to the embedding, apart from it, or two of them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=form == "bias")
        self.second = nn.Linear(WIDTH, VOCABULARY)
        if form == "tied":
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, places: Tensor) -> Any:
        x = self.tokens(ids) + self.places(places)
        h = self.norm(x)
        shares = (self.q(h) @ self.k(h).transpose(-1, -2)).softmax(-1)
        x = x + shares @ self.v(h)
        y = self.head(x)
        return (y, self.second(x)) if self.form == "two heads" else y


class Recurrent(nn.Module):
    """Another kind of language model; its ids are int32."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.LSTM(WIDTH, 10, batch_first=True),
        )
        self.head = nn.Linear(10, VOCABULARY)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.tokens(ids.int()))[0] + places[..., None] * 0.1)
        return y


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor(KEPT)[torch.randint(0, len(KEPT), (2, LENGTH), generator=generator)]
    return ids, torch.arange(LENGTH).expand(2, LENGTH).contiguous()


def network(form: str) -> nn.Module:
    torch.manual_seed(0)
    return (Recurrent() if form == "recurrent" else Decoder(form)).eval()


def lifted(form: str, **options: Any) -> Any:
    options = {"pin_rows": False, "pin_outputs": False} | options
    return mg.lift(mg.export(network(form), example()), **options)


@pytest.mark.parametrize("form", ["tied", "apart", "bias", "two heads", "recurrent"])
def test_logits_of_kept_tokens_are_the_originals_at_mapped_inputs(form: str) -> None:
    graph = lifted(form)
    made = mg.plan(graph, {}, vocabulary=KEPT)
    small = mg.apply(graph, made)  # and checked
    ids, places = (each.numpy() for each in example())
    names = [str(value.name) for value in graph.model.graph.inputs]
    number = mg.token_map(KEPT)
    anew = np.array([[number[int(token)] for token in row] for row in ids])
    whole = list(run(graph.model, dict(zip(names, (ids, places), strict=True))).values())
    found = list(run(small, dict(zip(names, (anew, places), strict=True))).values())
    for one, other in zip(whole, found, strict=True):
        assert other.shape == (2, LENGTH, len(KEPT))
        np.testing.assert_allclose(other, one[..., KEPT], rtol=1e-5, atol=1e-5)
    sizes = {str(k): tuple(v.shape or ()) for k, v in small.graph.initializers.items()}
    assert sizes["tokens.weight"][0] == len(KEPT)
    assert not any(VOCABULARY in size for size in sizes.values())


def test_a_budget_is_met_by_the_rest_and_the_plan_says_which_tokens_stay() -> None:
    graph = lifted("apart")
    made = mg.plan(graph, {"params": "40%"}, vocabulary=[*reversed(KEPT)], min_width=1, round_to=1)
    (ids,) = made.request["keep_tokens"].values()
    assert ids == KEPT
    assert mg.token_map(ids)[9] == 3
    assert made.cost["params"].after <= 0.4 * made.cost["params"].before
    mg.apply(graph, made)


def test_tokens_are_chosen_by_how_often_a_text_has_them() -> None:
    counts = np.bincount([5, 5, 5, 1, 1, 7, 3, 3, 3, 3], minlength=10)
    assert mg.frequent_tokens(counts.tolist()) == [1, 3, 5, 7]
    assert mg.frequent_tokens(counts.tolist(), 3, always=[0, 9]) == [0, 3, 9]
    assert mg.frequent_tokens({5: 3, 2: 0, 8: 3}, 1) == [5]  # of equal ones the first
    assert mg.frequent_tokens({}, always=[4]) == [4]
    with pytest.raises(ArgumentError, match="2 tokens stay in any case, and 1 may"):
        mg.frequent_tokens({5: 3}, 1, always=[0, 1])
    with pytest.raises(ArgumentError, match="uses no token"):
        mg.frequent_tokens([0, 0])


def test_what_cannot_be_done_says_so() -> None:
    with pytest.raises(UnsupportedError, match="pin_rows=False, pin_outputs=False"):
        mg.plan(lifted("tied", pin_rows=True), {}, vocabulary=KEPT)
    with pytest.raises(ArgumentError, match="give it alone"):
        mg.plan(lifted("tied"), {}, vocabulary=KEPT, keep_tokens=KEPT)
    with pytest.raises(ArgumentError, match="from 0 to 23"):
        mg.plan(lifted("tied"), {}, vocabulary=[*KEPT, VOCABULARY])
    dense = mg.lift(
        mg.export(nn.Linear(3, 4), (torch.randn(1, 3),)), pin_rows=False, pin_outputs=False
    )
    with pytest.raises(UnsupportedError, match="no input numbers the rows"):
        mg.plan(dense, {}, vocabulary=[0])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, ids, plan, small = (
        tmp_path / name for name in ("m.onnx", "ids.json", "p.json", "s.onnx")
    )
    mg.save(mg.export(network("bias"), example()), model)
    ids.write_text(json.dumps(KEPT))
    asked = ["plan", model, "--vocabulary", ids, "-o", plan]
    assert main(list(map(str, asked))) == 0
    assert main(["apply", str(model), str(plan), "-o", str(small)]) == 0
    assert tuple(mg.load(small).graph.outputs[0].shape or ())[-1] == len(KEPT)
    capsys.readouterr()
    assert main([*map(str, asked[:-2]), "--keep-tokens", str(ids)]) == 2
    assert "--vocabulary says what" in capsys.readouterr().err
