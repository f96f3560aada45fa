"""Perplexity is that of the tokens that follow, and of networks that do not see them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import morphgraph as mg
from morphgraph.passes.calibration.perplexity import foretelling, perplexity
from morphgraph.passes.calibration.segments import run_all
from morphgraph.shrinker import Shrinker
from morphgraph.testing import model_from_text

HEAD = "lm (int64[N,T] input_ids, float[20,8] table, float[8,16] up, float[16,8] down"
LOGITS = "=> (float[N,T,20] logits)"
BODY = """ x = Gather(table, input_ids) h = MatMul(x, up) r = Relu(h) d = MatMul(r, down)
  s = Add(x, d) back = Transpose<perm=[1,0]>(table) """
BIGRAM = f"{HEAD}) {LOGITS} {{ {BODY} logits = MatMul(s, back) }}"
# Sums over what has been read up to a token, and over the whole sequence.
CUMULATED = f"""{HEAD}) {LOGITS} {{ {BODY} one = Constant<value_int = 1>()
  c = CumSum(s, one) logits = MatMul(c, back) }}"""
WHOLE = f"""{HEAD}) {LOGITS} {{ {BODY} axes = Constant<value_ints = [1]>()
  m = ReduceMean(s, axes) c = Add(s, m) logits = MatMul(c, back) }}"""


def ids(count: int = 12, length: int = 9) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(20, size=(count, length))


@pytest.mark.parametrize("text", [BIGRAM, CUMULATED])
def test_it_is_what_torch_gives(text: str) -> None:
    model = model_from_text(text, ("input_ids",))
    feeds = [{"input_ids": part} for part in np.split(ids(), 3)]
    what = foretelling(model, feeds[0])
    assert what is not None
    found = perplexity(run_all(model, feeds), feeds, what)
    logits = [torch.tensor(each["logits"])[:, :-1] for each in run_all(model, feeds)]
    wanted = torch.tensor(ids())[:, 1:]
    loss = cross_entropy(torch.cat(logits).flatten(0, 1).double(), wanted.flatten())
    assert found == pytest.approx(loss.exp().item(), rel=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        BIGRAM.replace("int64[N,T]", "float[N,T,8]", 1)
        .replace("Gather(table, input_ids)", "Identity(input_ids)")
        .replace("input_ids", "x0"),
        BIGRAM.replace("logits = MatMul(s, back)", "logits = Slice(s, o, e, a)").replace(
            "back = Transpose<perm=[1,0]>(table)",
            "o = Constant<value_ints=[0]>() e = Constant<value_ints=[1]>() "
            "a = Constant<value_ints=[1]>()",
        ),
    ],
    ids=["sees later tokens", "no ids", "one number per sequence"],
)
def test_other_networks_foretell_nothing(text: str) -> None:
    model = model_from_text(text, ("input_ids", "x0"))
    name = model.graph.inputs[0].name or ""
    feed = ids() if name == "input_ids" else np.zeros((2, 9, 8), np.float32)
    assert foretelling(model, {name: feed}) is None


def test_shrink_tells_it_before_and_after() -> None:
    model = model_from_text(BIGRAM, ("input_ids",))
    result = mg.shrink(model, {"input_ids": ids(64)}, {"flops": "80%"}, curve=True)
    assert result.perplexity is not None
    shrinker = Shrinker(mg.lift(model), {"input_ids": ids(64)})
    assert result.perplexity.original == shrinker.perplexity()
    assert result.perplexity.refitted == shrinker.perplexity(result.model)
    assert [p.perplexity is not None for p in result.curve] == [True] * len(result.curve)


def test_a_tagger_of_fewer_tags_than_words_foretells_nothing() -> None:
    """Causal, and the first sequence has small ids alone: only a later one shows it."""
    text = BIGRAM.replace("float[N,T,20] logits", "float[N,T,8] logits")
    one = text.replace("logits = MatMul(s, back)", "logits = Relu(s)")
    model = model_from_text(one, ("input_ids",))
    feeds = [{"input_ids": ids(4) % 4}, {"input_ids": ids(4)}]
    what = foretelling(model, feeds[0])
    assert what is not None
    assert perplexity(run_all(model, feeds[:1]), feeds[:1], what) is not None
    assert perplexity(run_all(model, feeds), feeds, what) is None


def test_parameters_outside_of_embeddings() -> None:
    graph = mg.lift(model_from_text(BIGRAM, ("input_ids",)))
    assert mg.cost(graph, "params").total == 20 * 8 + 8 * 16 + 16 * 8
    assert mg.cost(graph, "body_params").total == 8 * 16 + 16 * 8
    # A table of which constant numbers choose rows is no embedding.
    text = "n (float[N,3] x, float[5,3] w) => (float[2,3] y) { i = Constant<value_ints=[0,2]>()"
    chosen = model_from_text(
        f"{text} g = Gather(w, i) s = ReduceSum<keepdims=0>(x) y = Add(g, s) }}"
    )
    assert mg.cost(mg.lift(chosen), "body_params").total == mg.cost(mg.lift(chosen), "params").total
