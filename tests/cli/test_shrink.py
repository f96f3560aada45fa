"""``shrink``, ``plan --score data`` and ``apply --refit``: what they say, and what they write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

import morphgraph as mg
from morphgraph.arrays import Array
from morphgraph.calibration import Samples
from morphgraph.errors import ArgumentError, PlanError
from morphgraph.testing import model_from_text, randomize_weights
from morphgraph.testing.examples import image, residual_cnn

BUDGET = ("--budget", "flops=70%")


@pytest.fixture
def model(model: Path) -> Path:
    """The small network with an open batch, and metadata of its own."""
    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.helper.set_model_props(proto, {"trained on": "noise"})
    model.write_bytes(proto.SerializeToString())
    return model


def inputs(count: int = 60, seed: int = 0) -> Array:
    """Noise that is alike in places beside each other, as images are."""
    rough = np.random.default_rng(seed).standard_normal((count, 3, 5, 5))
    return rough.repeat(2, 2).repeat(2, 3).astype(np.float32)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "calib.npz"
    np.savez(path, x=inputs())
    return path


def results(model: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(model.read_bytes())
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


def held_out(model: Path, data: Path) -> Array:
    """The inputs that are kept aside; which these are is not what is tested here."""
    _, aside = Samples.of(data, mg.load(model), 512).split()
    return np.concatenate([feed["x"] for feed in aside.batches(100)])


def relative(wanted: Array, given: Array) -> float:
    return float(np.sqrt(np.square(given - wanted).mean() / np.square(wanted).mean()))


def test_it_says_what_to_expect_and_that_comes(model: Path, data: Path, run: Any) -> None:
    slim, plan = model.with_name("slim.onnx"), model.with_name("plan.json")
    line = ("--budget", "flops=40%", "-o", slim, "--plan", plan, "--format", "json")
    ran = run("shrink", model, "--data", data, *line)
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["schema_version"] == 1
    assert said["calibration"] == {"data": f"60 samples of {data}", "fitted": 48, "held_out": 12}
    assert said["cost"]["flops"]["after"] <= 0.4 * said["cost"]["flops"]["before"]
    assert said["verified"]
    aside = held_out(model, data)
    wanted, given = results(model, aside), results(slim, aside)
    (refitted,) = said["result"]["refitted"]
    assert refitted["name"] == "y"
    assert refitted["error"] == pytest.approx(relative(wanted, given), rel=1e-3)
    agreement = (wanted.argmax(axis=1) == given.argmax(axis=1)).mean()
    assert refitted["agreement"] == pytest.approx(agreement)
    # The same plan without a refit, by the program that does not know of calibration.
    small = mg.apply(model, mg.Plan.load(plan))
    mg.save(small, sliced := model.with_name("sliced.onnx"))
    (resized,) = said["result"]["resized"]
    assert resized["error"] == pytest.approx(relative(wanted, results(sliced, aside)), rel=1e-3)
    assert refitted["error"] < 0.7 * resized["error"]
    assert [layer["name"] for layer in said["result"]["layers"]] == ["c1", "c2", "head"]
    notes = {entry.key: entry.value for entry in onnx.load(slim).metadata_props}
    assert notes["trained on"] == "noise"
    assert json.loads(notes["morphgraph.error"])["y"] == pytest.approx(refitted["error"], rel=0.05)
    assert ran.err.splitlines()[-2:] == [f"wrote {slim}", f"wrote {plan}"]


def test_the_table_for_people(model: Path, data: Path, run: Any) -> None:
    slim = model.with_name("slim.onnx")
    line = ("shrink", model, "--data", data, *BUDGET, "-o", slim)
    ran = run(*line)
    assert ran.code == 0
    assert f"calibration  60 samples of {data}: 48 to fit to, 12 held out to judge by\n" in ran.out
    for word in ("What to expect", "resized", "refitted", "same arg max", "cosine", "MACs"):
        assert word in ran.out
    verbose = run(*line, "-v", "--overwrite")
    assert verbose.out == ran.out
    assert "layer 'head': error" in verbose.err
    assert "layer '" not in ran.err
    bare = run(*line, "--no-refit", "--no-verify", "--overwrite")
    assert "refitted" not in bare.out
    assert "not done (--no-verify)" in bare.out


def test_a_plan_by_data_and_then_a_refit_are_the_same(model: Path, data: Path, run: Any) -> None:
    slim, plan, other = (model.with_name(n) for n in ("slim.onnx", "plan.json", "other.onnx"))
    assert run("shrink", model, "--data", data, *BUDGET, "-o", slim).code == 0
    assert run("plan", model, "--score", "data", "--data", data, *BUDGET, "-o", plan).code == 0
    ran = run("apply", model, plan, "--refit", data, "-o", other, "--format", "json")
    assert ran.code == 0
    x = inputs(8, seed=1)
    np.testing.assert_allclose(results(other, x), results(slim, x), atol=1e-5)
    (error,) = json.loads(ran.out)["result"]["refitted"]
    aside = held_out(model, data)
    assert error["error"] == pytest.approx(relative(*(results(m, aside) for m in (model, other))))
    request = json.loads(plan.read_bytes())["request"]
    assert (request["score"], request["samples"]) == ("data", 60)
    # The same from Python.
    made = mg.plan(mg.lift(model), {"flops": "70%"}, score="data", data=inputs())
    assert made.groups == mg.Plan.load(plan).groups
    mg.save(mg.apply(model, made, refit=inputs()), third := model.with_name("third.onnx"))
    np.testing.assert_allclose(results(third, x), results(slim, x), atol=1e-5)


@pytest.mark.parametrize("score", ["data", "variance", "activation"])
@pytest.mark.parametrize("how", [BUDGET, ("--uniform", "0.5"), (*BUDGET, "--uniform", "fit")])
def test_every_score_of_data_makes_plans(
    score: str, how: tuple[str, ...], model: Path, data: Path, run: Any
) -> None:
    """A channel that is always zero behind its ReLU gives nothing, whatever its kernel's norm."""
    proto = onnx.load(model)
    for tensor in proto.graph.initializer:
        if tensor.name == "bn.bias":
            shift = onnx.numpy_helper.to_array(tensor).copy()
            shift[3] = -1000
            tensor.CopyFrom(onnx.numpy_helper.from_array(shift, tensor.name))
    model.write_bytes(proto.SerializeToString())
    line = ("plan", model, "--score", score, "--data", data, *how, "--round-to", "1")
    plan = model.with_name("plan.json")
    assert run(*line, "-o", plan).code == 0
    first = plan.read_bytes()
    (group,) = [g for g in json.loads(first)["groups"].values() if g["name"] == "conv1"]
    assert not any(start <= 3 < stop for start, stop in group["keep"])
    assert run(*line, "-o", plan, "--overwrite").code == 0
    assert plan.read_bytes() == first


