"""``lift``: a model becomes its channel-dependency graph."""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike

import onnx
import onnx_ir as ir

from morphgraph.collector import without_collector
from morphgraph.graph import Attention, ChannelGraph, LiftOptions
from morphgraph.onnx_io import UNFIXED_KEY, as_model
from morphgraph.onnx_io.fixed import Fixed, fixed_values, unfixed
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.passes.canonical.fix_inputs import fix_inputs
from morphgraph.passes.coupling.couple import couple
from morphgraph.passes.coupling.fixed_readers import hold_fixed_bins
from morphgraph.passes.coupling.frozen import hold_frozen
from morphgraph.passes.coupling.group import group


def lift(
    model: ir.Model | onnx.ModelProto | str | PathLike[str],
    *,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    pin_outputs: bool = True,
    pin_rows: bool = True,
    attention: Attention = "heads",
    fixed: Fixed | None = None,
) -> ChannelGraph:
    """Lift a model (or the ONNX file at a path) into a :class:`~morphgraph.graph.ChannelGraph`.

    Args:
        model: an ``onnx_ir.Model``, an ``onnx.ModelProto`` or a path; it is not changed.
        input_shapes: static shapes for inputs whose file leaves them open.
        pin_outputs: graph outputs keep their size (a user of the model expects it).
        pin_rows: tables keep the rows that are named by number at run time: the tokens of an
            embedding. Where they may change, ``plan(keep_tokens=...)`` says which stay.
        attention: shrink attentions by whole ``"heads"`` (of keys and values, with all query heads
            that share them), by ``"query-heads"`` within these groups, as many in each, by every
            head's ``"head-dim"``, or by ``"all"`` of these in one plan.
        fixed: by input the value that it has from now on: ``{"use_cache_branch": True}``,
            ``{"sr": 16000}``. The network is the one for these values, and what is written does not
            take them any more (:func:`~morphgraph.passes.canonical.fix_inputs.fix_inputs`).

    Raises:
        ModelError: the model is broken, its shapes cannot be known, or an input does not take the
            value that it is fixed to.
        FileError: there is no such file.
    """
    shapes = {name: tuple(sizes) for name, sizes in (input_shapes or {}).items()}
    with without_collector():
        read = fix_inputs(as_model(model), fixed or {})
        source = unfixed(read)
        canonical = canonicalize(read, shapes or None, open_defaults=True, is_own=read is not model)
        canonical.meta.pop(UNFIXED_KEY, None)  # a resized model is not to have it
        couplings = couple(canonical, pin_outputs, pin_rows)
        # Without an attention the choice makes no difference, and plans for both are the same.
        chosen: Attention = attention if couplings.eager or couplings.reluctant else "heads"
        options = LiftOptions(chosen, pin_outputs, pin_rows, shapes, fixed_values(canonical))
        grouped = hold_frozen(hold_fixed_bins(group(couplings, chosen)))
        graph = replace(grouped, options=options)
        if source is not None:
            graph.cache[UNFIXED_KEY] = source  # until there are other weights, and another cache
        return graph
