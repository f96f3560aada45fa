#!/usr/bin/env bash
# onnxsim's refit after pruning takes what a layer reads from the original network; what it reads in the
# pruned one is something else, once a layer before it was pruned too.
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
SIZES = [16, 32, 24, 8]
nodes, tensors, last = [], {}, "x"
for k, (wide, out) in enumerate(zip(SIZES[:-1], SIZES[1:], strict=True), start=1):
    tensors[f"w{k}"] = (rng.standard_normal((wide, out)) / wide**0.5).astype(np.float32)
    tensors[f"b{k}"] = (rng.standard_normal(out) / out**0.5).astype(np.float32)
    nodes.append(h.make_node("Gemm", [last, f"w{k}", f"b{k}"], [f"z{k}"], f"layer{k}"))
    nodes.append(h.make_node("Relu", [f"z{k}"], [f"r{k}"]))
    last = f"r{k}"
nodes.pop()
graph = h.make_graph(
    nodes,
    "net",
    [h.make_tensor_value_info("x", 1, ["N", SIZES[0]])],
    [h.make_tensor_value_info("z3", 1, ["N", SIZES[-1]])],
    [nh.from_array(array, name) for name, array in tensors.items()],
)
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
samples, held_out = rng.standard_normal((2, 2048, SIZES[0])).astype(np.float32)


def run(model, x):
    """What the third layer reads, and what it computes."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.append(h.make_tensor_value_info("r2", 1, None))
    session = ort.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["r2", "z3"], {"x": x})


def weights(model):
    return {tensor.name: nh.to_array(tensor) for tensor in model.graph.initializer}


def bias_too(reads):
    return np.concatenate([reads, np.ones((len(reads), 1))], axis=1)


def fit(reads, wanted):
    """Least squares: the third layer's weight, and its bias as the last row."""
    return np.linalg.lstsq(bias_too(reads), wanted, rcond=None)[0]


def error(found, wanted):
    return float(((found - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum())


pruned = onnxsim.apply_structured_pruning(model, sparsity=0.5)
fitted = onnxsim.apply_pruning_finetune(model, pruned, calibration_data=[{"x": samples}])
before, after = weights(pruned), weights(fitted)
print("widths:", [before[f"w{k}"].shape[1] for k in (1, 2, 3)], "of", SIZES[1:])
changed = [name for name in before if not np.allclose(before[name], after[name], atol=1e-4)]
print("fitted:", ", ".join(changed))

kept = [tensors["b2"].tolist().index(number) for number in before["b2"].tolist()]
reads, wanted = run(model, samples)
reads = reads[:, kept]
there = run(fitted, samples)[0]
apart = error(there, reads)
print(f"what the third layer reads in the pruned network, against the original: off by {apart:.2f}")
its_own = np.concatenate([after["w3"], after["b3"][None]])
by_onnxsim = error(bias_too(reads) @ its_own, wanted)
least = error(bias_too(reads) @ fit(reads, wanted), wanted)
print("squared error of its output, as a share of the variance:")
print(f"  were it to read the original's activations: {by_onnxsim:.2f}, at best {least:.2f}")
answer = run(model, held_out)[1]
errors = {
    "pruned": error(run(pruned, held_out)[1], answer),
    "refit by onnxsim": error(run(fitted, held_out)[1], answer),
}
fit_there = bias_too(run(fitted, held_out)[0]) @ fit(there, wanted)
errors["third layer fitted on what it reads"] = error(fit_there, answer)
for name, number in errors.items():
    print(f"  {name}, on other inputs: {number:.2f}")
_, refit, best = errors.values()
assert changed == ["w3", "b3"] and apart > 0.1 and by_onnxsim < 1.02 * least
assert refit > 1.5 * by_onnxsim and refit > 1.2 * best
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