def test_classes_may_go_too(model: Path, data: Path, run: Any) -> None:
    plan, slim = model.with_name("plan.json"), model.with_name("slim.onnx")
    score = ("--score", "data", "--data", data, *BUDGET)
    assert run("plan", model, *score, "--keep-classes", "0,3", "-o", plan).code == 0
    ran = run("apply", model, plan, "--refit", data, "-o", slim, "--format", "json")
    assert ran.code == 0
    aside = held_out(model, data)
    wanted, given = results(model, aside)[:, [0, 3]], results(slim, aside)
    (error,) = json.loads(ran.out)["result"]["refitted"]
    assert error["error"] == pytest.approx(relative(wanted, given), rel=1e-3)
    assert error["error"] < 0.2


def test_budgets_of_other_costs_have_their_unit(model: Path, data: Path, run: Any) -> None:
    slim = model.with_name("slim.onnx")
    line = ("--budget", "memory=80%", "--budget", "latency=90%", "--no-refit", "-o", slim)
    ran = run("shrink", model, "--data", data, *line)
    assert ran.code == 0
    titles = [row.partition("  ")[0] for row in ran.out.splitlines()]
    assert {"memory (bytes)", "latency (ms)"} <= set(titles)


def test_a_curve_alone_writes_nothing(model: Path, data: Path, run: Any) -> None:
    before = sorted(model.parent.iterdir())
    line = ("shrink", model, "--data", data, "--curve")
    ran = run(*line)
    assert ran.code == 0
    assert "What budgets on FLOPs do" in ran.out
    assert "nothing written" in ran.err
    assert sorted(model.parent.iterdir()) == before
    said = json.loads(run(*line, "--budget", "params=50%", "--format", "json").out)
    assert said["curve_of"] == "params"
    assert said["result"] is None
    assert [point["share"] for point in said["curve"]] == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert all(0 < point["reached"] <= point["share"] for point in said["curve"])
    errors = [point["outputs"][0]["error"] for point in said["curve"]]
    assert errors[0] < errors[-1]


