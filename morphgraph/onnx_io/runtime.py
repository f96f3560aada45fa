"""Running models in ONNX Runtime."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from morphgraph.arrays import Array, Arrays, Shape
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io.keys import DEFAULT_KEY, EXPECTED_KEY, EXPECTED_PARTS_KEY
from morphgraph.onnx_io.mapped import is_stored
from morphgraph.onnx_io.messages import lent_weights, message_without_weights, numbers_of
from morphgraph.onnx_io.values import Expected, dtype_of, static_shape


class Session(onnxruntime.InferenceSession):  # type: ignore[misc]  # has no types
    """A session that reads weights where they stand, and keeps them there as long as it lives.

    The message that it is built of holds no weights, so that it is built in the time that its nodes
    take.

    Args:
        model: the model.
        options: are given the weights.
        shapes: as of :func:`message_without_weights`.
        fed: floating-point weights are inputs, which every run is given. ONNX Runtime copies
            initializers when a session is built; for one run that takes longer than the run.
        settings: as of ``onnxruntime.InferenceSession``.
    """

    def __init__(
        self,
        model: ir.Model,
        options: onnxruntime.SessionOptions,
        shapes: Mapping[str, Shape] | None = None,
        fed: bool = False,
        **settings: Any,
    ) -> None:
        weights = lent_weights(model)
        arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in weights.items()}
        self.fed = {name: arrays[name] for name in numbers_of(weights)} if fed else {}
        held = {name: array for name, array in arrays.items() if name not in self.fed}
        self.lent = list(map(onnxruntime.OrtValue.ortvalue_from_numpy, held.values()))
        if held:
            options.add_external_initializers(list(held), self.lent)
        message = message_without_weights(model, shapes, weights, self.fed)
        super().__init__(message, options, _PROVIDERS, **settings)

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> Any:
        """As of ``onnxruntime.InferenceSession``, with the weights that it is fed."""
        return super().run(output_names, {**input_feed, **self.fed}, run_options)

    def _validate_input(self, feed_input_names: Any) -> None:
        """Leave it to ONNX Runtime, which refuses a run without some input in words of its own.

        The module around it would look for all of them first, for every weight that is fed as well.
        """


def session(
    model: ir.Model,
    threads: int = 0,
    optimize: bool = True,
    shapes: Mapping[str, Shape] | None = None,
    fed: bool = False,
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU; ``threads`` 0 leaves the number to ONNX Runtime.

    One without ``optimize`` is for a run or two, and quick to build: arithmetic is not reordered,
    and neither are weights folded or packed before, for that costs more than it saves. It may be
    built for inputs of other shapes than the model states, and to be ``fed`` its weights in each
    run (:class:`Session`), unless these stand in large files.

    Raises:
        UnsupportedError: ONNX Runtime does not take the model; carries its words.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # an error is raised; it need not be printed too
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_ENABLE_BASIC
    settings: dict[str, Any] = {}
    if not optimize:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings["disabled_optimizers"] = _SLOW_OPTIMIZERS
    try:
        tensors = [v.const_value for v in model.graph.initializers.values()]
        if sum(t.nbytes for t in tensors if t is not None and is_stored(t)) <= _READ_BYTES:
            return Session(model, options, shapes, fed, **settings)
        with tempfile.TemporaryDirectory() as folder:  # data is found only beside a file
            path = Path(folder) / "model.onnx"
            ir.save(model, path, external_data="model.onnx.data")
            return onnxruntime.InferenceSession(str(path), options, _PROVIDERS, **settings)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise _refused(error, _advice(model, str(error))) from error


_READ_BYTES = 2**29
"""Weights in files up to this size are read into memory; a copy of them in a file takes longer."""

_MOST_NUMBERS = 2**40  # of an input
_PROVIDERS = ["CPUExecutionProvider"]

_SLOW_OPTIMIZERS = [
    # What makes new weights of old ones,
    *("ConstantFolding", "ConvAddFusion", "ConvBNFusion", "ConvMulFusion"),
    # and what looks at every node for something that is rarely there.
    *("CommonSubexpressionElimination", "ConstantSharing"),
    *("ReshapeFusion", "TransposeOptimizer"),
]
"""For a run or two they cost more than they save."""


_RARE = {ir.DataType.BFLOAT16: "bfloat16", ir.DataType.DOUBLE: "double"}
"""Types of numbers for which its CPU provider has few kernels, in its words."""


def _advice(model: ir.Model, words: str) -> str:
    """What helps where there is no kernel for the type that a network counts in."""
    types = {value.dtype for value in model.graph.initializers.values()}
    named = [name for dtype, name in _RARE.items() if dtype in types]
    if not named or not ("NOT_IMPLEMENTED" in words or any(name in words for name in named)):
        return ""
    return (
        f"; it has few kernels for numbers in {' and '.join(named)}: give the network in single "
        "precision (net.float() before the export), and convert the result"
    )


def _refused(error: Exception, advice: str = "") -> UnsupportedError:
    words = str(error).strip().splitlines()
    return UnsupportedError(
        f"ONNX Runtime does not run the model: {words[0] if words else error!r}{advice}"
    )


def is_refusal(error: Exception) -> bool:
    """Whether an error is one of ONNX Runtime's, which share no base class of their own."""
    return type(error).__module__ == f"{onnxruntime.__name__}.capi.onnxruntime_pybind11_state"


def is_unimplemented(error: Exception) -> bool:
    """Whether ONNX Runtime says that it has no kernel for what a node is to do, whatever is fed."""
    return is_refusal(error) and type(error).__name__ == "NotImplemented"


