"""Pass ``views``: product axes of which several factors may change, each in a view of its own.

An attention's axis ``(h d)`` shrinks by heads or by elements of every head. Each choice of carriers
is a *view* of the network: it ties the positions of that axis to channels in its own way. Where two
views are independent on a class (every channel of the one has its share of every channel of the
other, as rows and columns of a table), a position stays where its channels stay in both, and the
size is the product of both shares. Such a class gets a further class per view, with the same
positions; all else is known of each view as of any class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from morphgraph.arrays import Flags, IntArray
from morphgraph.graph import Pin

STAYS = -2
"""Pins the one channel of all positions that a further view leaves alone; no group has it."""


@dataclass(frozen=True)
class View:
    """The channels that one choice of carriers gives.

    Attributes:
        atom_channel: channel of every atom.
        pinned_by: per channel a class that pins it; -1: none, :data:`STAYS`.
        reasons: why classes keep their size.
    """

    atom_channel: IntArray
    pinned_by: IntArray
    reasons: Mapping[int, Pin]


@dataclass(frozen=True)
class Views:
    """Several views in one; classes beyond the first are further views of those before.

    Attributes:
        base: of every class the one whose positions it has.
        view: the channels.
    """

    base: IntArray
    view: View


def merge(sizes: IntArray, views: Sequence[View]) -> Views:
    """One view of several: the first, and of the others what it does not let change.

    Args:
        sizes: of the classes.
        views: of the same atoms.
    """
    return _Merging(sizes, views).run()


class _Merging:
    def __init__(self, sizes: IntArray, views: Sequence[View]) -> None:
        self.views = views
        self.sizes = sizes
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        offsets = np.cumsum([0, *(len(view.pinned_by) for view in views)])
        self.channels = [
            view.atom_channel + first for view, first in zip(views, offsets, strict=False)
        ]
        self.pinned_by = np.append(np.concatenate([view.pinned_by for view in views]), STAYS)
        self.stays = len(self.pinned_by) - 1
        self.free: Flags = self.pinned_by < 0
        self.layers = [[self._of(0, k)] for k in range(len(sizes))]

    def _of(self, view: int, axis_class: int) -> IntArray:
        span = slice(self.start[axis_class], self.start[axis_class + 1])
        found: IntArray = self.channels[view][span]
        return found

    def run(self) -> Views:
        for number in range(1, len(self.views)):
            self._add(number)
        further = [k for k, layers in enumerate(self.layers) for _ in layers[1:]]
        base = np.concatenate([np.arange(len(self.sizes)), np.array(further, dtype=np.int64)])
        more = [layer for layers in self.layers for layer in layers[1:]]
        atoms = np.concatenate([*(layers[0] for layers in self.layers), *more])
        used, atom_channel = np.unique(atoms, return_inverse=True)
        pinned_by = self.pinned_by[used]
        reasons = {k: v for view in reversed(self.views) for k, v in view.reasons.items()}
        kept = {
            k: pin
            for k, pin in reasons.items()
            if not self.free[self.layers[k][0]].any() or k in self.views[0].reasons
        }
        return Views(base, View(atom_channel, pinned_by, kept))

    def _add(self, number: int) -> None:
        """Let the channels of a further view change that no earlier one lets."""
        channels = self.channels[number]
        stuck = np.array([not self.free[layers[0]].any() for layers in self.layers])
        new = np.zeros(len(self.free), dtype=bool)
        new[channels[stuck[self.owner]]] = True
        new &= self.free
        while True:
            touched = np.unique(self.owner[new[channels]]).tolist()
            unfit = [k for k in touched if not stuck[k] and not self._fits(number, k, new)]
            if not unfit:
                break
            for axis_class in unfit:
                new[self._of(number, axis_class)] = False
        for axis_class in touched:
            here = self._of(number, axis_class)
            if stuck[axis_class]:
                self.layers[axis_class] = [here]
            else:
                self.layers[axis_class].append(np.where(new[here], here, self.stays))

    def _fits(self, number: int, axis_class: int, new: Flags) -> bool:
        """Whether a class has the view's channels independently of those that it has already."""
        here, layers = self._of(number, axis_class), self.layers[axis_class]
        if not all(self.free[layer].all() for layer in layers):
            return False
        here = np.where(new[here], here, self.stays)
        _, before = np.unique(np.stack(layers), axis=1, return_inverse=True)
        _, then = np.unique(here, return_inverse=True)
        table = np.zeros((before.max() + 1, then.max() + 1), dtype=np.int64)
        np.add.at(table, (before.ravel(), then.ravel()), 1)
        expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True)
        return bool((table * len(here) == expected).all())
