"""Folders that Optimum exports, resized by the command line, and loaded by Optimum again.

    make zoo                                    # or: the environment in runs/zoo/optimum alone
    python tools/zoo/check_optimum.py               # all decoders of decoders.py
    python tools/zoo/check_optimum.py gpt2 bloom --budget params=60%
    python tools/zoo/check_optimum.py t5 bart whisper merged/t5     # networks of several files
    python tools/zoo/check_optimum.py ratio/llama                   # one share for all widths

Every decoder (small, random weights) is exported with its cache, and its folder goes through
`morphgraph plan` and `morphgraph apply` with their defaults. Then the resized folder has to load:
its config in transformers, the class of that config, and ORTModelForCausalLM, which generates. The
greedy tokens that come out are held against those of the masked original, which a loop of this file
runs in ONNX Runtime through its caches of the old sizes. Neither is a part of `apply`'s own check.
Networks of an encoder and a decoder are exported to several files, which are resized as one; there
the loop runs the encoder, the first step and those with a cache, each in a file of the masked
original.
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
from morphgraph.folders.parts import load_place
from morphgraph.passes.canonical.split_files import files_of
from morphgraph.passes.rewrite.mask import mask

PROMPTS = [[5, 9, 30, 7], [11, 4], [50, 60, 3, 8, 90]]
STEPS = 8
UNLOADED = "Optimum does not run its own export"

_TWO_SIDES = {
    "vocab_size": 96,
    "d_model": 32,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "eos_token_id": 0,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 64,
}
_T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_TEXT, _SPEECH = "text2text-generation-with-past", "automatic-speech-recognition-with-past"
#: By name: the class of the network, its config, and the task of an export.
SIDED: dict[str, tuple[str, dict[str, Any], str]] = {
    "t5": ("T5ForConditionalGeneration", _T5, _TEXT),
    "gated-t5": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _TEXT,
    ),
    "bart": (
        "BartForConditionalGeneration",
        {**_TWO_SIDES, "max_position_embeddings": 64, "forced_eos_token_id": None},
        _TEXT,
    ),
    "marian": ("MarianMTModel", {**_TWO_SIDES, "max_position_embeddings": 64}, _TEXT),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_TWO_SIDES, "max_target_positions": 40, "bos_token_id": 2}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        _SPEECH,
    ),
}
MERGED = "merged/"  # before the name: both steps of the decoder in one file
#: Before the name: heads as wide as the hidden width by their number, and all widths by one share.
RATIO = "ratio/"

#: Run by Optimum's environment: a folder of Hugging Face with weights that are no zeros and ones.
_SAVE_SIDED = """
import json, sys
import torch, transformers
kind, entries, folder = json.loads(sys.argv[1])
torch.manual_seed(0)
net = getattr(transformers, kind)
net = net(net.config_class(**entries)).eval()
with torch.no_grad():
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.2 * torch.randn(parameter.shape))
net.generation_config.decoder_start_token_id = entries["decoder_start_token_id"]
net.save_pretrained(folder)
if "Whisper" in kind:
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
"""

#: The same: tokens by prompt, each behind the one that starts a decoder.
_GENERATE_SIDED = """
import json, sys
import numpy, torch, transformers
from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq
folder, prompts, steps, merged = json.loads(sys.argv[1])
config = transformers.AutoConfig.from_pretrained(folder)
with torch.device("meta"):
    getattr(transformers, config.architectures[0])(config)
hears = config.model_type == "whisper"
net = (ORTModelForSpeechSeq2Seq if hears else ORTModelForSeq2SeqLM).from_pretrained(
    folder, use_merged=merged
)
found = []
for prompt in prompts:
    heard = numpy.random.default_rng(prompt).standard_normal((1, 80, 3000)).astype("f")
    given = {"input_features": torch.from_numpy(heard)}
    if not hears:
        given = {"input_ids": torch.tensor([prompt])}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    net.generation_config.eos_token_id = None
    net.generation_config.forced_eos_token_id = None
    made = net.generate(
        **given, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, num_beams=1,
        pad_token_id=0,
    )
    found.append(made[0].tolist()[-steps:])
