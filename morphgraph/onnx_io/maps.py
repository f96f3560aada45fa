"""Values that are maps, as ZipMap makes of class scores: onnx_ir cannot hold their type.

It is taken from a model's message while that is read, kept beside the value, and written back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from morphgraph.errors import ModelError
from morphgraph.onnx_io.check import escape

_MAP_KEY = "morphgraph.map_type"


@contextmanager
def without_maps(proto: onnx.ModelProto) -> Iterator[dict[str, onnx.TypeProto]]:
    """The message without the types of its maps, for as long as it is read; these, by value.

    Raises:
        ModelError: an input is a map.
    """
    graph = proto.graph
    for value in graph.input:
        if is_map_type(value.type):
            raise ModelError(
                f"input '{escape(value.name)}': is a map; export the model with tensor inputs"
            )
    taken = [
        (v, onnx.TypeProto()) for v in (*graph.output, *graph.value_info) if is_map_type(v.type)
    ]
    for value, kept in taken:
        kept.CopyFrom(value.type)
        value.ClearField("type")
    try:
        yield {value.name: kept for value, kept in taken}
    finally:
        for value, kept in taken:
            value.type.CopyFrom(kept)


def note_maps(model: ir.Model, types: dict[str, onnx.TypeProto]) -> None:
    """Keep the types of maps beside the values."""
    for value in _values(model) if types else ():
        if value.name in types:
            value.meta[_MAP_KEY] = types[value.name]


def write_maps(model: ir.Model, graph: onnx.GraphProto) -> None:
    """Give the values of a message their types as maps again."""
    types = {v.name: v.meta[_MAP_KEY] for v in _values(model) if _MAP_KEY in v.meta}
    for value in (*graph.output, *graph.value_info) if types else ():
        if value.name in types:
            value.type.CopyFrom(types[value.name])


def has_maps(model: ir.Model) -> bool:
    """Whether any value of the model is one."""
    return any(map(is_map, _values(model)))


def is_map(value: ir.Value) -> bool:
    """Whether a file declares a value as a map, or a sequence of maps."""
    return _MAP_KEY in value.meta


def is_map_type(declared: onnx.TypeProto) -> bool:
    """Whether a type is that of a map, or of a sequence of maps."""
    kind = declared.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        return is_map_type(getattr(declared, kind).elem_type)
    return bool(kind == "map_type")


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph:
        yield from node.outputs
