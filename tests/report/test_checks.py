"""What is told of the check of a network with many outputs."""

import csv
import io
import json

import morphgraph as mg
from morphgraph.passes.checking.verify import verify
from morphgraph.report.checks import MOST_OUTPUTS, check_report
from morphgraph.report.tables import Format, render
from morphgraph.testing import model_from_text

OUTPUTS = 30
OUTS = [f"y{k}" for k in range(OUTPUTS)]
TEXT = f"""
net (float[2,4] x, float[4,8] w, float[8,3] v) => ({", ".join(f"float[2,3] {y}" for y in OUTS)}) {{
    h = MatMul(x, w)
    r = Relu(h)
    z = MatMul(r, v)
    {" ".join(f"{y} = Identity(z)" for y in OUTS)}
}}"""


def test_a_terminal_shows_the_worst_of_many_outputs() -> None:
    graph = mg.lift(model_from_text(TEXT, inputs=["x"]))
    plan = mg.plan(graph, {"params": "60%"}, round_to=1)
    checked = verify(graph, plan, mg.apply(graph, plan))
    report = check_report(graph, plan, checked)

    def shown(kind: Format) -> str:
        return render(report, kind)

    lines = shown("table").splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("y")]
    errors = {output.name: output.relative for output in checked.outputs}
    assert len(listed) == MOST_OUTPUTS
    assert min(errors[name] for name in listed) >= sorted(errors.values())[-MOST_OUTPUTS]
    assert f"and {OUTPUTS - MOST_OUTPUTS} more, which --format json lists" in lines
    assert len(json.loads(shown("json"))["outputs"]) == OUTPUTS
    assert len(list(csv.reader(io.StringIO(shown("csv"))))) == 1 + OUTPUTS
    assert sum(line.startswith("| y") for line in shown("md").splitlines()) == OUTPUTS
