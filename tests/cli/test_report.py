"""Report pages: every way to one, what stands in them, and what strangers' names do there."""

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import morphgraph as mg
from morphgraph.onnx_io import save
from morphgraph.testing import model_from_text

SMALL = """
net (float[N,3,8,8] x, float[16,3,3,3] w1, float[8,16,1,1] w2, float[8,10] fc) => (float[N,10] y) {
    a = Conv <pads = [1,1,1,1]> (x, w1)  b = Relu(a)  c = Conv(b, w2)  d = Relu(c)
    e = GlobalAveragePool(d)  f = Flatten(e)  y = MatMul(f, fc)
}"""


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its text, and its scripts' contents."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in.append(tag)
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._in and self._in[-1] == tag:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in:
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def figure(self, key: str) -> Any:
        order = [e for e in self.elements if e[0] in ("script", "style")]
        place = next(i for i, (_, a) in enumerate(order) if a.get("id") == f"figure-{key}")
        return json.loads(self.scripts[place])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.onnx"
    save(model_from_text(SMALL), path)
    return path


def _page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def _widths(page: Page) -> tuple[list[int], list[int]]:
    """By row what the bars show before and after: what is fixed has one bar, grey."""
    before, after = dict[int, int](), dict[int, int]()
    for bars in page.figure("widths")["data"]:
        rows = dict(zip(bars["y"], bars["x"], strict=True))
        if bars["name"] != "after":
            before |= rows
        if bars["name"] in ("after", "fixed"):
            after |= rows
    return [before[row] for row in sorted(before)], [after[row] for row in sorted(after)]


def test_a_model_and_its_plan(small: Path, tmp_path: Path, run: Any) -> None:
    plan, slim, out = tmp_path / "plan.json", tmp_path / "slim.onnx", tmp_path / "report.html"
    mg.plan(mg.lift(small), {"flops": "50%"}, round_to=1).save(plan)
    mg.save(mg.apply(small, mg.Plan.load(plan)), slim)
    assert run("report", small, plan, slim, "-o", out, "--seconds", "0.05").code == 0
    page = _page(out)
    graph = mg.lift(small)
    widths = mg.Plan.load(plan).widths(graph)
    before, after = _widths(page)
    assert before == [group.width for group in graph.groups]
    assert after == widths.tolist()
    written = {t for bars in page.figure("widths")["data"] for t in bars.get("text", [])}
    changed = zip(before, after, strict=True)
    assert written == {f"{a} \u2192 {b}" if a != b else f"{a}" for a, b in changed}
    assert "times as fast" in page.text
    # By the file itself: the first kernel's outputs are the first group that may shrink.
    weights = {w.name: tuple(w.dims) for w in onnx.load(slim).graph.initializer}
    assert weights["w1"][0] in after
    share = mg.cost(mg.lift(slim), "macs").total / mg.cost(graph, "macs").total
    icicle = page.figure("costs")["data"][0]
    assert icicle["marker"]["colors"][0] == pytest.approx(share)


def test_a_page_begins_with_every_cost_that_had_a_budget(
    small: Path, tmp_path: Path, run: Any
) -> None:
    """And counts channels to the last one."""
    plan, out = tmp_path / "plan.json", tmp_path / "report.html"
    graph = mg.lift(small)
    budget = {"memory": "70%", "peak": "90%", "latency": "90%"}
    made = mg.plan(graph, budget, round_to=1)
    made.save(plan)
    assert run("report", small, plan, "-o", out, "--seconds", "0.02").code == 0
    text = " ".join(_page(out).text.split())
    left = made.cost["memory"].after / made.cost["memory"].before
    assert f"{left:.1%}".replace("%", " % of its activations (") in text
    assert "of its activations alive at once" in text
    assert "of its predicted latency (" in text


def test_widths_are_whole_numbers(tmp_path: Path, run: Any) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
    net (float[1,4] x, float[4,1234] a, float[1234,2] b) => (float[1,2] y) {
        p = MatMul(x, a)  r = Relu(p)  y = MatMul(r, b) }"""
    save(model_from_text(text), wide := tmp_path / "wide.onnx")
    assert run("report", wide, "-o", tmp_path / "wide.html", "--seconds", "0.02").code == 0
    assert "1234" in _page(tmp_path / "wide.html").text


def test_a_network_of_which_nothing_is_counted(tmp_path: Path, run: Any) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
    net (float[1,4] x) => (float[1,4] y) { y = Relu(x) }"""
    save(model_from_text(text), one := tmp_path / "one.onnx")
    save(model_from_text(text), two := tmp_path / "two.onnx")
    ran = run("report", one, two, "-o", tmp_path / "page.html", "--seconds", "0.02")
    assert ran.code == 0, ran.err
    assert "nothing that is counted" in _page(tmp_path / "page.html").text


