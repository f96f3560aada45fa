"""``morphgraph card``: a model card of a run or of a resized model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from morphgraph.cli.command import command
from morphgraph.cli.console import emit, note
from morphgraph.cli.following import tell_intention
from morphgraph.cli.models import Lifting, naming, open_graph
from morphgraph.cli.shared_options import DryRun, Overwrite, check_output
from morphgraph.options import option
from morphgraph.words import escape

if TYPE_CHECKING:
    from morphgraph.report.card import Card


@command
def card(
    subject: Annotated[Path, option(metavar="RUN|SLIM")],
    *,
    base_model: Annotated[
        str | None,
        option("The original, as Hugging Face's hub or its author names it.", metavar="OWNER/NAME"),
    ] = None,
    name: Annotated[
        str | None, option("The model's name; by default that of the file or folder.")
    ] = None,
    made_by: Annotated[
        tuple[str, ...],
        option("A command that led to the model, to be shown; may be repeated.", metavar="COMMAND"),
    ] = (),
    output: Annotated[
        Path | None, option("The file to write.", "-o", "--output", metavar="README.md")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    lifting: Lifting,
) -> None:
    """Write a model card of a run or of a resized model.

    Markdown with a YAML header, as Hugging Face's hub reads it: the original, method, budget, costs
    before and after, the check, accuracy where it is known, commands, versions. What is not known
    is left out. Without -o it is printed.
    """
    from morphgraph.onnx_io import write_atomically

    check_output(output, overwrite)
    made = _card(subject, base_model or "", name, made_by, lifting).text()
    if dry_run:
        steps = [f"{'print' if output is None else 'write'} a model card of {subject}"]
        tell_intention("card", steps, [output], "table")
        return
    if output is None:
        emit(made)
        return
    write_atomically(output, made, overwrite)
    note(f"wrote {escape(str(output))}")


def _card(
    subject: Path, base: str, name: str | None, commands: tuple[str, ...], lifting: Lifting
) -> "Card":
    from morphgraph.folders.found import folder_of, model_file
    from morphgraph.onnx_io.fixed import fixed_values
    from morphgraph.report.card import resized_card, run_card, run_command
    from morphgraph.report.pages.runs import chosen_arm, run_result

    if subject.is_dir() and folder_of(subject) is None:
        result = run_result(subject)
        graph = open_graph(subject / result.arms[chosen_arm(result)].file, lifting)
        shown = commands or (run_command(result, fixed_values(graph.model)),)
        with naming(subject):
            return run_card(graph, result, name or subject.resolve().name, base, shown)
    folder, file = folder_of(subject), model_file(subject)
    if folder is not None and not base:
        known = folder.configs.get("config.json", {}).get("_name_or_path")
        base = known if isinstance(known, str) else ""
    graph = open_graph(file, lifting)
    fallback = subject.resolve().name if subject.is_dir() else file.stem
    if not subject.is_dir():
        return resized_card(graph, name or fallback, file.name, base, commands)
    inside = file.relative_to(subject).as_posix()
    return resized_card(graph, name or fallback, inside, base, commands, subject.resolve().name)
