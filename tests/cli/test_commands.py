"""Every command on real models: what it prints, what it writes, and that both are right."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import morphgraph as mg
from morphgraph.device import DeviceProfile
from morphgraph.device.profile import Measurement
from morphgraph.onnx_io import save
from morphgraph.report.analysis import Analysis
from morphgraph.report.schemas import SCHEMAS, schema
from morphgraph.testing import model_from_text
from tests.cli.conftest import small_cnn

OPEN = """
net (float[1,3,H,W] x, float[8,3,3,3] w1, float[4,8,1,1] w2) => (float[1,4,P,Q] y) {
    a = Conv(x, w1)  y = Conv(a, w2)
}"""


SCHEMA_FOLDER = Path(__file__).parent.parent.parent / "docs" / "schema"

# MACs of the small network by hand: output positions x kernel x channels.
CONV1 = 10 * 10 * 9 * 3 * 8
CONV2 = 8 * 8 * 9 * 8 * 12
FC = 12 * 5
MACS = CONV1 + CONV2 + FC
PARAMS = 8 * 27 + 8 + 8 + 12 * 72 + 12 + 12 * 5 + 5


def test_analyze_json_has_the_promised_shape(model: Path, run: Any) -> None:
    ran = run("analyze", model, "--format", "json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["schema_version"] == 1
    assert found["model"]["opset"] == 20
    assert found["model"]["ops"] == 8
    assert len(found["model"]["sha256"]) == 64
    totals = found["totals"]
    assert totals["macs"] == MACS
    assert totals["flops"] == 2 * MACS
    assert totals["params"] == PARAMS
    assert totals["weight_bytes"] == 4 * (PARAMS + 16)
    assert totals["activation_bytes"] > totals["peak_activation_bytes"] > 0
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["conv1"]["macs"] == CONV1
    assert layers["conv2"]["output_shape"] == [1, 12, 8, 8]
    assert sum(layer["macs"] for layer in found["layers"]) == MACS
    groups = {group["name"]: group for group in found["groups"]}
    assert groups["conv1"]["width"] == 8
    assert groups["conv1"]["resizable"]
    assert groups["conv1"]["producers"] == ["conv1"]
    assert {"tensor": "conv2.weight", "axis": 1, "per_channel": 1} in groups["conv1"]["members"]
    assert groups["conv1"]["flops_per_channel"] == 2 * (CONV1 + CONV2) / 8
    assert groups["fc"]["reason"] == "graph output 'y'"
    assert not groups["fc"]["resizable"]
    assert found["opaque_ops"] == []
    assert found["not_finite"] == []
    assert found["reach"]["shrinkable_macs"] == MACS
    assert found["reach"]["lowest_macs"] == CONV1 // 8 + CONV2 // 96 + 5
    msgspec.json.decode(ran.out, type=Analysis, strict=True)


def test_analyze_tables(model: Path, run: Any) -> None:
    table = run("analyze", model).out
    assert "MACs" in table
    assert "2 x MACs" in table
    assert "convention 'default'" in table
    assert "graph output 'y'" in table
    rows = list(
        csv.DictReader(io.StringIO(run("analyze", model, "--by", "op", "--format", "csv").out))
    )
    assert sum(float(row["MACs"]) for row in rows) == MACS
    top = run("analyze", model, "--by", "layer", "--top", 1, "--format", "csv").out.splitlines()
    assert len(top) == 2
    assert top[1].startswith("conv2,")
    assert run("analyze", model, "--format", "md").out.count("|:---|:---|---:|") == 1


def test_analyze_prices_with_the_chosen_cost(model: Path, run: Any) -> None:
    for kind in ("flops", "params", "memory", "latency", "latency@P100", "flops+20*params"):
        found = json.loads(run("analyze", model, "--cost", kind, "--format", "json").out)
        expected = mg.cost(mg.lift(model), kind).total
        assert found["cost"]["total"] == expected
        outside = {"input", ""}  # memory of the model's input belongs to no layer
        if kind != "memory":
            assert sum(layer["cost"] for layer in found["layers"]) == pytest.approx(expected), (
                outside
            )


@pytest.mark.parametrize("name", ["conv1", "bn.running_mean"])
def test_explain(model: Path, run: Any, name: str) -> None:
    ran = run("analyze", model, "--explain", name)
    assert ran.code == 0
    assert "made by" in ran.out
    assert "conv2.weight" in ran.out
    assert "fc.weight" not in ran.out
    found = json.loads(run("analyze", model, "--explain", name, "--format", "json").out)
    assert [group["name"] for group in found["groups"]] == ["conv1"]
    assert found["groups"][0]["macs"]["per_channel"] == (CONV1 + CONV2) / 8
    assert found["groups"][0]["macs"]["share"] == (CONV1 + CONV2) / 8 / MACS
    rows = list(
        csv.DictReader(io.StringIO(run("analyze", model, "--explain", name, "--format", "csv").out))
    )
    assert [(row["operator"], row["does"]) for row in rows] == [
        ("c1", "makes"),
        ("n1", "carries on"),
        ("r1", "carries on"),
        ("c2", "sums over"),
    ]


def test_explain_lists_several_and_tells_of_what_is_no_group(model: Path, run: Any) -> None:
    listed = run("analyze", model, "--explain", "conv*")
    assert (listed.code, listed.err) == (0, "")
    assert "2 groups" in listed.out
    pinned = run("analyze", model, "--explain", "fc").out
    assert "graph output 'y'" in pinned
    assert "y[1] -> Gemm 'head'" in pinned
    operator = run("analyze", model, "--explain", "pool").out
    assert "GlobalAveragePool 'pool'" in operator
    assert "f[1]" in operator


def test_what_is_not_a_number_is_named(model: Path, run: Any) -> None:
    proto = onnx.load(model)
    tensor = next(t for t in proto.graph.initializer if t.name == "conv2.weight")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0, 0] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, "conv2.weight"))
    model.write_bytes(proto.SerializeToString())
    ran = run("analyze", model, "--format", "json")
    assert ran.code == 0
    assert "'conv2.weight'" in ran.err
    assert json.loads(ran.out)["not_finite"] == ["conv2.weight"]
    assert run("plan", model, "--budget", "flops=50%").code == 3
    assert run("plan", model, "--budget", "flops=50%", "--score", "random").code == 0


def test_an_unknown_operator_is_named_and_the_rest_can_shrink(model: Path, run: Any) -> None:
    proto = onnx.load(model)
    proto.graph.node[2].op_type = "Gate"
    proto.graph.node[2].domain = "com.acme"
    proto.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    shape = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [1, 8, 10, 10])
    proto.graph.value_info.append(shape)
    model.write_bytes(proto.SerializeToString())
    ran = run("analyze", model, "--format", "json")
    assert ran.code == 0
    assert "'r1'" in ran.err
    found = json.loads(ran.out)
    assert [op["name"] for op in found["opaque_ops"]] == ["r1"]
    resizable = {group["name"]: group["resizable"] for group in found["groups"]}
    assert not resizable["conv1"]
    assert resizable["conv2"]
    path, slim = model.with_name("p.json"), model.with_name("s.onnx")
    assert run("plan", model, "--set", "conv2=6", "-o", path).code == 0
    ran = run("apply", model, path, "-o", slim)
    assert ran.code == 3
    assert "--no-verify" in ran.err
    assert not slim.exists()
    assert run("apply", model, path, "-o", slim, "--no-verify").code == 0
    sizes = {t.name: list(t.dims) for t in onnx.load(slim).graph.initializer}
    assert sizes["conv2.weight"] == [6, 8, 3, 3]


def test_plan_json_has_the_promised_shape(model: Path, plan: Path, run: Any) -> None:
    printed = run("plan", model, "--budget", "flops=50%", "--format", "json").out
    assert printed == plan.read_text()
    found = json.loads(printed)
    assert found["schema_version"] == 1
    assert len(found["model"]["structure"]) == 64
    assert found["request"]["budget"] == {"flops": "50%"}
    assert found["cost"]["flops"]["before"] == 2 * MACS
    assert found["cost"]["flops"]["after"] <= MACS
    assert found["cost"]["params"]["before"] == PARAMS
    groups = {group["name"]: group for group in found["groups"].values()}
    assert groups["conv1"]["width"] == 8
    assert "fc" not in groups
    widths = {n: sum(b - a for a, b in group["keep"]) for n, group in groups.items()}
    conv1, conv2 = widths["conv1"], widths["conv2"]
    macs = CONV1 * conv1 // 8 + CONV2 * conv1 * conv2 // 96 + 5 * conv2
    assert found["cost"]["flops"]["after"] == 2 * macs


def test_the_same_input_gives_the_same_bytes(model: Path, plan: Path, run: Any) -> None:
    again = model.with_name("again.json")
    assert run("plan", model, "--budget", "flops=50%", "-o", again).code == 0
    assert again.read_bytes() == plan.read_bytes()
    for arguments in (
        ["analyze", model, "--format", "json"],
        ["plan", model, "--budget", "flops=50%", "--format", "json"],
        ["plan", model, "--budget", "flops=40%", "--score", "random", "--seed", "3"],
    ):
        assert run(*arguments).out == run(*arguments).out
    slims = [model.with_name(name) for name in ("s1.onnx", "s2.onnx")]
    for slim in slims:
        assert run("apply", model, plan, "-o", slim).code == 0
    assert slims[0].read_bytes() == slims[1].read_bytes()


def _widths(printed: str) -> dict[str, int]:
    rows = csv.DictReader(io.StringIO(printed))
    return {row["group"]: int(row["new width"]) for row in rows}


def test_plan_options(model: Path, run: Any) -> None:
    def widths(*options: object) -> dict[str, int]:
        ran = run("plan", model, *options, "--format", "csv")
        assert ran.code == 0, ran.err
        return _widths(ran.out)

    half = {"x": 3, "conv1": 4, "conv2": 6, "fc": 5}
    assert widths("--uniform", "0.5", "--round-to", 1) == half
    on_grid = half | {"conv2": 8}  # half of 12 is no multiple of 4
    assert widths("--uniform", "0.5") == widths("--uniform", "0.5", "--round-to", "auto") == on_grid
    assert run("plan", model, "--uniform", "0.5", "--round-to", "8x").code == 2
    assert widths("--set", "conv*=3") == {"x": 3, "conv1": 3, "conv2": 3, "fc": 5}
    assert widths("--set", "conv1=2", "--set", "conv2=7")["conv2"] == 7
    excluded = widths("--budget", "flops=50%", "--exclude", "conv1")
    assert excluded["conv1"] == 8
    assert excluded["conv2"] < 12
    assert widths("--budget", "flops=50%", "--include", "conv1")["conv2"] == 12
    rounded = widths("--budget", "flops=50%", "--round-to", 4)
    assert all(width % 4 == 0 for name, width in rounded.items() if name.startswith("conv"))
    assert min(widths("--budget", "flops=20%", "--min-width", 3).values()) == 3
    fitted = widths("--uniform", "fit", "--budget", "params=50%")
    assert 4 <= fitted["conv1"] < 8
    both = run("plan", model, "--budget", "flops=60%", "--budget", "params=30%", "--format", "json")
    cost = json.loads(both.out)["cost"]
    assert cost["flops"]["after"] <= 0.6 * 2 * MACS
    assert cost["params"]["after"] <= 0.3 * PARAMS


def test_a_plan_that_changes_nothing_says_so(model: Path, run: Any) -> None:
    ran = run("plan", model, "--budget", "flops=100%")
    assert ran.code == 0
    assert "warning: the plan changes nothing" in ran.err


def test_apply_and_verify(model: Path, plan: Path, run: Any) -> None:
    before = model.read_bytes()
    slim = model.with_name("slim.onnx")
    ran = run("apply", model, plan, "-o", slim, "--format", "json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["ok"]
    assert found["outputs"][0]["relative"] < found["tolerance"]
    assert found["outputs"][0]["sensitivity"] > 1e-2
    assert found["outputs"][0]["felt"] == found["outputs"][0]["sensitivity"]
    assert model.read_bytes() == before
    session = onnxruntime.InferenceSession(slim)
    (y,) = session.run(None, {"x": np.ones((1, 3, 10, 10), np.float32)})
    assert y.shape == (1, 5)
    old = {node.name for node in onnx.load(model).graph.node}
    assert {node.name for node in onnx.load(slim).graph.node} == old
    assert "computes what the masked original computes" in run("verify", model, plan, slim).out
    given = model.with_name("given.npz")
    np.savez(given, x=np.ones((1, 3, 10, 10), np.float32))
    assert run("verify", model, plan, slim, "--inputs", given).code == 0
    np.savez(given, image=np.ones((1, 3, 10, 10), np.float32))
    ran = run("verify", model, plan, slim, "--inputs", given)
    assert ran.code == 3
    assert "the model has no input 'image'; it takes 'x' (FLOAT [1,3,10,10])" in ran.err

    proto = onnx.load(slim)
    tensor = next(t for t in proto.graph.initializer if t.name == "conv2.weight")
    shifted = np.roll(onnx.numpy_helper.to_array(tensor), 1, axis=1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(shifted, "conv2.weight"))
    slim.write_bytes(proto.SerializeToString())
    ran = run("verify", model, plan, slim)
    assert ran.code == 1
    assert "'y'" in ran.err
    assert "slim.onnx" in ran.err
    assert ran.err.count("\n") == 1
    assert "WRONG" in ran.out


def test_diff(model: Path, plan: Path, run: Any) -> None:
    slim = model.with_name("slim.onnx")
    run("apply", model, plan, "-o", slim)
    found = json.loads(run("diff", model, slim, "--format", "json").out)
    assert found["before"]["totals"]["macs"] == MACS
    planned = json.loads(plan.read_bytes())["cost"]
    assert 2 * found["after"]["totals"]["macs"] == planned["flops"]["after"]
    assert found["after"]["totals"]["params"] == planned["params"]["after"]
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["conv1"]["output_before"] == [1, 8, 10, 10]
    assert layers["conv1"]["output_after"][1] < 8
    assert (found["added"], found["removed"]) == ([], [])
    same = json.loads(run("diff", model, model, "--format", "json").out)
    assert same["layers"] == []
    assert "conv1" in run("diff", model, slim).out

    proto = onnx.load(model)
    proto.graph.node[4].op_type, proto.graph.node[4].name = "Sigmoid", "s2"
    model.write_bytes(proto.SerializeToString())
    found = json.loads(run("diff", slim, model, "--format", "json").out)
    assert (found["added"], found["removed"]) == (["s2"], ["r2"])


def test_bench(model: Path, plan: Path, run: Any) -> None:
    slim = model.with_name("slim.onnx")
    run("apply", model, plan, "-o", slim)
    ran = run("bench", model, slim, "--seconds", "0.05", "--format", "json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    first, second = found["models"]
    for timing in (first, second):
        assert 0 < timing["min_ms"] <= timing["p50_ms"] <= timing["p90_ms"] <= timing["p99_ms"]
        assert timing["runs"] >= 10
    assert second["speedup_interval"][0] <= second["speedup"] <= second["speedup_interval"][1]
    planned = json.loads(plan.read_bytes())["cost"]["flops"]
    assert second["flops_ratio"] == pytest.approx(planned["before"] / planned["after"])
    assert "slim.onnx" in found["verdict"]
    assert "slim.onnx" in run("bench", slim, "--seconds", "0.01").out


def test_bench_shows_where_the_time_went(model: Path, plan: Path, run: Any) -> None:
    slim = model.with_name("slim.onnx")
    run("apply", model, plan, "-o", slim)
    command = ("bench", model, slim, "--seconds", "0.05", "--profile")
    (profile,) = json.loads(run(*command, "--format", "json").out)["profiles"]
    assert (profile["base"], profile["model"]) == (model.name, "slim.onnx")
    by_layer = {row["name"]: row for row in profile["layers"]}
    assert by_layer["conv1"]["flops_before"] == 2 * CONV1
    assert {"conv1", "conv2", "fc"} <= by_layer.keys()
    for side in ("before", "after"):
        total = profile[f"{side}_ms"]
        assert sum(row[f"{side}_ms"] for row in profile["kinds"]) == pytest.approx(total)
        assert sum(row[f"{side}_ms"] for row in profile["layers"]) == pytest.approx(total)
    printed = run(*command).out
    assert f"slim.onnx against {model.name} in ort: wall ms by the profiler, by kind" in printed
    assert "most missed of what FLOPs promised first" in printed
    alone = run("bench", model, "--seconds", "0.01", "--profile").out
    assert f"{model.name} in ort: wall ms by the profiler, by layer" in alone


def test_bench_sweeps_threads_and_batches(tmp_path: Path, run: Any) -> None:
    dynamic = tmp_path / "dynamic.onnx"
    mg.save(
        model_from_text(OPEN.replace("1,3,H,W", "N,3,9,8").replace("1,4,P,Q", "N,4,P,Q")), dynamic
    )
    command = ("bench", dynamic, "--seconds", "0.01", "--threads", "1,2", "--batch", "1,3")
    assert run("bench", dynamic, "--batch", "1,").code == 2
    points = json.loads(run(*command, "--format", "json").out)["points"]
    assert [(point["threads"], point["batch"]) for point in points] == [
        (1, 1),
        (1, 3),
        (2, 1),
        (2, 3),
    ]
    assert [point["clock"] for point in points] == ["cpu", "cpu", "wall", "wall"]
    printed = run(*command).out
    assert "threads" in printed
    assert "2 thread(s), batch 3: Measured is wall time at 2 threads." in printed


def test_a_setting_that_does_not_run_takes_nothing_from_those_before_it(
    tmp_path: Path, run: Any
) -> None:
    """A file that says that its batch is open, and is written for a batch of 1."""
    path = tmp_path / "one.onnx"
    text = """net (float[N,6] x, float[6,4] w) => (float[M,4] y) {
        s = Constant<value_ints=[1,6]>()  r = Reshape(x, s)  y = MatMul(r, w) }"""
    path.write_bytes(ir.to_proto(model_from_text(text)).SerializeToString())
    ran = run("bench", path, "--seconds", "0.01", "--batch", "1,2", "--format", "json")
    assert ran.code != 0
    assert "batch" in ran.err or "Reshape" in ran.err
    (point,) = json.loads(ran.out)["points"] if "points" in ran.out else [json.loads(ran.out)]
    assert point["batch"] == 1


def test_bench_in_a_runtime_of_ones_own(
    model: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    source = Path(__file__).parent.parent / "benchmark" / "pretended.py"
    (model.parent / "other_phone.py").write_bytes(source.read_bytes())
    slow, quick = model.with_name("slow.onnx"), model.with_name("quick.onnx")
    for path in (slow, quick):
        path.write_bytes(model.read_bytes())
    phones = ["--runtime", "other_phone:Phone", "--runtime", "other_phone:FastPhone"]
    ran = run("bench", slow, quick, *phones, "--seconds", "0.01")
    assert ran.code == 0, ran.err
    assert "fast phone" in ran.out
    assert "quick.onnx in phone is 2.00 times" in ran.out
    assert run("bench", model, "--runtime", "other_phone:Nothing", "--seconds", "0.01").code == 2


def test_bench_takes_sizes_that_the_file_leaves_open(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "open.onnx"
    mg.save(model_from_text(OPEN), path)
    ran = run("bench", path, "--seconds", "0.01")
    assert ran.code == 0
    assert "timed as `analyze` counts them: x=Nx3x224x224" in ran.err
    assert "x taken as 1x3x224x224" in run("analyze", path).out
    given = ["--input-shape", "x=1x3x9x8"]
    ran = run("bench", path, path, "--seconds", "0.01", *given, "--format", "json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["models"][1]["flops_ratio"] == 1
    assert run("bench", path, "--seconds", "0.01", "--input-shape", "x=1x4x9x8").code == 3
    ran = run("bench", path, "--seconds", "0.01", *given, "--input-shape", "z=1x1")
    assert ran.code == 3
    assert "input 'z': the model has no such input" in ran.err


def test_a_plan_remembers_the_sizes_of_inputs(tmp_path: Path, run: Any) -> None:
    path, plan, slim = (tmp_path / name for name in ("open.onnx", "p.json", "s.onnx"))
    mg.save(model_from_text(OPEN), path)
    given = ["--input-shape", "x=1x3x8x8"]
    assert run("plan", path, "--uniform", "0.5", "-o", plan, *given).code == 0
    assert run("apply", path, plan, "-o", slim).code == 0
    assert run("verify", path, plan, slim).code == 0
    ran = run("verify", path, plan, slim, "--input-shape", "x=1x3x9x9")
    assert ran.code == 3
    assert "x=1x3x8x8" in ran.err


def test_attention_is_chosen_once(tmp_path: Path, run: Any, attention_model: ir.Model) -> None:
    path = tmp_path / "attention.onnx"
    mg.save(attention_model, path)

    def width(*options: object) -> int:
        found = json.loads(run("analyze", path, "--format", "json", *options).out)
        return max(group["width"] for group in found["groups"] if group["resizable"])

    assert width() == width("--attention", "heads") == 3
    assert width("--attention", "head-dim") == 4
    plan, wide, slim = (tmp_path / name for name in ("p.json", "w.json", "s.onnx"))
    by_size = ["--attention", "head-dim"]
    assert run("plan", path, "--uniform", "0.5", "-o", plan, *by_size).code == 0
    assert json.loads(plan.read_bytes())["model"]["lift"] == {"attention": "head-dim"}
    assert run("expand", path, plan, "--budget", "flops=80%", "-o", wide).code == 0
    assert json.loads(wide.read_bytes())["model"]["lift"] == {"attention": "head-dim"}
    assert run("apply", path, plan, "-o", slim).code == 0
    assert run("verify", path, plan, slim, *by_size).code == 0
    assert run("diff", path, slim, *by_size).code == 0
    sizes = {t.name: list(t.dims) for t in onnx.load(slim).graph.initializer}
    assert sizes["wq"] == [8, 6]
    ran = run("apply", path, plan, "-o", slim, "--overwrite", "--attention", "heads")
    assert ran.code == 3
    assert "was made with --attention head-dim" in ran.err


def test_doctor(run: Any) -> None:
    found = json.loads(run("doctor", "--format", "json").out)
    assert found["packages"]["onnxruntime"] == onnxruntime.__version__
    assert found["execution_providers"] == onnxruntime.get_available_providers()
    assert found["cpu"]["usable"] >= 1
    assert "onnxruntime" in run("doctor").out


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_published_schemas_are_up_to_date(name: str) -> None:
    """If not: python tools/write_schemas.py."""
    assert (SCHEMA_FOLDER / f"{name}.schema.json").read_bytes() == schema(name)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("analysis", ["analyze", "{model}"]),
        ("plan", ["plan", "{model}", "--uniform", "0.5"]),
        ("diff", ["diff", "{model}", "{model}"]),
        ("explanation", ["analyze", "{model}", "--explain", "conv1"]),
        ("bench", ["bench", "{model}", "{model}", "--seconds", "0.01", "--profile"]),
        ("bench-sweep", ["bench", "{model}", "--seconds", "0.01", "--threads", "1,2"]),
        ("shrink", ["shrink", "{model}", "--data", "{data}", "--curve"]),
        ("shrink", ["shrink", "{model}", "--data", "{data}", "--set", "conv1=50%", "-o", "{out}"]),
        ("check", ["apply", "{model}", "{plan}", "-o", "{out}"]),
        ("check", ["apply", "{model}", "{plan}", "-o", "{out}", "--no-verify"]),
        ("shrink", ["apply", "{model}", "{plan}", "-o", "{out}", "--refit", "{data}"]),
        ("sensitivity", ["plan", "{model}", "--sensitivity"]),
        ("doctor", ["doctor"]),
        ("dry-run", ["apply", "{model}", "{plan}", "-o", "{out}", "--dry-run"]),
        ("plan", ["expand", "{model}", "{plan}", "--budget", "flops=100%", "-o", "{out}"]),
    ],
)
def test_what_is_printed_fits_its_schema(
    model: Path, plan: Path, run: Any, name: str, arguments: list[str]
) -> None:
    data, out = model.with_name("data.npz"), model.with_name("out.onnx")
    np.savez(data, x=np.random.default_rng(0).standard_normal((9, 3, 10, 10)).astype(np.float32))
    line = [argument.format(model=model, data=data, out=out, plan=plan) for argument in arguments]
    ran = run(*line, "--format", "json")
    printed: Any = json.loads(ran.out)
    published = json.loads((SCHEMA_FOLDER / f"{name}.schema.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(published)
    jsonschema.validate(printed, published)
    top = published["$defs"][published["$ref"].rpartition("/")[2]]
    assert set(printed) <= set(top["properties"])
    msgspec.convert(printed, SCHEMAS[name])
    assert json.loads(run("schema", name).out) == published


def test_files_fit_their_schemas(tmp_path: Path) -> None:
    """Profiles and rankings, as programs write and read them; what does not fit is refused."""
    kernel = Measurement("Conv", ((1, 3, 8, 8), (8, 3, 3, 3)), ((1, 8, 8, 8),), 3.5)
    DeviceProfile("ort", 1, [kernel]).save(tmp_path / "device.json")
    graph = mg.lift(small_cnn())
    ranking = mg.Ranking.of(graph, [mg.uniform(graph, 0.5)])
    (tmp_path / "ranking.json").write_bytes(ranking.to_json())
    for name in ("device", "ranking"):
        published = json.loads((SCHEMA_FOLDER / f"{name}.schema.json").read_bytes())
        written = json.loads((tmp_path / f"{name}.json").read_bytes())
        jsonschema.validate(written, published)
        for key in [key for key in written if key != "schema_version"][:2]:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(written | {key: None}, published)


def test_schemas_are_listed(run: Any) -> None:
    assert [line.split()[0] for line in run("schema").out.splitlines()] == list(SCHEMAS)
    ran = run("schema", "analsis")
    assert ran.code == 2
    assert "did you mean 'analysis'" in ran.err


def test_export_and_the_whole_way(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from morphgraph.testing.examples import residual_cnn\n"
        "def small(**arguments):\n"
        "    return residual_cnn(**arguments)\n"
        "def broken():\n"
        "    raise ValueError('two\\nlines')\n"
        "number = 3\n"
    )
    ran = run(
        "export", "my_nets:small", "-k", "widths=8,16", "-k", "classes=5", "--input", "1x1x8x8",
        "-o", "m.onnx",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    names = {t.name: list(t.dims) for t in onnx.load("m.onnx").graph.initializer}
    assert names["blocks.1.conv1.weight"] == [16, 8, 3, 3]
    assert names["fc.weight"] == [5, 16]
    assert run("plan", "m.onnx", "--budget", "flops=50%", "-o", "p.json").code == 0
    assert run("apply", "m.onnx", "p.json", "-o", "s.onnx").code == 0
    assert run("export", "my_nets:broken", "--input", "1", "-o", "n.onnx").code == 3
    assert run("export", "my_nets:number", "--input", "1", "-o", "n.onnx").code == 2
    bad = run("export", "my_nets:small", "--input", "1x3x8x8", "-o", "n.onnx")
    assert bad.code == 3
    assert bad.err.count("\n") == 1
    assert not Path("n.onnx").exists()
    assert str(tmp_path) not in sys.path


def test_export_with_a_dynamic_batch(tmp_path: Path, run: Any) -> None:
    path, plan, slim = (tmp_path / name for name in ("m.onnx", "p.json", "s.onnx"))
    ran = run(
        "export", "morphgraph.testing.examples:residual_cnn", "--input", "image=1x1x8x8",
        "--dynamic-batch", "-o", path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    run("plan", path, "--uniform", "0.5", "-o", plan)
    assert run("apply", path, plan, "-o", slim).code == 0
    session = onnxruntime.InferenceSession(slim)
    for batch in (1, 3):
        (y,) = session.run(None, {"image": np.ones((batch, 1, 8, 8), np.float32)})
        assert y.shape == (batch, 10)


def test_a_network_of_torchvision(tmp_path: Path, run: Any) -> None:
    path, plan, slim = (tmp_path / name for name in ("r18.onnx", "p.json", "slim.onnx"))
    ran = run("export", "torchvision.models:resnet18", "--input", "1x3x64x64", "-o", path)
    assert ran.code == 0, ran.err
    found = json.loads(run("analyze", path, "--format", "json").out)
    assert found["totals"]["params"] == 11_689_512  # torchvision's own figure
    assert sum(group["resizable"] for group in found["groups"]) == 12
    ran = run("plan", path, "--budget", "flops=50%", "--round-to", 8, "-o", plan)
    assert ran.code == 0
    ran = run("apply", path, plan, "-o", slim, "--format", "json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["outputs"][0]["relative"] < 1e-4
    assert 0.45 < slim.stat().st_size / path.stat().st_size < 0.75


def test_expand(model: Path, plan: Path, run: Any) -> None:
    """A plan grown to twice the model applies, and computes what the small one computes."""
    wide, slim = model.with_name("wide.json"), model.with_name("wide.onnx")
    ran = run("expand", model, plan, "--budget", "flops=200%", "-o", wide, "--format", "json")
    assert ran.code == 0, ran.err
    assert ran.out == wide.read_text()
    found = json.loads(ran.out)
    assert 2 * MACS < found["cost"]["flops"]["after"] <= 4 * MACS
    assert all(group["new"] > 0 for group in found["groups"].values())
    assert run("apply", model, wide, "-o", slim).code == 0
    assert run("verify", model, plan, slim).code == 0
    ran = run("expand", model, plan, "--budget", "flops=0.01%", "-o", model.with_name("no.json"))
    assert ran.code == 1
    assert not model.with_name("no.json").exists()


def test_budgets_on_a_device_and_on_a_weighted_sum(model: Path, run: Any) -> None:
    graph = mg.lift(model)
    ms = mg.cost(graph, "latency@P100").total
    assert ms != mg.cost(graph, "latency").total
    small, wide = model.with_name("small.json"), model.with_name("wide.json")
    budgets = ("--budget", "flops+20*params=60%", "--budget", f"latency@P100={0.8 * ms}ms")
    ran = run("plan", model, *budgets, "-o", small)
    assert ran.code == 0, ran.err
    assert "mixed units" in ran.out
    assert run("expand", model, small, *budgets, "-o", wide).code == 0
    cost = json.loads(wide.read_text())["cost"]
    assert cost["latency@P100"]["before"] == ms
    assert cost["latency@P100"]["after"] <= 0.8 * ms
    total, params, flops = (cost[kind] for kind in ("flops+20*params", "params", "flops"))
    assert total["after"] == flops["after"] + 20 * params["after"] <= 0.6 * total["before"]
    ran = run("plan", model, "--budget", "latency@P10=1ms")
    assert (ran.code, "device 'P10' is unknown" in ran.err) == (2, True)


def test_apply_with_fresh_weights(model: Path, plan: Path, run: Any) -> None:
    """The check is made with the model's weights, so that it says the same; then others stand."""
    out = {}
    for how, seed in (("keep", 0), ("fresh", 1), ("fresh", 2)):
        slim = model.with_name(f"{how}{seed}.onnx")
        arguments = ("--weights", how, "--seed", seed, "-o", slim, "--format", "json")
        ran = run("apply", model, plan, *arguments)
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["outputs"][0]["relative"] < 1e-4
        found = mg.load(slim).graph.initializers
        out[how, seed] = {name: value.const_value.numpy() for name, value in found.items()}
    one, other = out["fresh", 1], out["fresh", 2]
    assert {n: a.shape for n, a in one.items()} == {n: a.shape for n, a in out["keep", 0].items()}
    assert (one["bn.weight"] == 1).all()
    assert (one["bn.running_mean"] == 0).all()
    assert np.abs(one["conv1.weight"]).max() <= 27**-0.5
    assert not np.isin(one["fc.weight"], other["fc.weight"]).any()
    ran = run("apply", model, plan, "--weights", "fresh", "--absorb", "-o", "no.onnx")
    assert ran.code == 2
    assert "absorb" in ran.err


