"""What a language model takes beside the ids of tokens: masks, positions, caches."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, IntArray, Shape
from morphgraph.errors import ModelError
from morphgraph.onnx_io import DEFAULT_KEY, dtype_of, is_float
from morphgraph.onnx_io.inputs import described, takes

_IDS = re.compile(r"(^|_|\.)(input_?ids?|ids|tokens?|input)$", re.IGNORECASE)
_NOT_IDS = re.compile(r"mask|position|type|segment|cache|past|len", re.IGNORECASE)
_TABLES = frozenset({"Gather", "GatherBlockQuantized"})  # rows by the numbers in a later operand
_PASSES = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_FLAG = re.compile(r"use_cache", re.IGNORECASE)
#: Operands that hold what turns each position, row by row.
_TURNS = {
    ("com.microsoft", "GroupQueryAttention"): 7,
    ("com.microsoft", "RotaryEmbedding"): 2,
    ("", "RotaryEmbedding"): 1,
}
_COUNTS = frozenset({"CumSum", "Range"})
_KEEPS_COUNT = _PASSES | {"Add", "Concat", "Expand", "Mul", "Slice", "Sub", "Where"}
_STEPS = 64  # between positions that a model counts and the table that they choose from


def ids_input(model: ir.Model) -> ir.Value | None:
    """The input that takes ids of tokens, ``[batch, sequence]``; ``None`` where there is none.

    It is the one whose numbers choose the rows of a table, or one that is named so.
    """
    whole = [
        value
        for value in takes(model).values()
        if len(value.shape or ()) == 2 and not is_float(value) and value.dtype != ir.DataType.BOOL
    ]
    named = [value for value in whole if _IDS.search(value.name or "")]
    free = [value for value in whole if not _NOT_IDS.search(value.name or "")]
    of_tables = [value for value in free if table_of(value) is not None]
    for found in (of_tables, named, free):
        if len(found) == 1:
            return found[0]
    return None


def table_of(value: ir.Value) -> ir.Value | None:
    """The stored table whose rows the numbers of a value choose, with no arithmetic between."""
    waiting, seen = [value], {value}
    while waiting:
        for use in waiting.pop().uses():
            node = use.node
            data = node.inputs[0] if node.inputs else None
            if node.op_type in _TABLES and data is not None and use.idx > 0:
                if data.producer() is None and len(data.shape or ()) == 2:
                    return data
            elif node.op_type in _PASSES and use.idx == 0:
                new = [each for each in node.outputs if each not in seen]
                seen.update(new)
                waiting += new
    return None


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of a language model.

    Attributes:
        values: all of them by name, those with a default left out.
        ids: the name of that of the ids.
        length: tokens of a sequence, where the model fixes it.
        longest: the most tokens of one, where a table of positions bounds it.
        rows: ids that there are rows for, where a table says it.
        table: its name.
    """

    values: Mapping[str, ir.Value]
    ids: str
    length: int | None
    longest: int | None
    rows: int | None
    table: str

    @classmethod
    def of(cls, model: ir.Model, where: str) -> "TokenInputs":
        """The inputs of a model, all of which are known.

        Raises:
            ModelError: it takes no ids of tokens, or something that nobody knows how to fill.
        """
        given = takes(model)
        needed = {name: value for name, value in given.items() if DEFAULT_KEY not in value.meta}
        ids = ids_input(model)
        if ids is None:
            known = ", ".join(map(described, needed.values()))
            raise ModelError(
                f"{where}holds text, and the model has no input for ids of tokens, "
                f"[batch, sequence] of integers; it takes {known}: give arrays (.npz), or, where "
                "that are images, a folder of them"
            )
        size = None if ids.shape is None else ids.shape[1]
        table = table_of(ids)
        rows = table.shape[0] if table is not None and table.shape is not None else None
        found = cls(
            needed,
            ids.name or "",
            size if isinstance(size, int) else None,
            min(_position_rows(model), default=None),
            rows if isinstance(rows, int) else None,
            "" if table is None else table.name or "",
        )
        for value in needed.values():
            if found._filled(value, np.zeros((1, 2), np.int64)) is None:
                raise ModelError(
                    f"{where}input {described(value)} is none that goes along with ids of tokens "
                    "(a mask, positions, types, an empty cache); give arrays instead of text: an "
                    ".npz file with one for each input"
                )
        return found

    def feed(self, ids: IntArray) -> Arrays:
        """The inputs of a run over whole sequences, without padding and with an empty cache."""
        return {
            name: filled
            for name, value in self.values.items()
            if (filled := self._filled(value, ids)) is not None
        }

    def _filled(self, value: ir.Value, ids: IntArray) -> Array | None:
        """What stands in an input; ``None`` where nobody knows."""
        name, rank = (value.name or "").lower(), len(value.shape or ())
        batch, length = ids.shape
        kind = dtype_of(value)
        if value.name == self.ids:
            return ids.astype(kind)
        if _FLAG.search(name):
            return np.zeros([1] * rank, kind)
        if "position" in name and not is_float(value) and rank in (1, 2, 3):
            shape = [(length,), (batch, length), (_lead(value), batch, length)][rank - 1]
            return np.broadcast_to(np.arange(length), shape).astype(kind)
        if "mask" in name and rank == 2:
            return np.ones((batch, length), kind)
        if ("type" in name or "segment" in name) and rank == 2:
            return np.zeros((batch, length), kind)
        if "total" in name and rank <= 1 and not is_float(value):
            return np.full([1] * rank, length, kind)
        if "len" in name and rank in (1, 2) and not is_float(value):
            last = length - 1 if "seqlens_k" in name else length
            return np.full([batch, 1][:rank], last, kind)
        if is_float(value) and rank >= 3:
            empty = _empty(value, batch)
            return None if empty is None else np.zeros(empty, kind)
        return None


