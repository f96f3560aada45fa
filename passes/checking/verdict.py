"""What a check says: the errors of all that was compared, and what follows from them."""

from dataclasses import dataclass

from morphgraph.errors import VerificationError, warn
from morphgraph.onnx_io import escape
from morphgraph.passes.checking.compare import OutputError
from morphgraph.passes.checking.stepwise import ValuesReport


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The verdict, and what it follows from.

    Attributes:
        outputs: the errors of all outputs, from end to end.
        tolerance: the largest error, as a share of an output's scale, that is rounding for sure.
        by: what ran the models.
        values: the errors of the values inside, node by node, where one is off or the outputs alone
            do not tell: they are further off, hardly moved by masking, or not numbers; ``None``
            where all agree, or where the models cannot be taken apart.
    """

    outputs: tuple[OutputError, ...]
    tolerance: float
    by: str = "ONNX Runtime"
    values: ValuesReport | None = None

    @property
    def ok(self) -> bool:
        """Whether the resized model is right.

        From end to end rounding may grow to anything where a network quantizes or sorts. So where
        each value inside is what the masked original computes from the same operands, the whole is
        right; where one is not, it is wrong, though no output may show it.
        """
        if self.values is not None:
            return self.values.worst.relative <= self.tolerance
        return all(output.relative <= self.tolerance for output in self.outputs)

    @property
    def worst(self) -> OutputError:
        """The output that is furthest off."""
        return max(self.outputs, key=lambda output: output.relative)

    @property
    def sensitivity(self) -> float:
        """The largest change that the removal made to anything compared, a share of its scale."""
        inside = 0.0 if self.values is None else self.values.sensitivity
        return max(inside, *(output.sensitivity for output in self.outputs))

    @property
    def untold(self) -> tuple[str, ...]:
        """Names of outputs and values that were no finite numbers in the masked original."""
        outputs = (output.name for output in self.outputs if not output.told)
        return tuple(dict.fromkeys([*outputs, *(self.values.untold if self.values else ())]))

    @property
    def felt(self) -> float:
        """The former name of ``sensitivity``, for one version."""
        warn("VerifyReport.felt is now sensitivity", DeprecationWarning)
        return self.sensitivity

    def require(self) -> None:
        """Do nothing if all is right.

        Raises:
            VerificationError: some output or value is off.
        """
        if self.ok:
            return
        worst = self.worst
        what = f"output '{escape(worst.name)}'"
        if worst.relative <= self.tolerance and self.values is not None:
            worst = self.values.worst
            what = f"value '{escape(worst.name)}', computed from the same operands,"
        off = f"{what} is off by {worst.relative:.3g} of its scale (tolerance {self.tolerance:g}"
        if self.values is None and worst.floor is not None and worst.relative <= 2 * worst.floor:
            raise VerificationError(
                f"{off}; rounding alone moves it by {worst.floor:.3g}): the inputs do not tell "
                "whether the resized model is right; give others with --inputs (inputs=...)"
            )
        raise VerificationError(
            f"{off}): the resized model is not the masked original; do not use it, and please "
            "report the model's structure"
        )
