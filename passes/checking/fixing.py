"""A network whose inputs were fixed, held against the file that it was made of.

The check of a resize compares networks without these inputs. That they compute what the file does
when it is given the values is seen here: ONNX Runtime runs the file as it stands, Ifs and all.
"""

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.errors import UnsupportedError, VerificationError, warn
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import UNFIXED_KEY, dtype_of, escape
from morphgraph.onnx_io.fixed import fixed_values, fixed_words, values_for
from morphgraph.onnx_io.inputs import Inputs, fit_inputs
from morphgraph.passes.checking.compare import as_arrays, compare
from morphgraph.passes.checking.decoding import decodings
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.tolerances import RESIZED

_Feeds = Mapping[str, Array]


def require_fixed(graph: ChannelGraph, seed: int = 0, inputs: Inputs | None = None) -> None:
    """Hold the network of a graph against the file whose inputs were fixed, if any were.

    A network with a cache is run in two steps of generation, through its caches. That is done once
    for a graph. Warns where ONNX Runtime does not run the file.

    Args:
        graph: the lifted network.
        seed: of random inputs.
        inputs: what both are run on instead.

    Raises:
        ModelError: the inputs do not fit.
        VerificationError: an output differs by more than rounding.
    """
    source = graph.cache.get(UNFIXED_KEY)
    if source is None or graph.cache.get(require_fixed):
        return
    values = values_for(source, graph.model)
    network, file = in_single_precision(graph.model), in_single_precision(source)
    types = {value.name: dtype_of(value) for value in file.graph.inputs}
    given = {name: array.astype(types[name]) for name, array in values.items()}
    words = escape(", ".join(fixed_words(fixed_values(graph.model))))
    try:
        for feeds in _feeds(network, seed, inputs):
            _compare(network, file, feeds, given, words)
    except UnsupportedError as error:
        warn(f"the network for {words} is not held against its file: {error}")
    graph.cache[require_fixed] = True


def _compare(network: ir.Model, file: ir.Model, feeds: _Feeds, given: _Feeds, words: str) -> None:
    from morphgraph.onnx_io.runtime import results, results_as_stated

    expected = as_arrays(results_as_stated(file, {**feeds, **given}))
    found = as_arrays(results(network, feeds))
    for name, array in expected.items():
        error = compare(name, array, found.get(name)).relative
        if error > RESIZED:
            raise VerificationError(
                f"output '{escape(name)}' of the network for {words} is off by {error:.2g} of its "
                "scale from what the file gives for these values; this is a fault of the program: "
                "report it, and give a file without the choice"
            )


def _feeds(network: ir.Model, seed: int, inputs: Inputs | None) -> Iterator[_Feeds]:
    """What both are run on: what is given, two steps of generation, or random numbers."""
    from morphgraph.onnx_io.runtime import DRAWS, random_inputs, results

    if inputs is not None:
        yield from fit_inputs(inputs, network)[:1]
        return
    for steps in decodings(network):
        prompt = steps.inputs(0, seed, DRAWS[0])
        try:
            before = as_arrays(results(network, prompt))
            second = steps.inputs(1, seed, DRAWS[0], before)
            results(network, second)
        except UnsupportedError:
            continue  # something holds a length
        yield from (prompt, second)
        return
    yield random_inputs(network, seed)
