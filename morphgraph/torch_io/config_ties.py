"""Which widths a config can say: found before planning, by building its class at other widths.

A trial gives some groups other widths, looks which numbers of the config build a network of the
shapes that follow, and builds it on the meta device: with as few of its repeated blocks as show all
that there are, and once more as a whole. A group whose width may be any alone is free.
Others are tried together: by one ratio, or as multiples of a number that follows another group.
What no trial brings keeps its width.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import nn

from morphgraph.arrays import IntArray
from morphgraph.errors import ArgumentError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import is_float
from morphgraph.passes.planning.bounds import AllowedWidths, WidthBounds
from morphgraph.passes.planning.ties import Multiple, Ties
from morphgraph.torch_io.config_builds import ConfigBuilds
from morphgraph.torch_io.config_search import REFUSED, ConfigSearch, Score, Values
from morphgraph.torch_io.config_sizes import configs_of
from morphgraph.torch_io.module_runs import Runner, call_of, random_call
from morphgraph.torch_io.module_state import config_table, slots

_BUILDS = 60  # of one trial
_MANY = 3  # groups that a trial brings together where pairs do not go
_MOST_BLOCKS = 8  # repeated blocks with which it is tried to have less to build
_NUMBER = re.compile(r"\d+")

Block = tuple[int, ...]
Numbers = Callable[[Values], bool]
Shapes = dict[str, tuple[int, ...]]


def config_ties(
    graph: ChannelGraph,
    bounds: WidthBounds,
    module: nn.Module,
    path: str = "",
    keeps_numbers: "Numbers | None" = None,
) -> Ties:
    """The widths that go together so that a module's config says them.

    Args:
        graph: the network.
        bounds: of the widths, those that correspond in repeated blocks as one.
        module: that its config builds; it may be on the meta device.
        path: of the module in the network that was exported.
        keeps_numbers: whether the class computes with the same numbers after entries have changed;
            not asked where only shapes count.
    """
    return _Finder(_Trials(graph, module, path), bounds.on(graph), keeps_numbers).run()


def module_ties(
    graph: ChannelGraph, bounds: WidthBounds, net: nn.Module, example: Any = None, seed: int = 0
) -> Ties:
    """The widths that go together so that the config of a network, or of a module in it, says them.

    Args:
        graph: the network, exported from this one.
        bounds: of the widths.
        net: as it was exported, a wrapper included.
        example: arguments of its forward; by default random ones of the sizes of the inputs.
        seed: of those.

    Raises:
        ArgumentError: no config builds a module of it.
        UnsupportedError: its forward does not take the example.
    """
    found = configs_of(net)
    if not found:
        raise ArgumentError(
            f"config: no module of {type(net).__name__} is what its own config builds "
            "(type(net)(net.config)); leave config out, and give same=['repeated']"
        )
    module, path = found[0].module, found[0].path
    call = random_call(net, graph.model, seed) if example is None else call_of(net, example)
    run = Runner(net, call)
    return config_ties(graph, bounds, module, path, keeps_numbers(module, run))


class _Trials:
    """What the config can say, asked by widths of groups."""

    def __init__(self, graph: ChannelGraph, module: nn.Module, path: str) -> None:
        self._graph = graph
        self._module = module
        self._builds = ConfigBuilds(module)
        self._shapes = _shapes_of(module)
        self._prefix = f"{path}." if path else ""
        self._sizes = np.asarray(graph.couplings.sizes)
        self._classes = np.asarray(graph.vertex_class)
        found = self._builds.config
        table = config_table(found)
        assert table is not None
        self._table = table
        self.kind = type(found).__name__
        self._known: dict[bytes, Values | None] = {}

    @cached_property
    def numbers(self) -> list[int]:
        """The numbers that the config holds."""
        return sorted({n for n in self._table.values() if type(n) is int and n > 1})

    def says(self, changes: Mapping[Block, int]) -> Values | None:
        """Entries with which the config says these widths; ``None``: it cannot."""
        widths = self._graph.widths.copy()
        for block, width in changes.items():
            widths[list(block)] = width
        key = widths.tobytes()
        if key not in self._known:
            self._known[key] = self._search(widths)
        return self._known[key]

    def changed(self, block: Block, width: int) -> dict[int, set[int]]:
        """By old size the new ones of axes, with other widths of some groups."""
        widths = self._graph.widths.copy()
        widths[list(block)] = width
        return self._new_sizes(self._after(widths))

    def _after(self, widths: IntArray) -> IntArray:
        """Sizes of all axes and factors at some widths, ``[vertices]``."""
        return np.rint(self._graph.class_sizes(widths)[self._classes]).astype(np.int64)

    def _new_sizes(self, after: IntArray) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        pairs = np.unique(np.stack([self._sizes, after]), axis=1)
        for old, new in pairs.T.tolist():
            found.setdefault(old, set()).add(new)
        return found

    def _search(self, widths: IntArray) -> Values | None:
        after = self._after(widths)
        fewer, shapes = self._fewer
        found = self._search_among(after, fewer, shapes)
        if not fewer or found is None or self._missed(found, after) == 0:
            return found
        return self._search_among(after, {}, self._shapes)

    def _missed(self, values: Values, after: IntArray) -> int:
        """How many shapes of the whole network differ from those wanted."""
        built = self._built(values)
        return 1 if built is None else _Wanted(self._weights(after), self._shapes).missed(built)

    def _search_among(self, after: IntArray, fewer: Values, shapes: Shapes) -> Values | None:
        """Entries that make no shape differ in a network whose config says ``fewer`` as well."""
        gone = self._shapes.keys() - shapes.keys()
        weights = (each for each in self._weights(after) if each[0] not in gone)
        sizes, wanted = self._new_sizes(after), _Wanted(weights, shapes)

        def score(values: Values) -> Score:
            built = self._built(fewer | values)
            return REFUSED if built is None else (wanted.missed(built), 0)

        options: dict[str, list[int]] = {}
        for key, value in self._table.items():
            if type(value) is int and not key.startswith("_"):
                others = sorted(sizes.get(value, set()) - {value})
                if others:
                    options[key] = [*others, value]
        search = ConfigSearch(score, self._table, options, lambda: self._extra(sizes), _BUILDS)
        return search.first()

    def _built(self, values: Values) -> Shapes | None:
        """The shapes of what the class builds; ``None``: it refuses."""
        built = self._builds.shapes_alone(values)
        return None if built is None else _shapes_of(built)

    @cached_property
    def _fewer(self) -> tuple[Values, Shapes]:
        """Entries with which the class has few of its repeated blocks, and the shapes that it has.

        Every parameter that is gone has one of its name, but for numbers, and of its shape among
        them. Lists with an entry for every block are cut as well.
        """
        fewer, shapes = Values(), self._shapes
        for key, value in self._table.items():
            if type(value) is not int or key.startswith("_"):
                continue
            for count in range(1, min(value, _MOST_BLOCKS + 1)):
                tried = fewer | self._of_each(value, count) | {key: count}
                built = self._built(tried)
                if built is None:
                    continue
                if len(built) >= len(shapes):
                    break  # it is no number of blocks
                if _kinds(built) == _kinds(shapes) and built.items() <= shapes.items():
                    fewer, shapes = tried, built
                    break
        return fewer, shapes

    def _of_each(self, blocks: int, count: int) -> Values:
        """Of entries that list something for every block, the first."""
        return {
            key: value[:count]
            for key, value in self._table.items()
            if isinstance(value, list | tuple) and len(value) == blocks
        }

    def _extra(self, sizes: Mapping[int, set[int]]) -> Iterator[Values]:
        """Entries without a number, with what modules keep under that name, or axes have."""
        named: dict[str, dict[int, None]] = {}
        for path, module in self._module.named_modules():
            for slot in slots(module, path):
                if slot.table is vars(module) and type(slot.value) is int:
                    news = sizes.get(slot.value, {slot.value})
                    named.setdefault(slot.key, {}).update(dict.fromkeys(sorted(news)))
        asked = self._builds.asked()
        for key in asked:
            yield from ({key: value} for value in named.get(key, ()))
        everywhere = sorted({new for each in sizes.values() for new in each if new > 1})
        for key in asked:
            if key in self._table and key not in named:
                yield from ({key: value} for value in everywhere)

    @cached_property
    def _weights_of(self) -> list[tuple[str, int, int]]:
        """Floating-point weights that some operator reads: name, first vertex, number of axes."""
        first = self._graph.couplings.first_dim
        return [
            (name, first[name], len(value.shape))
            for name, value in self._graph.model.graph.initializers.items()
            if name in first and value.shape is not None and is_float(value)
        ]

    def _weights(self, after: IntArray) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Of every weight the module's name for it, its shape, and its shape at some widths."""
        for name, start, rank in self._weights_of:
            own = name.removeprefix(self._prefix)
            span = slice(start, start + rank)
            yield own, tuple(self._sizes[span].tolist()), tuple(after[span].tolist())


