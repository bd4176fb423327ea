"""Garbage: what late requests and lost journals left in the buckets (P20 a, P27)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

import uuid_utils

from fennflow.backends import (
    AbortUpload,
    Commit,
    Delete,
    ObjectKey,
    Record,
    SessionToken,
    Step,
    Tombstone,
)
from fennflow.connectors import Location, PendingUpload, StoredObject
from fennflow.engine.concurrency import run_all
from fennflow.engine.leases import Lease, Leases
from fennflow.engine.settle import Parts, Settler
from fennflow.engine.stamps import made_by
from fennflow.exceptions import RecordLockedException

BURIED_AT_ONCE = 500
SWEPT_AT_ONCE = 1000
STAGING_PARTS = 3
OF_CONNECTORS = {"probe", "incoming"}
"""Where connectors keep under the reserved prefix what they are about to delete or to move."""


async def lock_free(
    leases: Leases, lease: Lease, keys: Sequence[ObjectKey], busy: list[ObjectKey]
) -> dict[ObjectKey, Record]:
    """Lock all keys that nobody is writing, note the others, and return the records of those."""
    try:
        return dict(await leases.stage(lease, keys, lambda _: ()))
    except RecordLockedException:
        if len(keys) == 1:
            busy += keys
            return {}
        half = len(keys) // 2
        first = await lock_free(leases, lease, keys[:half], busy)
        return first | await lock_free(leases, lease, keys[half:], busy)


async def bury(parts: Parts) -> int:
    """Delete what late requests left, now that no more can arrive, and return how many (P20 a)."""
    buried = 0
    last: Tombstone | None = None
    while due := await parts.backend.due_tombstones(after=last, limit=BURIED_AT_ONCE):
        last = due[-1]
        buried += await _bury(parts, due)
    return buried


async def _bury(parts: Parts, due: Sequence[Tombstone]) -> int:
    """Bury tombstones under the locks of their keys; those of keys in use have to wait."""
    lease = Lease(SessionToken(str(uuid_utils.uuid7())))
    busy: list[ObjectKey] = []
    keys = sorted({ObjectKey(each.namespace, each.key) for each in due})
    records = await lock_free(parts.leases, lease, keys, busy)
    free = [each for each in due if ObjectKey(each.namespace, each.key) not in set(busy)]
    if not free:
        return 0
    # If this fails the session is left to be claimed, and the tombstones stay. Its deletions are
    # journaled before they are sent, so that whoever claims it knows what may still arrive (P20 b).
    try:
        found = await run_all(
            parts.config.max_concurrency, partial(_garbage, parts, lease, records), free
        )
        garbage = [step for steps in found for step in steps]
        if garbage:
            await parts.backend.commit(lease.token, Commit(steps=garbage))
        else:
            await parts.backend.abort(lease.token)
        await Settler(parts, lease).settle(garbage, buried=free)
    finally:
        parts.leases.release(lease)
    return len(free)


async def _garbage(
    parts: Parts, lease: Lease, records: Mapping[ObjectKey, Record], tombstone: Tombstone
) -> Sequence[Delete]:
    """Return the deletions of what carries a session and sequence, and is no record's."""
    namespace, key = tombstone.namespace, tombstone.key
    record = records.get(ObjectKey(namespace, key))
    versioned = (await parts.connector.capabilities(namespace)).versioned
    lease.check()
    if versioned:
        places = [each.location for each in await parts.connector.versions(namespace, key)]
    else:
        places = [Location(key)]
    garbage: list[Delete] = []
    for place in places:
        if record is not None and record.location == place:
            continue
        lease.check()
        there = await parts.connector.head(namespace, place)
        if made_by(there, tombstone.session_id, tombstone.seq):
            garbage.append(
                Delete(
                    namespace=namespace,
                    location=place,
                    owner=None if versioned else tombstone.seq,
                    owner_session=tombstone.session_id,
                )
            )
    return garbage


async def sweep(parts: Parts, namespace: str) -> tuple[int, int]:
    """Delete what lies under the reserved prefix and no session knows of (P27).

    Returns:
        how many objects were deleted and how many uploads aborted.
    """
    prefix = f"{parts.config.reserved_prefix}/"
    found: list[StoredObject | PendingUpload] = []
    objects = uploads = 0

    async def flush() -> None:
        nonlocal objects, uploads
        steps = await _swept(parts, namespace, found)
        # No lease guards this: what is deleted is named by its session, and nobody else's.
        await Settler(parts, Lease(SessionToken(""))).perform(steps)
        objects += sum(isinstance(step, Delete) for step in steps)
        uploads += sum(isinstance(step, AbortUpload) for step in steps)
        found.clear()

    for listing in (
        parts.connector.list(namespace, prefix),
        parts.connector.uploads(namespace, prefix),
    ):
        async for each in listing:
            found.append(each)
            if len(found) == SWEPT_AT_ONCE:
                await flush()
    await flush()
    return objects, uploads


async def _swept(
    parts: Parts, namespace: str, found: Sequence[StoredObject | PendingUpload]
) -> list[Step]:
    """Return what of a batch is garbage: it is old enough, and its session is gone."""
    config = parts.config
    now = time.time()
    versioned = (await parts.connector.capabilities(namespace)).versioned if found else False
    candidates: list[tuple[str, Step]] = []
    for each in found:
        key = each.location.key if isinstance(each, StoredObject) else each.key
        names = key.removeprefix(f"{config.reserved_prefix}/").split("/")
        own = len(names) == STAGING_PARTS and names[0] == parts.backend.catalog_id
        # Of what is another catalog's nothing is known, but that no session lives that long.
        brief = own or names[0] in OF_CONNECTORS
        age = config.doubt_period if brief else 2 * config.max_session_age
        if each.modified_at is None or now - each.modified_at.timestamp() < age:
            continue
        step: Step
        if isinstance(each, PendingUpload):
            step = AbortUpload(namespace=namespace, key=key, upload_id=each.upload_id)
        else:
            seq = int(names[2]) if own and versioned and names[2].isdecimal() else None
            owner_session = names[1] if seq is not None else None
            step = Delete(
                namespace=namespace,
                location=each.location,
                owner=seq,
                owner_session=owner_session,
            )
        candidates.append((names[1] if own else "", step))
    known = set(await parts.backend.known({session for session, _ in candidates if session}))
    return [step for session, step in candidates if session not in known]
