"""How far predicted times are off, and whether measured budgets are met: tables for the benchmarks.

    python tools/bench_latency.py                          # a quarter of an hour; a quiet machine
    python tools/bench_latency.py -o docs/benchmarks.md    # as its section of the page
    python tools/bench_latency.py --device device.json --only resnet18 vit_tiny
    python tools/bench_latency.py --runtime openvino --only resnet18 mobilenet_v2 vit_tiny

A device is calibrated first, on networks of its own. Then every network, none of which took part,
is predicted as it is, at half of its FLOPs with free widths and with ``--round-to auto``, and
timed, one thread, interleaved. Then plans for 60 % of the time are made with ``--measure``, timed
once more, and set beside the plan by FLOPs that a bisection brings to the same time. *machine* is
the time of the network that the calibration has run again and again, timed beside, as a multiple of
what it took then: shared machines are slower for minutes; the last column is without that.
"""

import argparse
import datetime as dt
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
import torchvision
from scipy.stats import kendalltau
from torch import nn

import morphgraph as mg
from morphgraph.benchmark.calibrate import REFERENCE
from morphgraph.benchmark.probes import probe_network
from morphgraph.device import DeviceProfile, load_profile
from morphgraph.options import RoundTo
from morphgraph.testing.random_weights import randomize_weights

HEADING = "## Predicted and measured time"
NETWORKS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "densenet121",
    "googlenet",
    "efficientnet_b0",
    "squeezenet1_1",
    "regnet_x_400mf",
    "vit_tiny",
    "encoder",
)
GRIDS: tuple[tuple[str, RoundTo], ...] = (("half, free", 1), ("half, auto", "auto"))
MEASURED = ("resnet18", "resnet50", "mobilenet_v2", "googlenet", "efficientnet_b0", "vit_tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=Path, help="a profile; calibrated if not given")
    parser.add_argument("--runtime", default="ort", help="where all runs, without --device")
    parser.add_argument("--kernels", type=int, default=1000, help="measurements of a calibration")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each model")
    parser.add_argument("--only", nargs="+", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--without-measure", action="store_true", help="the first table alone")
    parser.add_argument("-o", "--output", type=Path, help="a page that gets the tables")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.device:
        device = load_profile(options.device)
    else:
        device = mg.calibrate(options.runtime, kernels=options.kernels)
    graphs = {name: lifted(name) for name in options.only}
    text = predictions(graphs, device, options.seconds)
    if not options.without_measure:
        chosen = {name: graph for name, graph in graphs.items() if name in MEASURED}
        text += "\n\n" + budgets(chosen, device, options.seconds)
    if options.output:
        write(options.output, device, text)


def lifted(name: str) -> mg.ChannelGraph:
    """A network with random weights."""
    example: torch.Tensor = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    if name == "vit_tiny":
        net: nn.Module = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768)
    elif name == "encoder":
        layer = nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True)
        net = nn.Sequential(nn.Linear(384, 384), nn.TransformerEncoder(layer, 4))
        example = torch.randn(1, 128, 384, generator=torch.Generator().manual_seed(0))
    else:
        given = {"init_weights": True} if name == "googlenet" else {}
        net = cast(nn.Module, torchvision.models.get_model(name, weights=None, **given))
    net.eval()
    randomize_weights(net, (example,))
    return mg.lift(mg.export(net, (example,)))


