"""The facts of a report page: out of lifted models, a plan, and what was measured of them."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from morphgraph.benchmark import BenchResult
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, static_shape, values_of
from morphgraph.onnx_io.fixed import fixed_values
from morphgraph.origin import Origin, fixed_text
from morphgraph.passes.analysis.cost import cost, on_device
from morphgraph.plans import Plan
from morphgraph.report.analysis import layers
from morphgraph.report.machine import cpu, package_version, usable_cpus
from morphgraph.report.pages.facts import (
    Facts,
    GroupWidth,
    LayerCost,
    LayerTime,
)
from morphgraph.report.pages.flow import flow_of
from morphgraph.report.tables import (
    Cell,
    Column,
    Table,
    amount,
    share,
    size,
)

_UNITS = (
    ("macs", "MACs per sample", amount),
    ("flops", "FLOPs per sample", amount),
    ("params", "parameters", amount),
    ("weight_bytes", "weights", size),
    ("memory", "activations", size),
    ("peak", "activations alive at once, at most", size),
)

_ALWAYS = ("macs", "flops", "params")  # that a page begins with


@dataclass(frozen=True)
class Resized:
    """A network before and after, as far as there is an after.

    Attributes:
        name: of the model.
        before: the lifted original.
        after: the lifted result; ``None`` where there is none.
        plan: what was or would be done to the original; ``None`` where nobody knows.
        timing: of both, the original first.
        quality: what else is known of both: a title, and the readable values.
        times: of layers, predicted and measured.
        command: that makes the page.
    """

    name: str
    before: ChannelGraph
    after: ChannelGraph | None = None
    plan: Plan | None = None
    timing: BenchResult | None = None
    quality: Sequence[tuple[str, str, str]] = ()
    times: Sequence[LayerTime] = ()
    command: str = ""


def resized_facts(resized: Resized, **more: Any) -> Facts:
    """The facts of a resize, or of a model alone; ``more`` are those that the caller knows."""
    graph = resized.before
    widths = _widths(resized)
    groups = [
        GroupWidth(group.name, group.width, after, group.reason, group.producers)
        for group, after in zip(graph.groups, widths, strict=True)
    ]
    there = resized.after is not None or resized.plan is not None
    facts = Facts(
        title=f"{resized.name}: {'a resize' if there else 'an analysis'} by morphgraph",
        verdict=_verdict(resized),
        summary=_summary(resized),
        groups=groups,
        layers=_layers(resized),
        resized=there,
        flow=flow_of(graph),
        times=resized.times,
        made=made_by(resized),
        warnings=_warnings(resized),
        versions=versions(),
    )
    return replace(facts, **more)


def versions() -> dict[str, str]:
    """What the page was made with."""
    packages = ("morphgraph", "onnx", "onnxruntime", "torch", "numpy", "plotly")
    found = {name: package_version(name) for name in packages}
    return {
        **{name: release for name, release in found.items() if release is not None},
        "Python": platform.python_version(),
        "machine": f"{cpu()[0]}, {usable_cpus()} CPUs, {platform.system()}",
    }


def _widths(resized: Resized) -> list[int]:
    """The width of every group after: by the plan, or read off the result's own tensors."""
    graph = resized.before
    if resized.plan is not None:
        return [int(width) for width in resized.plan.widths(graph)]
    if resized.after is None:
        return [group.width for group in graph.groups]
    values = values_of(resized.after.model.graph)
    shapes = {v.name: static_shape(v) for v in values if v.name}  # omitted outputs have none
    found = []
    for group in graph.groups:
        seen = [
            shapes[member.value][member.axis] // member.per_channel
            for member in group.members
            if member.axis < len(shapes.get(member.value, ()))
        ]
        # A group whose every tensor is gone lived in layers that were removed.
        found.append(min(seen) if seen else 0)
    return found


def _costs(resized: Resized, unit: str) -> tuple[float, float | None]:
    before = cost(resized.before, unit)
    if resized.after is not None:
        return before.total, cost(resized.after, unit).total
    if resized.plan is not None:
        return before.total, before.at(resized.plan.widths(resized.before))
    return before.total, None


def _summary(resized: Resized) -> Table:
    rows: list[list[Cell]] = []
    for unit, title, show in _UNITS:
        before, after = _costs(resized, unit)
        row: list[Cell] = [title, show(before)]
        if after is not None:
            row += [show(after), share(after / before) if before else ""]
        rows.append(row)
    titles = [Column(""), Column("original", right=True)]
    if len(rows[0]) > 2:
        titles += [Column("resized", right=True), Column("left", right=True)]
    if resized.timing is not None:
        row = _time_row(resized.timing)
        rows.append(row + [""] * (len(titles) - len(row)))  # of a plan there is no file to time
    rows += [[title, before, after, ""] for title, before, after in resized.quality]
    return Table(titles, rows, "Costs before and after")


def _time_row(timing: BenchResult) -> list[Cell]:
    first, last = timing.models[0], timing.models[-1]
    row: list[Cell] = [f"time in {first.runtime}, {timing.threads} thread(s)", _ms(first.p50_ms)]
    if first is last:
        return row
    text = ""
    if last.speedup is not None and last.speedup_interval is not None:
        low, high = last.speedup_interval
        text = f"{last.speedup:.2f} times as fast ({low:.2f} to {high:.2f})"
    return [*row, _ms(last.p50_ms), text]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms"


