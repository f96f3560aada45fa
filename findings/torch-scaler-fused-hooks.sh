#!/usr/bin/env bash
# torch: a GradScaler that skips a step for infinite gradients still calls the step hooks of a fused optimizer,
# which skips by itself; of one that is not fused it does not.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import torch

counted = {}
for fused in (False, True):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    hooks = []
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    scaler.scale(weight.sum()).backward()
    weight.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.detach(), torch.ones(4))
    counted[fused] = len(hooks)
    print(f"fused={fused}: weights unchanged, step hooks called: {len(hooks)}")
assert counted == {False: 0, True: 1}
PYTHON
"$folder/env/bin/python" show.py
