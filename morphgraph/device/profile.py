"""Device profiles: what was measured on a device, as a file that costs can be computed from."""

import csv
import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from morphgraph.device.kernels import Kernel, channels_of_a_group, multiple_of
from morphgraph.device.predictor import Predictor, Settings
from morphgraph.errors import ModelError
from morphgraph.onnx_io import escape, write_atomically
from morphgraph.onnx_io.reading import from_json, read_bounded
from morphgraph.version import __version__

SCHEMA_VERSION = 1
_MOST = 2**50  # microseconds, bytes, and elements along an axis; no machine has so many
_MAX_KERNELS = 20_000  # fits take memory by the square of a kind's measurements
TABLE = "table"
"""The runtime of a profile that is a table of measurements made elsewhere."""


class Measurement(msgspec.Struct, frozen=True):
    """One kernel, as the runtime executed it, and how long it took.

    Attributes:
        op_type: as the runtime calls it.
        inputs, outputs: shapes of its tensors, weights included.
        microseconds: of one run.
        layout: of a convolution or a pooling ``"blocked"`` or ``"plain"`` where the runtime tells;
            else empty.
        around: bytes of weights and results of the network that it ran in; 0: not known.
        activation: the operator that is fused behind it, as ``"Clip"``; empty for none.
    """

    op_type: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    microseconds: float
    layout: str = ""
    around: float = 0.0
    activation: str = ""

    @property
    def kernel(self) -> Kernel:
        """What was measured, without the time."""
        return Kernel(
            self.op_type, self.layout, self.inputs, self.outputs, self.around, self.activation
        )


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True, eq=False):
    """What kernels cost on one machine in one runtime.

    Attributes:
        runtime: its name, as :func:`morphgraph.runtimes.find_runtime` takes it.
        threads: within an operator.
        kernels: what was measured.
        machine: the processor's name.
        versions: of this program and of the runtime.
        measured: the day.
        noise: spread of a network that was measured again and again, as a share.
        reference: microseconds of that network, in the middle: all measurements are of a machine at
            this speed. 0: not known.
        minutes: that the measuring took.
        settings: of the fits, by kind.
        blocked_multiple: convolutions run in blocks where the channels that they read are
            multiples of it; 1 where the runtime does not tell.
        blocked_below: and where they are fewer than so many, if each of them reads all.
        name: how costs call it, ``latency@NAME``.
    """

    runtime: str
    threads: int
    kernels: list[Measurement]
    machine: str = ""
    versions: dict[str, str] = {}
    measured: str = ""
    noise: float = 0.0
    reference: float = 0.0
    minutes: float = 0.0
    settings: dict[str, Settings] = {}
    blocked_multiple: int = 1
    blocked_below: int = 0
    name: str = "device"
    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__

    @cached_property
    def predictor(self) -> Predictor:
        """Run times of other kernels."""
        times = np.array([each.microseconds for each in self.kernels])
        return Predictor([each.kernel for each in self.kernels], times, self.settings)

    @cached_property
    def encoded(self) -> bytes:
        """The profile as JSON."""
        return msgspec.json.encode(self)

    @cached_property
    def pooled_multiple(self) -> int:
        """Poolings run in blocks where their channels are multiples of it; 1: not known."""
        pooled = [one for one in self.kernels if one.layout and one.op_type.endswith("Pool")]
        return multiple_of([(one.layout, one.inputs[0][1]) for one in pooled])

    @cached_property
    def grouped_multiple(self) -> int:
        """Convolutions in groups run in blocks where the channels of a group are multiples of it.

        Those that a group reads, and those that it makes; 1: not known.
        """
        found = [
            (one.layout, channels_of_a_group(one.kernel)) for one in self.kernels if one.layout
        ]
        return multiple_of([(layout, channels) for layout, channels in found if channels])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the profile as JSON.

        Raises:
            FileError: it cannot be written.
        """
        data = msgspec.json.format(self.encoded, indent=1)
        write_atomically(path, data + b"\n", overwrite=True)


def load_profile(path: str | PathLike[str]) -> DeviceProfile:
    """Read a profile that ``calibrate`` has written, or a table of measurements (``.csv``).

    A table has the columns ``op_type``, ``inputs``, ``outputs`` and ``microseconds``, and may have
    ``layout``, ``around`` and ``activation``; shapes are written ``1x3x224x224`` and separated by
    blanks.

    Raises:
        FileError: it cannot be read.
        ModelError: it is no profile, or has no measurements.
    """
    location = Path(path)
    where = escape(str(path))
    data = read_bounded(location, ModelError)
    if location.suffix.lower() == ".csv":
        profile = _from_table(data, where)
    else:
        try:
            profile = from_json(data, DeviceProfile)
        except ValueError as error:
            raise ModelError(
                f"{where}: is no device profile ({error}); `morphgraph calibrate` writes one"
            ) from None
        if profile.schema_version > SCHEMA_VERSION:
            raise ModelError(
                f"{where}: was written by a newer version ({profile.tool_version}); update this one"
            )
    return checked(msgspec.structs.replace(profile, name=location.stem), where)


def checked(profile: DeviceProfile, where: str) -> DeviceProfile:
    """The profile, if costs can be computed from it.

    Raises:
        ModelError: names the measurement that is none.
    """
    if not profile.kernels:
        raise ModelError(f"{where}: has no measurements; run `morphgraph calibrate` again")
    for place, each in enumerate(profile.kernels):
        sizes = [size for shape in (*each.inputs, *each.outputs) for size in shape]
        times_fit = 0 < each.microseconds < _MOST and 0 <= each.around < _MOST
        if not times_fit or any(not 0 <= size < _MOST for size in sizes):
            raise ModelError(
                f"{where}: measurement {place} ({escape(each.op_type)}) has a time or a size that "
                "is not positive, or beyond all machines; remove it"
            )
        if not each.op_type.strip():
            raise ModelError(f"{where}: measurement {place} names no operator; remove it")
    if len(profile.kernels) > _MAX_KERNELS:
        raise ModelError(
            f"{where}: {len(profile.kernels)} measurements are more than a profile can have "
            f"({_MAX_KERNELS}); keep the latest"
        )
    return profile


_COLUMNS = ("op_type", "inputs", "outputs", "microseconds")


def _from_table(data: bytes, where: str) -> DeviceProfile:
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ModelError(f"{where}: is no table ({error}); save it as CSV in UTF-8") from error
    missing = [name for name in _COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ModelError(f"{where}: has no column {', '.join(missing)}; see `calibrate --help`")
    return DeviceProfile(TABLE, 1, [_measurement(row, n, where) for n, row in enumerate(rows, 2)])


def _measurement(row: dict[str, Any], line: int, where: str) -> Measurement:
    try:
        return Measurement(
            row["op_type"],
            _shapes(row["inputs"]),
            _shapes(row["outputs"]),
            float(row["microseconds"]),
            row.get("layout") or "",
            float(row.get("around") or 0),
            row.get("activation") or "",
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{where}: line {line} is no measurement; write shapes as '1x3x8x8 16x3x3x3' and "
            "microseconds as a number"
        ) from error


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(size) for size in shape.split("x")) for shape in text.split())


def measurements(kernels: Sequence[Kernel], times: Iterable[float]) -> list[Measurement]:
    """Kernels with their times, as a profile holds them."""
    return [
        Measurement(k.op_type, k.inputs, k.outputs, float(time), k.layout, k.around, k.activation)
        for k, time in zip(kernels, times, strict=True)
    ]
