"""What is known of a group, an operator or an axis: as data, and in words.

The structs are the JSON that is printed; ``docs/schema/explanation.schema.json`` is made from them.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from morphgraph.onnx_io import escape
from morphgraph.report.tables import (
    Report,
    Table,
    amount,
    number_column,
    plain,
    render,
    share,
    size,
    table_of,
)
from morphgraph.version import __version__

SCHEMA_VERSION = 1

Role = Literal["makes", "sums over", "competes over", "ties", "carries on"]
MapName = Literal["identity", "blocks", "strides", "segment", "table"]

_SHOWN_STEPS = 12  # of a path, in text; JSON has all
_SHOWN_WEIGHTS = 2  # of an operator
_SHOWN_COMPETITORS = 3
_TINY = 1e-4


class Price(msgspec.Struct, frozen=True):
    """What removing one channel saves, at the present widths; ``share`` is of the whole model."""

    unit: str
    per_channel: float
    share: float

    def percent(self) -> str:
        """The share, as people read it."""
        return "under 0.01 %" if 0 < self.share < _TINY else share(self.share)


class TensorAxis(msgspec.Struct, frozen=True):
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
    map: MapName
    outer: int
    inner: int
    offset: int
    size: int

    def map_words(self) -> str:
        """How positions belong to channels; empty where one to one."""
        match self.map:
            case "blocks":
                rounds = f", {self.outer} times" if self.outer > 1 else ""
                return f"blocks of {self.inner}{rounds}"
            case "strides":
                return f"every {self.size}th"
            case "segment":
                return f"{self.offset} to {self.offset + self.size - 1}"
            case "table":
                return "chosen positions"
        return ""

    def __str__(self) -> str:
        words = self.map_words()
        return f"{self.tensor}[{self.axis}{': ' + words if words else ''}]"


class Use(msgspec.Struct, frozen=True):
    """What one operator does to the channels: its ``factor`` of the notation, and on which axes.

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
    places: list[TensorAxis]

    def axes_words(self) -> str:
        """The axes of operands and results; of more than two weights only the count."""
        operands = [axis for axis in self.places if axis.side == "operand"]
        weights = [axis for axis in operands if axis.weight]
        hidden = weights if len(weights) > _SHOWN_WEIGHTS else []
        sides = [
            [str(axis) for axis in operands if axis not in hidden],
            [str(axis) for axis in self.places if axis.side == "result"],
        ]
        if hidden:
            sides[0].append(f"{len(hidden)} weights")
        return " -> ".join(", ".join(words) for words in sides if words)


class Step(msgspec.Struct, frozen=True):
    """One step of the path that a reason took: an axis, or an operator between two.

    For an operator ``map`` says how the axes of the two sides go together, where not one to one.
    """

    kind: Literal["axis", "operator"]
    name: str
    op_type: str | None = None
    axis: int | None = None
    map: str | None = None

    def __str__(self) -> str:
        if self.kind == "axis":
            return f"{escape(self.name)}[{self.axis}]"
        words = f" ({self.map})" if self.map else ""
        return f"{escape(self.op_type or '')} '{escape(self.name)}'{words}"


class GroupExplanation(msgspec.Struct, frozen=True):
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


class AxisExplanation(msgspec.Struct, frozen=True):
    """An axis of a value: the groups that stand on it, or why it keeps its size."""

    tensor: str
    axis: int
    size: int
    groups: list[str]
    reason: str | None
    path: list[Step]


class OperatorExplanation(msgspec.Struct, frozen=True):
    """An operator by name; ``opaque`` says why nothing is known of it."""

    name: str
    op_type: str
    layer: str
    opaque: str | None


class Explanation(msgspec.Struct, frozen=True):
    """All that is known under a name: groups, or else operators, and axes of values."""

    name: str
    groups: list[GroupExplanation]
    operators: list[OperatorExplanation]
    axes: list[AxisExplanation]
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__

    def __str__(self) -> str:
        """The text that the command line prints."""
        return render(explanation_report(self), "table")


