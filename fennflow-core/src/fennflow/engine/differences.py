"""What to do about an object and a record that differ: pure decisions on frozen values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fennflow.backends import Delete, ObjectKey, Record, Tombstone
from fennflow.connectors import StoredObject
from fennflow.engine.stamps import Stamp, began, stamp_of, unstamped
from fennflow.exceptions import KeyException
from fennflow.objects import media_type_of, utc
from fennflow.paths import StoragePath, check_key
from fennflow.reports import Difference, Finding, ReconcileAction

if TYPE_CHECKING:
    from fennflow.config import ReconcileConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a reconciliation decides.

    Args:
        settings: the user's.
        filling: whether the catalog had no record of the namespace at the start. Then all objects
            are taken: what FennFlow wrote is told from an orphan by its record alone.
        dead_before: seconds since the epoch; no session that began earlier can commit (P27).
        session_id: of the session that changes the catalog.
    """

    settings: ReconcileConfig
    filling: bool
    dead_before: float
    session_id: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong under a key, and what is to be done about it.

    Args:
        finding: for the report.
        record: to write.
        deletion: of the object.
    """

    finding: Finding
    record: Record | None = None
    deletion: Delete | None = None


def agree(stored: StoredObject | None, record: Record | None) -> bool:
    """Return whether there is nothing to say of an object and a record."""
    if record is not None and record.location.key != record.key:
        return True  # committed, and still on its way to the key
    if stored is None or record is None:
        return stored is None and record is None
    return stored.etag == record.etag


def judge(
    key: ObjectKey,
    stored: StoredObject | None,
    record: Record | None,
    policy: Policy,
    *,
    seq: int,
    tombstones: Collection[Tombstone] = (),
) -> Verdict | None:
    """Decide about one key; None if nothing is wrong.

    Args:
        key: which one.
        stored: what the store says of it, its metadata included.
        record: what the catalog says.
        policy: how to decide.
        seq: with the policy's session the identity of a record of what FennFlow did not write.
        tombstones: of the key; what they name is garbage that arrived late (P20 a).
    """
    if agree(stored, record):
        return None
    replaces = policy.settings.strategy == "replace"
    if stored is None:
        action = ReconcileAction.REMOVED if replaces else None
        return Verdict(_finding(key, Difference.MISSING, action))
    stamp = stamp_of(stored)
    adopted = _adopted(key, stored, stamp or Stamp(policy.session_id, seq))
    if record is not None:
        if not replaces:
            return Verdict(_finding(key, Difference.CHANGED))
        updated = replace(adopted, created_at=record.created_at)
        return Verdict(_finding(key, Difference.CHANGED, ReconcileAction.UPDATED), updated)
    return _judge_unrecorded(key, stored, stamp, adopted, policy, tombstones)


def _judge_unrecorded(
    key: ObjectKey,
    stored: StoredObject,
    stamp: Stamp | None,
    adopted: Record,
    policy: Policy,
    tombstones: Collection[Tombstone],
) -> Verdict | None:
    try:
        check_key(key.key)
    except KeyException:
        return Verdict(_finding(key, Difference.REFUSED))
    if stamp is None:
        takes = policy.filling or policy.settings.strategy != "fill_if_empty"
        action = ReconcileAction.INSERTED if takes else None
        return Verdict(_finding(key, Difference.UNKNOWN, action), adopted if takes else None)
    late = Tombstone(
        namespace=key.namespace, key=key.key, session_id=stamp.session_id, seq=stamp.seq
    )
    return None if late in tombstones else _judge_orphan(key, stored, stamp, adopted, policy)


def _judge_orphan(
    key: ObjectKey, stored: StoredObject, stamp: Stamp, adopted: Record, policy: Policy
) -> Verdict:
    started = began(stamp.session_id)
    dead = started is not None and started.timestamp() < policy.dead_before
    orphans = policy.settings.orphans if dead else "report"
    if policy.filling or orphans == "adopt":
        return Verdict(_finding(key, Difference.ORPHAN, ReconcileAction.INSERTED), adopted)
    if orphans == "report":
        return Verdict(_finding(key, Difference.ORPHAN))
    # A version is named by its id; any other object goes only if it still carries the stamp.
    named = stored.location.version_id is not None
    deletion = Delete(
        namespace=key.namespace,
        location=stored.location,
        etag=None if named else stored.etag,
        owner=None if named else stamp.seq,
        owner_session=stamp.session_id,
    )
    finding = _finding(key, Difference.ORPHAN, ReconcileAction.DELETED)
    return Verdict(finding, deletion=deletion)


def _finding(
    key: ObjectKey, difference: Difference, action: ReconcileAction | None = None
) -> Finding:
    return Finding(key.namespace, StoragePath(key.key), difference, action)


def _adopted(key: ObjectKey, stored: StoredObject, stamp: Stamp) -> Record:
    """Return the record of an object as it lies there."""
    modified_at = utc(stored.modified_at or datetime.now(UTC))
    return Record(
        namespace=key.namespace,
        key=key.key,
        location=stored.location,
        etag=stored.etag,
        size=stored.size,
        media_type=media_type_of(stored.media_type),
        content_type=stamp.content_type,
        sha256=stamp.sha256,
        metadata=unstamped(stored.metadata),
        headers=stored.headers,
        created_at=modified_at,
        modified_at=modified_at,
        session_id=stamp.session_id,
        seq=stamp.seq,
    )
