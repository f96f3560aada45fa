"""The device that a latency on the command line is of."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from morphgraph.cli.console import note

_Amount = TypeVar("_Amount")


def on_told_device(budget: Mapping[str, _Amount], device: Path | None) -> dict[str, _Amount]:
    """A budget whose latency is of a device; says so where nobody has named one.

    Raises:
        MorphError: there is no such cost or device.
    """
    from morphgraph.passes.analysis.cost import on_device, parse_cost

    parts = [part for kind in budget for part in parse_cost(kind)]
    if device is None and any(part.kind == "latency" and not part.device for part in parts):
        note(
            "no device is given: latency is that of a V100 by its data sheet; for this machine "
            "measure it, `morphgraph calibrate -o device.json`, and give --device device.json"
        )
    return on_device(budget, device)
