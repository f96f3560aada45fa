"""A tree of torch modules that grows by dotted paths, in whatever order they come."""

from torch import Tensor, fx, nn

_RESERVED = (
    frozenset(dir(fx.GraphModule))
    | frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))
    | {"onnx_names"}  # what names.py sets
    | {"self", "Self"}  # torch.fx calls the module's result so as well, and then reads from that
)
"""What a module at the root cannot be called; further in, what ``nn.Module`` has itself."""


class ModuleTree:
    """Modules, parameters and buffers by dotted path; folders on the way are empty modules.

    >>> tree = ModuleTree()
    >>> tree.put("layer1.0.conv", nn.Conv2d(3, 8, 1))
    >>> tree.is_free("layer1.0.conv"), tree.unique("layer1.0.conv")
    (False, 'layer1.0.conv_1')
    """

    def __init__(self) -> None:
        self.root = nn.Module()
        self._persistent: set[str] = set()

    def get(self, path: str) -> nn.Module | Tensor | None:
        """What stands at a path."""
        here: nn.Module | Tensor | None = self.root
        for part in path.split("."):
            here = _member(here, part) if isinstance(here, nn.Module) else None
        return here

    def tensor(self, path: str) -> Tensor:
        """The parameter or buffer at a path."""
        found = self.get(path)
        assert isinstance(found, Tensor), path
        return found

    def is_free(self, path: str) -> bool:
        """Whether a module can be put here; an empty folder can still become one."""
        here: nn.Module | Tensor | None = self.root
        for part in path.split("."):
            if not isinstance(here, nn.Module) or (here is self.root and part in _RESERVED):
                return False
            inner = _member(here, part)
            if inner is None and hasattr(here, part):
                return False
            here = nn.Module() if inner is None else inner
        return type(here) is nn.Module

    def is_vacant(self, path: str) -> bool:
        """Whether nothing is here, and a tensor can be put."""
        return self.is_free(path) and self.get(path) is None

    def takes(self, path: str, module: nn.Module) -> bool:
        """Whether a module can be put here, with what stands in the folder of that name."""
        folder = self.get(path)
        inside: list[str] = []
        if isinstance(folder, nn.Module):
            inside = [
                *(name for name, _ in folder.named_children()),
                *(name for name, _ in folder.named_parameters(recurse=False)),
                *(name for name, _ in folder.named_buffers(recurse=False)),
            ]
        return self.is_free(path) and not any(
            hasattr(module, name) and _member(module, name) is None for name in inside
        )

    def unique(self, path: str) -> str:
        """This path, or with a number behind it where it is taken."""
        folder, _, _ = path.rpartition(".")
        if folder and not self.is_free(folder) and not isinstance(self.get(folder), nn.Module):
            path = path.replace(".", "_")
        candidate, number = path, 0
        while not self.is_vacant(candidate):
            number += 1
            candidate = f"{path}_{number}"
        return candidate

    def put(self, path: str, module: nn.Module) -> None:
        """Put a module; what already stands in a folder of that name moves into it."""
        parent, field = self._parent(path)
        folder = _member(parent, field)
        if isinstance(folder, nn.Module):
            for name, child in folder.named_children():
                module.add_module(name, child)
            for name, parameter in folder.named_parameters(recurse=False):
                module.register_parameter(name, parameter)
            for name, buffer in folder.named_buffers(recurse=False):
                module.register_buffer(name, buffer, f"{path}.{name}" in self._persistent)
        parent.add_module(field, module)

    def place(self, path: str, module: nn.Module) -> str:
        """Put a module without weights, or find the same one there; returns its path."""
        if path.split(".")[0] not in _RESERVED and self.same_form(path, module):
            return path
        path = self.unique(path)
        self.put(path, module)
        return path

    def put_parameter(self, path: str, parameter: nn.Parameter) -> None:
        """Put a parameter."""
        parent, field = self._parent(path)
        parent.register_parameter(field, parameter)

    def put_buffer(self, path: str, tensor: Tensor, persistent: bool) -> None:
        """Put a buffer; one that is not persistent is no part of the ``state_dict``."""
        parent, field = self._parent(path)
        parent.register_buffer(field, tensor, persistent)
        if persistent:
            self._persistent.add(path)

    def same_form(self, path: str, module: nn.Module) -> bool:
        """Whether the module there has the class and the options of this one."""
        there = self.get(path)
        return type(there) is type(module) and repr(there) == repr(module)

    def _parent(self, path: str) -> tuple[nn.Module, str]:
        *folders, field = path.split(".")
        here = self.root
        for part in folders:
            inner = _member(here, part)
            if inner is None:
                inner = nn.Module()
                here.add_module(part, inner)
            assert isinstance(inner, nn.Module), path
            here = inner
        return here, field


def _member(module: nn.Module, name: str) -> nn.Module | Tensor | None:
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module | Tensor) else None
