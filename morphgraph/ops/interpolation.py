"""Resize: the spatial axes are sampled anew."""

from collections.abc import Sequence

import numpy as np

from morphgraph.ops.lowering import TorchBuilder, fx
from morphgraph.ops.op import Description, Op, OpNode, Resizing, UnsupportedFormError, op
from morphgraph.ops.positions import OPEN_ADVICE, pass_axes

_ADVICE = (
    "export it with mode nearest, or linear or cubic (of coefficient -0.75) with half_pixel or "
    "align_corners, and without antialias"
)


@op("Resize", "Upsample")
class Resize(Op):
    """Space changes size; axes that keep theirs pass."""

    @staticmethod
    def describe(n: OpNode, *, axes: Sequence[int] | None = None) -> Description:
        if n.has(3) and n.const(3) is None and axes is None:
            raise UnsupportedFormError("Resize of all axes to sizes that are computed")
        description = Description()
        for axis, (size, out) in enumerate(zip(n.shape(0), n.out(), strict=True)):
            if size == out:
                pass_axes(description, n.shape(0), [(axis, axis)])
            else:
                description.pin(0, axis, size, "space")
                description.pin(~0, axis, out, "space")
        return description

    @staticmethod
    def resize(n: OpNode, new: Resizing, *, axes: Sequence[int] | None = None) -> None:
        sizes = n.const(3)
        if sizes is None:
            return
        out = new.shape(~0)
        follow = out if axes is None else [out[a] for a in axes]
        new.set_constant(3, np.array(follow, dtype=np.int64))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        antialias: int = 0,
        axes: Sequence[int] | None = None,
        coordinate_transformation_mode: str = "half_pixel",
        cubic_coeff_a: float = -0.75,
        exclude_outside: int = 0,
        keep_aspect_ratio_policy: str = "stretch",
        mode: str = "nearest",
        nearest_mode: str = "round_prefer_floor",
    ) -> "fx.Node":
        from torch import nn

        where = coordinate_transformation_mode
        factors = _scales(n, axes)
        if keep_aspect_ratio_policy != "stretch" or where == "tf_crop_and_resize":
            b.fail(n, f"{keep_aspect_ratio_policy}, {where}", _ADVICE)
        x = b.tensor(n, 0)
        if mode == "nearest" and b.open_axes(n, ~0) - {0, 1}:
            legacy = where == "asymmetric" and nearest_mode == "floor"
            exact = where == "half_pixel" and nearest_mode == "round_prefer_floor"
            whole = all(factor == int(factor) for factor in factors)
            if not legacy and not (exact and whole):
                b.fail(n, f"mode nearest with {where}, {nearest_mode} to an open size", OPEN_ADVICE)
            return _open_space(b, n, x, "nearest" if legacy else "nearest-exact", None)
        if mode == "nearest":
            return _nearest(b, n, x, factors, where, nearest_mode)
        space = n.shape(0)[2:], n.out()[2:]
        plain = not antialias and not exclude_outside and n.shape(0)[:2] == n.out()[:2]
        aligned = where == "align_corners"
        shrunk_to_one = where == "pytorch_half_pixel" and 1 in space[1]
        known = aligned or (where in ("half_pixel", "pytorch_half_pixel") and not shrunk_to_one)
        torch_modes = {"linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}
        rank = len(space[0])
        torch_mode = torch_modes.get(mode, ("", "", ""))[rank - 1] if 1 <= rank <= 3 else ""
        if not plain or not known or not torch_mode or (mode == "cubic" and cubic_coeff_a != -0.75):
            given = {"antialias": antialias, "exclude_outside": exclude_outside}
            how = ", ".join([where, *(name for name, flag in given.items() if flag)])
            how += f", cubic_coeff_a {cubic_coeff_a:g}" * (mode == "cubic")
            b.fail(n, f"mode {mode} with {how} on {rank} spatial axes", _ADVICE)
        if b.open_axes(n, ~0) - {0, 1}:
            return _open_space(b, n, x, torch_mode, aligned)
        exact = all(i * s == o for i, o, s in zip(*space, factors[2:], strict=True))
        size = {"size": space[1]} if exact else {"scale_factor": tuple(factors[2:])}
        return b.module(n, nn.Upsample(**size, mode=torch_mode, align_corners=aligned), x)


def _open_space(
    b: "TorchBuilder", n: OpNode, x: "fx.Node", torch_mode: str, aligned: bool | None
) -> "fx.Node":
    """To sizes that are computed from open ones, or by scales."""
    from torch.nn import functional as F

    given = b.constant(n, 2)
    if given is not None and given.size == len(n.out()):
        scales = tuple(given[2:].tolist())
        return b.call(F.interpolate, x, None, scales, mode=torch_mode, align_corners=aligned)
    found = b.numbers(n, 3)
    axes = n.ir.attributes.get("axes")
    if found is None:
        b.fail(n, "its sizes are computed from values")
    told = dict(zip(axes.as_ints() if axes else range(len(n.out())), found, strict=True))
    space = [told.get(axis, n.out()[axis]) for axis in range(2, len(n.out()))]
    return b.call(F.interpolate, x, tuple(space), mode=torch_mode, align_corners=aligned)


def _scales(n: OpNode, axes: Sequence[int] | None) -> list[float]:
    """Output over input size of every axis, as given or, where sizes are, as they result."""
    found = [out / size for size, out in zip(n.shape(0), n.out(), strict=True)]
    given = n.const(2)
    if given is not None and given.size:
        for axis, scale in zip(axes or range(len(found)), given.reshape(-1).tolist(), strict=True):
            found[axis] = scale
    return found


def _nearest(
    b: "TorchBuilder",
    n: OpNode,
    x: "fx.Node",
    scales: Sequence[float],
    where: str,
    rounding: str,
) -> "fx.Node":
    """Torch's own nearest modes where they choose the same positions, else a choice per axis."""
    from torch import nn

    picks = {
        axis: _nearest_positions(b, n, size, out, scale, where, rounding)
        for axis, (size, out, scale) in enumerate(zip(n.shape(0), n.out(), scales, strict=True))
        if size != out
    }
    if min(picks, default=2) >= 2 and len(n.shape(0)) <= 5:
        for mode, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
            same = (
                np.array_equal(pick, np.floor((np.arange(len(pick)) + shift) * ratio))
                for axis, pick in picks.items()
                for ratio in [np.float32(n.shape(0)[axis] / len(pick))]
            )
            if all(same):
                return b.module(n, nn.Upsample(size=n.out()[2:], mode=mode), x)
    for axis, pick in picks.items():
        index = b.positions(n, axis, pick)
        x = b.method("index_select", x, axis, index)
    return x


def _nearest_positions(
    b: "TorchBuilder", n: OpNode, size: int, out: int, scale: float, where: str, rounding: str
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """The input position of every output position (ONNX operator specification, Resize)."""
    at = np.arange(out, dtype=np.float32)
    factor = np.float32(scale)
    if where == "align_corners":
        source = at * np.float32(size - 1) / np.float32(max(out - 1, 1))
    elif where == "asymmetric":
        source = at / factor
    elif where == "tf_half_pixel_for_nn":
        source = (at + 0.5) / factor
    elif where in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
        source = (at + 0.5) / factor - 0.5
        if where == "pytorch_half_pixel" and out == 1:
            source = np.zeros_like(source)
        if where == "half_pixel_symmetric":
            source += size / 2 * (1 - out / (factor * size))
    else:
        b.fail(n, f"mode nearest with {where}", _ADVICE)
    downwards = rounding in ("floor", "round_prefer_ceil")
    shift = {"round_prefer_ceil": 0.5, "round_prefer_floor": -0.5}.get(rounding, 0.0)
    rounded = np.floor(source + shift) if downwards else np.ceil(source + shift)
    positions: np.ndarray[tuple[int], np.dtype[np.int64]] = np.clip(rounded, 0, size - 1).astype(
        int
    )
    return positions
