"""Builds networks node by node, with random weights and known shapes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from morphgraph.arrays import Array, Shape

OPSET = 20


class Probe:
    """A network in the making: values by their names, each with its shape in ``shapes``.

    Args:
        seed: of widths and weights.
        free: widths are on no grid.
    """

    def __init__(self, seed: int, free: bool) -> None:
        self.random, self.free = np.random.default_rng(seed), free
        self._style = int(self.random.integers(2**31))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.shapes: dict[str, Shape] = {}

    def model(self, output: str) -> onnx.ModelProto:
        """The finished model."""
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, self.shapes[output])
        graph = helper.make_graph(self.nodes, "probe", self.inputs, [result], self.weights)
        return helper.make_model(
            graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET)]
        )

    def input(self, shape: Shape) -> str:
        """An input of the network."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.shapes[name] = shape
        return name

    def weight(self, *shape: int, values: Array | None = None) -> str:
        """A stored tensor; random by its fan-in, if no values are given."""
        name = f"w{len(self.weights)}"
        if values is None:
            inner = max(math.prod(shape[1:]), 1)
            values = (self.random.standard_normal(shape) / math.sqrt(inner)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        self.shapes[name] = values.shape
        return name

    def numbers(self, *values: int) -> str:
        """Stored integers."""
        return self.weight(values=np.array(values, dtype=np.int64))

    def node(self, op_type: str, inputs: Sequence[str], shape: Shape, **attributes: Any) -> str:
        """A node and its only result, of the shape given."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(
                op_type, list(inputs), [name], name=f"n{len(self.nodes)}", **attributes
            )
        )
        self.shapes[name] = shape
        return name

    def conv(self, x: str, filters: int, size: int = 3, stride: int = 1, groups: int = 1) -> str:
        """A convolution with a bias that pads by half of its kernel."""
        samples, channels, height, width = self.shapes[x]
        pad = (size - 1) // 2
        shape = (samples, filters, -(-height // stride), -(-width // stride))
        weight = self.weight(filters, channels // groups, size, size)
        return self.node(
            "Conv",
            [x, weight, self.weight(filters)],
            shape,
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[pad, pad, size - 1 - pad, size - 1 - pad],
            group=groups,
        )

    def act(self, x: str, kind: str = "Relu") -> str:
        """An activation, in the nodes that exporters write for it."""
        shape = self.shapes[x]
        if kind == "SiLU":
            return self.node("Mul", [x, self.node("Sigmoid", [x], shape)], shape)
        if kind == "Relu6":
            low, high = (self.weight(values=np.array(v, np.float32)) for v in (0.0, 6.0))
            return self.node("Clip", [x, low, high], shape)
        return self.node(kind, [x], shape)

    def add(self, x: str, y: str) -> str:
        """The sum of two values of one shape."""
        return self.node("Add", [x, y], self.shapes[x])

    def pool(self, x: str, kind: str, size: int, stride: int) -> str:
        """A pooling that pads by half of its kernel."""
        samples, channels, height, width = self.shapes[x]
        pad = (size - 1) // 2
        shape = tuple((side + 2 * pad - size) // stride + 1 for side in (height, width))
        return self.node(
            kind,
            [x],
            (samples, channels, *shape),
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[pad] * 4,
        )

    def excite(self, x: str, narrow: int, act: str, gate: str, mean: str) -> str:
        """Squeeze and excitation (Hu et al. 2018): channels times a gate from their means."""
        samples, channels, *_ = self.shapes[x]
        shape = (samples, channels, 1, 1)
        if mean == "ReduceMean":
            y = self.node(mean, [x, self.numbers(2, 3)], shape, keepdims=1)
        else:
            y = self.node(mean, [x], shape)
        y = self.act(self.conv(y, narrow, 1), act)
        y = self.act(self.conv(y, channels, 1), gate)
        return self.node("Mul", [x, y], self.shapes[x])

    def norm(self, x: str) -> str:
        """Batch normalization by stored statistics."""
        channels = self.shapes[x][1]
        positive = np.abs(self.random.standard_normal(channels)).astype(np.float32) + 0.5
        parts = [self.weight(channels) for _ in range(3)] + [self.weight(values=positive)]
        return self.node("BatchNormalization", [x, *parts], self.shapes[x])

    def concat(self, values: Sequence[str]) -> str:
        """Values side by side, along the channels."""
        first = self.shapes[values[0]]
        channels = sum(self.shapes[value][1] for value in values)
        return self.node("Concat", values, (first[0], channels, *first[2:]), axis=1)

    def slice(self, x: str, start: int, stop: int, axis: int = 1) -> str:
        """A part of a value along an axis."""
        shape = list(self.shapes[x])
        shape[axis] = stop - start
        bounds = [self.numbers(start), self.numbers(stop), self.numbers(axis)]
        return self.node("Slice", [x, *bounds], tuple(shape))

    def style(self, *choices: Sequence[str]) -> list[str]:
        """One of each, the same in the whole network."""
        random = np.random.default_rng(self._style)
        return [str(random.choice(options)) for options in choices]

    def pick(self, *choices: str) -> str:
        """One of some names."""
        return str(self.random.choice(choices))

    def between(self, low: float, high: float) -> int:
        """A whole number, its logarithm evenly spread."""
        return round(float(np.exp(self.random.uniform(math.log(low), math.log(high)))))

    def width(self, low: float, high: float, grid: int) -> int:
        """A number of channels on a grid."""
        return max(grid, round(self.between(low, high) / grid) * grid)

    def grid(self) -> int:
        """What widths are multiples of: 1, or what networks are usually made on."""
        return 1 if self.free else int(self.random.choice([16, 16, 8, 4]))
