"""Weights and the rest of a message apart, in protobuf's wire format.

Whoever parses a message copies its weights, asks for them and gets another copy, and writes it by
way of two more. Here the rest alone passes through protobuf, and weights go straight from the file
to their array, and from there to a file. The format is that of the protobuf encoding guide: a
message is a row of fields, each a tag (number and kind) and a value, whose length stands before it
where it is not fixed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Buffer = bytes | memoryview

_BYTES = 2
"""The kind of a field that holds bytes or a message, with their length before them."""

_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9
"""Numbers of ``ModelProto.graph``, ``GraphProto.initializer``, ``TensorProto.name, .raw_data``."""

LEAST_HELD_BYTES = 1024
"""Smaller weights stay in the message."""


class WireError(ValueError):
    """Bytes that are no message; protobuf finds better words."""


class Field(NamedTuple):
    """A field: its number and kind, where it starts, and where its value starts and ends."""

    number: int
    kind: int
    start: int
    value: int
    end: int


def parted(view: memoryview) -> tuple[bytes, dict[str, slice]]:
    """A model's message without its large weights, and where these stand, by name.

    >>> import onnx
    >>> tensor = onnx.numpy_helper.from_array(__import__("numpy").arange(600.0), "w")
    >>> graph = onnx.GraphProto(name="g", initializer=[tensor])
    >>> whole = onnx.ModelProto(ir_version=8, graph=graph).SerializeToString(deterministic=True)
    >>> light, held = parted(memoryview(whole))
    >>> len(whole) - len(light) >= 4800, whole[held["w"]] == tensor.raw_data
    (True, True)

    Raises:
        WireError: the bytes are no message of a model, or not one with distinct names.
    """
    graphs = [field for field in _fields(view, 0, len(view)) if field.number == _GRAPH]
    if len(graphs) != 1 or graphs[0].kind != _BYTES:
        raise WireError("not one graph")
    [graph] = graphs
    held: dict[str, slice] = {}
    pieces: list[Buffer] = []
    start = graph.value
    for field in _fields(view, graph.value, graph.end):
        if field.number != _INITIALIZER or field.end - field.value < LEAST_HELD_BYTES:
            continue
        raw = _raw_data(view, field, held)
        if raw is not None:
            tensor = [view[field.value : raw.start], view[raw.end : field.end]]
            pieces += [view[start : field.start], *framed_pieces(_INITIALIZER, tensor)]
            start = field.end
    pieces.append(view[start : graph.end])
    light = [view[: graph.start], *framed_pieces(_GRAPH, pieces), view[graph.end :]]
    return b"".join(light), held


def _raw_data(view: memoryview, tensor: Field, held: dict[str, slice]) -> Field | None:
    """The field of a tensor's data, which is noted in ``held``, if it is large."""
    name, raws = b"", []
    for field in _fields(view, tensor.value, tensor.end):
        if field.number == _NAME and field.kind == _BYTES:
            name = bytes(view[field.value : field.end])
        elif field.number == _RAW_DATA and field.kind == _BYTES:
            raws.append(field)
    if len(raws) != 1 or raws[0].end - raws[0].value < LEAST_HELD_BYTES:
        return None
    try:
        known = name.decode()
    except UnicodeDecodeError as error:
        raise WireError("a name is not UTF-8") from error
    if known in held:
        raise WireError("a name is there twice")
    held[known] = slice(raws[0].value, raws[0].end)
    return raws[0]


def framed(number: int, content: bytes) -> bytes:
    r"""A field of kind bytes.

    >>> framed(2, b"abc")
    b'\x12\x03abc'
    """
    length = len(content)
    if length < 128:
        return _HEADS[number][length] + content
    return _varint(number << 3 | _BYTES) + _varint(length) + content


def number_field(number: int, value: int) -> bytes:
    r"""A field of a whole number of up to 64 bits, negative ones in two's complement.

    >>> number_field(1, 300)
    b'\x08\xac\x02'
    """
    if 0 <= value < 128:
        return _SMALL_NUMBERS[number][value]
    return _varint(number << 3) + _varint(value & _64_BITS)


_64_BITS = 2**64 - 1


def framed_pieces(number: int, pieces: Sequence[Buffer]) -> list[Buffer]:
    """The same field around pieces that are not put together."""
    length = sum(len(piece) for piece in pieces)
    return [_varint(number << 3 | _BYTES) + _varint(length), *pieces]


_SHORT = [bytes([value]) for value in range(128)]


class _Prefixed(dict[int, list[bytes]]):
    """By the number of a field its tag of this kind with each number below 128 behind it.

    Nearly all lengths and numbers are such, and a look is quicker than to put bytes together.
    """

    def __init__(self, kind: int) -> None:
        super().__init__()
        self._kind = kind

    def __missing__(self, number: int) -> list[bytes]:
        tag = _varint(number << 3 | self._kind)
        self[number] = [tag + short for short in _SHORT]
        return self[number]


_HEADS, _SMALL_NUMBERS = _Prefixed(_BYTES), _Prefixed(0)


def _varint(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first; all bytes but the last have bit 8 set."""
    if value < 128:
        return _SHORT[value]
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _fields(view: memoryview, start: int, end: int) -> Iterator[Field]:
    """The fields of a message that stands between two places."""
    place = start
    while place < end:
        tag, value = view[place], place + 1  # one byte nearly always
        if tag > 127:
            tag, value = _read_varint(view, place, end)
        match tag & 7:
            case 0:  # a number
                _, after = _read_varint(view, value, end)
            case 1:  # 64 bits
                after = value + 8
            case 2:  # bytes or a message
                after, value = _read_varint(view, value, end)
                after += value
            case 5:  # 32 bits
                after = value + 4
            case _:
                raise WireError("an unknown kind of field")
        if after > end:
            raise WireError("a field ends behind its message")
        yield Field(tag >> 3, tag & 7, place, value, after)
        place = after


def _read_varint(view: memoryview, place: int, end: int) -> tuple[int, int]:
    """A number, and the place behind it."""
    value = shift = 0
    while place < end:
        byte = view[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            break
    raise WireError("a number does not end")
