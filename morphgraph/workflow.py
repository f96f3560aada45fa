"""``apply`` and ``verify``: from a model and a plan to the resized model, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import IntArray
from morphgraph.collector import without_collector
from morphgraph.edit import array_of, replace_array
from morphgraph.errors import (
    ArgumentError,
    ModelError,
    MorphError,
    UnsupportedError,
    VerificationError,
    warn,
)
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import (
    ModelLike,
    as_model,
    bind_inputs,
    escape,
    is_float,
    load as read,
    save as write,
    values_of,
)
from morphgraph.onnx_io.fixed import Fixed
from morphgraph.onnx_io.inputs import Inputs
from morphgraph.onnx_io.model import root_cause
from morphgraph.ops import facts_of, parameter_names
from morphgraph.options import Start
from morphgraph.origin import Origin
from morphgraph.passes.analysis.recount import Epsilon, recounts
from morphgraph.passes.canonical.fix_inputs import fix_inputs
from morphgraph.passes.canonical.fold_affine import fold_affine
from morphgraph.passes.canonical.symbols import input_shapes, input_symbols
from morphgraph.passes.checking.fixing import require_fixed
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.passes.checking.verdict import VerifyReport
from morphgraph.passes.checking.verify import require_valid, verify as compare
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.absorb import absorb as constants_of
from morphgraph.passes.rewrite.fresh import fresh
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import Plan
from morphgraph.tolerances import FOLDED_IN_HALF, MIN_SENSITIVITY, RESIZED

if TYPE_CHECKING:
    import torch
    from torch import nn

    Weights = nn.Module | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Resized:
    """A resized model, and how far it is from the masked original where that was checked."""

    model: ir.Model
    report: VerifyReport | None


def apply(
    graph: ChannelGraph | ModelLike,
    plan: Plan,
    *,
    weights: "Weights | Start | None" = None,
    verify: bool = True,
    absorb: bool = False,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> ir.Model:
    """What :func:`morphgraph.apply` gives without a refit."""
    return resize_and_check(
        graph, plan, weights=weights, verify=verify, absorb=absorb, seed=seed, inputs=inputs
    ).model


@without_collector()
def resize_and_check(
    graph: ChannelGraph | ModelLike,
    plan: Plan,
    *,
    weights: "Weights | Start | None" = None,
    verify: bool = True,
    absorb: bool = False,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> Resized:
    """The same as :func:`apply`, with the errors that were measured."""
    if weights == "fresh":
        if absorb:
            raise ArgumentError(
                "absorb goes with weights that are kept; fresh ones have no constants to absorb"
            )
        checked = resize_and_check(graph, plan, verify=verify, seed=seed, inputs=inputs)
        return replace(checked, model=fresh(checked.model, seed))
    if not isinstance(graph, ChannelGraph):
        graph = lift(graph, **plan.model.lift.arguments())
    keep = plan.keep_channels(graph)
    if weights is not None and weights != "keep":
        graph = recounted(with_weights(graph, weights), keep)
    absorbed = constants_of(graph, keep) if absorb else None
    if absorbed is not None and absorbed.refused:
        warn(
            f"constant channels were dropped, not absorbed: {'; '.join(absorbed.refused)}",
        )
    small = resize(graph, keep, plan.added(graph), seed, absorbed)
    require_valid(graph, small)
    report = _require_same(graph, plan, small, seed, inputs) if verify else None
    Origin.of(graph, plan, report).write(small)
    return Resized(small, report)


def _require_same(
    graph: ChannelGraph, plan: Plan, small: ir.Model, seed: int, inputs: Inputs | None
) -> VerifyReport:
    try:
        report = verify(graph, plan, small, seed=seed, inputs=inputs)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error}; without a check, apply the plan with --no-verify (verify=False)"
        ) from error
    report.require()
    return report


@without_collector()
def verify(
    graph: ChannelGraph,
    plan: Plan,
    small: ModelLike,
    *,
    tolerance: float = RESIZED,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> VerifyReport:
    """Compare a resized model with the original whose removed channels are masked.

    Both run in ONNX Runtime. Where it does not run the original, since that holds an operator of
    the user's own, both run in PyTorch, if every operator has a lowering; the report's ``by`` says
    which it was. A resized model that ONNX Runtime refuses, where it runs the original, is wrong.
    Warns where masking hardly changes the outputs, so that the check has no power. Where inputs
    were fixed, the original is held against the file that takes them, too.

    Args:
        graph: the original, with the weights that were resized.
        plan: what was removed.
        small: the resized model, or its file.
        tolerance: largest error, relative to the output's scale.
        seed: of the random inputs.
        inputs: arrays by the names of inputs, or a list of such dicts, instead of random ones.

    Raises:
        ModelError: inputs are unknown or missing, or do not fit the model.
        ModelError: the resized model takes other inputs, or its metadata does not fit the original.
        PlanError: the plan is for another network.
        UnsupportedError: neither ONNX Runtime nor PyTorch runs the original.
        VerificationError: the original runs, but the resized or the masked model does not; or it
            computes something else than its file does for the values that inputs are fixed to.
    """
    require_fixed(graph, seed, inputs)
    compared = partial(
        compare, graph, plan, as_model(small), tolerance=tolerance, seed=seed, inputs=inputs
    )
    try:
        report = compared()
    except UnsupportedError as refusal:
        report = _in_torch(compared, refusal)
    if plan.keep_channels(graph) and report.ok and report.sensitivity < MIN_SENSITIVITY:
        warn(
            f"masking changed the outputs by {report.sensitivity:.1g} of their scale only: a wrong "
            "slice could go unnoticed; check again with trained weights",
        )
    if report.ok and report.untold:
        warn(
            f"{', '.join(map(repr, map(escape, report.untold[:3])))} give no finite numbers in the "
            "masked original, so that nothing is known of them; give inputs of the kind that the "
            "model expects with --inputs (inputs=...)",
        )
    return report


def _in_torch(compared: Callable[..., VerifyReport], refusal: UnsupportedError) -> VerifyReport:
    from morphgraph.torch_io.running import run

    try:
        return replace(compared(runner=run), by="PyTorch")
    except UnsupportedError as error:
        raise UnsupportedError(f"{refusal}; nor can it be checked in PyTorch: {error}") from error
    except MorphError:
        raise
    except Exception as error:  # PyTorch's errors share no base class
        words = f"{type(error).__name__}: {escape(root_cause(error))}"
        raise UnsupportedError(f"{refusal}; nor does PyTorch run it: {words}") from error


def with_weights(graph: ChannelGraph, weights: "Weights") -> ChannelGraph:
    """The same graph over a model with other weights.

    Raises:
        ModelError: a tensor is missing, or has another shape.
    """
    from morphgraph.torch_io.weights import graph_with_weights

    return graph_with_weights(graph, weights)


def recounted(graph: ChannelGraph, keep: Mapping[int, IntArray]) -> ChannelGraph:
    """The same graph, whose norms give what they gave while they counted channels of zeros.

    Args:
        graph: the lifted network, whose model is the caller's own: its weights, and what its norms
            add to their means, are changed.
        keep: per group index the channels that stay.
    """
    initializers = graph.model.graph.initializers
    found = recounts(graph, keep, parameter_names(graph.model), epsilons=True)
    for each in found:
        if isinstance(each, Epsilon):
            node = graph.ops[each.op_index].ir
            now = node.attributes.get_float("epsilon", facts_of(node).epsilon)
            node.attributes.add(ir.AttrFloat32("epsilon", each.factor * (now or 0.0)))
            continue
        value = initializers[each.parameter]
        replace_array(value, each.of(array_of(value)))
    return replace(graph, cache={}) if found else graph


def load(
    path: str | PathLike[str],
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    fixed: Fixed | None = None,
) -> ir.Model:
    """Read an ONNX file.

    Everything that can be wrong with a file is looked for before a weight is touched, in time
    linear in its size. The model is returned as it stands in the file, apart from ``input_shapes``
    and ``fixed``, and from the order of its nodes, which is made topological; one of an older opset
    than 11 is raised to that, with a warning; see ``canonicalize`` for more.

    Args:
        path: the file; external data is looked for beside it and nowhere else.
        input_shapes: sizes for graph inputs whose shape the file leaves open.
        fixed: by input the value that it has from now on: ``{"use_cache_branch": True}``. The model
            is the one for these values, which it does not take any more, and its metadata say so
            (``morphgraph.fixed``). An If that they decide is replaced by its branch.

    Raises:
        FileError: there is no such file, or it cannot be read.
        ModelError: the file is not ONNX, is damaged, or describes an impossible model; or an input
            does not take the value that it is fixed to.
    """
    return fix_inputs(read(path, input_shapes), fixed or {})


@without_collector()
def save(
    model: ir.Model,
    path: str | PathLike[str],
    overwrite: bool = False,
    *,
    folded: bool = False,
) -> None:
    """Write a model to a file that appears whole or not at all.

    Weights go to ``NAME.onnx.data`` beside it where they are more than about 1.9 GB together, for
    protobuf cannot hold them, and where they stood in such a file before: then they pass from file
    to file in blocks, and never all stand in memory. The model itself is left as it is.

    Args:
        model: the model.
        path: the file.
        overwrite: whether a file that exists may be replaced.
        folded: write a file for shipping: every BatchNorm, and every product or sum with a constant
            per channel, becomes part of the convolution or matrix product beside it, where that is
            exact. What is written is held against the model in ONNX Runtime. It is not for
            training.

    Raises:
        FileError: the file exists already (without ``overwrite``) or cannot be written.
        VerificationError: the folded model computes something else.

    >>> import os, tempfile
    >>> model = ir.from_onnx_text('''
    ... <ir_version: 8, opset_import: ["" : 17]>
    ... tiny (float[1,2] x) => (float[1,2] y)
    ... <float[2,2] w = {1,0, 0,1}, float[2] s = {2,3}, float[2] b = {1,1},
    ...  float[2] mean = {0,0}, float[2] var = {1,1}> {
    ...     h = Gemm(x, w)
    ...     y = BatchNormalization(h, s, b, mean, var)
    ... }''')
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, os.path.join(folder, "small.onnx"), folded=True)
    ...     [node.op_type for node in ir.load(os.path.join(folder, "small.onnx")).graph]
    ['Gemm']
    """
    if folded:
        shipped = fold_affine(model)
        _require_equal(model, shipped)
        model = shipped
    write(model, path, overwrite)


def _require_equal(model: ir.Model, folded: ir.Model) -> None:
    """Hold a folded model against the one that it was made of, on random inputs.

    Raises:
        VerificationError: an output differs by more than rounding.
    """
    from morphgraph.onnx_io.runtime import random_inputs, run

    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    is_half = any(value.dtype in half for value in values_of(model.graph))
    tolerance = FOLDED_IN_HALF if is_half else RESIZED
    sizes = input_shapes(model, input_symbols(model))
    before, after = (in_single_precision(bind_inputs(m, sizes)) for m in (model, folded))
    try:
        feeds = random_inputs(before)
        expected = run(before, feeds)
    except (UnsupportedError, ModelError) as error:
        warn(f"the folded model is not checked: {error}")
        return
    try:
        found = run(after, feeds)
    except UnsupportedError as error:
        raise VerificationError(f"the folded model is not run: {error}; save unfolded") from error
    for value in before.graph.outputs:
        one, other = (results[value.name or ""] for results in (expected, found))
        if not is_float(value):
            continue
        scale = float(np.abs(one[np.isfinite(one)]).max(initial=0.0)) or 1.0
        if not np.allclose(other, one, rtol=0, atol=tolerance * scale, equal_nan=True):
            raise VerificationError(
                f"output '{escape(value.name or '')}' is not the same once scales are folded into "
                "their layers; save without folding"
            )


def __getattr__(name: str) -> object:
    if name != "check":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn(f"{__name__}.check is now verify", DeprecationWarning)
    return verify
