"""Options of commands that choose widths: the keyword arguments of ``plan`` and of ``expand``."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from msgspec import Meta

from morphgraph.cli.shared_options import RoundTo, Seed, assignment, width
from morphgraph.options import Score, option
from morphgraph.passes.analysis.cost import Convention

Counting = Annotated[Convention, option("How costs are counted.")]


def _globs(description: str) -> Meta:
    return option(description, metavar="GLOB")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Keyword arguments of :func:`morphgraph.plan` and :func:`morphgraph.uniform`."""

    score: Annotated[Score, option("How channels of a group are ranked.")] = "l2"
    round_to: RoundTo = 1
    min_width: Annotated[
        int,
        option(
            "No group gets narrower; with 0 groups may die, and their layers vanish.",
            ge=0,
            metavar="N",
        ),
    ] = 1
    include: Annotated[tuple[str, ...], _globs("Resize these groups only; may be repeated.")] = ()
    exclude: Annotated[tuple[str, ...], _globs("Leave these groups alone; may be repeated.")] = ()
    convention: Counting = "default"
    seed: Seed = 0


@dataclass(frozen=True, slots=True)
class ExpandOptions:
    """Keyword arguments of :func:`morphgraph.expand`."""

    round_to: RoundTo = 1
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
    convention: Counting = "default"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments."""
        return asdict(self) | {"max_width": dict(self.max_width)}
