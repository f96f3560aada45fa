"""Speed beside another state of the program, in one run.

    python tools/bench_against.py                     # prints a table of ratios to 176c0fa
    python tools/bench_against.py ../base             # to another checkout
    python tools/bench_against.py --networks resnet50 --rounds 3
    python tools/bench_against.py --onnxsim           # beside its pruning, if it is installed

Every round runs both checkouts in turn, the other one first in every second round, each
measurement in a fresh process: CPU seconds of one
thread for the stages from a PyTorch module to a checked smaller one, for the way from a file to a
checked smaller file and from a module to a checked smaller module as the sums of their stages, and
of the commands ``--help`` and ``analyze``. Shown are the least of all rounds on both sides, and the
median of the ratios within a round (this checkout over the other; below 1 is faster). Only public
names are used, so that the code of both sides may be cut differently.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")

ROOT = Path(__file__).resolve().parent.parent
BASE = "176c0fa"
NETWORKS = ("resnet50", "densenet201", "convnext_base", "vit_b_16", "swin_t")
PRUNED = ("resnet50", "densenet121")
COMMANDS = ("--help", "analyze")
WAYS = {
    "file to checked slim file": ("lift from file", "plan", "apply, no check", "verify", "save"),
    "module to checked slim module": (
        *("export", "lift", "plan", "apply, no check", "verify"),
        "to_torch",
    ),
}
STAGES = tuple(dict.fromkeys(stage for stages in WAYS.values() for stage in stages))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?", help=f"another checkout, else {BASE}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--onnxsim", action="store_true", help="beside onnxsim's pruning instead")
    parser.add_argument("--measure", help="used internally")
    options = parser.parse_args()
    if options.measure:
        pruned = options.measure.endswith(".onnx")
        print(json.dumps((pruning if pruned else stages)(options.measure)))
        return 0
    if options.onnxsim:
        for line in beside_onnxsim(options.rounds):
            print(line, flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        other = unpacked(folder) if options.other is None else options.other.resolve()
        for line in table(other, options.networks, options.rounds):
            print(line, flush=True)
    return 0


def unpacked(folder: str) -> Path:
    """The program as it was at the base commit."""
    words = ["git", "archive", BASE]
    packed = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return Path(folder)


def table(other: Path, networks: Sequence[str] = NETWORKS, rounds: int = 5) -> Iterator[str]:
    """The lines of the table of ratios, in Markdown."""
    sides = (ROOT, other)
    for side in sides:
        compiled(side)
    yield "| what | this, s | other, s | ratio of the least | median ratio |"
    yield "|---|---:|---:|---:|---:|"
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "resnet50.onnx")
        save_example(model)
        for words in COMMANDS:
            arguments = [words, model] if words == "analyze" else [words]
            of_both = [in_turn(sides, k, partial(command, arguments)) for k in range(rounds)]
            yield row(f"`morphgraph {words}`", of_both)
    for network in networks:
        found = [in_turn(sides, k, partial(child, network)) for k in range(rounds)]
        for what in (*WAYS, *STAGES):
            yield row(f"{network}: {what}", [[side[what] for side in both] for both in found])


def compiled(side: Path) -> None:
    """Write bytecode as an installation does: much is imported when it is first used.

    Else the stages would count the compiling of Python, wherever PYTHONDONTWRITEBYTECODE is set.
    """
    words = [sys.executable, "-m", "compileall", "-q", "morphgraph", "passes"]
    subprocess.run(words, check=True, cwd=side, env=environment(side))


def in_turn(sides: Sequence[Path], k: int, measure: Callable[[Path], Found]) -> list[Found]:
    """What both sides give, the first one measured first in even rounds."""
    order = (0, 1) if k % 2 == 0 else (1, 0)
    found = {place: measure(sides[place]) for place in order}
    return [found[0], found[1]]


def beside_onnxsim(rounds: int) -> Iterator[str]:
    """The lines of a table of the ways through the structure alone, beside onnxsim's pruning."""
    yield "| network | lift, plan, resize, s | onnxsim parse, prune, write, s | ratio |"
    yield "|---|---:|---:|---:|"
    for network in PRUNED:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.onnx")
            save_example(path, network)
            found = [child(path, ROOT) for _ in range(rounds)]
        mine, other = (min(both[side] for both in found) for side in ("this", "onnxsim"))
        yield f"| {network} | {mine:.3f} | {other:.3f} | {mine / other:.2f} |"


