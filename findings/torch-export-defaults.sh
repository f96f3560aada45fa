#!/usr/bin/env bash
# torch.onnx.export(dynamo=True) optimizes by default: parameters lose their names, equal ones are tied.
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
torch.manual_seed(0)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.first = torch.nn.LayerNorm(8)
        self.second = torch.nn.LayerNorm(8)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.second(torch.sigmoid(self.first(y)))


net, example = Net().eval(), torch.randn(1, 3, 8, 8)
parameters = [name for name, _ in net.named_parameters()]
found = {}
for optimize in (None, False):
    options = {} if optimize is None else {"optimize": optimize}
    program = torch.onnx.export(net, (example,), dynamo=True, verbose=False, **options)
    graph = program.model.graph
    kept = [name for name in parameters if name in graph.initializers]
    ops = [node.op_type for node in graph]
    scales = [node.inputs[1].name for node in graph if node.op_type == "LayerNormalization"]
    found[optimize] = (kept, "BatchNormalization" in ops, scales)
    print("default:" if optimize is None else "optimize=False:")
    print(f"  parameters under their names: {len(kept)} of {len(parameters)}")
    print(f"  lost: {', '.join(name for name in parameters if name not in kept) or 'none'}")
    print(f"  BatchNormalization is a node: {'BatchNormalization' in ops}")
    print(f"  scales of the two LayerNormalization nodes: {', '.join(scales)}")

kept, norm, scales = found[None]
assert len(kept) < len(parameters) and not norm, "the default keeps BatchNormalization now"
assert scales[0] == scales[1], "equal initializers are kept apart now"
kept, norm, scales = found[False]
assert kept == parameters and norm and scales == ["first.weight", "second.weight"]
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