def _verdict(resized: Resized) -> str:
    flops, params = _costs(resized, "flops"), _costs(resized, "params")
    if flops[1] is None or params[1] is None:
        resizable = sum(group.resizable for group in resized.before.groups)
        return (
            f"{amount(flops[0])} FLOPs and {amount(params[0])} parameters in "
            f"{len(resized.before.groups)} groups of channels, of which {resizable} can be resized."
        )
    parts = [
        f"{share(after / before)} of its {title} ({amount(before)} → {amount(after)})"
        for (before, after), title in ((flops, "FLOPs"), (params, "parameters"))
        if before and after is not None
    ]
    parts += _of_other_budgets(resized)
    words = "The resized network has " if resized.after is not None else "The plan leaves "
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
    text = words + (listed or "nothing that is counted")
    timing = resized.timing
    if timing is not None and timing.models[-1].speedup is not None:
        low, high = timing.models[-1].speedup_interval or (0.0, 0.0)
        text += (
            f"; it runs {timing.models[-1].speedup:.2f} times as fast "
            f"({low:.2f} to {high:.2f}) in {timing.models[-1].runtime}"
        )
    for title, before, after in resized.quality:
        text += f"; {title} {before} → {after}"
    return text + "."


def _of_other_budgets(resized: Resized) -> list[str]:
    """What is left of costs that had a budget, beside FLOPs and parameters."""
    units = {unit: (title, show) for unit, title, show in _UNITS if unit not in _ALWAYS}
    found = []
    for kind, told in ({} if resized.plan is None else resized.plan.cost).items():
        before, after = told.before, told.after
        if kind.startswith("latency"):
            title, texts = f"predicted {kind}", (_ms(before), _ms(after))
        elif kind in units:
            title, show = units[kind]
            before, known = _costs(resized, kind)
            after = after if known is None else known
            texts = show(before), show(after)
        else:
            continue
        if before:
            found.append(f"{share(after / before)} of its {title} ({texts[0]} → {texts[1]})")
    return found


def _layers(resized: Resized) -> list[LayerCost]:
    graph = resized.before
    macs, params = cost(graph, "macs"), cost(graph, "params")
    if resized.after is not None:
        new = cost(resized.after, "macs").by_layer, cost(resized.after, "params").by_layer
    elif resized.plan is not None:
        widths = resized.plan.widths(graph)
        new = macs.by_layer_at(widths), params.by_layer_at(widths)
    else:
        new = macs.by_layer, params.by_layer
    return [
        LayerCost(
            layer.name,
            layer.op_type,
            (macs.by_layer.get(layer.name, 0.0), new[0].get(layer.name, 0.0)),
            (params.by_layer.get(layer.name, 0.0), new[1].get(layer.name, 0.0)),
        )
        for layer in layers(graph, macs, "default")
    ]


def made_by(resized: Resized) -> list[tuple[str, str]]:
    """How a result came about: the plan's request, and the command."""
    rows = []
    if resized.plan is not None:
        request = msgspec.json.encode(resized.plan.request, order="sorted").decode()
        rows += [
            ("plan asked for", request),
            ("plan made by", f"morphgraph {resized.plan.tool_version}"),
        ]
    for graph in (resized.before, resized.after):
        if graph is None:
            continue
        origin, fixed = Origin.read(graph.model), fixed_values(graph.model)
        whose = "the original" if graph is resized.before else "the resized network"
        if origin is None and fixed:
            rows.append((f"{whose}: holds for", fixed_text(fixed)))
        if origin is not None:
            rows += [(f"{whose}: {title}", line) for title, line in origin.lines()]
    if resized.command:
        rows.append(("page made by", resized.command))
    return rows


def _warnings(resized: Resized) -> list[str]:
    found = []
    opaque = [op.name for op in resized.before.ops if op.opaque is not None]
    if opaque:
        names = ", ".join(escape(name) for name in opaque[:5])
        found.append(
            f"{len(opaque)} operators are not described ({names}{' ...' if opaque[5:] else ''}): "
            "their arithmetic is not counted, and the channels that they touch keep their size."
        )
    if resized.timing is not None and resized.timing.models[-1].unstable:
        found.append("The machine was too noisy to trust the times.")
    return found


def layer_times(
    graphs: Sequence[ChannelGraph], timing: BenchResult, device: Path
) -> list[LayerTime]:
    """The times of layers as a device predicts them, beside those of the profile.

    Args:
        graphs: the lifted models that were timed, in their order.
        timing: with profiles.
        device: the file that describes the device.

    Raises:
        FileError: the file is none.
    """
    (kind,) = on_device({"latency": None}, device)
    # A profile holds the model before it as well; of a model alone there is no before.
    profile = timing.profiles[-1]
    found = []
    for place, graph in enumerate(graphs):
        predicted = cost(graph, kind).by_layer
        for row in profile.layers:
            measured = row.before_ms if graphs[1:] and place == 0 else row.after_ms
            if measured and row.name in predicted:
                name = timing.models[place].name
                found.append(LayerTime(row.name, name, predicted[row.name], measured))
    return found
