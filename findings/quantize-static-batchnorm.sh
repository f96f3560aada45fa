#!/usr/bin/env bash
# onnxruntime's quantize_static leaves BatchNormalization as float nodes between DequantizeLinear and
# QuantizeLinear; with quant_pre_process before it there is none.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 sympy==1.14.0
cd "$folder"
cat > show.py <<'PYTHON'
import logging

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper as h, numpy_helper as nh
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

logging.disable(logging.WARNING)
rng = np.random.default_rng(0)
SHAPES = {"w": (8, 3, 3, 3), "s": (8,), "b": (8,), "m": (8,), "v": (8,)}
weights = [
    nh.from_array(rng.uniform(0.1, 1, shape).astype(np.float32), name)
    for name, shape in SHAPES.items()
]
graph = h.make_graph(
    [
        h.make_node("Conv", ["x", "w"], ["c"], "conv"),
        h.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], "norm"),
        h.make_node("Relu", ["n"], ["y"], "relu"),
    ],
    "net",
    [h.make_tensor_value_info("x", 1, [1, 3, 8, 8])],
    [h.make_tensor_value_info("y", 1, [1, 8, 6, 6])],
    weights,
)
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "net.onnx")


class Inputs(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]

    def get_next(self):
        return self.left.pop() if self.left else None


def optimized(path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = f"{path}.optimized"
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def count(model):
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


quant_pre_process("net.onnx", "prepared.onnx")
found = {}
for source in ("net.onnx", "prepared.onnx"):
    quantize_static(source, "quantized.onnx", Inputs())
    quantized = onnx.load("quantized.onnx")
    found[source] = count(quantized), count(optimized("quantized.onnx"))
    how = "as it is" if source == "net.onnx" else "after quant_pre_process"
    print(f"{how}: {found[source][0]} BatchNormalization after quantize_static,")
    print(f"  {found[source][1]} left in the session with all optimizations")
    if source == "net.onnx":
        made = {out: node for node in quantized.graph.node for out in node.output}
        norm = next(n for n in quantized.graph.node if n.op_type == "BatchNormalization")
        after = [n.op_type for n in quantized.graph.node if norm.output[0] in n.input]
        print(f"  {made[norm.input[0]].op_type} -> BatchNormalization -> {', '.join(after)}")
plain = count(optimized("net.onnx"))
print(f"not quantized: {plain} left in the session with all optimizations")
assert found == {"net.onnx": (1, 1), "prepared.onnx": (0, 0)} and plain == 0, found
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
