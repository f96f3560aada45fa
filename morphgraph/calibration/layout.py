"""Where the samples of a run stand in a model's inputs.

An input either has an axis along which samples stand, its *batch axis*, or belongs to the run as a
whole. How many samples a run takes is open, or as many as the model says.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from morphgraph.onnx_io import DEFAULT_KEY
from morphgraph.onnx_io.inputs import takes

_BATCH = re.compile(r"[\w. -]*batch[\w. -]*|n|b|bs", re.IGNORECASE)
_NOT_BATCH = re.compile(
    r".*(seq|len|time|step|frame|token|node|edge|point|height|width|[+*/]).*|[tlshw]",
    re.IGNORECASE,
)
_DENOTATION = "DATA_BATCH"  # ONNX's word for such an axis


@dataclass(frozen=True)
class Layout:
    """How samples are laid out in the inputs of a run.

    Attributes:
        values: the inputs by name.
        axes: the batch axis of those that have one.
        batch: samples of a run; of an open batch 1, since runs of one sample can be joined.
        is_open: whether a run takes any number of samples.

    >>> x = ir.val("x", ir.DataType.FLOAT, ["N", 3, 8, 8])
    >>> layout = Layout.of(ir.Model(ir.Graph([x], [], nodes=[]), ir_version=10))
    >>> layout.axes, layout.batch, layout.is_open
    ({'x': 0}, 1, True)
    """

    values: Mapping[str, ir.Value]
    axes: Mapping[str, int]
    batch: int
    is_open: bool

    @classmethod
    def of(cls, model: ir.Model) -> "Layout":
        """The layout of a model.

        The batch axis is the one that is denoted or named so, else the first one where it is open
        and not named after something else. Where none is open, the first axis of the first input
        has as many samples as a run takes. Where there is an input of open sizes that has no such
        axis, as a list of edges, nobody can cut a run in samples: each is one as it is given.
        """
        values = takes(model)
        needed = {n: v for n, v in values.items() if DEFAULT_KEY not in v.meta}
        axes = {name: axis for name, v in values.items() if (axis := _open_axis(v)) is not None}
        if any(name in axes for name in needed):
            rest = (value for name, value in needed.items() if name not in axes)
            if all(isinstance(size, int) for value in rest for size in value.shape or ()):
                return cls(values, axes, 1, is_open=True)
            return cls(values, {}, 1, is_open=False)
        leads = dict(_leads(needed))
        batch = next(iter(leads.values()), 1)
        fixed = {name: 0 for name, lead in leads.items() if lead == batch}
        return cls(values, fixed, batch, is_open=False)

    @property
    def needed(self) -> list[str]:
        """The inputs that have no default, in order."""
        return [name for name, value in self.values.items() if DEFAULT_KEY not in value.meta]


def _open_axis(value: ir.Value) -> int | None:
    """The open axis along which samples stand."""
    sizes = list(value.shape or ())
    names = [size.value or "" if isinstance(size, ir.SymbolicDim) else None for size in sizes]
    for axis, name in enumerate(names):
        assert value.shape is not None
        if name is not None and value.shape.get_denotation(axis) == _DENOTATION:
            return axis
    for axis, name in enumerate(names):
        if name is not None and _BATCH.fullmatch(name):
            return axis
    first = names[0] if names else None
    return None if first is None or _NOT_BATCH.fullmatch(first) else 0


def _leads(needed: Mapping[str, ir.Value]) -> Iterator[tuple[str, int]]:
    """The size of the first axis of inputs whose samples have a shape.

    Three channels, height and width are one image.
    """
    for name, value in needed.items():
        sizes = list(value.shape or ())
        is_image = len(sizes) == 3 and sizes[0] == 3
        if len(sizes) > 1 and isinstance(sizes[0], int) and not is_image:
            yield name, sizes[0]
