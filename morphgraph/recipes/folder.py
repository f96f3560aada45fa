"""A run folder: what identifies the run, its events, and checkpoints to resume from.

    run.json        what the run is of: settings, and hashes of the model and the data
    events.jsonl    what happened, one line each, as it happened
    checkpoints/    one file per phase, until the run is finished

Of several processes that train together only the first one writes.

A run that was killed is repeated from the start, but for the training: phases resume from their
checkpoints. All else follows from those and takes little time. So events that are logged already
occur again; the log takes each of them once.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from morphgraph.errors import ArgumentError, FileError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape, save, write_atomically
from morphgraph.onnx_io.fixed import fixed_values
from morphgraph.onnx_io.reading import read_bounded
from morphgraph.plans import readable_json, structure_hash
from morphgraph.recipes.checkpoint import Checkpoint
from morphgraph.recipes.data import Dataset
from morphgraph.recipes.lock import FolderLock
from morphgraph.train import distributed
from morphgraph.version import __version__

Event = Mapping[str, Any]

_IDENTITY = ("event", "phase", "number", "name", "step")  # what tells one event from another
_REFUSED = ("settings", "model", "data")  # what must be the same to resume a run


class RunFolder:
    """A folder that one run writes to.

    Args:
        path: made if missing.
        manifest: what identifies the run, as :func:`manifest_of` says it.
        files: names of files and folders of a run; those of an earlier one are removed.
        overwrite: whether an earlier run may be replaced.
        resume: continue the run in the folder, or begin one if there is none.
        every: seconds between two checkpoints within an epoch.
        on_event: called with every event as it is logged.

    Raises:
        ArgumentError: what is to be resumed is another run; names what differs.
        FileError: the folder holds a run already, another one writes to it now, or it cannot be
            written.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        files: tuple[str, ...],
        *,
        overwrite: bool = False,
        resume: bool = False,
        every: float = 60.0,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.path = path
        self.every = every
        self.on_event = on_event
        self._logged: set[tuple[str, ...]] = set()
        self._before = 0.0  # seconds that earlier sessions took
        self._began = time.monotonic()
        self.warnings: list[str] = []
        make_folder(path)
        self._lock = FolderLock(path)
        try:
            known = _read_json(path / "run.json") if resume else None
            if known is None:
                self._make(files, overwrite)
                self.write("run.json", readable_json(manifest))
            else:
                self.warnings = _compare(path, known, manifest)
                self._go_on()
        except BaseException:
            self.close()
            raise

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, sessions that were killed included."""
        return self._before + time.monotonic() - self._began

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return (self.path / "result.json").exists()

    def log(self, event: str, **fields: object) -> None:
        """Append an event to the log, unless it is there already, and report it."""
        entry = {"event": event, "at": round(self.seconds, 2), **fields}
        key = _key(entry)
        if key in self._logged:
            return
        self._logged.add(key)
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")
        if self.on_event is not None:
            self.on_event(entry)

    def save(self, model: ir.Model, name: str) -> None:
        """Write a model of the run; it appears whole or not at all."""
        save(model, self.place(name), overwrite=True)

    def tell(self, event: str) -> None:
        """Report an event that is no part of the log."""
        if self.on_event is not None:
            self.on_event({"event": event, "folder": str(self.path)})

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run; it appears whole or not at all."""
        place = self.place(name)
        write_atomically(place, content, overwrite=True)

    def place(self, name: str) -> Path:
        """The path of a file of the run, its folder made."""
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.close()

    def checkpoint(self, phase: str) -> Checkpoint:
        """Where a phase keeps its state."""
        return Checkpoint(self.place(f"checkpoints/{phase}.pt"), self.every)

    def finish(self, result: bytes) -> None:
        """Write ``result.json``; remove the checkpoints."""
        self.log("done", seconds=round(self.seconds, 1))
        self.write("result.json", result)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def _make(self, files: tuple[str, ...], overwrite: bool) -> None:
        earlier = [place for name in files for place in self.path.glob(name)]
        if earlier and not overwrite:
            raise FileError(
                f"{escape(str(self.path))}: holds a run already; go on with it by --resume, or "
                "give another folder or --overwrite"
            )
        # Not every run writes all files; what stayed would look like its own.
        for place in earlier:
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()

    def _go_on(self) -> None:
        """Delete half-written files, and read which events are logged."""
        for folder, _, names in os.walk(self.path):
            for name in names:
                if name.startswith(".") and _is_ours(name):
                    (Path(folder) / name).unlink()
        place = self.path / "events.jsonl"
        text = place.read_text(encoding="utf-8", errors="replace") if place.exists() else ""
        entries = list(_whole_lines(text))
        write_atomically(place, "".join(json.dumps(e) + "\n" for e in entries), overwrite=True)
        self._logged = {_key(entry) for entry in entries}
        self._before = max((float(entry.get("at", 0.0)) for entry in entries), default=0.0)
        if self.finished:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        else:
            times = sum(entry["event"] == "resumed" for entry in entries)
            self.log("resumed", number=times + 1)


