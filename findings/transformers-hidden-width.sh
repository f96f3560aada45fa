#!/usr/bin/env bash
# transformers' LlamaConfig takes a hidden width that the heads do not divide when it is assigned, and the
# network computes with it; to save or to load the same config is refused. Qwen3Config takes it always.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.23.0 torch==2.14.1
cd "$folder"
cat > show.py <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

SIZES = {"vocab_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


def refusal(act):
    try:
        act()
    except Exception as error:
        return str(error).strip().splitlines()[-1].strip()
    return ""


config = LlamaConfig(hidden_size=64, **SIZES, **HEADS)
config.hidden_size = 60
net = LlamaForCausalLM(config).eval()
logits = net(torch.tensor([[1, 2, 3]])).logits
print(f"Llama, hidden width 60 of 8 heads of 8: logits {tuple(logits.shape)}")
saved = refusal(lambda: net.save_pretrained("net"))
print(f"save_pretrained: {saved or 'saves it'}")
made = refusal(lambda: LlamaConfig(hidden_size=60, **SIZES, **HEADS))
print(f"LlamaConfig: {made or 'takes it'}")
other = refusal(lambda: Qwen3Config(hidden_size=60, **SIZES, **HEADS))
print(f"Qwen3Config: {other or 'takes it'}")
assert logits.shape == (1, 3, 32) and saved and made and not other
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
