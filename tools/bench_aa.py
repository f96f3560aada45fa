"""Whether `bench` can be trusted: a model against itself, and against one with 3 % more work.

    python tools/bench_aa.py                         # 20 of each, on a chain of convolutions
    python tools/bench_aa.py --model resnet18.onnx   # that model against itself

The chain has 33 equal convolutions; the one that must be found slower has 34. On Linux, huge pages
make sessions more alike: GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python tools/bench_aa.py.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx_ir as ir

from morphgraph.benchmark import BenchResult, bench

LAYERS = 33
CHANNELS, SIZE = 64, 28


def chain(layers: int) -> ir.Model:
    """So many 3x3 convolutions, one after the other."""
    generator = np.random.default_rng(0)
    value = ir.val("x", dtype=ir.DataType.FLOAT, shape=[1, CHANNELS, SIZE, SIZE])
    inputs, nodes, weights = [value], [], []
    for index in range(layers):
        kernel = generator.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32) / 24
        name = f"conv{index}.weight"
        weights.append(ir.val(name, const_value=ir.tensor(kernel, name=name)))
        attributes = {"pads": [1, 1, 1, 1]}
        nodes.append(
            ir.node("Conv", [value, weights[-1]], attributes=attributes, name=f"conv{index}")
        )
        value = nodes[-1].outputs[0]
        value.name = f"y{index}"
        value.dtype, value.shape = ir.DataType.FLOAT, inputs[0].shape
    graph = ir.Graph(
        inputs, [value], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="chain"
    )
    return ir.Model(graph, ir_version=10)


def main() -> None:
    """Run the comparisons and count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="run this one against itself only")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--runtime", default="ort")
    arguments = parser.parse_args()
    base = arguments.model or chain(LAYERS)
    print("model against itself: speed-up, interval")
    results = [_once(base, base, seed, arguments) for seed in range(arguments.times)]
    held = sum(low <= 1 <= high for low, high in map(_interval, results))
    found = ""
    if arguments.model is None:
        print(f"{LAYERS} layers against {LAYERS + 1}: true speed-up {LAYERS / (LAYERS + 1):.3f}")
        slower = [
            _once(base, chain(LAYERS + 1), seed, arguments) for seed in range(arguments.times)
        ]
        count = sum(_interval(result)[1] < 1 for result in slower)
        found = f"; the slower model was found {count} times of {len(slower)}"
    print(f"the interval held 1.00 in {held} of {len(results)} comparisons with itself{found}")


def _once(
    base: ir.Model | Path, other: ir.Model | Path, seed: int, arguments: argparse.Namespace
) -> BenchResult:
    result = bench(
        [base, other], seconds=arguments.seconds, seed=seed, runtimes=[arguments.runtime]
    )
    low, high = _interval(result)
    print(f"{result.models[1].speedup:.3f}  {low:.3f} to {high:.3f}  {result.epochs} epochs")
    return result


def _interval(result: BenchResult) -> tuple[float, float]:
    interval = result.models[1].speedup_interval
    assert interval is not None
    return interval


if __name__ == "__main__":
    main()
