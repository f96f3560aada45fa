#!/usr/bin/env bash
# ONNX Runtime's CPU kernels ignore what two operators in few bits are told: MatMulNBits its packed zero
# points once columns have group numbers, QMoE that the shares of the chosen experts are not normalized.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import numpy as np
import onnxruntime as ort
from onnx import helper as h, numpy_helper as nh

rng = np.random.default_rng(0)


def run(kind, feeds, constants, operands, **attributes):
    graph = h.make_graph(
        [h.make_node(kind, operands, ["y"], domain="com.microsoft", **attributes)],
        "net",
        [h.make_tensor_value_info(name, 1, array.shape) for name, array in feeds.items()],
        [h.make_tensor_value_info("y", 1, None)],
        [nh.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [h.make_opsetid("", 20), h.make_opsetid("com.microsoft", 1)]
    model = h.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def unpacked(array):
    return np.stack([array & 15, array >> 4], -1).reshape(*array.shape[:-1], -1).astype(np.float32)


# MatMulNBits: a unit matrix reads the kernel, and what is left of it tells the zero point.
columns, rows = 32, 4
w = rng.integers(0, 256, (rows, 2, 8), dtype=np.uint8)
s = rng.uniform(0.5, 1, rows * 2).astype(np.float32)
z = np.full(rows, 0x53, np.uint8)  # 3 and 5 of every row's two blocks
order = (np.arange(columns) % 2).astype(np.int32)
whole = unpacked(w).reshape(rows, columns)


def zero_points(groups, constants, operands):
    unit = {"x": np.eye(columns, dtype=np.float32)}
    sizes = {"K": columns, "N": rows, "bits": 4, "block_size": 16}
    kernel = run("MatMulNBits", unit, constants, operands, **sizes).T
    return np.unique(np.round(whole - kernel / s.reshape(rows, 2)[:, groups]))


blocks = zero_points(np.arange(columns) // 16, {"w": w, "s": s, "z": z}, ["x", "w", "s", "z"])
grouped = zero_points(order, {"w": w, "s": s, "z": z, "g": order}, ["x", "w", "s", "z", "g"])
print("MatMulNBits, zero points 3 and 5: those in use", blocks, "with g_idx", grouped)
assert blocks.tolist() == [3, 5]
assert grouped.tolist() == [8]

# QMoE: two of four experts per token; their shares are a softmax over the two whatever is asked.
size, experts = 32, 4
feeds = {
    "x": rng.normal(size=(6, size)).astype(np.float32),
    "r": rng.normal(size=(6, experts)).astype(np.float32),
}
kernels = {n: rng.integers(0, 256, (experts, size, size // 2), dtype=np.uint8) for n in "wv"}
scales = {n: np.full((experts, size), 0.01, np.float32) for n in "st"}
results = [
    run(
        "QMoE",
        feeds,
        kernels | scales,
        ["x", "r", "w", "s", "", "v", "t"],
        k=2,
        activation_type="silu",
        expert_weight_bits=4,
        normalize_routing_weights=asked,
    )
    for asked in (0, 1)
]
print("QMoE, normalize_routing_weights 0 and 1: equal", np.array_equal(*results))
assert np.array_equal(*results)
PYTHON
"$folder/env/bin/python" show.py