print(json.dumps(found))
"""

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


def generated(folder: Path, name: str) -> list[list[int]]:
    """What the folder generates, loaded by Optimum."""
    given = [str(folder), PROMPTS, STEPS]
    if name.removeprefix(MERGED) in SIDED:
        script, given = _GENERATE_SIDED, [*given, name.startswith(MERGED)]
    else:
        script = _GENERATE
    done = subprocess.run(
        [OPTIMUM, "-c", script, json.dumps(given)], capture_output=True, text=True
    )
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


def translated(files: dict[str, ort.InferenceSession], prompt: list[int], start: int) -> list[int]:
    """The same of an encoder and a decoder in several files: every step in its own."""
    heard = np.random.default_rng(prompt).standard_normal((1, 80, 3000)).astype("f")
    given: dict[str, Any] = {
        "input_ids": np.array([prompt]),
        "attention_mask": np.ones((1, len(prompt)), np.int64),
        "input_features": heard,
    }
    encoder = _run(files["encoder_model"], given)
    given = {
        "encoder_hidden_states": encoder["last_hidden_state"],
        "encoder_attention_mask": given["attention_mask"],
    }
    found = [start]
    for step in range(STEPS):
        given["input_ids"] = np.array([found[-1:]])
        if "decoder_model_merged" in files:
            session = files["decoder_model_merged"]
            given["use_cache_branch"] = np.array([step > 0])
            for value in session.get_inputs():
                if value.name.startswith("past") and not step:
                    sizes = [1, value.shape[1], 0, value.shape[3]]
                    given[value.name] = np.zeros(sizes, "f")
        else:
            session = files["decoder_with_past_model" if step else "decoder_model"]
        results = _run(session, given)
        found.append(int(results.pop("logits")[0, -1].argmax()))
        given |= {  # after the first step what the decoder sees of the encoder stays
            name.replace("present", "past_key_values", 1): array
            for name, array in results.items()
            if not step or ".encoder." not in name
        }
    return found[1:]


def _run(session: ort.InferenceSession, given: dict[str, Any]) -> dict[str, Any]:
    feeds = {v.name: given[v.name] for v in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def exported(name: str, place: Path) -> Path:
    """The folder that Optimum writes of a network."""
    whole, own = place / "whole", name.removeprefix(MERGED)
    if own not in SIDED:
        kind, entries = CONFIGS[name.removeprefix(RATIO)]
        if name.startswith(RATIO):
            size = entries["hidden_size"] // entries["num_attention_heads"]
            entries = {**entries, "head_dim": size}
        hf = saved(OPTIMUM, (kind, entries), place / "hf")
        task = ("--task", "text-generation-with-past", "--no-post-process")
        run_program(OPTIMUM, "-m", "optimum.exporters.onnx", "--model", hf, *task, whole)
        return whole
    kind, entries, task_name = SIDED[own]
    arguments = json.dumps([kind, entries, str(place / "hf")])
    run_program(OPTIMUM, "-c", _SAVE_SIDED, arguments)
    more = () if name.startswith(MERGED) else ("--no-post-process",)
    command = ("-m", "optimum.exporters.onnx", "--model", place / "hf", "--task", task_name)
    run_program(OPTIMUM, *command, *more, whole)
    if name.startswith(MERGED):
        for file in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
            (whole / file).unlink(missing_ok=True)
    return whole


def expected_tokens(name: str, whole: Path, plan: mg.Plan, place: Path) -> list[list[int]]:
    """What the masked original generates."""
    if name.removeprefix(MERGED) not in SIDED:
        graph = mg.lift(whole / "model.onnx")
        mg.save(mask(graph, plan.keep_channels(graph)), place / "masked.onnx")
        return [greedy(place / "masked.onnx", prompt) for prompt in PROMPTS]
    graph = mg.lift(load_place(whole))
    files = {}
    for file, model in files_of(mask(graph, plan.keep_channels(graph))).items():
        mg.save(model, place / f"masked_{file}.onnx")
        files[file] = ort.InferenceSession(
            str(place / f"masked_{file}.onnx"), providers=["CPUExecutionProvider"]
        )
    start = SIDED[name.removeprefix(MERGED)][1]["decoder_start_token_id"]
    return [translated(files, prompt, start) for prompt in PROMPTS]


def check(name: str, budget: str, place: Path) -> tuple[str, str]:
    """What the config says otherwise, and how the check ended."""
    whole, small, plan = exported(name, place), place / "small", place / "plan.json"
    # Optimum takes the hidden width by the heads for a head's size where it makes empty caches.
    by_ratio = name.startswith((MERGED, RATIO))
    widths = ["--set", "*=75%"] if by_ratio else ["--budget", budget]
    for arguments in (
        ["plan", str(whole), *widths, "-o", str(plan)],
        ["apply", str(whole), str(plan), "-o", str(small)],
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            code = morphgraph([*arguments, "--quiet"])
        if code:
            return "", f"`{arguments[0]}` ends with {code}"
    before, after = (json.loads((f / "config.json").read_text()) for f in (whole, small))
    changed = ", ".join(
        f"{key} {before.get(key)} -> {size}"
        for key, size in after.items()
        if before.get(key) != size
    )
    try:
        found = generated(small, name)
    except RuntimeError as error:
        try:
            generated(whole, name)
        except RuntimeError:
            return changed, UNLOADED
        return changed, f"does not load: {error}"
    expected = expected_tokens(name, whole, mg.Plan.load(plan), place)
    return changed, "right" if found == expected else f"generates {found}, not {expected}"


def main() -> int:
    """Print a row per decoder."""
    names = [name for name, ways in EXPORTED.items() if "cache" in ways]
    names += [*SIDED, *(f"{MERGED}{name}" for name in SIDED)]
    names += [f"{RATIO}{name}" for name in ("llama", "qwen3")]
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
