#!/usr/bin/env bash
# timm: Lookahead takes step hooks without a word, and calls them only once its own zero_grad has been called.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet timm==1.0.31 torch==2.14.1 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import torch
from timm.optim import Lookahead

counted = []


def three_steps(name, optimizer, net, clear, cleared_by):
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    before = net.weight.detach().clone()
    for _ in range(3):
        clear()
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert not torch.equal(net.weight, before)
    counted.append(len(calls))
    print(f"{name}, gradients cleared by {cleared_by}: 3 steps, weights moved, hooks called {len(calls)} times")


net = torch.nn.Linear(4, 2)
adamw = torch.optim.AdamW(net.parameters(), lr=0.1)
three_steps("AdamW", adamw, net, net.zero_grad, "the network")
for by in ("the network", "the optimizer"):
    net = torch.nn.Linear(4, 2)
    lookahead = Lookahead(torch.optim.AdamW(net.parameters(), lr=0.1))
    assert isinstance(lookahead, torch.optim.Optimizer)
    clear = net.zero_grad if by == "the network" else lookahead.zero_grad
    three_steps("Lookahead", lookahead, net, clear, by)
assert counted == [3, 0, 3]
PYTHON
"$folder/env/bin/python" show.py
