"""Folders of language models: the model in them, their configs, and folders that are written."""

import json
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.cli import main
from morphgraph.errors import FileError, ModelError
from morphgraph.folders import check_folder, folder_of, model_file, write_folder
from morphgraph.folders.sizes import Caches, require_named
from morphgraph.folders.write import renumbered
from morphgraph.passes.planning.uniform import set_widths
from tests import merged

HIDDEN, HEADS, SIZE, INNER, VOCABULARY, LAYERS = 32, 4, 8, 48, 60, 2
CONFIG = {
    "model_type": "tiny",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def decoder(inners: tuple[int, ...] = (INNER,) * LAYERS) -> onnx.ModelProto:
    """Table, blocks of MultiHeadAttention and an MLP, and logits, in operators of ONNX Runtime."""
    rng = np.random.default_rng(0)
    weights, nodes = [], []

    def weight(name: str, *shape: int) -> str:
        array = rng.standard_normal(shape) / np.sqrt(shape[0] if len(shape) > 1 else 1)
        weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    x = node("Gather", [weight("embed.weight", VOCABULARY, HIDDEN), "input_ids"], "/embed/Gather")
    for k, inner in enumerate(inners):
        at = f"/layers.{k}"
        q, key, v = (
            node("MatMul", [x, weight(f"{k}.{p}", HIDDEN, HIDDEN)], f"{at}/attn/{p}/MatMul")
            for p in ("q_proj", "k_proj", "v_proj")
        )
        mixed = node(
            "MultiHeadAttention", [q, key, v], f"{at}/attn/MHA",
            domain="com.microsoft", num_heads=HEADS,
        )  # fmt: skip
        o = node("MatMul", [mixed, weight(f"{k}.o", HIDDEN, HIDDEN)], f"{at}/attn/o_proj/MatMul")
        x = node("Add", [x, o], f"{at}/Add")
        up = node("MatMul", [x, weight(f"{k}.up", HIDDEN, inner)], f"{at}/mlp/up_proj/MatMul")
        act = node("Relu", [up], f"{at}/mlp/Relu")
        down = node("MatMul", [act, weight(f"{k}.dn", inner, HIDDEN)], f"{at}/mlp/down/MatMul")
        x = node("Add", [x, down], f"{at}/Add_1")
    nodes.append(helper.make_node("MatMul", [x, weight("head", HIDDEN, VOCABULARY)], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [
            helper.make_tensor_value_info(
                "logits", TensorProto.FLOAT, ["batch", "length", VOCABULARY]
            )
        ],
        weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def make_folder(path: Path, config: dict[str, Any] = CONFIG, **more: Any) -> Path:
    path.mkdir()
    onnx.save(decoder(**more), path / "model.onnx")
    for name in NAMES:
        (path / name).write_text(json.dumps(config if name == "config.json" else {"of": name}))
    (path / "model.safetensors").write_bytes(b"weights of the old sizes")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "large")


def logits(path: Path, ids: list[int]) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": np.array([ids])})[0]


def said(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def test_a_folder_becomes_a_smaller_one(folder: Path, tmp_path: Path) -> None:
    """Plan and apply as a user calls them; widths of the files beside what the config says."""
    plan, small = tmp_path / "plan.json", tmp_path / "small"
    arguments = ["plan", str(folder), "--budget", "params=55%", "--round-to", "2", "-o", str(plan)]
    assert main(arguments) == 0
    assert main(["apply", str(folder), str(plan), "-o", str(small)]) == 0
    assert sorted(p.name for p in small.iterdir()) == sorted([*NAMES, "model.onnx"])
    sizes = {w.name: tuple(w.dims) for w in onnx.load(small / "model.onnx").graph.initializer}
    config = said(small)
    assert sizes["embed.weight"] == (VOCABULARY, config["hidden_size"])
    for k in range(LAYERS):
        heads = config["num_attention_heads"]
        assert sizes[f"{k}.q_proj"] == (config["hidden_size"], heads * config.get("head_dim", SIZE))
        assert sizes[f"{k}.up"] == (config["hidden_size"], config["intermediate_size"])
    assert config["intermediate_size"] < INNER
    assert {k: config[k] for k in ("vocab_size", "num_hidden_layers", "model_type")} == {
        k: CONFIG[k] for k in ("vocab_size", "num_hidden_layers", "model_type")
    }  # fmt: skip
    assert config["max_position_embeddings"] == CONFIG["max_position_embeddings"]
    graph, made = mg.lift(folder / "model.onnx"), mg.Plan.load(plan)
    assert made.request["same"] == ["repeated"]
    expected = mg.apply(graph, made)
    mg.save(expected, tmp_path / "expected.onnx")
    found = logits(small / "model.onnx", [3, 5, 8])
    np.testing.assert_array_equal(found, logits(tmp_path / "expected.onnx", [3, 5, 8]))
    assert main(["verify", str(folder), str(plan), str(small)]) == 0


@pytest.mark.parametrize("named", ["large", "large/model.onnx"])
def test_the_next_command_of_a_plan_writes_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], named: str
) -> None:
    """As it stands in the line that the plan ends with, whether the folder or its file is named."""
    monkeypatch.chdir(folder.parent)
    assert main(["plan", named, "--budget", "params=55%", "-o", "plan.json"]) == 0
    following = capsys.readouterr().err.splitlines()[-1]
    words = shlex.split(following.removeprefix("next: morphgraph "))
    assert words[0] == "apply"
    assert main(words) == 0
    made = folder.parent / words[-1]
    assert sorted(path.name for path in made.iterdir()) == sorted([*NAMES, "model.onnx"])


def test_shrink_writes_a_folder_too(folder: Path, tmp_path: Path) -> None:
    data, small = tmp_path / "data.npz", tmp_path / "small"
    np.savez(data, input_ids=np.random.default_rng(0).integers(0, VOCABULARY, (40, 6)))
    budget = ["--budget", "params=70%", "--round-to", "2", "-o", str(small)]
    assert main(["shrink", str(folder / "model.onnx"), "--data", str(data), *budget]) == 0
    sizes = {w.name: tuple(w.dims) for w in onnx.load(small / "model.onnx").graph.initializer}
    config = said(small)
    assert sizes["embed.weight"] == (VOCABULARY, config["hidden_size"])
    assert sizes["0.up"] == sizes["1.up"] == (config["hidden_size"], config["intermediate_size"])
    assert main(["shrink", str(folder), "--data", str(data), *budget]) == 4
    assert main(["shrink", str(folder), "--data", str(data), *budget, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("widths", "entries"),
    [
        ({"*attention*": 2}, {"num_attention_heads": 2, "head_dim": SIZE, "hidden_size": HIDDEN}),
        ({"*up_proj*": 20}, {"intermediate_size": 20, "num_attention_heads": HEADS}),
        ({"*residual*": 16, "*attention*": 2}, {"hidden_size": 16, "num_attention_heads": 2}),
    ],
)
def test_entries_follow_widths(
    folder: Path, tmp_path: Path, widths: dict[str, int], entries: dict[str, int]
) -> None:
    graph = mg.lift(folder / "model.onnx")
    chosen = {}
    for pattern, width in widths.items():
        word = pattern.strip("*")
        for group in graph.groups:
            if word in group.name and ("residual" in group.name) == (word == "residual"):
                chosen[group.id] = width
    plan = mg.uniform(graph, widths=chosen, round_to=1)
    source = folder_of(folder)
    assert source is not None
    write_folder(graph, plan, mg.apply(graph, plan), source, tmp_path / "small")
    config = said(tmp_path / "small")
    assert {key: config.get(key) for key in entries} == entries
    assert ("head_dim" in config) == ("head_dim" in entries)


def test_as_many_heads_as_a_head_has_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of heads is no head's size because it is as large."""
    for name, size in (("HIDDEN", 36), ("HEADS", 6)):
        monkeypatch.setitem(globals(), name, size)
    config = {**CONFIG, "hidden_size": 36, "num_attention_heads": 6}
    folder, plan = make_folder(tmp_path / "square", config), tmp_path / "plan.json"
    assert main(["plan", str(folder), "--set", "*attention*=4", "-o", str(plan)]) == 0
    assert main(["apply", str(folder), str(plan), "-o", str(tmp_path / "small")]) == 0
    assert said(tmp_path / "small") == config | {"num_attention_heads": 4, "head_dim": 6}


def test_a_width_that_followed_from_another_is_stated(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": HIDDEN, "n_head": HEADS, "n_inner": None}
    folder = make_folder(tmp_path / "gpt", config, inners=(4 * HIDDEN, 4 * HIDDEN))
    plan = tmp_path / "plan.json"
    assert main(["plan", str(folder), "--set", "*up_proj*=40", "-o", str(plan)]) == 0
    assert main(["apply", str(folder), str(plan), "-o", str(tmp_path / "small")]) == 0
    assert said(tmp_path / "small") == config | {"n_inner": 40}


def test_an_inner_width_is_told_from_a_vocabulary_of_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG | {"intermediate_size": VOCABULARY}
    folder = make_folder(tmp_path / "large", config, inners=(VOCABULARY, VOCABULARY))
    plan = tmp_path / "plan.json"
    assert main(["plan", str(folder), "--set", "*up_proj*=24", "-o", str(plan)]) == 0
    assert main(["apply", str(folder), str(plan), "-o", str(tmp_path / "small")]) == 0
    assert "unequal" not in capsys.readouterr().err
    assert said(tmp_path / "small") == config | {"intermediate_size": 24}


def resized_by(folder: Path, wish: str, small: Path) -> dict[str, Any]:
    plan = str(small.with_suffix(".json"))
    assert main(["plan", str(folder), wish, "-o", plan]) == 0
    assert main(["apply", str(folder), plan, "-o", str(small)]) == 0
    return said(small)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "of nobody"])
def test_a_hidden_width_that_heads_do_not_divide_is_told(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one that they do; the oracles are the classes that Hugging Face reads configs with."""
    folder = make_folder(tmp_path / "large", CONFIG | {"model_type": kind})
    known = transformers.CONFIG_MAPPING["llama" if kind == "of nobody" else kind]
    hidden = next(g for g in mg.lift(folder / "model.onnx").groups if g.width == HIDDEN)
    config = resized_by(folder, f"--set={hidden.id}={HIDDEN - 3}", tmp_path / "odd")
    with pytest.raises(StrictDataclassError, match="not a multiple"):
        known(**config)
    error = capsys.readouterr().err
    found = re.search(r"no multiple of num_attention_heads 4: .* plan with --set (\S+),", error)
    assert found is not None, error
    config = resized_by(folder, f"--set={found[1]}", tmp_path / "even")
    assert "no multiple" not in capsys.readouterr().err
    assert known(**config).hidden_size == HIDDEN - HEADS


def test_a_hidden_width_that_its_class_takes_is_not_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "large", CONFIG | {"model_type": "qwen3"})
    hidden = next(g for g in mg.lift(folder / "model.onnx").groups if g.width == HIDDEN)
    config = resized_by(folder, f"--set={hidden.id}={HIDDEN - 3}", tmp_path / "odd")
    assert "no multiple" not in capsys.readouterr().err
    assert transformers.Qwen3Config(**config).hidden_size == HIDDEN - 3


def test_unequal_widths_are_asked_for_and_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, small = str(tmp_path / "plan.json"), tmp_path / "small"
    wish = ["--set", "*layers.0/mlp/up*=16"]
    assert main(["plan", str(folder), *wish, "--unequal", "-o", plan]) == 0
    assert "only ONNX Runtime runs" in capsys.readouterr().err
    assert main(["apply", str(folder), plan, "-o", str(small)]) == 0
    assert "cannot say unequal widths (intermediate_size 16 and 48" in capsys.readouterr().err
    assert said(small)["intermediate_size"] == INNER
    assert logits(small / "model.onnx", [1]).shape == (1, 1, VOCABULARY)
    assert main(["plan", str(folder), *wish, "-o", plan, "--overwrite"]) == 0
    groups = mg.Plan.load(plan).groups.values()
    assert [sum(b - a for a, b in g.keep) for g in groups] == [16, 16]
    assert main(["plan", str(folder), *wish, "--unequal", "--same"]) == 2


def test_without_a_config_nothing_is_tied(tmp_path: Path) -> None:
    onnx.save(decoder(), tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"lights": "on"}')
    for wish, same in (([], None), (["--same"], ["repeated"])):
        plan = tmp_path / f"plan{len(wish)}.json"
        wish = ["--budget", "params=60%", *wish, "-o", str(plan)]
        assert main(["plan", str(tmp_path / "model.onnx"), *wish]) == 0
        assert mg.Plan.load(plan).request.get("same") == same
    assert folder_of(tmp_path / "model.onnx") is None
    with pytest.raises(FileError, match=r"without config\.json or genai_config\.json"):
        model_file(tmp_path)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 96}))


def spoil_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'hidden_size': 32}")


def spoil_caches(folder: Path) -> None:
    inputs = {"past_key_names": "past.%d.k", "past_value_names": "past.%d.v"}
    genai = {"model": {"decoder": {"filename": "model.onnx", "inputs": inputs}}}
    (folder / "genai_config.json").write_text(json.dumps(genai))


def lose_the_model(folder: Path) -> None:
    (folder / "model.onnx").rename(folder / "model.bin")


def second_model(folder: Path) -> None:
    (folder / "model.onnx").rename(folder / "a.onnx")
    (folder / "b.onnx").write_bytes(b"")


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (spoil_config, r"config\.json: says hidden_size 96, and the model has hidden width 32"),
    (spoil_json, r"config\.json: is no JSON"),
    (spoil_caches, r"names the cache inputs 'past\.%d\.k', and the model has none"),
    (lose_the_model, "holds no ONNX file"),
    (second_model, r"holds several models \('a\.onnx', 'b\.onnx'\)"),
]


@pytest.mark.parametrize(("spoil", "words"), BROKEN, ids=[s.__name__ for s, _ in BROKEN])
def test_broken_folders_are_refused_and_nothing_is_written(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    graph = mg.lift(folder / "model.onnx")
    plan = mg.uniform(graph, 0.5)
    small = mg.apply(graph, plan)
    spoil(folder)

    def written() -> None:
        source = folder_of(folder)
        assert source is not None
        write_folder(graph, plan, small, source, tmp_path / "small")

    with pytest.raises(ModelError, match=words):
        written()
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_a_cache_of_another_layout_is_refused() -> None:
    name = '"past_key_values.0.key"'
    head = f"net (float[2,1,4,5,8] {name}) => (float[2,1,4,5,8] y)"
    opsets = '<ir_version: 8, opset_import: ["" : 17]>'
    model = ir.from_onnx_text(f"{opsets} {head} {{ y = Identity({name}) }}")
    with pytest.raises(ModelError, match=r"cache with 5 axes; known is \[batch, heads, past"):
        Caches(model)


def test_every_cache_that_a_config_names_is_there() -> None:
    head = 'net (float[2,4,5,8] "past.0.k", float[2,4,5,8] "past.0.v") => (float[2,4,5,8] y)'
    opsets = '<ir_version: 8, opset_import: ["" : 17]>'
    model = ir.from_onnx_text(f'{opsets} {head} {{ y = Add("past.0.k", "past.0.v") }}')
    require_named(model, ["past.%d.k", "past.%d.v"], "genai_config.json")
    with pytest.raises(ModelError, match=r"^g.json: names the cache inputs 'past\.%d\.value', and"):
        require_named(model, ["past.%d.k", "past.%d.value"], "g.json")


def test_caches_are_numbered_without_gaps(folder: Path) -> None:
    """Runtimes count layers from 0; only names of inputs and outputs change."""
    source = folder_of(folder)
    assert source is not None
    past, present = '"past_key_values.3.key"', '"present.3.key"'
    opsets = '<ir_version: 8, opset_import: ["" : 17]>'
    head = f"net (float[2,4,5,8] {past}) => (float[2,4,5,8] {present})"
    model = ir.from_onnx_text(f"{opsets} {head} {{ {present} = Relu({past}) }}")
    made = renumbered(model, source, Caches(model).layers)
    assert [v.name for v in made.graph.inputs] == ["past_key_values.0.key"]
    assert [v.name for v in made.graph.outputs] == ["present.0.key"]
    assert model.graph.inputs[0].name == "past_key_values.3.key"


def test_other_commands_take_folders_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They say of a folder what they say of the file in it."""
    large, small, plan = str(folder), str(tmp_path / "small"), str(tmp_path / "plan.json")
    assert main(["plan", large, "--budget", "params=60%", "-o", plan]) == 0
    assert main(["apply", large, plan, "-o", small]) == 0
    capsys.readouterr()

    def said(command: str, *paths: str) -> Any:
        assert main([command, *paths, "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    files = [f"{large}/model.onnx", f"{small}/model.onnx"]
    assert said("analyze", large) == said("analyze", files[0])
    assert said("diff", large, small) == said("diff", *files)
    sizes = ["--input-shape", "input_ids=1x6"]
    timed = said("bench", large, small, "--seconds", "0.1", *sizes)
    assert len(timed["models"]) == 2
    assert main(["verify", large, plan, small]) == 0
    wide = str(tmp_path / "wide.json")
    assert main(["expand", large, plan, "--budget", "flops=90%", "-o", wide]) == 0
    page = tmp_path / "page.html"
    assert main(["report", large, small, "--seconds", "0", "-o", str(page)]) == 0
    assert "model.onnx" in page.read_text()


def test_blocks_that_are_gone_are_counted_without_a_cache(folder: Path, tmp_path: Path) -> None:
    graph = mg.lift(folder / "model.onnx")
    block = {g.id: 0 for g in graph.groups if "layers.0/" in g.producers[0] and g.width != HIDDEN}
    assert len(block) == 2
    plan, source = set_widths(graph, block), folder_of(folder)
    assert source is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_folder(graph, plan, mg.apply(graph, plan), source, tmp_path / "small")
    assert said(tmp_path / "small") == CONFIG | {"num_hidden_layers": LAYERS - 1}


def test_a_part_of_a_block_that_is_gone_is_told(folder: Path, tmp_path: Path) -> None:
    graph = mg.lift(folder / "model.onnx")
    inner = next(group for group in graph.groups if "layers.0/mlp" in group.name)
    plan = set_widths(graph, {inner.id: 0})
    source = folder_of(folder)
    assert source is not None
    with pytest.warns(mg.MorphWarning, match=r"parts of blocks are gone.*--depth blocks"):
        write_folder(graph, plan, mg.apply(graph, plan), source, tmp_path / "small")
    other = tmp_path / "other"
    config = {k: v for k, v in CONFIG.items() if k != "num_hidden_layers"}
    source = folder_of(make_folder(other, config))
    assert source is not None
    with pytest.warns(mg.MorphWarning, match=r"whole layers are gone.*config\.json by hand"):
        write_folder(graph, plan, mg.apply(graph, plan), source, tmp_path / "none")


def test_a_smaller_vocabulary_is_told_since_the_tokenizer_has_the_old_ids(
    folder: Path, tmp_path: Path
) -> None:
    graph = mg.lift(folder / "model.onnx", pin_outputs=False, pin_rows=False)
    plan = mg.plan(graph, {}, vocabulary=range(0, VOCABULARY, 2))
    source, output = folder_of(folder), tmp_path / "small"
    assert source is not None
    with pytest.warns(mg.MorphWarning, match=r"fewer tokens.*mg\.token_map"):
        write_folder(graph, plan, mg.apply(graph, plan), source, output)
    assert said(output)["vocab_size"] == VOCABULARY // 2
    kept = range(0, VOCABULARY, 2)
    small = logits(output / "model.onnx", [mg.token_map(kept)[i] for i in (2, 8, 4)])
    whole = logits(folder / "model.onnx", [2, 8, 4])
    np.testing.assert_allclose(small, whole[..., ::2], atol=1e-5)


def test_a_folder_that_cannot_be_replaced_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder steps aside first; if the new one cannot take its place, it comes back."""
    graph = mg.lift(folder / "model.onnx")
    plan = mg.uniform(graph, 0.5)
    small, output, source = mg.apply(graph, plan), tmp_path / "small", folder_of(folder)
    assert source is not None
    write_folder(graph, plan, small, source, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(FileError, match="No space left on device"):
        write_folder(graph, plan, small, source, output, overwrite=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, output.name]


def test_targets_are_refused_before_work(folder: Path, tmp_path: Path) -> None:
    source = folder_of(folder)
    assert source is not None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    for target, overwrite, words in (
        (folder, True, "never changed"),
        (tmp_path, True, "never changed"),
        (tmp_path / "mine", False, "--overwrite"),
        (tmp_path / "mine", True, "is no model's folder"),
        (tmp_path / "none" / "small", False, "no such folder"),
        (folder / "model.onnx", True, "is a file"),
    ):
        with pytest.raises(FileError, match=words):
            check_folder(target, overwrite, source)
    check_folder(tmp_path / "old", True, source)
    graph = mg.lift(folder / "model.onnx")
    plan = mg.uniform(graph, 0.5)
    write_folder(graph, plan, mg.apply(graph, plan), source, tmp_path / "old", True)
    assert said(tmp_path / "old")["hidden_size"] == HIDDEN // 2


@pytest.mark.parametrize("classes", [2, 3, INNER])
def test_logits_of_classes_say_nothing_of_the_vocabulary(tmp_path: Path, classes: int) -> None:
    """A classifier's output has the same name; the tokens are the rows of the table."""
    folder = make_folder(tmp_path / "classifier", CONFIG)
    model = onnx.load(folder / "model.onnx")
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    head.output[0] = "features"
    weight = np.random.default_rng(0).normal(size=(VOCABULARY, classes)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "classes"))
    model.graph.node.append(helper.make_node("MatMul", ["features", "classes"], ["logits"], "top"))
    model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = classes
    onnx.save(model, folder / "model.onnx")
    plan, small = tmp_path / "plan.json", tmp_path / "small"
    tokens = tmp_path / "ids.txt"
    tokens.write_text("\n".join(map(str, range(0, VOCABULARY, 2))))
    wish = ["--budget", "params=80%", "--keep-tokens", str(tokens), "--round-to", "2"]
    assert main(["plan", str(folder), *wish, "-o", str(plan)]) == 0
    assert main(["apply", str(folder), str(plan), "-o", str(small)]) == 0
    assert said(small)["vocab_size"] == VOCABULARY // 2
    assert logits(small / "model.onnx", [1, 7]).shape == (1, 2, classes)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unequal", [False, True])
def test_a_plan_beside_a_config_ends_at_widths_that_its_class_builds(
    tmp_path: Path, unequal: bool
) -> None:
    """Of a class that derives a head's size from the hidden width; with the weights of the file."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ids = torch.randint(0, 60, (2, 8))
    whole, small, plan = tmp_path / "whole", tmp_path / "small", tmp_path / "plan.json"
    net.config.save_pretrained(whole)
    told = {"input_ids": ids, "use_cache": False}
    mg.save(mg.export(net, told, dynamic_batch=True), whole / "model.onnx")
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    more = ["--unequal"] if unequal else []
    wanted = ["--budget", "params=60%", "--round-to", "1", "--exclude", "*wpe*", *more]
    assert main(["plan", str(whole), *wanted, "-o", str(plan)]) == 0
    assert main(["apply", str(whole), str(plan), "-o", str(small)]) == 0
    made = transformers.AutoConfig.from_pretrained(small)
    if unequal:  # otherwise this test could not fail
        with pytest.raises(ValueError, match="must be divisible by num_heads"):
            transformers.GPT2LMHeadModel(made)
        return
    weights = {
        w.name: torch.tensor(numpy_helper.to_array(w))
        for w in onnx.load(small / "model.onnx").graph.initializer
    }
    again = transformers.GPT2LMHeadModel(made).eval()
    assert made.n_embd < 32
    assert made.n_head < 4
    assert json.loads(plan.read_text())["request"]["config"]["of"] == "GPT2Config"
    missing = again.load_state_dict(weights, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    again.tie_weights()
    session = ort.InferenceSession(small / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"input_ids": ids.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, again(ids).logits.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("command", "words"),
    [("morph", ["-o", "run"]), ("sweep", ["-o", "run"])],
)
def test_training_commands_speak_of_the_file_in_a_folder(
    folder: Path, command: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), "--data", "digits", "--budget", "flops=50%", *words]
    assert main([command, *arguments, "--dry-run"]) == 3
    assert "model.onnx: morph trains image classifiers" in capsys.readouterr().err


@pytest.mark.parametrize("widths", [("6", "2"), ("4", "1"), ("8", "1")])
def test_heads_that_optimum_would_take_for_others_are_told(
    widths: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Optimum's empty caches have heads of the hidden width by the heads; the file says its own."""
    large, small, plan = tmp_path / "large", tmp_path / "small", str(tmp_path / "plan.json")
    large.mkdir()
    file = merged.write_merged(tmp_path / "merged.onnx")
    mg.save(mg.load(file, fixed={merged.FLAG: True}), large / "model.onnx")
    config = {"model_type": "of nobody", "hidden_size": merged.WIDTH, "vocab_size": merged.IDS}
    config |= {"num_attention_heads": merged.HEADS, "num_hidden_layers": merged.BLOCKS}
    (large / "config.json").write_text(json.dumps(config))
    groups = mg.lift(large / "model.onnx").groups
    hidden = next(g.id for g in groups if g.width == merged.WIDTH)
    heads = [g.id for g in groups if g.width == merged.HEADS]
    wishes = [f"--set={hidden}={widths[0]}", *(f"--set={each}={widths[1]}" for each in heads)]
    assert main(["plan", str(large), *wishes, "--round-to", "1", "-o", plan]) == 0
    assert main(["apply", str(large), plan, "-o", str(small)]) == 0
    written = onnx.load(small / "model.onnx")
    cache = next(v for v in written.graph.input if v.name.startswith("past"))
    _, count, _, size = (d.dim_value for d in cache.type.tensor_type.shape.dim)
    by_optimum = said(small)["hidden_size"] // said(small)["num_attention_heads"]
    error = capsys.readouterr().err
    assert ("ORTModelForCausalLM" in error) == (by_optimum != size)
    assert (f"plan with --set {hidden}={count * size}" in error) == (by_optimum != size)
