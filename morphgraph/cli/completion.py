"""``morphgraph completion``: what a shell reads to complete commands, options and files."""

from typing import Annotated, Literal

import click
from click.shell_completion import get_completion_class

from morphgraph.cli.command import command
from morphgraph.cli.console import emit, note
from morphgraph.options import option

Shell = Literal["bash", "zsh", "fish"]

_VARIABLE = "_MORPHGRAPH_COMPLETE"  # by which the script asks this program
_SOURCED = {
    "bash": "echo 'eval \"$(morphgraph completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(morphgraph completion zsh)\"' >> ~/.zshrc",
    "fish": "morphgraph completion fish > ~/.config/fish/completions/morphgraph.fish",
}


@command
def completion(shell: Annotated[Shell, option(metavar="bash|zsh|fish")]) -> None:
    """Print the script by which a shell completes commands, options and files.

    For this shell alone: eval "$(morphgraph completion bash)". Bash must be 4.4 or newer.
    """
    made = get_completion_class(shell)
    assert made is not None
    program = click.get_current_context().find_root()
    source = made(program.command, {}, "morphgraph", _VARIABLE).source()
    emit(source.rstrip() + "\n")
    note(f"to have it in every shell: {_SOURCED[shell]}")
