"""Configs that build a network (``type(net)(net.config)``), brought to its new sizes.

What an entry of a config means is found by building: with the right numbers the class builds a
network of the same shapes, whose modules keep the same sizes, and which computes the same.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from morphgraph.onnx_io import escape
from morphgraph.torch_io.config_builds import ConfigBuilds
from morphgraph.torch_io.config_search import REFUSED, ConfigSearch, Score, Values
from morphgraph.torch_io.module_sizes import Attributes
from morphgraph.torch_io.module_state import Slot, config_table, holds_sizes, slots

_BUILDS = 600
_RUNS = 12  # networks of the right shapes that are run, until one computes the same
_SHOWN = 3


class ConfigFit:
    """A module that its own config builds, in a network that is this module or wraps it.

    Attributes:
        module: this one.
        path: where it stands.
    """

    def __init__(self, module: nn.Module, path: str, net: nn.Module) -> None:
        self.module = module
        self.path = path
        self._net = net
        self._builds = ConfigBuilds(module)
        self._kind = type(module.config).__name__
        self._says_all = False

    @property
    def _table(self) -> MutableMapping[str, Any]:
        table = config_table(self._builds.config)
        assert table is not None
        return table

    def is_right(self) -> bool:
        """Whether the config builds a network of this one's shapes."""
        return self._score({})[0] == 0

    def look_before(self, computed_the_same: Callable[[nn.Module], bool]) -> None:
        """Note whether the config says all of the network before the resize; then it must after."""
        self._says_all = self._runs_the_same({}, computed_the_same)

    def _score(self, values: Mapping[str, Any], checked: bool = True) -> Score:
        """How many shapes, and how many attributes, differ in the network that is built."""
        built = self._builds.shapes_alone(values, checked)
        if built is None:
            return REFUSED
        mine, theirs = _shapes(self.module), _shapes(built)
        shapes = sum(mine.get(name) != theirs.get(name) for name in {*mine, *theirs})
        return shapes, len(list(self._differing(built)))

    def fit(
        self,
        attributes: Attributes,
        computes_the_same: Callable[[nn.Module], bool],
        unequal: Sequence[str],
    ) -> str:
        """Find the numbers under which the config builds the resized network, and set them.

        Args:
            attributes: of the network, cut already.
            computes_the_same: whether a network gives the wanted results; asked where the config
                said all of the module before.
            unequal: names of groups that correspond in repeated blocks, and differ in width.

        Returns:
            What was found, for a reader.
        """
        best, exact = self._search(attributes)
        if not exact:
            return self._refused(best, attributes, unequal)
        if not self._says_all:
            values = self._fewest(exact[0], self._scores_no_worse)
            self._set(values, attributes)
            return f"{self._kind} builds this network"

        def same(values: Values, checked: bool = True) -> bool:
            return self._runs_the_same(values, computes_the_same, checked)

        found = next((values for values in exact[:_RUNS] if same(values)), None)
        if found is None:
            if refused := self._refused_alone(attributes, exact, same):
                return refused
            values = self._fewest(exact[0], self._scores_no_worse)
            self._set(values, attributes)
            return (
                f"{self._kind} builds these shapes, but cannot say all: a network that is loaded "
                f"from it computes something else{self._numbers(values)}; plan again without the "
                "width that they are made of (exclude=)"
            )
        values = self._fewest(found, lambda fewer, _: same(fewer))
        self._set(values, attributes)
        return f"{self._kind} builds this network"

    def _search(
        self, attributes: Attributes, *, checked: bool = True
    ) -> tuple[Values, list[Values]]:
        """The numbers with the fewest shapes that differ, and all that make none differ.

        Those that the config refuses count as well where it is not ``checked``.
        """
        return ConfigSearch(
            lambda values: self._score(values, checked),
            self._table,
            self._options(attributes),
            lambda: self._extra(attributes),
            _BUILDS,
        ).run()

    def _options(self, attributes: Attributes) -> dict[str, list[Any]]:
        """Per entry that holds sizes the values that it may take, the present one last."""
        found: dict[str, list[Any]] = {}
        for key, value in self._table.items():
            if not key.startswith("_") and holds_sizes(value):
                others = attributes.alternatives(self._slot(key))
                if len(others) > 1:
                    found[key] = [other for other in others if other != value] + [value]
        return found

    def _extra(self, attributes: Attributes) -> Iterator[Values]:
        """Entries that have no number, or are not there, with numbers that they may need now.

        Such an entry has a default that follows from others (a head's size of the hidden width),
        and the plan may have changed these in another proportion. What modules call by that name
        comes first, then the sizes of parameters.
        """
        named: dict[str, dict[int, None]] = {}
        for path, module in self.module.named_modules():
            for slot in slots(module, path):
                if slot.table is vars(module) and isinstance(slot.value, int):
                    named.setdefault(slot.key, {})[slot.value] = None
        sizes = {size for shape in _shapes(self.module).values() for size in shape if size > 1}
        changed = {new for news in attributes.sizes.everywhere.values() for new in news}
        asked = self._builds.asked()
        for key in asked:
            yield from ({key: value} for value in named.get(key, ()))
        for key in asked:
            if key in self._table and key not in named:
                yield from ({key: value} for value in sorted(sizes & changed))

    def _fewest(self, values: Values, does: Callable[[Values, Values], bool]) -> Values:
        """The same numbers without those without which others do as well."""
        for key in list(values):
            fewer = {other: value for other, value in values.items() if other != key}
            if self._score(fewer)[0] == 0 and does(fewer, values):
                values = fewer
        return values

    def _scores_no_worse(self, fewer: Values, values: Values) -> bool:
        return self._score(fewer) <= self._score(values)

    def _runs_the_same(
        self, values: Values, same: Callable[[nn.Module], bool], checked: bool = True
    ) -> bool:
        built = self._builds.whole(values, checked)
        if built is None:
            return False
        with _in_its_place(self._net, self.module, built) as net:
            return same(net)

    def _set(self, values: Values, attributes: Attributes) -> None:
        """Write the numbers into the config, and into the modules that hold copies of them."""
        for key, value in values.items():
            attributes.set(self._slot(key), value)
        built = self._builds.shapes_alone({})
        for slot, value in list(self._differing(built)) if built else ():
            if value in attributes.alternatives(slot):
                attributes.set(slot, value)

    def _differing(self, built: nn.Module) -> Iterator[tuple[Slot, Any]]:
        """The sizes that the module's attributes hold otherwise than a network that was built."""
        others = dict(built.named_modules(prefix=self.path))
        for path, mine in self.module.named_modules(prefix=self.path):
            other = others.get(path)
            if other is None:
                continue
            for slot in slots(mine, path):
                if slot.table is vars(mine) and slot.key in vars(other):
                    value = vars(other)[slot.key]
                    if value != slot.value:
                        yield slot, value

    def _slot(self, key: str) -> Slot:
        return Slot(self.module, self.path, self._table, key, f"config.{key}")

    def _refused(self, values: Values, attributes: Attributes, unequal: Sequence[str]) -> str:
        """Why no numbers do, and what would help."""
        if unequal:
            names = ", ".join(f"'{escape(name)}'" for name in unequal[:_SHOWN])
            return (
                f"{self._kind} cannot say unequal widths of layers of one kind ({names}); to load "
                'the network from a config, plan with same=["repeated"] (--same)'
            )
        for found in self._search(attributes, checked=False)[1]:
            if refusal := self._builds.refusal(found):
                return self._refusing(refusal)
        built = self._builds.shapes_alone(values)
        theirs = _shapes(built) if built else {}
        mine = _shapes(self.module)
        wrong = next((name for name, shape in mine.items() if theirs.get(name) != shape), "")
        return (
            f"{self._kind} cannot say these sizes (parameter '{escape(wrong)}'): it derives one "
            "from others that the plan changed in another proportion; to load the network from a "
            "config, leave that width alone (exclude=), or change both by one ratio (widths=)"
        )

    def _refused_alone(
        self,
        attributes: Attributes,
        exact: Sequence[Values],
        same: Callable[[Values, bool], bool],
    ) -> str:
        """What the config says of the right numbers, where it is all that is in the way."""
        loose = [v for v in self._search(attributes, checked=False)[1] if v not in exact]
        for values in loose[:_RUNS]:
            if (refusal := self._builds.refusal(values)) and same(values, False):
                return self._refusing(refusal)
        return ""

    def _refusing(self, refusal: str) -> str:
        return (
            f"{self._kind} cannot say these sizes: it refuses them ({escape(refusal)}); plan "
            "with config=, or leave one of these widths alone (exclude=)"
        )

    def _numbers(self, values: Values) -> str:
        """Numbers and buffers that a network from the config has otherwise than this one."""
        built = self._builds.whole(values)
        others = dict(built.named_modules()) if built else {}
        found = []
        for path, mine in self.module.named_modules():
            theirs = others.get(path)
            names = _differing_numbers(mine, theirs) if theirs is not None else ()
            found += [f"'{escape(f'{path}.{name}' if path else name)}'" for name in names]
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return f", by its {', '.join(found[:_SHOWN])}{more}" if found else ""


