"""What was found about one ONNX file of others, as data; errors are shares of an output's scale."""

import math
from dataclasses import dataclass, field
from typing import Any

from findings import BUDGET, FELT, SLACK, TOLERANCE, UNSHRUNK

#: What tools were asked to do to a file before.
TREATED = ("extended", "static", "dynamic", "float16")
#: An error may be this many times what rounding alone does to the masked original.
OF_NOISE = 4.0
#: A file may be larger than its resized tensors by this share and by so many bytes.
SIZE_SLACK, SIZE_BYTES = 0.02, 2**16


@dataclass
class FileFindings:
    """One row; ``crashes`` holds the error of every stage that did not end well.

    Attributes:
        name: of the entry.
        family: ``cnn``, ``transformer``, ``recurrent`` or ``other``.
        source: the file, without the treatment.
        treatment: what was done to it before, in a word.
        producer: what wrote the file, as that says, with its opset.
        bytes: of the file, and of the resized one.
        ratio: MACs of the plan as a share.
        allowed: the file less what was cut from its own tensors, as a share of the file. What is
            stored twice, or was computed and is stored now, goes beyond.
        error: resized against masked original.
        noise: the masked original against itself, with inputs moved by rounding and optimized.
        felt: masked against original.
        accepted: whether ``mg.apply`` hands the result out; None where that was not reached.
        unexpected: how far the lifted model's outputs are from those of the file.
        not_run: what ONNX Runtime says where it does not run the file.
    """

    name: str
    family: str
    source: str = ""
    treatment: str = ""
    producer: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)
    bytes: list[int] = field(default_factory=list)
    nodes: int = 0
    opaque: dict[str, int] = field(default_factory=dict)
    macs: float = math.nan
    groups: int = 0
    resizable: int = 0
    shrinkable: float = math.nan
    lowest: float = math.nan
    binding: dict[str, float] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)
    target: float = math.nan
    ratio: float = math.nan
    allowed: float = math.nan
    coarsest: str = ""
    error: float = math.nan
    noise: float = math.nan
    felt: float = math.nan
    accepted: bool | None = None
    unexpected: float = math.nan
    not_run: str = ""
    crashes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "FileFindings":
        """Of a stored row."""
        return cls(**data)

    @property
    def unmade(self) -> bool:
        """Whether the other tool made no file that runs, so that there is nothing to judge."""
        return "treat" in self.crashes or (self.treatment in TREATED and bool(self.not_run))

    @property
    def lifted(self) -> bool:
        """Whether morphgraph could read the file."""
        return not self.unmade and "lift" not in self.crashes

    @property
    def nothing_to_shrink(self) -> bool:
        """Whether every group keeps its size for a reason, or there are no MACs."""
        return self.lifted and (self.lowest > UNSHRUNK or not self.macs > 0)

    @property
    def equal(self) -> bool:
        """Whether the resized file computes what the masked original computes."""
        return self.error <= max(TOLERANCE, OF_NOISE * self.noise)

    @property
    def wrong(self) -> bool:
        """Whether the resized file computes something else."""
        return self.error > max(TOLERANCE, OF_NOISE * self.noise)

    @property
    def larger(self) -> bool:
        """Whether the resized file is larger than its tensors allow."""
        if len(self.bytes) < 2:
            return False
        before, after = self.bytes
        return after > (self.allowed + SIZE_SLACK) * before + SIZE_BYTES

    @property
    def resized(self) -> bool:
        """Whether it was resized, as far as was asked, equal, and called so."""
        on_target = self.target - SLACK <= self.ratio <= self.target * (1 + 1e-9)
        return self.equal and on_target and self.accepted is True

    @property
    def holds(self) -> bool:
        """Whether all is as wanted, or another tool made nothing to judge."""
        if self.unmade:
            return True
        done = self.resized or (self.nothing_to_shrink and bool(self.binding or not self.macs > 0))
        return done and not self.larger and not self.crashes and not self.unexpected > TOLERANCE

    @property
    def shortfalls(self) -> list[str]:
        """What falls short, and why, in words; empty where all is as wanted."""
        if self.unmade:
            return []
        words = [f"{stage}: {error}" for stage, error in self.crashes.items()]
        if self.unexpected > TOLERANCE:
            words.append(f"the lifted model is off by {self.unexpected:.1e} from the file")
        if self.opaque:
            words.append("opaque: " + ", ".join(f"{op} ({n})" for op, n in self.opaque.items()))
        if self.lowest > BUDGET and not self.nothing_to_shrink:
            words.append(f"cannot be planned at {BUDGET:.0%}: {self.bound_by}")
        if self.ratio < self.target - SLACK:
            words.append(
                f"the plan for {self.target:.1%} lands at {self.ratio:.1%}: {self.coarsest}"
            )
        if self.wrong:
            words.append(f"resized is off by {self.error:.1e}, rounding does {self.noise:.1e}")
        if self.accepted is False and not self.wrong:
            words.append(f"apply calls it wrong, it is off by {self.error:.1e}")
        if self.accepted and self.wrong:
            words.append("apply calls it right")
        if self.ratio <= UNSHRUNK and not math.isnan(self.felt) and not self.felt > FELT:
            words.append(f"the removal is felt only {self.felt:.1e}")
        if self.larger:
            before, after = self.bytes
            words.append(
                f"{after / before:.0%} of the bytes for {self.ratio:.0%} of the MACs, where its "
                f"tensors allow {self.allowed:.0%}"
            )
        return words

    @property
    def bound_by(self) -> str:
        """What keeps its size, with its share of the MACs, the heaviest first."""
        heaviest = sorted(self.binding.items(), key=lambda item: -item[1])
        return "; ".join(f"{share:.0%} {reason}" for reason, share in heaviest[:4])


class DecoderFindings(FileFindings):
    """A file of a language model, of which other programs are the treatment."""
