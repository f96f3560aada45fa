"""Inputs fixed to a value, all the way: plans, data, the check, what is written; and the CLI.

The file is a merged decoder; ONNX Runtime runs it as it was.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import morphgraph as mg
from morphgraph.arrays import Array
from morphgraph.cli import main
from morphgraph.errors import ArgumentError, ModelError, PlanError, VerificationError
from morphgraph.graph import ChannelGraph
from morphgraph.origin import Origin
from morphgraph.passes.rewrite.mask import mask
from tests.merged import BLOCKS, FLAG, HEADS, IDS, SIZE, merged, write_merged

LATER = {FLAG: True}


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return mg.lift(merged(), fixed=LATER)


def feeds(past: int, new: int, caches: Mapping[str, Array] | None = None) -> dict[str, Array]:
    generator = np.random.default_rng(past)
    empty = np.zeros((1, HEADS, 0, SIZE), np.float32)
    names = [f"past_key_values.{k}.key" for k in range(BLOCKS)]
    return {
        "input_ids": generator.integers(0, IDS, (1, new)),
        "attention_mask": np.ones((1, past + new), np.int64),
        **(dict.fromkeys(names, empty) if caches is None else caches),
    }


def run(model: onnx.ModelProto | ir.Model, given: Mapping[str, Array]) -> dict[str, Array]:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(given)), strict=True))


def steps(model: onnx.ModelProto | ir.Model, **more: Array) -> list[Array]:
    """The logits of two steps of generation, the second behind the caches of the first."""
    inputs = (
        {value.name: value for value in ir.from_proto(model).graph.inputs}
        if isinstance(model, onnx.ModelProto)
        else {value.name: value for value in model.graph.inputs}
    )
    shapes = {name: value.shape for name, value in inputs.items() if "past" in str(name)}
    empty = {
        str(name): np.zeros((1, size, 0, SIZE), np.float32)
        for name, shape in shapes.items()
        if shape is not None and isinstance(size := shape[1], int)
    }
    first = run(model, {**feeds(0, 4, empty), **more})
    caches = {name: first[name.replace("past_key_values", "present")] for name in empty}
    second = run(model, {**feeds(4, 1, caches), **more})
    return [first["logits"], second["logits"]]


def test_a_shape_for_a_fixed_input_says_that_it_is_fixed(tmp_path: Path) -> None:
    words = f"'{FLAG}': it is fixed .{FLAG}=true.*leave its shape out"
    with pytest.raises(ModelError, match=words):
        mg.lift(merged(), fixed=LATER, input_shapes={FLAG: (1,)})
    written = tmp_path / "fixed.onnx"
    mg.save(mg.lift(merged(), fixed=LATER).model, written)
    with pytest.raises(ModelError, match=words):
        mg.lift(written, input_shapes={FLAG: (1,)})
    with pytest.raises(ModelError, match=r"no such input; .*did you mean 'input_ids'"):
        mg.lift(merged(), fixed=LATER, input_shapes={"input_id": (1, 4)})


def test_todays_file_keeps_everything_and_says_what_frees_it() -> None:
    with pytest.warns(mg.MorphWarning, match=f"--fix {FLAG}=true or --fix {FLAG}=false"):
        whole = mg.lift(merged())
    assert not any(group.resizable for group in whole.groups)
    assert [FLAG in (op.opaque or "") for op in whole.ops] == [True]


@pytest.mark.parametrize("value", [True, False])
def test_number_is_compared(value: bool) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
        net (float[2,4] x, int64 sr) => (float[2,4] y) {
        r = Constant<value = int64 {16000}>()  c = Equal(sr, r)
        y = If (c) <then_branch = a () => (float[2,4] p) { p = Relu(x) },
                    else_branch = b () => (float[2,4] q) { q = Tanh(x) }> }"""
    model = onnx.parser.parse_model(text if value else text.replace("16000", "3"))
    number = 16000 if value else 3
    with pytest.warns(mg.MorphWarning, match=f"--fix sr={number} or another number"):
        mg.lift(model)