def test_expand_within_bounds(model: Path, plan: Path, run: Any) -> None:
    wide = model.with_name("wide.json")
    bounds = ("--max-growth", "1.5", "--max-width", "*1=9", "--round-to", "3", "--min-width", "6")
    ran = run("expand", model, plan, "--budget", "flops=900%", *bounds, "-o", wide, "--no-fill")
    assert ran.code == 0, ran.err
    groups = json.loads(wide.read_text())["groups"].values()
    widths = {g["name"]: g["new"] + sum(b - a for a, b in g["keep"]) for g in groups}
    assert widths == {"conv1": 9, "conv2": 18}
    ran = run("expand", model, plan, "--budget", "flops=90%", "--max-width", "*=0", "-o", "n.json")
    assert ran.code == 2
    assert "max_width '*=0': give a whole number from 1" in ran.err


def residual(folder: Path) -> Path:
    path = folder / "residual.onnx"
    text = """
    net (float[1,3,6,6] x, float[8,3,1,1] w_stem, float[6,8,3,3] w_inner,
         float[6] b_inner, float[8,6,1,1] w_outer, float[8] b_outer,
         float[2,8,1,1] w_head) => (float[1,2,6,6] y) {
        a = Conv(x, w_stem)  r = Relu(a)  b = Conv<pads=[1,1,1,1]>(r, w_inner, b_inner)
        s = Sigmoid(b)  c = Conv(s, w_outer, b_outer)  d = Add(r, c)  e = Relu(d)
        y = Conv(e, w_head)
    }"""
    save(model_from_text(text), path)
    return path


