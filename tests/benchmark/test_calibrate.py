"""Calibration, latency as a cost, and budgets that are met, where all times follow a law."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import morphgraph as mg
from morphgraph.arrays import IntArray
from morphgraph.benchmark import meeting, probes
from morphgraph.benchmark.calibrate import PER_NETWORK, REFERENCE, calibrate
from morphgraph.benchmark.probes import FAMILIES, probe_network
from morphgraph.device import DeviceProfile, Kernel
from morphgraph.device.kernels import dense_rule, reads_all
from morphgraph.device.profile import measurements
from morphgraph.errors import (
    ArgumentError,
    BudgetError,
    ModelError,
    MorphWarning,
    UnsupportedError,
)
from morphgraph.onnx_io import static_shape
from morphgraph.passes.analysis.measured import MeasuredCost, kernel_of, one_sample
from morphgraph.runtimes import Runtime, Spent, find_runtime
from morphgraph.runtimes.host import processor, version_of
from morphgraph.testing import model_from_text

FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def _lawful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(probes, "STAGES", 2)
    monkeypatch.setattr(meeting, "SECONDS", 0.01)  # the law needs no repetition


@pytest.fixture(scope="module")
def profile() -> DeviceProfile:
    """A profile of the lawful runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(FOLDER)
        patch.setattr(probes, "STAGES", 2)  # sizes of what runs change nothing in the law
        return calibrate(_runtime(), minutes=2.0, kernels=200, seed=1)


def _runtime() -> Runtime:
    return find_runtime("lawful:Lawful")


def net(sizes: str = "1,3,32,32") -> mg.ChannelGraph:
    """Convolutions dense and depthwise, a residual connection, a head."""
    return mg.lift(
        model_from_text(
            f"""<ir_version: 9, opset_import: ["": 20]>
        net (float[{sizes}] x, float[64,3,3,3] a, float[128,64,3,3] b, float[128,1,3,3] c,
             float[128,128,1,1] d, float[96,128,3,3] e, float[96,10] f) => (float[{sizes[0]},10] y)
        {{ h = Conv<pads=[1,1,1,1]>(x, a)  i = Relu(h)
          j = Conv<pads=[1,1,1,1], strides=[2,2]>(i, b)  k = Relu(j)
          l = Conv<pads=[1,1,1,1], group=128>(k, c)  m = Relu(l)
          n = Conv(m, d)  o = Add(n, k)  p = Conv<pads=[1,1,1,1]>(o, e)  q = Relu(p)
          r = GlobalAveragePool(q)  s = Flatten(r)  y = MatMul(s, f) }}""",
            ("x",),
        )
    )


def inlined() -> mg.ChannelGraph:
    """Activations that are functions of ONNX: the runtime computes them in steps of its own."""
    return mg.lift(
        model_from_text("""<ir_version: 9, opset_import: ["": 20]>
        net (float[1,3,32,32] x, float[64,3,1,1] a, float[96,64,1,1] b, float[10,96,1,1] c)
        => (float[1,10,32,32] y)
        { h = Conv(x, a)  i = Mish(h)  j = Conv(i, b)  k = Mish(j)  y = Conv(k, c) }""")
    )