def test_steps_of_the_resized_network_are_those_of_the_masked_file(graph: ChannelGraph) -> None:
    before = steps(merged(), **{FLAG: np.array([True])})
    for wanted, found in zip(before, steps(graph.model), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    plan = mg.uniform(graph, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "not held against its file" would be one
        small = mg.apply(graph, plan)
    masked = steps(mask(graph, plan.keep_channels(graph)))
    for wanted, found in zip(masked, steps(small), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert [value.name for value in small.graph.inputs][:2] == ["input_ids", "attention_mask"]
    assert FLAG not in [value.name for value in small.graph.inputs]
    assert json.loads(small.metadata_props["morphgraph.fixed"]) == LATER
    origin = Origin.read(small)
    assert origin is not None
    assert ("holds for", f"{FLAG}=true") in origin.lines()


def test_mask_is_as_long_as_all_keys(graph: ChannelGraph) -> None:
    assert str(graph.model.graph.inputs[1].shape) == "[B,P + T]"


def test_what_the_file_gives_is_checked(graph: ChannelGraph) -> None:
    wrong = mg.lift(merged(), fixed=LATER)
    weight = wrong.model.graph.initializers["w"]
    weight.const_value = ir.Tensor(2 * weight.const_value.numpy(), name="w")
    with pytest.raises(VerificationError, match=f"'logits' of the network for {FLAG}=true is off"):
        mg.apply(wrong, mg.uniform(wrong, 0.5))


def test_other_weights_and_a_second_resize_are_not_held_against_the_file(
    graph: ChannelGraph,
) -> None:
    net = mg.to_torch(graph.model)
    for parameter in net.parameters():
        parameter.data *= 1.5
    small = mg.apply(graph, mg.uniform(graph, 0.75), weights=net)
    again = mg.lift(small)
    assert again.options.fixed == LATER
    mg.apply(again, mg.uniform(again, 0.5))


def test_plan_remembers(graph: ChannelGraph, tmp_path: Path) -> None:
    plan = mg.plan(graph, {"flops": "70%"})
    assert plan.model.lift.fixed == LATER
    plan.save(tmp_path / "plan.json")
    loaded = mg.Plan.load(tmp_path / "plan.json")
    path = write_merged(tmp_path / "merged.onnx")
    assert FLAG not in [value.name for value in mg.apply(path, loaded).graph.inputs]
    first = mg.lift(path, fixed={FLAG: False})
    with pytest.raises(PlanError, match=f"made for the network with {FLAG}=true.*{FLAG}=false"):
        mg.apply(first, loaded)
    with (
        pytest.warns(mg.MorphWarning),
        pytest.raises(PlanError, match="the one with no input fixed"),
    ):
        mg.apply(mg.lift(path), loaded)


def test_load_and_lift_are_the_same(tmp_path: Path, graph: ChannelGraph) -> None:
    path = write_merged(tmp_path / "merged.onnx")
    model = mg.load(path, fixed=LATER)
    assert "If" not in [node.op_type for node in model.graph]
    assert mg.lift(model).options == graph.options
    mg.save(model, tmp_path / "later.onnx")
    again = mg.lift(tmp_path / "later.onnx", fixed=LATER)
    mg.apply(again, mg.plan(graph, {"flops": "70%"}))


def samples(
    more: Mapping[str, Array] = MappingProxyType({}), count: int = 32
) -> list[dict[str, Array]]:
    generator = np.random.default_rng(0)
    return [
        {**feeds(0, 6), "input_ids": generator.integers(0, IDS, (1, 6)), **more}
        for _ in range(count)
    ]


def test_data_may_hold_the_input(tmp_path: Path) -> None:
    path = write_merged(tmp_path / "merged.onnx")
    plain = mg.shrink(path, samples(), {"flops": "70%"}, fixed=LATER)
    held = mg.shrink(path, samples({FLAG: np.array([True])}), {"flops": "70%"}, fixed=LATER)
    assert plain.plan == held.plan
    assert plain.error == held.error
    with pytest.raises(
        ModelError, match=f"'{FLAG}' is false, and the model is fixed to {FLAG}=true"
    ):
        mg.shrink(path, samples({FLAG: np.array([False])}), {"flops": "70%"}, fixed=LATER)
    columns = {
        name: np.concatenate([each[name] for each in samples()]) for name in samples(count=1)[0]
    }
    columns[FLAG] = np.ones(32, np.bool_)
    np.savez(tmp_path / "data.npz", **columns)  # type: ignore[arg-type]  # names of inputs
    stored = mg.shrink(path, tmp_path / "data.npz", {"flops": "70%"}, fixed=LATER)
    assert stored.plan == plain.plan
    with pytest.raises(ArgumentError, match="lift the graph with fixed="):
        mg.shrink(mg.lift(path, fixed=LATER), samples(), {"flops": "70%"}, fixed={FLAG: False})


def test_inputs_of_the_check_may_hold_it(graph: ChannelGraph) -> None:
    plan = mg.uniform(graph, 0.5)
    small = mg.apply(graph, plan, verify=False)
    given = {**feeds(3, 2), FLAG: np.array([True])}
    given |= {n: np.ones((1, HEADS, 3, SIZE), np.float32) for n in given if "past" in n}
    assert mg.verify(graph, plan, small, inputs=given).ok
    with pytest.raises(ModelError, match="is false, and the model is fixed"):
        mg.verify(graph, plan, small, inputs={**given, FLAG: np.array([False])})


def test_to_torch(tmp_path: Path) -> None:
    import torch

    net = mg.to_torch(mg.load(write_merged(tmp_path / "merged.onnx"), fixed=LATER))
    given = {**feeds(3, 2)}
    given |= {n: np.ones((1, HEADS, 3, SIZE), np.float32) for n in given if "past" in n}
    wanted = run(merged(), {**given, FLAG: np.array([True])})
    found = net(*[torch.from_numpy(array) for array in given.values()])
    np.testing.assert_allclose(found[0].detach().numpy(), wanted["logits"], atol=1e-5)
    assert not any(FLAG in name for name, _ in net.named_parameters())


def command(*words: str | Path, code: int = 0) -> None:
    assert main([str(word) for word in words]) == code


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plan, slim = write_merged(tmp_path / "m.onnx"), tmp_path / "p.json", tmp_path / "s.onnx"
    fix = ("--fix", f"{FLAG}=true")
    command("analyze", path)
    assert f"--fix {FLAG}=true" in capsys.readouterr().err
    command("analyze", path, *fix, "--format", "json")
    assert json.loads(capsys.readouterr().out)["model"]["fixed"] == LATER
    command("analyze", path, *fix)
    captured = capsys.readouterr()
    assert f"holds for    {FLAG}=true" in captured.out
    assert f"--fix {FLAG}=true" in captured.err
    command("plan", path, *fix, "--budget", "flops=70%", "-o", plan)
    command("apply", path, plan, "-o", slim)
    command("verify", path, plan, slim)
    capsys.readouterr()
    command("analyze", slim)
    assert f"holds for    {FLAG}=true" in capsys.readouterr().out
    command("diff", path, slim)
    command("card", slim)
    assert f'"fixed": {{"{FLAG}": true}}' in capsys.readouterr().out
    command("apply", path, plan, "--fix", f"{FLAG}=false", "-o", tmp_path / "x.onnx", code=3)
    error = capsys.readouterr().err
    assert f"p.json: model.lift: the plan was made for the network with {FLAG}=true" in error
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        ("use_cash_branch=true", 3, "m.onnx: input 'use_cash_branch': the model has no such input"),
        (f"{FLAG}=7", 3, f"m.onnx: input '{FLAG}' cannot be fixed to 7: it takes true or false"),
        (f"{FLAG}=maybe", 2, "'maybe' is no value; write true, false, 16000 or 0.5,1"),
        (FLAG, 2, f"'{FLAG}' is no assignment; write sr=16000"),
    ],
)
def test_commands_that_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, code: int, words: str
) -> None:
    command("analyze", write_merged(tmp_path / "m.onnx"), "--fix", value, code=code)
    assert words in " ".join(capsys.readouterr().err.split())


