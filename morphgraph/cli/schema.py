"""``morphgraph schema``: the published JSON Schemas, without a network."""

from typing import Annotated

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import emit
from morphgraph.options import option
from morphgraph.words import did_you_mean, escape


@command
def schema(
    name: Annotated[
        str | None, option(metavar="[NAME]", required=False, default=None, type=click.STRING)
    ] = None,
) -> None:
    """Print the JSON Schema of a file or of what a command prints as JSON.

    Without NAME: their names, and what each is of.
    """
    from morphgraph.report.schemas import SCHEMAS, of_what, schema as made

    if name is None:
        longest = max(map(len, SCHEMAS))
        emit("".join(f"{each:<{longest}}  {of_what(each)}\n" for each in SCHEMAS))
        return
    if name not in SCHEMAS:
        raise click.UsageError(
            f"no schema '{escape(name)}'{did_you_mean(name, SCHEMAS)}; there are "
            f"{', '.join(SCHEMAS)}"
        )
    emit(made(name).decode())
