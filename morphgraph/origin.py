"""Where a resized model comes from, as its file says: shown by Netron, by ``onnx``, by ``analyze``.

    morphgraph.version   the release of this program that made it
    morphgraph.base      the structure of the network that was resized, as in its plan (SHA-256)
    morphgraph.plan      the plan's file, as ``sha256sum plan.json`` tells it
    morphgraph.budget    what the result was allowed to cost, as JSON
    morphgraph.cost      what it costs: before and after, as JSON
    morphgraph.check     the comparison with the masked original, as JSON; ``not made``
    morphgraph.error     of a refit: the error of every output on inputs held out, as JSON
    morphgraph.base_file the file of that network, as ``sha256sum base.onnx`` tells it
    morphgraph.fixed     inputs that it does not take any more, and their values, as JSON
    morphgraph.earlier   of a model that was resized before: how, from the first time on, as JSON

Nothing depends on these notes: in a
file from a stranger they are words, and what is none of ours is passed over.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import onnx_ir as ir

from morphgraph.graph import ChannelGraph
from morphgraph.labels import unlabel
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.fixed import fixed_values, fixed_words
from morphgraph.onnx_io.keys import ORIGIN_KEYS
from morphgraph.passes.checking.verdict import VerifyReport
from morphgraph.plans import Change, Plan, structure_hash
from morphgraph.version import __version__

_VERSION, _BASE, _PLAN, _BUDGET, _COST, _CHECK, _ERROR, _BASE_FILE, _EARLIER = ORIGIN_KEYS
KEYS = ORIGIN_KEYS
"""In ``Model.metadata_props``."""

_NOT_MADE = "not made"
_ASKED = ("budget", "slice", "morph")  # where a plan's request has the budget
_LONGEST = 2**16  # characters of a note; longer ones are none of ours
_MOST = 16  # earlier resizes that are remembered
_Value = TypeVar("_Value")


class Check(msgspec.Struct, frozen=True):
    """A comparison with the masked original.

    ``error`` is the largest difference, and ``tolerance`` what is rounding for sure, as shares of
    an output's scale; ``sensitivity`` how far masking moved the original.
    """

    ok: bool
    by: str
    error: float
    tolerance: float
    sensitivity: float

    @classmethod
    def of(cls, report: VerifyReport) -> "Check":
        """The verdict of a report; two digits say all that is known of an error."""
        inside = 0.0 if report.values is None else report.values.worst.relative
        error = report.worst.relative if report.values is None else inside
        return cls(report.ok, report.by, _two(error), report.tolerance, _two(report.sensitivity))


class Resize(msgspec.Struct, frozen=True):
    """What is remembered of a resize when another one follows: the same as of an :class:`Origin`.

    ``fitted`` says whether its kernels were.
    """

    version: str
    base: str
    plan: str
    budget: dict[str, str]
    cost: dict[str, Change]
    fitted: bool

    def line(self) -> str:
        """The same for people."""
        parts = [f"morphgraph {escape(self.version)}, plan {escape(self.plan[:12])}"]
        parts += [f"budget {_budget_text(self.budget)}"] if self.budget else []
        parts += [f"left {shares}"] if (shares := _shares_text(self.cost)) else []
        return "; ".join(parts)


class Origin(msgspec.Struct, frozen=True):
    """What a resized model's file says of how it was made.

    ``base`` and ``plan`` are hashes, see the module; ``check`` is ``None`` where none was made,
    ``error`` empty where nothing was refitted, ``base_file`` where no file is known. ``earlier``
    are the resizes that led to the base, if it is itself the result of some, and ``fixed`` the
    values of inputs that the network holds for.
    """

    version: str
    base: str
    plan: str
    budget: dict[str, str]
    cost: dict[str, Change]
    check: Check | None
    error: dict[str, float] = {}
    base_file: str = ""
    earlier: list[Resize] = []
    fixed: dict[str, Any] = {}

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        plan: Plan,
        report: VerifyReport | None,
        error: Mapping[str, float] | None = None,
    ) -> "Origin":
        """What there is to say of the result of a plan."""
        asked = next((plan.request[key] for key in _ASKED if key in plan.request), None)
        before = cls.read(graph.model)
        return cls(
            version=__version__,
            base=structure_hash(graph),
            plan=hashlib.sha256(plan.to_json()).hexdigest(),
            budget={str(k): str(v) for k, v in asked.items()} if isinstance(asked, dict) else {},
            cost=dict(plan.cost),
            check=None if report is None else Check.of(report),
            error={name: _two(value) for name, value in (error or {}).items()},
            earlier=[] if before is None else [*before.earlier, before.resize()][-_MOST:],
            fixed=fixed_values(graph.model),
        )

    @classmethod
    def read(cls, model: ir.Model) -> "Origin | None":
        """What a model says of where it comes from; ``None`` where it does not.

        >>> Origin.read(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)) is None
        True
        """
        notes = {key: note for key, note in model.metadata_props.items() if len(note) < _LONGEST}
        if any(key not in notes for key in (_VERSION, _BASE, _PLAN)):
            return None
        return cls(
            notes[_VERSION],
            notes[_BASE],
            notes[_PLAN],
            _decoded(notes.get(_BUDGET), dict[str, str]) or {},
            _decoded(notes.get(_COST), dict[str, Change]) or {},
            _decoded(notes.get(_CHECK), Check),
            _decoded(notes.get(_ERROR), dict[str, float]) or {},
            notes.get(_BASE_FILE, ""),
            _decoded(notes.get(_EARLIER), list[Resize]) or [],
            fixed_values(model),
        )

    def resize(self) -> Resize:
        """What is remembered of it."""
        fitted = bool(self.error)
        return Resize(self.version, self.base, self.plan, self.budget, self.cost, fitted)

    def lines(self) -> list[tuple[str, str]]:
        """The same for people: what of, and a line each."""
        found = [
            ("resized by", f"morphgraph {escape(self.version)}, plan {escape(self.plan[:12])}")
        ]
        if self.fixed:
            found.append(("holds for", fixed_text(self.fixed)))
        if self.budget:
            found.append(("budget was", _budget_text(self.budget)))
        if shares := _shares_text(self.cost):
            found.append(("cost left", shares))
        found.append(("check was", self._verdict()))
        if self.error:
            errors = (f"{escape(name)} {100 * value:.2g} %" for name, value in self.error.items())
            found.append(("refitted", f"error on inputs held out: {', '.join(errors)}"))
        found += [("before that", each.line()) for each in reversed(self.earlier)]
        return found

    def _verdict(self) -> str:
        if self.check is None:
            return _NOT_MADE
        verdict = "passed" if self.check.ok else "FAILED"
        return (
            f"{verdict} in {escape(self.check.by)}: off by {self.check.error:.2g} of its scale at "
            f"most (tolerance {self.check.tolerance:g})"
        )

    def write(self, model: ir.Model) -> None:
        """Note it in a model that is being made, instead of what stands there, labels included."""
        unlabel(model)
        for key in KEYS:
            model.metadata_props.pop(key, None)
        model.metadata_props.update(self._notes())

    def _notes(self) -> dict[str, str]:
        notes = {_VERSION: self.version, _BASE: self.base, _PLAN: self.plan}
        if self.budget:
            notes[_BUDGET] = _encoded(self.budget)
        if self.cost:
            notes[_COST] = _encoded(self.cost)
        notes[_CHECK] = _NOT_MADE if self.check is None else _encoded(self.check)
        if self.error:
            notes[_ERROR] = _encoded(self.error)
        if self.base_file:
            notes[_BASE_FILE] = self.base_file
        if self.earlier:
            notes[_EARLIER] = _encoded(self.earlier)
        return notes


def fixed_text(fixed: Mapping[str, Any]) -> str:
    """The values of inputs that a network holds for, and does not take."""
    return escape(", ".join(fixed_words(fixed)))


def _budget_text(budget: Mapping[str, str]) -> str:
    return escape(", ".join(f"{kind}={amount}" for kind, amount in budget.items()))


def _shares_text(cost: Mapping[str, Change]) -> str:
    """What is left of every cost."""
    return ", ".join(
        f"{escape(kind)} {100 * change.after / change.before:.1f} %"
        for kind, change in cost.items()
        if change.before
    )


def _encoded(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _decoded(note: str | None, kind: type[_Value]) -> _Value | None:
    try:
        return None if note is None else msgspec.json.decode(note, type=kind)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None


def _two(value: float) -> float:
    """Two digits of a number; JSON has no infinite ones.

    >>> _two(1.2345e-7), _two(float("inf"))
    (1.2e-07, 1e+300)
    """
    return float(f"{value:.1e}") if math.isfinite(value) else 1e300
