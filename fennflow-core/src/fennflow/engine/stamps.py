"""The metadata by which an object tells whose it is (P11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fennflow.connectors import StoredObject

PREFIX = "fennflow_"


class Stamp(NamedTuple):
    """Which write made an object, and what it holds."""

    session_id: str
    seq: int
    content_type: str | None = None
    sha256: str | None = None


def stamped(metadata: Mapping[str, str], stamp: Stamp) -> dict[str, str]:
    """Return the user's metadata with the stamp added."""
    own = {"session": stamp.session_id, "seq": str(stamp.seq)}
    if stamp.content_type is not None:
        own["type"] = stamp.content_type
    if stamp.sha256 is not None:
        own["sha256"] = stamp.sha256
    return {**metadata, **{PREFIX + name: value for name, value in own.items()}}


def unstamped(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the user's metadata alone."""
    return {name: value for name, value in metadata.items() if not name.startswith(PREFIX)}


def stamp_of(stored: StoredObject) -> Stamp | None:
    """Return the stamp of an object; None if FennFlow did not write it."""
    session_id = stored.metadata.get(PREFIX + "session")
    seq = stored.metadata.get(PREFIX + "seq", "")
    if session_id is None or not seq.isdecimal():
        return None
    return Stamp(
        session_id,
        int(seq),
        stored.metadata.get(PREFIX + "type"),
        stored.metadata.get(PREFIX + "sha256"),
    )


def made_by(stored: StoredObject | None, session_id: str, seq: int) -> bool:
    """Return whether an object was made by this write."""
    stamp = None if stored is None else stamp_of(stored)
    return stamp is not None and stamp[:2] == (session_id, seq)
