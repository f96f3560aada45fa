"""Sizes that no rule tells, found by running: the network must give what its resized ONNX gives.

A run fails in some module's forward, or gives other numbers. Either way the module is known, and
its integers that may stand for a changed size are tried, then those of the modules around it. What
brings the run further is kept, and so on; the number of runs is bounded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import isinf
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

from morphgraph.arrays import Array, Arrays
from morphgraph.onnx_io import is_float
from morphgraph.passes.analysis.evaluate import evaluate
from morphgraph.torch_io.module_runs import Failure, Runner, largest_error
from morphgraph.torch_io.module_sizes import Attributes
from morphgraph.torch_io.module_state import Slot
from morphgraph.torch_io.names import module_path

RUNS = 400
_TRIED = 60  # single changes at one failure; those of the modules nearby come first
_PAIRED = 12  # of these, those that are also tried two by two
RUNS_TO_THE_END = 2**62  # progress of a run that gives results, be they wrong

Step = tuple[Slot, Any]


class FirstDifference:
    """Finds the first module whose result is none of the values that its ONNX form computes.

    Args:
        runner: of the network.
        small: the resized model, in single precision.
        feeds: its inputs.
        tolerance: largest error, as a share of the largest magnitude.
    """

    def __init__(self, runner: Runner, small: ir.Model, feeds: Arrays, tolerance: float) -> None:
        self._runner = runner
        self._tolerance = tolerance
        self._paths = {
            value.name: path
            for node in small.graph
            if (path := module_path(node)) is not None
            for value in node.outputs
            if value.name and is_float(value)
        }
        self._small = small
        self._feeds = feeds

    @cached_property
    def _values(self) -> Arrays:
        return evaluate(list(self._paths), self._feeds, self._small)

    def __call__(self) -> tuple[int, str] | None:
        """How many modules gave what they should before, and its path; ``None``: not known."""
        if not self._paths:
            return None
        paths = {id(module): path for path, module in self._runner.net.named_modules()}
        done, found = 0, list[tuple[int, str]]()

        def check(module: nn.Module, _: Any, result: Any) -> None:
            nonlocal done
            path = paths.get(id(module))
            if not found and path is not None and not self._matches(path, result):
                found.append((done, path))
            done += 1

        hook = register_module_forward_hook(check)
        try:
            self._runner()
        finally:
            hook.remove()
        return found[0] if found else None

    def _matches(self, path: str, result: Any) -> bool:
        computed = [
            self._values[name]
            for name, where in self._paths.items()
            if where == path or not path or where.startswith(f"{path}.")
        ]
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return not computed or all(
            any(largest_error([leaf.float()], [value]) <= self._tolerance for value in computed)
            for leaf in leaves
            if leaf.is_floating_point()
        )


@dataclass
class SizeSearch:
    """Tries other values of attributes until a network gives the wanted results.

    Attributes:
        runner: of the network in the form that is looked at.
        wanted: the results that it must give; ``None`` where it need only run.
        tolerance: largest error, as a share of the largest magnitude.
        attributes: what may be changed.
        locate: how far its results are right, if that can be told.
        runs: how many runs are left.
        error: of the last run that gave results.
    """

    runner: Runner
    wanted: Sequence[Array] | None
    tolerance: float
    attributes: Attributes
    locate: Callable[[], tuple[int, str] | None]
    runs: int = RUNS
    error: float = 0.0

    def solve(self) -> Failure | None:
        """Find values under which the network is right; else where it still fails or differs."""
        outcome = self._run()
        return None if outcome is None or self._advance(outcome) else outcome

    def _run(self) -> Failure | None:
        """Where a run fails or differs; ``None``: it is right."""
        self.runs -= 1
        results = self.runner()
        if isinstance(results, Failure):
            return results
        if self.wanted is None:
            return None
        self.error = largest_error(results, self.wanted)
        if self.error <= self.tolerance:
            return None
        done, path = self.locate() or (0, "")
        around = [path[:k] for k, letter in enumerate(path) if letter == "."]
        modules = [self.runner.net.get_submodule(p) for p in dict.fromkeys(("", *around, path))]
        words = f"its result differs by {self.error:.3g} of its scale"
        if isinf(self.error):
            words = "its result has another shape"
        return Failure(words, tuple(modules), "", (RUNS_TO_THE_END, done))

    def _advance(self, failure: Failure) -> bool:
        """Change something that brings the run further, until all is right."""
        for step in self._steps(list(self._candidates(failure.modules))):
            if self.runs <= 0:
                return False
            before = [(slot, slot.value) for slot, _ in step]
            for slot, value in step:
                self.attributes.set(slot, value)
            following = self._run()
            if following is None:
                return True
            if following.progress > failure.progress and self._advance(following):
                return True
            for slot, value in before:
                slot.set(value)
        return False

    def _candidates(self, modules: Sequence[nn.Module]) -> Iterable[Step]:
        """Single changes: of the innermost module first, then of those around it, then of all.

        What a module holds itself comes before what it holds in a config, with many others.
        """
        near = list(reversed(modules))
        order = {id(module): k for k, module in enumerate(near)}
        last = len(order)

        def nearness(slot: Slot) -> tuple[int, bool]:
            return order.get(id(slot.module), last), slot.table is not vars(slot.module)

        ranked = sorted(self.attributes.slots, key=nearness)
        for slot in ranked:
            for value in self.attributes.alternatives(slot):
                if value != slot.value:
                    yield slot, value

    def _steps(self, candidates: Sequence[Step]) -> Iterable[Sequence[Step]]:
        """Single changes, the same change in all modules of a class, then two in one module."""
        for step in candidates[:_TRIED]:
            yield [step]
        yield from self._families(candidates)
        for a, b in combinations(candidates[:_PAIRED], 2):
            if a[0].module is b[0].module and a[0].place != b[0].place:
                yield [a, b]

    def _families(self, candidates: Sequence[Step]) -> Iterable[Sequence[Step]]:
        """The n-th alternative of an attribute in all modules of one class."""
        families: dict[tuple[Any, ...], dict[tuple[int, str], Step]] = {}
        counts: dict[tuple[int, str], int] = {}
        for slot, value in candidates:
            number = counts[slot.place] = counts.get(slot.place, -1) + 1
            families.setdefault((*slot.family, number), {})[slot.place] = (slot, value)
        for members in families.values():
            if len(members) > 1:
                yield list(members.values())
