"""Check that a resized model computes what the masked original computes, on random inputs."""

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
from morphgraph.tolerances import RESIZED

Runner = Callable[[ir.Model, Mapping[str, Array]], Arrays]
"""Runs a model on inputs by name; results by name."""


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far one output of the resized model is from the masked original's.

    Attributes:
        name: of the output.
        max_abs: the largest error of a number.
        scale: the largest magnitude of the masked original's output.
        relative: ``max_abs`` as a share of ``scale``.
        sensitivity: how far masking moved the original's output, as a share of ``scale``. Near
            zero the check has no power: a wrong slice would go unnoticed. Where channels were
            absorbed, and masking may change nothing, masking those as well counts too.
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
    tolerance: float = RESIZED,
    seed: int = 0,
    feeds: Mapping[str, Array] | None = None,
    runner: Runner | None = None,
) -> VerifyReport:
    """Compare a resized model with the original whose removed channels are masked.

    Models in half or double precision are compared in single precision, where ONNX Runtime has all
    kernels and one tolerance serves: slicing does not round, so a resize is right in every
    precision or in none. Removed channels that the model has absorbed are not masked: there it must
    equal the original.

    Args: as of :func:`morphgraph.verify`, and ``runner``: what runs the models, ONNX Runtime by
    default.

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
    # The original first: only where that is refused may another runner be tried for all of them.
    references = [run(model, inputs)]
    masked = mask(graph, with_channels(keep, absorbed))
    expected = _run_or_fail(run, "masked original", masked, inputs)
    if absorbed:
        references.append(_run_or_fail(run, "masked original", mask(graph, keep), inputs))
    resized = _run_or_fail(run, "resized model", small, inputs)
    return VerifyReport(
        tuple(
            _compare(name, masked_output, resized.get(name), [r[name] for r in references])
            for name, masked_output in expected.items()
        ),
        tolerance,
    )


def _run_or_fail(run: Runner, what: str, model: ir.Model, inputs: Mapping[str, Array]) -> Arrays:
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

    Old files list their weights among the inputs, too; those do not count.
    """
    of_original, of_resized = (
        [_signature(value) for value in m.graph.inputs if value.name not in m.graph.initializers]
        for m in (model, small)
    )
    if of_original != of_resized:
        raise ModelError(
            f"takes inputs {', '.join(of_resized)}, but the original takes "
            f"{', '.join(of_original)}; "
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
    name: str, masked: Array, resized: Array | None, references: Sequence[Array]
) -> OutputError:
    """One output of the masked original beside the resized model's.

    Args:
        name: of the output.
        masked: what the resized model must give.
        resized: what it gives, if anything.
        references: outputs of the models that the masked original is to differ from.
    """
    if resized is None or resized.shape != masked.shape:
        return OutputError(name, float("inf"), 0.0, float("inf"), 0.0)
    expected = masked.astype(np.float64)
    scale = float(np.abs(expected).max(initial=0.0))
    error = float(np.abs(expected - resized).max(initial=0.0))
    change = max(float(np.abs(expected - other).max(initial=0.0)) for other in references)
    unit = scale or 1.0
    relative = error / unit if np.isfinite(error) else float("inf")
    return OutputError(name, error, scale, relative, change / unit)