class _Wanted:
    """The shapes that a class has to build: by name where names are kept, else by the old shape."""

    def __init__(
        self,
        weights: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._old = shapes
        self._named: dict[str, tuple[int, ...]] = {}
        self._alike: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for name, old, new in weights:
            if shapes.get(name) == old:
                self._named[name] = new
            else:  # layers' kernels may be transposed
                self._alike.setdefault(_sorted(old), set()).add(_sorted(new))

    def missed(self, built: Mapping[str, tuple[int, ...]]) -> int:
        """How many shapes differ from what is wanted."""
        missed, found = 0, dict[tuple[int, ...], set[tuple[int, ...]]]()
        for name, old in self._old.items():
            new = built.get(name)
            if name in self._named or new is None:
                missed += new != self._named.get(name)
            elif (alike := self._alike.get(_sorted(old))) is not None:
                missed += _sorted(new) not in alike
                found.setdefault(_sorted(old), set()).add(_sorted(new))
        return missed + sum(len(self._alike[old] - news) for old, news in found.items())


def _shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _kinds(shapes: Shapes) -> set[tuple[str, tuple[int, ...]]]:
    """Names without the numbers in them, with their shapes."""
    return {(_NUMBER.sub("", name), shape) for name, shape in shapes.items()}


def _sorted(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape whatever the order of its axes, without those of size 1."""
    return tuple(sorted(size for size in shape if size != 1))


class _Finder:
    """Which blocks of groups are free, which go together, and which keep their width."""

    def __init__(
        self, trials: _Trials, allowed: AllowedWidths, keeps_numbers: Numbers | None
    ) -> None:
        self._trials = trials
        self._allowed = allowed
        self._keeps_numbers = keeps_numbers
        self._wide: IntArray = allowed.graph.widths
        self._blocks = [
            block
            for block in allowed.blocks
            if (allowed.floors < self._wide)[list(block)].all()
            and (allowed.ceilings == self._wide)[list(block)].all()
        ]

    def run(self) -> Ties:
        if self._trials.says({}) is None:
            return Ties()  # a config that is not of this network tells nothing of it
        ratios: list[Block] = []
        multiples: list[Multiple] = []
        left = [block for block in self._blocks if not self._free(block)]
        for one, other in self._pairs(left):
            if {one, other} & set(left) and (factor := self._factor(one, other)):
                multiples.append(Multiple(one, other, factor))
                left = [block for block in left if block not in (one, other)]
        for together in self._together(left):
            if any(block in left for block in together) and self._by_one_ratio(together):
                ratios.append(tuple(sorted(index for block in together for index in block)))
                left = [block for block in left if block not in together]
        # Of an encoder and a decoder with one hidden width every attention divides it by its heads.
        if len(left) > _MANY and self._by_one_ratio(tuple(left)):
            ratios.append(tuple(sorted(index for block in left for index in block)))
            left = []
        reason = f"{self._trials.kind} cannot say another width"
        fixed = {index: reason for block in left for index in block}
        return Ties(tuple(ratios), tuple(multiples), fixed, self._trials.kind)

    def _pairs(self, left: Sequence[Block]) -> Iterator[tuple[Block, Block]]:
        for one in self._blocks:
            for other in self._blocks:
                if one != other and (one in left or other in left):
                    yield one, other

    def _together(self, left: Sequence[Block]) -> Iterator[tuple[Block, ...]]:
        """Blocks that may go by one ratio: few first, of those that do not go alone."""
        for count in range(2, _MANY + 1):
            yield from combinations(left, count)
        yield from ((one, other) for one in left for other in self._blocks if other not in left)

    def _width(self, block: Block) -> int:
        return int(self._wide[block[0]])

    def _says(self, changes: Mapping[Block, int]) -> bool:
        values = self._trials.says(changes)
        if values is None:
            return False
        return self._keeps_numbers is None or self._keeps_numbers(values)

    def _free(self, block: Block) -> bool:
        """Whether any width of a block can be said, as far as three of them tell."""
        wide, first = self._width(block), block[0]
        wanted = (self._allowed.below(first, wide), wide * 3 / 4, wide / 2)
        widths = {self._allowed.nearest(first, width) for width in wanted} - {wide, 0}
        return all(self._says({block: width}) for width in sorted(widths, reverse=True))

    def _by_one_ratio(self, together: Sequence[Block]) -> bool:
        """Whether the widths of some blocks can change by one ratio."""
        most = gcd(*(self._width(block) for block in together))
        shares = {count for count in (most - 1, 3 * most // 4, most // 2) if 0 < count < most}
        return bool(shares) and all(
            self._says({block: self._width(block) // most * count for block in together})
            for count in sorted(shares, reverse=True)
        )

    def _factor(self, one: Block, other: Block) -> int:
        """How often another block's width is taken, of which one's is a multiple; 0: never so."""
        wide, count = self._width(one), self._width(other)
        below = self._allowed.below(other[0], count)
        if not 0 < below < count:
            return 0
        sizes = self._trials.changed(other, below)
        for number in self._trials.numbers:
            follows = number % count == 0 and number // count * below in sizes.get(number, ())
            if not follows or wide % number or wide == number:
                continue  # a width that is the number itself changes by one ratio with it
            factor = number // count
            trials: list[dict[Block, int]] = [
                {one: wide - number * k} for k in (1, 2, 3) if wide > number * k
            ]
            less = factor * below
            trials += [{one: less * k, other: below} for k in (wide // less, wide // less - 1) if k]
            if all(self._says(trial) for trial in trials):
                return factor
        return 0


def keeps_numbers(module: nn.Module, runs: Callable[[], Any]) -> Numbers:
    """Whether a class computes with the same numbers after entries of its config have changed.

    Factors and tables that its modules hold are compared, and the module is run with the entries
    changed and all else as it is: what its forward makes of them shows in the results.

    Args:
        module: whole, with its config.
        runs: gives the results of a forward, a list of tensors, or something else where it fails.
    """
    builds = ConfigBuilds(module)
    table = config_table(module.config)
    assert table is not None
    before = runs()

    def asked(values: Values) -> bool:
        built = builds.numbers_alone(values)
        if built is not None and any(_other_numbers(module, built)):
            return False
        new = [key for key in values if key not in table]
        old = {key: table[key] for key in values if key in table}
        try:
            table.update(values)
            after = runs()
        finally:
            table.update(old)
            for key in new:
                del table[key]
        if not (isinstance(before, list) and isinstance(after, list)):
            return True  # it reads sizes there, and fails with those of another network
        return all(
            one.shape == other.shape and torch.equal(one, other)
            for one, other in zip(before, after, strict=True)
        )

    return asked


def _other_numbers(mine: nn.Module, theirs: nn.Module) -> Iterator[str]:
    """Names of the factors, and of the tables that are no parameters, that differ."""
    others, persistent = dict(theirs.named_modules()), set(mine.state_dict())
    for path, module in mine.named_modules():
        other = others.get(path)
        if other is None:
            continue
        for name, value in vars(module).items():
            if type(value) is float and vars(other).get(name) != value:
                yield f"{path}.{name}"
        tables = dict(other.named_buffers(recurse=False))
        for name, tensor in module.named_buffers(recurse=False):
            table, full = tables.get(name), f"{path}.{name}" if path else name
            if full in persistent:
                continue
            alike = table is not None and table.shape == tensor.shape
            if table is None or not (alike and torch.equal(table, tensor.cpu())):
                yield full
