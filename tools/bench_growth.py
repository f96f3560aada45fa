"""How the time of lifting, planning and resizing grows with a network: a section of the page.

    python tools/bench_growth.py                            # 100 to 100,000 nodes, ten minutes
    python tools/bench_growth.py --most 10000               # a minute or two
    python tools/bench_growth.py -o docs/benchmarks.md      # as its section of the page

Chains of convolutions, dense blocks (every layer reads all before it in its block) and transformer
encoders of growing numbers of layers, whose weights take no memory: a single number stands for all
of a tensor. One dense block alone has edges as the square of its nodes, so that the exponent there
is in nodes and edges together. A decoder like Llama (hidden size 4096, 32 blocks: 7 billion
parameters, float16) is a file whose weights are a hole in the disk: nothing is read of it but the
structure, and its plan is by given scores. Decoders with caches, written out and in the fused
operators of GenAI's model builder, have 4 to 64 blocks. Shown are CPU seconds of one thread, each
row in a process of its own; *group* is a part of *lift*, *plan* is for half of the FLOPs, and *MB*
the largest resident set above that before lifting. The exponents are of a power of the number of
nodes, fitted by least squares to the logarithms of the rows from 1,000 nodes on (of decoders and
the one block: of all rows).
"""

import argparse
import datetime as dt
import gc
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

import morphgraph as mg
from morphgraph.collector import without_collector
from morphgraph.passes.coupling.group import group

WIDTH = 16
STAGES = ("lift", "group", "cost", "plan", "resize")
HEADING = "## Growth"


class Net:
    """A network in the making."""

    def __init__(self, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> None:
        self.inputs = [helper.make_tensor_value_info("x", dtype, list(shape))]
        self.outputs: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, tuple[int, ...]] = {}

    def add(self, op_type: str, *operands: str, **attributes: Any) -> str:
        return self.made(op_type, operands, [f"v{len(self.nodes)}"], **attributes)

    def made(
        self, op_type: str, operands: Sequence[str], results: list[str], **attributes: Any
    ) -> str:
        """A node with results of these names; returns the first."""
        self.nodes.append(helper.make_node(op_type, operands, results, **attributes))
        return results[0]

    def cache(self, block: int, heads: int, size: int) -> list[str]:
        """Inputs and outputs for the keys and values of a block: names of two and two."""
        names = []
        for kind, length, listed in (
            ("past", "P", self.inputs),
            ("present", "L", self.outputs),
        ):
            for part in ("key", "value"):
                names.append(f"{kind}.{block}.{part}")
                shape: list[str | int | None] = ["B", heads, length, size]
                listed.append(helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, shape))
        return names

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = shape
        return name

    def model(self, last: str) -> ir.Model:
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        nodes = [*self.nodes, helper.make_node("Identity", [last], ["y"])]
        named = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in self.weights.items()
        ]
        graph = helper.make_graph(nodes, "net", [*self.inputs, *named], [y, *self.outputs])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = ir.from_proto(helper.make_model(graph, ir_version=10, opset_imports=opsets))
        for value in list(model.graph.inputs)[len(self.inputs) :]:
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