def deep() -> mg.ChannelGraph:
    """Eight convolutions of several widths: enough steps for any share of the time."""
    widths = [3, 64, 96, 64, 128, 112, 96, 160, 48]
    inputs = ["float[1,3,32,32] x"]
    nodes, last = "", "x"
    for k, (before, after) in enumerate(itertools.pairwise(widths)):
        inputs.append(f"float[{after},{before},3,3] w{k}")
        nodes += f"c{k} = Conv<pads=[1,1,1,1]>({last}, w{k})  r{k} = Relu(c{k}) "
        last = f"r{k}"
    return mg.lift(
        model_from_text(
            f"""<ir_version: 9, opset_import: ["": 20]> net ({", ".join(inputs)})
            => (float[1,48,32,32] {last}) {{ {nodes} }}"""
        )
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_are_valid_and_run(family: str) -> None:
    import onnx

    model = probe_network(family, 5)
    onnx.checker.check_model(model, full_check=True)
    session = _runtime().session(model)
    feeds = {
        each.name: np.ones([int(size) for size in each.shape if size], np.float32)
        for each in session.inputs
    }
    assert session.run(feeds)


def test_what_a_calibration_finds(profile: DeviceProfile) -> None:
    assert profile.runtime == "lawful:Lawful"
    assert len(profile.kernels) == 200
    assert profile.blocked_multiple == 4  # of ONNX Runtime's layout, which the law leaves
    assert profile.noise == pytest.approx(0.0, abs=1e-12)
    kinds = profile.predictor.kinds.items()
    blocks = {m.block for kind, m in kinds if kind.startswith("Conv") and "blocked" in kind}
    assert blocks == {16}


def test_a_machine_whose_speed_changes_gives_times_of_one_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = probe_network(*REFERENCE)
    lawful, one = type(_runtime()), type(_runtime().session(probe))
    sessions = itertools.count()
    now = [0.0]

    def slower(plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: _times(plain(*args, **options), 1 + 0.6 * np.sin(now[0]))

    def _session(*args: Any, **options: Any) -> Any:
        now[0] = next(sessions) / 8
        return plain_session(*args, **options)

    plain_session = lawful.session
    monkeypatch.setattr(lawful, "session", _session)
    monkeypatch.setattr(one, "timed_run", slower(one.timed_run))
    changing = calibrate(_runtime(), minutes=2.0, kernels=200, seed=1)
    monkeypatch.undo()
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(probes, "STAGES", 2)
    assert changing.noise > 0.1
    session = _runtime().session(probe)
    feeds = {
        each.name: np.ones([int(size) for size in each.shape if size], np.float32)
        for each in session.inputs
    }
    speed = changing.reference / (session.timed_run(feeds).cpu * 1e6)
    graph = net()
    actual = _runtime().session(graph.model).timed_run({"x": np.zeros((1, 3, 32, 32), np.float32)})
    assert mg.cost(graph, "latency", device=changing).total == pytest.approx(
        actual.cpu * 1e3 * speed, rel=0.1
    )


def _times(spent: Spent, factor: float) -> Spent:
    return Spent(factor * spent.wall, factor * spent.cpu)


def test_a_network_that_was_not_measured(profile: DeviceProfile) -> None:
    graph = net()
    cost = mg.cost(graph, "latency", device=profile)
    session = _runtime().session(graph.model)
    feeds = {"x": np.zeros((1, 3, 32, 32), np.float32)}
    actual = session.timed_run(feeds).cpu * 1e3
    assert cost.unit == "ms"
    assert cost.total == pytest.approx(actual, rel=0.1)
    assert sum(cost.by_layer.values()) == pytest.approx(cost.total)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("make", [net, inlined])
def test_at_other_widths_the_cost_is_that_of_the_resized_network(
    profile: DeviceProfile, make: Callable[[], mg.ChannelGraph], share: float
) -> None:
    graph = make()
    plan = mg.uniform(graph, share, round_to=16)
    small = mg.lift(mg.apply(graph, plan))
    there = mg.cost(graph, "latency", device=profile).at(plan.widths(graph))
    assert there == pytest.approx(mg.cost(small, "latency", device=profile).total, rel=0.1)


def test_steps_of_a_function_are_for_the_node_that_calls_it(profile: DeviceProfile) -> None:
    graph = inlined()
    layers = mg.cost(graph, "latency", device=profile).by_layer
    steps = ("Softplus", "Tanh", "Mul")
    executed = _runtime().session(graph.model).executed({"x": np.zeros((1, 3, 32, 32), np.float32)})
    for op in graph.ops:
        if op.ir.op_type == "Mish":
            spent = [e.microseconds for e in executed if e.layer == op.layer and e.op_type in steps]
            assert len(spent) == 3
            assert layers[op.layer] >= 0.9e-3 * sum(spent)


def test_the_price_of_a_channel_is_the_secant_over_a_block(profile: DeviceProfile) -> None:
    graph = net()
    cost = mg.cost(graph, "latency", device=profile)
    assert isinstance(cost, MeasuredCost)
    prices = cost.gradient(graph.widths)
    for group in graph.groups:
        if group.resizable:
            step, fewer = int(cost.step[group.index]), graph.widths.copy()
            fewer[group.index] -= step
            expected = (cost.total - cost.at(fewer)) / step
            assert prices[group.index] == pytest.approx(expected, rel=1e-6)
            assert step == 16


def test_a_time_and_two_other_budgets_at_once_lose_least(profile: DeviceProfile) -> None:
    """Held against all widths on the grid that there are, by the plan's own losses."""
    graph, score = net(), np.random.default_rng(0)
    scores = score.uniform(0.1, 1.0, len(graph.channel_group))
    budget = {"latency": "60%", "flops": "50%", "params": "45%"}
    costs = {kind: mg.cost(graph, kind, device=profile) for kind in budget}
    free = [group for group in graph.groups if group.resizable]
    shares = {
        group.index: group.width
        * sum(c.gradient(graph.widths)[group.index] / c.total for c in costs.values())
        for group in free
    }

    def loss(widths: IntArray) -> float:
        lost = 0.0
        for group in free:
            own = np.sort(scores[group.channels])[::-1]
            kept = own[: widths[group.index]].sum()
            lost += shares[group.index] * (own.sum() / kept - 1)
        return lost

    best = np.inf
    for chosen in itertools.product(*(range(32, group.width + 1, 32) for group in free)):
        widths = graph.widths.copy()
        widths[[group.index for group in free]] = chosen
        limits = ((c, float(budget[kind].strip("%")) / 100) for kind, c in costs.items())
        if all(c.at(widths) <= share * c.total for c, share in limits):
            best = min(best, loss(widths))
    made = mg.plan(graph, budget, score=scores, device=profile, round_to=32)
    assert loss(made.widths(graph)) == pytest.approx(best, rel=1e-8)


def test_what_vanishes_costs_nothing(profile: DeviceProfile) -> None:
    graph = net()
    cost = mg.cost(graph, "latency", device=profile)
    inner = next(group for group in graph.groups if group.width == 96)
    widths = graph.widths.copy()
    widths[inner.index] = 0
    assert cost.at(widths) < cost.total / 2


def test_a_plan_for_milliseconds_is_on_the_device_grid(profile: DeviceProfile) -> None:
    graph = net()
    total = mg.cost(graph, "latency", device=profile).total
    plan = mg.plan(graph, {"latency": "60%", "params": "80%"}, device=profile)
    assert mg.cost(graph, "latency", device=profile).at(plan.widths(graph)) <= 0.6 * total
    assert mg.cost(graph, "params").at(plan.widths(graph)) <= 0.8 * mg.cost(graph, "params").total
    changed = plan.widths(graph)[plan.widths(graph) < graph.widths]
    assert len(changed) > 0
    assert (changed % 16 == 0).all()


@pytest.mark.parametrize("asked", ["60%", pytest.param("45%", marks=pytest.mark.long)])
def test_a_measured_plan_takes_the_time_that_was_asked_for(
    profile: DeviceProfile, asked: str
) -> None:
    """A prediction that is a third too high is corrected."""
    kernels = [each.kernel for each in profile.kernels]
    wrong = [
        each.microseconds * (1.6 if "Conv" in each.op_type else 0.7) for each in profile.kernels
    ]
    device = DeviceProfile(profile.runtime, 1, measurements(kernels, wrong), blocked_multiple=4)
    graph = deep()
    plan = mg.plan(graph, {"latency": asked}, device=device, measure=True, round_to=4)
    small = mg.apply(graph, plan)
    feeds = {"x": np.zeros((1, 3, 32, 32), np.float32)}
    before, after = (
        _runtime().session(model).timed_run(feeds).cpu for model in (graph.model, small)
    )
    share = float(asked.rstrip("%")) / 100
    assert after / before == pytest.approx(share, rel=0.031)
    assert plan.request["measured"]["share"] == pytest.approx(after / before, abs=1e-3)


def test_a_measured_plan_says_what_stands_in_the_way(profile: DeviceProfile) -> None:
    graph = net()
    with pytest.warns(mg.MorphWarning, match=r"97\.0% was asked for: no widths"):
        plan = mg.plan(graph, {"latency": "97%"}, device=profile, measure=True, round_to=64)
    assert plan.request["measured"]["share"] < 0.97


def test_sizes_that_a_model_leaves_open_are_timed_as_they_are_counted(
    profile: DeviceProfile,
) -> None:
    """The batch and the width of images; a runtime has to be given some."""
    graph = net("N,3,32,W")
    plan = mg.plan(graph, {"latency": "70%"}, device=profile, measure=True, round_to=4)
    small = mg.apply(graph, plan)
    sizes = dict(zip("NCHW", static_shape(graph.model.graph.inputs[0]), strict=True))
    feeds = {"x": np.zeros((1, 3, 32, sizes["W"]), np.float32)}
    before, after = (
        _runtime().session(model).timed_run(feeds).cpu for model in (graph.model, small)
    )
    assert plan.request["measured"]["share"] == pytest.approx(after / before, abs=1e-3)


def test_what_no_width_changes_is_told(profile: DeviceProfile) -> None:
    """Operators whose time is that of their start: no group is blamed for it."""
    kernels = [each.kernel for each in profile.kernels]
    device = DeviceProfile(profile.runtime, 1, measurements(kernels, [20.0] * len(kernels)))
    with pytest.raises(BudgetError, match=r"cannot be met: .* ms .*no group holds it"):
        mg.plan(net(), {"latency": "10%"}, device=device)


def test_measuring_needs_a_measured_device() -> None:
    with pytest.raises(ArgumentError, match="calibrate"):
        mg.plan(net(), {"latency": "60%"}, measure=True)
    with pytest.raises(ArgumentError, match="calibrate"):
        mg.plan(net(), {"flops": "60%"}, measure=True)


def test_nothing_runs_on_a_table(profile: DeviceProfile) -> None:
    table = DeviceProfile("table", 1, profile.kernels, name="phone")
    with pytest.raises(ArgumentError, match="'phone' is a table"):
        mg.plan(net(), {"latency": "60%"}, device=table, measure=True)


def test_budgets_below_the_lowest_are_told(profile: DeviceProfile) -> None:
    with pytest.raises(BudgetError, match="ms"):
        mg.plan(net(), {"latency": "0.1us"}, device=profile)


def test_costs_by_files_and_names(profile: DeviceProfile, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    profile.save(path)
    graph = net()
    by_file = mg.cost(graph, "latency", device=path)
    assert mg.cost(graph, f"latency@{path}").kind == by_file.kind
    assert mg.cost(graph, "latency", device=str(path)) is by_file
    with pytest.raises(ArgumentError, match="cannot be part of a sum"):
        mg.cost(graph, f"flops+2*{by_file.kind}")
    with pytest.raises(ArgumentError, match="calibrate"):
        mg.cost(graph, "latency", device="Z80")
    path.write_text("{}")
    with pytest.raises(ModelError, match="no device profile"):
        mg.cost(graph, "latency", device=path)


def test_an_interrupted_calibration_goes_on() -> None:
    kept: list[DeviceProfile] = []
    first = calibrate(_runtime(), kernels=30, keep=kept.append)
    assert len(first.kernels) == 30
    more = calibrate(_runtime(), kernels=45, resume=first)
    assert more.kernels[:30] == first.kernels
    assert len(more.kernels) == 45
    assert all(len(each.kernels) <= 30 for each in kept)
    assert 0 < len(kept[0].kernels) <= PER_NETWORK  # from the first network on
    again = calibrate(_runtime(), kernels=45, resume=more)
    assert (again.kernels, again.blocked_multiple) == (more.kernels, more.blocked_multiple)
    with pytest.raises(ArgumentError, match="another file"):
        calibrate("ort", kernels=50, resume=more)


def test_poolings_out_of_the_blocked_layout_cost_more(profile: DeviceProfile) -> None:
    """ONNX Runtime's are 10 to 40 times as slow where their channels are no whole blocks."""
    assert profile.pooled_multiple in (8, 16)  # channels of a block, by the processor
    graph = mg.lift(
        model_from_text("""<ir_version: 9, opset_import: ["": 20]>
        net (float[1,16,28,28] x, float[64,16,1,1] a, float[8,64,1,1] b) => (float[1,8,14,14] y)
        { h = Conv(x, a)  i = AveragePool<kernel_shape=[2,2], strides=[2,2]>(h)
          y = Conv(i, b) }""")
    )
    cost = mg.cost(graph, "latency", device=profile)
    (group,) = [group for group in graph.groups if group.resizable]
    pooling = next(op.layer for op in graph.ops if op.ir.op_type == "AveragePool")

    def time_of(width: int) -> float:
        widths = graph.widths.copy()
        widths[group.index] = width
        return cost.by_layer_at(widths)[pooling]

    assert time_of(52) > 4 * time_of(64)
    assert time_of(48) < time_of(64)


def in_groups(each: int) -> mg.ChannelGraph:
    """A convolution in four groups of so many channels, between two pointwise ones."""
    wide = 4 * each
    return mg.lift(
        model_from_text(f"""<ir_version: 9, opset_import: ["": 20]>
        net (float[1,16,14,14] x, float[{wide},16,1,1] a, float[{wide},{each},3,3] b,
             float[16,{wide},1,1] c) => (float[1,16,14,14] y)
        {{ h = Conv(x, a)  i = Conv<pads=[1,1,1,1], group=4>(h, b)  y = Conv(i, c) }}""")
    )


def is_grouped(kernel: Kernel) -> bool:
    """Whether it is the convolution in groups."""
    return "grouped" in kernel.kind


@pytest.mark.parametrize("start", [8, 48])
def test_convolutions_in_groups_are_laid_out_by_the_channels_of_a_group(start: int) -> None:
    """At other widths as ONNX Runtime lays out the networks of these widths."""
    layouts, kernels = dict[int, str](), list[Kernel]()
    for each in (4, 8, 12, 16, 20, 32, 48):
        small = in_groups(each)
        executed = find_runtime("ort").session(small.model).executed(one_sample(small))
        kernels += map(kernel_of, executed)
        (layouts[each],) = [
            found.layout for found in kernels[-len(executed) :] if is_grouped(found)
        ]
    assert set(layouts.values()) == {"blocked", "plain"}
    times = [1e4 if is_grouped(each) and each.layout == "plain" else 1.0 for each in kernels]
    device = DeviceProfile("ort", 1, measurements(kernels, times), blocked_multiple=4)
    assert device.grouped_multiple in (8, 16)  # channels of a block, by the processor
    graph = in_groups(start)
    cost, layer = mg.cost(graph, "latency", device=device), graph.ops[1].layer
    for each, layout in layouts.items():
        widths = np.where(graph.widths == start, each, graph.widths)
        assert (cost.by_layer_at(widths)[layer] < 0.1) == (layout == "blocked"), each


def behind_few(channels: int) -> mg.ChannelGraph:
    """A dense convolution, a pointwise one and a depthwise one that read so many channels each."""
    return mg.lift(
        model_from_text(f"""<ir_version: 9, opset_import: ["": 20]>
        net (float[1,32,14,14] x, float[{channels},32,1,1] a, float[64,{channels},3,3] b,
             float[{channels},64,1,1] c, float[64,{channels},1,1] d, float[{channels},64,1,1] e,
             float[{channels},1,3,3] f, float[32,{channels},1,1] g) => (float[1,32,10,10] y)
        {{ h = Conv(x, a)  i = Conv(h, b)  j = Conv(i, c)  k = Conv(j, d)  l = Conv(k, e)
           m = Conv<group={channels}>(l, f)  y = Conv(m, g) }}""")
    )


@pytest.mark.parametrize("start", [12, 44])
def test_few_channels_are_read_in_blocks_whatever_their_number(start: int) -> None:
    """At other widths as ONNX Runtime lays out the networks of these widths."""
    layouts, kernels = dict[int, list[str]](), list[Kernel]()
    dense: list[tuple[str, int]] = []
    for each in (5, 7, 11, 12, 13, 15, 18, 22, 23, 32, 44):
        small = behind_few(each)
        executed = find_runtime("ort").session(small.model).executed(one_sample(small))
        found = [k for k in map(kernel_of, executed) if "Conv" in k.op_type]
        layouts[each] = [kernel.layout for kernel in found]
        kernels += found
        reads = (32, each, 64, each, 64, each, each)  # ONNX Runtime tells them filled up
        dense += [
            (kernel.layout, channels)
            for kernel, channels in zip(found, reads, strict=True)
            if reads_all(kernel)
        ]
    multiple, below = dense_rule(dense)
    assert (multiple, below) in {(4, 16), (4, 8)}  # channels of a block, by the processor
    times = [1e4 if kernel.layout == "plain" else 1.0 for kernel in kernels]
    device = DeviceProfile(
        "ort", 1, measurements(kernels, times), blocked_multiple=multiple, blocked_below=below
    )
    graph = behind_few(start)
    cost, layers = mg.cost(graph, "latency", device=device), [op.layer for op in graph.ops]
    for each, wanted in layouts.items():
        found_times = cost.by_layer_at(np.where(graph.widths == start, each, graph.widths))
        told = ["blocked" if found_times[layer] < 0.1 else "plain" for layer in layers]
        assert told == wanted, each


def test_a_table_without_layouts_knows_poolings() -> None:
    kernel = Kernel("MaxPool", "", ((1, 32, 28, 28),), ((1, 32, 14, 14),))
    some = [replace(kernel, inputs=((1, c, 28, 28),), outputs=((1, c, 14, 14),)) for c in (16, 64)]
    device = DeviceProfile("table", 1, measurements([kernel, *some], [32.0, 16.0, 64.0]))
    (time,) = device.predictor.times([replace(kernel, layout="blocked")])
    assert time == pytest.approx(32.0, rel=0.1)


def test_a_runtime_that_tells_nothing() -> None:
    with pytest.raises(UnsupportedError):
        calibrate("pretended:Mute", kernels=20)


def test_one_sample_where_the_batch_is_open(profile: DeviceProfile) -> None:
    text = "(float[{n},8,6,6] x, float[16,8,3,3] a) => (float[{n},16,4,4] y) {{ y = Conv(x, a) }}"
    head = '<ir_version: 9, opset_import: ["": 20]> net '
    one, opened = (mg.lift(model_from_text(head + text.format(n=n))) for n in (1, "N"))
    costs = [mg.cost(graph, "latency", device=profile) for graph in (one, opened)]
    assert costs[0].total == pytest.approx(costs[1].total)
    widths = one.widths - [2 if group.resizable else 0 for group in one.groups]
    assert costs[0].at(widths) == pytest.approx(costs[1].at(widths))


def test_reading_a_layout_off_the_widths(profile: DeviceProfile) -> None:
    graph = net()
    cost = mg.cost(graph, "latency", device=profile)
    group = next(group for group in graph.groups if group.width == 128)
    on, off = graph.widths.copy(), graph.widths.copy()
    on[group.index], off[group.index] = 112, 111
    assert cost.at(off) > 1.3 * cost.at(on)  # the law: twice the time off the layout


def test_a_profile_of_another_place_is_told() -> None:
    """In one line: which, what differs there, and what to do; not where all is as it was."""
    graph = net()
    kernels = [
        kernel_of(one)
        for one in find_runtime("ort").session(graph.model).executed(one_sample(graph))
    ]
    here = DeviceProfile(
        "ort",
        1,
        measurements(kernels, [5.0] * len(kernels)),
        machine=processor(),
        versions={"morphgraph": "0.0.1", **version_of("ort")},
        name="board",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*and is guessed")
        mg.cost(net(), "latency", device=here)
        mg.cost(
            net(), "latency", device=msgspec.structs.replace(here, runtime="table", machine="phone")
        )
    there = msgspec.structs.replace(here, machine="Z80", versions={"onnxruntime": "1.0.0"})
    with pytest.warns(MorphWarning, match=r"'board'.* Z80, onnxruntime 1\.0\.0.*calibrate here"):
        mg.cost(net(), "latency", device=there)


def test_a_profile_without_activations_is_told() -> None:
    """Versions before did not measure them: MobileNetV2 came out a quarter faster than it is."""
    clipped = mg.lift(
        model_from_text("""<ir_version: 9, opset_import: ["": 20]>
        net (float[1,16,8,8] x, float[16,16,3,3] a) => (float[1,16,6,6] y)
        { h = Conv(x, a)  i = Sigmoid(h)  y = LeakyRelu(i) }""")
    )
    relu = mg.lift(
        model_from_text("""<ir_version: 9, opset_import: ["": 20]>
        net (float[1,16,8,8] x, float[16,16,3,3] a) => (float[1,16,6,6] y)
        { h = Conv(x, a)  y = Relu(h) }""")
    )
    executed = find_runtime("ort").session(relu.model).executed(one_sample(relu))
    kernels = [kernel_of(one) for one in executed]
    assert any(kernel.activation for kernel in kernels)
    old = [replace(kernel, activation="") for kernel in kernels]
    before = DeviceProfile("ort", 1, measurements(old, [9.0] * len(old)), name="before")
    with pytest.warns(MorphWarning, match=r"'before'.*\(Sigmoid\).*calibrate again"):
        mg.cost(clipped, "latency", device=before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*and is guessed")
        now = DeviceProfile("ort", 1, measurements(kernels, [9.0] * len(kernels)))
        mg.cost(clipped, "latency", device=now)
        mg.cost(relu, "latency", device=before)  # it costs nothing
        mg.cost(clipped, "latency", device=msgspec.structs.replace(before, runtime="table"))


def test_a_profile_of_few_measurements_is_told() -> None:
    with pytest.warns(MorphWarning, match=r"has 20 measurements; below 144 .*--resume"):
        calibrate(_runtime(), kernels=20)


def test_what_a_profile_can_only_guess_at_is_told(profile: DeviceProfile) -> None:
    dense = [one for one in profile.kernels if "Conv dense" in one.kernel.kind]
    few = msgspec.structs.replace(
        profile, kernels=[*dense[:1], *(one for one in profile.kernels if one not in dense)]
    )
    with pytest.warns(MorphWarning, match=r"% of the time .* than 5 .*Conv dense.*--resume"):
        mg.cost(net(), "latency", device=few)
    table = msgspec.structs.replace(few, runtime="table")
    with pytest.warns(MorphWarning, match=r"is guessed: add lines to the table"):
        mg.cost(net(), "latency", device=table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mg.cost(net(), "latency", device=profile)


def test_a_profile_of_a_machine_that_computed_other_things_is_told(profile: DeviceProfile) -> None:
    """Times that are off by factors of their own: what they say of each other is off as well."""
    factors = np.exp(0.7 * np.random.default_rng(0).normal(size=len(profile.kernels)))
    noisy = [
        msgspec.structs.replace(one, microseconds=one.microseconds * float(factor))
        for one, factor in zip(profile.kernels, factors, strict=True)
    ]
    with pytest.warns(MorphWarning, match=r"off by [3-9]\d%.*while nothing else runs"):
        mg.cost(net(), "latency", device=msgspec.structs.replace(profile, kernels=noisy))