def test_bench_times_the_network_that_a_resized_file_holds(tmp_path: Path) -> None:
    path, slim = write_merged(tmp_path / "m.onnx"), tmp_path / "s.onnx"
    graph = mg.lift(path, fixed=LATER)
    mg.save(mg.apply(graph, mg.uniform(graph, 0.5)), slim)
    done = subprocess.run(
        [sys.executable, "-m", "morphgraph", "bench", path, slim, "--seconds", "0.01", "--quiet"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_folder_like_those_of_transformers_js(tmp_path: Path) -> None:
    folder, small = tmp_path / "whole", tmp_path / "small"
    (folder / "onnx").mkdir(parents=True)
    write_merged(folder / "onnx" / "decoder_model_merged.onnx")
    config = {"model_type": "gpt2", "n_embd": 8, "n_head": HEADS, "n_layer": BLOCKS, "n_inner": 12}
    config["vocab_size"] = IDS
    (folder / "config.json").write_text(json.dumps(config))
    fix = ("--fix", f"{FLAG}=true")
    command("plan", folder, *fix, "--budget", "flops=70%", "-o", tmp_path / "p.json")
    command("apply", folder, tmp_path / "p.json", "-o", small)
    made = onnx.load(small / "onnx" / "decoder_model_merged.onnx")
    assert FLAG not in [value.name for value in made.graph.input]
    assert json.loads((small / "config.json").read_text()) != config
