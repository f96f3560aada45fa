"""What numbers an input expects, by what reads it: rows of a table, lengths, masks, pixels.

Random inputs are drawn so (:func:`~morphgraph.onnx_io.runtime.random_inputs`).
Zeros and ones alone would read two rows of every embedding, and hide what is wrong with all others.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from morphgraph.errors import ModelError
from morphgraph.onnx_io import EXPECTED_KEY, Expected, static_shape
from morphgraph.ops import facts_of

# By operator the operands that number positions, and the operand whose axis they number.
_TABLES = {
    "Gather": {1: 0},
    "GatherElements": {1: 0},
    "EmbedLayerNormalization": {0: 2, 1: 4, 8: 3},
}
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
_EIGHT_BITS = frozenset({ir.DataType.UINT8, ir.DataType.INT8})


def note_expected(model: ir.Model) -> None:
    """Note at every input of a canonical model what numbers its readers expect, where they say.

    What is noted already stays.
    """
    for value in model.graph.inputs:
        expected = value.meta.get(EXPECTED_KEY) or _of(value)
        if expected is not None:
            value.meta[EXPECTED_KEY] = expected


def _of(value: ir.Value) -> Expected | None:
    found = list(_asked(value))
    for kind in ("rows", "length"):
        highs = [each.high for each in found if each.kind == kind]
        if highs:
            return Expected(kind, int(kind == "length"), max(min(highs), 1 + (kind == "length")))
    if value.dtype is None or value.dtype.is_floating_point():
        return None
    flags = any(each.kind == "mask" for each in found)
    if value.dtype in _EIGHT_BITS and not flags:
        limits = np.iinfo(value.dtype.numpy())
        return Expected("range", int(limits.min), int(limits.max) + 1)
    if flags or any(each.kind == "number" for each in found):
        return Expected("mask", 0, 2)
    return None


def _asked(start: ir.Value) -> Iterator[Expected]:
    """What all readers of a value expect, through operators that hand numbers on."""
    # With every value what was added to the input's numbers on the way.
    pending, seen = [(start, 0)], {start}
    while pending:
        value, added = pending.pop()
        for use in value.uses():
            node, port = use.node, use.idx
            try:
                yield from _asked_by(node, port, added)
            except ModelError:  # a size that is not known
                continue
            more = _handed_on(node, port)
            for result in node.outputs if more is not None else ():
                if result not in seen:
                    seen.add(result)
                    pending.append((result, added + (more or 0)))


def _asked_by(node: ir.Node, port: int, added: int) -> Iterator[Expected]:
    operator = node.op_type
    table = _TABLES.get(operator, {}).get(port)
    if table is not None and (operand := node.inputs[table]) is not None:
        axis = node.attributes.get_int("axis", 0)
        yield Expected("rows", 0, static_shape(operand)[axis] - added)
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
