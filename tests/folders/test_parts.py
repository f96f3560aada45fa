"""Folders whose files are one network: resized together, each file held against ONNX Runtime.

The oracle is the original's own files in ONNX Runtime, with the numbers of their weights that the
small files do not have set to zero: nothing of it is ours.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import morphgraph as mg
from morphgraph.cli import main
from morphgraph.errors import ModelError, VerificationError
from morphgraph.folders import folder_of, model_file
from morphgraph.folders.found import model_places
from morphgraph.folders.parts import load_network, load_place, require_same_files
from morphgraph.folders.runs import file_runs
from morphgraph.origin import Origin
from morphgraph.passes.canonical.fix_inputs import fix_inputs
from morphgraph.passes.canonical.join_files import layouts
from morphgraph.passes.canonical.split_files import split_files
from tests.merged import BLOCKS as MERGED_BLOCKS, FLAG, write_merged
from tests.sided import (
    BLOCKS,
    CONFIG,
    ENCODER,
    FIRST,
    HEADS,
    IDS,
    LATER,
    MERGED,
    SIZE,
    WIDTH,
    merged_decoder,
    sided,
    write_sided,
)

Files = Mapping[str, onnx.ModelProto]
STEPS = 4


def read(folder: Path) -> Files:
    return {path.stem: onnx.load(path) for path in sorted(folder.glob("*.onnx"))}


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {v.name: onnx.numpy_helper.to_array(v) for v in model.graph.initializer}


def silenced(large: Files, small: Files) -> Files:
    """The large files, whose weights are zero where the small ones do not hold their numbers."""
    found = {}
    for name, model in large.items():
        left, copy = weights(small[name]), onnx.ModelProto()
        copy.CopyFrom(model)
        for value in copy.graph.initializer:
            array = onnx.numpy_helper.to_array(value)
            if array.dtype == np.float32:
                kept = np.where(np.isin(array, left[value.name]), array, 0)
                value.CopyFrom(onnx.numpy_helper.from_array(kept.astype(np.float32), value.name))
        found[name] = copy
    return found


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    given = {name: array for name, array in feeds.items() if name in wanted}
    return dict(zip(names, session.run(None, given), strict=True))


def generated(files: Files, start: Mapping[str, np.ndarray]) -> tuple[list[int], np.ndarray]:
    """Greedy tokens behind a prompt of one, and the logits of the last step."""
    new, caches, tokens = np.array([[3]]), dict(start), []
    for step in range(STEPS):
        results = run(files[LATER if step else FIRST], {"input_ids": new, **caches})
        logits = results.pop("logits")
        caches |= {k.replace("present", "past_key_values"): v for k, v in results.items()}
        tokens.append(int(logits[0, -1].argmax()))
        new = np.array([tokens[-1:]])
    return tokens, logits


def translated(files: Files, ids: list[int]) -> tuple[list[int], np.ndarray]:
    hidden = run(files[ENCODER], {"input_ids": np.array([ids])})["last_hidden_state"]
    return generated(files, {"encoder_hidden_states": hidden})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sided(tmp_path / "large")


def shrunk(folder: Path, *options: str) -> Path:
    plan, small = folder.parent / "plan.json", folder.parent / "small"
    assert main(["plan", str(folder), *options, "-o", str(plan), "--quiet"]) == 0
    assert main(["apply", str(folder), str(plan), "-o", str(small), "--quiet"]) == 0
    return small


def test_all_files_of_a_folder_shrink_as_one_network(folder: Path) -> None:
    small = shrunk(folder, "--budget", "params=60%", "--round-to", "1")
    assert sorted(p.name for p in small.iterdir()) == sorted(p.name for p in folder.iterdir())
    large_files, small_files = read(folder), read(small)
    for name, model in small_files.items():
        onnx.checker.check_model(model, full_check=True)
        assert [v.name for v in model.graph.input] == [
            v.name for v in large_files[name].graph.input
        ]
        assert set(weights(large_files[name])) <= set(weights(model))
    masked = silenced(large_files, small_files)
    for ids in ([5, 9, 7, 1], [11, 4]):
        tokens, logits = translated(small_files, ids)
        expected, all_logits = translated(masked, ids)
        assert tokens == expected
        np.testing.assert_allclose(logits, all_logits, rtol=0, atol=1e-5 * np.abs(logits).max())
        assert np.abs(translated(large_files, ids)[1] - logits).max() > 1e-2 * np.abs(logits).max()


def test_every_kind_of_width_goes_and_the_config_says_it(folder: Path) -> None:
    """Hidden width, heads of three kinds, and the two sides' MLPs, each its own number."""
    small = shrunk(folder, "--set", "*=50%", "--set", "*m*u=25%", "--round-to", "1")
    sizes = {name: weights(model) for name, model in read(small).items()}
    said = json.loads((small / "config.json").read_text())
    encoder, first = sizes[ENCODER], sizes[FIRST]
    assert encoder["shared"].shape == first["shared"].shape == (IDS, said["d_model"])
    assert said["d_model"] < WIDTH
    assert encoder["en0up"].shape[1] == said["encoder_ffn_dim"] < CONFIG["encoder_ffn_dim"]
    assert first["de0up"].shape[1] == said["decoder_ffn_dim"] < CONFIG["decoder_ffn_dim"]
    heads = said["decoder_attention_heads"]
    assert heads < HEADS
    assert said["d_kv"] == CONFIG["d_kv"]
    assert first["de0q"].shape == first["cr0q"].shape == (said["d_model"], heads * said["d_kv"])
    caches = {v.name: v.type.tensor_type.shape.dim[1] for v in read(small)[LATER].graph.input}
    assert {d.dim_value for n, d in caches.items() if n.startswith("past")} == {heads}
    assert (said["encoder_layers"], said["vocab_size"]) == (BLOCKS, IDS)


