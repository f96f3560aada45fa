"""Check that a resized model computes what the masked original computes, on random inputs."""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays, IntArray, Shape
from morphgraph.errors import ModelError, UnsupportedError, VerificationError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import DEFAULT_KEY, checker_refusal, escape
from morphgraph.onnx_io.inputs import Inputs, fit_inputs
from morphgraph.ops import facts_of
from morphgraph.passes.analysis.liveness import liveness
from morphgraph.passes.analysis.rows import renumbered
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.canonical.caches import caches
from morphgraph.passes.checking.compare import OutputError, as_arrays, compare, kept
from morphgraph.passes.checking.decoding import decodings, joined_shapes
from morphgraph.passes.checking.following import states_sizes
from morphgraph.passes.checking.networks import Networks
from morphgraph.passes.checking.shorter import shorter
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.passes.checking.smaller import smaller_inputs
from morphgraph.passes.checking.stepwise import Runner, Stepwise, listing
from morphgraph.passes.checking.verdict import VerifyReport
from morphgraph.passes.rewrite.absorb import absorbed_in, with_channels
from morphgraph.passes.rewrite.mask import mask
from morphgraph.plans import Plan
from morphgraph.tolerances import MIN_MOVED, RESIZED, ROUNDING


def verify(
    graph: ChannelGraph,
    plan: Plan,
    small: ir.Model,
    *,
    tolerance: float = RESIZED,
    seed: int = 0,
    inputs: Inputs | None = None,
    runner: Runner | None = None,
) -> VerifyReport:
    """Compare a resized model with the original whose removed channels are masked.

    Models in half or double precision are compared in single precision, where ONNX Runtime has all
    kernels and one tolerance serves: slicing does not round, so a resize is right in every
    precision or in none. Removed channels that the model has absorbed are not masked: there it must
    equal the original. Outputs that a plan resizes are compared at the positions that stay.

    Large maps are compared on smaller inputs where these prove the same (``smaller`` says when that
    is); if anything is off or not told there, the full ones decide.

    Args: as of :func:`morphgraph.verify`, and ``runner``: what runs the models, ONNX Runtime by
    default.

    Raises:
        ModelError: the resized model takes other inputs, or what it says of absorbed channels does
            not fit the network; or inputs are unknown or missing, or do not fit.
        PlanError: the plan is for another network.
        UnsupportedError: ONNX Runtime does not run the original.
        VerificationError: it runs the original, but not the resized or the masked model.
    """
    from morphgraph.onnx_io.runtime import run as run_in_ort

    check = _Check(graph, plan, small, tolerance, runner or run_in_ort)
    _require_same_inputs(check.selection, check.gone, small)
    if inputs is not None:
        return _together(
            [check.on(arrays) for arrays in fit_inputs(inputs, check.networks.original)]
        )
    return check.on_random(seed)


