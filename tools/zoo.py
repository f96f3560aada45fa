"""Coverage over whole networks: what can be resized, at what cost, and proof that it is right.

    python tools/zoo.py --small          # the small networks; writes docs/coverage-small.md
    python tools/zoo.py --only resnet18  # one network, its findings as JSON

Every network runs in a process of its own under a time and a memory limit. Findings are appended to
``runs/zoo/results.jsonl`` and reused while neither the program nor this file has changed, so that a
run that was stopped goes on where it was. The exit code is 1 if any check failed.
"""

import argparse
import copy
import dataclasses
import datetime as dt
import hashlib
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.ort import run
from morphgraph.passes.resize import resize
from morphgraph.testing import is_rejected, make_felt, wrong_slices

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "zoo" / "results.jsonl"
MEMORY_LIMIT_BYTES = 20 * 2**30
TIME_LIMIT_S = 900

TOLERANCE = 1e-5  # of the output's scale
FELT = 1e-2
BUDGET = 0.50
SLACK = 0.05  # a plan lands at most this share below its budget


@dataclass(frozen=True, slots=True)
class Entry:
    """A network of the zoo: how to build it, and an example input."""

    name: str
    build: Callable[[], tuple[nn.Module, torch.Tensor]]
    small: bool = True


@dataclass
class Findings:
    """What was found about one network; errors are shares of the output's scale."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mib: float = 0.0
    nodes: int = 0
    rounding: float = 0.0
    export_error: float = float("nan")
    macs: float = 0.0
    torch_macs: float = 0.0
    params: float = 0.0
    groups: int = 0
    resizable: int = 0
    statistical: int = 0
    shrinkable: float = 0.0
    lowest: float = 1.0
    pinned: dict[str, int] = field(default_factory=dict)
    opaque: list[str] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    felt: list[float] = field(default_factory=list)
    planted: int = 0
    passed_wrongly: list[str] = field(default_factory=list)
    torch_errors: list[float] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)
    crash: str = ""

    @property
    def failures(self) -> list[str]:
        """The checks that did not hold, in words."""
        if self.crash:
            return [self.crash]
        found = []
        if not self.export_error <= TOLERANCE:
            found.append(f"export is off by {self.export_error:.1e}")
        if self.macs != self.torch_macs:
            found.append(f"{self.macs:.0f} MACs, torch counts {self.torch_macs:.0f}")
        if any(not BUDGET - SLACK <= ratio <= BUDGET for ratio in self.ratios):
            found.append(f"plans at {', '.join(f'{ratio:.1%}' for ratio in self.ratios)}")
        if not max(self.errors) <= TOLERANCE:
            found.append(f"resized is off by {max(self.errors):.1e}")
        if not min(self.felt) > FELT:
            found.append(f"felt only {min(self.felt):.1e}")
        if self.passed_wrongly or not self.planted:
            found.append(f"passed wrongly: {', '.join(self.passed_wrongly) or 'nothing planted'}")
        if not max(self.torch_errors) <= TOLERANCE:
            found.append(f"to_torch is off by {max(self.torch_errors):.1e}")
        if self.without_gradient:
            found.append(f"no gradient: {', '.join(self.without_gradient[:3])}")
        return found


def examine(entry: Entry, seeds: Sequence[int] = (0, 1, 2)) -> Findings:
    """Put one network through every check."""
    found = Findings(entry.name)
    clock = _Clock(found.seconds)
    torch.manual_seed(0)
    with clock("build"):
        net, example = entry.build()
        make_felt(net, example)
    with clock("export"):
        model = mg.export(net, (example,))
    found.nodes = len(model.graph)
    feeds = {model.graph.inputs[0].name or "": example.numpy()}
    with torch.no_grad():
        reference = net(example).numpy()
        exact = copy.deepcopy(net).double()(example.double()).numpy()
    found.rounding = _relative(reference, exact)
    found.export_error = _relative(next(iter(run(model, feeds).values())), reference)
    with clock("lift"):
        graph = mg.lift(model)
    with clock("cost"):
        macs = mg.cost(graph, "macs")
        found.macs, found.params = macs.total, mg.cost(graph, "params").total
    found.torch_macs = torch_macs(net, example)
    _describe_groups(found, graph)
    for seed in seeds:
        with clock("plan"):
            plan = mg.plan(graph, {"flops": f"{BUDGET:.0%}"}, score="random", seed=seed)
        found.ratios.append(plan.cost["flops"].after / plan.cost["flops"].before)
        keep = plan.kept(graph)
        with clock("resize"):
            small = resize(graph, keep)
        onnx.checker.check_model(ir.to_proto(small), full_check=True)
        with clock("verify"):
            report = mg.verify(graph, plan, small, feeds=feeds)
        found.errors.append(report.worst.relative)
        found.felt.append(report.felt)
    with clock("plant"):
        for fault, broken in _faults(graph, plan, small, seed=0):
            found.planted += 1
            if not is_rejected(graph, plan, broken):
                found.passed_wrongly.append(fault)
    with clock("to_torch"):
        for one in (model, small):
            _check_torch(found, one, example)
    found.memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


class _Clock:
    """Adds up seconds per stage."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + spent, 3)


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def torch_macs(net: nn.Module, example: torch.Tensor) -> float:
    """Multiply-adds of one sample by torch's own counter; fused attention would count as 0."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            net(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2 / len(example)


def shrinkable_share(graph: ChannelGraph) -> float:
    """Share of the MACs in terms of which at least one factor belongs to a resizable group."""
    free = [group.index for group in graph.groups if group.resizable and group.width > 1]
    varies = np.asarray(graph.per_channel[:, free].sum(axis=1)).reshape(-1) > 0
    total = fixed = 0.0
    for node in graph.nodes:
        for term in node.macs:
            size = float(np.prod(graph.couplings.sizes[list(term)], dtype=np.float64))
            total += size
            if not varies[graph.node_class[list(term)]].any():
                fixed += size
    return 1 - fixed / total


def _describe_groups(found: Findings, graph: ChannelGraph) -> None:
    found.groups = len(graph.groups)
    free = [group for group in graph.groups if group.resizable]
    found.resizable = len(free)
    found.statistical = sum(group.statistical for group in free)
    found.shrinkable = shrinkable_share(graph)
    floor = np.array([1 if group.resizable else group.width for group in graph.groups])
    macs = mg.cost(graph, "macs")
    found.lowest = macs.at(floor) / macs.total
    reasons = Counter(group.reason for group in graph.groups if group.reason is not None)
    found.pinned = dict(sorted(reasons.items()))
    found.opaque = sorted({f"{n.ir.op_type}: {n.opaque}" for n in graph.nodes if n.opaque})


def _faults(
    graph: ChannelGraph, plan: mg.Plan, small: ir.Model, seed: int, kernels: int = 3
) -> list[tuple[str, ir.Model]]:
    """Wrong slices of a few kernels, one per kernel and axis."""
    generator = np.random.default_rng(seed)
    old, new = graph.model.graph.initializers, small.graph.initializers
    sliced = [
        name
        for name, value in old.items()
        if name in new and len(value.shape or ()) > 1 and value.shape != new[name].shape
    ]
    chosen = generator.choice(sliced, min(kernels, len(sliced)), replace=False).tolist()
    per_axis: dict[tuple[str, str], tuple[str, ir.Model]] = {}
    for fault, broken in wrong_slices(graph, plan.kept(graph), small, chosen):
        name, _, axis, _ = fault.split(" ", 3)
        per_axis.setdefault((name, axis), (fault, broken))
    return list(per_axis.values())


def _check_torch(found: Findings, model: ir.Model, example: torch.Tensor) -> None:
    net = mg.to_torch(model)
    output = net(example)
    feeds = {model.graph.inputs[0].name or "": example.numpy()}
    expected = next(iter(run(model, feeds).values()))
    found.torch_errors.append(_relative(output.detach().numpy(), expected))
    output.square().sum().backward()
    found.without_gradient += [
        name for name, parameter in net.named_parameters() if parameter.grad is None
    ]


def _torchvision(name: str, size: int = 224, **options: object) -> Entry:
    def build() -> tuple[nn.Module, torch.Tensor]:
        import torchvision

        net = torchvision.models.get_model(name, weights=None, **options)
        if hasattr(net, "AuxLogits"):  # used in training only
            net.aux_logits, net.AuxLogits = False, None
        generator = torch.Generator().manual_seed(0)
        return net, torch.randn((1, 3, size, size), generator=generator)

    return Entry(name, build)


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        _torchvision("resnet18"),
        _torchvision("resnet50"),
        _torchvision("vgg11_bn"),
        _torchvision("mobilenet_v2"),
        _torchvision("densenet121"),
        _torchvision("googlenet", aux_logits=False, init_weights=False),
        _torchvision("inception_v3", size=299, init_weights=False),
        _torchvision("squeezenet1_1"),
        _torchvision("efficientnet_b0"),
        _torchvision("mnasnet0_5"),
        _torchvision("regnet_x_400mf"),
        _torchvision("shufflenet_v2_x0_5"),
        _torchvision("mobilenet_v3_small"),
        _torchvision("convnext_tiny"),
    )
}


def quiet() -> None:
    """Silence exporters; what matters is in the findings."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _digest() -> str:
    """Of everything that a finding depends on in this repository."""
    digest = hashlib.sha256()
    sources = [*(ROOT / "morphgraph").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    for path in sorted({path.resolve() for path in (*sources, Path(__file__))}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _stored(digest: str) -> dict[str, Findings]:
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {row["name"]: Findings(**row["findings"]) for row in rows if row["digest"] == digest}


def _run_alone(name: str) -> Findings:
    """One network in a process of its own."""
    command = [sys.executable, __file__, "--only", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIME_LIMIT_S, env=environment
        )
    except subprocess.TimeoutExpired:
        return Findings(name, crash=f"no result in {TIME_LIMIT_S} s")
    lines = done.stdout.splitlines()
    if not lines:
        words = done.stderr.strip().splitlines()
        return Findings(name, crash=words[-1] if words else f"ended with {done.returncode}")
    return Findings(**json.loads(lines[-1]))


def _measure(entries: Sequence[Entry], fresh: bool) -> list[Findings]:
    digest = _digest()
    stored = {} if fresh else _stored(digest)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for entry in entries:
        found = stored.get(entry.name)
        if found is None:
            start = time.perf_counter()
            found = _run_alone(entry.name)
            row = {"name": entry.name, "digest": digest, "findings": dataclasses.asdict(found)}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{entry.name}: {time.perf_counter() - start:.0f} s", end="", file=sys.stderr)
            print("; ".join(["", *found.failures]), file=sys.stderr, flush=True)
        results.append(found)
    return results


HEADER = """# Coverage: {title}

`{command}`, {date}. {versions}.

Every network is built by torchvision with random weights that can be felt (biases, scales and
running statistics random, outputs of order 1), exported, lifted, planned at 50 % of its FLOPs with
random scores (three seeds), resized, and held against the original with the removed channels
masked. All errors are shares of the output's scale.

- **MMACs**: multiply-adds of one sample; equal to `torch.utils.flop_counter` / 2 to the integer.
- **shrinkable**: 1 - (MACs in cost terms of which no factor belongs to a resizable group) / all
MACs.
- **lowest**: MACs with every resizable group at width 1.
- **at 50 %**: where the plans land. **error**: resized against masked, the worst seed.
- **felt**: masked against original, the least seed. **wrong**: planted wrong slices that were
rejected.
- **torch**: `to_torch` against ONNX Runtime, base and resized, the worse; every parameter has a
gradient.
  In brackets what torch itself loses in float32 against float64.
- **s**: seconds to export / lift / plan / resize / verify (all three seeds), one process on
{machine}.

| network | MMACs | groups | shrinkable | lowest | at 50 % | error | felt | wrong | torch | s |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def report(title: str, command: str, results: Sequence[Findings]) -> str:
    """The findings as a page of Markdown."""
    tools = ("torch", "torchvision", "onnx", "onnx-ir", "onnxruntime", "numpy")
    versions = ", ".join(f"{tool} {version(tool)}" for tool in tools)
    header = HEADER.format(
        title=title,
        command=command,
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        versions=f"Python {platform.python_version()}, {versions}",
        machine=f"{os.cpu_count()} cores",
    )
    good = sum(not found.failures for found in results)
    lines = [_row(found) for found in results]
    summary = ["", f"{good} of {len(results)} networks pass every check.", ""]
    failed = [f"- {f.name}: {'; '.join(f.failures)}" for f in results if f.failures]
    return header + "\n".join([*lines, *summary, *failed, *_reasons(results)]) + "\n"


def _row(found: Findings) -> str:
    if found.crash:
        return f"| {found.name} | " + " | ".join(["failed", *["" for _ in range(9)]]) + " |"
    span = sorted(found.ratios)
    planted = f"{found.planted - len(found.passed_wrongly)} of {found.planted}"
    stages = ("export", "lift", "plan", "resize", "verify")
    cells = [
        found.name,
        f"{found.macs / 1e6:.3f}",
        f"{found.resizable} of {found.groups}",
        f"{found.shrinkable:.1%}",
        f"{found.lowest:.2%}",
        f"{span[0]:.2%} to {span[-1]:.2%}",
        f"{max(found.errors):.1e}",
        f"{min(found.felt):.2f}",
        planted,
        f"{max(found.torch_errors):.1e} ({found.rounding:.0e})",
        " / ".join(f"{found.seconds.get(stage, 0.0):.2f}" for stage in stages),
    ]
    return "| " + " | ".join(cells) + " |"


def _reasons(results: Sequence[Findings]) -> list[str]:
    lines = ["", "## What keeps its size", ""]
    for found in results:
        if found.crash:
            continue
        reasons = "; ".join(f"{reason} ({count})" for reason, count in found.pinned.items())
        opaque = f" Opaque: {', '.join(found.opaque)}." if found.opaque else ""
        lines.append(f"- **{found.name}**: {reasons or 'nothing'}.{opaque}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the small networks")
    parser.add_argument("--only", choices=ENTRIES, help="one network, in this process")
    parser.add_argument("--fresh", action="store_true", help="measure again what is stored")
    options = parser.parse_args()
    quiet()
    if options.only:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        torch.set_num_threads(1)
        print(json.dumps(dataclasses.asdict(examine(ENTRIES[options.only]))))
        return 0
    entries = [entry for entry in ENTRIES.values() if entry.small or not options.small]
    results = _measure(entries, options.fresh)
    name = "coverage-small" if options.small else "coverage"
    title = "small networks" if options.small else "the zoo"
    command = f"python tools/zoo.py{' --small' if options.small else ''}"
    (ROOT / "docs" / f"{name}.md").write_text(report(title, command, results))
    return int(any(found.failures for found in results))


if __name__ == "__main__":
    sys.exit(main())