def test_layers_are_removed_and_reported(tmp_path: Path, run: Any) -> None:
    model, plan, slim = residual(tmp_path), tmp_path / "plan.json", tmp_path / "slim.onnx"
    shown = run("plan", model, "--set", "Conv_b=0", "-o", plan).out
    assert "removed layer" in shown
    assert "Conv_c" in shown
    applied = run("apply", model, plan, "-o", slim)
    assert applied.code == 0
    assert "Conv_b, Sigmoid_s, Conv_c" in applied.out
    assert run("verify", model, plan, slim).code == 0
    found = json.loads(run("diff", model, slim, "--format", "json").out)
    assert [layer["name"] for layer in found["removed_layers"]] == ["Conv_b", "Sigmoid_s", "Conv_c"]
    assert (
        found["after"]["totals"]["params"]
        == json.loads(plan.read_bytes())["cost"]["params"]["after"]
    )
    assert "removed" in run("diff", model, slim).out

    refused = run("plan", model, "--set", "Conv_a=0")
    assert refused.code == 3
    assert "no longer depend on any input" in refused.err
    low = run("plan", model, "--budget", "flops=2%", "--min-width", "0", "--round-to", "4")
    assert low.code == 1
    assert "the lowest that can is" in low.err
    options = ["--budget", "flops=8%", "--min-width", "0", "--round-to", "4", "--format", "json"]
    made = json.loads(run("plan", model, *options).out)
    assert [group["keep"] for group in made["groups"].values()][1] == []


