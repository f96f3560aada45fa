"""Resized models are written as a file, or as a folder like the one that they come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from morphgraph.cli.console import note
from morphgraph.cli.models import naming
from morphgraph.cli.shared_options import check_output
from morphgraph.errors import FileError, ModelError, PlanError, UnsupportedError
from morphgraph.options import option
from morphgraph.words import escape

if TYPE_CHECKING:
    import onnx_ir as ir

    from morphgraph.folders.found import ModelFolder
    from morphgraph.graph import ChannelGraph
    from morphgraph.plans import Plan

Annotate = Annotated[
    bool,
    option("Label the nodes with their channel groups in the file's metadata, as Netron shows it."),
]


@dataclass(frozen=True)
class ResultFile:
    """A resized model that is to be written.

    Attributes:
        path: the file or folder.
        model: the file that it comes from.
        source: the folder that this one lies in, if it is one of a language model.
        overwrite: whether what exists may be replaced.
        folded: write a file for shipping.
        annotated: label the nodes with their groups.
    """

    path: Path
    model: Path
    source: "ModelFolder | None" = None
    overwrite: bool = False
    folded: bool = False
    annotated: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether a folder is written: the source is one, and the name is not that of a file."""
        return self.source is not None and self.path.suffix != ".onnx"

    def check(self, *inputs: Path) -> None:
        """Refuse where to write before any work is done for it.

        Raises:
            FileError: it exists already (without ``overwrite``), is an input, or has no folder.
        """
        from morphgraph.folders.write import check_folder

        if self.source is not None and self.source.parts and not self.is_folder:
            raise FileError(
                f"{escape(str(self.path))}: is one file, and the model is several; give a folder"
            )
        if self.source is not None and self.is_folder:
            check_folder(self.path, self.overwrite, self.source)
        else:
            check_output(self.path, self.overwrite, self.model, *inputs)

    def save(self, graph: "ChannelGraph", plan: "Plan", small: "ir.Model") -> None:
        """Write a resized model; it says where it comes from."""
        from morphgraph.folders.write import write_folder
        from morphgraph.workflow import save

        with naming(self.model):
            _name_file(small, self.model)
            if self.annotated:
                _label(small, graph)
        # What cannot be written is a file of its own, which such an error names.
        with naming(self.model, (ModelError, PlanError, UnsupportedError)):
            if self.source is not None and self.is_folder:
                write_folder(
                    graph, plan, small, self.source, self.path, self.overwrite, folded=self.folded
                )
            else:
                save(small, self.path, self.overwrite, folded=self.folded)

    def tell(self) -> None:
        """Say that it is written."""
        note(f"wrote {escape(str(self.path))}")


def _name_file(small: "ir.Model", model: Path) -> None:
    from msgspec import structs

    from morphgraph.origin import Origin
    from morphgraph.report.analysis import file_sha256

    origin = Origin.read(small)
    if origin is not None:
        structs.replace(origin, base_file=file_sha256(model)).write(small)


def _label(small: "ir.Model", graph: "ChannelGraph") -> None:
    """Label the nodes of a resized model with its own groups."""
    from morphgraph.labels import label
    from morphgraph.passes.lift import lift

    label(small, lift(small, **graph.options.arguments()))