def test_a_curve_ends_where_no_plan_reaches(model: Path, data: Path, run: Any) -> None:
    slim, plot = model.with_name("slim.onnx"), model.with_name("curve.svg")
    line = ("--min-width", "7", "--budget", "flops=80%", "-o", slim, "--plot", plot)
    ran = run("shrink", model, "--data", data, *line, "--format", "json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    shares = [point["share"] for point in said["curve"]]
    assert shares == [0.9, 0.8, 0.7]  # 7 of 8 and 7 of 12 channels leave 61 %
    assert (
        "No plan reaches 60% of FLOPs"
        in run("shrink", model, "--data", data, *line[:2], "--curve").out
    )
    paths = ET.fromstring(plot.read_text()).iter("{http://www.w3.org/2000/svg}path")
    points = [p for p in paths if p.attrib.get("aria-roledescription") == "point"]
    assert len(points) == len(shares)
    assert slim.exists()


def test_a_folder_of_images_is_the_same_as_their_arrays(
    model: Path, tmp_path: Path, run: Any
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 10, 10, 3), dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{number:02}.png")
    arrays = ((pixels / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]).transpose(0, 3, 1, 2)
    np.savez(tmp_path / "same.npz", x=arrays.astype(np.float32))
    said = []
    for source, flags in (
        (folder, ("--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3")),
        (tmp_path / "same.npz", ()),
    ):
        slim = tmp_path / f"{source.stem}.onnx"
        line = ("--data", source, *flags, *BUDGET, "-o", slim, "--format", "json")
        ran = run("shrink", model, *line)
        assert ran.code == 0, ran.err
        said.append(json.loads(ran.out))
    assert "mean 0.4,0.5,0.6" in said[0]["calibration"]["data"]
    first, second = (s["result"]["refitted"][0]["error"] for s in said)
    assert first == pytest.approx(second, rel=1e-3)


def test_tuning_is_told(model: Path, data: Path, run: Any) -> None:
    slim = model.with_name("slim.onnx")
    line = ("--data", data, *BUDGET, "-o", slim, "--tune", "5", "--fold", "--format", "json")
    ran = run("shrink", model, *line)
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)["result"]
    aside = held_out(model, data)
    found = relative(results(model, aside), results(slim, aside))
    assert said["tuned"][0]["error"] == pytest.approx(found, rel=1e-3)
    assert said["tuned"][0]["error"] <= said["refitted"][0]["error"]
    proto = onnx.load(slim)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    kept = [e.key for e in proto.metadata_props if not e.key.startswith("morphgraph.")]
    assert kept == ["trained on"]


def test_biases_that_are_new_can_be_trained() -> None:
    """The refit gives convolutions without biases some; exported models list their parameters."""
    net = randomize_weights(residual_cnn((8, 16)), image(1, 8, 8))
    model = mg.export(net, (image(1, 8, 8),), dynamic_batch=True)
    x = np.random.default_rng(0).standard_normal((64, 1, 8, 8)).astype(np.float32)
    small = mg.shrink(model, x, {"flops": "60%"}).model
    biases = {
        node.inputs[2].name
        for node in small.graph
        if node.op_type == "Conv" and len(node.inputs) > 2 and node.inputs[2] is not None
    }
    assert biases - set(model.graph.initializers)
    assert biases <= dict(mg.to_torch(small).named_parameters()).keys()


_Make = Callable[[Path], object]


def _save(name: str, array: Array) -> _Make:
    return lambda path: np.savez(path, allow_pickle=False, **{name: array})


def _with_nan() -> Array:
    x = inputs()
    x[7, 1, 2, 3] = np.nan
    return x