def test_a_side_of_the_config_is_about_its_own_files(folder: Path) -> None:
    """Where both sides have as many heads, those of one are not the other's."""
    graph = mg.lift(load_place(folder))
    own = next(g.id for g in graph.groups if ("de0q", 1) in {(m.value, m.axis) for m in g.members})
    small = shrunk(folder, "--set", f"{own}=2")
    said = json.loads((small / "config.json").read_text())
    assert said["encoder_attention_heads"] == HEADS
    assert weights(onnx.load(small / f"{FIRST}.onnx"))["de0q"].shape == (WIDTH, 2 * SIZE)


def two_files(folder: Path) -> Path:
    """A decoder alone, of which the first step and those with a cache are two files."""
    folder.mkdir()
    merged = write_merged(folder.parent / "merged.onnx")
    for name, flag in ((FIRST, False), (LATER, True)):
        model = fix_inputs(mg.load(merged), {FLAG: flag})
        if not flag:
            for value in list(model.graph.inputs):
                if not value.uses():
                    model.graph.inputs.remove(value)
        model.metadata_props.clear()
        mg.save(model, folder / f"{name}.onnx")
    config = {"model_type": "tiny", "n_embd": 8, "n_head": 2, "n_inner": 12}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def decoded(files: Files, prompt: list[int]) -> np.ndarray:
    """Logits of a step behind a prompt."""
    ids = np.array([prompt])
    first = run(files[FIRST], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    pasts = {f"past_key_values.{k}.key": first[f"present.{k}.key"] for k in range(MERGED_BLOCKS)}
    mask = np.ones((1, len(prompt) + 1), np.int64)
    return run(files[LATER], {"input_ids": ids[:, :1], "attention_mask": mask, **pasts})["logits"]


def test_a_decoder_of_two_files_shrinks_as_one(tmp_path: Path) -> None:
    folder = two_files(tmp_path / "large")
    small = shrunk(folder, "--budget", "params=60%", "--round-to", "1")
    large_files, small_files = read(folder), read(small)
    found, prompt = small_files[FIRST], [4, 9, 2]
    said = json.loads((small / "config.json").read_text())
    assert weights(found)["e"].shape == (20, said["n_embd"])
    assert weights(found)["wq0"].shape[1] == said["n_head"] * 4
    expected = decoded(silenced(large_files, small_files), prompt)
    np.testing.assert_allclose(decoded(small_files, prompt), expected, rtol=0, atol=1e-5)
    assert np.abs(decoded(large_files, prompt) - expected).max() > 1e-2


@pytest.fixture
def merged_folder(folder: Path) -> Path:
    """The same network, whose decoder is one file of two networks."""
    onnx.save(merged_decoder(sided()), folder / f"{MERGED}.onnx")
    for name in (FIRST, LATER):
        (folder / f"{name}.onnx").unlink()
    return folder


def merged_steps(files: Files, ids: list[int]) -> list[np.ndarray]:
    """Logits of a first step and of one behind it, as a runtime calls a merged file."""
    hidden = run(files[ENCODER], {"input_ids": np.array([ids])})["last_hidden_state"]
    axes = {v.name: v.type.tensor_type.shape.dim for v in files[MERGED].graph.input}
    pasts = {
        name: np.zeros((1, dims[1].dim_value, 0, SIZE), np.float32)
        for name, dims in axes.items()
        if name.startswith("past")
    }
    feeds = {"encoder_hidden_states": hidden, "input_ids": np.array([[3, 8]])}
    first = run(files[MERGED], {**feeds, **pasts, FLAG: np.array([False])})
    pasts = {name: first[name.replace("past_key_values", "present")] for name in pasts}
    feeds["input_ids"] = np.array([[6]])
    later = run(files[MERGED], {**feeds, **pasts, FLAG: np.array([True])})
    for name, past in pasts.items():
        given = later[name.replace("past_key_values", "present")]
        assert given.shape[1] == past.shape[1]  # those that hold nothing, too
    return [first["logits"], later["logits"]]


def test_both_networks_of_a_merged_decoder_shrink_with_the_encoder(merged_folder: Path) -> None:
    for name in (ENCODER, MERGED):  # what others have noted in a file
        path = merged_folder / f"{name}.onnx"
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {"made by": name})
        onnx.save(model, path)
    small = shrunk(merged_folder, "--budget", "params=60%", "--round-to", "1")
    large_files, small_files = read(merged_folder), read(small)
    for name, model in small_files.items():
        onnx.checker.check_model(model, full_check=True)
        assert [v.name for v in model.graph.input] == [
            v.name for v in large_files[name].graph.input
        ]
        assert {p.key: p.value for p in model.metadata_props}["made by"] == name
    before, after = (len(weights(files[MERGED])) for files in (large_files, small_files))
    assert after <= before + 2 * BLOCKS * 8  # sizes of reshapes, and no weight twice
    masked = silenced(large_files, small_files)
    for ids in ([5, 9, 7, 1], [11, 4]):
        found = merged_steps(small_files, ids)
        for one, other, whole in zip(
            found, merged_steps(masked, ids), merged_steps(large_files, ids), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(one).max())
            assert np.abs(whole - one).max() > 1e-2 * np.abs(one).max()


