#!/usr/bin/env bash
# onnxslim folds BatchNormalization into Conv, which gives the kernel another name, and keeps the model's
# metadata_props as they were: an entry that lists initializers by name no longer fits.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxslim==0.1.98 onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import json

import numpy as np
import onnx
import onnxslim
from onnx import helper as h, numpy_helper as nh

rng = np.random.default_rng(0)
SHAPES = {"conv.weight": (8, 3, 3, 3), **{f"norm.{name}": (8,) for name in "sbmv"}}
weights = [
    nh.from_array(rng.uniform(0.1, 1, shape).astype(np.float32), name)
    for name, shape in SHAPES.items()
]
graph = h.make_graph(
    [
        h.make_node("Conv", ["x", "conv.weight"], ["c"], "conv"),
        h.make_node("BatchNormalization", ["c", *list(SHAPES)[1:]], ["n"], "norm"),
        h.make_node("Relu", ["n"], ["y"], "relu"),
    ],
    "net",
    [h.make_tensor_value_info("x", 1, [1, 3, 8, 8])],
    [h.make_tensor_value_info("y", 1, [1, 8, 6, 6])],
    weights,
)
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
h.set_model_props(model, {"example.parameters": json.dumps(list(SHAPES))})
for node in model.graph.node:
    entry = node.metadata_props.add()
    entry.key, entry.value = "example.layer", node.name
onnx.checker.check_model(model, full_check=True)
slim = onnxslim.slim(model)
onnx.checker.check_model(slim, full_check=True)
names = [tensor.name for tensor in slim.graph.initializer]
props = {entry.key: entry.value for entry in slim.metadata_props}
listed = json.loads(props["example.parameters"])
gone = [name for name in listed if name not in names]
noted = [node.name for node in slim.graph.node if node.metadata_props]
print(f"nodes: {', '.join(node.op_type for node in slim.graph.node)}")
print(f"initializers: {', '.join(names)}")
print(f"metadata of the model lists: {', '.join(listed)}")
print(f"listed, but no longer there: {', '.join(gone) or 'none'}")
print(f"nodes that kept their metadata: {', '.join(noted) or 'none'}")
assert listed == list(SHAPES) and len(gone) >= 4 and not noted
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
