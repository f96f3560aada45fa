#!/usr/bin/env bash
# onnxruntime's extended optimizations write LayerNormalization into a model of opset 13, where ONNX has no
# such operator: the saved file is one that onnx.checker refuses.
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

NUMBERS = {"scale": np.ones(8), "shift": np.ones(8), "two": 2.0, "epsilon": 1e-5}
nodes = [  # a layer normalization as exporters wrote it for opset 13
    h.make_node("ReduceMean", ["x"], ["mean"], axes=[-1]),
    h.make_node("Sub", ["x", "mean"], ["d"]),
    h.make_node("Pow", ["d", "two"], ["q"]),
    h.make_node("ReduceMean", ["q"], ["v"], axes=[-1]),
    h.make_node("Add", ["v", "epsilon"], ["e"]),
    h.make_node("Sqrt", ["e"], ["s"]),
    h.make_node("Div", ["d", "s"], ["n"]),
    h.make_node("Mul", ["n", "scale"], ["k"]),
    h.make_node("Add", ["k", "shift"], ["y"]),
]
tensors = [nh.from_array(np.float32(number), name) for name, number in NUMBERS.items()]
x, y = (h.make_tensor_value_info(name, 1, [2, 8]) for name in "xy")
graph = h.make_graph(nodes, "net", [x], [y], tensors)
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
options.optimized_model_filepath = "optimized.onnx"
options.log_severity_level = 3
ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
saved = onnx.load("optimized.onnx")
(node,) = saved.graph.node
opset = next(entry.version for entry in saved.opset_import if not entry.domain)
print(f"saved: {node.op_type} of domain '{node.domain}', opset {opset}")
try:
    onnx.checker.check_model(saved)
    refusal = ""
except onnx.checker.ValidationError as error:
    refusal = str(error).splitlines()[0]
print(f"onnx.checker: {refusal or 'accepts it'}")
session = ort.InferenceSession("optimized.onnx", providers=["CPUExecutionProvider"])
result = session.run(None, {"x": np.arange(16, dtype=np.float32).reshape(2, 8)})[0]
print(f"ONNX Runtime runs it: shape {result.shape}")
assert (node.op_type, node.domain, opset) == ("LayerNormalization", "", 13) and refusal
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