def run(model: ir.Model, feeds: Mapping[str, Array]) -> Arrays:
    """Run a model once, without optimizations that reorder arithmetic; results by name.

    Inputs may have other shapes than the model states, where its nodes allow it. Of a map its
    numbers, of a sequence all its parts behind each other.

    Raises:
        UnsupportedError: ONNX Runtime does not take the model, or fails while it runs.
    """
    return run_each(model, [feeds])[0]


def run_each(model: ir.Model, each: Sequence[Mapping[str, Array]]) -> list[Arrays]:
    """The same for several inputs, one after the other, by one session.

    Raises:
        UnsupportedError: ONNX Runtime does not take the model, or fails while it runs.
    """
    return [
        {name: _as_array(result) for name, result in found.items()}
        for found in _results_of_each(model, each)
    ]


def results(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Any]:
    """What :func:`run` gives as ONNX Runtime gives it: arrays, lists of them, dicts.

    Raises:
        UnsupportedError: ONNX Runtime does not take the model, or fails while it runs.
    """
    return _results_of_each(model, [feeds])[0]


def results_as_stated(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Any]:
    """The same of a model whose parts do not all take the shapes that are fed.

    Of the branches of an If one alone may. Inputs keep the sizes that the model states, open ones
    stay open, and nothing is concluded from what they are in this run.

    Raises:
        UnsupportedError: ONNX Runtime does not take the model, or fails while it runs.
    """
    running = session(model, optimize=False)
    names = [output.name for output in running.get_outputs()]
    try:
        return dict(zip(names, running.run(names, dict(feeds)), strict=True))
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise _refused(error) from error


def _results_of_each(model: ir.Model, each: Sequence[Mapping[str, Array]]) -> list[dict[str, Any]]:
    try:
        return _by_one_session(model, each, fed=True)
    except UnsupportedError:  # some kernels want constants
        return _by_one_session(model, each, fed=False)


def _by_one_session(
    model: ir.Model, each: Sequence[Mapping[str, Array]], fed: bool
) -> list[dict[str, Any]]:
    shapes = [{(name, np.shape(array)) for name, array in feeds.items()} for feeds in each]
    shared = dict(set.intersection(*shapes))
    running = session(model, optimize=False, shapes=shared, fed=fed)
    names = [output.name for output in running.get_outputs()]
    try:
        found = [running.run(names, dict(feeds)) for feeds in each]
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise _refused(error) from error
    return [dict(zip(names, one, strict=True)) for one in found]


def _as_array(result: Any) -> Array:
    if isinstance(result, Mapping):
        return np.array(list(result.values()))
    if isinstance(result, list):
        parts = [_as_array(part).reshape(-1) for part in result]
        return np.concatenate(parts) if parts else np.zeros(0)
    array: Array = result
    return array


Draw = Callable[[np.random.Generator, Shape], Array]

DRAWS: tuple[Draw, ...] = (
    lambda generator, shape: generator.standard_normal(shape),
    # Where a network takes logarithms or roots of what it is given: positive numbers.
    lambda generator, shape: generator.uniform(0.05, 1.0, shape),
    lambda generator, shape: generator.uniform(1.0, 2.0, shape),
)
"""Kinds of random floating-point inputs, the usual one first."""


def random_inputs(
    model: ir.Model,
    seed: int = 0,
    draw: Draw = DRAWS[0],
    shapes: Mapping[str, Shape] | None = None,
) -> Arrays:
    """Inputs of the static shapes, or of these: what they are by default, or random numbers.

    They are of the kind that the readers expect, where these say it: numbers of rows, lengths,
    masks, pixels. Else they are as of :func:`random_array`.
    """
    generator = np.random.default_rng(seed)
    feeds: Arrays = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        default = value.meta.get(DEFAULT_KEY)
        expected = value.meta.get(EXPECTED_KEY)
        shape = static_shape(value) if shapes is None else shapes[value.name or ""]
        dtype = dtype_of(value)
        if default is not None:
            array = default.numpy().astype(dtype)
        elif expected is not None:
            array = _as_expected(generator, shape, expected).astype(dtype)
        else:
            array = random_array(generator, shape, dtype, draw)
        for part in value.meta.get(EXPECTED_PARTS_KEY, ()) if default is None else ():
            at = _positions(shape, *part.part)
            array[at] = _as_expected(generator, array[at].shape, part).astype(dtype)
        feeds[value.name or ""] = array
    return feeds


def _positions(shape: Shape, axis: int, positions: Sequence[int]) -> tuple[Any, ...]:
    """An index of some positions of an axis, of those that there are."""
    return (*[slice(None)] * axis, [each for each in positions if each < shape[axis]])


def _as_expected(generator: np.random.Generator, shape: Shape, expected: Expected) -> Array:
    if expected.kind in ("rows", "length"):  # as many different ones as there is room for
        count = max(expected.high - expected.low, 1)
        return np.resize(generator.permutation(count), shape) + expected.low
    if expected.kind == "mask":
        flags: Array = generator.random(shape) < _SET
        if shape:
            flags[..., :1] |= ~flags.any(axis=-1, keepdims=True)  # of no line all is masked
        return flags
    return generator.integers(expected.low, expected.high, shape)


_SET = 0.75
"""Share of a mask that is set."""


def random_array(
    generator: np.random.Generator, shape: Shape, dtype: np.dtype[Any], draw: Draw = DRAWS[0]
) -> Array:
    """Standard normal numbers; of integers and booleans 0 or 1, a valid index wherever one is.

    Raises:
        UnsupportedError: no machine can hold so many.
    """
    if math.prod(shape) > _MOST_NUMBERS:
        sizes = "x".join(map(str, shape))
        raise UnsupportedError(
            f"an input of {sizes} does not fit into any memory; give a smaller one with "
            "--input-shape (input_shapes)"
        )
    if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return generator.integers(0, 2, shape).astype(dtype)
    return draw(generator, shape).astype(dtype)
