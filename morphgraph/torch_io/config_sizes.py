"""Configs that build a network (``type(net)(net.config)``), brought to its new sizes.

What an entry of a config means is found by building: with the right numbers the class builds a
network of the same shapes, whose modules keep the same sizes.
"""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import combinations
from typing import Any

import torch
from torch import nn

from morphgraph.onnx_io import escape
from morphgraph.torch_io.module_sizes import Attributes
from morphgraph.torch_io.module_state import Slot, config_table, holds_sizes, slots

_BUILDS = 600
_Score = tuple[int, int]


class ConfigFit:
    """A module that its own config builds."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self._module = module
        self._path = path
        self._builds = _BUILDS
        self._config = module.config

    @property
    def _table(self) -> MutableMapping[str, Any]:
        table = config_table(self._config)
        assert table is not None
        return table

    def is_right(self) -> bool:
        """Whether the config builds a network of this one's shapes."""
        return self._score({})[0] == 0

    def _built(self, values: Mapping[str, Any]) -> nn.Module | None:
        self._builds -= 1
        try:
            config = copy.deepcopy(self._config)
            vars(config).update(values)
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                return type(self._module)(config)
        except Exception:  # noqa: BLE001  a class of the user's own may raise anything
            return None

    def _score(self, values: Mapping[str, Any]) -> _Score:
        """How many shapes, and how many attributes, differ in the network that is built."""
        built = self._built(values)
        if built is None:
            return (2**31, 0)
        mine, theirs = _shapes(self._module), _shapes(built)
        shapes = sum(mine.get(name) != theirs.get(name) for name in {*mine, *theirs})
        return shapes, len(list(_differing(self._module, built)))

    def fit(self, attributes: Attributes) -> str:
        """Find the numbers under which the config builds the resized network, and set them.

        Returns:
            What was found, for a reader.
        """
        values: dict[str, Any] = {}
        score = self._score(values)
        options = list(self._options(attributes))
        kind = type(self._config).__name__
        while options and score > (0, 0) and self._builds > 0:
            best = self._best(values, options, score)
            if best is None:
                break
            values, score = best
        if score[0]:
            wrong = self._first_wrong(values)
            return (
                f"{kind} cannot say these sizes (parameter '{escape(wrong)}'); to load the network "
                "from a config, plan layers of one kind with one width (same=[GLOB])"
            )
        for key, value in values.items():
            if value != self._table[key]:
                attributes.set(self._slot(key), value)
        built = self._built({})
        for slot, value in list(_differing(self._module, built)) if built else ():
            if value in attributes.alternatives(slot):
                attributes.set(slot, value)
        return f"{kind} builds this network"

    def _best(
        self, values: Mapping[str, Any], options: list[tuple[str, Any]], score: _Score
    ) -> tuple[dict[str, Any], _Score] | None:
        """The best change of one entry, or of two or three where none helps."""
        for size in (1, 2, 3):
            tried: list[tuple[_Score, int, dict[str, Any]]] = []
            for picked in combinations(options, size):
                changed = dict(values) | dict(picked)
                if (
                    changed != values
                    and self._builds > 0
                    and len({key for key, _ in picked}) == size
                ):
                    tried.append((self._score(changed), len(tried), changed))
            if tried and min(tried)[0] < score:
                best, _, changed = min(tried, key=lambda entry: entry[:2])
                return changed, best
        return None

    def _slot(self, key: str) -> Slot:
        return Slot(self._module, self._path, self._table, key, f"config.{key}")

    def _options(self, attributes: Attributes) -> Iterator[tuple[str, Any]]:
        for key, value in self._table.items():
            if key.startswith("_") or not holds_sizes(value):
                continue
            alternatives = attributes.alternatives(self._slot(key))
            for other in alternatives if len(alternatives) > 1 else ():
                yield key, other

    def _first_wrong(self, values: Mapping[str, Any]) -> str:
        built = self._built(values)
        theirs = _shapes(built) if built else {}
        mine = _shapes(self._module)
        return next((name for name, shape in mine.items() if theirs.get(name) != shape), "")


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
        fit = ConfigFit(module, path)
        if fit.is_right():
            found.append(fit)
            inside |= {id(inner) for inner in module.modules()}
    return found


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _differing(module: nn.Module, built: nn.Module) -> Iterator[tuple[Slot, Any]]:
    """The sizes that a module's attributes hold otherwise than a network that was built."""
    others = dict(built.named_modules())
    for path, mine in module.named_modules():
        other = others.get(path)
        if other is None:
            continue
        for slot in slots(mine, path):
            if slot.table is vars(mine) and slot.key in vars(other):
                value = vars(other)[slot.key]
                if value != slot.value:
                    yield slot, value
