#!/usr/bin/env bash
# torch.onnx.export(dynamo=False) prints the whole network on standard output where it fails, with verbose=False
# and its log switched off.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import io
import sys
import warnings

import torch


class Net(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x)[0]


warnings.simplefilter("ignore")
print("torch", torch.__version__, file=sys.stderr)
print("its log is enabled:", torch._C._jit_is_onnx_log_enabled(), file=sys.stderr)
try:
    torch.onnx.export(Net(), (torch.eye(3),), io.BytesIO(), dynamo=False, verbose=False)
except Exception as error:
    print("raised", type(error).__name__, file=sys.stderr)
PYTHON
"$folder/env/bin/python" show.py > printed.txt
echo "lines on standard output: $(grep -c . printed.txt); the first: $(head -n 1 printed.txt | cut -c 1-40)"
grep -q "Torch IR graph at exception" printed.txt
