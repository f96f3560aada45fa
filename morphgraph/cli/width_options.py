"""Options of commands that choose widths: the keyword arguments of ``plan`` and of ``expand``."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

import click
from msgspec import Meta

from morphgraph.cli.shared_options import Seed, assignment, width, width_or_share
from morphgraph.errors import warn
from morphgraph.options import (
    DEPTH,
    REPEATED,
    ROUND_TO,
    AnyScore,
    Convention,
    DataScore,
    Depth,
    RoundTo,
    option,
)

if TYPE_CHECKING:
    from morphgraph.folders.found import ModelFolder
    from morphgraph.graph import ChannelGraph
    from morphgraph.passes.planning.ties import Ties

Counting = Annotated[Convention, option("How costs are counted.")]


def _globs(description: str) -> Meta:
    return option(description, metavar="GLOB")


_SAME = "All these groups get one width, as a model's configuration needs it; may be repeated."
_REPEATED = " Without GLOB: the groups that correspond in repeated blocks."


def _globs_or_none(description: str) -> Meta:
    extra: dict[str, Any] = {"metavar": "[GLOB]", "is_flag": False, "flag_value": REPEATED}
    return option(description + _REPEATED, **extra)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Keyword arguments of :func:`morphgraph.plan` and :func:`morphgraph.uniform`."""

    score: Annotated[
        AnyScore,
        option(
            "How channels of a group are ranked: by their kernels, or by what calibration inputs "
            "(--data) say of them."
        ),
    ] = "l2"
    round_to: Annotated[RoundTo, ROUND_TO] = "auto"
    min_width: Annotated[
        int,
        option(
            "No group gets narrower, counted in channels of tensors; with 0 groups may die, and "
            "their layers vanish.",
            ge=0,
            metavar="N",
        ),
    ] = 1
    include: Annotated[tuple[str, ...], _globs("Resize these groups only; may be repeated.")] = ()
    exclude: Annotated[tuple[str, ...], _globs("Leave these groups alone; may be repeated.")] = ()
    widths: Annotated[
        tuple[tuple[str, int | str], ...],
        option(
            "A width by hand, by group id, name or producer: a number of channels, a share of the "
            "group's (rounded to the grid), or 0 to remove it. The budget is met by the other "
            "groups. May be repeated; the last that names a group counts.",
            "--set",
            type=assignment(width_or_share, "'layer1*=48' or 'layer1*=50%'"),
            metavar="GLOB=N|P%",
        ),
    ] = ()
    same: Annotated[tuple[str, ...], _globs_or_none(_SAME)] = ()
    unequal: Annotated[
        bool,
        option(
            "Let repeated blocks have different widths, also where a config.json or "
            "genai_config.json beside the model has one number for all."
        ),
    ] = False
    depth: Annotated[Depth, DEPTH] = "keep"
    convention: Counting = "default"
    seed: Seed = 0

    def beside(self, folder: object | None) -> Self:
        """The same where a config stands beside the model, which has one number for all blocks.

        Raises:
            UsageError: ``--unequal`` and ``--same`` contradict each other.
        """
        if self.unequal and REPEATED in self.same:
            raise click.UsageError("--unequal and --same without GLOB contradict; leave one out")
        if folder is None or REPEATED in self.same:
            return self
        if self.unequal:
            warn("--unequal: configs have one number for all blocks; only ONNX Runtime runs others")
            return self
        return replace(self, same=(*self.same, REPEATED))

    def ties(self, graph: "ChannelGraph", folder: "ModelFolder | None") -> "Ties":
        """The widths that go together so that the config beside the model says them."""
        from morphgraph.folders.classes import folder_ties
        from morphgraph.passes.planning.bounds import WidthBounds
        from morphgraph.passes.planning.ties import NONE

        if folder is None or self.unequal:
            return NONE
        arguments = self.arguments()
        for name in ("score", "convention", "seed"):
            del arguments[name]
        return folder_ties(graph, WidthBounds(**arguments), folder)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments."""
        chosen = asdict(self)
        del chosen["unequal"]
        widths: dict[str, int | str] = {}
        for pattern, wish in self.widths:
            widths.pop(pattern, None)  # the last that is given comes last
            widths[pattern] = wish
        return chosen | {"widths": widths}


def refuse_for_several_files(by_index: bool, depth: Depth) -> None:
    """Refuse what the files of one network cannot be given yet.

    Raises:
        UsageError: rows by number, or whole blocks.
    """
    if by_index:
        raise click.UsageError(
            "--keep-classes, --keep-tokens and --vocabulary go with one ONNX file: several files "
            "number their tokens alike, and nothing says which; leave them out"
        )
    if depth != "keep":
        raise click.UsageError(
            "--depth goes with one ONNX file: blocks that go would leave gaps in the caches that "
            "files hand on; leave it out, and widths meet the budget"
        )


@dataclass(frozen=True, slots=True)
class ShrinkOptions(PlanOptions):
    """The same where there are calibration inputs."""

    score: Annotated[
        DataScore,
        option(
            "How channels are ranked and widths chosen: by what removing them does to the outputs "
            "after the best compensation (data), or by the variance or the energy of what they "
            "give."
        ),
    ] = "data"


@dataclass(frozen=True, slots=True)
class ExpandOptions:
    """Keyword arguments of :func:`morphgraph.expand`."""

    round_to: Annotated[RoundTo, ROUND_TO] = "auto"
    min_width: Annotated[
        int,
        option(
            "Narrower groups are raised to N first, as far as the budget allows.", ge=0, metavar="N"
        ),
    ] = 1
    max_growth: Annotated[
        float | None,
        option("No group gets wider than R times its width in the model.", ge=1, metavar="R"),
    ] = None
    max_width: Annotated[
        tuple[tuple[str, int], ...],
        option(
            "These groups get no wider than N; may be repeated.",
            type=assignment(width, "'layer4*=512'"),
            metavar="GLOB=N",
        ),
    ] = ()
    fill: Annotated[
        bool,
        option(
            "Use what rounding leaves of the budget, one step of one group at a time.",
            "--fill/--no-fill",
        ),
    ] = True
    include: Annotated[tuple[str, ...], _globs("Grow these groups only.")] = ()
    exclude: Annotated[tuple[str, ...], _globs("Do not grow these groups.")] = ()
    same: Annotated[tuple[str, ...], _globs_or_none(_SAME)] = ()
    convention: Counting = "default"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments."""
        return asdict(self) | {"max_width": dict(self.max_width)}
