"""Options of commands that choose widths: the keyword arguments of ``plan`` and of ``expand``."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from msgspec import Meta

from morphgraph.cli.shared_options import RoundTo, Seed, assignment, width
from morphgraph.methods import Score
from morphgraph.passes.analysis.cost import Convention

Counting = Annotated[Convention, Meta(description="How costs are counted.")]


def _globs(description: str) -> Meta:
    return Meta(description=description, extra={"metavar": "GLOB"})


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Keyword arguments of :func:`morphgraph.plan` and :func:`morphgraph.uniform`."""

    score: Annotated[Score, Meta(description="How channels of a group are ranked.")] = "l2"
    round_to: RoundTo = 1
    min_width: Annotated[
        int,
        Meta(
            ge=0,
            description="No group gets narrower; with 0 groups may die, and their layers vanish.",
            extra={"metavar": "N"},
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
        Meta(
            ge=0,
            description="Narrower groups are raised to N first, as far as the budget allows.",
            extra={"metavar": "N"},
        ),
    ] = 1
    max_growth: Annotated[
        float | None,
        Meta(
            ge=1,
            description="No group gets wider than R times its width in the model.",
            extra={"metavar": "R"},
        ),
    ] = None
    max_width: Annotated[
        tuple[tuple[str, int], ...],
        Meta(
            description="These groups get no wider than N; may be repeated.",
            extra={"type": assignment(width, "'layer4*=512'"), "metavar": "GLOB=N"},
        ),
    ] = ()
    fill: Annotated[
        bool,
        Meta(
            description="Use what rounding leaves of the budget, one step of one group at a time.",
            extra={"flags": ("--fill/--no-fill",)},
        ),
    ] = True
    include: Annotated[tuple[str, ...], _globs("Grow these groups only.")] = ()
    exclude: Annotated[tuple[str, ...], _globs("Do not grow these groups.")] = ()
    convention: Counting = "default"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments."""
        return asdict(self) | {"max_width": dict(self.max_width)}
