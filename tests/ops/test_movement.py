"""Index maps against the operators themselves, run on an array of its own positions.

Every element of an operand carries a number of its own. Wherever such a number comes out, the
element went from one position to another, and the description must say so: a factor that stands on
both axes (or the pair is pinned) has an element that both positions share.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings, strategies as st
from onnx.reference import ReferenceEvaluator

from morphgraph.ops import Description, OpNode, Place, describe
from morphgraph.testing import model_from_text

# Operator, shapes of operands, attributes, constants behind the operands, number of results.
Case = tuple[str, list[tuple[int, ...]], dict[str, Any], list[Any], int]
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


def run(case: Case) -> tuple[Description, list[np.ndarray], list[np.ndarray]]:
    """The description of a node, its operands (numbered elements) and its results."""
    op_type, shapes, attributes, constants, results = case
    operands, start = [], 1
    for shape in shapes:
        count = int(np.prod(shape))
        operands.append(np.arange(start, start + count, dtype=np.float32).reshape(shape))
        start += count
    inputs = [ir.val(f"x{k}", ir.DataType.FLOAT, list(a.shape)) for k, a in enumerate(operands)]
    weights = []
    for k, numbers in enumerate(constants):
        tensor = ir.Tensor(np.array(numbers, dtype=np.int64), name=f"c{k}")
        if op_type == "Resize" and k == 0:
            tensor = ir.Tensor(np.array(numbers, dtype=np.float32), name=f"c{k}")
        weights.append(
            ir.Value(
                name=f"c{k}",
                shape=tensor.shape,
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        )
    given_inputs: list[ir.Value | None] = [*inputs, *weights]
    if op_type == "Resize":
        given_inputs.insert(1, None)
    elif op_type in ("ScatterElements", "ScatterND"):
        given_inputs = [inputs[0], *weights, inputs[1]]
    outputs = [ir.Value(name=f"y{k}") for k in range(results)]
    node = ir.node(op_type, given_inputs, attributes, outputs=outputs, name="n")
    graph = ir.Graph(
        inputs, outputs, nodes=[node], initializers=weights, opset_imports={"": 20}, name="g"
    )
    for value in outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    feeds = {str(value.name): array for value, array in zip(inputs, operands, strict=True)}
    expected: list[np.ndarray] = [*ReferenceEvaluator(proto).run(None, feeds)]
    for value, array in zip(outputs, expected, strict=True):
        value.shape = ir.Shape(array.shape)
    return describe(OpNode(node)), operands, expected


def check(case: Case) -> Description:
    description, operands, results = run(case)
    assert description.opaque is None
    source = np.concatenate([operand.reshape(-1) for operand in operands])
    owner = np.concatenate([np.full(o.size, k) for k, o in enumerate(operands)])
    where = [np.indices(o.shape).reshape(o.ndim, o.size) for o in operands]
    offset = np.concatenate([[0], np.cumsum([o.size for o in operands])])
    assert np.array_equal(source, np.arange(1, len(source) + 1))
    for k, result in enumerate(results):
        flat = np.rint(result.reshape(-1)).astype(np.int64)
        out_at = np.indices(result.shape).reshape(result.ndim, result.size)
        for number, (port, operand) in enumerate(zip(_ports(case), operands, strict=True)):
            moved = np.flatnonzero((flat > 0) & (owner[np.maximum(flat, 1) - 1] == number))
            in_at = where[number][:, flat[moved] - 1 - offset[number]]
            _check_pairs(description, port, operand.shape, in_at, ~k, out_at[:, moved])
    _check_covered(description, _ports(case), operands, results)
    return description


def _ports(case: Case) -> range:
    """The node's inputs that the operands are; constant indices stand between those of a write."""
    return range(0, 3, 2) if case[0].startswith("Scatter") else range(len(case[1]))


def _check_pairs(
    description: Description,
    port: int,
    shape: tuple[int, ...],
    in_at: np.ndarray,
    result: int,
    out_at: np.ndarray,
) -> None:
    """Whatever element of a free factor stood at the input position stands at the output's."""
    for factor in description.factors.values():
        if factor.pinned is not None or factor.size == 1:  # one channel cannot be removed
            continue
        here = [p for p in factor.places if p.port == port]
        there = [p for p in factor.places if p.port == result]
        for place in here:
            element = _elements(place, factor.size, shape[place.axis])[in_at[place.axis]]
            inside = element >= 0
            assert there or not inside.any(), f"{factor.name} vanishes"
            for other in there:
                size = int(out_at[other.axis].max(initial=0)) + 1
                table = _elements(other, factor.size, max(size, _extent(other, factor.size)))
                assert np.array_equal(table[out_at[other.axis]][inside], element[inside])


