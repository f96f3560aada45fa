"""Tokens per second of a decoder and its resized version in ONNX Runtime GenAI.

    python tools/bench_generation.py                     # Llama, 34 million parameters, float32
    python tools/bench_generation.py --precision int4 --budget body_params=75%

A decoder with random weights (its speed does not depend on them) is written by GenAI's model
builder, resized with `morphgraph plan` and `apply` as a folder, and both folders generate the same
number of tokens behind the same prompt, one thread, in turns. CPU time of the prompt and of the
tokens behind it are told apart. In float32 the greedy tokens of the resized folder are held against
the PyTorch class of the original, built with the new sizes and given the resized file's weights.

Needs onnxruntime-genai and transformers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import tokenizers
import torch
import transformers
from onnx import numpy_helper

from morphgraph.benchmark.statistics import paired_ratio
from morphgraph.cli import main as morphgraph

VOCABULARY = 8000
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass
class Times:
    """CPU seconds of every round, ``[rounds]``."""

    prompt: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="body_params=50%", help="for `morphgraph plan`")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int4"])
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default 256)")
    parser.add_argument("--tokens", type=int, default=64, help="behind it (default 64)")
    parser.add_argument("--rounds", type=int, default=10, help="of both models (default 10)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        large = _built(folder, options.precision)
        plan, small = folder / "plan.json", folder / "small"
        for command in (
            ["plan", large, "--budget", options.budget, "-o", plan],
            ["apply", large, plan, "-o", small],
        ):
            code = morphgraph([str(word) for word in command])
            if code:
                return code
        prompt = np.random.default_rng(0).integers(3, VOCABULARY, options.prompt).tolist()
        if options.precision == "fp32":
            _hold_against_torch(small, folder / "hf", prompt[:16])
        _compare(large, small, prompt, options.tokens, options.rounds)
    return 0


def _built(folder: Path, precision: str) -> Path:
    """The decoder as the model builder writes it, to run with one thread."""
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} million parameters")
    net.save_pretrained(folder / "hf")
    words = {f"w{k}": k for k in range(VOCABULARY)}
    special = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(
        folder / "hf"
    )
    large = folder / "large"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
    paths = ["-i", folder / "hf", "-o", large, "-c", folder / "cache", "-p", precision]
    subprocess.run([*builder, *map(str, paths)], check=True, capture_output=True)
    config = json.loads((large / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    (large / "genai_config.json").write_text(json.dumps(config))
    return large


def _generate(model: Any, prompt: list[int], count: int, times: Times | None = None) -> list[int]:
    """Greedy tokens, the prompt included."""
    parameters = og.GeneratorParams(model)
    length = len(prompt) + count
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    start = time.process_time()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    middle = time.process_time()
    for _ in range(count - 1):
        generator.generate_next_token()
    end = time.process_time()
    if times is not None:
        times.prompt.append(middle - start)
        times.decode.append(end - middle)
    return [int(token) for token in generator.get_sequence(0)]


def _compare(large: Path, small: Path, prompt: list[int], count: int, rounds: int) -> None:
    models = {name: og.Model(str(at)) for name, at in (("original", large), ("resized", small))}
    times = {name: Times() for name in models}
    for model in models.values():
        _generate(model, prompt, 4)
    for turn in range(rounds):
        for name in sorted(models, reverse=bool(turn % 2)):
            _generate(models[name], prompt, count, times[name])
    print("| tokens per second | original | resized | ratio (95 %) |\n|---|---:|---:|---:|")
    for part, tokens in (("prompt", len(prompt)), ("decode", count - 1)):
        base, other = (getattr(times[name], part) for name in ("original", "resized"))
        ratio = paired_ratio(base, other)
        speeds = [tokens / float(np.median(seconds)) for seconds in (base, other)]
        print(
            f"| {part} | {speeds[0]:.0f} | {speeds[1]:.0f} | {ratio.ratio:.2f} "
            f"({ratio.low:.2f} to {ratio.high:.2f}) |"
        )


def _hold_against_torch(small: Path, before: Path, prompt: list[int], count: int = 32) -> None:
    """Whether the folder's greedy tokens are those of the class with the file's weights."""
    net = _in_torch(small, before)
    with torch.no_grad():
        expected = net.generate(
            torch.tensor([prompt]), do_sample=False, min_new_tokens=count, max_new_tokens=count
        )
    found = _generate(og.Model(str(small)), prompt, count)
    words = "are" if found == expected[0].tolist() else "are NOT"
    print(f"{len(set(found[len(prompt) :]))} different greedy tokens {words} those of PyTorch")


def _in_torch(folder: Path, before: Path) -> Any:
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    stored = {w.name: w for w in onnx.load(folder / "model.onnx").graph.initializer}

    def weight(name: str) -> torch.Tensor:
        return torch.tensor(numpy_helper.to_array(stored[name]))

    config = transformers.LlamaConfig.from_pretrained(
        before,
        hidden_size=decoder["hidden_size"],
        head_dim=decoder["head_size"],
        num_attention_heads=decoder["num_attention_heads"],
        num_key_value_heads=decoder["num_key_value_heads"],
        intermediate_size=stored["model.layers.0.mlp.up_proj.MatMul.weight"].dims[1],
    )
    net = transformers.LlamaForCausalLM(config).eval()
    last = f"model.layers.{config.num_hidden_layers}.final_norm_layernorm.weight"
    state = {
        "model.embed_tokens.weight": weight("model.embed_tokens.weight"),
        "lm_head.weight": weight("lm_head.MatMul.weight").T,
        "model.norm.weight": weight(last),
    }
    heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    for k in range(config.num_hidden_layers):
        at = f"model.layers.{k}"
        packed = weight(f"{at}.attn.qkv_proj.MatMul.weight").T
        ends = np.cumsum([config.head_dim * n for n in (0, *heads)]).tolist()
        for name, begin, end in zip("qkv", ends[:-1], ends[1:]):
            state[f"{at}.self_attn.{name}_proj.weight"] = packed[begin:end]
        state[f"{at}.self_attn.o_proj.weight"] = weight(f"{at}.attn.o_proj.MatMul.weight").T
        for name in ("gate_proj", "up_proj", "down_proj"):
            state[f"{at}.mlp.{name}.weight"] = weight(f"{at}.mlp.{name}.MatMul.weight").T
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}.{name}.weight"] = weight(f"{at}.{name}.weight")
    net.load_state_dict(state)
    return net


if __name__ == "__main__":
    sys.exit(main())
