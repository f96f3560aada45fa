"""Language models as other programs write them: small random ones, exported when they are needed.

ONNX Runtime GenAI's model builder runs in this environment; Optimum wants an older transformers,
and has one of its own in ``runs/zoo/optimum``, where ``make zoo`` puts it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from entry import ROOT, Entry, Feeds
from numpy.typing import NDArray
from others import FileEntry

OPTIMUM = ROOT / "runs" / "zoo" / "optimum" / "bin" / "python"
PINS = Path(__file__).with_name("optimum.txt")
VOCABULARY, TOKENS, PAST = 300, 5, 6
_LIMIT_S = 600
_BRANCH = "use_cache_branch"  # chooses between the two networks of a merged file

_Config = tuple[str, dict[str, Any]]

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,  # eight blocks, where kernels are in few bits
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_SHORT = {  # by GPT-2's names
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = {"query_pre_attn_scalar": 16, "sliding_window": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
#: By name: the class of the config in transformers, and its entries.
CONFIGS: dict[str, _Config] = {
    "llama": ("LlamaConfig", {**_COMMON, "head_dim": 16}),
    "qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_COMMON, "head_dim": 16, **_WINDOW}),
    "phi3": (
        "Phi3Config",
        {**_COMMON, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"original_max_position_embeddings": 128},
    ),
    "gptoss": (
        "GptOssConfig",
        {**_COMMON, "head_dim": 16, **_EXPERTS, "sliding_window": 16},
    ),
    "gemma": ("GemmaConfig", {**_COMMON, "head_dim": 16}),
    "phi": ("PhiConfig", _COMMON),
    "mixtral": ("MixtralConfig", {**_COMMON, **_EXPERTS}),
    "lfm2moe": (
        "Lfm2MoeConfig",
        {**_COMMON, "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}
        | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "qwen2_moe": (  # with experts that every token takes
        "Qwen2MoeConfig",
        {**_COMMON, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160}
        | {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_COMMON, "head_dim": 16, "moe_intermediate_size": 96}
        | {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": ("GPT2Config", {**_SHORT, "n_positions": 128}),
    "gptneox": ("GPTNeoXConfig", {**_COMMON, "rotary_pct": 0.5}),
    "bloom": (
        "BloomConfig",
        {k: v for k, v in _SHORT.items() if k != "n_embd"} | {"hidden_size": 64},
    ),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 640, "word_embed_proj_dim": 256}),
    "gptj": ("GPTJConfig", {**_SHORT, "n_positions": 128, "rotary_dim": 8}),
    "codegen": (
        "CodeGenConfig",
        {**_SHORT, "n_head": 8, "n_positions": 128, "rotary_dim": 4},
    ),
    "gptbigcode": ("GPTBigCodeConfig", {**_SHORT, "n_positions": 128}),
}

#: Makes a folder of Hugging Face; also run by Optimum's environment, which has no morphgraph.
_SAVE = """
import json, sys
import tokenizers, torch, transformers
kind, entries, folder = json.loads(sys.argv[1])
torch.manual_seed(0)
net = transformers.AutoModelForCausalLM.from_config(
    getattr(transformers, kind)(**entries), attn_implementation="eager"
).eval()
with torch.no_grad():
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.5 if "embed" in name else parameter.shape[-1] ** -0.5)
net.save_pretrained(folder)
words = {f"w{k}": k for k in range(entries["vocab_size"])}
plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
transformers.PreTrainedTokenizerFast(
    tokenizer_object=plain, bos_token="w1", eos_token="w2", pad_token="w0"
).save_pretrained(folder)
"""


@dataclass(frozen=True)
class DecoderEntry(FileEntry):
    """A file that another program writes of a small decoder with random weights.

    Its sizes stay open, so that `apply` checks it in two steps of generation. ``make`` is called
    with the path to write, the treatment and the config.
    """

    @property
    def pins(self) -> bytes:
        """The versions of Optimum and what it needs."""
        return PINS.read_bytes()

    def write(self, target: Path) -> Feeds:
        """Put the file there; its inputs."""
        feeds: Feeds = self.make(target, self.options["treatment"], self.options["config"])
        return feeds


def run_program(*command: str | Path) -> None:
    """Run a program; its last words are the error."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=_LIMIT_S
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no words"]
        raise RuntimeError(f"{command[2]}: {words[-1][:300]}")


def saved(python: str | Path, config: _Config, folder: Path) -> Path:
    run_program(python, "-c", _SAVE, json.dumps([*config, str(folder)]))
    return folder


def built(target: Path, treatment: str, config: _Config) -> Feeds:
    """Write what GenAI's model builder makes of a decoder: a precision and a kind of device."""
    precision, device = treatment.split()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        hf, made = saved(sys.executable, config, folder / "hf"), folder / "made"
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        paths: list[str | Path] = ["-i", hf, "-o", made, "-c", folder / "cache"]
        run_program(*builder, *paths, "-p", precision, "-e", device)
        onnx.save(onnx.load(made / "model.onnx"), target)
    return _feeds(target, config)


