"""Factor notation: what it reads, what it refuses (in one line that echoes it), what it binds."""

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from morphgraph.notation import Axis, NotationError, Star, bind, parse

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


def test_parse_reads_every_form() -> None:
    notation = parse("N (g i) *S, 1 i , _ -> N (g o) *T, ")
    assert notation.inputs == (
        (Axis(("N",)), Axis(("g", "i")), Star("S")),
        (Axis(()), Axis(("i",))),
        None,
    )
    assert notation.outputs == ((Axis(("N",)), Axis(("g", "o")), Star("T")), ())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("N c", "needs exactly one '->'"),
        ("N c -> N c -> N c", "needs exactly one '->'"),
        ("N c; -> N", "cannot read '; -> N'"),
        ("N (c -> N", "a '(' is not closed"),
        ("N (c, d) -> N", "a '(' is not closed"),
        ("N (a (b c)) -> N", "products do not nest"),
        ("N () -> N", "')' without factors before it"),
        ("N c) -> N", "')' without factors before it"),
        ("N (1 c) -> N", "only factors stand in a product, not '1'"),
        ("N (*S c) -> N", "only factors stand in a product, not '*S'"),
        ("*a *b -> *a", "an operand has two stars"),
        ("N _ -> N", "'_' stands alone"),
        ("_ N -> N", "'_' stands alone"),
    ],
)
def test_a_line_that_cannot_be_read_is_echoed(line: str, why: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse(line)
    message = str(caught.value)
    assert message.startswith(repr(line))
    assert why in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "inputs", "outputs", "why"),
    [
        ("N i, i -> N", [(2, 3), (4,)], [(2,)], "factor i is 3 on one axis and 4 on another"),
        ("N i -> N", [(2, 3, 4)], [(2,)], "an operand of rank 3 where the line has 2 axes"),
        ("N 1 -> N", [(2, 3)], [(2,)], "3 where the line has 1"),
        ("N (g i) -> N", [(2, 6)], [(2,)], "the size of g, i does not follow from the shapes"),
        ("g (g i) -> g", [(4, 6)], [(4,)], "(g i) = 6 is not a multiple of 4"),
        ("g i (g i) -> g", [(2, 3, 7)], [(2,)], "(g i) is 7, but g=2 x i=3"),
        ("*a, *a -> *a", [(2, 3), (4, 3)], [(4, 3)], "4 against 2 on an axis of *a"),
    ],
)
def test_a_line_that_does_not_fit_is_echoed_with_the_shapes(
    line: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], why: str
) -> None:
    with pytest.raises(NotationError) as caught:
        bind(line, inputs, outputs)
    message = str(caught.value)
    assert message.startswith(f"{line!r} does not fit shapes ")
    assert "x".join(map(str, inputs[0])) in message
    assert why in message
    assert "\n" not in message


def test_more_operands_than_the_line_names() -> None:
    with pytest.raises(NotationError, match="names 1 operands, the node has 2"):
        bind("N -> N", [(2,), (2,)], [(2,)])
    with pytest.raises(NotationError, match="names 1 results, the node has 2"):
        bind("N -> N", [(2,)], [(2,), (2,)])


def test_trailing_operands_may_be_absent() -> None:
    bound = bind("N i, o i, o -> N o, N o", [(1, 4), (8, 4)], [(1, 8)])
    assert bound.inputs[2] is None
    assert bound.outputs[1] is None
    assert dict(bound.sizes) == {"N": 1, "i": 4, "o": 8}


def test_an_axis_of_one_against_a_larger_one_stands_for_no_factor() -> None:
    bound = bind("*a, *a -> *a", [(2, 8, 5, 5), (8, 1, 1)], [(2, 8, 5, 5)])
    assert bound.inputs == ((("a0",), ("a1",), ("a2",), ("a3",)), (("a1",), (), ()))
    assert bind("*a, *a -> *a", [(2, 1), (2, 1)], [(2, 1)]).inputs[0] == (("a0",), ("a1",))


sizes = st.integers(1, 6)


@PROPERTY
@given(st.lists(sizes, min_size=1, max_size=4), st.data())
def test_stars_broadcast_as_numpy_does(shape: list[int], data: st.DataObject) -> None:
    """Both operands any broadcastable pair: the result's sizes are numpy's."""
    first = [data.draw(st.sampled_from([1, size])) for size in shape]
    second = [data.draw(st.sampled_from([1, size])) for size in shape][
        data.draw(st.integers(0, len(shape) - 1)) :
    ]
    result = np.broadcast_shapes(tuple(first), tuple(second))
    bound = bind("*a, *a -> *a", [tuple(first), tuple(second)], [result])
    assert tuple(bound.sizes.values()) == result
    for axes, own in zip(bound.inputs, (first, second)):
        assert axes is not None
        for names, size, whole in zip(axes, own, result[len(result) - len(own) :]):
            assert bool(names) == (size == whole)


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from("abcdefg"), sizes), max_size=6), st.data())
def test_bind_finds_the_sizes_it_was_built_from(
    drawn: list[tuple[str, int]], data: st.DataObject
) -> None:
    """Axes that are products of known factors: every size comes back, every axis multiplies out."""
    known = dict(drawn)
    line, shape = [], []
    for name, size in known.items():
        line.append(name)
        shape.append(size)
    for _ in range(data.draw(st.integers(0, 3))):
        names = data.draw(st.lists(st.sampled_from([*known, "x"] if known else ["x"]), max_size=3))
        if "x" in names:
            names = [n for n in names if n != "x"]
            names.insert(data.draw(st.integers(0, len(names))), "x")
        if names:
            line.append(f"({' '.join(names)})")
            shape.append(prod({**known, "x": 5}[n] for n in names))
    text = f"{' '.join(line)} -> 1"
    bound = bind(text, [tuple(shape)], [(1,)])
    used = {name for axes in bound.inputs[0] or () for name in axes}
    assert {n: s for n, s in bound.sizes.items() if n in used} == {
        n: {**known, "x": 5}[n] for n in used
    }
    for axis, size in zip(bound.inputs[0] or (), shape, strict=True):
        assert prod(bound.sizes[name] for name in axis) == size


@PROPERTY
@given(st.text("NSgio*()1_,-> ab", max_size=24))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    message = None
    try:
        notation = parse(text)
    except NotationError as error:
        message = str(error)
    if message is None:
        assert notation.text == text
        assert text.count("->") == 1
    else:
        assert repr(text) in message
        assert "\n" not in message


def test_expand_writes_stars_out() -> None:
    bound = bind("N i *S, o i *K -> N o *T", [(1, 3, 8, 8), (4, 3, 3, 3)], [(1, 4, 6, 6)])
    assert bound.expand("N i o *K *T") == ("N", "i", "o", "K0", "K1", "T0", "T1")
    with pytest.raises(NotationError, match="has no factor 'z'"):
        bound.expand("z")