def test_all_files_shrink_by_data(folder: Path) -> None:
    """Inputs by file and name; what is fitted is what the files hold."""
    generator, data = np.random.default_rng(0), folder.parent / "data.npz"
    sizes = {f"{ENCODER}/input_ids": 6, f"{FIRST}/input_ids": 5, f"{LATER}/input_ids": 1}
    ids = {name: generator.integers(0, IDS, (40, size)) for name, size in sizes.items()}
    np.savez(data, **ids)  # type: ignore[arg-type]
    small = folder.parent / "small"
    arguments = ["shrink", str(folder), "--data", str(data), "--budget", "params=70%"]
    assert main([*arguments, "-o", str(small), "--quiet"]) == 0
    files = read(small)
    tokens, _ = translated(files, [5, 9, 7, 1])
    assert len(tokens) == STEPS
    first, later = (weights(files[name]) for name in (FIRST, LATER))
    held = {array.tobytes() for array in first.values() if array.dtype == np.float32}
    assert {a.tobytes() for a in later.values() if a.dtype == np.float32} <= held


def test_kernels_that_files_hold_alike_are_fitted_for_all_of_them(folder: Path) -> None:
    """The logits of both steps are nearer to those of the large files than with slices."""
    model, generator = load_place(folder), np.random.default_rng(0)
    sizes = {f"{ENCODER}/input_ids": 6, f"{FIRST}/input_ids": 5, f"{LATER}/input_ids": 1}
    feeds = {name: generator.integers(0, IDS, (200, size)) for name, size in sizes.items()}
    result = mg.shrink(model, feeds, {"params": "70%"}, threads=1)
    before, after = (
        {each.name: each.error for each in errors} for errors in (result.before, result.error)
    )
    for step in (FIRST, LATER):
        assert after[f"{step}/logits"] < 0.5 * before[f"{step}/logits"]
    shared = [each for each in result.layers if each.name.startswith(f"{LATER}/")]
    assert sum(each.after < each.before for each in shared) >= 4 * BLOCKS


