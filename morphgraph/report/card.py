"""A model card: Markdown behind a YAML header, as Hugging Face's hub reads it.

The header is written as YAML in its JSON form, so that no name in it can end a line or a value.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, static_shape
from morphgraph.onnx_io.fixed import Fixed, fixed_words
from morphgraph.origin import Origin, Resize
from morphgraph.passes.analysis.cost import cost, is_known_here
from morphgraph.plans import Change
from morphgraph.recipes.results import Result
from morphgraph.report.machine import package_version
from morphgraph.report.pages.runs import chosen_arm
from morphgraph.report.runs import arms_table
from morphgraph.report.tables import Cell, Report, Table, columns, number_column, render, share
from morphgraph.words import file_word

_TAGS = ("onnx", "onnxruntime", "pruning", "structured-pruning", "model-compression", "morphgraph")
_PACKAGES = ("onnx", "onnxruntime", "torch", "numpy")


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        name: of the model.
        file: of the model, as a user of the card finds it.
        method: how the network was made smaller, a sentence.
        origin: what the file says of where it comes from.
        inputs: name and shape of every input.
        base: the original, as the hub or its author names it.
        data: what it was trained on.
        accuracy: on the test data, 0 to 1.
        commands: that lead here.
        tables: further ones, each with its title.
    """

    name: str
    file: str
    method: str
    origin: Origin
    inputs: Sequence[tuple[str, Sequence[str]]]
    base: str = ""
    data: str = ""
    accuracy: float | None = None
    commands: Sequence[str] = ()
    tables: Sequence[Table] = field(default=())

    def header(self) -> dict[str, Any]:
        """What the hub reads of the card."""
        found: dict[str, Any] = {"library_name": "onnx", "tags": list(_TAGS)}
        if self.base:
            found |= {"base_model": self.base, "base_model_relation": "finetune"}
        found["morphgraph"] = self._facts()
        if self.accuracy is not None:
            dataset = {"name": self.data, "type": self.data}
            metric = {"type": "accuracy", "name": "test accuracy", "value": round(self.accuracy, 4)}
            task = {"type": "image-classification"}
            result = {"task": task, "dataset": dataset, "metrics": [metric]}
            found["model-index"] = [{"name": self.name, "results": [result]}]
        return found

    def _facts(self) -> dict[str, Any]:
        origin = self.origin
        return {
            "version": origin.version,
            "method": self.method,
            "budget": origin.budget,
            "cost": {k: {"before": c.before, "after": c.after} for k, c in origin.cost.items()},
            "plan_sha256": origin.plan,
            "base_structure_sha256": origin.base,
            **({"base_file_sha256": origin.base_file} if origin.base_file else {}),
            "check": "not made" if origin.check is None else ("ok" if origin.check.ok else "wrong"),
            **({"fixed": origin.fixed} if origin.fixed else {}),
            **({"earlier": [_past(each) for each in origin.earlier]} if origin.earlier else {}),
        }

    def text(self) -> str:
        """The card; the same facts give the same text."""
        header = "".join(f"{key}: {_yaml(value)}\n" for key, value in self.header().items())
        costs = [_costs(self.origin.cost, "Costs before and after")]
        earlier = list(enumerate(self.origin.earlier, 1))
        costs += [_costs(each.cost, f"Before that, resize {n}") for n, each in reversed(earlier)]
        lines = [(title, line) for title, line in self.origin.lines() if title != "cost left"]
        how = [("method", self.method), *lines]
        how += [("data", self.data)] if self.data else []
        body = render(Report(None, [*costs, *self.tables], how), "md")
        return f"---\n{header}---\n\n# {_title(self.name)}\n\n{body}\n{self._use()}{self._made()}"

    def _use(self) -> str:
        feeds = ", ".join(f"{json.dumps(escape(name))}: ..." for name, _ in self.inputs)
        shapes = ", ".join(
            f"`{_code(name)}` {' x '.join(_code(size) for size in shape)}"
            for name, shape in self.inputs
        )
        return (
            "### Use\n\n"
            f"Inputs: {shapes}.\n\n"
            "```python\nimport onnxruntime\n\n"
            f"session = onnxruntime.InferenceSession({json.dumps(escape(self.file))})\n"
            f"outputs = session.run(None, {{{feeds}}})\n```\n\n"
        )

    def _made(self) -> str:
        versions = [f"{n} {v}" for n in _PACKAGES if (v := package_version(n)) is not None]
        made = "".join(f"{command}\n" for command in self.commands)
        block = f"```console\n{made}```\n\n" if made else ""
        return (
            f"### How it was made\n\n{block}With morphgraph {escape(self.origin.version)}; this "
            f"card with {', '.join(versions)}.\n"
        )