class _Check:
    """The networks of a check, made once for all inputs.

    Attributes:
        is_quick: whether it need not tell everything, since another one decides where this does
            not: then the original and the masked original may be run as one network.
    """

    def __init__(
        self, graph: ChannelGraph, plan: Plan, small: ir.Model, tolerance: float, runner: Runner
    ) -> None:
        self.graph, self.tolerance, self.runner = graph, tolerance, runner
        self.keep, self.absorbed = plan.keep_channels(graph), absorbed_in(graph, small)
        self.selection = AxisSelection(graph, self.keep, plan.added(graph))
        self.networks = Networks(graph, self._masked_channels, small)
        self.is_quick = False

    @cached_property
    def gone(self) -> frozenset[str]:
        """Inputs and outputs that are caches without heads."""
        gone = liveness(self.graph, self.selection.dead).gone_outputs
        pairs = caches(self.graph.model)
        return frozenset([*gone, *(past for past, present in pairs.items() if present in gone)])

    @property
    def _stepwise(self) -> Stepwise:
        return Stepwise(
            self.networks.original,
            self.networks.masked,
            self.networks.small,
            self.selection,
            self.runner,
            constants_moved=bool(self.absorbed or self.selection.dead),
        )

    @property
    def _is_surely_untold(self) -> bool:
        """Whether some output is a constant whatever is fed: its last layer starts at zero.

        Then the values inside are needed, and come from the same runs as the outputs.
        """
        return any(map(_is_of_zeros, self.graph.model.graph.outputs))

    @property
    def _masked_channels(self) -> dict[int, IntArray]:
        return with_channels(self.keep, self.absorbed)

    def on_random(self, seed: int) -> VerifyReport:
        """The report of the first random inputs under which all that is compared is a number."""
        from morphgraph.onnx_io.runtime import DRAWS, random_inputs

        quick = self._as_joined(seed) or self._in_steps(seed) or self._on_smaller_inputs(seed)
        if quick is not None:
            return quick
        reports: list[VerifyReport] = []
        for draw in DRAWS:
            reports.append(self.on(random_inputs(self.networks.original, seed, draw)))
            if not reports[-1].ok or not reports[-1].untold:
                return reports[-1]
        return min(reports, key=lambda report: len(report.untold))

    def _as_joined(self, seed: int) -> VerifyReport | None:
        """The report of one run of all files, for a network that is joined of several."""
        from morphgraph.onnx_io.runtime import DRAWS, random_inputs

        for shapes in joined_shapes(self.networks.original):
            reports: list[VerifyReport] = []
            for draw in DRAWS:
                feeds = random_inputs(self.networks.original, seed, draw, shapes)
                try:
                    self.runner(self.networks.original, feeds)
                except UnsupportedError:
                    break  # something holds a length
                reports.append(self.on(feeds))
                if not reports[-1].ok or not reports[-1].untold:
                    return reports[-1]
            if reports:
                return min(reports, key=lambda report: len(report.untold))
        return None

    def _in_steps(self, seed: int) -> VerifyReport | None:
        """The report of two steps of generation, for a network with a cache that runs in steps."""
        from morphgraph.onnx_io.runtime import DRAWS

        for plan in decodings(self.networks.original):
            reports: list[VerifyReport] = []
            for draw in DRAWS:
                prompt = plan.inputs(0, seed, draw)
                try:
                    before = as_arrays(self.runner(self.networks.masked, prompt))
                    steps = [prompt, plan.inputs(1, seed, draw, before)]
                    self.runner(self.networks.original, steps[1])
                except UnsupportedError:
                    break  # something holds a length
                reports.append(_together([self.on(inputs) for inputs in steps]))
                if not reports[-1].ok or not reports[-1].untold:
                    return reports[-1]
            if reports:
                return min(reports, key=lambda report: len(report.untold))
        return None

    def _on_smaller_inputs(self, seed: int) -> VerifyReport | None:
        """The report on inputs that prove the same and cost less, where all is right there."""
        from morphgraph.onnx_io.runtime import random_inputs, run as run_in_ort

        if self.runner is not run_in_ort or self.absorbed or not self._values_are_many():
            return None
        ways = [self._with_smaller_inputs, self._with_fewer_positions]
        if states_sizes(self.graph):
            ways.reverse()  # the first one would hardly ever do
        check = copy(self)
        found = ways[0]() or ways[1]()
        if found is None:
            return None
        shapes, check.networks = found
        check.is_quick = True
        try:
            report = check.on(random_inputs(self.networks.original, seed, shapes=shapes))
        except (UnsupportedError, VerificationError):
            return None  # something holds a size
        return report if report.ok and not report.untold else None

    def _with_smaller_inputs(self) -> tuple[Mapping[str, Shape], Networks] | None:
        """Shapes of inputs that prove the same of the networks as they are."""
        shapes = smaller_inputs(self.graph)
        return None if shapes is None else (shapes, self.networks)

    def _with_fewer_positions(self) -> tuple[Mapping[str, Shape], Networks] | None:
        """Networks of fewer positions that prove the same, and shapes of their inputs."""
        fewer = shorter(self.graph)
        networks = None if fewer is None else self.networks.shortened(fewer, self.selection)
        return None if fewer is None or networks is None else (fewer.inputs, networks)

    def on(self, inputs: Mapping[str, Array]) -> VerifyReport:
        """Compare on some inputs: the outputs, and value by value where that is quick or needed."""
        inputs, anew = renumbered(self.graph, self.keep, inputs)
        # Numbers of rows differ between the two by right, and so does what is computed of them.
        recounted = any(not np.array_equal(inputs[name], anew[name]) for name in inputs)
        inside = [] if recounted or not self._is_surely_untold else self._stepwise.wanted()
        (found, in_original), (expected, in_masked) = self._originals(inside, inputs)
        references = [found]
        if recounted:
            # What other rows would give.
            references.append(as_arrays(self.runner(self.networks.original, anew)))
        if self.absorbed:
            bare = in_single_precision(mask(self.graph, self.keep))
            references.append(self._run("masked original", bare, inputs))
        fewer = {name: kept(self.selection, name, array) for name, array in anew.items()}
        fewer = {name: array for name, array in fewer.items() if name not in self.gone}
        resized = self._run("resized model", self.networks.small, fewer)
        report = self._report(expected, resized, references)
        if self.keep and not inside and report.sensitivity < _NOTHING:
            # What is removed was zero: would others be missed?
            masked = self.networks.masked_by(self._other_channels)
            references.append(self._run("masked original", masked, inputs))
            report = self._report(expected, resized, references)
        told = all(self._tells(output) for output in report.outputs)
        if recounted or (told and self._values_are_many()):
            return report
        # Outputs that tell do so of what reaches them on these inputs: not of a channel that is
        # silent on random numbers. So the values inside are compared as well, where they are few.
        values = self._stepwise.compare(inputs, self.tolerance, (in_original, in_masked))
        whole = replace(report, values=values)
        if told and whole.ok:
            return report
        if not report.ok and (whole.ok or whole.values is None):
            whole = replace(whole, outputs=self._with_floors(report.outputs, expected, inputs))
        return whole

    def _report(
        self, expected: Arrays, resized: Arrays, references: Sequence[Arrays]
    ) -> VerifyReport:
        """What the outputs say."""
        outputs = tuple(
            self._output(
                name, masked, resized.get(name), [r[name] for r in references if name in r]
            )
            for name, masked in expected.items()
            if name not in self.gone
        )
        return VerifyReport(outputs, self.tolerance)

    @property
    def _other_channels(self) -> dict[int, IntArray]:
        """As many of every group as stay, of those that go first: what a wrong slice would keep."""
        others: dict[int, IntArray] = {}
        for index, stay in self.keep.items():
            gone = np.setdiff1d(np.arange(self.graph.groups[index].width), stay)
            others[index] = np.sort(np.append(gone, stay)[: len(stay)])
        return others

    def _values_are_many(self) -> bool:
        """Whether the values inside are too many for a second proof of what the outputs tell."""
        return sum(map(math.prod, self.graph.shapes.values())) > _MOST_NUMBERS

    def _tells(self, output: OutputError) -> bool:
        """Whether an output alone shows that the resized model is right."""
        return (
            output.relative <= self.tolerance
            and output.told == 1.0
            and (not self.keep or output.moved >= MIN_MOVED)
        )

    def _output(
        self, name: str, masked: Array, resized: Array | None, references: Sequence[Array]
    ) -> OutputError:
        """One output, at the positions that stay and are not new."""
        take = partial(kept, self.selection, name)
        # Where an output is cut, its other positions are what a wrong slice would give.
        beside = [np.roll(masked, 1, axis) for axis, _ in self.selection.cuts(name)]
        masked, references = take(masked), [*references, *beside]
        if resized is not None and resized.ndim == masked.ndim:
            masked, resized = self._old(name, masked), self._old(name, resized)
        others = [self._old(name, take(other)) for other in references]
        return compare(name, masked, resized, others)

    def _old(self, name: str, array: Array) -> Array:
        """Without the positions of added channels."""
        for axis in range(array.ndim if name in self.graph.shapes else 0):
            fresh = self.selection.fresh(name, axis)
            if len(fresh) and array.shape[axis] > fresh[-1]:
                array = np.delete(array, fresh, axis=axis)
        return array

    def _with_floors(
        self, outputs: Sequence[OutputError], expected: Arrays, inputs: Mapping[str, Array]
    ) -> tuple[OutputError, ...]:
        """The outputs with the noise floor: how far rounding moves the masked original's."""
        floors = dict.fromkeys(expected, 0.0)
        for seed in range(_FLOOR_DRAWS):
            generator = np.random.default_rng(seed)
            moved_model = in_single_precision(mask(self.graph, self._masked_channels, generator))
            moved = self._run("masked original", moved_model, _moved(inputs, generator))
            for name, masked in expected.items():
                error = compare(name, masked, moved.get(name))
                floors[name] = max(floors[name], error.relative)
        return tuple(replace(output, floor=floors[output.name]) for output in outputs)

    def _originals(
        self, inside: Sequence[str], inputs: Mapping[str, Array]
    ) -> tuple[tuple[Arrays, Arrays], tuple[Arrays, Arrays]]:
        """Of the original and of the masked original the outputs, and these values inside."""
        if self.is_quick and not inside:
            both = self._as_one(inputs)
            if both is not None:
                return both
        # The original first: only where that is refused may another runner be tried for all.
        original = self._with_values(self.networks.original, inside, inputs)
        try:
            return original, self._with_values(self.networks.masked, inside, inputs)
        except UnsupportedError as error:
            raise _unrunnable("masked original", error) from error

    def _as_one(
        self, inputs: Mapping[str, Array]
    ) -> tuple[tuple[Arrays, Arrays], tuple[Arrays, Arrays]] | None:
        """The same from one session of ONNX Runtime; ``None``: it does not run them as one."""
        from morphgraph.onnx_io.runtime import run_each

        both = self.networks.maskable
        try:
            found = run_each(both.model, [{**inputs, **both.whole}, {**inputs, **both.masked}])
        except UnsupportedError:  # some operators want what stays as a constant
            return None
        original, masked = map(as_arrays, found)
        return (original, {}), (masked, {})

    def _with_values(
        self, model: ir.Model, inside: Sequence[str], inputs: Mapping[str, Array]
    ) -> tuple[Arrays, Arrays]:
        """A model's outputs, and of these values inside those that it has, from one run."""
        if not inside:
            return as_arrays(self.runner(model, inputs)), {}
        try:
            found = self.runner(listing(model, inside), inputs)
        except (ModelError, UnsupportedError):  # it may run whole, and not be taken apart
            return self._with_values(model, [], inputs)
        outputs = {value.name for value in model.graph.outputs}
        return (
            as_arrays({name: array for name, array in found.items() if name in outputs}),
            {name: array for name, array in found.items() if name in set(inside)},
        )

    def _run(self, what: str, model: ir.Model, inputs: Mapping[str, Array]) -> Arrays:
        """The results of a model that must run, since the original does."""
        try:
            return as_arrays(self.runner(model, inputs))
        except UnsupportedError as error:
            raise _unrunnable(what, error) from error