@pytest.mark.parametrize("options", [["--depth", "blocks"], ["--keep-tokens", "ids.txt"]])
def test_what_several_files_cannot_be_given_is_refused(
    folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(folder), "--budget", "params=60%", *options]) != 0
    assert "go" in capsys.readouterr().err


def test_joining_and_splitting_change_no_file(folder: Path) -> None:
    """What is split of a joined network computes what the files did, under their names."""
    before, joined = read(folder), load_place(folder)
    noted = layouts(joined)
    assert noted is not None
    assert [part.name for part in noted.parts] == [ENCODER, FIRST, LATER]
    assert sum(v.const_value is not None for v in joined.graph.initializers.values()) < sum(
        len(weights(model)) for model in before.values()
    )
    after = {}
    for name, model in split_files(joined).items():
        mg.save(model, folder / f"{name}.onnx", overwrite=True)
        after[name] = onnx.load(folder / f"{name}.onnx")
    for name, model in after.items():
        for one, other in (
            (model.graph.input, before[name].graph.input),
            (model.graph.output, before[name].graph.output),
        ):
            assert [str(v.type) for v in one] == [str(v.type) for v in other]
    tokens, logits = translated(after, [5, 9, 7])
    expected, all_logits = translated(before, [5, 9, 7])
    assert tokens == expected
    np.testing.assert_array_equal(logits, all_logits)


def test_files_that_are_not_the_joined_network_are_refused(folder: Path) -> None:
    joined = load_place(folder)
    files = split_files(joined)
    require_same_files(joined, files)
    weight = files[LATER].graph.initializers["onnx::MatMul_3"]
    assert weight.const_value is not None
    weight.const_value = ir.Tensor(weight.const_value.numpy() * 1.01)
    with pytest.raises(VerificationError, match="of 'decoder_with_past_model' is not what all"):
        require_same_files(joined, files)


def foreign(folder: Path) -> None:
    (folder / f"{ENCODER}.onnx").unlink()
    one = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> net (float[2,3] x) => (float[2,3] y)'
        "{ y = Relu(x) }"
    )
    onnx.save(one, folder / "other.onnx")


def twice(folder: Path) -> None:
    (folder / f"{ENCODER}_copy.onnx").write_bytes((folder / f"{ENCODER}.onnx").read_bytes())


