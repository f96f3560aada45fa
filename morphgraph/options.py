"""What users choose: the names of methods, each once, and what an option says about itself.

The library and the command line read both. No torch here: the command line offers the names before
anything is loaded.
"""

from typing import Any, Literal, get_args

from msgspec import Meta

Score = Literal["l2", "l1", "bn", "lasso", "random"]
"""How the channels of a group are ranked, see :func:`morphgraph.passes.analysis.score.score`."""

DataScore = Literal["data", "variance", "activation"]
"""The same by calibration inputs, see :func:`morphgraph.shrinking.data_scores`."""

AnyScore = Literal[Score, DataScore]

Allocation = Literal["shares", "sum"]
"""What scores of different groups are to each other, see :func:`morphgraph.plan`."""

Depth = Literal["keep", "branches", "blocks"]
"""What may go beside channels: nothing, branches of a residual network, or whole blocks of them."""

REPEATED = "repeated"
"""Among globs of groups that get one width: the groups that correspond in repeated blocks."""

RoundTo = int | Literal["auto"]
"""The multiple that widths become, or ``"auto"``: by what suits the operators that see a group."""

Start = Literal["keep", "fresh"]
"""The weights of a resized network: those it had, or new ones."""

Strength = Literal["auto", "bn", "lasso"]
"""What the regularizer measures, see :class:`~morphgraph.train.regularizer.Regularizer`."""

Tied = Literal["max", "l2"]
"""How the strengths of tied producers combine: their maximum, or the root of the sum of squares."""

Update = Literal["proximal", "subgradient"]
"""How strengths shrink, see :class:`~morphgraph.train.fixed_weight.FixedWeight`."""

Convention = Literal["default", "morphnet"]
"""How costs are counted, see :func:`morphgraph.cost`."""

Attention = Literal["heads", "query-heads", "head-dim", "all"]
"""Whether attentions shrink by whole heads, by query heads, by the size of every head, or by all of
these in one plan."""

Format = Literal["table", "json", "csv", "md"]
"""How the command line prints results."""

Fit = Literal["stretch", "crop", "pad"]
"""Images to the shape of the input: the aspect ratio given up, the borders cut off, or added."""

Order = Literal["RGB", "BGR"]
"""The order of colours in an input."""

Axes = Literal["NCHW", "NHWC"]
"""The order of axes of an input of images."""

Baseline = Literal["uniform", "l2", "bn", "random"]
"""``uniform`` is the width multiplier. The others remove the channels with the lowest score from a
trained network: the norm of their kernels (``l2``), the BatchNorm scale (``bn``), or by chance."""

Alone = Literal["base", Baseline]
"""What a run can train by itself: ``base`` is the original."""

Method = Literal["morph", Alone]
"""``morph`` learns the structure."""

BASELINES: tuple[Baseline, ...] = get_args(Baseline)
METHODS: tuple[Method, ...] = get_args(Method)
DATA_SCORES: tuple[DataScore, ...] = get_args(DataScore)


def option(
    description: str | None = None,
    *flags: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    **click: Any,
) -> Meta:
    """What a command line must know of a value beside its type: to be used in ``Annotated``.

    Args:
        description: the help text.
        flags: the option's spellings, where they do not follow from the name.
        ge, gt, le: bounds of a number.
        click: what click alone needs to know, such as ``metavar``.
    """
    extra: dict[str, Any] = {"flags": flags} if flags else {}
    bounds: dict[str, Any] = {"ge": ge, "gt": gt, "le": le}
    return Meta(description=description, extra=extra | click, **bounds)


ROUND_TO = option(
    "Widths that change become multiples of N, counted in channels of the tensors that layers "
    "read and make: any number of heads of size 64 is on a grid of 16. auto: of what suits the "
    "operators of each group (16 for convolutions, 8 or 4 for narrow ones), finer where a budget "
    "needs it; 1 frees all widths.",
    ge=1,
    metavar="N|auto",
)
"""What a command line says of :data:`RoundTo`."""

DEPTH = option(
    "Whole parts of a residual network may go, too: branches (of x + f(x) what computes f, as an "
    "attention, an MLP or a residual unit), or only blocks (an attention with its MLP, as a "
    "model's configuration counts layers). They compete with the widths under the same budget.",
    metavar="keep|branches|blocks",
)
"""What a command line says of :data:`Depth`."""
