"""A folder of ONNX Runtime GenAI's model builder is resized, and generates there."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

import morphgraph as mg
from morphgraph.cli import main

og: Any = pytest.importorskip("onnxruntime_genai")
transformers: Any = pytest.importorskip("transformers")
tokenizers: Any = pytest.importorskip("tokenizers")

PROMPT = [5, 17, 40, 8]
TOKENS, EOS = 16, 2


def built(folder: Path, **sizes: int) -> Path:
    """A small Llama with random weights, as the builder writes it."""
    torch.manual_seed(0)
    chosen = {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16} | sizes
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_attention_heads=8,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
        tie_word_embeddings=False, **chosen,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    net.save_pretrained(folder / "hf")
    words = {f"w{k}": k for k in range(96)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(folder / "hf")
    where = ["-i", str(folder / "hf"), "-o", str(folder / "large"), "-c", str(folder / "cache")]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run([*builder, *where, "-p", "fp32", "-e", "cpu"], check=True, capture_output=True)
    return folder / "large"


def in_torch(folder: Path, before: Path) -> Any:
    """The class of the original with the sizes and the weights of a resized folder."""
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    stored = {w.name: w for w in onnx.load(folder / "model.onnx").graph.initializer}

    def weight(name: str) -> torch.Tensor:
        return torch.tensor(numpy_helper.to_array(stored[name]))

    inner = stored["model.layers.0.mlp.up_proj.MatMul.weight"].dims[1]
    config = transformers.LlamaConfig.from_pretrained(
        before, hidden_size=decoder["hidden_size"], head_dim=decoder["head_size"],
        num_attention_heads=decoder["num_attention_heads"], intermediate_size=inner,
        num_key_value_heads=decoder["num_key_value_heads"],
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).eval()
    state = {"model.embed_tokens.weight": weight("model.embed_tokens.weight")}
    state["lm_head.weight"] = weight("lm_head.MatMul.weight").T
    state["model.norm.weight"] = weight(
        f"model.layers.{config.num_hidden_layers}.final_norm_layernorm.weight"
    )
    rows = [
        config.head_dim * n for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    ]
    for k in range(config.num_hidden_layers):
        at = f"model.layers.{k}"
        packed = weight(f"{at}.attn.qkv_proj.MatMul.weight").T.split(rows)
        for name, part in zip("qkv", packed, strict=True):
            state[f"{at}.self_attn.{name}_proj.weight"] = part
        state[f"{at}.self_attn.o_proj.weight"] = weight(f"{at}.attn.o_proj.MatMul.weight").T
        for name in ("gate_proj", "up_proj", "down_proj"):
            state[f"{at}.mlp.{name}.weight"] = weight(f"{at}.mlp.{name}.MatMul.weight").T
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}.{name}.weight"] = weight(f"{at}.{name}.weight")
    net.load_state_dict(state)
    return net


def generated(folder: Path, prompt: Sequence[int] = PROMPT) -> list[int]:
    """What GenAI generates greedily, the prompt included."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    length = len(PROMPT) + TOKENS
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(list(prompt))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.long
@pytest.mark.parametrize("wish", [["--budget", "params=60%"], ["--set", "*gate_proj*=96"]])
def test_a_resized_folder_generates_as_its_pytorch_form(wish: list[str], tmp_path: Path) -> None:
    large, plan, small = built(tmp_path), tmp_path / "plan.json", tmp_path / "small"
    assert main(["plan", str(large), *wish, "-o", str(plan)]) == 0
    assert main(["apply", str(large), str(plan), "-o", str(small)]) == 0
    net = in_torch(small, tmp_path / "hf")
    with torch.no_grad():
        expected = net.generate(
            torch.tensor([PROMPT]), do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS
        )
    tokens = generated(small)
    assert tokens == expected[0].tolist()
    assert len(set(tokens)) > 4
    assert tokens != generated(large)
    assert sorted(p.name for p in small.iterdir()) == sorted(p.name for p in large.iterdir())


