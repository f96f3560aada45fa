"""The plan: which channels of every group stay. A JSON file that a person can read and edit.

A plan belongs to a network's structure (operators with their attributes, names, shapes), not to
its weights: it stays valid after training, and is refused for another network. It also records how
the model was lifted, since the groups depend on that: a model is lifted in the same way to use it.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from os import PathLike
from typing import Annotated, Any

import msgspec
import numpy as np
import onnx_ir as ir

from morphgraph.arrays import IntArray
from morphgraph.errors import PlanError, warn
from morphgraph.graph import ChannelGraph, Group, LiftOptions, analysis
from morphgraph.onnx_io import escape, static_shape, write_atomically
from morphgraph.onnx_io.fixed import fixed_words
from morphgraph.onnx_io.reading import from_json, read_bounded
from morphgraph.options import Convention
from morphgraph.passes.analysis.least import require_sizes
from morphgraph.passes.analysis.liveness import require_viable
from morphgraph.passes.analysis.polynomial import Cost
from morphgraph.version import __version__

SCHEMA_VERSION = 1
MAX_NEW_CHANNELS = 2**16  # of one group; a plan from a stranger must not exhaust the memory

_Position = Annotated[int, msgspec.Meta(ge=0)]

# Arrays of numbers, as msgspec spreads them; a line break never stands in a JSON string.
_SPREAD = re.compile(rb"\[\n\s+((?:[\d.e+-]+,?\s+)+)\]")


def readable_json(data: Any) -> bytes:
    """Indented JSON, arrays of numbers on one line; the same data gives the same bytes.

    >>> print(readable_json({"keep": [[0, 13], [16, 32]]}).decode(), end="")
    {
      "keep": [
        [0, 13],
        [16, 32]
      ]
    }
    """
    spread = msgspec.json.format(msgspec.json.encode(data), indent=2)
    return _SPREAD.sub(lambda match: b"[" + b" ".join(match[1].split()) + b"]", spread) + b"\n"


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cost before and after a plan."""

    before: float
    after: float


class GroupPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan does to one group.

    ``keep`` holds half-open ranges of old channels, ascending; ``new`` channels come behind them.
    Where it is empty the group is removed, and its layers vanish.
    """

    name: str
    width: Annotated[int, msgspec.Meta(ge=1)]
    keep: tuple[tuple[_Position, _Position], ...]
    new: _Position = 0

    @property
    def positions(self) -> IntArray:
        """The old channels that stay, ascending."""
        numbers = chain.from_iterable(self.keep)
        bounds = np.fromiter(numbers, np.int64, 2 * len(self.keep)).reshape(-1, 2)
        counts = np.maximum(bounds[:, 1] - bounds[:, 0], 0)
        places = np.cumsum(counts) - counts  # of each range among the positions
        positions: IntArray = np.repeat(bounds[:, 0] - places, counts) + np.arange(counts.sum())
        return positions

    @property
    def count(self) -> int:
        """How many old channels stay."""
        return sum(max(stop - start, 0) for start, stop in self.keep)

    @property
    def kept(self) -> IntArray:
        """The former name of ``positions``, for one version."""
        warn("GroupPlan.kept is now positions", DeprecationWarning)
        return self.positions


class ModelRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The model that a plan belongs to; ``lift`` is how it was lifted, absent for the defaults."""

    structure: str
    lift: LiftOptions = LiftOptions()

    def check(self, graph: ChannelGraph) -> None:
        """Refuse another network, and the same one with other groups.

        Raises:
            PlanError: says what differs, and what to do.
        """
        planned, present = self.lift, graph.options
        if self.structure != structure_hash(graph):
            if planned.fixed != present.fixed:
                raise PlanError(
                    f"model.lift: the plan was made for the network with {_fixing(planned)}, and "
                    f"this is the one with {_fixing(present)}; fix the inputs of the file as the "
                    "plan says (--fix, fixed=), or make a plan for this one"
                )
            sizes = ""
            if planned.input_shapes != present.input_shapes:
                sizes = f" (its inputs were {_sizes(planned)}, here they are {_sizes(present)})"
            raise PlanError(
                f"model.structure: the plan was made for another network{sizes}; make one for this "
                "model (`plan`), or give the model that it was made for"
            )
        for option in ("attention", "pin_outputs", "pin_rows"):
            wanted, lifted = getattr(planned, option), getattr(present, option)
            if wanted != lifted:
                raise PlanError(
                    f"model.lift: the plan was made with {option}={wanted!r}, the model is lifted "
                    f"with {lifted!r}; lift it as the plan says, or make a plan for {lifted!r}"
                )


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which channels of every group stay; groups that do not change are left out.

    >>> plan = Plan(ModelRef("0" * 64), {}, {}, {"g1": GroupPlan("conv1", 4, ((0, 2),))})
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    model: ModelRef
    request: dict[str, Any]
    cost: dict[str, Change]
    groups: dict[str, GroupPlan]
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__

    @property
    def convention(self) -> Convention:
        """How its costs were counted."""
        asked = self.request.get("convention")
        return "morphnet" if asked == "morphnet" else "default"

    def to_json(self) -> bytes:
        """The file's bytes; the same plan gives the same bytes."""
        ordered = {
            "schema_version": self.schema_version,
            "tool_version": self.tool_version,
            "model": self.model,
            "request": self.request,
            "cost": self.cost,
            "groups": self.groups,
        }
        return readable_json(ordered)

    @classmethod
    def from_json(cls, data: bytes, path: str = "plan") -> "Plan":
        """Read a plan.

        Raises:
            PlanError: the bytes are no plan; names the field and what is wrong with it.
        """
        try:
            head = from_json(data, object)
        except ValueError as error:
            if any(byte < ord("\t") for byte in data[:64]):
                raise PlanError(
                    f"{path}: not a JSON file but a binary one; give the model first, the "
                    "plan second"
                ) from None
            raise PlanError(f"{path}: not a JSON file: {error}; make it with `plan`") from None
        version = head.get("schema_version") if isinstance(head, dict) else None
        if version != SCHEMA_VERSION:
            raise PlanError(
                f"{path}: schema_version: {version!r} is unknown, this version reads "
                f"{SCHEMA_VERSION}; make the plan again with `plan`"
            )
        try:
            plan = from_json(data, cls)
        except ValueError as error:
            what, _, where = str(error).partition(" - at ")
            field = where.strip("`").removeprefix("$.") or "plan"
            raise PlanError(f"{path}: {field}: {what}") from None
        for key, group in plan.groups.items():
            _check_ranges(f"{path}: groups.{escape(key)}.keep", group)
        return plan

    def save(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write the plan; the file appears whole or not at all.

        Raises:
            FileError: the file exists already (without ``overwrite``) or cannot be written.
        """
        write_atomically(path, self.to_json(), overwrite)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Plan":
        """Read a plan file.

        Raises:
            FileError: there is no such file, or it cannot be read.
            PlanError: it is no plan.
        """
        return cls.from_json(read_bounded(path, PlanError), escape(os.fspath(path)))

    def keep_channels(self, graph: ChannelGraph) -> dict[int, IntArray]:
        """Per group index the old channels that stay, for the groups that change.

        Raises:
            PlanError: the plan is for another network, a range does not fit its group, or nothing
                would be left of the network where groups keep no channel.
        """
        self.model.check(graph)
        by_id = {group.id: group for group in graph.groups}
        keep: dict[int, IntArray] = {}
        for key, entry in self.groups.items():
            group = by_id.get(key)
            if group is None:
                raise PlanError(f"groups.{escape(key)}: the model has no such group")
            _check_fits(group, entry)
            positions = entry.positions
            if len(positions) != group.width:
                keep[group.index] = positions
        require_viable(graph, [index for index, positions in keep.items() if not len(positions)])
        require_sizes(graph, keep, self.added(graph))
        return keep

    def kept(self, graph: ChannelGraph) -> dict[int, IntArray]:
        """The former name of :meth:`keep_channels`, for one version."""
        warn("Plan.kept is now keep_channels", DeprecationWarning)
        return self.keep_channels(graph)

    def added(self, graph: ChannelGraph) -> dict[int, int]:
        """Per group index the number of channels that are added behind those that stay."""
        index_of = {group.id: group.index for group in graph.groups}
        return {index_of[key]: entry.new for key, entry in self.groups.items() if entry.new}

    def widths(self, graph: ChannelGraph) -> IntArray:
        """The width of every group under the plan, ``[groups]``."""
        return _widths(graph, self.keep_channels(graph), self.added(graph))


def _check_ranges(field: str, group: GroupPlan) -> None:
    last = 0
    for start, stop in group.keep:
        if stop <= start:
            raise PlanError(f"{field}: range [{start}, {stop}] is empty; ranges are [first, end)")
        if start < last:
            raise PlanError(
                f"{field}: range [{start}, {stop}] repeats channels below {last}; "
                "ranges ascend and do not overlap"
            )
        last = stop
    if last > group.width:
        raise PlanError(f"{field}: channel {last - 1} is out of range, the width is {group.width}")
    if not group.keep and group.new:
        raise PlanError(f"{field}: keeps no channel, so that none can be added; leave out 'new'")


def _check_fits(group: Group, entry: GroupPlan) -> None:
    field = f"groups.{group.id}"
    if entry.new > MAX_NEW_CHANNELS:
        raise PlanError(
            f"{field}.new: {entry.new} channels are more than a group can get "
            f"({MAX_NEW_CHANNELS}); write fewer"
        )
    if entry.width != group.width:
        raise PlanError(f"{field}.width: {entry.width}, but the model's group has {group.width}")
    if not group.can_change and (entry.new or entry.count != group.width):
        raise PlanError(
            f"{field}: '{escape(group.name)}' cannot be resized ({escape(group.reason or '')})"
        )


def make_plan(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    request: Mapping[str, Any],
    costs: Iterable[Cost] = (),
    added: Mapping[int, int] | None = None,
) -> Plan:
    """A plan from kept and added channels; groups that do not change are left out.

    Args:
        graph: the lifted network.
        keep: per group index the channels that stay, ascending; groups left out stay whole.
        request: what the plan was made for.
        costs: those that the plan states, before and after.
        added: per group index the number of channels that are added.
    """
    added = added or {}
    groups = {}
    for index in sorted({*keep, *added}):
        group, new = graph.groups[index], int(added.get(index, 0))
        positions = keep.get(index, np.arange(group.width))
        if len(positions) < group.width or new:
            groups[group.id] = GroupPlan(group.name, group.width, _ranges(positions), new)
    widths = _widths(graph, keep, added)
    changes = {cost.kind: Change(cost.total, cost.at(widths)) for cost in costs}
    model = ModelRef(structure_hash(graph))
    if graph.options != model.lift:
        model = ModelRef(model.structure, graph.options)
    return Plan(model, dict(request), changes, groups)


def _widths(
    graph: ChannelGraph, keep: Mapping[int, IntArray], added: Mapping[int, int]
) -> IntArray:
    """The width of every group when these channels stay and so many are added, ``[groups]``."""
    widths = graph.widths.copy()
    for index, positions in keep.items():
        widths[index] = len(positions)
    for index, new in added.items():
        widths[index] += new
    return widths


def _sizes(options: LiftOptions) -> str:
    """Input shapes as the command line takes them."""
    shapes = options.input_shapes.items()
    return ", ".join(f"{escape(n)}={'x'.join(map(str, s))}" for n, s in shapes) or "as in the file"


def _fixing(options: LiftOptions) -> str:
    """Values of fixed inputs as the command line takes them."""
    return escape(", ".join(fixed_words(options.fixed))) or "no input fixed"


def _ranges(positions: IntArray) -> tuple[tuple[int, int], ...]:
    """Ascending positions as half-open ranges.

    >>> _ranges(np.array([0, 1, 4]))
    ((0, 2), (4, 5))
    """
    breaks = np.flatnonzero(np.diff(positions) > 1)
    starts = positions[:1].tolist() + positions[breaks + 1].tolist()
    stops = (positions[breaks] + 1).tolist() + (positions[-1:] + 1).tolist()
    return tuple(zip(starts, stops, strict=True))


# Shapes, axes and indices are of these types; 8-bit integers are quantized weights.
_STRUCTURAL = (ir.DataType.INT32, ir.DataType.INT64)
_HASHED_ELEMENTS = 2**20  # of an integer constant; shapes and indices are smaller


@analysis
def structure_hash(graph: ChannelGraph) -> str:
    """SHA-256 of the canonical structure: what training does not change.

    Operators, names, shapes, attributes that are integers or words, and integer constants (shapes,
    axes, indices). Not the weights, and no other floating-point number.
    """
    lines = "".join(_structure(graph.model.graph))
    return hashlib.sha256(lines.encode(errors="backslashreplace")).hexdigest()


def _structure(model: ir.Graph, inner: bool = False) -> Iterator[str]:
    """What is hashed. Sizes within a subgraph are not known, and follow from the rest."""

    def typed(value: ir.Value) -> str:
        name = value.name
        if not name:
            return ""  # a result that nobody wants
        return name if inner else f"{name}:{static_shape(value)}"

    for value in (*model.inputs, *model.initializers.values()):
        tensor = value.const_value
        content = ""
        if tensor is not None and tensor.dtype in _STRUCTURAL and tensor.size <= _HASHED_ELEMENTS:
            content = f"={hashlib.sha256(tensor.numpy().astype('<i8').tobytes()).hexdigest()}"
        yield f"{typed(value)}{content};"
    for node in model:
        inputs = ",".join("" if v is None else v.name or "" for v in node.inputs)
        outputs = ",".join(typed(value) for value in node.outputs)
        yield f"{node.domain}:{node.op_type}({inputs})->{outputs};"
        for name, attribute in sorted(node.attributes.items()):
            match attribute.type:
                case ir.AttributeType.GRAPH:
                    yield f"{name}:"
                    yield from _structure(attribute.as_graph(), inner=True)
                case ir.AttributeType.INT | ir.AttributeType.STRING:
                    yield f"{name}={attribute.value!r};"
                case ir.AttributeType.INTS | ir.AttributeType.STRINGS:
                    yield f"{name}={list(attribute.value)!r};"
    yield ",".join(value.name or "" for value in model.outputs)