def _unrunnable(what: str, error: UnsupportedError) -> VerificationError:
    return VerificationError(
        f"the original runs, but the {what} does not: {error}; do not use the resized "
        "model, and please report the original's structure"
    )


def _is_of_zeros(value: ir.Value) -> bool:
    """Whether a value comes, by way of nothing else, from a layer whose kernel is zero."""
    node = value.producer()
    while node is not None:
        operands = [operand for operand in node.inputs if operand is not None]
        constants = [operand.const_value for operand in operands if operand.const_value is not None]
        if facts_of(node).linear and any(
            len(constant.shape) > 1 and not constant.numpy().any() for constant in constants
        ):
            return True
        computed = [operand for operand in operands if operand.const_value is None]
        node = computed[0].producer() if len(computed) == 1 else None
    return False


_FLOOR_DRAWS = 4

_NOTHING = 16 * ROUNDING
"""By how much masking moves outputs, as a share of their scale, where it changes no number."""

_MOST_NUMBERS = 2**22
"""Beyond them the comparison of values more than doubles the seconds that a check takes."""


def _moved(inputs: Mapping[str, Array], generator: np.random.Generator) -> Arrays:
    """Inputs whose floating-point numbers are moved by rounding."""
    return {
        name: (array * (1 + ROUNDING * generator.standard_normal(array.shape))).astype(array.dtype)
        if np.issubdtype(array.dtype, np.floating)
        else array
        for name, array in inputs.items()
    }


