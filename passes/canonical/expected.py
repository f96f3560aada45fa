"""What numbers an input expects, by what reads it: rows of a table, lengths, masks, pixels.

Random inputs are drawn so (:func:`~morphgraph.onnx_io.runtime.random_inputs`).
Zeros and ones alone would read two rows of every embedding, and hide what is wrong with all others.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
import onnx_ir as ir

from morphgraph.errors import ModelError
from morphgraph.onnx_io import EXPECTED_KEY, EXPECTED_PARTS_KEY, Expected, static_shape
from morphgraph.ops import facts_of

# By operator the operands that number positions, and the operand whose axis they number.
_TABLES = {
    "Gather": {1: 0},
    "GatherElements": {1: 0},
    "RoiAlign": {2: 0},
    "ScatterElements": {1: 0},
    "EmbedLayerNormalization": {0: 2, 1: 4, 8: 3},
}
# By operator the operand of tuples that number positions of the first operand's axes, and the
# attribute that says from which axis on.
_TUPLES: dict[str, tuple[int, str]] = {"GatherND": (1, "batch_dims"), "ScatterND": (1, "")}
# By operator the operand whose first column numbers samples of the first operand.
_COLUMNS = {"MaxRoiPool": 1}
# By operator the operand of lengths, and the axis of the first operand that they count, which may
# be an attribute.
_LENGTHS: dict[str, tuple[int, str]] = {
    "LSTM": (4, ""),
    "GRU": (4, ""),
    "RNN": (4, ""),
    "ReverseSequence": (1, "time_axis"),
}
_BOUNDS = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_FLAGS = {
    **dict.fromkeys(("Equal", "And", "Or", "Xor", "Not", *_BOUNDS), (0, 1)),
    "Where": (0,),
    "EmbedLayerNormalization": (7,),
}
_SAME_AXES = frozenset({"Add", "Cast", "Identity", "Sub"})
_EIGHT_BITS = frozenset({ir.DataType.UINT8, ir.DataType.INT8})


_Part = tuple[int, tuple[int, ...]] | tuple[()]


def note_expected(model: ir.Model) -> None:
    """Note at every input of a canonical model what numbers its readers expect, where they say.

    What is noted already stays.
    """
    for value in model.graph.inputs:
        if EXPECTED_KEY in value.meta:
            continue
        found = list(_asked(value))
        expected = _of(value, found)
        if expected is not None:
            value.meta[EXPECTED_KEY] = expected
        parts = tuple(_of_parts(found))
        if parts:
            value.meta[EXPECTED_PARTS_KEY] = parts


def _of(value: ir.Value, found: Iterable[Expected]) -> Expected | None:
    """What is expected of all of an input, but for parts that readers take numbers from."""
    whole = _numbers_of([each for each in found if not each.part])
    if whole is not None:
        return whole
    if value.dtype is None or value.dtype.is_floating_point():
        return None
    flags = any(each.kind == "mask" for each in found)
    if value.dtype in _EIGHT_BITS and not flags:
        limits = np.iinfo(value.dtype.numpy())
        return Expected("range", int(limits.min), int(limits.max) + 1)
    if flags or any(each.kind == "number" for each in found):
        return Expected("mask", 0, 2)
    return None


def _of_parts(found: Iterable[Expected]) -> Iterator[Expected]:
    """What is expected of positions that readers take numbers from, such as a column of a table.

    Positions of which the same is expected stand together.
    """
    at: dict[tuple[int, int], list[Expected]] = {}
    for each in found:
        axis, positions = each.part or (0, ())
        for position in positions:
            at.setdefault((axis, position), []).append(each)
    everywhere = [each for each in found if not each.part]
    wanted = [(_numbers_of(each + everywhere), place) for place, each in sorted(at.items())]
    told = [(each, axis, position) for each, (axis, position) in wanted if each is not None]
    for (expected, axis), group in groupby(
        sorted(told, key=lambda each: each[:2]), key=lambda each: each[:2]
    ):
        yield expected._replace(part=(axis, tuple(position for _, _, position in group)))


def _numbers_of(found: Iterable[Expected]) -> Expected | None:
    """Numbers that suit all readers of rows, or else of lengths."""
    for kind in ("rows", "length"):
        highs = [each.high for each in found if each.kind == kind]
        if highs:
            return Expected(kind, int(kind == "length"), max(min(highs), 1 + (kind == "length")))
    return None


def _asked(start: ir.Value) -> Iterator[Expected]:
    """What all readers of an input expect, through operators that hand numbers on."""
    # With every value what was added to the input's numbers on the way, the part of the input that
    # it is, and whether its axes are still those of the input.
    pending: list[tuple[ir.Value, int, _Part, bool]] = [(start, 0, (), True)]
    seen = {start}
    while pending:
        value, added, part, same = pending.pop()
        for use in value.uses():
            node, port = use.node, use.idx
            try:
                for each in _asked_by(node, port, added):
                    if not each.part:
                        yield each._replace(part=part)
                    elif same and not part:
                        yield each
                taken = _taken(node, port) if same and not part else {}
                stays = same and _has_axes_of(node.outputs[0], start, node.op_type)
            except ModelError:  # a size that is not known
                continue
            more = _handed_on(node, port)
            for result in node.outputs if more is not None else ():
                if result not in seen:
                    seen.add(result)
                    pending.append((result, added + (more or 0), taken.get(result, part), stays))


def _has_axes_of(result: ir.Value, start: ir.Value, operator: str) -> bool:
    return operator in _SAME_AXES and static_shape(result) == static_shape(start)


def _taken(node: ir.Node, port: int) -> dict[ir.Value, _Part]:
    """By result the part of an operand that it is, where a node takes parts along one axis."""
    if port != 0 or node.inputs[0] is None or node.op_type not in ("Slice", "Gather", "Split"):
        return {}
    shape = static_shape(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % max(len(shape), 1)
    if node.op_type == "Split":
        places: dict[ir.Value, _Part] = {}
        start = 0
        for result in node.outputs:
            size = static_shape(result)[axis]
            places[result] = (axis, tuple(range(start, start + size)))
            start += size
        return places
    numbers = [None if operand is None else _numbers(operand) for operand in node.inputs[1:]]
    if any(each is None for each in numbers):
        return {}
    arrays = [np.ravel(each) for each in numbers if each is not None]
    if node.op_type == "Gather":
        return {node.outputs[0]: (axis, tuple(int(n) % shape[axis] for n in arrays[0]))}
    if len(arrays) < 3 or any(each.size != 1 for each in arrays):
        return {}  # several axes are cut
    first, last, axis, step = (int(each[0]) for each in (*arrays, np.ones(1, int))[:4])
    taken = range(shape[axis])[first : max(last, -shape[axis] - 1) : step]
    return {node.outputs[0]: (axis % len(shape), tuple(taken))}


def _asked_by(node: ir.Node, port: int, added: int) -> Iterator[Expected]:
    operator = node.op_type
    table = _TABLES.get(operator, {}).get(port)
    if table is not None and (operand := node.inputs[table]) is not None:
        axis = node.attributes.get_int("axis", 0)
        yield Expected("rows", 0, static_shape(operand)[axis] - added)
    if port == _TUPLES.get(operator, (-1, ""))[0] and node.inputs[0] is not None:
        first = node.attributes.get_int(_TUPLES[operator][1], 0)
        operand, tuples = node.inputs[0], node.inputs[port]
        count = 1 if tuples is None else static_shape(tuples)[-1]
        sizes = static_shape(operand)[first : first + count]
        yield Expected("rows", 0, min(sizes, default=1) - added)
    if port == _COLUMNS.get(operator) and node.inputs[0] is not None:
        yield Expected("rows", 0, static_shape(node.inputs[0])[0] - added, (1, (0,)))
    if operator == "OneHot" and port == 0 and (depth := _numbers(node.inputs[1])) is not None:
        yield Expected("rows", 0, int(depth.ravel()[0]) - added)
    if operator in _LENGTHS and port == _LENGTHS[operator][0] and node.inputs[0] is not None:
        axis = node.attributes.get_int(_LENGTHS[operator][1], 0)
        yield Expected("length", 1, static_shape(node.inputs[0])[axis] + 1 - added)
    if operator in _BOUNDS:
        places = _numbers(node.inputs[1 - port])
        if places is not None and places.size and places.min() < places.max():
            yield Expected("length", 1, int(places.max()) + 2 - added)
    if port in _FLAGS.get(operator, ()):
        yield Expected("mask", 0, 2)
    if operator == "Cast":
        to = ir.DataType(node.attributes.get_int("to", ir.DataType.FLOAT.value))
        if to == ir.DataType.BOOL:
            yield Expected("mask", 0, 2)
        elif to.is_floating_point():
            yield Expected("number", 0, 2)


def _handed_on(node: ir.Node, port: int) -> int | None:
    """What a node adds to the numbers of an operand that it hands on; ``None`` if it does not."""
    facts = facts_of(node)
    if node.op_type == "Cast" or (facts.moves and (port == 0 or len(node.inputs) == port + 1)):
        return 0 if port not in _TABLES.get(node.op_type, {}) else None
    if facts.adds and len(node.inputs) == 2:
        numbers = _numbers(node.inputs[1 - port])
        return None if numbers is None or not numbers.size else int(numbers.max())
    if facts.subtracts and port == 0:
        numbers = _numbers(node.inputs[1])
        return None if numbers is None or not numbers.size else -int(numbers.min())
    return None


def _numbers(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()