def configs_of(net: nn.Module) -> list[ConfigFit]:
    """The outermost modules that their own config builds."""
    found: list[ConfigFit] = []
    inside: set[int] = set()
    for path, module in net.named_modules():
        config = vars(module).get("config")
        if id(module) in inside or config is None or isinstance(config, dict):
            continue
        if config_table(config) is None:
            continue
        fit = ConfigFit(module, path, net)
        if fit.is_right():
            found.append(fit)
            inside |= {id(inner) for inner in module.modules()}
    return found


@contextmanager
def _in_its_place(net: nn.Module, module: nn.Module, built: nn.Module) -> Iterator[nn.Module]:
    """The network with another module in the place of one, for a while."""
    if net is module:
        yield built
        return
    tables = [vars(outer)["_modules"] for outer in net.modules()]
    places = [(table, name) for table in tables for name in table if table[name] is module]
    try:
        for table, name in places:
            table[name] = built
        yield net
    finally:
        for table, name in places:
            table[name] = module


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _differing_numbers(mine: nn.Module, theirs: nn.Module) -> Iterator[str]:
    """Names of the numbers and buffers that two modules of one class hold otherwise."""
    for name, value in vars(mine).items():
        if type(value) is float and vars(theirs).get(name) != value:
            yield name
    buffers = dict(theirs.named_buffers(recurse=False))
    for name, tensor in mine.named_buffers(recurse=False):
        other = buffers.get(name)
        if other is None or other.shape != tensor.shape or not torch.equal(other, tensor.cpu()):
            yield name
