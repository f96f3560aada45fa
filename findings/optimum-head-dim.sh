#!/usr/bin/env bash
# optimum-onnx exports decoders whose config states a head_dim that is not the hidden width over the heads, and
# its ORTModelForCausalLM does not run them: it makes the first caches by that quotient. Gemma is an exception.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet optimum==2.1.0 optimum-onnx==0.1.0 transformers==4.57.6 \
    onnx==1.23.2 onnxruntime==1.32.0 torch==2.14.1
cd "$folder"
cat > show.py <<'PYTHON'
import contextlib
import io
import logging
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
import torch
import transformers
from optimum.exporters.onnx import onnx_export_from_model
from optimum.onnxruntime import ORTModelForCausalLM

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT = torch.tensor([[5, 9, 30, 7]])


def outcome(kind, head_dim):
    torch.manual_seed(0)
    architecture = getattr(transformers, f"{kind}ForCausalLM")
    config = architecture.config_class(**SIZES, **HEADS, head_dim=head_dim)
    net = architecture(config).eval()
    wanted = net.generate(PROMPT, **OPTIONS)
    with contextlib.redirect_stdout(io.StringIO()):
        onnx_export_from_model(net, output=f"{kind}-{head_dim}", task="text-generation-with-past")
    loaded = ORTModelForCausalLM.from_pretrained(f"{kind}-{head_dim}", config=config)
    try:
        found = loaded.generate(PROMPT, **OPTIONS)
    except Exception as error:
        return "refused: " + str(error).split("index: 3", 1)[-1].split("Please")[0].strip()
    return "as PyTorch" if torch.equal(found, wanted) else "other tokens"


seen = {
    (kind, head_dim): outcome(kind, head_dim)
    for kind in ("Llama", "Qwen3", "Mistral", "Gemma")
    for head_dim in (8, 16)
}
for (kind, head_dim), said in seen.items():
    print(f"{kind}, hidden width 32, 4 heads of {head_dim}: {said}")
for (kind, head_dim), said in seen.items():
    wanted = "as PyTorch" if head_dim == 8 or kind == "Gemma" else "refused: Got: 8 Expected: 16"
    assert said == wanted, (kind, head_dim)
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
