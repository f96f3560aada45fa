"""Einsum's equation as notation, and its cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from morphgraph.ops import Description, OpNode, describe
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text

SHAPES = {"a": (2, 3, 4), "b": (4, 5), "c": (5, 6), "d": (2, 3, 4), "e": (1, 3, 4), "s": ()}


def text_of(equation: str, operands: str) -> str:
    shapes = [f"float[{','.join(map(str, SHAPES[name]))}] {name}" for name in operands]
    return f"""
        net ({", ".join(shapes)}) => (float y) {{
            y = Einsum<equation="{equation}">({", ".join(operands)})
        }}""".replace("float[] ", "float ")


def described(equation: str, operands: str) -> Description:
    model = model_from_text(text_of(equation, operands), inputs=tuple(operands))
    graph = lift(model)
    (node,) = graph.model.graph
    return describe(OpNode(node, frozenset({"b", "c"})))


@pytest.mark.parametrize(
    ("equation", "operands"),
    [
        ("ijk,kl->ijl", "ab"),
        ("ijk,kl->il", "ab"),
        ("...k,kl->...l", "ab"),
        ("ijk,kl,lm->ijm", "abc"),
        ("ijk,ijk->ij", "ad"),
        ("ijk,ijk->ijk", "ad"),
        ("ijk,ilk->ijl", "ad"),
        ("ijk->ik", "a"),
        ("ijk,kl->", "ab"),
    ],
)
def test_macs_are_those_of_torchs_counter(
    equation: str, operands: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", False)  # from the left
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *(torch.ones(SHAPES[name]) for name in operands))
    graph = lift(model_from_text(text_of(equation, operands), inputs=tuple(operands)))
    assert cost(graph, "macs").total * graph.batch * 2 == counter.get_total_flops()


def test_a_result_that_is_not_named_is_in_alphabetical_order() -> None:
    assert described("zij,jk", "ab").factors.keys() == {"z", "i", "j", "k"}
    model = lift(model_from_text(text_of("zaj,jk", "ab"), inputs=("a", "b"))).model
    assert [v.shape for v in model.graph.outputs] == [(3, 5, 2)]


def test_capital_letters_are_axes_of_their_own() -> None:
    description = described("Iji,ik->Ijk", "ab")
    assert [(f.size, f.pinned) for f in description.factors.values()] == [
        (2, None),
        (3, None),
        (4, None),
        (5, None),
    ]
    assert description.contracted == {"i"}


def test_a_dimension_of_one_stands_for_none() -> None:
    description = described("ijk,ijk->ij", "ae")
    assert [place.port for place in description.factors["i"].places] == [0, ~0]


def test_a_diagonal_is_left_alone() -> None:
    model = model_from_text(
        """net (float[3,3] x) => (float[3] y) {
            y = Einsum<equation="ii->i">(x)
        }"""
    )
    (node,) = lift(model).model.graph
    assert describe(OpNode(node)).opaque == "Einsum 'ii->i' takes a diagonal"
