"""Models on their way into a runtime: as files, with nodes that have names of their own."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir

from morphgraph.errors import ModelError, MorphError, MorphWarning, UnsupportedError
from morphgraph.onnx_io import as_model, escape, save
from morphgraph.runtimes.base import Source
from morphgraph.runtimes.origins import Nodes, node_name


class Held:
    """A model that sessions are built from; it is read once."""

    def __init__(self, model: Source) -> None:
        """Take a model."""
        self._model = model

    @cached_property
    def read(self) -> ir.Model:
        """The model as this program reads it.

        Raises:
            FileError: there is no such file, or it cannot be read.
            ModelError: it is not ONNX, or is damaged.
        """
        return as_model(_message(self._model) if isinstance(self._model, bytes) else self._model)

    @cached_property
    def nodes(self) -> Nodes:
        """The nodes of its main graph."""
        return Nodes(self.read.graph)

    @contextmanager
    def file(self, *, named: bool = False) -> Iterator[Path]:
        """A file that holds it: its own, or a temporary one that lasts as long as the block.

        Args:
            named: whether every node has a name of its own there: it is these that a runtime tells.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MorphWarning)
            read = self.read  # what is broken or hostile is refused before a runtime sees it
        wanting = named and not _names_are_unique(read.graph)
        if isinstance(self._model, str | PathLike) and not wanting:
            yield Path(self._model).absolute()
            return
        with TemporaryDirectory(prefix="morphgraph-") as folder:
            path = Path(folder) / "model.onnx"
            if isinstance(self._model, bytes) and not wanting:
                path.write_bytes(self._model)
            else:
                save(_named(read) if wanting else read, path)
            yield path

    @contextmanager
    def errors(self, runtime: str, name: str) -> Iterator[None]:
        """Turn what a runtime raises about it into one line.

        Raises:
            FileError: there is no such file, or it cannot be read.
            ModelError: it is not ONNX, or is damaged.
            UnsupportedError: with the words of the runtime.
        """
        try:
            yield
        except MorphError:
            raise
        except Exception as error:  # runtimes' errors share no base class
            raise self.refused(runtime, name, error) from error

    def refused(self, runtime: str, name: str, error: Exception) -> UnsupportedError:
        """What to raise where a runtime has raised that, unless reading it says what is wrong."""
        assert self.read is not None
        words = " ".join(str(error).split())
        return UnsupportedError(
            f"{name}: {runtime} does not run it: {escape(words)[:300]}; "
            "`morphgraph doctor` tells its version"
        )


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


def middle(microseconds: Iterable[float]) -> float:
    """The mean of the middle half: profiles count whole microseconds, and a median would too.

    >>> middle([5, 6, 6, 7, 900])
    6.333333333333333
    """
    times = sorted(microseconds)
    outside = len(times) // 4
    return fmean(times[outside : len(times) - outside])
