"""A network's tensors and attributes, changed in place and put back exactly."""

from argparse import Namespace
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from morphgraph.torch_io.layer_sizes import TensorCut
from morphgraph.torch_io.tensors import take

_TABLES = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """What a network consists of, to put it back exactly: objects, shapes, numbers, attributes."""

    def __init__(self, net: nn.Module) -> None:
        self._tables: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = []
        for module in net.modules():
            members = vars(module)
            self._tables.append((members, dict(members)))
            self._tables += [(members[name], dict(members[name])) for name in _TABLES]
        self._tensors = [
            (tensor, tensor.data, tensor.grad) for tensor in (*net.parameters(), *net.buffers())
        ]
        self._buffers = [(tensor.data, tensor.detach().clone()) for tensor in net.buffers()]

    def restore(self) -> None:
        """Put everything back."""
        for table, content in self._tables:
            table.clear()
            table.update(content)
        for tensor, data, grad in self._tensors:
            replace_data(tensor, data)
            tensor.grad = grad
        for data, numbers in self._buffers:
            data.copy_(numbers)


def replace_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give a tensor other contents, of another shape too; it stays the same object.

    Autograd remembers the shape of a parameter as long as some result of it is alive; only a change
    of the type makes it forget.
    """
    other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
    if tensor.requires_grad and tensor.shape != data.shape:
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def cut(tensor: torch.Tensor, cuts: TensorCut) -> torch.Tensor:
    """The positions of a tensor that stay, in memory of its own, laid out as before."""
    return take(tensor.detach(), cuts.positions)


class _Absent:
    def __repr__(self) -> str:
        return "not there"


ABSENT = _Absent()
"""What a place holds that is not there yet."""


@dataclass(frozen=True)
class Slot:
    """A place that holds an integer, or several in a tuple or list: of a module or of a config.

    Attributes:
        module: the module that holds it, or its config.
        path: where the module stands.
        table: what it is stored in.
        key: under which name.
        label: what a person calls it.
    """

    module: nn.Module
    path: str
    table: MutableMapping[str, Any]
    key: str
    label: str

    @property
    def place(self) -> tuple[int, str]:
        """Equal for the same place, which several modules may hold."""
        return id(self.table), self.key

    @property
    def family(self) -> tuple[type[nn.Module], str]:
        """Equal for the same attribute of modules of one class."""
        return type(self.module), self.label

    @property
    def value(self) -> Any:
        """What it holds."""
        return self.table.get(self.key, ABSENT)

    def set(self, value: Any) -> None:
        """Let it hold something else."""
        if value is ABSENT:
            self.table.pop(self.key, None)
        else:
            self.table[self.key] = value

    @property
    def numbers(self) -> tuple[int, ...]:
        """The integers that it holds, each once."""
        value = self.value
        return (value,) if isinstance(value, int) else tuple(dict.fromkeys(value))


def slots(module: nn.Module, path: str) -> Iterator[Slot]:
    """The sizes that a module may hold, in its attributes and those of a config there."""
    for key, value in list(vars(module).items()):
        if key.startswith("_") or key == "training":
            continue
        if holds_sizes(value):
            yield Slot(module, path, vars(module), key, key)
        elif (table := config_table(value)) is not None:
            for inner, number in table.items():
                if not str(inner).startswith("_") and holds_sizes(number):
                    yield Slot(module, path, table, inner, f"{key}.{inner}")


def config_table(value: Any) -> MutableMapping[str, Any] | None:
    """Where a config keeps what it says: a dict, a namespace, or an object of a plain class."""
    if isinstance(value, dict):
        return value if all(isinstance(key, str) for key in value) else None
    name = type(value).__name__.lower()
    plain = isinstance(value, SimpleNamespace | Namespace) or is_dataclass(value)
    is_config = plain or name.endswith(("config", "args"))
    return vars(value) if is_config and hasattr(value, "__dict__") else None


def holds_sizes(value: Any) -> bool:
    """Whether a value is an integer, or a few of them in a tuple or list."""
    if isinstance(value, tuple | list):
        return (
            type(value) in (tuple, list, torch.Size)
            and 0 < len(value) <= 16
            and all(type(item) is int for item in value)
        )
    return type(value) is int
