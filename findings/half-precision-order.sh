#!/usr/bin/env bash
# onnxruntime's float16 converter with keep_io_types=True appends the casts of the inputs behind their
# readers: onnx.checker refuses the order of the nodes, ONNX Runtime runs it.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper as h, numpy_helper as nh
from onnxruntime.transformers.float16 import convert_float_to_float16

graph = h.make_graph(
    [h.make_node("MatMul", ["x", "w"], ["a"], "product"), h.make_node("Relu", ["a"], ["y"], "relu")],
    "net",
    [h.make_tensor_value_info("x", 1, [1, 4])],
    [h.make_tensor_value_info("y", 1, [1, 4])],
    [nh.from_array(np.ones((4, 4), np.float32), "w")],
)
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
half = convert_float_to_float16(model, keep_io_types=True)
operators = [node.op_type for node in half.graph.node]
print(f"nodes: {', '.join(operators)}")
try:
    onnx.checker.check_model(half)
    refusal = ""
except onnx.checker.ValidationError as error:
    refusal = str(error).splitlines()[0]
print(f"onnx.checker: {refusal or 'accepts it'}")
session = ort.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
print(f"ONNX Runtime: {session.run(None, {'x': np.ones((1, 4), np.float32)})[0].tolist()}")
assert operators == ["MatMul", "Relu", "Cast", "Cast"] and "topologically sorted" in refusal
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
