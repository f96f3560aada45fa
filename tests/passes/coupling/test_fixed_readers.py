"""Bins of a distribution that fixed numbers read keep their number, unless somebody asks."""

import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.errors import BudgetError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import PARAMETERS_KEY
from morphgraph.passes.checking.verify import verify
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.removal_path import plan
from morphgraph.passes.planning.uniform import set_widths
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import model_from_text

STEM = "c = Conv(x, u)  h = GlobalAveragePool(c)  f = Flatten(h)  a = MatMul(f, w)"
X = "float[1,3,4,4] x, float[5,3,1,1] u"
# What reads the 16 bins "s" of the last axis with the numbers "k", or the 4 x 16 of a box.
READERS = {
    "a product and a sum": (
        f"{X}, float[5,16] w, float[16] k",
        f"{STEM}  s = Softmax(a)  p = Mul(s, k)  y = ReduceSum(p, last)",
    ),
    "a matrix product": (
        f"{X}, float[5,16] w, float[16,1] k",
        f"{STEM}  s = Softmax(a)  y = MatMul(s, k)",
    ),
    "a linear layer": (
        f"{X}, float[5,16] w, float[1,16] k, float[1] o",
        f"{STEM}  s = Softmax(a)  y = Gemm<transB=1>(s, k, o)",
    ),
    "divided by a number first": (
        f"{X}, float[5,16] w, float[16] k, float[1] t",
        f"{STEM}  s = Softmax(a)  d = Mul(s, t)  p = Mul(d, k)  y = ReduceSum(p, last)",
    ),
    "a convolution over the sides of a box": (
        "float[1,3,4,4] x, float[5,3,1,1] u, float[64,5,1,1] w, float[1,16,1,1] k",
        """c = Conv(x, u)  a = Conv(c, w)  r = Reshape(a, box)
        t = Transpose<perm=[0, 2, 1, 3]>(r)  s = Softmax<axis=1>(t)  y = Conv(s, k)""",
    ),
    "a matrix product over the sides of a box": (
        "float[1,3,4,4] x, float[5,3,1,1] u, float[64,5,1,1] w, float[16] k",
        """c = Conv(x, u)  a = Conv(c, w)  r = Reshape(a, box)
        t = Transpose<perm=[0, 3, 1, 2]>(r)  s = Softmax(t)  y = MatMul(s, k)""",
    ),
}


def network(name: str, numbers: np.ndarray) -> ir.Model:
    shapes, body = READERS[name]
    model = model_from_text(
        f"""net ({shapes}) => (float y) <int64[1] last = {{-1}}, int64[4] box = {{1, 4, 16, 16}}> {{
            {body}
        }}"""
    )
    k = model.graph.initializers["k"]
    assert k.shape is not None
    array = numbers.reshape(k.shape.numpy()).astype(np.float32)
    k.const_value = ir.Tensor(array, name="k")
    return model


def bins(graph: ChannelGraph) -> list[tuple[int, bool]]:
    return [(g.width, g.held) for g in graph.groups if g.width == 16]


LEARNED = np.random.default_rng(0).standard_normal(16)


@pytest.mark.parametrize("name", READERS)
def test_bins_with_fixed_numbers_are_held_unless_included(name: str) -> None:
    graph = lift(network(name, np.arange(16)))
    assert bins(graph) == [(16, True)]
    (held,) = [group for group in graph.groups if group.held]
    assert not held.resizable
    assert "reads it right after a softmax, with fixed numbers" in str(held.reason)
    assert held.index not in plan(graph, {"macs": "70%"}).keep_channels(graph)
    with pytest.raises(BudgetError):
        plan(graph, {"macs": "10%"})
    chosen = plan(graph, {"macs": "80%"}, include=[held.id])
    (kept,) = chosen.keep_channels(graph).values()
    assert 0 < len(kept) < 16
    by_hand = set_widths(graph, {held.id: 5})
    assert len(by_hand.keep_channels(graph)[held.index]) == 5
    assert verify(graph, chosen, resize(graph, chosen.keep_channels(graph))).ok


@pytest.mark.parametrize("name", READERS)
def test_a_learned_reader_holds_nothing(name: str) -> None:
    assert bins(lift(network(name, LEARNED))) == [(16, False)]


@pytest.mark.parametrize("name", READERS)
def test_where_the_file_says_so_any_numbers_are_fixed(name: str) -> None:
    model = network(name, LEARNED)
    model.metadata_props[PARAMETERS_KEY] = '["u", "w"]'
    assert bins(lift(model)) == [(16, True)]


@pytest.mark.parametrize("numbers", [np.linspace(-1, 1, 16), np.arange(16)[::-1] * 0.1])
def test_equal_steps_are_fixed_wherever_they_begin(numbers: np.ndarray) -> None:
    assert bins(lift(network("a matrix product", numbers))) == [(16, True)]


def test_without_a_softmax_nothing_is_held() -> None:
    shapes, body = READERS["a matrix product"]
    text = f"net ({shapes}) => (float y) {{ {body.replace('Softmax', 'Sigmoid')} }}"
    model = model_from_text(text)
    array = np.arange(16, dtype=np.float32).reshape(16, 1)
    model.graph.initializers["k"].const_value = ir.Tensor(array, name="k")
    assert bins(lift(model)) == [(16, False)]
