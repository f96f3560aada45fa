"""Packages that others import and most commands never ask anything: read once they are asked.

``onnx_ir`` imports sympy, for arithmetic with names of open sizes that this program does not do. To
read it takes a quarter of the time of ``morphgraph analyze``.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

_LATER = frozenset({"sympy", "onnx_ir._symbolic_shapes"})
"""The package, and the module that asks it for functions while it is imported itself."""


class _Later(MetaPathFinder):
    """Finds these modules as Python does, and has them read when an attribute is asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _LATER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


_FINDER = _Later()


def import_later() -> None:
    """From now on, in this process, let modules of other packages be read when they are asked."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