def explanation_report(explanation: Explanation) -> Report:
    """An explanation for people; several groups are listed, one is described in full."""
    groups = explanation.groups
    if len(groups) == 1:
        return Report(explanation, [_use_table(groups[0])], _summary(groups[0]))
    if groups:
        return Report(
            explanation,
            [_group_table(groups)],
            [("matches", f"{len(groups)} groups")],
            [f"name one of them to see its life: --explain {groups[0].id}"],
        )
    head = [("operator", _operator_line(operator)) for operator in explanation.operators]
    return Report(explanation, [_axis_table(explanation.axes)], head)


def _operator_line(operator: OperatorExplanation) -> str:
    opaque = f"; not described: {escape(operator.opaque)}" if operator.opaque else ""
    layer = f" of {escape(operator.layer)}" if operator.layer != operator.name else ""
    return f"{escape(operator.op_type)} '{escape(operator.name)}'{layer}{opaque}"


def _summary(group: GroupExplanation) -> list[tuple[str, str]]:
    lines = [
        ("group", f"{group.id}: {escape(group.name)}, {_count(group.width, 'channel')}"),
        ("made by", ", ".join(map(escape, group.producers)) or "no layer"),
        ("read by", ", ".join(map(escape, group.readers)) or "no layer"),
        (
            "a channel",
            f"{amount(group.macs.per_channel)} MACs = {amount(group.flops.per_channel)} FLOPs "
            f"({group.flops.percent()} of the model), "
            f"{amount(group.params.per_channel)} params ({group.params.percent()}), "
            f"{size(group.activation_bytes.per_channel)} of activations "
            f"({group.activation_bytes.percent()})",
        ),
    ]
    if group.reason is None:
        lines.append(("can shrink", "nothing that keeps its size is tied to it"))
    else:
        lines.append(("keeps size", escape(group.reason)))
        if group.path:
            lines.append(("because", _path_words(group.path)))
    if group.statistical:
        names = [*map(escape, group.competitors[:_SHOWN_COMPETITORS])]
        if len(group.competitors) > len(names):
            names.append("...")
        lines.append(
            (
                "statistical",
                f"{_count(len(group.competitors), 'operator')} ({', '.join(names)}) normalize, "
                "average or compete over the channels: a removal changes what the others become",
            )
        )
    return lines


def _count(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _path_words(path: Sequence[Step]) -> str:
    words = [str(step) for step in path]
    if len(words) > _SHOWN_STEPS:
        half = _SHOWN_STEPS // 2
        words[half:-half] = [f"... {len(words) - 2 * half} more ..."]
    return " -> ".join(words)


def _use_table(group: GroupExplanation) -> Table:
    return table_of(
        group.operators,
        ("operator", lambda use: use.operator),
        ("type", lambda use: use.op_type),
        ("does", lambda use: f"{use.role} {' and '.join(dict.fromkeys(use.tied))}".rstrip()),
        ("factor", lambda use: use.factor),
        ("stands on", lambda use: use.axes_words()),
        title="Operator by operator",
    )


def _group_table(groups: Sequence[GroupExplanation]) -> Table:
    return table_of(
        groups,
        ("id", lambda group: group.id),
        ("group", lambda group: group.name),
        (number_column("width", plain), lambda group: group.width),
        (number_column("FLOPs per channel"), lambda group: group.flops.per_channel),
        (number_column("params per channel"), lambda group: group.params.per_channel),
        ("keeps its size because", lambda group: group.reason),
    )


def _axis_table(axes: Sequence[AxisExplanation]) -> Table:
    return table_of(
        axes,
        ("axis", lambda axis: f"{axis.tensor}[{axis.axis}]"),
        (number_column("size", plain), lambda axis: axis.size),
        ("groups", lambda axis: ", ".join(axis.groups)),
        ("keeps its size because", lambda axis: axis.reason),
        ("path", lambda axis: _path_words(axis.path)),
        title="Axes",
    )
