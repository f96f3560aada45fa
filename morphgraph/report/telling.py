"""An explanation as text: what the command line and ``print`` show of it."""

from collections.abc import Sequence

from morphgraph.onnx_io import escape
from morphgraph.report.explanation import (
    Axis,
    Explanation,
    Life,
    Operator,
    Place,
    Price,
    Step,
    Use,
    map_words,
)
from morphgraph.report.tables import (
    Cell,
    Column,
    Report,
    Table,
    amount,
    number,
    plain,
    share,
    size,
)

_SHOWN_STEPS = 12  # of a path, in text; JSON has all
_SHOWN_WEIGHTS = 2  # of an operator
_SHOWN_COMPETITORS = 3
_TINY = 1e-4


def explanation_report(explanation: Explanation) -> Report:
    """An explanation for people; several groups are listed, one is told in full."""
    groups = explanation.groups
    if len(groups) == 1:
        return Report(explanation, [_use_table(groups[0])], _portrait(groups[0]))
    if groups:
        return Report(
            explanation,
            [_group_table(groups)],
            [("matches", f"{len(groups)} groups")],
            [f"name one of them to see its life: --explain {groups[0].id}"],
        )
    head = [("operator", _operator_line(operator)) for operator in explanation.operators]
    return Report(explanation, [_axis_table(explanation.axes)], head)


def _operator_line(operator: Operator) -> str:
    known = f"; not described: {escape(operator.opaque)}" if operator.opaque else ""
    layer = f" of {escape(operator.layer)}" if operator.layer != operator.name else ""
    return f"{escape(operator.op_type)} '{escape(operator.name)}'{layer}{known}"


def _portrait(life: Life) -> list[tuple[str, str]]:
    lines = [
        ("group", f"{life.id}: {escape(life.name)}, {_count(life.width, 'channel')}"),
        ("made by", ", ".join(map(escape, life.producers)) or "no layer"),
        ("read by", ", ".join(map(escape, life.readers)) or "no layer"),
        (
            "a channel",
            f"{amount(life.macs.per_channel)} MACs = {amount(life.flops.per_channel)} FLOPs "
            f"({_part(life.flops)} of the model), "
            f"{amount(life.params.per_channel)} params ({_part(life.params)}), "
            f"{size(life.activation_bytes.per_channel)} of activations "
            f"({_part(life.activation_bytes)})",
        ),
    ]
    if life.reason is None:
        lines.append(("can shrink", "nothing that keeps its size is tied to it"))
    else:
        lines.append(("keeps size", escape(life.reason)))
        if life.path:
            lines.append(("because", _path_words(life.path)))
    if life.statistical:
        number_column = _count(len(life.competitors), "operator")
        more = ", ..." if len(life.competitors) > _SHOWN_COMPETITORS else ""
        names = ", ".join(map(escape, life.competitors[:_SHOWN_COMPETITORS]))
        lines.append(
            (
                "statistical",
                f"{number_column} ({names}{more}) normalize, average or compete over the channels: "
                "a removal changes what the others become",
            )
        )
    return lines


def _count(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _part(price: Price) -> str:
    return "under 0.01 %" if 0 < price.share < _TINY else share(price.share)


def _path_words(path: Sequence[Step]) -> str:
    words = [_step_words(step) for step in path]
    if len(words) > _SHOWN_STEPS:
        half = _SHOWN_STEPS // 2
        words[half:-half] = [f"... {len(words) - 2 * half} more ..."]
    return " -> ".join(words)


def _step_words(step: Step) -> str:
    if step.kind == "axis":
        return f"{escape(step.name)}[{step.axis}]"
    how = f" ({step.map})" if step.map else ""
    return f"{escape(step.op_type or '')} '{escape(step.name)}'{how}"


def _use_table(life: Life) -> Table:
    return Table(
        [
            Column("operator"),
            Column("type"),
            Column("does"),
            Column("factor"),
            Column("stands on"),
        ],
        [_use_row(use) for use in life.operators],
        "Operator by operator",
    )


def _use_row(use: Use) -> list[Cell]:
    does: str = use.role
    if use.tied:
        does += " " + " and ".join(dict.fromkeys(use.tied))
    return [use.operator, use.op_type, does, use.factor, " -> ".join(_sides(use))]


def _sides(use: Use) -> list[str]:
    """The operands and the results; of more than two weights the number alone."""
    weights = [place for place in use.places if place.weight and place.side == "operand"]
    hidden = len(weights) if len(weights) > _SHOWN_WEIGHTS else 0
    sides = []
    for side in ("operand", "result"):
        shown = [p for p in use.places if p.side == side and not (hidden and p in weights)]
        words = [_place_words(place) for place in shown]
        if hidden and side == "operand":
            words.append(f"{hidden} weights")
        sides.append(", ".join(words))
    return [words for words in sides if words]


def _place_words(place: Place) -> str:
    words = map_words(place)
    return f"{place.tensor}[{place.axis}{': ' + words if words else ''}]"


def _group_table(groups: Sequence[Life]) -> Table:
    return Table(
        [
            Column("id"),
            Column("group"),
            number("width", plain),
            number("FLOPs per channel"),
            number("params per channel"),
            Column("keeps its size because"),
        ],
        [
            [g.id, g.name, g.width, g.flops.per_channel, g.params.per_channel, g.reason]
            for g in groups
        ],
    )


def _axis_table(axes: Sequence[Axis]) -> Table:
    return Table(
        [
            Column("axis"),
            number("size", plain),
            Column("groups"),
            Column("keeps its size because"),
            Column("path"),
        ],
        [
            [
                f"{axis.tensor}[{axis.axis}]",
                axis.size,
                ", ".join(axis.groups),
                axis.reason,
                _path_words(axis.path),
            ]
            for axis in axes
        ],
        "Axes",
    )
