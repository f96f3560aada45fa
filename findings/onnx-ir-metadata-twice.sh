#!/usr/bin/env bash
# onnx_ir writes the metadata of an initializer that it has read twice: every round trip doubles the
# entries.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx_ir==1.1.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper as h, numpy_helper as nh

weight = nh.from_array(np.ones((3, 2), np.float32), "weight")
weight.metadata_props.add(key="example.note", value="first layer")
graph = h.make_graph(
    [h.make_node("MatMul", ["x", "weight"], ["y"], "fc")],
    "net",
    [h.make_tensor_value_info("x", 1, [1, 3])],
    [h.make_tensor_value_info("y", 1, [1, 2])],
    [weight],
)
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
entries = []
for _ in range(4):
    (tensor,) = model.graph.initializer
    entries.append(len(tensor.metadata_props))
    model = ir.to_proto(ir.from_proto(model))
    onnx.checker.check_model(model, full_check=True)
print(f"entries after 0, 1, 2 and 3 round trips: {entries}")
print(f"keys: {sorted({entry.key for entry in model.graph.initializer[0].metadata_props})}")
assert entries[0] == 1 and entries == sorted(entries) and entries[-1] > 1
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