@pytest.mark.parametrize(
    ("make", "code", "fragment"),
    [
        (_save("y", inputs()), 3, "no input 'y'; it takes 'x'"),
        (_save("x", inputs()[:, :2]), 3, "float32 [60,2,10,10]; the model takes 'x'"),
        (_save("x", np.array(["a"] * 9)), 3, "the model takes 'x' (FLOAT"),
        (_save("x", inputs().astype(np.int64)), 3, "--mean and --std"),
        (_save("x", _with_nan()), 3, "'x' is nan at [7, 1, 2, 3]"),
        (_save("x", inputs(1)), 3, "1 sample of"),
        (_save("x", inputs()[:0]), 3, "there are no samples"),
        (lambda path: path.write_text("junk"), 3, "cannot be read"),
        (lambda path: path.mkdir(), 3, "holds no files; give a folder of images"),
        (lambda path: None, 4, "No such file"),
    ],
)
@pytest.mark.parametrize("command", ["shrink", "plan", "apply"])
def test_bad_data_are_told_in_one_line_and_nothing_is_written(
    command: str, make: _Make, code: int, fragment: str, model: Path, run: Any
) -> None:
    data, plan = model.with_name("bad.npz"), model.with_name("plan.json")
    make(data)
    assert run("plan", model, "--uniform", "0.5", "-o", plan).code == 0
    before = sorted(model.parent.iterdir())
    lines: dict[str, tuple[object, ...]] = {
        "shrink": ("--data", data, *BUDGET, "--plan", model.with_name("p.json")),
        "plan": ("--score", "data", "--data", data, *BUDGET),
        "apply": (plan, "--refit", data),
    }
    ran = run(command, model, *lines[command], "-o", model.with_name("out"))
    assert (ran.code, ran.out) == (code, "")
    errors = [line for line in ran.err.splitlines() if not line.startswith("calibration data: ")]
    (error,) = errors
    assert error.startswith("morphgraph: error: ")
    assert fragment in error
    assert sorted(model.parent.iterdir()) == before


def test_too_few_samples_are_said(model: Path, tmp_path: Path, run: Any) -> None:
    np.savez(tmp_path / "few.npz", x=inputs(6))
    slim = model.with_name("slim.onnx")
    ran = run("shrink", model, "--data", tmp_path / "few.npz", *BUDGET, "-o", slim)
    assert ran.code == 0
    assert "too few samples (5) for 1 of 3 layers" in ran.err
    assert "'head': 5 of" in ran.err
    assert np.isfinite(results(slim, inputs(9, seed=2))).all()


@pytest.mark.parametrize("command", ["shrink", "plan", "apply"])
def test_what_the_model_does_not_run_on(command: str, tmp_path: Path, run: Any) -> None:
    """A token that no table has."""
    text = """
    net (int64[N,4] ids, float[9,6] table, float[6,5] w1, float[5,3] w2) => (float[N,4,3] y) {
        a = Gather(table, ids)  b = MatMul(a, w1)  c = Relu(b)  y = MatMul(c, w2)
    }"""
    model, data, plan = (tmp_path / name for name in ("m.onnx", "ids.npz", "plan.json"))
    mg.save(model_from_text(text, ("ids",)), model)
    ids = np.random.default_rng(0).integers(0, 9, (20, 4))
    ids[13, 2] = 9
    np.savez(data, ids=ids)
    assert run("plan", model, "--uniform", "0.5", "-o", plan).code == 0
    lines: dict[str, tuple[object, ...]] = {
        "shrink": ("--data", data, *BUDGET),
        "plan": ("--score", "variance", "--data", data, *BUDGET),
        "apply": (plan, "--refit", data),
    }
    ran = run(command, model, *lines[command], "-o", out := tmp_path / "out")
    assert (ran.code, ran.out, out.exists()) == (3, "", False)
    error = ran.err.splitlines()[-1]
    assert "the model does not run on some of them" in error
    assert "idx=9 must be within" in error


