"""Pass ``verify``: proof that a resized model computes what the masked original computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.errors import ModelError, VerificationError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.absorb import absorbed_in, with_channels
from morphgraph.passes.mask import mask
from morphgraph.passes.precision import in_single_precision
from morphgraph.plans import Plan

Arrays = dict[str, np.ndarray[Any, Any]]
Runner = Callable[[ir.Model, Mapping[str, np.ndarray[Any, Any]]], Arrays]
"""Runs a model on inputs by name; results by name."""

#: Largest error that passes, relative to the output's scale: rounding of float32 in a deep network.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far one output of the resized model is from the masked original.

    ``scale`` is the largest magnitude of the masked original's output, ``relative`` the error as a
    share of it. ``felt`` is how far the masked original is from the original itself, as a share of
    the same scale: where it is tiny, the network does not feel the removal and the check proves
    little. Where constants were absorbed, so that it may be the original, ``felt`` is also how far
    it is from the original with all removed channels masked.
    """

    name: str
    max_abs: float
    scale: float
    relative: float
    felt: float


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The errors of all outputs, and whether each is within ``tolerance``; ``by`` ran them."""

    outputs: tuple[OutputError, ...]
    tolerance: float
    by: str = "ONNX Runtime"

    @property
    def ok(self) -> bool:
        """Whether the resized model is right."""
        return all(output.relative <= self.tolerance for output in self.outputs)

    @property
    def worst(self) -> OutputError:
        """The output that is furthest off."""
        return max(self.outputs, key=lambda output: output.relative)

    @property
    def felt(self) -> float:
        """The largest change that the removal made to any output."""
        return max(output.felt for output in self.outputs)

    def require(self) -> None:
        """Do nothing if all is right.

        Raises:
            VerificationError: some output is off.
        """
        if not self.ok:
            worst = self.worst
            raise VerificationError(
                f"output '{escape(worst.name)}' is off by {worst.relative:.3g} of its scale "
                f"(tolerance {self.tolerance:g}): the resized model is not the masked original; "
                "do not use it, and please report the model's structure"
            )


def verify(
    graph: ChannelGraph,
    plan: Plan,
    small: ir.Model,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    feeds: Mapping[str, np.ndarray[Any, Any]] | None = None,
    runner: Runner | None = None,
) -> VerifyReport:
    """Compare a resized model with the original whose removed channels are masked.

    Models in half or double precision are compared in single precision, where ONNX Runtime has all
    kernels and one tolerance serves: slicing does not round, so that a resize is right in every
    precision or in none. Removed channels that the model has absorbed are not masked: there it must
    equal the original.

    Args:
        graph: the original, with the weights that were resized.
        plan: what was removed.
        small: the resized model.
        tolerance: largest error, relative to the output's scale.
        seed: of the random inputs.
        feeds: inputs by name instead of random ones.
        runner: what runs the models; ONNX Runtime if not given.

    Raises:
        ModelError: the resized model takes other inputs, or what it says of absorbed channels does
            not fit the network.
        PlanError: the plan is for another network.
        UnsupportedError: ONNX Runtime does not run the model.
    """
    from morphgraph.ort import random_inputs, run as run_in_ort

    run = runner or run_in_ort
    _require_same_inputs(graph.model, small)
    model = in_single_precision(graph.model)
    inputs = random_inputs(model, seed) if feeds is None else _converted(feeds, model)
    keep, absorbed = plan.kept(graph), absorbed_in(graph, small)
    expected = run(in_single_precision(mask(graph, with_channels(keep, absorbed))), inputs)
    others = [run(model, inputs)]
    if absorbed:
        others.append(run(in_single_precision(mask(graph, keep)), inputs))
    found = run(in_single_precision(small), inputs)
    return VerifyReport(
        tuple(
            _compare(name, expected[name], [other[name] for other in others], found.get(name))
            for name in expected
        ),
        tolerance,
    )


def _require_same_inputs(model: ir.Model, small: ir.Model) -> None:
    """Refuse what cannot be a resize of the model: inputs keep their names, types and sizes.

    Old files list their weights among the inputs; those are none.
    """
    wanted, found = (
        [_signature(value) for value in m.graph.inputs if value.name not in m.graph.initializers]
        for m in (model, small)
    )
    if wanted != found:
        raise ModelError(
            f"takes inputs {', '.join(found)}, but the original takes {', '.join(wanted)}; "
            "give a resize of the original"
        )


def _signature(value: ir.Value) -> str:
    """``'x' (FLOAT [?,3,8,8])``; symbolic sizes may have any name."""
    shape = ",".join(str(size) if isinstance(size, int) else "?" for size in value.shape or ())
    return f"'{escape(value.name or '')}' ({value.dtype} [{shape}])"


def _converted(
    feeds: Mapping[str, np.ndarray[Any, Any]], model: ir.Model
) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs in the types that a model takes."""
    types = {value.name: value.dtype for value in model.graph.inputs}
    return {
        name: array if (dtype := types.get(name)) is None else array.astype(dtype.numpy())
        for name, array in feeds.items()
    }


def _compare(
    name: str,
    expected: np.ndarray[Any, Any],
    others: Sequence[np.ndarray[Any, Any]],
    found: np.ndarray[Any, Any] | None,
) -> OutputError:
    if found is None or found.shape != expected.shape:
        return OutputError(name, float("inf"), 0.0, float("inf"), 0.0)
    wide = expected.astype(np.float64)
    scale = float(np.abs(wide).max(initial=0.0))
    error = float(np.abs(wide - found).max(initial=0.0))
    felt = max(float(np.abs(wide - other).max(initial=0.0)) for other in others)
    unit = scale or 1.0
    worst = error / unit if np.isfinite(error) else float("inf")
    return OutputError(name, error, scale, worst, felt / unit)
