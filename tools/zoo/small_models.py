"""The small models of the onnx package: 140 files of old opsets, examined in one process."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from entry import Entry
from examine_file import FileExamination
from file_findings import FileFindings
from onnx import numpy_helper

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
FOLDERS = ("simple", "pytorch-operator", "pytorch-converted")


@dataclass
class SmallFindings:
    """The rows of all files."""

    name: str
    family: str
    rows: list[FileFindings] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)
    crashes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SmallFindings":
        """Of a stored row."""
        rows = [FileFindings.from_json(row) for row in data["rows"]]
        return cls(**{**data, "rows": rows})

    @property
    def holds(self) -> bool:
        """Whether every file is as wanted."""
        return bool(self.rows) and not self.crashes and all(row.holds for row in self.rows)

    @property
    def shortfalls(self) -> list[str]:
        """Every file's, after its name."""
        words = [f"{stage}: {error}" for stage, error in self.crashes.items()]
        return words + [f"{r.name}: {'; '.join(r.shortfalls)}" for r in self.rows if r.shortfalls]


@dataclass(frozen=True)
class SmallModels(Entry):
    """All files of a folder."""


def listed(folder: str) -> list[Path]:
    """The files of a folder; an entry's ``make``."""
    return sorted((DATA / folder).glob("*/model.onnx"))


SMALL: dict[str, Entry] = {
    f"onnx/{folder}": SmallModels(f"onnx/{folder}", "other", listed, {"folder": folder})
    for folder in FOLDERS
}


def blank(entry: Entry) -> SmallFindings:
    """No rows."""
    return SmallFindings(entry.name, entry.family)


def examine(entry: SmallModels, note: Callable[[SmallFindings], None]) -> SmallFindings:
    """Every file, planned at the lowest that it can reach."""
    found = blank(entry)
    for path in listed(**entry.options):
        row = FileFindings(path.parent.name, entry.family, path.parent.name, entry.name)
        found.rows.append(row)
        examine_one(row, path)
        note(found)
    return found


def examine_one(row: FileFindings, path: Path) -> FileFindings:
    """One file, with the inputs and outputs that come with it."""
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    feeds = dict(zip([value.name for value in inputs], _stored(path, "input", inputs)))
    expected = list(_stored(path, "output", graph.output))
    FileExamination(row, path, feeds, lambda _: None, expected, lowest=True).run()
    return row


def _stored(path: Path, which: str, values: Iterable[onnx.ValueInfoProto]) -> Iterator[Any]:
    """The tensors, or sequences of them, that are stored beside a model."""
    for index, value in enumerate(values):
        data = (path.parent / "test_data_set_0" / f"{which}_{index}.pb").read_bytes()
        if value.type.HasField("sequence_type"):
            yield numpy_helper.to_list(onnx.SequenceProto.FromString(data))
        else:
            yield numpy_helper.to_array(onnx.TensorProto.FromString(data))
