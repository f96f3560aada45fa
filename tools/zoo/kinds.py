"""The kinds of entries: how each is prepared and examined, and what its row is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import examine_file
import others
import peers
import prepare
import small_models
from decoders import DecoderEntry
from entry import Entry
from examine import Examination
from file_findings import DecoderFindings, FileFindings
from findings import Findings
from others import FileEntry
from peers import PeerEntry, PeerFindings
from small_models import SmallFindings, SmallModels

AnyFindings = Findings | FileFindings | SmallFindings | PeerFindings


@dataclass(frozen=True)
class Kind:
    """How the entries of a kind become rows.

    Attributes:
        prepare: the first process; stores what the second one needs. None where there is none.
        examine: the second; it notes its row after every stage.
        blank: the row before anything is known.
        from_json: a stored row.
        first_stage: what a crash of the first process is called.
    """

    prepare: Callable[[Any], None] | None
    examine: Callable[[Any, Callable[[Any], None]], Any]
    blank: Callable[[Any], Any]
    from_json: Callable[[dict[str, Any]], Any]
    first_stage: str = "export"


def _blank(entry: Entry) -> Findings:
    return Findings(entry.name, entry.family, structure_only=entry.structure_only)


_KINDS: dict[type[Entry], Kind] = {
    Entry: Kind(
        prepare.prepare,
        lambda entry, note: Examination(entry, note).run(),
        _blank,
        Findings.from_json,
    ),
    FileEntry: Kind(
        others.prepare_file,
        examine_file.examine_file,
        examine_file.blank,
        FileFindings.from_json,
        "treat",
    ),
    DecoderEntry: Kind(
        others.prepare_file,
        examine_file.examine_file,
        examine_file.blank,
        DecoderFindings.from_json,
        "treat",
    ),
    SmallModels: Kind(None, small_models.examine, small_models.blank, SmallFindings.from_json),
    PeerEntry: Kind(None, peers.examine, peers.blank, PeerFindings.from_json),
}


def kind_of(entry: Entry) -> Kind:
    """How this entry is handled."""
    return _KINDS[type(entry)]
