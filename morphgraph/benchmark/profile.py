"""Where the time goes: a model's kernels by kind and by layer, beside those of the model before."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import static_shape
from morphgraph.passes.analysis.cost import cost
from morphgraph.runtimes import Executed


@dataclass(frozen=True, slots=True)
class Structure:
    """What the channel graph of a model says of its nodes.

    Attributes:
        layers: per node the layer that it belongs to.
        arithmetic: nodes that multiply and add.
        flops: per layer.
        inputs: per input the shape that the channel graph takes it to have.
    """

    layers: Mapping[str, str]
    arithmetic: Collection[str]
    flops: Mapping[str, float]
    inputs: Mapping[str, Sequence[int]] = field(default_factory=dict)


_NOTHING = Structure({}, (), {})


def structure_of(graph: ChannelGraph) -> Structure:
    """The structure of a lifted model; a node goes by its name or by its results, as in origins."""
    names = [
        (op, name)
        for op in graph.ops
        for name in (op.name, *(f"output '{value.name}'" for value in op.ir.outputs))
    ]
    return Structure(
        layers={name: op.layer for op, name in names},
        arithmetic={name for op, name in names if op.macs},
        flops=cost(graph, "flops").by_layer,
        inputs={value.name or "": static_shape(value) for value in graph.model.graph.inputs},
    )


@dataclass(frozen=True, slots=True)
class TimeRow:
    """Time of the kernels of one kind, or of one layer.

    ``before`` and ``after`` count kernels by kind. ``missed_ms`` is the time beyond what FLOPs
    promised: ``after_ms`` less ``before_ms`` times the share of FLOPs that is left, of the layer
    where it has some, else of the network; 0 of one model alone.
    """

    name: str
    before_ms: float
    after_ms: float
    before: Mapping[str, int]
    after: Mapping[str, int]
    flops_before: float | None = None
    flops_after: float | None = None
    missed_ms: float = 0.0

    @property
    def saved_ms(self) -> float:
        """What the model needs less than the one before."""
        return self.before_ms - self.after_ms


@dataclass(frozen=True, slots=True)
class Profile:
    """Kernel times of a model in a runtime, against those of the first model there.

    ``base`` is that one's name, None where the model stands alone; then all "before" is 0.
    ``kinds`` come by time, ``layers`` by missed time, and by time where none is missed.
    """

    model: str
    base: str | None
    runtime: str
    before_ms: float
    after_ms: float
    kinds: tuple[TimeRow, ...]
    layers: tuple[TimeRow, ...]


def compare_profiles(
    names: tuple[str | None, str],
    runtime: str,
    before: Sequence[Executed],
    after: Sequence[Executed],
    structures: tuple[Structure, Structure] | None = None,
) -> Profile:
    """Set the kernels of two models side by side.

    Args:
        names: of the model before, ``None`` if there is none, and of the model.
        runtime: where both ran.
        before: kernels of the model before; none if there is none.
        after: kernels of the model.
        structures: of both; without them a node is a layer, and nobody knows its FLOPs.
    """
    known = structures or (_NOTHING, _NOTHING)
    kinds = _rows(
        [(kind(kernel), kernel) for kernel in before], [(kind(kernel), kernel) for kernel in after]
    )
    layers = _rows(_by_layer(before, known[0]), _by_layer(after, known[1]))
    layers = [
        replace(
            row,
            flops_before=known[0].flops.get(row.name) or None,
            flops_after=known[1].flops.get(row.name) or None,
        )
        for row in layers
    ]
    if names[0] is not None:
        left = _left(*(sum(one.flops.values()) for one in known))
        layers = [_with_missed(row, left) for row in layers]
    return Profile(
        model=names[1],
        base=names[0],
        runtime=runtime,
        before_ms=sum(one.microseconds for one in before) / 1e3,
        after_ms=sum(one.microseconds for one in after) / 1e3,
        kinds=tuple(sorted(kinds, key=lambda row: -max(row.before_ms, row.after_ms))),
        layers=tuple(sorted(layers, key=lambda row: (-row.missed_ms, -row.after_ms))),
    )


def kind(kernel: Executed) -> str:
    """What a kernel is, in words.

    >>> kind(Executed("c", "FusedConv", "com.microsoft", layout="plain"))
    'FusedConv, plain'
    >>> sizes = ((1, 8, 7, 7), (8, 1, 3, 3))
    >>> kind(Executed("c", "Conv", "com.microsoft.nchwc", layout="blocked", inputs=sizes))
    'depthwise Conv, blocked'
    """
    layout = f", {kernel.layout}" if kernel.layout else ""
    return f"{'depthwise ' if _is_depthwise(kernel) else ''}{kernel.op_type}{layout}"


def _is_depthwise(kernel: Executed) -> bool:
    """Whether it is a convolution of kernels for one channel each: ``[c, 1, ...]``.

    Some runtimes keep those as ``[c, 1, 1, ...]``, groups first.
    """
    if "Conv" not in kernel.op_type or len(kernel.inputs) < 2:
        return False
    x, weight = kernel.inputs[:2]
    ones = weight[1:2] if len(weight) == len(x) else weight[1:3]
    return len(x) > 2 and x[1] > 1 and set(ones) == {1}


_Keyed = Sequence[tuple[str, Executed]]


def _by_layer(kernels: Sequence[Executed], known: Structure) -> _Keyed:
    """Kernels with their layers: that of the last node that computes, else the one it is for."""
    keyed = []
    for kernel in kernels:
        computing = [node for node in kernel.origins if node in known.arithmetic]
        node = [kernel.layer, *computing][-1]
        keyed.append((known.layers.get(node, node) or f"({kernel.op_type})", kernel))
    return keyed


def _rows(before: _Keyed, after: _Keyed) -> list[TimeRow]:
    spent: dict[str, tuple[list[Executed], list[Executed]]] = defaultdict(lambda: ([], []))
    for side, keyed in enumerate((before, after)):
        for key, kernel in keyed:
            spent[key][side].append(kernel)
    return [
        TimeRow(
            name=name,
            before_ms=sum(kernel.microseconds for kernel in old) / 1e3,
            after_ms=sum(kernel.microseconds for kernel in new) / 1e3,
            before=Counter(map(kind, old)),
            after=Counter(map(kind, new)),
        )
        for name, (old, new) in spent.items()
    ]


def _with_missed(row: TimeRow, left: float) -> TimeRow:
    if row.flops_before and row.flops_after:
        left = _left(row.flops_before, row.flops_after)
    return replace(row, missed_ms=row.after_ms - row.before_ms * left)


def _left(before: float, after: float) -> float:
    return after / before if before else 1.0
