"""The result of a run: the contents of ``result.json``."""

from itertools import chain
from pathlib import PurePath

import msgspec

from morphgraph.errors import FileError
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.reading import from_json
from morphgraph.plans import Change, readable_json
from morphgraph.version import __version__

SCHEMA_VERSION = 2


class Arm(msgspec.Struct, frozen=True):
    """One network of a comparison.

    ``accuracy`` on the test images (0 to 1) when all is trained, ``macs`` and ``params`` counted on
    the file that was written, ``epochs`` trained in this run.
    """

    accuracy: float
    macs: float
    params: float
    epochs: int
    file: str


class Widths(msgspec.Struct, frozen=True):
    """The width of a group of the original: its own, after a phase has shrunk it, and expanded."""

    name: str
    before: int
    shrunk: int
    grown: int


class IterationResult(msgspec.Struct, frozen=True):
    """One round of shrinking and expanding.

    ``shrunk`` and ``cost`` are the costs of the original and of the network after either step,
    ``widths`` are those of the groups of the original that may change, by id. ``target`` and
    ``live`` are the shares of the regularized cost that the phase was to reach and did reach,
    ``trimmed`` what the plan had to remove after the training. ``accuracy`` is of the trained
    network, ``resized_accuracy`` of the new one before it is trained. ``error`` is the resized
    network's largest difference from the masked original, relative to the output's scale;
    ``sensitivity`` how far masking moved the original. ``felt`` is its former name, for one
    version.
    """

    number: int
    target: float
    live: float
    met: bool
    trimmed: float
    omega: float
    shrunk: dict[str, Change]
    cost: dict[str, Change]
    widths: dict[str, Widths]
    accuracy: float
    resized_accuracy: float
    error: float
    sensitivity: float
    felt: float
    plan: str
    model: str


class Member(msgspec.Struct, frozen=True):
    """A network of a family: what a run from a trained network made for one budget.

    ``name`` is that of its arm. ``cost`` is its plan's, before and after. ``accuracy`` is of the
    fine-tuned network on the test images, ``resized_accuracy`` before the fine-tuning. ``error``
    is the resize's largest difference from the masked original, relative to the output's scale;
    ``sensitivity`` how far masking moved the original.
    """

    name: str
    budget: dict[str, str]
    cost: dict[str, Change]
    accuracy: float
    resized_accuracy: float
    error: float
    sensitivity: float
    plan: str
    model: str


class Result(msgspec.Struct, frozen=True):
    """What ``result.json`` holds; ``cost`` is the plan's, before and after.

    ``family`` is empty but from a trained network: its networks from the largest to the smallest.
    """

    data: str
    seed: int
    budget: dict[str, str]
    regularized: str
    cost: dict[str, Change]
    arms: dict[str, Arm]
    iterations: list[IterationResult]
    seconds: float
    family: list[Member] = []
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__

    def to_json(self) -> bytes:
        """The file's bytes."""
        return readable_json(self)

    @classmethod
    def from_json(cls, data: bytes, path: str) -> "Result":
        """Read a result.

        Raises:
            FileError: the bytes are none, or name files that are not in the run's folder.
        """
        try:
            result = from_json(data, cls)
        except ValueError as error:
            raise FileError(f"{escape(path)}: is no result of a run ({error})") from None
        if not result.arms or any(member.name not in result.arms for member in result.family):
            raise FileError(f"{escape(path)}: names no networks; let the run make it again")
        for name in result.files:
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
                raise FileError(
                    f"{escape(path)}: names the file '{escape(name)}', which is not in the run's "
                    "folder; let the run make it again"
                )
        return result

    @property
    def files(self) -> list[str]:
        """The names of the files that it tells of."""
        made: list[IterationResult | Member] = [*self.iterations, *self.family]
        pairs = [(each.plan, each.model) for each in made]
        return [*(arm.file for arm in self.arms.values()), *chain.from_iterable(pairs)]