def test_absorb_on_the_command_line(model: Path, run: Any) -> None:
    """A channel whose BatchNorm scale is 0 is dropped without a change of the outputs."""
    proto = onnx.load(model)
    (scale,) = [w for w in proto.graph.initializer if w.name == "bn.weight"]
    array = onnx.numpy_helper.to_array(scale).copy()
    array[[2, 5]] = 0.0
    scale.CopyFrom(onnx.numpy_helper.from_array(array, "bn.weight"))
    (shift,) = [w for w in proto.graph.initializer if w.name == "bn.bias"]
    shift.CopyFrom(onnx.numpy_helper.from_array(np.ones(8, np.float32), "bn.bias"))
    model.write_bytes(proto.SerializeToString())
    plan, slim = model.with_name("plan.json"), model.with_name("slim.onnx")
    assert run("plan", model, "--set", "conv1=6", "--score", "bn", "-o", plan).code == 0
    ran = run("apply", model, plan, "-o", slim, "--absorb")
    assert (ran.code, "warning" in ran.err) == (0, False)
    assert run("verify", model, plan, slim).code == 0
    x = {"x": np.random.default_rng(0).standard_normal((1, 3, 10, 10), np.float32)}
    before, after = (onnxruntime.InferenceSession(p).run(None, x)[0] for p in (model, slim))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_wishes_for_single_groups(model: Path, run: Any, tmp_path: Path) -> None:
    """By hand beside a budget, one width for two groups, classes by index, each in the plan."""

    def widths(*options: object) -> dict[str, int]:
        ran = run("plan", model, *options, "--format", "csv")
        assert ran.code == 0, ran.err
        rows = list(csv.DictReader(io.StringIO(ran.out.split("\n\n")[0])))
        return {row["group"]: int(row["new width"]) for row in rows}

    whole = widths("--uniform", "1")
    names = [name for name in whole if name.startswith("conv")]
    half = widths("--budget", "flops=60%", "--set", f"{names[0]}=50%")
    assert half[names[0]] == whole[names[0]] // 2
    later = widths("--uniform", "0.5", "--set", "conv*=2", "--set", f"{names[0]}=3")
    assert [later[name] for name in names] == [3, *[2] * (len(names) - 1)]
    kept = tmp_path / "classes.json"
    assert widths("--keep-classes", "0,2", "--budget", "flops=60%", "-o", kept)["fc"] == 2
    request = json.loads(kept.read_bytes())["request"]
    assert request["keep_classes"] == [0, 2]
    assert run("plan", model, "--budget", "flops=50%", "--same", "fc").code == 3


