"""Pass ``verify``: proof that a resized model computes what the masked original computes."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.errors import ModelError, UnsupportedError, VerificationError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import checker_refusal, escape
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.passes.rewrite.absorb import absorbed_in, with_channels
from morphgraph.passes.rewrite.mask import mask
from morphgraph.plans import Plan

Runner = Callable[[ir.Model, Mapping[str, Array]], Arrays]
"""Runs a model on inputs by name; results by name."""

#: Largest error that passes, relative to the output's scale: rounding of float32 in a deep network.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far one output of the resized model is from the masked original.

    ``scale`` is the largest magnitude of the masked original's output, ``relative`` the error as a
    share of it. ``sensitivity`` is how far the masked original is from the original itself, as a
    share of the same scale: near zero, masking changes nothing and the check has no power. Where
    constants were absorbed, so that the masked original may be the original, it is also how far
    that is from the original with all removed channels masked.
    """

    name: str
    max_abs: float
    scale: float
    relative: float
    sensitivity: float


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
    def sensitivity(self) -> float:
        """The largest change that the removal made to any output, as a share of its scale."""
        return max(output.sensitivity for output in self.outputs)

    @property
    def felt(self) -> float:
        """The former name of ``sensitivity``, for one version."""
        warnings.warn("VerifyReport.felt is now sensitivity", DeprecationWarning, stacklevel=2)
        return self.sensitivity

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
    feeds: Mapping[str, Array] | None = None,
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
        UnsupportedError: ONNX Runtime does not run the original.
        VerificationError: it runs the original, but not the resized or the masked model.
    """
    from morphgraph.onnx_io.runtime import random_inputs, run as run_in_ort

    run = runner or run_in_ort
    _require_same_inputs(graph.model, small)
    model = in_single_precision(graph.model)
    inputs = random_inputs(model, seed) if feeds is None else _converted(feeds, model)
    keep, absorbed = plan.keep_channels(graph), absorbed_in(graph, small)
    # The original first: only where that is refused may somebody else be asked to run them all.
    others = [run(model, inputs)]
    masked = mask(graph, with_channels(keep, absorbed))
    expected = _run_too(run, "masked original", masked, inputs)
    if absorbed:
        others.append(_run_too(run, "masked original", mask(graph, keep), inputs))
    found = _run_too(run, "resized model", small, inputs)
    return VerifyReport(
        tuple(
            _compare(name, expected[name], [other[name] for other in others], found.get(name))
            for name in expected
        ),
        tolerance,
    )


def _run_too(run: Runner, what: str, model: ir.Model, inputs: Mapping[str, Array]) -> Arrays:
    """The results of a model that must run, since the original does."""
    try:
        return run(in_single_precision(model), inputs)
    except UnsupportedError as error:
        raise VerificationError(
            f"the original runs, but the {what} does not: {error}; do not use the resized model, "
            "and please report the original's structure"
        ) from error


def require_valid(graph: ChannelGraph, small: ir.Model) -> None:
    """Refuse a resized model that ``onnx.checker`` refuses.

    Raises:
        UnsupportedError: it refuses the original as well.
        VerificationError: it accepts the original.
    """
    refusal = checker_refusal(small)
    if refusal is None:
        return
    before = checker_refusal(graph.model)
    if before is not None:
        raise UnsupportedError(f"onnx.checker refuses the original: {before}; repair the file")
    raise VerificationError(
        f"onnx.checker refuses the resized model: {refusal}; please report the original's structure"
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


def _converted(feeds: Mapping[str, Array], model: ir.Model) -> Arrays:
    """Inputs in the types that a model takes."""
    types = {value.name: value.dtype for value in model.graph.inputs}
    return {
        name: array if (dtype := types.get(name)) is None else array.astype(dtype.numpy())
        for name, array in feeds.items()
    }


def _compare(
    name: str,
    expected: Array,
    others: Sequence[Array],
    found: Array | None,
) -> OutputError:
    if found is None or found.shape != expected.shape:
        return OutputError(name, float("inf"), 0.0, float("inf"), 0.0)
    wide = expected.astype(np.float64)
    scale = float(np.abs(wide).max(initial=0.0))
    error = float(np.abs(wide - found).max(initial=0.0))
    sensitivity = max(float(np.abs(wide - other).max(initial=0.0)) for other in others)
    unit = scale or 1.0
    worst = error / unit if np.isfinite(error) else float("inf")
    return OutputError(name, error, scale, worst, sensitivity / unit)
