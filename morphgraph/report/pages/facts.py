"""What a report page shows, as plain values: nothing here knows of files, pictures or HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from morphgraph.report.tables import Table


@dataclass(frozen=True, slots=True)
class GroupWidth:
    """A group of channels before and after; ``reason`` says why it keeps its size."""

    name: str
    before: int
    after: int
    reason: str | None
    producers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A layer's MACs and parameters; after the resize 0 where it is gone."""

    name: str
    op_type: str
    macs: tuple[float, float]
    params: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch of a run; ``live`` is the share of the cost alive, ``weight`` the penalty's."""

    phase: str
    number: int
    loss: float
    live: float | None
    weight: float | None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A network in the picture of quality against cost; ``spread`` is the standard error."""

    series: str
    share: float
    value: float
    spread: float = 0.0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """Quality against cost: what both axes show, and the network that the report is about."""

    cost: str
    quality: str
    points: Sequence[CurvePoint]
    chosen: str
    shares: bool = True
    """Whether ``value`` is a share of 1, shown in percent."""


@dataclass(frozen=True, slots=True)
class GroupStrengths:
    """How strong the channels of a group are; those at or below ``threshold`` go."""

    name: str
    strengths: Sequence[float]
    threshold: float


@dataclass(frozen=True, slots=True)
class Node:
    """A layer, or a module where there are very many, in the picture of the channel graph."""

    name: str
    op_type: str
    output: str
    group: int | None
    place: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Flow:
    """The layers and the tensors between them: ``links`` are (from, to, group)."""

    nodes: Sequence[Node]
    links: Sequence[tuple[int, int, int | None]]


@dataclass(frozen=True, slots=True)
class LayerTime:
    """A layer's time in milliseconds as a device predicts it, and as it was measured."""

    name: str
    model: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Facts:
    """All that a page shows; what is empty is left out.

    Attributes:
        title: what the report is about.
        verdict: the answer in a sentence.
        summary: costs, times and quality before and after.
        groups: in the model's order.
        layers: in the model's order.
        resized: whether there is an after.
        curve: quality against cost.
        epochs: of a run, in their order.
        strengths: by group, at the end of the shrink phase.
        flow: the channel graph.
        times: predicted beside measured.
        tables: further tables, each with its title.
        made: how the result came about, as pairs of a title and a line.
        warnings: what a reader should know before trusting the rest.
    """

    title: str
    verdict: str
    summary: Table
    groups: Sequence[GroupWidth] = ()
    layers: Sequence[LayerCost] = ()
    resized: bool = True
    curve: Curve | None = None
    epochs: Sequence[Epoch] = ()
    strengths: Sequence[GroupStrengths] = ()
    flow: Flow | None = None
    times: Sequence[LayerTime] = ()
    tables: Sequence[Table] = ()
    made: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