def cached(nodes: int, width: int = 32, heads: int = 4) -> ir.Model:
    """A decoder as exporters write it: keys and values are joined to those of the past."""
    net = Net(("B", "T"), TensorProto.INT64)
    last = net.add("Gather", net.weight(40, width), "x")
    long = net.add("Shape", "past.0.key", start=2, end=3)
    zeros = net.add("Mul", "x", net.add("Constant", value_int=0))
    places = net.add("Gather", net.weight(99, width), net.add("Add", zeros, long))
    last = net.add("Add", last, places)
    split = ir_constant(net, [0, 0, heads, width // heads])
    joined = ir_constant(net, [0, 0, width])
    for block in range(max(1, nodes // 25)):
        past_k, past_v, present_k, present_v = net.cache(block, heads, width // heads)
        normed = net.made(
            "LayerNormalization", [last, net.weight(width)], [f"norm{block}"], axis=-1
        )
        q, k, v = (
            net.add(
                "Transpose",
                net.add("Reshape", net.add("MatMul", normed, net.weight(width, width)), split),
                perm=[0, 2, 1, 3],
            )
            for _ in range(3)
        )
        net.made("Concat", [past_k, k], [present_k], axis=2)
        net.made("Concat", [past_v, v], [present_v], axis=2)
        scores = net.add("MatMul", q, net.add("Transpose", present_k, perm=[0, 1, 3, 2]))
        mixed = net.add("MatMul", net.add("Softmax", scores), present_v)
        flat = net.add("Reshape", net.add("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
        last = net.add("Add", last, net.add("MatMul", flat, net.weight(width, width)))
        hidden = net.add("Relu", net.add("MatMul", last, net.weight(width, 4 * width)))
        last = net.add("Add", last, net.add("MatMul", hidden, net.weight(4 * width, width)))
    return net.model(last)


def builders(nodes: int, width: int = 64, heads: int = 4) -> ir.Model:
    """A decoder as ONNX Runtime GenAI's model builder writes it: fused, with a packed kernel."""
    ours = {"domain": "com.microsoft"}
    net = Net(("B", "T"), TensorProto.INT64)
    net.inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT64, ["B", "L"]))
    last = net.add("Gather", net.weight(40, width), "x")
    tables = net.weight(99, 8), net.weight(99, 8)
    one, place = ir_constant(net, [1]), net.add("Constant", value_int=1)
    count = net.add("Sub", net.add("ReduceSum", "mask", one, keepdims=0), one)
    length = net.add("Cast", count, to=TensorProto.INT32)
    total = net.add("Gather", net.add("Shape", "mask"), place)
    total = net.add("Cast", total, to=TensorProto.INT32)
    normed = net.add("SimplifiedLayerNormalization", last, net.weight(width))
    for block in range(max(1, nodes // 10)):
        past_k, past_v, present_k, present_v = net.cache(block, heads // 2, 16)
        packed = net.add("MatMul", normed, net.weight(width, 2 * 16 * heads))
        operands = [packed, "", "", past_k, past_v, length, total, *tables]
        mixed = net.made(
            "GroupQueryAttention",
            operands,
            [f"mixed{block}", present_k, present_v],
            num_heads=heads,
            kv_num_heads=heads // 2,
            do_rotary=1,
            **ours,
        )
        for part in ("attention", "mlp"):
            if part == "attention":
                added = net.add("MatMul", mixed, net.weight(16 * heads, width))
            else:
                gate, up = (net.add("MatMul", normed, net.weight(width, 128)) for _ in range(2))
                product = net.add("Mul", net.add("Mul", gate, net.add("Sigmoid", gate)), up)
                added = net.add("MatMul", product, net.weight(128, width))
            names = [f"{name}_{part}{block}" for name in ("normed", "sum")]
            normed = net.made(
                "SkipSimplifiedLayerNormalization",
                [last, added, net.weight(width)],
                [names[0], "", "", names[1]],
                **ours,
            )
            last = names[1]
    return net.model(net.add("MatMul", normed, net.weight(width, 40)))


def ir_constant(net: Net, numbers: list[int]) -> str:
    return net.add("Constant", value_ints=numbers)


def dense_block(nodes: int) -> ir.Model:
    return dense_blocks(nodes, layers=max(1, nodes // 3))


class Decoder:
    """A decoder as a file: rotary embeddings, a gated layer; weights are a hole in the disk."""

    def __init__(self, hidden: int = 4096, inner: int = 11008, heads: int = 32) -> None:
        self.hidden, self.inner, self.heads = hidden, inner, heads
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.bytes = 0

    def add(self, op_type: str, *operands: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, operands, [name], name, **attributes))
        return name

    def weight(self, name: str, *shape: int) -> str:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = 2 * int(np.prod(shape))
        for key, value in (
            ("location", "decoder.data"),
            ("offset", self.bytes),
            ("length", length),
        ):
            tensor.external_data.add(key=key, value=str(value))
        self.bytes += -(-length // 4096) * 4096
        self.tensors.append(tensor)
        return name

    def constant(self, name: str, array: Any) -> str:
        self.tensors.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def normalized(self, x: str, name: str) -> str:
        mean = self.add("ReduceMean", self.add("Mul", x, x), "last", keepdims=1)
        size = self.add("Sqrt", self.add("Add", mean, "epsilon"))
        return self.add("Mul", self.add("Div", x, size), self.weight(name, self.hidden))

    def rotated(self, x: str) -> str:
        first = self.add("Slice", x, "zero", "half", "three")
        second = self.add("Slice", x, "half", "end", "three")
        turned = self.add("Concat", self.add("Neg", second), first, axis=3)
        return self.add("Add", self.add("Mul", x, "cos"), self.add("Mul", turned, "sin"))

    def attended(self, x: str, at: str) -> str:
        square = (self.hidden, self.hidden)
        q, k, v = (
            self.add("Transpose", self.add("Reshape", product, "split"), perm=[0, 2, 1, 3])
            for product in [self.add("MatMul", x, self.weight(f"{at}.{n}", *square)) for n in "qkv"]
        )
        turned = self.add("Transpose", self.rotated(k), perm=[0, 1, 3, 2])
        scores = self.add("Mul", self.add("MatMul", self.rotated(q), turned), "scale")
        mixed = self.add("MatMul", self.add("Softmax", scores), v)
        flat = self.add("Reshape", self.add("Transpose", mixed, perm=[0, 2, 1, 3]), "flat")
        return self.add("MatMul", flat, self.weight(f"{at}.o", *square))

    def gated(self, x: str, at: str) -> str:
        wide = (self.hidden, self.inner)
        gate, up = (self.add("MatMul", x, self.weight(f"{at}.{n}", *wide)) for n in ("gate", "up"))
        product = self.add("Mul", self.add("Mul", gate, self.add("Sigmoid", gate)), up)
        return self.add("MatMul", product, self.weight(f"{at}.down", self.inner, self.hidden))

    def write(self, blocks: int, folder: Path, words: int = 32000, length: int = 64) -> Path:
        """The file of a decoder with so many blocks."""
        head = self.hidden // self.heads
        half = np.float16
        for name, array in {
            "last": [-1],
            "epsilon": half(1e-5),
            "scale": half(head**-0.5),
            "split": [0, 0, self.heads, head],
            "flat": [0, 0, self.hidden],
            "zero": [0],
            "half": [head // 2],
            "end": [2**62],
            "three": [3],
            "cos": np.ones((1, 1, length, head), half),
            "sin": np.zeros((1, 1, length, head), half),
        }.items():
            self.constant(name, array)
        x = self.add("Gather", self.weight("embedding", words, self.hidden), "ids")
        for block in range(blocks):
            x = self.add("Add", x, self.attended(self.normalized(x, f"{block}.norm1"), f"{block}"))
            x = self.add("Add", x, self.gated(self.normalized(x, f"{block}.norm2"), f"{block}"))
        y = self.add("MatMul", self.normalized(x, "norm"), self.weight("head", self.hidden, words))
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, length])
        logits = helper.make_tensor_value_info(y, TensorProto.FLOAT16, [1, length, words])
        graph = helper.make_graph(self.nodes, "decoder", [ids], [logits], self.tensors)
        opset = helper.make_opsetid("", 18)
        model = helper.make_model(graph, ir_version=10, opset_imports=[opset])
        path = folder / "decoder.onnx"
        path.write_bytes(model.SerializeToString())
        with (folder / "decoder.data").open("wb") as data:
            data.truncate(self.bytes)
        return path


NETWORKS: dict[str, Callable[[int], ir.Model]] = {
    "chain": chain,
    "dense blocks": dense_blocks,
    "transformer": transformer,
    "one dense block": dense_block,
    "cached decoder": cached,
    "builder's decoder": builders,
}
NODES = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)
BLOCK_NODES = (100, 200, 400, 800)
DECODER, BLOCKS = "decoder", (4, 8, 16, 32, 64)
COUNTS = {
    DECODER: BLOCKS,
    "one dense block": BLOCK_NODES,
    "cached decoder": tuple(25 * blocks for blocks in BLOCKS),
    "builder's decoder": tuple(10 * blocks for blocks in BLOCKS),
}


def measured(model: ir.Model | str, ready: Callable[[], object]) -> dict[str, Any]:
    """CPU seconds of every stage, and what the network is.

    Args:
        model: the network, or its file.
        ready: called first, so that everything is imported.
    """
    ready()
    found: dict[str, Any] = {}

    def clocked(stage: str, work: Callable[[], Any]) -> Any:
        gc.collect()  # what another stage has left
        start = time.process_time()
        result = work()
        found[stage] = time.process_time() - start
        return result

    before = resident()
    graph = clocked("lift", lambda: mg.lift(model))
    with without_collector():  # as within a lift
        clocked("group", lambda: group(graph.couplings))
    clocked("cost", lambda: mg.cost(graph, "flops").gradient(graph.widths))
    scores: Any = np.ones(len(graph.channel_group)) if isinstance(model, str) else "l2"
    plan = clocked("plan", lambda: mg.plan(graph, budget={"flops": "50%"}, score=scores))
    clocked("resize", lambda: mg.apply(graph, plan, verify=False))
    edges = sum(len(op.ir.inputs) for op in graph.ops)
    params = mg.cost(graph, "params").total
    return (
        found
        | {"nodes": len(graph.ops), "edges": edges, "params": params}
        | {"MB": (resident() - before) / 1e6}
    )


def resident() -> int:
    """The largest resident set that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row(name: str, count: int) -> dict[str, Any]:
    """One network in this process."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if name == DECODER:
            small = Decoder(64, 128, 4).write(1, Path(folder), 100)
            ready = measured_once(str(small))
            return measured(str(Decoder().write(count, Path(folder))), ready)
        return measured(NETWORKS[name](count), measured_once(NETWORKS[name](50)))


def measured_once(model: ir.Model | str) -> Callable[[], object]:
    """All stages of a small network."""
    graph = mg.lift(model)
    return lambda: mg.apply(graph, mg.plan(graph, budget={"flops": "50%"}), verify=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=100_000, help="nodes")
    everything = (*NETWORKS, DECODER)
    parser.add_argument("--networks", nargs="+", default=everything, choices=everything)
    parser.add_argument("-o", "--output", type=Path, help="a page that gets the table")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(row(options.row[0], int(options.row[1]))))
        return 0
    lines = [f"| network | nodes | edges | parameters | {' | '.join(STAGES)} | MB |"]
    lines.append(f"|---|---:|---:|---:{'|---:' * len(STAGES)}|---:|")
    print("\n".join(lines), flush=True)
    for name in options.networks:
        counts = COUNTS.get(name, NODES)
        rows = []
        for count in (each for each in counts if each <= options.most):
            command = [sys.executable, __file__, "--row", name, str(count)]
            made = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(made.stdout))
            lines.append(shown(name, rows[-1]))
            print(lines[-1], flush=True)
        lines.append(exponents(name, rows))
        print(lines[-1], flush=True)
    if options.output:
        write(options.output, "\n".join(lines))
    return 0


def shown(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    seconds = " | ".join(f"{found[stage]:.3g}" for stage in STAGES)
    sizes = f"{found['nodes']:,} | {found['edges']:,} | {found['params']:.3g}"
    return f"| {name} | {sizes} | {seconds} | {found['MB']:.0f} |"


def exponents(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The row of the exponents."""
    large = [each for each in rows if each["nodes"] >= 1000 or name not in list(NETWORKS)[:3]]
    if len(large) < 2:
        return f"| {name} | exponent | | | {' | ' * len(STAGES)}|"
    with_edges = name == "one dense block"
    sizes = [each["nodes"] + with_edges * each["edges"] for each in large]
    powers = [
        float(np.polyfit(np.log(sizes), np.log([each[stage] for each in large]), 1)[0])
        for stage in STAGES
    ]
    return f"| {name} | **exponent** | | | {' | '.join(f'**{each:.2f}**' for each in powers)} | |"


def write(page: Path, table: str) -> None:
    """Put the table into its section of a page, or behind the page."""
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    made = (
        f"Made by `python {' '.join(sys.argv)}` on {dt.date.today()}, Python "
        f"{platform.python_version()}, onnx-ir {ir.__version__}, beside other programs."
    )
    section = f"{HEADING}\n\n{made}\n{about}\n\n{table}\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(f"{HEADING}\n")
    behind = "".join(f"\n## {each}" for each in rest.split("\n## ")[1:])
    page.write_text(f"{before.rstrip()}\n\n{section}{behind}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
