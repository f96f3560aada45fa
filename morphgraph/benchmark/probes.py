"""Networks of random widths, run to see what a device's kernels cost.

A kernel is measured where it stands in a network, between others: what it finds in the caches, and
what a runtime fuses it with, is then what a user's network has. Every family is one way in which
networks are built.
"""

from collections.abc import Callable

import numpy as np
import onnx

from morphgraph.benchmark.probe_builder import Probe

MOST_MACS = 4e8
"""Multiply-adds of a layer of a probe: larger ones would take the time of many smaller ones."""


def _channels(probe: Probe, side: int, grid: int, low: float = -2.5, high: float = 2.0) -> int:
    """Channels of a map of this size, as networks have them: wide where it is small.

    About 32 at 112 pixels and 512 at 7, times a power of two between ``low`` and ``high``.
    """
    usual = USUAL / max(side, 4)
    return probe.width(max(usual * 2**low, 8), min(usual * 2**high, 2048), grid)


USUAL = 3584
"""Channels times the side of a map, in networks of the usual form."""


def _stem(probe: Probe, grid: int) -> str:
    """A convolution that reads an image."""
    size, stride = _STEMS[int(probe.random.integers(len(_STEMS)))]
    side = int(probe.random.choice([112, 160, 224])) // (4 if stride == 1 else 1)
    x = probe.input((1, 3, side, side))
    wide = 384 if stride > 4 else 64  # patches become many channels
    return probe.act(probe.conv(x, probe.width(16, wide, grid), size, stride))


_STEMS = ((3, 2), (7, 2), (3, 1), (4, 4), (16, 16), (11, 4))
"""Sizes and strides of kernels."""


def _image(probe: Probe, grid: int) -> str:
    """A stem, and perhaps a pooling: what most networks begin with."""
    x = _stem(probe, grid)
    if probe.shapes[x][2] > WIDE_MAP and probe.random.random() < 0.6:
        x = probe.pool(x, "MaxPool", 3, 2)
    return x


WIDE_MAP = 56
"""Sides of a map above which networks halve it before they go on."""

_Block = Callable[[Probe, str, int, int], str]


def _staged(block: _Block) -> Callable[[Probe], str]:
    """A whole network: an image, stages of blocks on smaller and smaller maps, a classifier.

    A kernel then finds in the caches what it finds in a user's network, and stands beside others
    of its size. Every layer has a width of its own, as in networks that were resized.
    """

    def network(probe: Probe) -> str:
        grid = probe.grid()
        x = _image(probe, grid)
        for _ in range(STAGES):
            for place in range(int(probe.random.integers(1, 4))):
                stride = 2 if place == 0 and probe.shapes[x][2] > LAST_MAP else 1
                x = block(probe, x, grid, stride)
        return _classifier(probe, x)

    return network


STAGES = 4
LAST_MAP = 8
"""Sides of a map that is not made smaller any more."""


def _basic(probe: Probe, x: str, grid: int, stride: int) -> str:
    """Two convolutions, 3x3 most of the time, and perhaps a residual connection."""
    side, wide = probe.shapes[x][2] // stride, probe.shapes[x][1]
    size = int(probe.random.choice([3, 3, 3, 3, 5, 7])) if side < 30 else 3
    most = 0.7 if size == 3 else -1.0
    y = probe.act(probe.conv(x, _channels(probe, side, grid, -2.5, most), size, stride))
    side = probe.shapes[y][2]
    if probe.random.random() < 0.3:
        return probe.act(probe.conv(y, _channels(probe, side, grid, -2.0, 0.7)))
    out = wide if stride == 1 else _channels(probe, side, grid, -2.0, 0.7)
    y = probe.conv(y, out)
    return probe.act(probe.add(y, x if stride == 1 else probe.conv(x, out, 1, stride)))


