"""JSON Schemas of the files that programs read; those under ``docs/schema`` are made from these."""

import msgspec

from morphgraph.benchmark import BenchResult, BenchSweep
from morphgraph.device import DeviceProfile
from morphgraph.passes.planning.nested import Ranking
from morphgraph.plans import Plan, readable_json
from morphgraph.recipes.results import Result
from morphgraph.report.analysis import Analysis
from morphgraph.report.checks import CheckData
from morphgraph.report.device import DeviceSummary
from morphgraph.report.differences import Diff
from morphgraph.report.explanation import Explanation
from morphgraph.report.intention import Intention
from morphgraph.report.machine import Machine
from morphgraph.report.sensitivity import SensitivityReport
from morphgraph.report.shrinking import ShrinkReport

SCHEMAS: dict[str, type] = {
    "plan": Plan,
    "ranking": Ranking,
    "device": DeviceProfile,
    "result": Result,
    "analysis": Analysis,
    "explanation": Explanation,
    "sensitivity": SensitivityReport,
    "check": CheckData,
    "shrink": ShrinkReport,
    "diff": Diff,
    "bench": BenchResult,
    "bench-sweep": BenchSweep,
    "calibrate": DeviceSummary,
    "doctor": Machine,
    "dry-run": Intention,
}

_OF = {
    "plan": "plan.json; `plan` and `expand`",
    "ranking": "ranking.json of a family or an elastic network",
    "device": "device.json of `calibrate`, for --device",
    "result": "result.json of a run of `morph`; `morph`",
    "analysis": "`analyze`",
    "explanation": "`analyze --explain`",
    "sensitivity": "`plan --sensitivity`",
    "check": "`apply`, `verify` and `slice`",
    "shrink": "`shrink` and `apply --refit`",
    "diff": "`diff`",
    "bench": "`bench`",
    "bench-sweep": "`bench` at several threads or batches",
    "calibrate": "`calibrate`",
    "doctor": "`doctor`",
    "dry-run": "any command with --dry-run",
}


def of_what(name: str) -> str:
    """The files and commands that a schema describes.

    >>> of_what("diff")
    '`diff`'
    """
    return _OF[name]


_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(name: str) -> bytes:
    """One of :data:`SCHEMAS` as a JSON Schema file.

    >>> schema("plan").startswith(b'{')
    True
    """
    described = msgspec.json.schema(SCHEMAS[name])
    for definition in described["$defs"].values():
        definition["description"] = _first_paragraph(definition["description"])
        # Which version of the program wrote a file is no part of the format.
        definition.get("properties", {}).get("tool_version", {}).pop("default", None)
    return readable_json({"$schema": _DIALECT, **described})


def _first_paragraph(docstring: str) -> str:
    r"""The first paragraph in one line.

    >>> _first_paragraph("What it\nis.\n\nMore.")
    'What it is.'
    """
    return " ".join(docstring.split("\n\n")[0].split())