def test_sensitivity_is_a_table_of_groups(model: Path, run: Any, tmp_path: Path) -> None:
    shown = json.loads(run("plan", model, "--sensitivity", "--format", "json").out)
    errors = [max(row["error"].values()) for row in shown["rows"]]
    assert errors == sorted(errors)
    assert min(errors) > 0
    table = run("plan", model, "--sensitivity", "--format", "csv")
    assert len(table.out.strip().splitlines()) == 1 + len(errors)
    assert run("plan", model, "--sensitivity", "--budget", "flops=50%").code == 2
    assert run("plan", model, "--budget", "flops=50%", "--inputs", "x.npz").code == 2
    assert run("plan", model, "--sensitivity", "--inputs", tmp_path / "no.npz").code == 4
    folder = tmp_path / "sets"
    folder.mkdir()
    for seed in (0, 1):
        x = np.random.default_rng(seed).standard_normal((1, 3, 10, 10))
        np.savez(folder / f"{seed}.npz", x=x)
    table = run("plan", model, "--sensitivity", "--inputs", folder, "--format", "csv")
    assert len(table.out.strip().splitlines()) == 1 + len(errors)
    np.savez(folder / "2.npz", x=x[:, :2])
    refused = run("plan", model, "--sensitivity", "--inputs", folder)
    assert refused.code == 3
    assert "2.npz: input 'x' is float64 [1,2,10,10]" in refused.err


def test_apply_folded(model: Path, plan: Path, run: Any) -> None:
    """The file for shipping computes what the other does, without a BatchNorm."""
    slim, ship = model.with_name("slim.onnx"), model.with_name("ship.onnx")
    assert run("apply", model, plan, "-o", slim).code == 0
    assert run("apply", model, plan, "-o", ship, "--fold").code == 0
    kinds = [{node.op_type for node in onnx.load(path).graph.node} for path in (slim, ship)]
    assert kinds[0] - kinds[1] == {"BatchNormalization"}
    x = {"x": np.random.default_rng(0).standard_normal((1, 3, 10, 10), np.float32)}
    before, after = (onnxruntime.InferenceSession(p).run(None, x)[0] for p in (slim, ship))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * abs(before).max())
