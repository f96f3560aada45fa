#!/usr/bin/env bash
# timm: Lookahead, a torch.optim.Optimizer, takes step hooks without a word and never calls them.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet timm==1.0.31 torch==2.14.1 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import torch
from timm.optim import Lookahead, create_optimizer_v2

counted = {}
for name in ("adamw", "lookahead_adamw"):
    net = torch.nn.Linear(4, 2)
    before = net.weight.detach().clone()
    optimizer = create_optimizer_v2(net, opt=name, lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, Lookahead) == (name != "adamw")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert not torch.equal(net.weight, before)
    counted[name] = len(calls)
    print(f"{name}: {type(optimizer).__name__}, 3 steps, weights moved, hooks called {len(calls)} times")
assert counted == {"adamw": 6, "lookahead_adamw": 0}
PYTHON
"$folder/env/bin/python" show.py
