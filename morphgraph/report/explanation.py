"""What ``explain`` tells of a group, an operator or an axis, as data.

The structs are the JSON that is printed; ``docs/schema/explanation.schema.json`` is made from them.
"""

from typing import Literal

import msgspec

from morphgraph.report.tables import render
from morphgraph.version import __version__

SCHEMA_VERSION = 1

Role = Literal["makes", "sums over", "competes over", "ties", "carries on"]


class Price(msgspec.Struct, frozen=True):
    """What removing one channel frees, at the present widths; ``share`` is of the whole model."""

    unit: str
    per_channel: float
    share: float


class Place(msgspec.Struct, frozen=True):
    """An axis on which an operator has the channels.

    ``side`` and ``index`` say which operand or result it is. ``map`` says which positions belong to
    a channel: ``identity``, or ``blocks`` of ``inner`` positions, ``strides`` over ``outer`` rounds
    (both may hold: then it is ``blocks``), a ``segment`` that begins at ``offset``, or an irregular
    ``table``.
    """

    side: Literal["operand", "result"]
    index: int
    tensor: str
    axis: int
    weight: bool
    map: Literal["identity", "blocks", "strides", "segment", "table"]
    outer: int
    inner: int
    offset: int
    size: int


class Use(msgspec.Struct, frozen=True):
    """What one operator does to the channels: its ``factor`` of the notation, and where it stands.

    ``role``: it ``makes`` them, ``sums over`` them, ``competes over`` them (a removal changes what
    the others become), ``ties`` those of several operands, or ``carries on``. ``tied`` names the
    layers whose channels it ties, or where they are one layer its tensors.
    """

    operator: str
    op_type: str
    layer: str
    factor: str
    role: Role
    tied: list[str]
    places: list[Place]


class Step(msgspec.Struct, frozen=True):
    """One step of a reason's way: an axis, or an operator that carries it on.

    For an operator ``map`` says how the axes of the two sides go together, where not one to one.
    """

    kind: Literal["axis", "operator"]
    name: str
    op_type: str | None = None
    axis: int | None = None
    map: str | None = None


class Life(msgspec.Struct, frozen=True):
    """A group: who makes it, what ties it, who reads it, what it costs, why it can shrink or not.

    ``path`` leads from where the reason arose to the group. ``competitors`` are the operators that
    normalize, average or compete over it, which make it ``statistical``.
    """

    id: str
    name: str
    width: int
    resizable: bool
    reason: str | None
    path: list[Step]
    statistical: bool
    competitors: list[str]
    producers: list[str]
    readers: list[str]
    macs: Price
    flops: Price
    params: Price
    activation_bytes: Price
    operators: list[Use]


class Axis(msgspec.Struct, frozen=True):
    """An axis of a value: the groups that stand on it, or why it keeps its size."""

    tensor: str
    axis: int
    size: int
    groups: list[str]
    reason: str | None
    path: list[Step]


class Operator(msgspec.Struct, frozen=True):
    """An operator by name; ``opaque`` says why nothing is known of it."""

    name: str
    op_type: str
    layer: str
    opaque: str | None


class Explanation(msgspec.Struct, frozen=True):
    """All that is known under a name: groups, or else operators, and axes of values."""

    name: str
    groups: list[Life]
    operators: list[Operator]
    axes: list[Axis]
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__

    def __str__(self) -> str:
        """The text that the command line prints."""
        from morphgraph.report.telling import explanation_report

        return render(explanation_report(self), "table")


def map_words(place: Place) -> str:
    """How the positions of an axis belong to channels; empty where one to one."""
    rounds = f", {place.outer} times" if place.outer > 1 else ""
    match place.map:
        case "blocks":
            return f"blocks of {place.inner}{rounds}"
        case "strides":
            return f"every {place.size}th"
        case "segment":
            return f"{place.offset} to {place.offset + place.size - 1}"
        case "table":
            return "chosen positions"
    return ""
