"""A decoder like Llama as an ONNX file with random weights, written a tensor at a time.

Grouped queries, rotary embeddings, RMSNorm, SwiGLU, a head of its own. Kernels lie in external
data; a network of any size takes the memory of one tensor. The numbers are drawn once and repeated
from other places of the same pool: nothing is learned, but products behave as in a new network.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

POOL = 2**22
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder.

    Attributes:
        width: of the stream.
        units: of an MLP.
        heads, shared: of queries; of keys and values.
        blocks: an attention and an MLP each.
        ids: rows of the vocabulary.
        longest: sequence, in tokens.
    """

    width: int
    units: int
    heads: int
    shared: int
    blocks: int
    ids: int
    longest: int = 512

    @property
    def head_size(self) -> int:
        """Numbers of a query, key or value."""
        return self.width // self.heads


#: By the number of parameters; those of 5 million are the decoder's of the experiments.
SHAPES = {
    "5M": DecoderShape(256, 640, 8, 4, 6, 2048),
    "110M": DecoderShape(768, 2048, 12, 4, 12, 16000),
    "1B": DecoderShape(2048, 5632, 32, 4, 22, 32000),
    "7B": DecoderShape(4096, 11008, 32, 32, 32, 32000),
}


class _File:
    """Nodes and weights in the making; ``numbers`` of a weight are written at once."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.data = Path(f"{path}.data").open("wb")  # noqa: SIM115  # closed by its user
        self.location, self.kind = f"{path.name}.data", _TYPES[dtype]
        self.type = np.dtype(dtype)
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        generator = np.random.default_rng(0)
        self.pool = generator.standard_normal(POOL, dtype=np.float32)
        self.at = generator

    def weight(self, name: str, shape: tuple[int, ...], scale: float) -> str:
        tensor = TensorProto(name=name, data_type=self.kind, data_location=TensorProto.EXTERNAL)
        tensor.dims[:] = shape
        offset = self.data.tell()
        for part in self._drawn(prod(shape), scale):
            self.data.write(part.tobytes())
        entries = {"location": self.location, "offset": offset, "length": self.data.tell() - offset}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def _drawn(self, count: int, scale: float) -> Iterator[NDArray[np.floating]]:
        pool = (self.pool * np.float32(scale)).astype(self.type)
        while count > 0:
            start = int(self.at.integers(POOL // 2))
            part = pool[start : start + count]
            count -= len(part)
            yield part

    def constant(self, name: str, array: NDArray[np.generic]) -> str:
        tensor = helper.make_tensor(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            array.shape,
            array.tobytes(),
            raw=True,
        )
        self.tensors.append(tensor)
        return name

    def add(self, kind: str, operands: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, operands, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def product(self, operand: str, name: str, inputs: int, outputs: int, gain: float = 1.0) -> str:
        scale = gain / inputs**0.5
        return self.add(
            "MatMul", [operand, self.weight(f"{name}.w", (inputs, outputs), scale)], name
        )

    def norm(self, operand: str, name: str, width: int) -> str:
        scale = self.constant(f"{name}.w", np.ones(width, self.type))
        return self.add("RMSNormalization", [operand, scale], name, axis=-1, epsilon=1e-5)


def write_decoder(path: Path, shape: DecoderShape, dtype: str = "float32") -> Path:
    """Write a decoder ``input_ids [N, T] -> logits [N, T, ids]``, and its weights beside it.

    Args:
        path: of the file; its data is ``PATH.data``.
        shape: its sizes.
        dtype: ``float32`` or ``float16``.

    >>> import tempfile
    >>> import morphgraph as mg
    >>> shape = DecoderShape(width=32, units=64, heads=4, shared=2, blocks=1, ids=96)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     graph = mg.lift(write_decoder(Path(folder, "decoder.onnx"), shape))
    >>> [group.width for group in graph.groups if group.resizable]  # stream, heads of keys, units
    [32, 2, 64]
    """
    file = _File(path, dtype)
    with file.data:
        stream = file.add(
            "Gather", [file.weight("embedding", (shape.ids, shape.width), 1.0), "input_ids"], "rows"
        )
        angles = np.arange(shape.longest)[:, None] * 10000.0 ** -np.linspace(
            0, 1, shape.head_size // 2, endpoint=False
        )
        tables = [
            file.constant(name, turn(angles).astype(file.type))
            for name, turn in (("cos", np.cos), ("sin", np.sin))
        ]
        first = file.add("CumSum", [_ones(file), file.constant("last", np.array(1))], "count")
        places = file.add("Sub", [first, "one"], "places")
        for number in range(shape.blocks):
            stream = _block(file, stream, [*tables, places], shape, f"block{number}")
        last = file.norm(stream, "norm", shape.width)
        file.product(last, "head", shape.width, shape.ids)
    file.nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        file.nodes,
        "decoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["N", "T"])],
        [helper.make_tensor_value_info("logits", file.kind, ["N", "T", shape.ids])],
        file.tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def _ones(file: _File) -> str:
    """1 at every token."""
    zeros = file.add("Mul", ["input_ids", file.constant("zero", np.array(0))], "zeros")
    return file.add("Add", [zeros, file.constant("one", np.array(1))], "ones")


def _block(file: _File, stream: str, turn: list[str], shape: DecoderShape, name: str) -> str:
    width, shared = shape.width, shape.shared * shape.head_size
    seen = file.norm(stream, f"{name}.attention.norm", width)
    parts = []
    for part, size, heads in (("q", width, shape.heads), ("k", shared, shape.shared)):
        made = file.product(seen, f"{name}.{part}", width, size)
        turned = f"{name}.{part}.rotated"
        parts.append(file.add("RotaryEmbedding", [made, *turn], turned, num_heads=heads))
    parts.append(file.product(seen, f"{name}.v", width, shared))
    counts = {"q_num_heads": shape.heads, "kv_num_heads": shape.shared}
    mixed = file.add("Attention", parts, f"{name}.attention", is_causal=1, **counts)
    out = file.product(mixed, f"{name}.o", width, width, 0.5)
    stream = file.add("Add", [stream, out], f"{name}.attention.sum")
    seen = file.norm(stream, f"{name}.mlp.norm", width)
    gate = file.product(seen, f"{name}.gate", width, shape.units)
    opened = file.add("Mul", [gate, file.add("Sigmoid", [gate], f"{name}.open")], f"{name}.silu")
    up = file.product(seen, f"{name}.up", width, shape.units)
    hidden = file.add("Mul", [opened, up], f"{name}.hidden")
    down = file.product(hidden, f"{name}.down", shape.units, width, 0.5)
    return file.add("Add", [stream, down], f"{name}.mlp.sum")
