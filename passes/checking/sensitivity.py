"""Pass ``sensitivity``: what half of each group's channels is worth to the outputs.

Each group is halved alone, its weakest channels silenced in the original (:mod:`mask`), and the
outputs are compared with the original's on the same inputs. No training, no resize.
"""

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, FloatArray
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.inputs import Inputs, fit_inputs
from morphgraph.onnx_io.runtime import random_inputs, run
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.analysis.score import Score
from morphgraph.passes.checking.compare import as_arrays
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.build import scores_of, top_channels
from morphgraph.passes.rewrite.mask import mask

_SAVED = ("flops", "params")


class Sensitivity(msgspec.Struct, frozen=True):
    """What halving one group alone does.

    Attributes:
        id, name, width: of the group.
        kept: the channels that are left, those of the highest score.
        error: per output the error against the original's, relative to the output: the root mean
            square of the difference as a share of that of the output. Of outputs that are no
            floating-point numbers the share of values that differ.
        saved: per cost (``"flops"``, ``"params"``) the share of the network's that goes.
    """

    id: str
    name: str
    width: int
    kept: int
    error: dict[str, float]
    saved: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest error of all outputs."""
        return max(self.error.values(), default=0.0)


def sensitivity(
    graph: ChannelGraph,
    inputs: Inputs | None = None,
    *,
    score: Score | FloatArray = "l2",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    on_row: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """What halving each group alone does to the outputs, the least harmful first.

    The figures rank the groups of one network; those of several groups at once do not add up.

    Args:
        graph: the lifted network.
        inputs: arrays by the names of the model's inputs, or several such sets; random numbers
            where there are none, which say little of a trained network.
        score: which half of a group's channels goes, as for :func:`morphgraph.plan`.
        include, exclude: globs over group ids, names and producers.
        seed: of random inputs, and of ``score="random"``.
        on_row: is told after each group how many are done, and of how many.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> graph = mg.lift(mg.export(residual_cnn(), (image(),)))
    >>> rows = mg.sensitivity(graph)
    >>> all(0 < row.worst and 0 < row.saved["flops"] < 1 for row in rows)
    True

    Raises:
        ModelError: a weight is NaN, or inputs do not fit.
        UnsupportedError: ONNX Runtime does not run the model on these inputs, or a glob names no
            group.
    """
    bounds = WidthBounds(include=include, exclude=exclude).check(graph)
    feeds = [random_inputs(graph.model, seed)]
    if inputs is not None:
        feeds = fit_inputs(inputs, graph.model)
    scores = scores_of(graph, score, seed)
    costs = [cost(graph, kind) for kind in _SAVED]
    whole = _run_all(graph.model, feeds)
    halved = [group for group in graph.groups if bounds.allows(group) and group.width > 1]
    rows = []
    for done, group in enumerate(halved, start=1):
        widths = graph.widths.copy()
        widths[group.index] //= 2
        keep = {group.index: top_channels(graph, widths, scores)[group.index]}
        outputs = _run_all(mask(graph, keep), feeds)
        rows.append(
            Sensitivity(
                group.id,
                group.name,
                group.width,
                int(widths[group.index]),
                {
                    name: relative_error(whole[name], outputs[name])
                    for name in whole
                    if name in outputs
                },
                {c.kind: 1 - c.at(widths) / c.total if c.total else 0.0 for c in costs},
            )
        )
        if on_row is not None:
            on_row(done, len(halved))
    return sorted(rows, key=lambda row: row.worst)


def _run_all(model: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> Arrays:
    """The results on all inputs, by name, one after the other in one row of numbers."""
    results = [as_arrays(run(model, each)) for each in feeds]
    names = dict.fromkeys(name for result in results for name in result)
    return {n: np.concatenate([r[n].ravel() for r in results if n in r]) for n in names}


def relative_error(wanted: Array, given: Array) -> float:
    """The root mean square of the difference, as a share of that of what is wanted.

    Of integers and booleans the share of values that differ. Values that are not finite in both
    count where they differ, and make the error infinite.

    >>> relative_error(np.array([3.0, 4.0]), np.array([3.0, 3.0]))
    0.2
    >>> relative_error(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))
    0.25
    """
    is_float = np.issubdtype(wanted.dtype, np.floating)
    if wanted.shape != given.shape:  # as many as the data gives
        return float("inf") if is_float else 1.0
    if not is_float:
        return float(np.mean(wanted != given)) if wanted.size else 0.0
    first, second = wanted.astype(np.float64), given.astype(np.float64)
    finite = np.isfinite(first) & np.isfinite(second)
    if not np.array_equal(first[~finite], second[~finite], equal_nan=True):
        return float("inf")
    scale = float(np.linalg.norm(first[finite]))
    difference = float(np.linalg.norm(first[finite] - second[finite]))
    if scale == 0:
        return float("inf") if difference else 0.0
    return difference / scale