def other_opset(folder: Path) -> None:
    model = onnx.load(folder / f"{ENCODER}.onnx")
    onnx.save(onnx.version_converter.convert_version(model, 20), folder / f"{ENCODER}.onnx")


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (foreign, "'other' takes nothing that another gives, and gives nothing that another takes"),
    (twice, "'encoder_model' and 'encoder_model_copy' take and give the same"),
    (other_opset, r"different opsets \(encoder_model 20, decoder_model 18"),
]


@pytest.mark.parametrize(("spoil", "words"), BROKEN, ids=[s.__name__ for s, _ in BROKEN])
def test_files_that_are_no_one_network_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], words: str
) -> None:
    spoil(folder)
    assert main(["plan", str(folder), "--budget", "params=60%"]) != 0
    assert re.search(words, capsys.readouterr().err)


def test_notes_of_others_about_files_are_passed_over(folder: Path) -> None:
    model = mg.load(folder / f"{ENCODER}.onnx")
    for words in ("{", "[1]", '{"parts": [{"name": 3}], "free": ["last_hidden_state"]}'):
        model.metadata_props["morphgraph.joined"] = words
        assert layouts(model) is None
        graph = mg.lift(model)
        assert graph.groups_on(graph.dim("last_hidden_state", 2))
        (index,) = graph.groups_on(graph.dim("last_hidden_state", 2))
        assert not graph.groups[index].resizable


def test_groups_that_go_as_a_whole_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = folder.parent / "plan.json"
    graph = mg.lift(load_place(folder))
    inner = next(
        g.id for g in graph.groups if ("de0up", 1) in {(m.value, m.axis) for m in g.members}
    )
    arguments = ["plan", str(folder), "--set", f"{inner}=0", "--min-width", "0", "--unequal"]
    assert main([*arguments, "-o", str(plan), "--quiet"]) == 0
    assert main(["apply", str(folder), str(plan), "-o", str(folder.parent / "small")]) != 0
    assert "whole groups are gone" in capsys.readouterr().err


def test_what_takes_one_file_names_those_of_a_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"holds several models \('decoder_model.onnx'"):
        model_file(folder)
    found = folder_of(folder)
    assert found is not None
    assert [path.stem for path in found.parts] == [FIRST, LATER, ENCODER]
    assert len(load_network(folder, found.parts).graph.inputs) == 3


def test_commands_hold_folders_against_each_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``verify`` sees a file that is not the plan's; ``diff`` and ``report`` name files."""
    small = shrunk(folder, "--budget", "params=60%", "--round-to", "1")
    plan, page = str(tmp_path / "plan.json"), tmp_path / "page.html"
    assert main(["verify", str(folder), plan, str(small)]) == 0
    capsys.readouterr()
    assert main(["diff", str(folder), str(small), "--format", "json"]) == 0
    changed = {layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert {name.partition("/")[0] for name in changed} == {ENCODER, FIRST, LATER}
    assert main(["report", str(folder), plan, str(small), "-o", str(page)]) == 0
    assert f"{LATER}/" in page.read_text()
    assert "no times of a network of several files" in capsys.readouterr().err

    broken = onnx.load(small / f"{LATER}.onnx")
    weight = next(v for v in broken.graph.initializer if len(v.dims) == 2)
    doubled = 2 * onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(doubled, weight.name))
    onnx.save(broken, small / f"{LATER}.onnx")
    assert main(["verify", str(folder), plan, str(small)]) == 1


def test_every_file_is_timed_beside_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = shrunk(folder, "--set", "*=50%", "--round-to", "1")
    capsys.readouterr()
    command = ["bench", str(folder), str(small), "--seconds", "0.02", "--format", "json"]
    assert main(command) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["part"] for point in points] == [ENCODER, FIRST, LATER]
    for point in points:
        assert [model["name"] for model in point["models"]] == ["large", "small"]
        assert point["models"][1]["flops_ratio"] > 1