def _extent(place: Place, size: int) -> int:
    positions = place.map.pairs(size)[1]
    return int(positions.max(initial=-1)) + 1


def _elements(place: Place, size: int, extent: int) -> np.ndarray:
    """The element at every position of the axis, -1 where none stands."""
    elements, positions = place.map.pairs(size)
    table = np.full(max(extent, _extent(place, size)), -1)
    table[positions] = elements
    return table


def _check_covered(
    description: Description,
    numbers: Sequence[int],
    operands: Sequence[np.ndarray],
    results: Sequence[np.ndarray],
) -> None:
    """Every axis of every tensor is spoken for, and maps stay within it."""
    ports = {k: o.shape for k, o in zip(numbers, operands, strict=True)}
    ports |= {~k: r.shape for k, r in enumerate(results)}
    spoken = {(p.port, p.axis) for f in description.factors.values() for p in f.places}
    assert {(port, axis) for port, shape in ports.items() for axis in range(len(shape))} <= spoken
    for factor in description.factors.values():
        for place in factor.places:
            if place.port in ports:
                assert _extent(place, factor.size) <= ports[place.port][place.axis]


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def transposes(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    perm = draw(st.permutations(range(len(shape))))
    attributes = {"perm": list(perm)} if draw(st.booleans()) else {}
    return "Transpose", [shape], attributes, [], 1


@st.composite
def concats(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    parts = []
    for size in sizes:
        part = list(shape)
        part[axis] = size
        parts.append(tuple(part))
    return "Concat", parts, {"axis": axis}, [], 1


@st.composite
def splits(draw: st.DrawFn) -> Case:
    shape = list(draw(shapes))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shape[axis] = sum(sizes)
    if len(set(sizes)) == 1 and draw(st.booleans()):
        return "Split", [tuple(shape)], {"axis": axis, "num_outputs": len(sizes)}, [], len(sizes)
    return "Split", [tuple(shape)], {"axis": axis}, [sizes], len(sizes)


@st.composite
def slices(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    axes = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    starts, stops, steps = [], [], []
    for axis in axes:
        step = draw(st.sampled_from([1, 2, 3, -1, -2]))
        first = draw(st.integers(0, shape[axis] - 1))
        room = range(first, shape[axis]) if step > 0 else range(first, -1, -1)
        count = draw(st.integers(1, len(room[:: abs(step)])))
        last = room[:: abs(step)][count - 1]
        stop = last + (1 if step > 0 else -1)
        open_ended = -(2**63) + 1 if step < 0 else 2**63 - 1
        whole = count == len(room[:: abs(step)])
        starts.append(first if draw(st.booleans()) else first - shape[axis])
        stops.append(open_ended if stop < 0 or (whole and draw(st.booleans())) else stop)
        steps.append(step)
    signed = [axis if draw(st.booleans()) else axis - len(shape) for axis in axes]
    return "Slice", [shape], {}, [starts, stops, signed, steps], 1


@st.composite
def gathers(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    indices = draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=6))
    return "Gather", [shape], {"axis": axis}, [indices], 1


@st.composite
def pads(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    amounts = draw(st.lists(st.integers(0, 2), min_size=2 * len(shape), max_size=2 * len(shape)))
    return "Pad", [shape], {}, [amounts], 1


@st.composite
def expands(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    extra = draw(st.lists(st.integers(1, 3), max_size=2))
    target = [draw(st.integers(1, 4)) if s == 1 else draw(st.sampled_from([1, s])) for s in shape]
    return "Expand", [shape], {}, [[*extra, *target]], 1


@st.composite
def squeezes(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    if not ones or draw(st.booleans()):
        rank = len(shape) + 2
        axes = draw(st.lists(st.integers(0, rank - 1), min_size=2, max_size=2, unique=True))
        return "Unsqueeze", [shape], {}, [[a - rank if a % 2 else a for a in axes]], 1
    chosen = draw(st.lists(st.sampled_from(ones), min_size=1, unique=True))
    constants = [chosen] if draw(st.booleans()) else []
    return "Squeeze", [shape], {}, constants, 1


@st.composite
def reshapes(draw: st.DrawFn) -> Case:
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=5))

    def fold() -> list[int]:
        cuts = draw(st.lists(st.booleans(), min_size=len(factors), max_size=len(factors)))
        sizes = [1]
        for factor, cut in zip(factors, cuts, strict=True):
            if cut:
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        return sizes

    old, new = fold(), fold()
    if draw(st.booleans()):
        new = list(draw(st.permutations(new)))
    if draw(st.booleans()):
        new[draw(st.integers(0, len(new) - 1))] = -1
    return "Reshape", [tuple(old)], {}, [new], 1


@st.composite
def flattens(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    return "Flatten", [shape], {"axis": draw(st.integers(0, len(shape)))}, [], 1


@st.composite
def tiles(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    repeats = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    return "Tile", [shape], {}, [repeats], 1


@st.composite
def blocks(draw: st.DrawFn) -> Case:
    c, h, w, b = draw(st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 3)))
    if draw(st.booleans()):
        return "SpaceToDepth", [(2, c, h * b, w * b)], {"blocksize": b}, [], 1
    mode = draw(st.sampled_from(["DCR", "CRD"]))
    return "DepthToSpace", [(2, c * b * b, h, w)], {"blocksize": b, "mode": mode}, [], 1


@st.composite
def resizes(draw: st.DrawFn) -> Case:
    n, c, h, w = draw(st.tuples(*[st.integers(1, 3)] * 4))
    up, across = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    scales = [1.0, 1.0, float(up), float(across)]
    attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
    return "Resize", [(n, c, h, w)], {**attributes, "nearest_mode": "floor"}, [scales], 1


@st.composite
def some_indices(draw: st.DrawFn, shape: Sequence[int], size: int) -> np.ndarray:
    """Indices below a size, of which negative ones count from the end."""
    count = int(np.prod(shape))
    drawn = draw(st.lists(st.integers(-size, size - 1), min_size=count, max_size=count))
    return np.array(drawn, dtype=np.int64).reshape(shape)


@st.composite
def gathered_elements(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    axis = draw(st.integers(0, len(shape) - 1))  # the reference takes no negative axis,
    into = list(shape)  # and no shorter indices
    into[axis] = draw(st.integers(1, 4))
    if draw(st.booleans()):
        indices = draw(some_indices(into, shape[axis]))
    else:
        line = [into[axis] if k == axis % len(shape) else 1 for k in range(len(shape))]
        indices = np.broadcast_to(draw(some_indices(line, shape[axis])), into)
    return "GatherElements", [shape], {"axis": axis}, [indices], 1


@st.composite
def index_tuples(draw: st.DrawFn, sizes: Sequence[int]) -> np.ndarray:
    """Index tuples ``[..., k]``: a grid of positions, or any."""
    if draw(st.booleans()):
        orders = [draw(st.permutations(range(-size, size))) for size in sizes]
        lists = [order[: draw(st.integers(1, 3))] for order in orders]
        return np.stack(np.meshgrid(*lists, indexing="ij"), -1)
    front = draw(st.lists(st.integers(1, 3), max_size=2))
    columns = [draw(some_indices(front, size)) for size in sizes]
    return np.stack(columns, -1)


@st.composite
def gathered_tuples(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    batch = draw(st.integers(0, len(shape) - 1))
    depth = draw(st.integers(1, len(shape) - batch))
    tuples = draw(index_tuples(shape[batch : batch + depth]))
    indices = np.broadcast_to(tuples, (*shape[:batch], *tuples.shape))
    return "GatherND", [shape], {"batch_dims": batch}, [indices], 1


@st.composite
def scattered_tuples(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    depth = draw(st.integers(1, len(shape)))
    indices = draw(index_tuples(shape[:depth]))
    return "ScatterND", [shape, (*indices.shape[:-1], *shape[depth:])], {}, [indices], 1


@st.composite
def scattered_elements(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    updates = [draw(st.integers(1, size)) for size in shape]
    order = draw(st.permutations(range(-shape[axis], 0)))[: updates[axis]]
    if draw(st.booleans()):
        indices = draw(some_indices(updates, shape[axis]))
        indices = np.sort(indices, axis)
    else:
        line = [-1 if k == axis % len(shape) else 1 for k in range(len(shape))]
        indices = np.broadcast_to(np.reshape(order, line), updates)
    return "ScatterElements", [shape, tuple(updates)], {"axis": axis}, [indices], 1


CASES = {
    "gather elements": gathered_elements(),
    "gather nd": gathered_tuples(),
    "scatter nd": scattered_tuples(),
    "scatter elements": scattered_elements(),
    "transpose": transposes(),
    "concat": concats(),
    "split": splits(),
    "slice": slices(),
    "gather": gathers(),
    "pad": pads(),
    "expand": expands(),
    "squeeze": squeezes(),
    "reshape": reshapes(),
    "flatten": flattens(),
    "tile": tiles(),
    "blocks": blocks(),
    "resize": resizes(),
}


@pytest.mark.parametrize("kind", CASES)
def test_index_map_is_where_the_positions_go(kind: str) -> None:
    @EXAMPLES
    @given(CASES[kind])
    def property_holds(case: Case) -> None:
        check(case)

    property_holds()


def test_a_wrong_map_is_noticed() -> None:
    """The oracle itself: an offset that is off by one does not pass."""
    case: Case = ("Slice", [(6,)], {}, [[1], [5], [0], [1]], 1)
    description, operands, _ = run(case)
    (factor,) = description.factors.values()
    place = factor.places[0]
    factor.places[0] = type(place)(place.port, place.axis, type(place.map)(offset=0))
    in_at, out_at = np.array([[1, 2, 3, 4]]), np.array([[0, 1, 2, 3]])
    with pytest.raises(AssertionError):
        _check_pairs(description, 0, operands[0].shape, in_at, ~0, out_at)


@pytest.mark.parametrize(
    ("old", "new", "sizes"),
    [
        ((1, 512, 7, 7), (1, 25088), [512, 7, 7]),
        ((1, 48, 7, 7), (1, 2, 24, 7, 7), [2, 24, 7, 7]),
        ((2, 12, 64), (2, 768), [2, 12, 64]),
        ((2, 3, 4), (6, 4), [2, 3, 4]),
    ],
)
def test_reshape_refines_both_shapes(
    old: tuple[int, ...], new: tuple[int, ...], sizes: list[int]
) -> None:
    description = check(("Reshape", [old], {}, [list(new)], 1))
    assert [f.size for f in description.factors.values() if f.pinned is None] == sizes


def test_reshape_that_does_not_nest_is_pinned_with_the_reason() -> None:
    description = check(("Reshape", [(4, 6)], {}, [[6, 4]], 1))
    assert {f.pinned for f in description.factors.values()} == {"reshape 4x6 -> 6x4 does not nest"}


def test_strides_on_several_axes_are_positions() -> None:
    case: Case = ("Slice", [(6, 4)], {}, [[0, 1], [6, 3], [0, 1], [2, 1]], 1)
    assert [(f.size, f.pinned) for f in check(case).factors.values()] == [(3, None), (2, None)]


def test_a_slice_of_nothing_is_pinned() -> None:
    case: Case = ("Slice", [(6,)], {}, [[2], [2], [0], [1]], 1)
    description, _, (result,) = run(case)
    assert result.shape == (0,)
    assert {factor.pinned for factor in description.factors.values()} == {"sliced to nothing"}


def test_computed_bounds_pin_the_sliced_axis_alone() -> None:
    model = model_from_text(
        """
        net (float[2,8] x, int64[1] start, int64[1] stop) => (float[2,4] y) <int64[1] axes = {1}> {
            y = Slice(x, start, stop, axes)
        }""",
        inputs=("x", "start", "stop"),
    )
    (node,) = model.graph
    description = describe(OpNode(node))
    assert description.opaque is None
    pinned = {
        (place.port, place.axis): factor.pinned
        for factor in description.factors.values()
        for place in factor.places
        if place.port in (0, ~0)
    }
    assert pinned[0, 0] is None
    assert pinned[~0, 0] is None
    assert pinned[0, 1] == pinned[~0, 1] == "sliced at a computed place"
