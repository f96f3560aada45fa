#!/usr/bin/env bash
# merge_decoders of optimum-onnx names the size of attention_mask in the merged file after the branch without a cache:
# as long as the new tokens. The branch with the cache wants the past and the new ones, as its own file says.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet optimum==2.1.0 optimum-onnx==0.1.0 transformers==4.57.6 \
    onnx==1.23.2 onnxruntime==1.32.0 torch==2.14.1
cd "$folder"
cat > show.py <<'PYTHON'
import logging
import warnings
from importlib.metadata import version
from pathlib import Path

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from optimum.exporters.onnx import export
from optimum.exporters.tasks import TasksManager
from optimum.onnx import merge_decoders

PAST, NEW = 3, 1
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
NETS = {
    "GPT-2": transformers.GPT2Config(vocab_size=40, n_embd=32, n_head=4, n_layer=1, n_positions=64),
    "Llama": transformers.LlamaConfig(vocab_size=40, max_position_embeddings=64, **LLAMA),
}


def declared(path):
    (mask,) = [value for value in onnx.load(path).graph.input if value.name == "attention_mask"]
    return [size.dim_param for size in mask.type.tensor_type.shape.dim]


def outcome(session, length):
    feeds = {"use_cache_branch": np.array([True])}
    for value in session.get_inputs():
        if "past_key_values" in value.name:
            feeds[value.name] = np.zeros((1, value.shape[1], PAST, value.shape[3]), np.float32)
    feeds["input_ids"] = np.ones((1, NEW), np.int64)
    feeds["position_ids"] = np.full((1, NEW), PAST)
    feeds["attention_mask"] = np.ones((1, length), np.int64)
    try:
        session.run(None, feeds)
    except InvalidArgument as error:
        return "refused: " + str(error).split("Status Message: ")[-1].strip()
    return "runs"


print("optimum", version("optimum"), "optimum-onnx", version("optimum-onnx"))
ort.set_default_logger_severity(4)
for name, config in NETS.items():
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model=net, task="text-generation-with-past", library_name="transformers"
    )
    files = {past: Path(f"{name}-{past}.onnx") for past in (False, True)}
    for past, path in files.items():
        export(net, constructor(net.config, use_past=True, use_past_in_inputs=past), path)
        onnx.checker.check_model(path, full_check=True)
    merged = Path(f"{name}-merged.onnx")
    merge_decoders(files[False], files[True], save_path=merged)
    seen = [declared(path) for path in (files[False], files[True], merged)]
    for words, sizes in zip(("without a cache", "with the cache", "merged"), seen, strict=True):
        print(f"{name}, {words}: attention_mask {sizes}")
    session = ort.InferenceSession(merged)
    runs = [outcome(session, length) for length in (NEW, PAST + NEW)]
    print(f"  after {PAST} tokens and {NEW} new, a mask of {NEW}: {runs[0]}")
    print(f"  after {PAST} tokens and {NEW} new, a mask of {PAST + NEW}: {runs[1]}")
    assert seen[2] == seen[0] == ["batch_size", "sequence_length"], seen
    assert seen[1] == ["batch_size", "past_sequence_length + sequence_length"], seen
    assert runs[0].startswith("refused") and runs[1] == "runs", runs
PYTHON
env/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
