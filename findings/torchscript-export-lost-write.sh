#!/usr/bin/env bash
# torch.onnx.export(dynamo=False) drops a write into a diagonal, and says nothing; dynamo=True refuses it.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import io
import warnings

import onnx
import onnxruntime as ort
import torch


class Net(torch.nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, x):
        y = 2 * x
        self.write(y)
        return y


def column(y):
    y[:, 0].add_(1)


def diagonal(y):
    y.diagonal().add_(1)


x = torch.zeros(2, 2)
lost = {}
for write in (column, diagonal):
    net, file = Net(write).eval(), io.BytesIO()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.onnx.export(net, (x,), file, dynamo=False, input_names=["x"])
    spoken = [w for w in told if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()), full_check=True)
    session = ort.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    found, wanted = session.run(None, {"x": x.numpy()})[0], net(x).numpy()
    try:
        torch.onnx.export(net, (x,), dynamo=True, verbose=False)
        newer = "exports it"
    except Exception as error:
        newer = f"raises {type(error).__name__}"
    lost[write.__name__] = (found != wanted).any()
    print(f"{write.__name__}: PyTorch {wanted.tolist()}, the file {found.tolist()}")
    print(f"  warnings beside those of deprecation: {len(spoken)}; the newer exporter {newer}")
assert not lost["column"], "a write into a column is lost now"
assert lost["diagonal"], "a write into a diagonal is kept now"
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
