"""Folders that Optimum exports, resized by the command line, and loaded by Optimum again.

    make zoo                                    # or: the environment in runs/zoo/optimum alone
    python tools/zoo/check_optimum.py               # all decoders of decoders.py
    python tools/zoo/check_optimum.py gpt2 bloom --budget params=60%

Every decoder (small, random weights) is exported with its cache, and its folder goes through
`morphgraph plan` and `morphgraph apply` with their defaults. Then the resized folder has to load:
its config in transformers, the class of that config, and ORTModelForCausalLM, which generates. The
greedy tokens that come out are held against those of the masked original, which a loop of this file
runs in ONNX Runtime through its caches of the old sizes. Neither is a part of `apply`'s own check.
Ends with 1 if one differs, or does not load though Optimum runs what it exported.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from decoders import CONFIGS, EXPORTED, OPTIMUM, run_program, saved

import morphgraph as mg
from morphgraph.cli import main as morphgraph
from morphgraph.passes.rewrite.mask import mask

PROMPTS = [[5, 9, 30, 7], [11, 4], [50, 60, 3, 8, 90]]
STEPS = 8
UNLOADED = "Optimum does not run its own export"

#: Run by Optimum's environment, which has no morphgraph: tokens by prompt, as JSON.
_GENERATE = """
import json, sys
import torch, transformers
from optimum.onnxruntime import ORTModelForCausalLM
folder, prompts, steps = json.loads(sys.argv[1])
config = transformers.AutoConfig.from_pretrained(folder)
with torch.device("meta"):
    getattr(transformers, config.architectures[0])(config)
net = ORTModelForCausalLM.from_pretrained(folder)
found = []
for prompt in prompts:
    tokens, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
    made = net.generate(
        tokens, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )
    found.append(made[0, len(prompt):].tolist())
print(json.dumps(found))
"""


def generated(folder: Path) -> list[list[int]]:
    """What the folder generates, loaded by Optimum."""
    arguments = json.dumps([str(folder), PROMPTS, STEPS])
    done = subprocess.run([OPTIMUM, "-c", _GENERATE, arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no words"])[-1][:200])
    found: list[list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def greedy(model: Path, prompt: list[int]) -> list[int]:
    """The likeliest token again and again, each behind the caches of those before."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    inputs = {value.name: value.shape for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    caches: dict[str, Any] = {
        name: np.zeros([d if isinstance(d, int) else int(not k) for k, d in enumerate(shape)], "f")
        for name, shape in inputs.items()
        if name.startswith("past")
    }
    new, length, found = prompt, 0, []
    for _ in range(STEPS):
        positions = np.arange(length, length + len(new))[None]
        length += len(new)
        feeds: dict[str, Any] = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": positions,
        }
        feeds = {name: array for name, array in feeds.items() if name in inputs} | caches
        results = dict(zip(names, session.run(None, feeds), strict=True))
        caches = {name: results[name.replace("past_key_values", "present", 1)] for name in caches}
        new = [int(results["logits"][0, -1].argmax())]
        found += new
    return found


def check(name: str, budget: str, place: Path) -> tuple[str, str]:
    """What the config says otherwise, and how the check ended."""
    hf = saved(OPTIMUM, CONFIGS[name], place / "hf")
    whole, small, plan = place / "whole", place / "small", place / "plan.json"
    task = ("--task", "text-generation-with-past", "--no-post-process")
    run_program(OPTIMUM, "-m", "optimum.exporters.onnx", "--model", hf, *task, whole)
    for arguments in (
        ["plan", str(whole), "--budget", budget, "-o", str(plan)],
        ["apply", str(whole), str(plan), "-o", str(small)],
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            code = morphgraph([*arguments, "--quiet"])
        if code:
            return "", f"`{arguments[0]}` ends with {code}"
    graph = mg.lift(whole / "model.onnx")
    keep = mg.Plan.load(plan).keep_channels(graph)
    mg.save(mask(graph, keep), place / "masked.onnx")
    before, after = (json.loads((f / "config.json").read_text()) for f in (whole, small))
    changed = ", ".join(
        f"{key} {before.get(key)} -> {size}"
        for key, size in after.items()
        if before.get(key) != size
    )
    try:
        found = generated(small)
    except RuntimeError as error:
        try:
            generated(whole)
        except RuntimeError:
            return changed, UNLOADED
        return changed, f"does not load: {error}"
    expected = [greedy(place / "masked.onnx", prompt) for prompt in PROMPTS]
    return changed, "right" if found == expected else f"generates {found}, not {expected}"


def main() -> int:
    """Print a row per decoder."""
    names = [name for name, ways in EXPORTED.items() if "cache" in ways]
    parser = argparse.ArgumentParser(description="Resized exports of Optimum, loaded by it again.")
    parser.add_argument("names", nargs="*", default=names)
    parser.add_argument("--budget", default="params=75%")
    arguments = parser.parse_args()
    failed = 0
    print("| decoder | config | result |\n|---|---|---|")
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as place:
            changed, result = check(name, arguments.budget, Path(place))
        failed += result not in ("right", UNLOADED)
        print(f"| {name} | {changed} | {result} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
