"""A device profile as tables."""

import msgspec

from morphgraph.device import DeviceProfile
from morphgraph.device.predictor import ENOUGH
from morphgraph.report.tables import Report, number_column, plain, share, table_of
from morphgraph.version import __version__


class KindRow(msgspec.Struct, frozen=True):
    """One kind of kernel.

    Attributes:
        kind: what runs alike.
        measured: how many were.
        block: channels that are computed together; 1 where width costs evenly.
        error: spread of what the others predict of each measurement, as a share; one that is
            assumed where fewer than 5 were measured.
    """

    kind: str
    measured: int
    block: int
    error: float


class DeviceSummary(msgspec.Struct, frozen=True):
    """What a profile holds, as ``calibrate`` prints it."""

    runtime: str
    threads: int
    machine: str
    measured: str
    kernels: int
    minutes: float
    noise: float
    blocked_multiple: int
    kinds: list[KindRow]
    schema_version: int = 1
    tool_version: str = __version__


def device_report(profile: DeviceProfile) -> Report:
    """What was measured, and how well it predicts itself."""
    kinds = [
        KindRow(kind, model.count, model.block, model.error)
        for kind, model in sorted(
            profile.predictor.kinds.items(), key=lambda item: (-item[1].count, item[0])
        )
    ]
    summary = DeviceSummary(
        profile.runtime,
        profile.threads,
        profile.machine,
        profile.measured,
        len(profile.kernels),
        profile.minutes,
        profile.noise,
        profile.blocked_multiple,
        kinds,
    )
    table = table_of(
        kinds,
        ("kernels", lambda row: row.kind),
        (number_column("measured", plain), lambda row: row.measured),
        (number_column("block", plain), lambda row: row.block),
        (number_column("error", share), lambda row: row.error if row.measured >= ENOUGH else None),
    )
    head = [
        ("device", f"{profile.machine or 'unknown'}, {profile.threads} thread(s)"),
        ("runtime", ", ".join(f"{name} {v}" for name, v in profile.versions.items())),
        ("measured", f"{len(profile.kernels)} kernels in {profile.minutes:g} minutes"),
        ("noise", f"{profile.noise:.1%} of a network's time, from time to time"),
    ]
    return Report(summary, [table], head)