def _bottleneck(probe: Probe, x: str, grid: int, stride: int) -> str:
    """Pointwise, 3x3 or in groups, pointwise; a residual connection."""
    side, wide = probe.shapes[x][2], probe.shapes[x][1]
    narrow = _channels(probe, side // stride, grid, -2.5, 0.5)
    (act,) = probe.style(("Relu", "Relu", "LeakyRelu"))
    form = probe.random.random()
    if form < 0.4:
        groups = 1
    elif form < 0.7:
        groups = int(probe.random.choice([2, 4, 8, 16]))
        narrow = max(narrow // groups, max(grid, 4)) * groups
    else:  # groups of so many channels
        each = int(probe.random.choice([4, 8, 16, 16, 24, 32, 64]))
        groups = max(narrow // each, 1)
        narrow = groups * each
    y = probe.act(probe.conv(x, narrow, 1), act)
    y = probe.act(probe.conv(y, narrow, 3, stride, groups), act)
    out = wide if stride == 1 else _channels(probe, side // stride, grid, -1.0, 2.0)
    y = probe.conv(y, out, 1)
    return probe.act(probe.add(y, x if stride == 1 else probe.conv(x, out, 1, stride)))


def _inverted(probe: Probe, x: str, grid: int, stride: int) -> str:
    """Pointwise, depthwise, perhaps excitation, pointwise; perhaps a residual connection."""
    side, narrow = probe.shapes[x][2], probe.shapes[x][1]
    act, gate, mean = probe.style(
        ("Relu", "Relu6", "HardSwish", "SiLU"),
        ("Sigmoid", "HardSigmoid"),
        ("GlobalAveragePool", "ReduceMean"),
    )
    wide = _channels(probe, side, grid, -1.5, 1.5)
    y = probe.act(probe.conv(x, wide, 1), act)
    y = probe.act(probe.conv(y, wide, int(probe.random.choice([3, 3, 5])), stride, wide), act)
    if probe.random.random() < 0.5:
        y = probe.excite(y, probe.width(4, 64, grid), act, gate, mean)
    if stride == 1 and probe.random.random() < 0.5:
        return probe.add(probe.conv(y, narrow, 1), x)
    return probe.conv(y, _channels(probe, side // stride, grid, -3.0, -0.5), 1)


def _branches(probe: Probe, x: str, grid: int, stride: int) -> str:
    """Branches side by side, joined."""
    if stride > 1:
        x = probe.pool(x, *_POOLS[int(probe.random.integers(len(_POOLS)))])
    side = probe.shapes[x][2]
    parts = [probe.act(probe.conv(x, _channels(probe, side, grid, -3.0, 0.0), 1))]
    for size in (3, int(probe.random.choice([3, 5]))):
        y = probe.act(probe.conv(x, _channels(probe, side, grid, -4.0, -1.0), 1))
        parts.append(probe.act(probe.conv(y, _channels(probe, side, grid, -3.0, 0.0), size)))
    if probe.random.random() < 0.5:
        y = probe.pool(x, probe.pick("MaxPool", "AveragePool"), 3, 1)
        parts.append(probe.act(probe.conv(y, _channels(probe, side, grid, -3.0, -1.0), 1)))
    return probe.concat(parts)


def _growing(probe: Probe, x: str, grid: int, stride: int) -> str:
    """Layers that each add their channels to all before; normalization comes first."""
    if stride > 1:
        x = probe.act(probe.norm(x))
        x = probe.conv(x, _channels(probe, probe.shapes[x][2], grid, -1.5, 0.5), 1)
        x = probe.pool(x, "AveragePool", 2, 2)
    values = [x]
    for _ in range(4):
        y = probe.concat(values) if len(values) > 1 else x
        y = probe.act(probe.norm(y))
        y = probe.act(probe.conv(y, probe.width(32, 160, grid), 1))
        values.append(probe.conv(y, probe.width(8, 48, grid)))
    return probe.concat(values)


_POOLS = (("MaxPool", 3, 2), ("MaxPool", 2, 2), ("AveragePool", 2, 2))


def _classifier(probe: Probe, x: str) -> str:
    """From a map to classes: pooling, a head of matrix products."""
    samples, channels, *_ = probe.shapes[x]
    x = probe.node("GlobalAveragePool", [x], (samples, channels, 1, 1))
    x = probe.node("Flatten", [x], (samples, channels), axis=1)
    for wide in (probe.between(64, 2048), probe.between(10, 1000)):
        weight = probe.weight(wide, probe.shapes[x][1])
        x = probe.node("Gemm", [x, weight, probe.weight(wide)], (samples, wide), transB=1)
    return x


def _attention(probe: Probe) -> str:
    """A transformer as exporters write them; heads and widths are one layer's own, or all alike."""
    head, heads = int(probe.random.choice([16, 32, 64])), probe.between(2, 12)
    tokens, wide = probe.between(16, 256), head * heads
    x = probe.input((1, tokens, wide))
    act = probe.pick("Gelu", "Relu", "Gelu")
    alike, together = probe.random.random() < 0.5, probe.random.random() < 0.5
    inner = probe.width(wide, 4 * wide, probe.grid())
    for _ in range(int(probe.random.integers(2, 7))):
        own = heads if alike else probe.between(1, heads)
        x = probe.add(x, _linear(probe, _attend(probe, x, own, head, together), wide))
        inner = inner if alike else probe.width(wide / 2, 4 * wide, probe.grid())
        y = probe.act(_linear(probe, _layer_norm(probe, x), inner), act)
        x = probe.add(x, _linear(probe, y, wide))
    return _layer_norm(probe, x)


def _attend(probe: Probe, x: str, heads: int, head: int, together: bool) -> str:
    """Heads that read all tokens; queries, keys and values from one product or from three."""
    _, tokens, _ = probe.shapes[x]
    y, inner = _layer_norm(probe, x), heads * head
    if together:
        every = _linear(probe, y, 3 * inner)
        parts = [
            probe.slice(every, place * inner, (place + 1) * inner, axis=2) for place in range(3)
        ]
    else:
        parts = [_linear(probe, y, inner) for _ in range(3)]
    split = (1, tokens, heads, head)
    q, k, v = (
        probe.node(
            "Transpose",
            [probe.node("Reshape", [part, probe.numbers(*split)], split)],
            (1, heads, head, tokens) if place == 1 else (1, heads, tokens, head),
            perm=[0, 2, 3, 1] if place == 1 else [0, 2, 1, 3],
        )
        for place, part in enumerate(parts)
    )
    logits = probe.node("MatMul", [q, k], (1, heads, tokens, tokens))
    scale = probe.weight(values=np.array(head**-0.5, np.float32))
    logits = probe.node("Mul", [logits, scale], (1, heads, tokens, tokens))
    shares = probe.node("Softmax", [logits], (1, heads, tokens, tokens), axis=-1)
    y = probe.node("MatMul", [shares, v], (1, heads, tokens, head))
    y = probe.node("Transpose", [y], split, perm=[0, 2, 1, 3])
    return probe.node("Reshape", [y, probe.numbers(1, tokens, inner)], (1, tokens, inner))


def _layer_norm(probe: Probe, x: str) -> str:
    wide = probe.shapes[x][-1]
    return probe.node(
        "LayerNormalization", [x, probe.weight(wide), probe.weight(wide)], probe.shapes[x], axis=-1
    )


def _linear(probe: Probe, x: str, wide: int) -> str:
    shape = (*probe.shapes[x][:-1], wide)
    y = probe.node("MatMul", [x, probe.weight(probe.shapes[x][-1], wide)], shape)
    return probe.node("Add", [y, probe.weight(wide)], shape)


def _products(probe: Probe) -> str:
    """Matrix products of all sizes, with and without an activation."""
    rows = probe.between(1, 512)
    x = probe.input((rows, probe.between(32, 1024)))
    for number in range(6):
        grid = probe.grid()
        most = min(MOST_MACS / 8 / rows / probe.shapes[x][1], 2048.0)
        wide = probe.width(16, max(most, 24.0), grid)
        weight = probe.weight(wide, probe.shapes[x][1])
        x = probe.node("Gemm", [x, weight, probe.weight(wide)], (rows, wide), transB=1)
        x = probe.act(x, ("Tanh", "Relu", "Sigmoid")[number % 3])
    return x


def _recurrent(probe: Probe) -> str:
    """LSTM and GRU layers."""
    steps, units = probe.between(8, 96), probe.between(16, 256)
    x = probe.input((steps, 1, probe.between(16, 256)))
    for kind, gates in (("LSTM", 4), ("GRU", 3)):
        weight = probe.weight(1, gates * units, probe.shapes[x][-1])
        state = probe.weight(1, gates * units, units)
        y = probe.node(kind, [x, weight, state], (steps, 1, 1, units), hidden_size=units)
        x = probe.node("Squeeze", [y, probe.numbers(1)], (steps, 1, units))
    return x


_UNARY = ("Sigmoid", "Tanh", "Relu", "HardSwish", "HardSigmoid", "Gelu", "Erf", "Exp", "Softplus",
          "LeakyRelu", "Elu", "Abs", "Neg")  # fmt: skip


def _elementwise(probe: Probe) -> str:
    """What only moves numbers or computes each by itself."""
    samples, channels, side = 1, probe.width(16, 256, 8), int(probe.random.choice([7, 14, 28, 56]))
    shape = (samples, channels, side, side)
    x = probe.input(shape)
    other = probe.input(shape)
    column = probe.weight(1, channels, 1, 1)
    scalar = probe.weight(values=np.array(0.7, np.float32))
    for kind in probe.random.permutation(_UNARY)[:5]:
        x = probe.act(x, str(kind))
        x = probe.node(probe.pick("Add", "Mul", "Sub"), [x, other], shape)
        x = probe.node(probe.pick("Mul", "Add", "Div"), [x, column], shape)
        x = probe.node(probe.pick("Mul", "Pow", "Sub", "Min"), [x, scalar], shape)
    x = probe.node("Transpose", [x], (samples, side, side, channels), perm=[0, 2, 3, 1])
    x = probe.node("Softmax", [x], probe.shapes[x], axis=-1)
    x = _layer_norm(probe, x)
    x = probe.node("Transpose", [x], shape, perm=[0, 3, 1, 2])
    halves = [probe.slice(x, 0, channels // 2), probe.slice(x, channels // 2, channels)]
    x = probe.concat(halves[::-1])
    wide = probe.node(
        "Resize",
        [x, "", probe.weight(values=np.array([1, 1, 2, 2], np.float32))],
        (samples, channels, 2 * side, 2 * side),
        mode=probe.pick("nearest", "linear"),
    )
    padded = probe.node(
        "Pad",
        [wide, probe.numbers(0, 0, 1, 1, 0, 0, 1, 1)],
        (samples, channels, 2 * side + 2, 2 * side + 2),
    )
    axes = probe.numbers(2, 3)
    mean = probe.node("ReduceMean", [padded, axes], (samples, channels, 1, 1), keepdims=1)
    return probe.add(x, mean)


FAMILIES: dict[str, Callable[[Probe], str]] = {
    "basic": _staged(_basic),
    "bottleneck": _staged(_bottleneck),
    "inverted": _staged(_inverted),
    "branches": _staged(_branches),
    "growing": _staged(_growing),
    "attention": _attention,
    "products": _products,
    "recurrent": _recurrent,
    "elementwise": _elementwise,
}
"""By name the families of networks."""


def probe_network(family: str, seed: int, free: bool = False) -> onnx.ModelProto:
    """A network of a family, with sizes drawn by a seed; inputs of fixed sizes.

    Args:
        family: one of :data:`FAMILIES`.
        seed: of sizes and weights.
        free: whether widths are any numbers, and not multiples of 4, 8 or 16.

    >>> first, again = probe_network("basic", 3), probe_network("basic", 3)
    >>> first == again
    True
    """
    probe = Probe(seed, free)
    return probe.model(FAMILIES[family](probe))