def _lead(value: ir.Value) -> int:
    size = (value.shape or (1,))[0]
    return size if isinstance(size, int) else 1


def _empty(value: ir.Value, batch: int) -> Shape | None:
    """The shape of an empty cache: the one size that is open, the batch apart, is 0."""
    sizes = list(value.shape or ())
    open_sizes = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    rest = [axis for axis in open_sizes if axis]
    if len(rest) != 1:
        return None
    shape = [size if isinstance(size, int) else batch for size in sizes]
    shape[rest[0]] = 0
    return tuple(shape)


def _position_rows(model: ir.Model) -> Iterator[int]:
    """Rows of tables that positions choose: of an input, or counted by the model."""
    positions = [v for name, v in takes(model).items() if "position" in name.lower()]
    tables = [table for value in positions if (table := table_of(value)) is not None]
    for node in model.graph:
        port = _TURNS.get((node.domain, node.op_type), 0)
        data = node.inputs[port] if port < len(node.inputs) else None
        if data is None or data.producer() is not None or data.is_graph_input():
            continue
        if port or (node.op_type in _TABLES and _is_count(node.inputs[1])):
            tables.append(data)
    for table in tables:
        rows = table.shape[0] if table.shape is not None and len(table.shape) == 2 else None
        if isinstance(rows, int):
            yield rows


def _is_count(numbers: ir.Value | None) -> bool:
    """Whether numbers are positions that a model counts itself, moved and shifted at most."""
    waiting, seen = [numbers], set[ir.Value]()
    while waiting and len(seen) < _STEPS:
        value = waiting.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None and value.const_value is not None and not is_float(value):
            array = value.const_value.numpy().reshape(-1)
            if len(array) > 2 and np.array_equal(array, np.arange(len(array))):
                return True
        elif node is not None and node.op_type in _COUNTS:
            return True
        elif node is not None and node.op_type in _KEEPS_COUNT:
            waiting += node.inputs
    return False