def _costs(costs: Mapping[str, Change], title: str) -> Table:
    rows: list[list[Cell]] = [
        [kind, each.before, each.after, share(each.after / each.before)]
        for kind, each in costs.items()
        if each.before
    ]
    return Table(
        columns("cost", number_column("before"), number_column("after"), "left"), rows, title
    )


def _past(resize: Resize) -> dict[str, Any]:
    """An earlier resize in the header."""
    return {
        "budget": resize.budget,
        "cost": {k: {"before": c.before, "after": c.after} for k, c in resize.cost.items()},
        "plan_sha256": resize.plan,
    }


def resized_card(
    graph: ChannelGraph,
    name: str,
    file: str,
    base: str,
    commands: Sequence[str],
    folder: str | None = None,
) -> Card:
    """The card of a resized model.

    Args:
        graph: the model, lifted.
        name: of the model.
        file: of the model.
        base: the original, as the hub names it; empty if nobody says.
        commands: that lead here.
        folder: of the model, where it is one of a folder.

    Raises:
        UnsupportedError: the file does not say where it comes from.
    """
    origin = _origin(graph, file)
    method = "structured pruning: channels were removed by a plan, and the weights kept"
    if origin.error:
        method = (
            "structured pruning without training: channels were chosen by calibration inputs, and "
            "the kernels that are left fitted to what the original computes"
        )
    shown = commands or origin_commands(origin, file, folder)
    return Card(name, file, method, origin, _inputs(graph), base, commands=list(map(escape, shown)))


def run_card(
    graph: ChannelGraph, result: Result, name: str, base: str, commands: Sequence[str]
) -> Card:
    """The card of a run's network; the arguments are those of :func:`resized_card`."""
    chosen = chosen_arm(result)
    arm = result.arms[chosen]
    method = (
        "structure learning: training with a cost-weighted sparsity penalty chose the channels "
        "(MorphNet, Gordon et al. 2018), widths were scaled to the budget, the result was trained"
    )
    if result.family:
        method = "structured pruning of a trained network, fine-tuned with it as a teacher"
    costs = dict(result.family[-1].cost if result.family else result.cost)
    costs |= _counted(graph, result)
    origin = _origin(graph, arm.file, costs, budget_of(result))
    return Card(
        name,
        arm.file,
        method,
        origin,
        _inputs(graph),
        base,
        data=result.data,
        accuracy=arm.accuracy,
        commands=commands,
        tables=[_named(arms_table(result))],
    )


def budget_of(result: Result) -> Mapping[str, str]:
    """The budget of the network that a card of a run is about."""
    return result.family[-1].budget if result.family else result.budget


def run_command(result: Result, fixed: Fixed) -> str:
    """The command of a run, as far as its result tells.

    Args:
        result: of the run.
        fixed: values that inputs of its model were fixed to.
    """
    words = [f"morphgraph morph MODEL{_fix_words(fixed)} --data {_word(escape(result.data))}"]
    if result.family:
        words.append("--from-trained" + (" --elastic" if "elastic" in result.arms else ""))
    words.append(_family_words(result) or _budget_words(budget_of(result)))
    return " ".join([*words, f"--seed {result.seed} -o RUN"])