def exported(target: Path, treatment: str, config: _Config) -> Feeds:
    """Write what Optimum exports for a task."""
    task = {"no cache": "text-generation", "cache": "text-generation-with-past"}[treatment]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        hf, made = saved(OPTIMUM, config, folder / "hf"), folder / "made"
        optimum = (OPTIMUM, "-m", "optimum.exporters.onnx", "--model", hf, "--task", task)
        run_program(*optimum, "--no-post-process", made)
        onnx.save(onnx.load(made / "model.onnx"), target)
    return _feeds(target, config)


#: Run by Optimum's environment: the two networks of a decoder, and both in one file.
_MERGE = """
import json, sys
from pathlib import Path
import transformers
from optimum.exporters.onnx import export
from optimum.exporters.tasks import TasksManager
from optimum.onnx import merge_decoders
source, target = map(Path, json.loads(sys.argv[1]))
net = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
constructor = TasksManager.get_exporter_config_constructor(
    "onnx", model=net, task="text-generation-with-past", library_name="transformers"
)
files = {past: source / f"{past}.onnx" for past in (False, True)}
for past, path in files.items():
    export(net, constructor(net.config, use_past=True, use_past_in_inputs=past), path)
merge_decoders(files[False], files[True], save_path=target)
"""


def merged(target: Path, _treatment: str, config: _Config) -> Feeds:
    """Write what Optimum's `merge_decoders` makes of a decoder without and with its cache."""
    with tempfile.TemporaryDirectory() as place:
        hf = saved(OPTIMUM, config, Path(place) / "hf")
        run_program(OPTIMUM, "-c", _MERGE, json.dumps([str(hf), str(target)]))
    return {**_feeds(target, config), _BRANCH: np.array([True])}


def _feeds(path: Path, config: _Config) -> Feeds:
    """One sequence of a few tokens; behind others, where the file has a cache."""
    entries = config[1]
    heads = entries.get("num_attention_heads") or entries["n_head"]
    size = entries.get("head_dim") or (entries.get("hidden_size") or entries["n_embd"]) // heads
    inputs = list(onnx.load(path, load_external_data=False).graph.input)
    names = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in inputs}
    rings = {name for name, axes in names.items() if any("sliding" in axis for axis in axes)}
    # Caches that hold a window are always whole; places that no token has filled hold anything.
    past = PAST if any(name.startswith("past") for name in names) and not rings else 0
    tokens = entries["sliding_window"] if rings else TOKENS
    generator = np.random.default_rng(0)
    feeds: Feeds = {}
    for value in inputs:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if value.name == "input_ids":
            array: NDArray[Any] = generator.integers(3, VOCABULARY, (1, tokens))
        elif value.name == "attention_mask":
            array = np.ones((1, past + tokens))
        elif value.name == "position_ids":
            array = np.arange(past, past + tokens)[None]
        elif value.name == _BRANCH:
            continue
        else:  # [batch, heads, past, head size], or a state of a convolution, whose sizes are known
            held = entries["sliding_window"] if value.name in rings else past
            open_sizes = (1, 0, held, size)
            sizes = zip(kind.shape.dim, open_sizes, strict=False)
            array = generator.standard_normal([dim.dim_value or other for dim, other in sizes])
        feeds[value.name] = np.asarray(array, dtype)
    return feeds


#: Those that a machine without Optimum builds: plain, and with experts; in all precisions.
_SMALL = ("genai/llama", "genai/gptoss", "genai/lfm2moe")


def _entries(
    program: str,
    make: Callable[..., Feeds],
    treatments: Mapping[str, tuple[str, ...]],
    fixed: tuple[str, ...] = (),
) -> list[Entry]:
    return [
        DecoderEntry(
            f"decoders/{program}/{name}+{treatment.replace(' ', '-')}",
            "transformer",
            make,
            {"source": f"{program}/{name}", "treatment": treatment, "config": CONFIGS[name]},
            small=f"{program}/{name}" in _SMALL,
            fixed=fixed,
        )
        for name, ways in treatments.items()
        for treatment in ways
    ]


_ALL = ("fp32 cpu", "fp16 cuda", "int4 cpu")
#: What ONNX Runtime has no kernels for on a CPU are left out, and so is what the builder
#: does not build: GPT-2, Mixtral, and few bits for those of gpt-oss that were not published so.
BUILT = {
    "llama": _ALL,
    "qwen3": ("fp32 cpu", "int4 cpu"),
    "gemma2": ("fp32 cpu", "int4 cpu"),
    "phi3": _ALL,
    "gptoss": ("fp32 cpu", "fp16 cuda"),
    "lfm2moe": ("fp32 cpu", "int4 cpu"),
}
EXPORTED = dict.fromkeys(("gpt2", "llama", "qwen3"), ("no cache", "cache")) | dict.fromkeys(
    ("gptneox", "gemma", "bloom", "opt", "gptj", "codegen", "gptbigcode"), ("cache",)
)
MERGED = dict.fromkeys(("gpt2", "llama"), ("merged",))

DECODERS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *_entries("genai", built, BUILT),
        *_entries("optimum", exported, EXPORTED),
        *_entries("optimum", merged, MERGED, fixed=(_BRANCH,)),
    )
}