def _together(reports: Sequence[VerifyReport]) -> VerifyReport:
    """One report of several inputs: the first that is wrong, else the one that is furthest off."""
    return max(reports, key=lambda report: (not report.ok, report.worst.relative))


def require_valid(graph: ChannelGraph, small: ir.Model) -> None:
    """Refuse a resized model that ``onnx.checker`` refuses.

    Files that ONNX Runtime's optimizer wrote hold operators that the checker does not know at their
    opset. There the checker says the same of the original, and ONNX Runtime has to take the result.

    Raises:
        UnsupportedError: both refuse the resized model, the checker in the words it has for the
            original.
        VerificationError: the checker has other words for the original, or accepts it.
    """
    refusal = checker_refusal(small)
    if refusal is None:
        return
    if refusal != checker_refusal(graph.model):
        raise VerificationError(
            f"onnx.checker refuses the resized model: {refusal}; "
            "please report the original's structure"
        )
    from morphgraph.onnx_io.runtime import session

    try:
        session(small)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"onnx.checker refuses the original: {refusal}; and {error}; repair the file"
        ) from error


def _require_same_inputs(selection: AxisSelection, gone: frozenset[str], small: ir.Model) -> None:
    """Refuse what cannot be a resize of the model: inputs keep their names, types and sizes.

    All but caches, which have the sizes of the channels that stay, or are gone. Old files list
    their weights among the inputs, too; those do not count, nor do inputs that callers may leave
    out.
    """
    of_original, of_resized = (
        [
            _signature(value, dict(selection.cuts(value.name or "")) if m is not small else {})
            for value in m.graph.inputs
            if value.name not in {*m.graph.initializers, *gone} and DEFAULT_KEY not in value.meta
        ]
        for m in (selection.graph.model, small)
    )
    if of_original != of_resized:
        raise ModelError(
            f"takes inputs {', '.join(of_resized)}, but the original takes "
            f"{', '.join(of_original)}; "
            "give a resize of the original"
        )


def _signature(value: ir.Value, stays: Mapping[int, IntArray]) -> str:
    """``'x' (FLOAT [?,3,8,8])``; symbolic sizes may have any name, of some axes positions stay."""
    sizes = [
        len(stays[axis]) if axis in stays else size for axis, size in enumerate(value.shape or ())
    ]
    shape = ",".join(str(size) if isinstance(size, int) else "?" for size in sizes)
    return f"'{escape(value.name or '')}' ({value.dtype} [{shape}])"