def greedy(folder: Path, decoder: dict[str, Any], among: Sequence[int] | None = None) -> list[int]:
    """The same by ONNX Runtime alone, which is given all tokens anew for every next one."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    size = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    past = {
        decoder["inputs"][f"past_{kind}_names"].replace("%d", str(k)): np.zeros(size, np.float32)
        for k in range(decoder["num_hidden_layers"])
        for kind in ("key", "value")
    }
    tokens = list(PROMPT)
    for _ in range(TOKENS):
        mask = np.ones((1, len(tokens)), np.int64)
        feeds = {"input_ids": np.array([tokens]), "attention_mask": mask, **past}
        (logits,) = session.run(["logits"], feeds)
        logits[..., EOS] = -np.inf  # not before as many tokens as are asked for
        allowed = np.arange(logits.shape[-1]) if among is None else np.array(among)
        tokens.append(int(allowed[logits[0, -1][allowed].argmax()]))
    return tokens


WISHES = {
    "query heads": (["--attention", "query-heads"], {"num_attention_heads": 4}),
    "head size": (["--attention", "head-dim"], {"head_size": 16}),
    "a block": ([], {"num_hidden_layers": 2}),
}


@pytest.mark.long
@pytest.mark.parametrize("wish", WISHES)
def test_attentions_and_blocks_shrink_in_a_folder(wish: str, tmp_path: Path) -> None:
    large = built(tmp_path, num_hidden_layers=3, num_key_value_heads=2, head_dim=32)
    plan, small, (options, sizes) = tmp_path / "plan.json", tmp_path / "small", WISHES[wish]
    attention = options[1] if options else "heads"
    graph = mg.lift(large / "model.onnx", attention=attention)  # type: ignore[arg-type]
    if wish == "a block":
        dead = [g.id for g in graph.groups if any("layers.1." in n for n in g.producers[:1])]
        dead = [k for k in dead if graph.group(k).width in (2, 160)]
        chosen = [*(f"--set={k}=0" for k in dead), "--unequal"]
    else:
        width = {"query heads": 4, "head size": 16}[wish]
        ids = [g.id for g in graph.groups if g.resizable and g.width == width]
        chosen = [f"--set={k}={width // 2}" for k in ids]
    assert chosen
    assert main(["plan", str(large), *options, *chosen, "-o", str(plan)]) == 0
    assert main(["apply", str(large), str(plan), "-o", str(small)]) == 0
    decoder = json.loads((small / "genai_config.json").read_text())["model"]["decoder"]
    assert {name: decoder[name] for name in sizes} == sizes
    tokens = generated(small)
    assert tokens == greedy(small, decoder)
    assert tokens != generated(large)


SPECIAL = {"bos": 1, "eos": 2, "pad": 0}


@pytest.mark.long
@pytest.mark.parametrize("gone", [(), ("pad",), ("eos", "bos", "pad")], ids=str)
def test_a_smaller_vocabulary_generates_what_the_whole_one_would(
    gone: tuple[str, ...], tmp_path: Path
) -> None:
    """Greedily among the tokens that stay; special ones that have gone are nobody's id."""
    large, plan, small = built(tmp_path), tmp_path / "plan.json", tmp_path / "small"
    kept = sorted({*range(3, 96, 2), *PROMPT, *SPECIAL.values()} - {SPECIAL[name] for name in gone})
    (tmp_path / "kept.txt").write_text("\n".join(map(str, kept)))
    wish = ["--vocabulary", str(tmp_path / "kept.txt"), "-o", str(plan)]
    assert main(["plan", str(large), *wish]) == 0
    assert main(["apply", str(large), str(plan), "-o", str(small)]) == 0
    ids = {old: new for new, old in enumerate(kept)}
    said = json.loads((small / "genai_config.json").read_text())["model"]
    assert said["vocab_size"] == len(kept)
    for name, old in SPECIAL.items():
        assert (f"{name}_token_id" in said) == (name not in gone)
        assert name in gone or said[f"{name}_token_id"] == ids[old]
    tokens = greedy(large, said["decoder"], [old for old in kept if old != EOS])
    found = generated(small, [ids[old] for old in PROMPT])
    assert [kept[new] for new in found] == tokens
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    assert len(tokenizer) == len(kept)
    assert max(tokenizer.get_vocab().values()) < len(kept)
    for name in SPECIAL:
        assert (getattr(tokenizer, f"{name}_token") is None) == (name in gone)
