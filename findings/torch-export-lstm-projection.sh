#!/usr/bin/env bash
# torch.onnx.export leaves away the projection of an nn.LSTM with proj_size: no word at the export, and
# a model that onnx.checker accepts and that does not run.
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
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(5, 8, batch_first=True, proj_size=4)

    def forward(self, x):
        return self.lstm(x)[0]


net, x = Net().eval(), torch.randn(1, 6, 5)
program = torch.onnx.export(net, (x,), dynamo=True, optimize=False, verbose=False)
graph = program.model.graph
lost = sorted(set(dict(net.named_parameters())) - set(graph.initializers))
hidden = [n.attributes["hidden_size"].value for n in graph if n.op_type == "LSTM"]
print("parameters that are not in the model:", ", ".join(lost))
print(f"the network's result has {net(x).shape[-1]} features, the model's LSTM a hidden size of {hidden[0]}")
onnx.checker.check_model(program.model_proto)
options = ort.SessionOptions()
options.log_severity_level = 4
session = ort.InferenceSession(program.model_proto.SerializeToString(), options)
try:
    session.run(None, {graph.inputs[0].name: x.numpy()})
    refusal = ""
except Exception as error:
    refusal = str(error).split("Status Message: ")[-1]
print("onnx.checker accepts it; ONNX Runtime, when it runs:", refusal)
assert lost == ["lstm.weight_hr_l0"] and "initial_c" in refusal
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
