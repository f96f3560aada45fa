"""Which attributes of a network's modules hold sizes that a plan changes, and their new values.

Torch's own layers keep known sizes (:mod:`morphgraph.torch_io.layer_sizes`). Any other integer is a
candidate where it equals the old size of an axis that the plan changes: of the module's own
tensors, of what its forward computes itself, of what is computed below it, or anywhere. A number
that has one meaning only in the nearest of these is changed at once; what has several is left to
the search that runs the network.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, product
from typing import Any

from torch import nn

from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import escape
from morphgraph.torch_io.layer_sizes import (
    FREE_SIZES,
    Cuts,
    TensorCut,
    is_torch_layer,
    layer_sizes,
)
from morphgraph.torch_io.module_state import Slot, slots
from morphgraph.torch_io.module_tensors import Form
from morphgraph.torch_io.names import module_path

_OPTIONS = 8  # alternatives for one tuple
_NO_SIZES = frozenset(
    {
        *("kernel_size", "stride", "padding", "dilation", "output_padding"),
        *("scale_factor", "upscale_factor", "downscale_factor"),
        *("axis", "start_dim", "end_dim", "num_layers", "depth"),
    }
)
"""Names of attributes that hold other integers, by torch's usage."""

Sizes = dict[int, dict[int, None]]
"""By old size the new ones that it has, those that stay included, in order of their finding."""


def _note(sizes: Sizes, old: int, new: int) -> None:
    sizes.setdefault(old, {})[new] = None


class AxisSizes:
    """The sizes of axes before and after, by the module that computes with them.

    Attributes:
        graph: the network.
        everywhere: those of all values.
    """

    def __init__(self, form: Form) -> None:
        self.graph = form.graph
        self.everywhere: Sizes = {}
        self._direct: dict[str, Sizes] = {}
        self._groups: dict[str, dict[int, None]] = {}
        graph = form.graph
        for op_index, op in enumerate(graph.ops):
            path = module_path(op.ir)
            here = self._direct.setdefault(path, {}) if path is not None else {}
            edges = sorted(graph.edges_of(op_index), key=lambda edge: edge.port)
            vertices = dict.fromkeys(v for edge in edges for v in (edge.dim, edge.factor))
            for vertex in vertices:
                old = int(graph.couplings.sizes[vertex])
                kept = form.selection.vertex(vertex)
                new = old if kept is None else len(kept)
                _note(here, old, new)
                _note(self.everywhere, old, new)
                if new != old and path is not None:
                    on = dict.fromkeys(sorted(graph.groups_on(vertex)))
                    self._groups.setdefault(path, {}).update(on)

    def direct(self, path: str) -> Sizes:
        """Those of what a module's own forward computes."""
        return self._direct.get(path, {})

    def below(self, path: str) -> Sizes:
        """Those of what is computed within a module."""
        found: Sizes = {}
        for where, sizes in self._direct.items():
            if not path or where == path or where.startswith(f"{path}."):
                for old, news in sizes.items():
                    found.setdefault(old, {}).update(news)
        return found

    def groups(self, path: str) -> list[int]:
        """Indices of the groups that change and on which a module's own forward computes."""
        return list(self._groups.get(path, {}))


def own_sizes(cuts: Iterable[TensorCut]) -> Sizes:
    """The sizes of the axes of tensors before and after."""
    found: Sizes = {}
    for cut in cuts:
        for old, new in zip(cut.before, cut.after, strict=True):
            _note(found, old, new)
    return found