def test_predicted_times_stand_beside_measured_ones(small: Path, tmp_path: Path, run: Any) -> None:
    """On a device that somebody measured as a table: sizes, and twice their work in ns."""
    table, slim, out = tmp_path / "phone.csv", tmp_path / "slim.onnx", tmp_path / "report.html"
    rows = ["op_type,inputs,outputs,microseconds"]
    for c, k in [(3, 8), (3, 16), (8, 8), (16, 8), (16, 16), (32, 16)]:
        work = 64 * 9 * c * k
        rows.append(f"Conv,1x{c}x8x8 {k}x{c}x3x3,1x{k}x8x8,{work / 500}")
        rows.append(f"MatMul,1x{c} {c}x{k},1x{k},{c * k / 500}")
    table.write_text("\n".join(rows))
    mg.save(mg.apply(small, mg.plan(mg.lift(small), {"flops": "50%"}, round_to=1)), slim)
    ran = run("report", small, slim, "--device", table, "--seconds", "0.05", "-o", out)
    assert ran.code == 0, ran.err
    line, *models = _page(out).figure("times")["data"]
    assert line["name"] == "equal"
    assert [trace["name"] for trace in models] == ["small.onnx", "slim.onnx"]
    for path, trace in zip((small, slim), models, strict=True):
        by_layer = mg.cost(mg.lift(path), "latency", device=table).by_layer
        assert trace["text"]
        assert trace["x"] == pytest.approx([by_layer[name] for name in trace["text"]])
        assert all(time > 0 for time in trace["y"])


def test_two_files_without_the_plan_show_the_same_widths(
    small: Path, tmp_path: Path, run: Any
) -> None:
    plan, slim = mg.plan(mg.lift(small), {"flops": "40%"}, round_to=1), tmp_path / "slim.onnx"
    mg.save(mg.apply(small, plan), slim)
    out = tmp_path / "report.html"
    assert run("diff", small, slim, "--report", out).code == 0
    assert _widths(_page(out))[1] == plan.widths(mg.lift(small)).tolist()


def test_layers_that_are_gone_have_width_0(tmp_path: Path, run: Any) -> None:
    base, slim, out = tmp_path / "base.onnx", tmp_path / "slim.onnx", tmp_path / "report.html"
    save(
        model_from_text(
            """net (float[1,8,4,4] x, float[8,8,3,3] w, float[6,8,1,1] a, float[8,6,1,1] b)
            => (float[1,8,4,4] y) {
                s = Conv <pads = [1,1,1,1]> (x, w)
                t = Conv(s, a)  u = Relu(t)  v = Conv(u, b)  y = Add(s, v)
            }"""
        ),
        base,
    )
    graph = mg.lift(base)
    name = next(group.name for group in graph.groups if group.width == 6)
    mg.save(mg.apply(graph, mg.plan(graph, {}, widths={name: 0}, min_width=0)), slim)
    assert run("report", base, slim, "-o", out, "--seconds", "0").code == 0
    before, after = _widths(_page(out))
    assert after[before.index(6)] == 0


def test_a_model_alone_has_no_after(small: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "report.html"
    assert run("analyze", small, "--report", out).code == 0
    page = _page(out)
    assert {bars["name"] for bars in page.figure("widths")["data"]} == {"channels", "fixed"}
    assert "resized" not in [text for text in page.words if text in ("original", "resized")]
    assert "can be resized" in page.text


def test_a_shrink_by_data(small: Path, tmp_path: Path, run: Any) -> None:
    data, out, page = tmp_path / "x.npz", tmp_path / "slim.onnx", tmp_path / "report.html"
    np.savez(data, x=np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32))
    budget = ("--budget", "flops=60%", "--round-to", "1")
    ran = run("shrink", small, "--data", data, *budget, "-o", out, "--report", page, "--curve")
    assert ran.code == 0, ran.err
    shown = _page(page)
    assert "on inputs held out" in shown.text
    points = shown.figure("curve")["data"]
    names = ["other budgets", "original", "width multiplier", "this network"]
    assert [trace["name"] for trace in points] == names
    assert points[1]["x"] == [100]
    assert points[2]["x"][0] <= 60
    (at,) = points[3]["x"]
    assert at == pytest.approx(
        100 * mg.cost(mg.lift(out), "flops").total / mg.cost(mg.lift(small), "flops").total
    )