class SecondaryRunFolder:
    """The run folder of all processes but the first: nothing is written."""

    warnings: tuple[str, ...] = ()
    seconds = 0.0

    def _nothing(self, *_: object, **_fields: object) -> None:
        """Do nothing: the first process writes and reports."""

    log = tell = write = save = finish = close = _nothing

    def checkpoint(self, phase: str) -> Checkpoint:
        """Of the phase; states come from the first process, which alone reads and saves them."""
        return Checkpoint(Path(f"{phase}.pt"))


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        FileError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{escape(str(path))}: {error.strerror}; give a folder that can be written"
        ) from None


def open_folder(
    make: Callable[[], RunFolder],
) -> tuple[RunFolder | SecondaryRunFolder, bytes | None]:
    """The folder for this process, and the run's result where the run is finished already.

    Raises:
        ArgumentError, FileError: as for :class:`RunFolder`, on all processes.
    """
    folders: list[RunFolder | SecondaryRunFolder] = [SecondaryRunFolder()]

    def first() -> bytes | None:
        folders[0] = folder = make()
        return (folder.path / "result.json").read_bytes() if folder.finished else None

    result = distributed.from_first(first)
    return folders[0], result


def manifest_of(
    graph: ChannelGraph, dataset: Dataset, settings: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """What identifies a run, and the environment on which its last digits depend."""
    fixed = fixed_values(graph.model)  # in the hashes, too: here so that a refusal can name it
    return {
        "schema_version": 1,
        "settings": dict(settings),
        "model": {
            **({"fixed": fixed} if fixed else {}),
            "structure": structure_hash(graph),
            "weights": _weights_hash(graph),
        },
        "data": {"name": dataset.name, "sha256": _data_hash(dataset)},
        "environment": {
            "morphgraph": __version__,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "processes": distributed.size(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        },
    }


def _weights_hash(graph: ChannelGraph) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(graph.model.graph.initializers.items()):
        digest.update(name.encode(errors="backslashreplace"))
        if value.const_value is not None:
            digest.update(value.const_value.tobytes())
    return digest.hexdigest()


def _data_hash(dataset: Dataset) -> str:
    digest = hashlib.sha256(repr((dataset.classes, dataset.preprocessing)).encode())
    for array in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        digest.update(repr((array.shape, str(array.dtype))).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _compare(path: Path, known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Warnings about another environment; another model, other data or settings are refused."""
    asked = json.loads(json.dumps(now))
    differences = [
        f"{section}.{name} was {old}, is {new}"
        for section in _REFUSED
        for name, old, new in _differences(known.get(section, {}), asked[section])
    ]
    if differences:
        raise ArgumentError(
            f"{escape(str(path))}: is another run: {escape('; '.join(differences[:4]))}; "
            "resume with what it began with, or give another folder"
        )
    return [
        f"{name} was {old}, is {new}: the last digits may differ from those of a run that was not "
        "stopped"
        for name, old, new in _differences(known.get("environment", {}), asked["environment"])
    ]


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield name, _short(old), _short(new)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _key(entry: Event) -> tuple[str, ...]:
    return tuple(str(entry.get(name, "")) for name in _IDENTITY)


def _is_ours(name: str) -> bool:
    """Whether a hidden file is the remainder of a write that was cut short."""
    return any(f"{ending}." in name for ending in (".json", ".jsonl", ".onnx", ".pt"))


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    """The events of a log up to a line that was cut short."""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(entry, dict) or "event" not in entry:
            return
        yield entry


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(read_bounded(path, FileError))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise FileError(f"{escape(str(path))}: is no run.json of a run; begin with --overwrite")
    return content
