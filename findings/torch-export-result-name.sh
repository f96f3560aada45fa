#!/usr/bin/env bash
# torch.onnx.export(dynamo=True, optimize=False) names the result of x.mean() like a buffer called mean:
# the model has two definitions of one name, and nothing takes it.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import warnings

import onnx
import onnxruntime as ort
import torch

warnings.simplefilter("ignore")


class Net(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.register_buffer(name, torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))

    def forward(self, x):
        return (x - getattr(self, self.name)).mean((2, 3))


seen = {}
for name in ("offset", "mean"):
    program = torch.onnx.export(
        Net(name).eval(), (torch.ones(1, 3, 4, 4),), dynamo=True, optimize=False, verbose=False
    )
    graph = program.model_proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    twice = sorted(weights & {result for node in graph.node for result in node.output})
    try:
        onnx.checker.check_model(program.model_proto)
        checker = "accepts it"
    except onnx.checker.ValidationError as error:
        checker = "refuses it"
    try:
        ort.InferenceSession(program.model_proto.SerializeToString())
        runtime = "runs it"
    except Exception as error:
        runtime = str(error).split("Error: ")[-1]
    seen[name] = (twice, checker)
    print(f"buffer '{name}': names made twice {twice}; onnx.checker {checker}; ONNX Runtime: {runtime}")
assert seen == {"offset": ([], "accepts it"), "mean": (["mean"], "refuses it")}, seen
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
