"""How many files does one follow to understand one thing? Three journeys through the code, counted.

    python tools/journeys.py                            # of this checkout
    PYTHONPATH=../base python tools/journeys.py         # of another one

Printed for `analyze` of a ResNet-18, `apply` of a plan, and one step of a budget: files and
functions of the package that run, calls from one file to another (each pair once), and the depth of
calls.
"""

import contextlib
import importlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import morphgraph as mg

PACKAGE = Path(mg.__file__).resolve().parent
ROOTS = (str(PACKAGE), str(PACKAGE.parent / "passes"))


class Walk:
    """Counts the calls that happen while a function runs."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()
        self.files: set[str] = set()
        self.edges: set[tuple[str, str]] = set()
        self.calls = 0
        self.depth = 0

    def run(self, journey: Callable[[], Any]) -> None:
        sys.setprofile(self._see)
        try:
            journey()
        finally:
            sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or not _is_ours(frame):
            return
        code = frame.f_code
        self.calls += 1
        self.files.add(code.co_filename)
        self.functions.add((code.co_filename, code.co_qualname))
        depth, above = 1, frame.f_back
        caller = None
        while above is not None:
            if _is_ours(above):
                caller = caller or above.f_code.co_filename
                depth += 1
            above = above.f_back
        self.depth = max(self.depth, depth)
        if caller is not None and caller != code.co_filename:
            self.edges.add((caller, code.co_filename))

    def __str__(self) -> str:
        return (
            f"{len(self.files)} files, {len(self.functions)} functions, {len(self.edges)} edges "
            f"between files, depth {self.depth}, {self.calls} calls"
        )


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(ROOTS) and frame.f_code.co_name != "<module>"


def main() -> None:
    warnings.filterwarnings("ignore")
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(weights=None).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet18.onnx"
        mg.save(mg.export(net, (torch.randn(1, 3, 224, 224),)), path)
        run = importlib.import_module("morphgraph.cli").main
        journeys: dict[str, Callable[[], Any]] = {}
        journeys["analyze resnet18.onnx"] = lambda: run(["analyze", str(path)])
        graph = mg.lift(path)
        plan = mg.uniform(graph, 0.5)
        journeys["mg.apply, without the check"] = lambda: mg.apply(graph, plan, verify=False)
        journeys["mg.apply"] = lambda: mg.apply(graph, plan)
        budget = mg.Budget(mg.Regularizer(graph, net), {"flops": "50%"}, steps=10)
        journeys["one step of mg.Budget"] = lambda: budget.step(0.1)
        for name, journey in journeys.items():
            walk = Walk()
            with contextlib.redirect_stdout(io.StringIO()):
                walk.run(journey)
            print(f"{name}: {walk}")


if __name__ == "__main__":
    main()
