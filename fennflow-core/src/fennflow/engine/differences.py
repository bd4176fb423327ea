"""Decides what to do about an object and a record that differ: pure functions on frozen values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fennflow.backends import Delete, LateWrite, ObjectKey, Record, WriteId
from fennflow.connectors import StoredObject
from fennflow.connectors.headers import media_type_of
from fennflow.connectors.values import utc
from fennflow.engine.stamps import Stamp, began, stamp_of, unstamped
from fennflow.paths import StoragePath, fault_of
from fennflow.reports import Difference, Finding, ReconcileAction

if TYPE_CHECKING:
    from fennflow.config import ReconcileConfig
    from fennflow.exceptions import BaseConnectorException

_TOO_YOUNG = "its transaction began less than max_transaction_age ago and may still commit"
_LATE = "a transaction that did not commit wrote it, and the write arrived late"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a reconciliation decides.

    Args:
        settings: the user's.
        filling: whether the catalog had no record of the namespace at the start. Then all objects
            are adopted, since only records distinguish committed objects from orphans.
        dead_before: seconds since the epoch; no transaction that began earlier can commit (P27).
        catalog_id: of the catalog.
    """

    settings: ReconcileConfig
    filling: bool
    dead_before: float
    catalog_id: str

    def concerns(self, stamp: Stamp) -> bool:
        """Return whether an object may be this catalog's, according to its stamp."""
        ours = {None, self.catalog_id, *self.settings.adopt_catalogs}
        return stamp.catalog_id in ours

    def is_dead(self, stamp: Stamp) -> bool:
        """Return whether the transaction that a stamp names began too long ago to commit."""
        started = began(stamp.write.transaction_id)
        return started is not None and started.timestamp() < self.dead_before


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a key, and what to do about it.

    Args:
        finding: the entry for the report.
        record: the record to write.
        deletion: the deletion of the object.
        too_young: the settings name something to do, but the transaction that wrote the object may
            still commit.
    """

    finding: Finding
    record: Record | None = None
    deletion: Delete | None = None
    too_young: bool = False


def agree(stored: StoredObject | None, record: Record | None) -> bool:
    """Return whether an object and a record agree."""
    if record is not None and record.location.key != record.key:
        return True  # committed, but not yet copied to the key
    if stored is None or record is None:
        return stored is None and record is None
    return stored.etag == record.etag


def judge(
    key: ObjectKey,
    stored: StoredObject | None,
    record: Record | None,
    policy: Policy,
    *,
    write: WriteId,
    late_writes: Collection[LateWrite] = (),
) -> Verdict | None:
    """Return the verdict on one key; None if nothing is wrong.

    Objects of late writes and of other catalogs are never adopted.

    Args:
        key: which one.
        stored: the store's description of it, including its metadata.
        record: its record in the catalog.
        policy: how to decide.
        write: the write under which an adopted object is recorded.
        late_writes: the late writes of the key; objects that they name are garbage (P20 a).
    """
    if agree(stored, record):
        return None
    if stored is None:
        replaces = policy.settings.strategy == "replace"
        action = ReconcileAction.REMOVED if replaces else None
        return Verdict(_finding(key, Difference.MISSING, action))
    stamp = stamp_of(stored)
    if stamp is not None and not policy.concerns(stamp):
        finding = _finding(key, Difference.OTHER_CATALOG)
        return Verdict(replace(finding, catalog_id=stamp.catalog_id))
    late = stamp is not None and _late(key, stamp) in late_writes
    adopted = _adopted(key, stored, write)
    if record is not None:
        return _judge_changed(key, stored, stamp, record, adopted, policy, late=late)
    return None if late else _judge_unrecorded(key, stored, stamp, adopted, policy)


def _judge_changed(
    key: ObjectKey,
    stored: StoredObject,
    stamp: Stamp | None,
    record: Record,
    adopted: Record,
    policy: Policy,
    *,
    late: bool,
) -> Verdict:
    updated = replace(adopted, created_at=record.created_at)
    replaces = policy.settings.strategy == "replace" and not late
    if stamp is not None and stamp.write == record.write:
        # It is the recorded object with another ETag, which a store may assign when an object is
        # moved. A reader compares the bytes with the checksum in the catalog.
        same = replace(record, location=stored.location, etag=stored.etag)
        updated = same if stored.size == record.size else updated
    elif replaces and stamp is not None and not policy.is_dead(stamp):
        return Verdict(_finding(key, Difference.CHANGED, reason=_TOO_YOUNG), too_young=True)
    if not replaces:
        return Verdict(_finding(key, Difference.CHANGED, reason=_LATE if late else None))
    return Verdict(_finding(key, Difference.CHANGED, ReconcileAction.UPDATED), updated)


def _judge_unrecorded(
    key: ObjectKey, stored: StoredObject, stamp: Stamp | None, adopted: Record, policy: Policy
) -> Verdict:
    if stamp is not None:
        return _judge_orphan(key, stored, stamp, adopted, policy)
    takes = policy.filling or policy.settings.strategy != "fill_if_empty"
    action = ReconcileAction.INSERTED if takes else None
    return Verdict(_finding(key, Difference.UNKNOWN, action), adopted if takes else None)


def _judge_orphan(
    key: ObjectKey, stored: StoredObject, stamp: Stamp, adopted: Record, policy: Policy
) -> Verdict:
    orphans, dead = policy.settings.orphans, policy.is_dead(stamp)
    if policy.filling or (orphans == "adopt" and dead):
        return Verdict(_finding(key, Difference.ORPHAN, ReconcileAction.INSERTED), adopted)
    if orphans == "report":
        return Verdict(_finding(key, Difference.ORPHAN))
    if not dead:
        return Verdict(_finding(key, Difference.ORPHAN, reason=_TOO_YOUNG), too_young=True)
    # A version is deleted by its id, any other object only if it still carries the stamp.
    named = stored.location.version_id is not None
    deletion = Delete(
        namespace=key.namespace,
        location=stored.location,
        etag=None if named else stored.etag,
        owner=stamp.write,
    )
    finding = _finding(key, Difference.ORPHAN, ReconcileAction.DELETED)
    return Verdict(finding, deletion=deletion)


def _late(key: ObjectKey, stamp: Stamp) -> LateWrite:
    return LateWrite(namespace=key.namespace, key=key.key, write=stamp.write)


def _finding(
    key: ObjectKey,
    difference: Difference,
    action: ReconcileAction | None = None,
    reason: str | None = None,
) -> Finding:
    return Finding(key.namespace, StoragePath(key.key), difference, action, reason=reason)


def refused(key: ObjectKey) -> Verdict:
    """Return the verdict on an object whose key no record can have."""
    reason = f"its key {fault_of(key.key)}; give it another key"
    return Verdict(_finding(key, Difference.REFUSED, reason=reason))


def unreadable(key: ObjectKey, error: BaseConnectorException) -> Verdict:
    """Return the verdict on an object that the store does not describe."""
    return Verdict(_finding(key, Difference.UNREADABLE, reason=str(error)))


def _adopted(key: ObjectKey, stored: StoredObject, write: WriteId) -> Record:
    """Return a record for an object as it is stored now.

    Its stamp is not trusted: it is read as the class of its media type, and has no checksum.
    """
    modified_at = utc(stored.modified_at or datetime.now(UTC))
    return Record(
        namespace=key.namespace,
        key=key.key,
        location=stored.location,
        etag=stored.etag,
        size=stored.size,
        created_at=modified_at,
        modified_at=modified_at,
        write=write,
        **details_of(stored),
    )


def details_of(stored: StoredObject) -> dict[str, Any]:
    """Return the details in a record that a listing does not contain."""
    return {
        "media_type": media_type_of(stored.media_type),
        "metadata": _storable(unstamped(stored.metadata)),
        "headers": _storable(stored.headers),
    }


def _storable(texts: Mapping[str, str]) -> dict[str, str]:
    """Return texts of a foreign object as every database can store them: no NUL, no lone surrogates."""

    def clean(text: str) -> str:
        return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()

    return {clean(name): clean(value) for name, value in texts.items()}
