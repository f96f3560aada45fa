"""JSON Schemas of the files that programs read; those under ``docs/schema`` are made from these."""

import msgspec

from morphgraph.benchmark import BenchResult, BenchSweep
from morphgraph.plans import Plan, readable_json
from morphgraph.report.analysis import Analysis
from morphgraph.report.differences import Diff
from morphgraph.report.explanation import Explanation
from morphgraph.report.sensitivity import SensitivityReport
from morphgraph.report.shrinking import ShrinkReport

SCHEMAS: dict[str, type] = {
    "plan": Plan,
    "analysis": Analysis,
    "diff": Diff,
    "explanation": Explanation,
    "sensitivity": SensitivityReport,
    "shrink": ShrinkReport,
    "bench": BenchResult,
    "bench-sweep": BenchSweep,
}

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