def test_a_shrunk_language_model(tmp_path: Path, run: Any) -> None:
    """The page says the perplexity that the command says."""
    model, data, page = (tmp_path / name for name in ("lm.onnx", "ids.npz", "page.html"))
    text = """lm (int64[N,T] input_ids, float[20,8] table, float[8,16] up, float[16,20] down)
        => (float[N,T,20] logits) {
            x = Gather(table, input_ids)  h = MatMul(x, up)  r = Relu(h)
            logits = MatMul(r, down) }"""
    save(model_from_text(text, ("input_ids",)), model)
    np.savez(data, input_ids=np.random.default_rng(0).integers(20, size=(32, 9)))
    budget = ("--budget", "params=50%", "--round-to", "1", "-o", tmp_path / "slim.onnx")
    ran = run("shrink", model, "--data", data, *budget, "--report", page, "--format", "json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["perplexity"]
    before, after = found["original"], found["refitted"]
    assert after != pytest.approx(before, rel=1e-3)
    shown = _page(page).text
    assert f"perplexity on held-out text {before:.2f} → {after:.2f}" in shown


def test_a_run_with_its_training(tmp_path: Path, run: Any, small: Path) -> None:
    rng = np.random.default_rng(0)
    data, folder, out = tmp_path / "d.npz", tmp_path / "run", tmp_path / "report.html"
    images = rng.integers(0, 255, (96, 8, 8, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 96)
    np.savez(data, x_train=images, y_train=labels, x_test=images[:32], y_test=labels[:32])
    ran = run(
        *("morph", small, "--data", data, "--budget", "flops=60%", "--iterations", "1"),
        *("--shrink-epochs", "2", "--epochs", "1", "--baseline", "uniform", "-o", folder),
    )
    assert ran.code == 0, ran.err
    assert run("report", folder, "-o", out, "--seconds", "0").code == 0
    page = _page(out)
    said = {entry.key: entry.value for entry in onnx.load(folder / "slim.onnx").metadata_props}
    plan = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    assert said["morphgraph.plan"] == plan
    assert f"plan {plan[:12]}" in page.text
    losses = [trace for trace in page.figure("training")["data"] if trace["yaxis"] == "y"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    shown = sorted(loss for trace in losses for loss in trace["y"])
    assert shown == sorted(event["loss"] for event in epochs)
    heat, marks = page.figure("strengths")["data"]
    strengths = json.loads((folder / "iteration-1" / "strengths.json").read_text())
    assert sum(map(sum, heat["z"])) == sum(len(each["strengths"]) for each in strengths)
    assert len(marks["y"]) == len(strengths)
    assert {trace["name"] for trace in page.figure("curve")["data"]} >= {"width multiplier"}


def test_names_are_text_wherever_they_stand(tmp_path: Path, run: Any) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x1b[31m"
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]>\n'
        + SMALL.strip().replace("float[N,", "float[1,")
    )
    for tensor, shape in {"w1": (16, 3, 3, 3), "w2": (8, 16, 1, 1), "fc": (8, 10)}.items():
        value = np.ones(shape, np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, tensor))
    kept = proto.graph.input[0]
    del proto.graph.input[:]
    proto.graph.input.append(kept)
    for node in proto.graph.node:
        node.name = evil + node.op_type + node.output[0]
    path, out = tmp_path / "evil.onnx", tmp_path / "report.html"
    onnx.save(proto, path)
    assert run("report", path, "-o", out, "--seconds", "0").code == 0
    page = _page(out)
    assert not [element for element in page.elements if element[0] == "img"]
    kinds = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
    assert kinds.count(None) == 2  # Plotly and ours
    assert "<script>alert(1)" in page.text  # as text, in the tables
    hover = page.figure("graph")["data"][-1]["hovertext"]
    assert not any("<img" in text or "<script" in text for text in hover)
    assert "\x1b" not in out.read_text(encoding="utf-8").split("<noscript>")[0]


def test_a_page_asks_for_nothing(small: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "report.html"
    assert run("report", small, "-o", out, "--seconds", "0").code == 0
    page = _page(out)
    assert not [a for _, a in page.elements if a.get("src")]
    links = [a["href"] for tag, a in page.elements if tag in ("a", "link")]
    assert links == ["data:,"]
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    charts = [a for tag, a in page.elements if a.get("role") == "img"]
    assert charts
    assert all(chart["aria-label"] for chart in charts)


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["nothing.onnx"], 4, "No such file"),
        (["{folder}"], 4, "a report is made of a finished run"),
        (["{small}", "{small}", "{small}"], 2, "give the folder of a run"),
        (["plan.json"], 2, "shown beside its model: `morphgraph report MODEL plan.json`"),
        (["{folder}", "{small}"], 2, "give nothing beside it"),
        (["{small}", "--device", "d.json", "--seconds", "0"], 2, "beside measured ones"),
    ],
)
def test_what_is_no_subject_is_refused(
    given: list[str], code: int, said: str, small: Path, tmp_path: Path, run: Any
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    words = [word.format(folder=folder, small=small) for word in given]
    out = tmp_path / "report.html"
    ran = run("report", *words, "-o", out)
    assert ran.code == code
    assert re.search(re.escape(said), ran.err)
    assert ran.err.count("\n") == 1
    assert not out.exists()


def test_without_plotly_it_says_what_to_install(
    small: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morphgraph.report.pages import page

    page._plotly.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    ran = run("report", small, "-o", tmp_path / "r.html", "--seconds", "0")
    assert ran.code == 3
    assert "morphgraph[report]" in ran.err
    page._plotly.cache_clear()


SKIPPED = """
net (float[N,4,8] x, float[8,16] w1, float[8,16] w2, float[16] g, float[16] h, float[16,5] w3)
    => (float[N,4,5] y) {
    a = MatMul(x, w1)  b = MatMul(x, w2)  c, d = NORM  e = Add(c, d)  y = MatMul(e, w3)
}"""
NORMS = [("SkipSimplifiedLayerNormalization", "g"), ("SkipLayerNormalization", "g, h")]


@pytest.mark.parametrize(("op", "scales"), NORMS, ids=["rms", "layer"])
def test_outputs_that_a_node_leaves_out_have_no_shape(
    op: str, scales: str, tmp_path: Path, run: Any
) -> None:
    base, plan, slim = (tmp_path / name for name in ("base.onnx", "plan.json", "slim.onnx"))
    # The nodes of ONNX Runtime's own domain, as its model builder writes them: output, "", "", sum.
    save(model_from_text(SKIPPED.replace("NORM", "Split <axis = -1, num_outputs = 2> (a)")), base)
    proto = onnx.load(base)
    node = next(node for node in proto.graph.node if node.op_type == "Split")
    norm = onnx.helper.make_node(
        op, ["a", "b", *scales.split(", ")], ["c", "", "", "d"], domain="com.microsoft"
    )
    norm.attribute.append(onnx.helper.make_attribute("epsilon", 1e-5))
    node.CopyFrom(norm)
    del proto.graph.value_info[:]
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(proto, base)
    mg.uniform(mg.lift(base), 0.5, round_to=1).save(plan)
    assert run("apply", base, plan, "-o", slim).code == 0
    done = run("report", base, slim, "-o", tmp_path / "report.html", "--seconds", "0")
    assert done.code == 0, done.err


def test_of_a_plan_alone_only_the_original_is_timed(small: Path, tmp_path: Path, run: Any) -> None:
    out, plan = tmp_path / "report.html", tmp_path / "plan.json"
    mg.plan(mg.lift(small), {"flops": "50%"}, round_to=1).save(plan)
    done = run("report", small, plan, "-o", out, "--seconds", "0.05")
    assert done.code == 0, done.err
    text = Page(out.read_text()).text
    assert re.search(r"time in ort, 1 thread\(s\) [\d.]+ [mµ]?s", text)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_draws_every_picture(small: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "report.html"
    plan = tmp_path / "plan.json"
    mg.plan(mg.lift(small), {"flops": "50%"}, round_to=1).save(plan)
    assert run("report", small, plan, "-o", out, "--seconds", "0").code == 0
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    shown = subprocess.run(
        ["chromium", *flags, "--enable-logging=stderr", "--dump-dom", out.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr
    drawn = re.findall(r'class="chart js-plotly-plot"', shown.stdout)
    assert len(drawn) == len(re.findall(r'data-figure="', out.read_text().split("<noscript>")[0]))
