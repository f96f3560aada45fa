"""What the zoo knows about a network before it has seen it."""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    *("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-genai", "numpy"),
)

Feeds = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Network:
    """A network in PyTorch and its positional arguments; ``trained`` weights stay as they are."""

    net: nn.Module
    arguments: tuple[Any, ...]
    trained: bool = False


@dataclass(frozen=True, slots=True)
class File:
    """A model in ONNX and its inputs."""

    model: ir.Model
    feeds: Feeds


@dataclass(frozen=True)
class Entry:
    """A network of the zoo; entries of other kinds inherit.

    Attributes:
        name: unique; those of a library start with its name, ``timm/resnet50``.
        family: ``cnn``, ``transformer`` (hybrids too), ``recurrent`` or ``other``.
        make: builds it from ``options``; entries of other kinds say what else.
        options: plain values.
        small: whether ``--small`` takes it.
        structure_only: too large to be run: no weights, nothing verified.
    """

    name: str
    family: str
    make: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    small: bool = False
    structure_only: bool = False

    @property
    def stem(self) -> str:
        """A file name."""
        return self.name.replace("/", "--")

    @property
    def pins(self) -> bytes:
        """What is prepared depends on this, too."""
        return b""

    def build(self) -> Network | File:
        """The network, freshly made."""
        built: Network | File = self.make(**self.options)
        return built


def versions() -> dict[str, str]:
    """Of the installed libraries on which a row depends."""
    found = {}
    for tool in TOOLS:
        with suppress(PackageNotFoundError):  # the small networks do without some
            found[tool] = version(tool)
    return found


def export_digest(entry: Entry) -> str:
    """Of everything that the exported model depends on."""
    library = ROOT / "morphgraph"
    sources = [library / "torch_io" / "export.py", library / "testing" / "random_weights.py"]
    sources += sorted((ROOT / "passes" / "canonical").glob("*.py"))
    digest = hashlib.sha256(repr((versions(), entry.name, sorted(entry.options.items()))).encode())
    digest.update(entry.pins)
    for path in (*sources, Path(__file__).with_name("prepare.py")):
        digest.update(path.read_bytes())
    for text in sorted(set(_sources(entry.make, set()))):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def _sources(thing: Any, seen: set[int]) -> Iterator[str]:
    """Source of a function or class and of those in its module that it names."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    text = inspect.getsource(thing)
    yield text
    module = inspect.getmodule(thing)
    for name, other in vars(module).items():
        here = inspect.isfunction(other) or inspect.isclass(other)
        if here and inspect.getmodule(other) is module and name in text:
            yield from _sources(other, seen)


def program_digest() -> str:
    """Of everything in this repository that a finding depends on."""
    digest = hashlib.sha256(repr(versions()).encode())
    here = Path(__file__).parent
    sources = [*(ROOT / "morphgraph").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    sources += [here / name for name in ("examine.py", "examine_file.py", "small_models.py")]
    sources += [here / "peers.py"]
    for path in sorted({path.resolve() for path in sources}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