def pruning(path: str) -> dict[str, float]:
    """CPU seconds of half of the work away, by this program and by onnxsim, file read first."""
    import onnx
    import onnxsim

    import morphgraph as mg

    for name in ("lift", "plan", "apply"):
        getattr(mg, name)
    start = time.process_time()
    graph = mg.lift(path)
    mg.apply(graph, mg.plan(graph, budget={"flops": "50%"}), verify=False)
    between = time.process_time()
    small = onnxsim.apply_structured_pruning_cpp(onnx.load(path), 0.3)
    onnx.save(small, f"{path}.small.onnx")
    return {"this": between - start, "onnxsim": time.process_time() - between}


def row(what: str, rounds: list[list[float]]) -> str:
    """A line of the table from (this, other) seconds per round."""
    mine, other = (min(side) for side in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    return f"| {what} | {mine:.3f} | {other:.3f} | {mine / other:.2f} | {ratio:.2f} |"


def environment(side: Path) -> dict[str, str]:
    own = {"PYTHONPATH": str(side), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **own}


def command(arguments: list[str], side: Path) -> float:
    """CPU seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "morphgraph", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment(side),
        cwd=side,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def child(network: str, side: Path) -> dict[str, float]:
    """The stages of one network in a process of its own, with the code of one side."""
    done = subprocess.run(
        [sys.executable, __file__, str(side), "--measure", network],
        env=environment(side),
        cwd=side,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def save_example(path: str, network: str = "resnet50") -> None:
    import morphgraph as mg

    net, example = build(network)
    mg.save(mg.export(net, (example,)), path)


def build(network: str) -> tuple[Any, Any]:
    """A torchvision network in eval mode, and an image for it."""
    import torch
    import torchvision

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = getattr(torchvision.models, network)(weights=None).eval()
    for kernel in net.parameters():
        # A vision transformer's last layer begins at zero, where no trained one is; all outputs
        # would be zero, and checks of both sides would have to look at every value within.
        if kernel.ndim > 1 and not kernel.any():
            torch.nn.init.normal_(kernel, std=0.02)
    return net, torch.randn(1, 3, 224, 224)


def stages(network: str) -> dict[str, float]:
    """CPU seconds of every stage, each run once after all modules have been imported."""
    import morphgraph as mg

    warnings.filterwarnings("ignore")
    net, example = build(network)
    for name in ("export", "lift", "plan", "apply", "verify", "save", "to_torch"):
        getattr(mg, name)
    seconds: dict[str, float] = {}

    def clocked(stage: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        seconds[stage] = time.process_time() - start
        return result

    model = clocked("export", lambda: mg.export(net, (example,)))
    clocked("lift", lambda: mg.lift(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        mg.save(model, path)
        graph = clocked("lift from file", lambda: mg.lift(path))
    plan = clocked("plan", lambda: mg.plan(graph, budget={"flops": "50%"}))
    small = clocked("apply, no check", lambda: mg.apply(graph, plan, verify=False))
    clocked("verify", lambda: mg.verify(graph, plan, small))
    with tempfile.TemporaryDirectory() as folder:
        clocked("save", lambda: mg.save(small, Path(folder) / "small.onnx"))
    clocked("to_torch", lambda: mg.to_torch(small))
    sums = {way: sum(seconds[stage] for stage in parts) for way, parts in WAYS.items()}
    return {**sums, **seconds}


if __name__ == "__main__":
    sys.exit(main())
