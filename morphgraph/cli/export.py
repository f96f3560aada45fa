"""``morphgraph export``: a PyTorch network becomes an ONNX file that can still be trained."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from morphgraph.cli.command import command
from morphgraph.cli.console import note, step, suggest
from morphgraph.cli.following import lifting_words, tell_intention
from morphgraph.cli.models import Lifting
from morphgraph.cli.shared_options import (
    DryRun,
    Ops,
    Overwrite,
    Seed,
    check_output,
    output_file,
    shape,
)
from morphgraph.errors import UnsupportedError
from morphgraph.options import option
from morphgraph.words import did_you_mean, escape

if TYPE_CHECKING:
    import torch
    from torch import nn

Input = tuple[str | None, tuple[int, ...], str]
"""Name, shape, and the name of a type of torch's."""

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


def _input(text: str) -> Input:
    """Name, shape and type in ``[NAME=]1x3x224x224[:int64]``."""
    name, _, rest = text.rpartition("=")
    sizes, _, dtype = rest.partition(":")
    if dtype and dtype not in _DTYPES:
        hint = did_you_mean(dtype, _DTYPES)
        raise click.BadParameter(f"type '{dtype}' is not one of {', '.join(_DTYPES)}{hint}")
    return name or None, shape(sizes), dtype or "float32"


def _argument(text: str) -> tuple[str, Any]:
    """Name and value in ``name=value``; the value is a Python literal, or else text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise click.BadParameter(f"'{text}' is no argument; write widths=16,32")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name, value


@command
def export(
    factory: Annotated[str, option(metavar="MODULE:FACTORY")],
    *,
    arguments: Annotated[
        tuple[tuple[str, Any], ...],
        option(
            "A keyword argument of the factory: a Python literal, or text; may be repeated.",
            "-k",
            type=_argument,
            metavar="NAME=VALUE",
        ),
    ] = (),
    inputs: Annotated[
        tuple[Input, ...],
        option(
            "Shape of an input, if need be with name and type (float32 if not); once per input.",
            "--input",
            type=_input,
            metavar="[NAME=]1x3x224x224[:TYPE]",
        ),
    ],
    dynamic_batch: Annotated[bool, option("Leave the first size of every input open.")] = False,
    output: Annotated[Path, output_file("model.onnx")],
    seed: Seed = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    ops: Ops = (),
) -> None:
    """Export a PyTorch network to ONNX in trainable form.

    MODULE:FACTORY is anything that returns an nn.Module when it is called, such as
    torchvision.models:resnet18, or a function of your own in the present folder. BatchNorm stays as
    it is, and parameters keep their names.
    """
    named = [name for name, _, _ in inputs if name]
    if named and len(named) != len(inputs):
        raise click.UsageError("--input: name all inputs or none")
    check_output(output, overwrite)
    if dry_run:
        _find(factory)
        sizes = ", ".join("x".join(map(str, given)) for _, given, _ in inputs)
        steps = [f"call {factory}", f"export what it returns for inputs of {sizes}"]
        tell_intention("export", steps, [output], "table")
        return
    import torch

    from morphgraph.onnx_io import save
    from morphgraph.torch_io.export import export as export_network

    torch.manual_seed(seed)
    with step(f"building {factory}"):
        network = _build(_find(factory), factory, dict(arguments))
    example = tuple(_noise(sizes, dtype) for _, sizes, dtype in inputs)
    with step("exporting"):
        model = export_network(
            network, example, dynamic_batch=dynamic_batch, input_names=named or None
        )
    save(model, output, overwrite)
    note(f"wrote {escape(str(output))}")
    suggest("analyze", output, *lifting_words(Lifting(ops=ops)))


def _find(factory: str) -> Callable[..., Any]:
    """The callable that ``package.module:name`` names; the present folder is looked in as well."""
    module_name, _, path = factory.partition(":")
    if module_name.endswith(".py"):
        place = Path(module_name)
        raise click.UsageError(
            f"'{factory}' names a file, not a module; write {place.stem}:{path or 'factory'}, in "
            f"the folder '{place.parent}'"
        )
    if not module_name or not path:
        raise click.UsageError(f"'{factory}' names no factory; write package.module:factory")
    sys.path.insert(0, str(Path.cwd()))
    member: Any = None
    try:
        member = import_module(module_name)
        for part in path.split("."):
            member = getattr(member, part)
    except Exception as error:  # importing runs whatever the module says
        meant = ""
        if isinstance(error, AttributeError) and member is not None:
            meant = did_you_mean(str(error.name), dir(member))
        raise click.UsageError(f"{factory}: {type(error).__name__}: {error}{meant}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(member):
        raise click.UsageError(f"{factory}: is no callable but a {type(member).__name__}")
    function: Callable[..., Any] = member
    return function


def _build(factory: Callable[..., Any], name: str, arguments: dict[str, Any]) -> "nn.Module":
    from torch import nn

    try:
        network = factory(**arguments)
    except Exception as error:  # the user's own function may raise anything
        raise UnsupportedError(
            f"{escape(name)}: the factory raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UnsupportedError(
            f"{escape(name)}: returned a {type(network).__name__}, not a torch.nn.Module"
        )
    return network


def _noise(sizes: tuple[int, ...], name: str) -> "torch.Tensor":
    import torch

    dtype: torch.dtype = getattr(torch, name)
    if dtype.is_floating_point:
        return torch.randn(sizes).to(dtype)
    return torch.zeros(sizes, dtype=dtype)