@pytest.mark.parametrize("batch", [None, 3])
def test_a_file_takes_what_those_before_it_give(folder: Path, batch: int | None) -> None:
    """The shapes are those that ONNX Runtime hands on when the files run one after the other."""
    given = (
        {}
        if batch is None
        else {f"{ENCODER}/input_ids": (batch, 7), f"{FIRST}/input_ids": (batch, 5)}
    )
    runs = {each.name: each.shapes for each in file_runs(folder, given)}
    files, known = read(folder), {}
    for name in (ENCODER, FIRST, LATER):
        known["input_ids"] = np.zeros(runs[name]["input_ids"], np.int64)
        taken = {value.name: known[value.name] for value in files[name].graph.input}
        assert {k: v.shape for k, v in taken.items()} == dict(runs[name])
        results = run(files[name], taken)
        known |= {k.replace("present", "past_key_values"): v for k, v in results.items()}
        known["encoder_hidden_states"] = known["last_hidden_state"]
    assert runs[LATER]["input_ids"][1] == 1


def test_both_networks_of_a_merged_decoder_are_timed(merged_folder: Path) -> None:
    runs = file_runs(merged_folder)
    assert [(each.file.stem, dict(each.fixed)) for each in runs] == [
        (ENCODER, {}),
        (MERGED, {FLAG: False}),
        (MERGED, {FLAG: True}),
    ]
    assert runs[1].shapes["input_ids"][1] > runs[2].shapes["input_ids"][1] == 1


def test_models_of_other_files_are_not_compared(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is one file, and .* a network of several"):
        model_places([folder, folder / f"{ENCODER}.onnx"])
    without_encoder = write_sided(tmp_path / "other")
    (without_encoder / f"{ENCODER}.onnx").unlink()
    with pytest.raises(ModelError, match="files are compared by name"):
        model_places([folder, without_encoder])


@pytest.mark.parametrize(
    "words",
    [
        ["morph", "--data", "digits", "--budget", "flops=50%", "-o", "run"],
        ["sweep", "--data", "digits", "--budget", "flops=50%", "-o", "run"],
        ["card"],
    ],
)
def test_what_takes_one_file_refuses_the_folder(
    folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], str(folder), *words[1:]]) == 3
    said = capsys.readouterr().err
    assert "holds several models" in said
    assert "one ONNX file is wanted" in said


def test_a_folder_that_is_resized_again_remembers_the_first_time(folder: Path) -> None:
    small = shrunk(folder, "--set", "*=75%", "--round-to", "1")
    plan, again = small.parent / "again.json", small.parent / "again"
    assert main(["plan", str(small), "--set", "*=75%", "-o", str(plan), "--quiet"]) == 0
    assert main(["apply", str(small), str(plan), "-o", str(again), "--quiet"]) == 0
    origin = Origin.read(load_place(again))
    assert origin is not None
    assert len(origin.earlier) == 1


@pytest.mark.parametrize("end", ["_quantized", "_q4f16"])
def test_files_in_another_precision_are_left_out(folder: Path, end: str) -> None:
    """As transformers.js has them beside the files that they were made of, in a folder below."""
    (folder / "onnx").mkdir()
    for path in list(folder.glob("*.onnx")):
        (folder / "onnx" / f"{path.stem}{end}.onnx").write_bytes(path.read_bytes())
        path.rename(folder / "onnx" / path.name)
    small = shrunk(folder, "--set", "*=50%", "--round-to", "1")
    assert sorted(path.stem for path in small.rglob("*.onnx")) == [FIRST, LATER, ENCODER]


def test_a_file_in_another_precision_alone_is_the_model(folder: Path) -> None:
    names = {path.stem: f"{path.stem}_fp16" for path in folder.glob("*.onnx")}
    for old, new in names.items():
        (folder / f"{old}.onnx").rename(folder / f"{new}.onnx")
    small = shrunk(folder, "--set", "*=50%", "--round-to", "1")
    assert {path.stem for path in small.glob("*.onnx")} == set(names.values())