def predictions(
    graphs: Mapping[str, mg.ChannelGraph], device: DeviceProfile, seconds: float
) -> str:
    """The table of predictions."""
    lines = [
        "| network | widths | measured ms | predicted ms | off | machine | off at its speed |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    measured, predicted, speeds = list[float](), list[float](), list[float]()
    reference = probe_network(*REFERENCE)
    for name, graph in graphs.items():
        models: dict[str, ir.Model] = {"as it is": graph.model}
        for widths, grid in GRIDS:
            plan = mg.plan(graph, {"flops": "50%"}, round_to=grid)
            models[widths] = mg.apply(graph, plan, verify=False)
        together = [*models.values(), ir.from_proto(reference)]
        found = mg.bench(together, runtimes=[device.runtime], seconds=seconds)
        *timings, again = found.models
        speed = 1000 * again.p50_ms / device.reference
        for (widths, model), timing in zip(models.items(), timings, strict=True):
            total = mg.cost(mg.lift(model), "latency", device=device).total
            measured.append(timing.p50_ms)
            predicted.append(total)
            speeds.append(speed)
            off = total / timing.p50_ms - 1
            lines.append(
                f"| {name} | {widths} | {timing.p50_ms:.2f} | {total:.2f} | {off:+.1%} "
                f"| {speed:.2f} | {speed * total / timing.p50_ms - 1:+.1%} |"
            )
            print(lines[-1], flush=True)
    for what, scales in (("", np.ones(len(speeds))), (" at the machine's speed", speeds)):
        off = np.abs(np.array(predicted) * scales / np.array(measured) - 1)
        tau = kendalltau(np.array(predicted) * scales, measured).statistic
        lines.append(
            f"\nOff{what}: within 5 % {np.mean(off <= 0.05):.0%}, within 10 % "
            f"{np.mean(off <= 0.1):.0%}, at most {off.max():.0%}; Kendall's tau {tau:.3f}."
        )
        print(lines[-1])
    lines.append(f"{len(device.kernels)} measurements in {device.minutes:g} minutes.")
    print(lines[-1])
    return "\n".join(lines)


def budgets(graphs: Mapping[str, mg.ChannelGraph], device: DeviceProfile, seconds: float) -> str:
    """The table of measured budgets."""
    lines = [
        "| network, 60 % of the time | rounds | measured | measured again | FLOPs left "
        "| FLOPs left by a FLOPs plan of the same time |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for name, graph in graphs.items():
        plan = mg.plan(graph, {"latency": "60%"}, device=device, measure=True)
        again = share(graph, plan, device, seconds)
        by_flops, time = same_time(graph, again, device, seconds)
        told = plan.request["measured"]
        lines.append(
            f"| {name} | {told['rounds']} | {told['share']:.1%} | {again:.1%} | "
            f"{left(graph, plan):.1%} | {left(graph, by_flops):.1%} at {time:.1%} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def share(graph: mg.ChannelGraph, plan: mg.Plan, device: DeviceProfile, seconds: float) -> float:
    """A plan's share of the original's time."""
    models = [graph.model, mg.apply(graph, plan, verify=False)]
    speedup = mg.bench(models, runtimes=[device.runtime], seconds=2 * seconds).models[1].speedup
    assert speedup is not None
    return 1 / speedup


def left(graph: mg.ChannelGraph, plan: mg.Plan) -> float:
    """A plan's share of the FLOPs."""
    flops = mg.cost(graph, "flops")
    return flops.at(plan.widths(graph)) / flops.total


def same_time(
    graph: mg.ChannelGraph, time: float, device: DeviceProfile, seconds: float
) -> tuple[mg.Plan, float]:
    """The plan by FLOPs with free widths, as tools make it, that takes a share of the time."""
    low, high = 0.05, 1.0
    found: list[tuple[float, mg.Plan]] = []
    for _ in range(6):
        middle = (low + high) / 2
        plan = mg.plan(graph, {"flops": f"{100 * middle:.4f}%"}, round_to=1)
        spent = share(graph, plan, device, seconds / 2)
        found.append((spent, plan))
        low, high = (middle, high) if spent < time else (low, middle)
    spent, plan = min(found, key=lambda each: abs(each[0] - time))
    return plan, spent


def write(page: Path, device: DeviceProfile, tables: str) -> None:
    """Put the tables into their section of a page, or behind the page."""
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    versions = ", ".join(f"{what} {version}" for what, version in device.versions.items())
    made = f"Made by `tools/bench_latency.py` on {dt.date.today()}, {device.machine}, {versions}."
    heading = HEADING if device.runtime == "ort" else f"{HEADING}, {device.runtime}"
    section = f"{heading}\n\n{made}\n{about}\n\n{tables}\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(f"{heading}\n")
    behind = "".join(f"\n## {each}" for each in rest.split("\n## ")[1:])
    page.write_text(f"{before.rstrip()}\n\n{section}{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
