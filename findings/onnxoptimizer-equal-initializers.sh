#!/usr/bin/env bash
# onnxoptimizer's default passes store equal initializers once: independent layers then share one tensor.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxoptimizer==0.4.2 onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import numpy as np
import onnx
import onnxoptimizer
from onnx import helper as h, numpy_helper as nh

rng = np.random.default_rng(0)
weights = [
    nh.from_array(rng.standard_normal((8, 8)).astype(np.float32), name) for name in ("w1", "w2")
]
biases = [nh.from_array(np.zeros(8, np.float32), name) for name in ("b1", "b2")]
graph = h.make_graph(
    [
        h.make_node("Gemm", ["x", "w1", "b1"], ["a"], "first"),
        h.make_node("Relu", ["a"], ["r"], "relu"),
        h.make_node("Gemm", ["r", "w2", "b2"], ["y"], "second"),
    ],
    "net",
    [h.make_tensor_value_info("x", 1, [1, 8])],
    [h.make_tensor_value_info("y", 1, [1, 8])],
    weights + biases,
)
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
found = {}
for title, chosen in (("default passes", None), ("without the pass", "others")):
    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    without = [name for name in passes if name != "eliminate_duplicate_initializer"]
    made = onnxoptimizer.optimize(model, without if chosen else None)
    onnx.checker.check_model(made, full_check=True)
    biases = [node.input[2] for node in made.graph.node if node.op_type == "Gemm"]
    found[title] = biases
    names = sorted(tensor.name for tensor in made.graph.initializer)
    print(f"{title}: biases {', '.join(biases)}; initializers {', '.join(names)}")
assert found["default passes"][0] == found["default passes"][1], found
assert found["without the pass"] == ["b1", "b2"], found
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
