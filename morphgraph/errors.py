"""The errors a user may meet, each with the exit code that the command line answers with; warnings.

Every message is one line: which file, node or tensor; what is wrong; what to do about it.
"""

import sys
import warnings
from types import FrameType

# What an interrupted user is told, and what a shell sees.
INTERRUPTED = "interrupted; nothing was left half written"
INTERRUPTED_CODE = 130

# Whose frames no warning names: the package's, and those of what calls its functions for it.
_INSIDE = frozenset({"morphgraph", "contextlib", "importlib", "_frozen_importlib", "torch"})


class MorphError(Exception):
    """Base of all errors that morphgraph raises on purpose.

    The message says what is wrong and where; ``exit_code`` is what a shell sees.

    >>> raise PlanError("plan.json: groups.g3.keep: range [4, 2) is empty; write it as [2, 4]")
    Traceback (most recent call last):
        ...
    morphgraph.errors.PlanError: plan.json: groups.g3.keep: range [4, 2) is empty; write it as [2,
    4]
    """

    exit_code = 3


class ModelError(MorphError):
    """The model is broken or cannot be read."""


class PlanError(MorphError):
    """The plan is broken or belongs to another model."""


class DataError(MorphError):
    """The data to train or to calibrate with are broken, or are not what was asked for."""


class UnsupportedError(MorphError):
    """The model is valid, but morphgraph cannot do what was asked with it."""


class ArgumentError(UnsupportedError):
    """An argument makes no sense, whatever the model is: a cost or an amount that is none."""

    exit_code = 2


class BudgetError(MorphError):
    """The answer is no: no plan meets the budget."""

    exit_code = 1


class VerificationError(MorphError):
    """The answer is no: a resized model does not compute what the masked original computes."""

    exit_code = 1


class FileError(MorphError):
    """The file system refused: a path is missing, exists already, or cannot be written."""

    exit_code = 4


class MorphWarning(UserWarning):
    """Something that a user should know, although the work went on."""


def warn(message: str, category: type[Warning] = MorphWarning) -> None:
    """Warn, and name the line outside of this package from which its caller was called.

    A number for ``stacklevel`` would have to count the frames between, which differ by the way.
    """
    frame = _outside(sys._getframe(1))  # noqa: SLF001 - as the standard library's warnings do
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=_module(frame),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _outside(frame: FrameType) -> FrameType:
    """The nearest frame that is not the package's."""
    while _module(frame).partition(".")[0] in _INSIDE and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _module(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name
