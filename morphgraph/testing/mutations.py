"""Spoil sound files at random: bytes, fields of ONNX messages, and values in JSON.

Every function takes the randomness from outside, so that an input can be made again.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]

_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, -(2**63))
_FLOATS = (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"))
_WORDS = ("", "x", "y", "\x1b[2J\n", "<script>", "../up", "/", "𝕎", "a" * 5000, "\x00")


def spoiled_bytes(data: bytes, chance: random.Random) -> bytes:
    """A copy in which some bytes are changed, cut out, repeated or inserted.

    >>> spoiled_bytes(b"morph", random.Random(0)) != b"morph"
    True
    """
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(found) + 1)
        end = min(len(found), at + chance.choice((1, 2, 8, 64)))
        match chance.randrange(5):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1:
                del found[at:end]
            case 2:
                found[at:at] = found[at:end]
            case 3:
                found[at:end] = chance.randbytes(end - at)
            case _:
                found[at:at] = bytes([chance.choice((0, 1, 127, 128, 255))])
    return bytes(found)


def spoiled_message(proto: onnx.ModelProto, chance: random.Random) -> onnx.ModelProto:
    """A copy of a model in which some fields have other values, or elements go or come twice."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(found))
        message, field = chance.choice(places)
        values = getattr(message, field.name)
        if not _is_repeated(field):
            if field.type != FieldDescriptor.TYPE_MESSAGE:
                setattr(message, field.name, _other(values, field, found, chance))
            elif chance.random() < 0.3:
                message.ClearField(field.name)
            continue
        at = chance.randrange(len(values))
        match chance.randrange(4):
            case 0:
                del values[at]
            case 1 if field.type == FieldDescriptor.TYPE_MESSAGE:
                values.add().CopyFrom(values[at])
            case 1:
                values.append(values[at])
            case 2 if len(values) > 1 and field.type == FieldDescriptor.TYPE_MESSAGE:
                kept = [type(values[at])() for _ in values]
                for copy, value in zip(kept, chance.sample(list(values), len(values)), strict=True):
                    copy.CopyFrom(value)
                del values[:]
                values.extend(kept)
            case _ if field.type != FieldDescriptor.TYPE_MESSAGE:
                values[at] = _other(values[at], field, found, chance)
    return found


def _places(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """All fields that are set, with the messages that they stand in."""
    for field, value in message.ListFields():
        yield message, field
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if _is_repeated(field) else [value]:
                yield from _places(inner)


def _is_repeated(field: FieldDescriptor) -> bool:
    if hasattr(field, "is_repeated"):
        return bool(field.is_repeated)
    return bool(field.label == FieldDescriptor.LABEL_REPEATED)  # before protobuf 6


def _other(
    value: Any, field: FieldDescriptor, model: onnx.ModelProto, chance: random.Random
) -> Any:
    """Another value for a field, of its type."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if isinstance(value, bytes):
            return spoiled_bytes(value, chance)
        case FieldDescriptor.CPPTYPE_STRING:
            nodes = model.graph.node
            names = [n for node in nodes for n in (*node.input, *node.output, node.op_type)]
            return chance.choice([*_WORDS, *names])
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return chance.choice(_FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:
            known = [each.number for each in field.enum_type.values]
            return chance.choice(known)
        case FieldDescriptor.CPPTYPE_INT64:
            return chance.choice((*_NUMBERS, min(value + 1, 2**62), value - 1 if value > 0 else 5))
        case FieldDescriptor.CPPTYPE_INT32:
            return chance.choice([n for n in _NUMBERS if -(2**31) <= n < 2**31])
        case _:
            return chance.choice([n for n in _NUMBERS if n >= 0])


def spoiled_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON file in which some values are others, or gone; or one whose bytes are spoiled."""
    if chance.random() < 0.3:
        return spoiled_bytes(data, chance)
    found = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(_json_places(found))
        if not places:
            break
        holder, key = chance.choice(places)
        match chance.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[chance.choice(_WORDS)] = holder[key]
            case 1:
                holder.append(holder[key])
            case 2:
                holder[key] = chance.choice((None, [], {}, True, "", [[]], "\x1b[2J"))
            case _:
                holder[key] = chance.choice((*_NUMBERS, *_FLOATS, 0.5, 10**30))
    return json.dumps(found).encode()


def _json_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All values within lists and tables, by what holds them and where."""
    keys: Any = value if isinstance(value, dict) else range(len(value))
    for key in keys if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _json_places(value[key])
