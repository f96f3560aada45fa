"""Resized models are written as a file, or as a folder like the one that they come from."""

from pathlib import Path
from typing import TYPE_CHECKING

from morphgraph.cli.shared_options import check_output

if TYPE_CHECKING:
    import onnx_ir as ir

    from morphgraph.folders.found import ModelFolder
    from morphgraph.graph import ChannelGraph
    from morphgraph.plans import Plan


def _is_folder(output: Path, source: "ModelFolder | None") -> bool:
    """Whether a folder is to be written: the source is one, and the name is not that of a file."""
    return source is not None and output.suffix != ".onnx"


def check_result(
    output: Path, overwrite: bool, source: "ModelFolder | None", *inputs: Path
) -> None:
    """Refuse where to write before any work is done for it.

    Raises:
        FileError: it exists already (without ``overwrite``), is an input, or has no folder.
    """
    from morphgraph.folders.write import check_folder

    if source is not None and _is_folder(output, source):
        check_folder(output, overwrite, source)
    else:
        check_output(output, overwrite, *inputs)


def save_result(
    graph: "ChannelGraph",
    plan: "Plan",
    small: "ir.Model",
    source: "ModelFolder | None",
    output: Path,
    overwrite: bool,
    folded: bool,
) -> None:
    """Write a resized model to a file, or to a folder like its source."""
    from morphgraph.folders.write import write_folder
    from morphgraph.workflow import save

    if source is not None and _is_folder(output, source):
        write_folder(graph, plan, small, source, output, overwrite, folded=folded)
    else:
        save(small, output, overwrite, folded=folded)
