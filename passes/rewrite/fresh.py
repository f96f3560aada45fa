"""Pass ``fresh``: the same network with new weights, for training from scratch.

Every weight of a layer is drawn as PyTorch's layer of that kind draws it, which stands in the
operator's entry (``initial``). A weight is followed back through what only moves numbers (a
transposed linear layer, the gates of a recurrent one) to the parameters that it is made of.
Everything else keeps its values: constants, buffers, layer scales, class tokens, position
embeddings and tables, kernels that are computed, and operators without an ``initial``.
"""

import re
import zlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import ModelLike, as_model, is_float, static_shape
from morphgraph.ops import OpNode, facts_of, parameter_names
from morphgraph.ops.initial import ZERO, Initial, initials_of, xavier
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.passes.coupling.couple import input_independent_values

# Torch's own modules call parameters so.
_RECURRENT = re.compile(r"(|.*\.)(?:weight|bias)_[ih]h(|_l[0-9]+(?:_reverse)?)")
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_BIASES = ("in_proj_bias", "out_proj.bias")


def fresh(model: ChannelGraph | ModelLike, seed: int = 0) -> ir.Model:
    """A copy of a model whose layers have newly drawn weights, and empty running statistics.

    Args:
        model: a model, a path, or a lifted one; it is not changed.
        seed: of all random numbers. A tensor's numbers depend on it, on the tensor's name and on
            its shape alone.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> model = mg.fresh(mg.export(residual_cnn(), (image(),)), seed=1)
    >>> kernel = model.graph.initializers["stem.weight"].const_value.numpy()
    >>> bool(0.3 < abs(kernel).max() <= 1 / 3)         # 1 / sqrt(fan-in): 1 channel, 3x3 taps
    True

    Raises:
        ModelError: the model is broken, or its shapes cannot be known.
        FileError: there is no such file.
    """
    source = model.model if isinstance(model, ChannelGraph) else as_model(model)
    canonical = canonicalize(source)
    drawn = initials(canonical)
    # What canonicalization has folded stays as it is written, unless weights stand there.
    source = source if drawn.keys() <= source.graph.initializers.keys() else canonical
    copy = source.clone()
    copy.meta.update(source.meta)
    for name, initial in drawn.items():
        value = copy.graph.initializers[name]
        assert value.dtype is not None
        generator = np.random.default_rng((seed, zlib.crc32(name.encode(errors="surrogatepass"))))
        array = initial.draw(static_shape(value), generator).astype(value.dtype.numpy())
        value.const_value = ir.Tensor(array, dtype=value.dtype, name=name)
    return copy


def initials(model: ir.Model) -> dict[str, Initial]:
    """By initializer how PyTorch draws it, for those that are weights of layers.

    A tensor that several layers share is drawn as the first of them does.

    Args:
        model: a canonical model.
    """
    weights = input_independent_values(model)
    trained = set(parameter_names(model))
    by_operator: dict[str, Initial] = {}
    for node in model.graph:
        for port, initial in initials_of(OpNode(node, weights)).items():
            value = node.inputs[port]
            assert value is not None
            statistic = port in facts_of(node).statistics
            for source in _sources(value):
                if source.name in trained or statistic:
                    by_operator.setdefault(source.name or "", initial)
    return by_operator | _by_name(model, by_operator)


def _sources(value: ir.Value) -> Iterator[ir.Value]:
    """The floating-point initializers that a weight is made of by movements alone."""
    node = value.producer()
    if value.is_initializer():
        if is_float(value):
            yield value
    elif node is not None and facts_of(node).moves:
        for operand in node.inputs:
            if operand is not None:
                yield from _sources(operand)


def _by_name(model: ir.Model, by_operator: dict[str, Initial]) -> dict[str, Initial]:
    """What modules draw otherwise than the operators that they became, by their parameters' names.

    Recurrent layers and cells that were unrolled are matrix products: all their tensors have the
    bound of the hidden size. ``nn.MultiheadAttention`` has projections of its own, and no biases at
    first.
    """
    special: dict[str, Initial] = {}
    for name in by_operator:
        if recurrent := _RECURRENT.fullmatch(name):
            path, layer = recurrent.groups()
            special[name] = by_operator.get(f"{path}weight_hh{layer}", by_operator[name])
        path, dot, leaf = name.rpartition(".")
        if leaf in _PROJECTIONS:
            special[name] = xavier(static_shape(model.graph.initializers[name]))
            special |= {f"{path}{dot}{end}": ZERO for end in _BIASES}
    return {name: initial for name, initial in special.items() if name in by_operator}
