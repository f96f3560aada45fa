"""Models on their way into a runtime: as files, with nodes that have names of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir

from morphgraph.benchmark.runtimes.base import Source
from morphgraph.benchmark.runtimes.origins import Nodes, node_name
from morphgraph.errors import ModelError, MorphError, UnsupportedError
from morphgraph.onnx_io import as_model, escape, save


class Held:
    """A model that a session is built from, perhaps twice.

    Attributes:
        nodes: the nodes of its main graph.
    """

    def __init__(self, model: Source) -> None:
        """Read the structure.

        Raises:
            FileError: there is no such file, or it cannot be read.
            ModelError: it is not ONNX, or is damaged.
        """
        read = as_model(_message(model) if isinstance(model, bytes) else model)
        self.nodes = Nodes(read.graph)
        is_file = isinstance(model, str | PathLike)
        self._held: Path | ir.Model = Path(model).absolute() if is_file else read
        if not _names_are_unique(read.graph):
            self._held = _named(read)

    @contextmanager
    def file(self) -> Iterator[Path]:
        """A file that holds it: its own, or a temporary one that lasts as long as the block."""
        if isinstance(self._held, Path):
            yield self._held
            return
        with TemporaryDirectory(prefix="morphgraph-") as folder:
            path = Path(folder) / "model.onnx"
            save(self._held, path)
            yield path


def _message(serialized: bytes) -> onnx.ModelProto:
    try:
        return onnx.load_from_string(serialized)
    except Exception as error:  # protobuf's errors share no public base class
        raise ModelError(f"model: its {len(serialized)} bytes are not an ONNX model") from error


def _names_are_unique(graph: ir.Graph) -> bool:
    names = [node.name for node in graph]
    return all(names) and len(set(names)) == len(names)


def _named(model: ir.Model) -> ir.Model:
    """A copy in which every node of the main graph has a name of its own: a profile tells these."""
    named = model.clone()
    taken: set[str] = set()
    for position, node in enumerate(named.graph):
        name = node_name(node)
        node.name = name if name not in taken else f"{name} ({position})"
        taken.add(node.name)
    return named


@contextmanager
def runtime_errors(runtime: str, name: str) -> Iterator[None]:
    """Turn what a runtime raises into one line.

    Raises:
        UnsupportedError: with the words of the runtime.
    """
    try:
        yield
    except MorphError:
        raise
    except Exception as error:  # runtimes' errors share no base class
        words = " ".join(str(error).split())
        raise UnsupportedError(
            f"{name}: {runtime} does not run it: {escape(words)[:300]}; "
            "`morphgraph doctor` tells its version"
        ) from error
