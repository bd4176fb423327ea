"""The metadata that identifies the write that made an object (P11)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from fennflow.backends import WriteId
from fennflow.connectors import StoredObject

PREFIX = "fennflow_"
MAX_SEQ = 2**63 - 1
"""The integers that a database can hold."""

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CATALOG = re.compile(r"[!-.0-~]{1,128}")
_SEQ = re.compile(r"[1-9][0-9]{0,18}")
_TIME_ORDERED = 7
"""The version of UUIDs that begin with the time of their creation."""


class Stamp(NamedTuple):
    """Identifies the write that made an object.

    Attributes:
        write: the id of the write.
        content_type: the tag of its class. For people who look at the bucket: it is never read.
        sha256: of its bytes; also only for people.
        catalog_id: of the catalog that the transaction belongs to, if that outlives its process.
    """

    write: WriteId
    content_type: str | None = None
    sha256: str | None = None
    catalog_id: str | None = None


def stamped(metadata: Mapping[str, str], stamp: Stamp) -> dict[str, str]:
    """Return the user's metadata with the stamp added."""
    own = {"transaction": stamp.write.transaction_id, "seq": str(stamp.write.seq)}
    if stamp.content_type is not None:
        own["type"] = stamp.content_type
    if stamp.sha256 is not None:
        own["sha256"] = stamp.sha256
    if stamp.catalog_id is not None:
        own["catalog"] = stamp.catalog_id
    return {**metadata, **{PREFIX + name: value for name, value in own.items()}}


def unstampable() -> dict[str, str]:
    """Return metadata that, if the signature of an upload covers them, keep it from having a stamp."""
    return {PREFIX + "transaction": "none"}


def unstamped(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return only the user's metadata."""
    return {name: value for name, value in metadata.items() if not name.startswith(PREFIX)}


def stamp_of(stored: StoredObject) -> Stamp | None:
    """Return the stamp of an object; None if FennFlow did not write it.

    Anyone who can write to the bucket can set such metadata. So metadata that are not exactly as
    FennFlow writes them are not a stamp, and a stamp proves nothing: class and checksum are not
    read.
    """
    catalog_id = stored.metadata.get(PREFIX + "catalog")
    if catalog_id is not None and not is_catalog_id(catalog_id):
        return None
    write = checked_write(
        stored.metadata.get(PREFIX + "transaction", ""), stored.metadata.get(PREFIX + "seq", "")
    )
    return None if write is None else Stamp(write, catalog_id=catalog_id)


def is_catalog_id(text: str) -> bool:
    """Return whether a text can be the id of a catalog."""
    return _CATALOG.fullmatch(text) is not None


def is_transaction_id(text: str) -> bool:
    """Return whether a text can be the id of a transaction."""
    return _ID.fullmatch(text) is not None


def checked_write(transaction_id: str, seq: str) -> WriteId | None:
    """Return the id of a write; None if the texts are not valid parts of one."""
    if not is_transaction_id(transaction_id) or not _SEQ.fullmatch(seq) or int(seq) > MAX_SEQ:
        return None
    return WriteId(transaction_id, int(seq))


def began(transaction_id: str) -> datetime | None:
    """Return when a transaction began, by the clock of its process; None if its id has no time."""
    try:
        found = UUID(transaction_id)
    except ValueError:
        return None
    if found.version != _TIME_ORDERED:
        return None
    try:
        return datetime.fromtimestamp((found.int >> 80) / 1000, UTC)
    except (OverflowError, ValueError):
        return None  # the year is out of range


def made_by(stored: StoredObject | None, write: WriteId) -> bool:
    """Return whether an object was made by this write."""
    stamp = None if stored is None else stamp_of(stored)
    return stamp is not None and stamp.write == write
