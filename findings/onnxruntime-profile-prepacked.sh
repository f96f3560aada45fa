#!/usr/bin/env bash
# The profile of ONNX Runtime leaves weights that it has prepacked out of a node's list of input shapes,
# without a gap: what is second in the list may be the third input.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import json

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper as h, numpy_helper as nh

tensors = {"w": np.ones((64, 32), np.float32), "b": np.ones(64, np.float32)}
graph = h.make_graph(
    [h.make_node("Gemm", ["x", "w", "b"], ["y"], "fc", transB=1)],
    "net",
    [h.make_tensor_value_info("x", 1, [1, 32])],
    [h.make_tensor_value_info("y", 1, [1, 64])],
    [nh.from_array(array, name) for name, array in tensors.items()],
)
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9)
onnx.checker.check_model(model, full_check=True)

shapes = {}
for disabled in "01":
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.add_session_config_entry("session.disable_prepacking", disabled)
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, {"x": np.ones((1, 32), np.float32)})
    with open(session.end_profiling()) as file:
        events = json.load(file)
    (event,) = [e for e in events if e["name"] == "fc_kernel_time"]
    shapes[disabled] = [s for typed in event["args"]["input_type_shape"] for s in typed.values()]
print("inputs of the node:", [[1, 32], [64, 32], [64]])
print("in the profile:", shapes["0"])
print("in the profile, prepacking disabled:", shapes["1"])
assert shapes["0"] == [[1, 32], [64]]
assert shapes["1"] == [[1, 32], [64, 32], [64]]
PYTHON
"$folder/env/bin/python" show.py
