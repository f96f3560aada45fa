"""What was found about one network, as data; errors are shares of an output's scale."""

import math
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 1e-5
FELT = 1e-2
BUDGET = 0.50
SLACK = 0.05  # a plan lands at most this share below its budget
UNSHRUNK = 0.99  # a plan that frees less has shrunk nothing


@dataclass
class Findings:
    """One row; ``crashes`` holds the error of every stage that did not end well."""

    name: str
    family: str
    route: str = ""
    export_note: str = ""
    structure_only: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)
    nodes: int = 0
    rounding: float = math.nan
    export_error: float = math.nan
    macs: float = math.nan
    torch_macs: float = math.nan
    params: float = math.nan
    groups: int = 0
    resizable: int = 0
    statistical: int = 0
    shrinkable: float = math.nan
    lowest: float = math.nan
    binding: dict[str, float] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)
    opaque: dict[str, int] = field(default_factory=dict)
    target: float = math.nan
    ratio: float = math.nan
    coarsest: str = ""
    recounted: float = math.nan
    error: float = math.nan
    felt: float = math.nan
    planted: int = 0
    passed_wrongly: list[str] = field(default_factory=list)
    torch_errors: dict[str, float] = field(default_factory=dict)
    in_float64: list[str] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)
    crashes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Findings":
        """Of a stored row."""
        return cls(**data)

    @property
    def exported(self) -> bool:
        """Whether there is an ONNX model that computes what the network computes."""
        return bool(self.route) and (self.structure_only or self.export_error <= TOLERANCE)

    @property
    def lifted(self) -> bool:
        """Whether morphgraph could read the model."""
        return self.groups > 0 and "lift" not in self.crashes

    @property
    def resized(self) -> bool:
        """Whether it was resized, by as much as was asked, and is equal to the masked original."""
        if self.structure_only:
            return self.lifted and "resize" not in self.crashes and not self.unshrunk
        exact = self.error <= TOLERANCE and self.felt > FELT and self.recounted == self.ratio
        return exact and self.on_target

    @property
    def on_target(self) -> bool:
        """Whether the plan landed on its budget or close below."""
        return self.target - SLACK <= self.ratio <= self.target * (1 + 1e-9)

    @property
    def wrong(self) -> bool:
        """Whether a result was handed out that is not what it should be."""
        return self.error > TOLERANCE or bool(self.passed_wrongly)

    @property
    def unshrunk(self) -> bool:
        """Whether nothing got smaller and no reason says why."""
        bound = self.lowest > UNSHRUNK and self.binding
        return self.lifted and self.ratio > UNSHRUNK and not bound

    @property
    def returns(self) -> bool:
        """Whether the base model and the resized one load into PyTorch unchanged."""
        errors = self.torch_errors
        return len(errors) == 2 and all(error <= TOLERANCE for error in errors.values())

    @property
    def trainable(self) -> bool:
        """Whether every parameter of both gets a gradient."""
        return len(self.torch_errors) == 2 and not self.without_gradient

    @property
    def holds(self) -> bool:
        """Whether everything was reached that can be; what binds a network may still be said."""
        done = self.exported and self.lifted and self.resized and not self.wrong
        loads = self.structure_only or (self.returns and self.trainable)
        return done and loads and not self.unshrunk and not self.crashes

    @property
    def shortfalls(self) -> list[str]:
        """What falls short, and why, in words; empty where all is as wanted."""
        words = [f"{stage}: {error}" for stage, error in self.crashes.items()]
        if self.export_error > TOLERANCE:
            words.append(f"the export is off by {self.export_error:.1e}{self._of_rounding}")
        if self.export_note:
            words.append(self.export_note)
        if not math.isnan(self.torch_macs) and self.macs != self.torch_macs:
            words.append(f"{self.macs:.0f} MACs, torch counts {self.torch_macs:.0f}")
        if self.opaque:
            words.append("opaque: " + ", ".join(f"{op} ({n})" for op, n in self.opaque.items()))
        if self.lowest > BUDGET:
            words.append(f"cannot be planned at {BUDGET:.0%}: {self.bound_by}")
        if self.unshrunk:
            words.append("nothing shrank")
        elif not math.isnan(self.ratio) and not self.on_target:
            words.append(
                f"the plan for {self.target:.1%} lands at {self.ratio:.1%}: {self.coarsest}"
            )
        if self.error > TOLERANCE:
            words.append(f"resized is off by {self.error:.1e}{self._of_rounding}")
        if self.ratio <= UNSHRUNK and not math.isnan(self.felt) and not self.felt > FELT:
            words.append(f"the removal is felt only {self.felt:.1e}")
        if not math.isnan(self.recounted) and self.recounted != self.ratio:
            words.append(f"the plan says {self.ratio:.4%} of the FLOPs, it is {self.recounted:.4%}")
        if self.passed_wrongly:
            words.append("planted and not rejected: " + ", ".join(self.passed_wrongly[:3]))
        words += [
            f"to_torch of the {which} is off by {error:.1e}{self._of_rounding}"
            for which, error in self.torch_errors.items()
            if not error <= TOLERANCE
        ]
        if self.without_gradient:
            words.append(
                f"no gradient for {len(self.without_gradient)}: "
                + ", ".join(self.without_gradient[:3])
            )
        return words

    @property
    def _of_rounding(self) -> str:
        """What float32 costs this network in PyTorch alone, as a clause."""
        if math.isnan(self.rounding):
            return ""
        return f" (PyTorch in float32 is off from float64 by {self.rounding:.1e})"

    @property
    def bound_by(self) -> str:
        """What keeps its size, with its share of the MACs, the heaviest first."""
        heaviest = sorted(self.binding.items(), key=lambda item: -item[1])
        return "; ".join(f"{share:.0%} {reason}" for reason, share in heaviest[:4])
