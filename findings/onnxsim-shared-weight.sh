#!/usr/bin/env bash
# onnxsim's structured pruning of a weight that two convolutions read: the second one reads channels that
# the first no longer computes.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxsim==0.8.1 onnx==1.23.2 numpy==2.4.6 onnxruntime==1.32.0
cd "$folder"
cat > show.py <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
import onnxsim
from onnx import helper as h, numpy_helper as nh

rng = np.random.default_rng(0)
SHAPES = {"a": (8, 3, 1, 1), "b": (8, 8, 1, 1), "c": (4, 8, 1, 1)}
whole = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def network(weights):
    nodes = [
        h.make_node("Conv", ["x", "a"], ["p"], "first"),
        h.make_node("Relu", ["p"], ["q"], "relu1"),
        h.make_node("Conv", ["q", "b"], ["r"], "second"),
        h.make_node("Relu", ["r"], ["s"], "relu2"),
        h.make_node("Conv", ["s", "b"], ["t"], "third"),
        h.make_node("Conv", ["t", "c"], ["y"], "last"),
    ]
    x = h.make_tensor_value_info("x", 1, [1, 3, 4, 4])
    y = h.make_tensor_value_info("y", 1, [1, 4, 4, 4])
    tensors = [nh.from_array(array, name) for name, array in weights.items()]
    graph = h.make_graph(nodes, "net", [x], [y], tensors)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model):
    feeds = {"x": np.ones((1, 3, 4, 4), np.float32)}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


pruned = onnxsim.apply_structured_pruning(network(whole), sparsity=0.5)
left = {tensor.name: nh.to_array(tensor) for tensor in pruned.graph.initializer}
places = np.array([np.argwhere(whole["b"] == number)[0] for number in left["b"].ravel()])
made, read = (sorted(set(places[:, axis].tolist())) for axis in (0, 1))
print(f"channels that 'second' computes: {made}")
print(f"channels that 'third' reads:     {read}")
silent = {name: array.copy() for name, array in whole.items()}
silent["b"][:, [k for k in range(8) if k not in read]] = 0
silent["c"][:, [k for k in range(8) if k not in made]] = 0
expected, found = run(network(silent)), run(pruned)
error = float(np.abs(found - expected).max() / np.abs(expected).max())
print(f"pruned against the original without the removed channels: off by {error:.0%} of its scale")
assert made != read and error > 0.01
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
