"""Kill commands at random moments, and look at what they leave behind.

    python tools/kill_runs.py --count 50 --seed 0                 # of each command
    python tools/kill_runs.py --count 5 --commands apply,shrink

Every second kill comes as soon as something appears in the folder, so that writing is hit as often
as computing; the others come at any moment of a run. After each, what has the name of a result must
be a whole one, inputs must be as they were, and the command, run once more (with `--resume` where
it has that), must come to the result of an undisturbed run. Exits with 1 where it does not.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import morphgraph as mg
from morphgraph.cli import main as morphgraph
from morphgraph.testing.limited import contents

PATIENCE_SECONDS = 300.0

# Processes are forked from one that has imported everything and computed nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["morphgraph.cli.morph", "morphgraph.shrinking", "morphgraph.recipes.run"]
)


@dataclass
class Counts:
    """Kills of a command: how many found it running, and what was there then."""

    running: int = 0
    nothing: int = 0
    whole: int = 0
    faults: int = 0

    def fault(self, words: str) -> None:
        self.faults += 1
        print(f"FAULT: {words}", file=sys.stderr)


@dataclass(frozen=True)
class Command:
    """A command line that writes into a folder of its own.

    Attributes:
        line: its arguments, given that folder.
        again: those after a kill.
        check: raises an error where a killed one left, in that folder, what is not whole.
        outcome: what a finished one made, to be compared.
    """

    line: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]
    check: Callable[[Path], None]
    outcome: Callable[[Path], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="apply,shrink,calibrate,morph")
    asked = parser.parse_args()
    print("| command | kills | while it ran | nothing there | a whole result there | faults |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    faults = 0
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        root = Path(temporary)
        prepare(root / "inputs")
        for name in asked.commands.split(","):
            folder = root / name
            folder.mkdir()
            chance = random.Random(f"{asked.seed} {name}")  # noqa: S311  # no secret
            counts = kill(COMMANDS[name](root / "inputs"), folder, root, asked.count, chance)
            row = (asked.count, counts.running, counts.nothing, counts.whole, counts.faults)
            print(f"| {name} | {' | '.join(map(str, row))} |", flush=True)
            faults += counts.faults
    return 1 if faults else 0


def prepare(folder: Path) -> None:
    """Inputs of all commands: models with weights inside and beside, a plan, images."""
    from morphgraph.testing.examples import image, residual_cnn

    folder.mkdir()
    rng = np.random.default_rng(0)
    model = mg.export(residual_cnn((6, 8)), (image(2),), dynamic_batch=True)
    mg.save(model, folder / "small.onnx")
    mg.save(mg.export(residual_cnn((32, 64)), (image(2),)), folder / "model.onnx")
    beside = folder / "beside"
    beside.mkdir()
    proto = onnx.load(folder / "model.onnx")
    onnx.save(proto, beside / "model.onnx", save_as_external_data=True, location="model.data")
    mg.uniform(mg.lift(folder / "model.onnx"), 0.5).save(folder / "plan.json")
    np.savez(folder / "inputs.npz", x=rng.standard_normal((32, 1, 8, 8)).astype(np.float32))
    labels = np.arange(160) % 10
    images = rng.integers(0, 128, (160, 8, 8), dtype=np.uint8)
    images[np.arange(160), labels % 8, labels // 2] += 127
    np.savez(folder / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)


def kill(command: Command, folder: Path, root: Path, count: int, chance: random.Random) -> Counts:
    """Kill a command so many times, each in a new folder, and finish it there."""
    counts = Counts()
    inputs = contents(root / "inputs")
    whole = folder / "whole"
    whole.mkdir()
    start = time.monotonic()
    if run(command.line(whole)) != 0:
        raise SystemExit(f"{' '.join(command.line(whole))}: does not run")
    seconds = time.monotonic() - start
    wanted = command.outcome(whole)
    kills = 0
    while kills < count:
        place = folder / f"killed-{kills}"
        place.mkdir()
        finished = False
        while not finished and kills < count:
            at_writing = kills % 2 == 1
            delay = chance.uniform(0, 0.004) if at_writing else chance.uniform(0, seconds)
            line = command.again(place) if any(place.iterdir()) else command.line(place)
            finished = not killed(line, place, delay, at_writing)
            kills += 1
            counts.running += not finished
            there = [path for path in place.rglob("*") if not hidden(path, place)]
            counts.whole += bool(there)
            counts.nothing += not there
            try:
                command.check(place)
            except (mg.MorphError, ValueError) as error:
                counts.fault(f"{place.name}: {error}")
        if run(command.again(place)) != 0:
            counts.fault(f"{place.name}: does not run once more")
        elif command.outcome(place) != wanted:
            counts.fault(f"{place.name}: comes to another result")
        shutil.rmtree(place)
    if contents(root / "inputs") != inputs:
        counts.fault("an input has changed")
    return counts


def hidden(path: Path, folder: Path) -> bool:
    """Whether a path is, or is in, what has no name of a result yet."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def run(line: list[str]) -> int:
    process = PROCESSES.Process(target=_quietly, args=(line,))
    process.start()
    process.join(PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return -1
    return process.exitcode or 0


def killed(line: list[str], folder: Path, delay: float, at_writing: bool) -> bool:
    """Run a command and kill it after a delay, or that long after it begins to write."""
    before = set(folder.rglob("*"))
    process = PROCESSES.Process(target=_quietly, args=(line,))
    process.start()
    while at_writing and process.is_alive() and set(folder.rglob("*")) <= before:
        time.sleep(0.0005)
    process.join(delay)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def _quietly(line: list[str]) -> None:
    sys.stdout = sys.stderr = Path("/dev/null").open("w")  # noqa: SIM115  # as long as the process
    sys.exit(morphgraph(line))


# ---- commands


def apply(inputs: Path) -> Command:
    """To a file beside which its weights lie, so that two files are written."""

    def line(folder: Path) -> list[str]:
        model, plan = str(inputs / "beside" / "model.onnx"), str(inputs / "plan.json")
        return ["apply", model, plan, "-o", str(folder / "slim.onnx")]

    def check(folder: Path) -> None:
        if (folder / "slim.onnx").exists():
            mg.verify(
                mg.lift(inputs / "model.onnx"),
                mg.Plan.load(inputs / "plan.json"),
                mg.load(folder / "slim.onnx"),
            ).require()

    return Command(line, lambda folder: [*line(folder), "--overwrite"], check, visible)


def shrink(inputs: Path) -> Command:
    def line(folder: Path) -> list[str]:
        data = str(inputs / "inputs.npz")
        files = ["-o", str(folder / "slim.onnx"), "--plan", str(folder / "plan.json")]
        model = str(inputs / "small.onnx")
        return ["shrink", model, "--data", data, "--budget", "flops=60%", *files]

    def check(folder: Path) -> None:
        if (folder / "slim.onnx").exists():
            mg.load(folder / "slim.onnx")
        if (folder / "plan.json").exists():
            mg.Plan.load(folder / "plan.json")

    return Command(line, lambda folder: [*line(folder), "--overwrite"], check, visible)


def calibrate(inputs: Path) -> Command:
    def line(folder: Path) -> list[str]:
        file = str(folder / "device.json")
        return ["calibrate", "--kernels", "40", "--minutes", "2", "-o", file]

    def check(folder: Path) -> None:
        file = folder / "device.json"
        if file.exists():
            mg.cost(mg.lift(inputs / "small.onnx"), "latency", device=file)

    def outcome(folder: Path) -> bool:
        """Times differ from run to run: as many kernels as were asked for."""
        return len(json.loads((folder / "device.json").read_bytes())["kernels"]) >= 40

    return Command(line, lambda folder: [*line(folder), "--resume"], check, outcome)


def morph(inputs: Path) -> Command:
    def line(folder: Path) -> list[str]:
        model, data = str(inputs / "small.onnx"), str(inputs / "data.npz")
        settings = ["--shrink-epochs", "3", "--epochs", "2", "--batch-size", "16"]
        settings += ["--budget", "flops=60%", "--bf16", "off", "--checkpoint-seconds", "0.05"]
        return ["morph", model, "--data", data, "-o", str(folder / "run"), *settings]

    def check(folder: Path) -> None:
        for path in (folder / "run").glob("*.onnx"):
            mg.load(path)
        for name in ("plan.json", "run.json", "result.json"):
            if (folder / "run" / name).exists():
                json.loads((folder / "run" / name).read_bytes())

    def outcome(folder: Path) -> dict[str, Any]:
        run = folder / "run"
        result = json.loads((run / "result.json").read_bytes())
        del result["seconds"]
        models = {path.name: path.read_bytes() for path in run.glob("*.onnx")}
        return {"result": result, "plan": (run / "plan.json").read_bytes(), **models}

    return Command(line, lambda folder: [*line(folder), "--resume"], check, outcome)


def visible(folder: Path) -> dict[str, str]:
    """Files with a name of a result, and what is in them."""
    return {name: of for name, of in contents(folder).items() if not name.startswith(".")}


COMMANDS: dict[str, Callable[[Path], Command]] = {
    "apply": apply,
    "shrink": shrink,
    "calibrate": calibrate,
    "morph": morph,
}

if __name__ == "__main__":
    sys.exit(main())
