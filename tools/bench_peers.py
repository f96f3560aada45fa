"""Speed against Torch-Pruning, and of the command line; writes docs/benchmarks.md (``make bench``).

Every figure is CPU seconds of one thread (``time.process_time``; children's user and system time
for commands), since other programs on the machine do not count there. Each measurement runs in a
fresh process: *first* is the first call in it, *median* that of seven. Torch-Pruning (DepGraph,
CVPR 2023) builds its graph and prunes every layer but the classifier to 50 %; morphgraph lifts the
canonical model in memory, groups it and evaluates FLOPs, parameters and activation bytes with their
gradients.
"""

import argparse
import datetime as dt
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {
    "resnet50": 1 / 4,
    "densenet201": 1 / 100,
}  # and the share of the peer's time to stay in
COLUMNS = (
    "network",
    "first s",
    "median s",
    "canonicalize s",
    "peer: build s",
    "peer: build + prune s",
    "share",
    "promised",
)
REPEATS = 7
HELP_LIMIT_S, ANALYZE_LIMIT_S = 0.3, 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", choices=["ours", "peer", "export"], help="used internally")
    parser.add_argument("--network", default="resnet50", help="used internally")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    if options.measure:
        found = {"ours": ours, "peer": peer, "export": export}[options.measure](options.network)
        print(json.dumps(found))
        return 0
    return compare(options.output)


def compare(output: Path) -> int:
    """Measure everything and write the page; 1 if something is slower than promised."""
    rows, missed = [], []
    for network, limit in NETWORKS.items():
        say(f"{network}: morphgraph")
        mine = child("ours", network)
        say(f"{network}: Torch-Pruning")
        other = child("peer", network)
        share = mine["first"] / other["first"]
        if share > limit:
            missed.append(f"{network}: {share:.4f} of the peer's time, promised {limit:g}")
        figures = (mine["first"], mine["median"], mine["canonicalize"])
        peers = (other["build"], other["first"], share, limit)
        rows.append(f"| {network} | {' | '.join(f'{number:.3g}' for number in figures + peers)} |")
    commands = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.onnx"
        say("resnet50: export")
        child("export", str(path))
        for arguments, limit in (
            (["--help"], HELP_LIMIT_S),
            (["analyze", str(path)], ANALYZE_LIMIT_S),
        ):
            seconds, torch_free = command(arguments)
            shown = "morphgraph " + " ".join(a.replace(folder + "/", "") for a in arguments)
            commands.append(f"| `{shown}` | {seconds:.2f} | {limit:g} | {torch_free} |")
            if seconds > limit or torch_free != "no":
                missed.append(f"{shown}: {seconds:.2f} s, torch imported: {torch_free}")
    say("beside 176c0fa")
    beside = [sys.executable, str(ROOT / "tools" / "bench_against.py"), "--rounds", "3"]
    ratios = subprocess.run(beside, check=True, stdout=subprocess.PIPE, text=True).stdout
    output.write_text(page(rows, commands, ratios))
    print(output.read_text())
    for line in missed:
        say(f"MISSED: {line}")
    return 1 if missed else 0


def page(rows: list[str], commands: list[str], ratios: str) -> str:
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torch-pruning", "onnx-ir")
    )
    return f"""# Benchmarks

Made by `make bench` on {dt.datetime.now(dt.UTC).date()}, Python {platform.python_version()},
{versions}.

{(__doc__ or "").split(chr(10), 2)[2].strip()}

## Lifting, grouping and costs

| {" | ".join(COLUMNS)} |
|---{"|---:" * (len(COLUMNS) - 1)}|
{chr(10).join(rows)}

`share` is *first* over the peer's build + prune. Canonicalization (folding, shapes) of what
PyTorch's exporter emits happens once per file and is not part of it.

## Commands

| command | CPU s | promised | imports torch |
|---|---:|---:|---|
{chr(10).join(commands)}

## Beside an earlier state

CPU seconds of one thread, each stage once in a fresh process, this program beside its commit
176c0fa by turns (`tools/bench_against.py`). Ways are the sums of their stages.

{ratios.strip()}
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def child(measure: str, network: str) -> dict[str, float]:
    """One measurement in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", measure, "--network", network]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def command(arguments: list[str]) -> tuple[float, str]:
    """CPU seconds of a command (the least of three), and whether it imports torch."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "morphgraph", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    probe = (
        "import sys; from morphgraph.cli import main; "
        f"code = main({arguments!r}); print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return min(spent), "yes" if done.stderr.strip().endswith("True") else "no"


def clocked(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def build(network: str) -> tuple[Any, Any]:
    """A torchvision network in eval mode, and an image for it."""
    import torch
    import torchvision

    torch.set_num_threads(1)
    net = getattr(torchvision.models, network)(weights=None).eval()
    return net, torch.randn(1, 3, 224, 224)


def ours(network: str) -> dict[str, float]:
    import torch

    import morphgraph as mg
    from morphgraph.passes.canonical.canonicalize import canonicalize

    lift, cost = mg.lift, mg.cost  # their modules are imported before the clock starts
    net, example = build(network)
    raw = torch.onnx.export(net, (example,), dynamo=True, optimize=False, verbose=False)
    assert raw is not None
    canonicalizing = clocked(lambda: canonicalize(raw.model))
    exported = mg.export(net, (example,))

    def work() -> None:
        graph = lift(exported)
        for kind in ("flops", "params", "memory"):
            resource_cost = cost(graph, kind)
            resource_cost.at(graph.widths)
            resource_cost.gradient(graph.widths)

    seconds = [clocked(work) for _ in range(REPEATS)]
    return {
        "first": seconds[0],
        "median": statistics.median(seconds),
        "canonicalize": canonicalizing,
    }


def peer(network: str) -> dict[str, float]:
    import torch_pruning as tp

    net, example = build(network)
    head = [module for module in net.modules() if type(module).__name__ == "Linear"]

    def prune() -> None:
        importance = tp.importance.MagnitudeImportance(p=2)
        tp.pruner.MagnitudePruner(
            net, example, importance, pruning_ratio=0.5, ignored_layers=head
        ).step()

    building = clocked(lambda: tp.DependencyGraph().build_dependency(net, example))
    return {"build": building, "first": clocked(prune)}


def export(path: str) -> dict[str, float]:
    import morphgraph as mg

    net, example = build("resnet50")
    mg.save(mg.export(net, (example,)), path)
    return {}


if __name__ == "__main__":
    sys.exit(main())
