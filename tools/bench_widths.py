"""How much faster half of the FLOPs is, by the grid of widths: a table for docs/benchmarks.md.

    python tools/bench_widths.py                              # minutes; a quiet machine is better
    python tools/bench_widths.py -o docs/benchmarks.md        # as its section of the page

Every network has random weights. Plans differ in ``--round-to`` alone. Original and plans run
interleaved in ONNX Runtime, one thread; a cell is the median of the paired ratios of CPU time with
its 95 % interval, and how many convolutions ran outside of the blocked layout.
"""

import argparse
import datetime as dt
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import onnxruntime as ort
import torch
import torchvision
from onnx_ir import Model
from torch import nn

import morphgraph as mg
from morphgraph.options import RoundTo
from morphgraph.passes.analysis.convolutions import convolutions, out_of_blocks
from morphgraph.testing.random_weights import randomize_weights

NETWORKS = ("mobilenet_v2", "efficientnet_b0", "mobilenet_v3_large", "mnasnet1_0", "resnet18")
HEADING = "## Half of the FLOPs by the grid of widths"
GRIDS = ("auto", "1", "4", "16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="names in torchvision")
    parser.add_argument("--grids", nargs="+", default=GRIDS, metavar="N|auto")
    parser.add_argument("--budget", default="50%", help="of the FLOPs")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model")
    parser.add_argument("-o", "--output", type=Path, help="a page that gets the table")
    options = parser.parse_args()
    heads = [f"`--round-to {grid}`" for grid in options.grids]
    lines = [f"| network at {options.budget} of the FLOPs | ms | {' | '.join(heads)} |"]
    lines.append(f"|---|---:|{'---|' * len(heads)}")
    print("\n".join(lines))
    for name in options.networks:
        lines.append(row(name, options.grids, options.budget, options.seconds))
        print(lines[-1], flush=True)
    if options.output:
        write(options.output, "\n".join(lines))


def write(page: Path, table: str) -> None:
    """Put the table into its section of a page, or behind the page."""
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    made = f"Made by `tools/bench_widths.py` on {dt.date.today()}, onnxruntime {ort.__version__}."
    section = f"{HEADING}\n\n{made}\n{about}\n\n{table}\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(HEADING)
    behind = "".join(f"\n## {each}" for each in rest.split("\n## ")[1:])
    page.write_text(f"{before.rstrip()}\n\n{section}{behind}", encoding="utf-8")


def row(name: str, grids: Sequence[str], budget: str, seconds: float) -> str:
    """A network's time, and what each grid makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        net = cast(nn.Module, torchvision.models.get_model(name, weights=None)).eval()
        randomize_weights(net, (image,))
        graph = mg.lift(mg.export(net, (image,)))
        made = [resized(graph, grid, budget) for grid in grids]
    found = mg.bench([graph.model, *(model for model, _ in made)], seconds=seconds)
    first, *others = found.models
    cells = [f"{name} | {first.p50_ms:.2f}"]
    for timing, (_, outside) in zip(others, made, strict=True):
        assert timing.speedup is not None
        assert timing.speedup_interval is not None
        low, high = timing.speedup_interval
        cells.append(f"{timing.speedup:.2f} ({low:.2f} to {high:.2f}), {outside}")
    return f"| {' | '.join(cells)} |"


def resized(graph: mg.ChannelGraph, grid: str, budget: str) -> tuple[Model, str]:
    """A network at a grid, and how many of its convolutions are outside of the layout."""
    round_to: RoundTo = "auto" if grid == "auto" else int(grid)
    plan = mg.plan(graph, {"flops": budget}, round_to=round_to)
    outside = len(out_of_blocks(graph, plan.widths(graph)))
    return mg.apply(graph, plan, verify=False), f"{outside} of {len(convolutions(graph))} outside"


if __name__ == "__main__":
    main()
