"""The command line: one file per command, read only when that command runs.

Results go to stdout, everything else to stderr, one line each. The exit code is 0 (done), 1 (the
answer is no), 2 (usage), 3 (bad or unsupported model or plan), 4 (file system), 130 (interrupted).
"""

import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from morphgraph.cli.console import OutputSettings, complain, talking
from morphgraph.cli.later import import_later
from morphgraph.errors import INTERRUPTED, INTERRUPTED_CODE, FileError, MorphError
from morphgraph.version import __version__
from morphgraph.words import did_you_mean, escape, file_word

# Command (and module of this package, and function in it) -> its line in `morphgraph --help`.
COMMANDS = {
    "export": "Export a PyTorch network to ONNX in trainable form.",
    "analyze": "Show a model's channel groups, what they cost, and which can shrink.",
    "plan": "Decide which channels stay so that a model fits a budget.",
    "shrink": "Fit a model into a budget without training it, by calibration inputs.",
    "expand": "Multiply the widths of a plan by the largest factor that fits a budget.",
    "apply": "Resize a model by a plan, and check the result.",
    "verify": "Check that a resized model computes what the masked original computes.",
    "bench": "Time models side by side in ONNX Runtime, or in others.",
    "calibrate": "Measure what operators cost on this machine, so that latency becomes a cost.",
    "morph": "Learn a network's structure within a budget, and train it.",
    "slice": "Cut a smaller network out of an elastic one, for any budget, without training.",
    "sweep": "Draw trade-off curves: train a model at several budgets by several methods.",
    "report": "Show a run, a plan, or a resize as one HTML file.",
    "diff": "Show what changed between two models, layer by layer.",
    "card": "Write a model card of a run or of a resized model.",
    "doctor": "Show versions, CPU features and execution providers.",
    "schema": "Print the JSON Schema of a file or of what a command prints as JSON.",
    "completion": "Print the script by which a shell completes commands, options and files.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order in which a user meets them."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:  # a shell that completes hears nothing
                return None
            ctx.fail(_no_command(cmd_name))
        command = getattr(import_module(f"morphgraph.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="morphgraph")
def cli() -> None:
    """A compiler for network shapes.

    Reads ONNX files, finds the channels that live and die together, prices them, and writes the
    same network in another size. No command changes its input.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if none is given); returns the exit code.

    >>> main(["--version"])
    morphgraph, version ...
    0
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    settings = OutputSettings(arguments=tuple(given))
    import_later()
    with talking(settings):
        try:
            result = cli.main(
                given,
                prog_name="morphgraph",
                standalone_mode=False,
                obj=settings,
            )
            return result if isinstance(result, int) else 0
        except (click.Abort, KeyboardInterrupt):
            complain(_interrupted(settings))
            return INTERRUPTED_CODE
        except click.ClickException as error:
            return _usage(error)
        except Exception as error:  # a user gets one line, whatever happens
            if settings.debug:
                raise
            complain(settings.speaker + _describe(error))
            return _exit_code(error)


def _usage(error: click.ClickException) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return error.exit_code
    context = error.ctx if isinstance(error, click.UsageError) else None
    message = error.format_message().rstrip(".")
    if isinstance(error, click.MissingParameter) and context is not None:
        words = [context.command_path, *context.command.collect_usage_pieces(context)]
        message += f" of `{' '.join(words)}`"
    if isinstance(error, click.NoSuchOption):
        message = f"No such option '{escape(error.option_name)}'"
        if context is not None:
            message += did_you_mean(error.option_name, _options(context.command))
    complain(message + (f"; see `{context.command_path} --help`" if context else ""))
    return error.exit_code


def _no_command(name: str) -> str:
    """What to say of a word that stands where a command should."""
    if name.lower().endswith(".onnx") or os.path.isdir(name):  # noqa: PTH112 - imports nothing
        line = shlex.join(["morphgraph", "analyze", file_word(name)])
        return f"'{escape(name)}' is no command; write `{line}`"
    return f"No such command '{escape(name)}'{did_you_mean(name, COMMANDS)}"


def _options(command: click.Command) -> list[str]:
    """All long options of a command."""
    return [
        flag
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
        if flag.startswith("--")
    ]


def _interrupted(settings: OutputSettings) -> str:
    """What an interrupted user should know: what is there, and how to go on."""
    if settings.resuming is None:
        return INTERRUPTED
    return f"{INTERRUPTED}; go on with `{shlex.join(['morphgraph', *settings.resuming])}`"


def _describe(error: Exception) -> str:
    if isinstance(error, MorphError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return "out of memory; use a machine that has more, or a smaller model"
    return (
        f"unexpected {type(error).__name__}: {error}; this is a bug in morphgraph, please report "
        "it with what --debug shows"
    )


def _exit_code(error: Exception) -> int:
    if isinstance(error, MorphError):
        return error.exit_code
    return FileError.exit_code if isinstance(error, OSError) else MorphError.exit_code
