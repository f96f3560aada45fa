#!/usr/bin/env bash
# onnxsim's calibrated structured pruning leaves convolutions with pooling between them as they are; the
# pruning by weights, which is said to know the same networks, cuts them.
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
import onnxsim
from onnx import helper as h, numpy_helper as nh

rng = np.random.default_rng(0)
inputs = [{"x": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(4)]


def network(*between):
    """Two convolutions, and operators of one input between them."""
    nodes = [h.make_node("Conv", ["x", "a"], ["v0"], "first")]
    for k, (kind, attributes) in enumerate(between):
        nodes.append(h.make_node(kind, [f"v{k}"], [f"v{k + 1}"], **attributes))
    nodes.append(h.make_node("Conv", [f"v{len(between)}", "b"], ["y"], "second"))
    x = h.make_tensor_value_info("x", 1, [1, 3, 12, 12])
    y = h.make_tensor_value_info("y", 1, [1, 4, None, None])
    shapes = {"a": (8, 3, 3, 3), "b": (4, 8, 1, 1)}
    tensors = [
        nh.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    graph = h.make_graph(nodes, "net", [x], [y], tensors)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def width(model):
    return next(tensor.dims[0] for tensor in model.graph.initializer if tensor.name == "a")


window = {"kernel_shape": [2, 2], "strides": [2, 2]}
BETWEEN = {
    "Relu": [("Relu", {})],
    "Relu, MaxPool": [("Relu", {}), ("MaxPool", window)],
    "Relu, AveragePool": [("Relu", {}), ("AveragePool", window)],
    "Relu, GlobalAveragePool": [("Relu", {}), ("GlobalAveragePool", {})],
    "HardSwish": [("HardSwish", {})],
}
found = {}
print("channels that are left of 8:")
for name, between in BETWEEN.items():
    model = network(*between)
    plain = onnxsim.apply_structured_pruning(model, sparsity=0.5)
    data = onnxsim.apply_structured_wanda_pruning(model, calibration_data=inputs, sparsity=0.5)
    assert width(model) == 8
    found[name] = width(plain), width(data)
    print(f"  {name}: {found[name][0]} by weights, {found[name][1]} with calibration data")
assert found.pop("Relu") == (4, 4)
assert set(found.values()) == {(4, 8)}, found
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