@pytest.mark.parametrize("command", ["shrink", "plan", "apply"])
def test_a_model_that_computes_no_numbers(command: str, model: Path, data: Path, run: Any) -> None:
    plan = model.with_name("plan.json")
    assert run("plan", model, "--uniform", "0.5", "-o", plan).code == 0
    proto = onnx.load(model)
    for tensor in proto.graph.initializer:
        if tensor.name == "conv2.bias":
            broken = np.full(12, np.nan, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(broken, tensor.name))
    model.write_bytes(proto.SerializeToString())
    lines: dict[str, tuple[object, ...]] = {
        "shrink": ("--data", data, *BUDGET),
        "plan": ("--score", "variance", "--data", data, *BUDGET),
        "apply": (plan, "--refit", data, "--no-verify"),
    }
    ran = run(command, model, *lines[command], "-o", out := model.with_name("out"))
    assert (ran.code, ran.out, out.exists()) == (3, "", False)
    assert "output 'y' is NaN or infinite for these inputs" in ran.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "code", "fragment"),
    [
        ("shrink {m} --data {d}", 2, "--curve to see first what budgets cost"),
        ("shrink {m} --data {d} -o s.onnx", 2, "--budget flops=70%"),
        ("shrink {m} --data {d} --curve --tune 3", 2, "--tune, --plan, --fold and --report"),
        ("shrink {m} --budget flops=70% -o s.onnx", 2, "--data"),
        ("shrink {m} --data {d} --budget flops=70% -o {d} --overwrite", 4, "is an input"),
        ("shrink {m} --data {d} --budget flops=70% -o {p}", 4, "exists already"),
        ("shrink {m} --data {d} --budget flops=70% -o s.onnx --plan s.onnx", 2, "same file"),
        ("shrink {m} --data {d} --budget flops=70% -o s.onnx --plot no/c.svg", 4, "no such folder"),
        ("shrink {m} --data {d} --budget flops=0.01% -o s.onnx", 1, "cannot be met"),
        ("shrink {m} --data {d} --budget flops=70% -o s.onnx --exclude typo*", 3, "typo*"),
        ("shrink {m} --data {d} --curve --budget beauty=50%", 2, "beauty"),
        ("plan {m} --score data --budget flops=70%", 2, "--data"),
        ("plan {m} --data {d} --budget flops=70%", 2, "--score data, variance or activation"),
        ("plan {m} --score data --data {d} --sensitivity", 2, "--sensitivity"),
        ("apply {m} {p} --refit {d} -o s.onnx --weights fresh", 2, "--weights fresh"),
        ("apply {m} {p} --refit {d} -o s.onnx --absorb", 2, "--absorb"),
        ("apply {m} {w} --refit {d} -o s.onnx", 3, "adds channels"),
    ],
)
def test_requests_that_make_no_sense(
    line: str, code: int, fragment: str, model: Path, data: Path, run: Any
) -> None:
    plan, wide = model.with_name("plan.json"), model.with_name("wide.json")
    assert run("plan", model, "--uniform", "0.5", "-o", plan).code == 0
    assert run("expand", model, plan, "--budget", "flops=120%", "-o", wide).code == 0
    before = sorted(model.parent.iterdir())
    ran = run(*line.format(m=model, d=data, p=plan, w=wide).split())
    assert (ran.code, ran.out) == (code, "")
    assert fragment in ran.err.splitlines()[-1]
    assert sorted(model.parent.iterdir()) == before
    assert not Path("s.onnx").exists()


def test_the_same_in_python(model: Path) -> None:
    graph = mg.lift(model)
    with pytest.raises(ArgumentError, match="give some with --data"):
        mg.plan(graph, {"flops": "70%"}, score="variance")
    with pytest.raises(ArgumentError, match="leave the inputs out"):
        mg.plan(graph, {"flops": "70%"}, data=inputs())
    half = mg.uniform(graph, 0.5)
    with pytest.raises(ArgumentError, match="fresh weights"):
        mg.apply(graph, half, weights="fresh", refit=inputs())
    with pytest.raises(ArgumentError, match="leave absorb out"):
        mg.apply(graph, half, absorb=True, refit=inputs())
    wide = mg.expand(graph, half, {"flops": "150%"})
    with pytest.raises(PlanError, match="adds channels"):
        mg.apply(graph, wide, refit=inputs())
