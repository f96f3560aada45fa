#!/usr/bin/env bash
# torch.onnx.export(dynamo=True) has no translation of x.amax() and x.amin() without axes: it asks for the
# operand that the operator gives a default.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import warnings

import torch

warnings.simplefilter("ignore")
CALLS = {
    "x.amax()": lambda x: x.amax(),
    "x.amin()": lambda x: x.amin(),
    "x.amax((0, 1))": lambda x: x.amax((0, 1)),
    "x.max()": lambda x: x.max(),
}


class Net(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return x / (self.call(x) + 1)


seen = {}
for name, call in CALLS.items():
    try:
        torch.onnx.export(Net(call).eval(), (torch.rand(3, 4),), dynamo=True, verbose=False)
        seen[name] = "exported"
    except Exception as error:
        seen[name] = type(error).__name__
    print(f"{name}: {seen[name]}")
assert seen["x.amax()"] == seen["x.amin()"] == "ConversionError", seen
assert seen["x.amax((0, 1))"] == seen["x.max()"] == "exported", seen
PYTHON
"$folder/env/bin/python" show.py 2> /dev/null