class Attributes:
    """The size attributes of a network: what they may become, what they are set to, and were.

    Attributes:
        sizes: those of axes, by module.
        slots: the places whose value the search may change.
        holders: the same by place, which several modules may hold.
    """

    def __init__(self, net: nn.Module, sizes: AxisSizes, cuts: Mapping[str, TensorCut]) -> None:
        self._old: dict[tuple[int, str], tuple[Slot, Any]] = {}
        self.sizes = sizes
        self._own = {path: _layer_cuts(m, path, cuts) for path, m in net.named_modules()}
        self._net = net
        self.slots: list[Slot] = []
        for path, module in net.named_modules():
            self.slots += [slot for slot in slots(module, path) if _is_free(slot, self._own[path])]
        self.holders: dict[tuple[int, str], list[Slot]] = {}
        for slot in self.slots:
            self.holders.setdefault(slot.place, []).append(slot)

    def set_known(self) -> None:
        """Set what the layers of torch keep, from their tensors.

        Raises:
            UnsupportedError: a layer cannot be of that form.
        """
        for path, module in self._net.named_modules():
            self._set_layer(module, path)

    def _set_layer(self, module: nn.Module, path: str) -> None:
        cuts = self._own[path]
        if not any(cut.before != cut.after or cut.positions for cut in cuts.values()):
            return
        try:
            known = layer_sizes(module, cuts)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"module '{escape(path)}' ({type(module).__name__}): {error}"
            ) from error
        for name, value in known.items():
            if name in vars(module):
                self.set(Slot(module, path, vars(module), name, name), value)

    def set(self, slot: Slot, value: Any) -> None:
        """Set a value, and remember the first one."""
        self._old.setdefault(slot.place, (slot, slot.value))
        slot.set(value)

    def restore(self) -> None:
        """Put all values back."""
        for slot, value in self._old.values():
            slot.set(value)

    def changes(self) -> Iterator[tuple[Slot, Any]]:
        """The places whose value differs from what it was, with that."""
        for slot, old in self._old.values():
            if slot.value != old:
                yield slot, old

    def original(self, slot: Slot) -> Any:
        """The value that a place had before the resize."""
        return self._old.get(slot.place, (slot, slot.value))[1]

    def set_plain(self) -> None:
        """Set what has one meaning in the module's own tensors, or in what its forward computes.

        What a config says is left to :mod:`morphgraph.torch_io.config_sizes` and to the search.
        """
        for slot in self.slots:
            if slot.table is not vars(slot.module) or slot.place in self._old:
                continue
            values = self._values(slot, self._nearest(slot))
            if len(values) == 1 and values[0] != slot.value:
                self.set(slot, values[0])

    def alternatives(self, slot: Slot) -> list[Any]:
        """All values that a place may take, those with a meaning nearby first."""
        sources = (self._nearest(slot), self.sizes.below(slot.path), self.sizes.everywhere)
        values = [self.original(slot)]
        values += [value for sizes in sources for value in self._values(slot, sizes)]
        return [value for k, value in enumerate(values) if value not in values[:k]]

    def _nearest(self, slot: Slot) -> Sizes:
        own, direct = own_sizes(self._own[slot.path].values()), self.sizes.direct(slot.path)
        return direct | own

    def _values(self, slot: Slot, sizes: Sizes) -> list[Any]:
        original = self.original(slot)
        numbers = dict.fromkeys([original] if isinstance(original, int) else original)
        choices = [list(sizes.get(number, {number: None})) for number in numbers]
        if not any(number in sizes for number in numbers):
            return []
        picks = islice(product(*choices), _OPTIONS)
        return [_replaced(original, dict(zip(numbers, p, strict=True))) for p in picks]


def _replaced(value: Any, sizes: Mapping[int, int]) -> Any:
    """An integer, tuple or list with other sizes."""
    if isinstance(value, int):
        return sizes[value]
    return type(value)([sizes[item] for item in value])


def _is_free(slot: Slot, cuts: Cuts) -> bool:
    """Whether a place may hold a size that is not known to be another thing."""
    if slot.key in _NO_SIZES:
        return False
    for kind, names in FREE_SIZES.items():
        if isinstance(slot.module, kind) and slot.label in names and not cuts:
            return True
    return not is_torch_layer(slot.module)


def _layer_cuts(
    module: nn.Module, path: str, cuts: Mapping[str, TensorCut]
) -> dict[str, TensorCut]:
    """A module's own tensors by the names that they have without parametrizations."""
    prefix = f"{path}." if path else ""
    found: dict[str, TensorCut] = {}
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    named = {name: (f"{prefix}{name}", tensor) for name, tensor in own}
    if parametrized := getattr(module, "parametrizations", None):
        for name, tensors in parametrized.items():
            longest = max(tensors.parameters(recurse=False), key=lambda t: t.numel(), default=None)
            full = next(
                (n for n, t in tensors.named_parameters(recurse=False) if t is longest), None
            )
            if longest is not None:
                named[name] = (f"{prefix}parametrizations.{name}.{full}", longest)
    for name, (full, tensor) in named.items():
        base = name
        if name.endswith("_orig") or (name.endswith("_v") and f"{name[:-2]}_g" in named):
            base = name.rpartition("_")[0]
        shape = tuple(tensor.shape)
        found[base] = cuts.get(full) or TensorCut(shape, shape, {})
    return found