def _family_words(result: Result) -> str:
    """The budgets of several networks, which are on one cost; empty where there is one."""
    budgets = [member.budget for member in result.family]
    if len(budgets) < 2 or any(len(budget) != 1 for budget in budgets):
        return ""
    (kind,) = budgets[0]
    amounts = ",".join(amount for budget in budgets for amount in budget.values())
    counted = "" if kind == "flops" else f" --cost {shlex.quote(kind)}"
    return f"--budgets {shlex.quote(amounts)}{counted}"


def _fix_words(fixed: Fixed) -> str:
    return "".join(f" --fix {shlex.quote(escape(word))}" for word in fixed_words(fixed))


def origin_commands(origin: Origin, file: str, folder: str | None = None) -> list[str]:
    """The commands that make such a file, as far as it tells; BASE and DATA are not known.

    Args:
        origin: of the file.
        file: its name.
        folder: the name of its folder, where the folder was resized as a whole.
    """
    ending = ".onnx" if folder is None else ""
    steps = [*origin.earlier, origin.resize()]
    numbers = [""] if len(steps) == 1 else [f"-{number}" for number in range(1, len(steps) + 1)]
    made = [f"step{number}{ending}" for number in numbers[:-1]] + [folder or file]
    found: list[str] = []
    for base, step, number, output in zip(
        [f"BASE{ending}", *made], steps, numbers, made, strict=False
    ):
        asked, written = _budget_words(step.budget) or "--set ...", f"-o {_word(output)}"
        first = _fix_words(origin.fixed) if step is steps[0] else ""  # a plan remembers it
        if step.fitted:
            found.append(f"morphgraph shrink {base}{first} --data DATA {asked} {written}")
        else:
            found.append(f"morphgraph plan {base}{first} {asked} -o plan{number}.json")
            found.append(f"morphgraph apply {base} plan{number}.json {written}")
    return found


def _word(path: str) -> str:
    """A file's name in a command that a person may paste."""
    return shlex.quote(file_word(path))


def _budget_words(budget: Mapping[str, str]) -> str:
    words: list[str] = []
    for kind, amount in budget.items():
        name, _, device = kind.partition("@")
        if is_known_here(kind):
            words.append(f"--budget {shlex.quote(f'{kind}={amount}')}")
        else:  # of a measured device a command is given the file
            file = _word(f"{device}.json")
            words.append(f"--budget {shlex.quote(f'{name}={amount}')} --device {file}")
    return " ".join(words)


def _counted(graph: ChannelGraph, result: Result) -> dict[str, Change]:
    base = next(iter(result.arms.values()))
    before = {"macs": base.macs, "params": base.params}
    return {kind: Change(number, cost(graph, kind).total) for kind, number in before.items()}


def _origin(
    graph: ChannelGraph,
    file: str,
    costs: Mapping[str, Change] | None = None,
    budget: Mapping[str, str] | None = None,
) -> Origin:
    from msgspec import structs

    origin = Origin.read(graph.model)
    if origin is None:
        raise UnsupportedError(
            f"{escape(file)}: does not say where it comes from; give a file that `apply`, `shrink` "
            "or `morph` of this version has written, or the folder of a run"
        )
    return structs.replace(
        origin, cost=dict(costs or origin.cost), budget=dict(budget or origin.budget)
    )


def _inputs(graph: ChannelGraph) -> list[tuple[str, Sequence[str]]]:
    return [
        (value.name or "", list(map(str, value.shape or static_shape(value))))
        for value in graph.model.graph.inputs
    ]


def _named(table: Table) -> Table:
    return Table(table.columns, table.rows, "Networks of the run")


def _title(name: str) -> str:
    return "".join("\\" + char if char in "\\`*_{}[]<>|#" else char for char in escape(name))


def _code(text: str) -> str:
    return escape(text).replace("`", "'")


def _yaml(value: object) -> str:
    """A value in the form that JSON and YAML have in common."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(str(k))}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    text = escape(value) if isinstance(value, str) else value
    return json.dumps(text, ensure_ascii=False)
