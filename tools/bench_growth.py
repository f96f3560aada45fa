"""How the time of lifting, planning and resizing grows with a network.

    python tools/bench_growth.py                        # 100 to 10,000 nodes, a minute or two
    python tools/bench_growth.py --nodes 1000 100000

Chains of convolutions, dense blocks (every layer reads all before it in its block) and transformer
encoders of growing numbers of layers, with weights that take no memory: a single number stands for
all of a tensor. Shown are CPU seconds of one thread, and the exponent of a power of the number of
nodes that fits the first and the last row best.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

import morphgraph as mg

WIDTH = 16
STAGES = ("lift", "cost", "plan", "resize")


class Net:
    """A network in the making."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = list(shape)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, tuple[int, ...]] = {}

    def add(self, op_type: str, *operands: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, operands, [name], **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = shape
        return name

    def model(self, last: str) -> ir.Model:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        nodes = [*self.nodes, helper.make_node("Identity", [last], ["y"])]
        named = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in self.weights.items()
        ]
        graph = helper.make_graph(nodes, "net", [x, *named], [y])
        opset = helper.make_opsetid("", 20)
        model = ir.from_proto(helper.make_model(graph, ir_version=10, opset_imports=[opset]))
        for value in list(model.graph.inputs)[1:]:
            model.graph.inputs.remove(value)
            array = np.broadcast_to(np.float32(0.5), self.weights[value.name or ""])
            value.const_value = ir.Tensor(array, name=value.name)
            model.graph.register_initializer(value)
        return model


def chain(nodes: int) -> ir.Model:
    net, last = Net((1, WIDTH, 4, 4)), "x"
    for _ in range(nodes // 2):
        kernel = net.weight(WIDTH, WIDTH, 3, 3)
        last = net.add("Relu", net.add("Conv", last, kernel, pads=[1, 1, 1, 1]))
    return net.model(last)


def dense_blocks(nodes: int, layers: int = 6) -> ir.Model:
    """Blocks of some layers of three nodes, each ended by a convolution to the first width."""
    net, last = Net((1, WIDTH, 4, 4)), "x"
    for _ in range(max(1, nodes // (3 * layers + 1))):
        parts, width = [last], WIDTH
        for _ in range(layers):
            joined = net.add("Concat", *parts, axis=1)
            made = net.add("Conv", joined, net.weight(4, width, 1, 1))
            parts.append(net.add("Relu", made))
            width += 4
        last = net.add("Conv", net.add("Concat", *parts, axis=1), net.weight(WIDTH, width, 1, 1))
    return net.model(last)


def transformer(nodes: int, width: int = 32, heads: int = 4) -> ir.Model:
    net, last = Net((1, 8, width)), "x"
    for _ in range(max(1, nodes // 18)):
        split = ir_constant(net, [0, 0, heads, width // heads])
        q, k, v = (
            net.add("Reshape", net.add("MatMul", last, net.weight(width, width)), split)
            for _ in range(3)
        )
        scores = net.add(
            "MatMul",
            net.add("Transpose", q, perm=[0, 2, 1, 3]),
            net.add("Transpose", k, perm=[0, 2, 3, 1]),
        )
        mixed = net.add(
            "MatMul", net.add("Softmax", scores), net.add("Transpose", v, perm=[0, 2, 1, 3])
        )
        back = net.add("Transpose", mixed, perm=[0, 2, 1, 3])
        flat = net.add("Reshape", back, ir_constant(net, [0, 0, width]))
        last = net.add("Add", last, net.add("MatMul", flat, net.weight(width, width)))
        hidden = net.add("Relu", net.add("MatMul", last, net.weight(width, 4 * width)))
        last = net.add("Add", last, net.add("MatMul", hidden, net.weight(4 * width, width)))
    return net.model(last)


def ir_constant(net: Net, numbers: list[int]) -> str:
    return net.add("Constant", value_ints=numbers)


NETWORKS: dict[str, Callable[[int], ir.Model]] = {
    "chain": chain,
    "dense blocks": dense_blocks,
    "transformer": transformer,
}


def seconds(model: ir.Model) -> list[float]:
    """CPU seconds of every stage."""
    found = []

    def clocked(work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        found.append(time.process_time() - start)
        return result

    graph = clocked(lambda: mg.lift(model))
    clocked(lambda: mg.cost(graph, "flops").gradient(graph.widths))
    plan = clocked(lambda: mg.plan(graph, budget={"flops": "50%"}))
    clocked(lambda: mg.apply(graph, plan, verify=False))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"| network | nodes | {' | '.join(f'{stage} s' for stage in STAGES)} |")
    print(f"|---|---:{'|---:' * len(STAGES)}|")
    for name in options.networks:
        seconds(NETWORKS[name](50))  # everything is imported
        rows = []
        for count in options.nodes:
            model = NETWORKS[name](count)
            rows.append((len(model.graph), seconds(model)))
            print(f"| {name} | {rows[-1][0]} | {shown(rows[-1][1])} |", flush=True)
        (few, least), (many, most) = rows[0], rows[-1]
        if many > few:
            powers = [
                math.log(b / a) / math.log(many / few) for a, b in zip(least, most, strict=True)
            ]
            print(f"| {name} | exponent | {shown(powers)} |", flush=True)
    return 0


def shown(numbers: Sequence[float]) -> str:
    return " | ".join(f"{number:.3g}" for number in numbers)


if __name__ == "__main__":
    sys.exit(main())
