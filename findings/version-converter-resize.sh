#!/usr/bin/env bash
# onnx's version converter raises a Resize of opset 10 to 11 without saying how positions are taken: the
# defaults differ between the two, and so do the results.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper as h, numpy_helper as nh, version_converter


def model(opset):
    node = h.make_node("Resize", ["x", "scales"], ["y"], mode="linear")
    graph = h.make_graph(
        [node],
        "net",
        [h.make_tensor_value_info("x", 1, [1, 1, 1, 4])],
        [h.make_tensor_value_info("y", 1, [1, 1, 1, 8])],
        [nh.from_array(np.array([1, 1, 1, 2], np.float32), "scales")],
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=6)


def run(proto):
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)})[0].ravel()


old = model(10)
onnx.checker.check_model(old, full_check=True)
new = version_converter.convert_version(old, 11)
onnx.checker.check_model(new, full_check=True)
before, after = run(old).tolist(), run(new).tolist()
print("opset 10:", before)
print("raised to 11:", after)
print("attributes of the raised Resize:", [a.name for a in new.graph.node[-1].attribute])
assert before == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0] and after != before
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
