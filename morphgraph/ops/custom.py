"""Operators that users teach: ``register``, and files that call it (``--ops my_ops.py``)."""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from morphgraph.arrays import Shape
from morphgraph.errors import ArgumentError, FileError
from morphgraph.notation import Axis, NotationError, Star, parse, result_shapes
from morphgraph.onnx_io import escape
from morphgraph.ops.op import (
    Description,
    Op,
    OpNode,
    Resizing,
    UnsupportedFormError,
    from_line,
    lookup,
    op,
    unregister,
)


def register(
    name: str,
    line: str,
    *,
    macs: str | None = None,
    statistical: str = "",
    contracted: str = "",
    gate: bool = False,
    prefer: str = "",
    sizes: Mapping[str, str] | None = None,
    shape: Callable[..., Shape | Sequence[Shape | None]] | None = None,
    resize: Callable[..., None] | None = None,
    lower: Callable[..., Any] | None = None,
) -> None:
    """Describe an operator by one line of factor notation.

    The functions get the node's attributes as keyword-only parameters of the attributes' names, or
    all of them where they take ``**attributes``.

    Args:
        name: ``"Type"`` or ``"domain::Type"``.
        line: factor notation (see :mod:`morphgraph.notation`).
        macs: the factors whose product is its multiply-add count, such as ``"N i o"``, or a sum of
            such products, ``"N i h + N h o"``; none: free.
        statistical: factors over which it normalizes or competes.
        contracted: factors that it sums over, a zero contributing nothing.
        gate: its operands multiply.
        prefer: factors, best first, to shrink where several share an axis.
        sizes: per factor the attribute that holds its size, ``{"g": "groups"}``; the attribute
            follows when the factor is resized.
        shape: the shapes of its results, ``shape(*operand_shapes, **attributes)``: one, or a list.
            Needed where neither the line nor the model's ``value_info`` tells them.
        resize: updates what else holds a size, ``resize(node, new, **attributes)``, with ``new`` a
            :class:`~morphgraph.ops.op.Resizing`. Weights are sliced without it.
        lower: how it becomes torch, ``lower(builder, node, **attributes)``; needed to train it.

    The same statement may run again, and so may a notebook's cell: it describes the operator anew.

    >>> register("com.acme::Gate", "N c *S, c -> N c *S")
    >>> from morphgraph.ops import entry_of
    >>> entry_of("Gate", "com.acme").shape((1, 8, 4, 4), (8,))
    [(1, 8, 4, 4)]
    >>> unregister("Gate", "com.acme")  # so that this example leaves nothing behind

    Raises:
        NotationError: the line cannot be read, or has no factor of a name that is given.
        ValueError: the operator has an entry already, from elsewhere.
    """
    held = dict(sizes or {})
    counted = (macs or "").replace("+", " ")
    _check_names(line, " ".join([counted, statistical, contracted, prefer, *held]))
    domain, _, op_type = name.rpartition("::")
    origin = _caller()
    _make_way(op_type, domain, origin)

    def describe(n: OpNode, **attributes: Any) -> Description:
        return from_line(
            n,
            line,
            _known(held, attributes),
            macs=macs,
            contracted=contracted,
            statistical=statistical,
            prefer=prefer,
            gate=gate,
        )

    def follow(n: OpNode, new: Resizing) -> None:
        for factor, attribute in held.items():
            new.set_attribute(attribute, new.size(factor))
        if resize is not None:
            Op.call(resize, n.ir, n, new)

    def derive(*operands: Shape | None, **attributes: Any) -> Sequence[Shape | None]:
        return result_shapes(line, operands, _known(held, attributes))

    members = {
        "describe": staticmethod(describe),
        "shape": staticmethod(shape or derive),
        "resize": staticmethod(follow) if held or resize is not None else None,
        "lower": None if lower is None else staticmethod(lower),
        "origin": origin,
        "__doc__": line,
    }
    op(op_type, domain=domain)(type(op_type, (Op,), members))


def _check_names(line: str, names: str) -> None:
    """Refuse a factor that the line does not have."""
    notation = parse(line)
    axes = [axis for operand in (*notation.inputs, *notation.outputs) for axis in operand or ()]
    known = {f"*{axis.name}" for axis in axes if isinstance(axis, Star)}
    known |= {factor for axis in axes if isinstance(axis, Axis) for factor in axis.factors}
    for name in names.split():
        if name not in known:
            raise NotationError(f"{line!r} has no factor {name!r}")


def _known(held: Mapping[str, str], attributes: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of the factors that attributes hold."""
    for attribute in held.values():
        if not isinstance(attributes.get(attribute), int):
            raise UnsupportedFormError(f"attribute '{attribute}' holds no size")
    return {factor: attributes[attribute] for factor, attribute in held.items()}


def _caller() -> str:
    """File and line of the code that called ``register``."""
    frame = traceback.extract_stack(limit=3)[0]
    return f"{frame.filename}:{frame.lineno}"


def _make_way(op_type: str, domain: str, origin: str) -> None:
    """Drop an earlier registration by the same statement, or by a session that has no file.

    Raises:
        ValueError: the operator has an entry from elsewhere.
    """
    entry = lookup(op_type, domain)
    if entry is None:
        return
    file = entry.origin.rpartition(":")[0]
    if not file or (entry.origin != origin and Path(file).exists()):
        where = f"made in {entry.origin}" if file else "of the program's own"
        raise ValueError(f"{domain or 'ai.onnx'}::{op_type} has an entry already, {where}")
    unregister(op_type, domain)


def load_ops(path: str | os.PathLike[str]) -> None:
    """Run a Python file that registers operators. Its folder can be imported from meanwhile.

    Raises:
        FileError: there is no such file.
        ArgumentError: the file is no Python, or raises an error; says where.
    """
    file = Path(path).resolve()
    shown = escape(os.fspath(path))
    if not file.is_file():
        raise FileError(f"{shown}: there is no such file; give a Python file that registers")
    name = f"morphgraph_ops_{file.stem}"
    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(file)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as import does: dataclasses and inspect look there
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ArgumentError(
            f"{shown}{_line(error, file)}: {type(error).__name__}: {error}; correct the file"
        ) from error
    finally:
        sys.path.remove(str(file.parent))


def _line(error: Exception, file: Path) -> str:
    """``:12`` where an error passed through the file's line 12; the last such line."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f":{error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(file)
    ]
    return f":{lines[-1]}" if lines else ""
