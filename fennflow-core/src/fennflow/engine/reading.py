"""Reading and listing inside a transaction: the catalog decides, the objects follow (P29)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fennflow.backends import ObjectKey, Record
from fennflow.engine.concurrency import run_all
from fennflow.engine.details import detailed
from fennflow.engine.plan import live
from fennflow.engine.streaming import sha256_of
from fennflow.engine.transaction import Transaction
from fennflow.exceptions import (
    ChecksumMismatchException,
    NoSuchKeyException,
    ObjectChangedException,
    PreconditionFailedException,
)
from fennflow.paths import after_key, after_prefix

READ_ATTEMPTS = 3
FIRST_CHUNK = 64
"""Records to read at first where a delimiter may roll up most of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page of a listing.

    Args:
        records: what the transaction sees, in key order.
        prefixes: rolled up by the delimiter, in order.
        start: where the next page starts; None on the last.
    """

    records: Sequence[Record]
    prefixes: Sequence[str]
    start: str | None

    @property
    def keys(self) -> list[str]:
        """The keys of the records."""
        return [record.key for record in self.records]


class _MovedError(Exception):
    """A record's location holds nothing, or something else."""


async def read(
    tx: Transaction, namespace: str, keys: Sequence[str], *, missing_ok: bool
) -> Sequence[tuple[Record, bytes]]:
    """Return the files of keys, all from one moment, in the order asked (P29, I9).

    Raises:
        NoSuchKeyException: not `missing_ok`, and some keys have nothing; names them all.
        ObjectChangedException: an object was changed outside FennFlow.
        ChecksumMismatchException: the bytes are not those that were committed.
    """
    moved = _MovedError()
    for _ in range(READ_ATTEMPTS):
        view = await tx.read_records(namespace, keys, missing_ok=missing_ok)
        records = {record.key: record for record in view if record is not None}
        try:
            found = await run_all(tx.config.max_concurrency, partial(_fetch, tx), records.values())
        except _MovedError as error:
            moved = error
            continue
        new = [each for each, _ in found if records[each.key].only_listed]
        if new:
            await tx.backend.add_details(new)
        by_key = dict(zip(records, found, strict=True))
        return [by_key[key] for key in keys if key in records]
    message = (
        f"{moved} It was changed or deleted outside FennFlow. "
        "Put it again, or reconcile the catalog with the bucket."
    )
    raise ObjectChangedException(message) from moved


async def _fetch(tx: Transaction, record: Record) -> tuple[Record, bytes]:
    name = f"{record.namespace}/{record.key}"
    try:
        async with tx.slots:
            stored, body = await tx.connector.get(
                record.namespace, record.location, if_match=record.etag
            )
    except (NoSuchKeyException, PreconditionFailedException) as error:
        message = f"{name} differs from its record in the catalog."
        raise _MovedError(message) from error
    if stored.etag != record.etag:
        message = f"{name} has the ETag {stored.etag}; the catalog has {record.etag}."
        raise _MovedError(message)
    if record.sha256 is not None and await sha256_of(body) != record.sha256:
        message = (
            f"{name} differs from what was committed: its SHA-256 is not {record.sha256}. "
            "Restore it from a backup, or put it again."
        )
        raise ChecksumMismatchException(message)
    return detailed(tx, record, stored), body


async def page(
    tx: Transaction,
    namespace: str,
    *,
    prefix: str,
    start: str,
    limit: int,
    delimiter: str | None,
) -> Page:
    """Return up to `limit` keys and rolled-up prefixes in key order, from the catalog alone."""
    await tx.prepare_read(namespace)
    found: list[Record] = []
    prefixes: list[str] = []
    cursor: str | None = max(start, prefix)
    size = limit + 1 if delimiter is None else min(FIRST_CHUNK, limit + 1)
    while cursor is not None:
        before = len(found) + len(prefixes)
        chunk, cursor = await _chunk(tx, namespace, prefix, cursor, size)
        skip_until = ""
        for key, record in chunk:
            if key < skip_until:
                continue
            if len(found) + len(prefixes) == limit:
                return Page(records=found, prefixes=prefixes, start=key)
            end = -1 if delimiter is None else key.find(delimiter, len(prefix))
            if delimiter is None or end < 0:
                found.append(record)
                continue
            common = key[: end + len(delimiter)]
            prefixes.append(common)
            following = after_prefix(common)
            if following is None:
                return Page(records=found, prefixes=prefixes, start=None)
            skip_until = following
        if cursor is not None:
            # What the last prefix rolls up is not read.
            cursor = max(cursor, skip_until)
            # Many names in this chunk promise as many in the next one.
            names = len(found) + len(prefixes) - before
            size = min(max(size, 2 * names), limit + 1)
    return Page(records=found, prefixes=prefixes, start=None)


async def _chunk(
    tx: Transaction, namespace: str, prefix: str, start: str, limit: int
) -> tuple[list[tuple[str, Record]], str | None]:
    """Return what the transaction sees of a stretch of keys, and where the next one starts."""
    records = await tx.backend.scan(namespace, prefix=prefix, start=start, limit=limit)
    following = after_key(records[-1].key) if len(records) == limit else None
    own = tx.own_keys(namespace, start, following or after_prefix(prefix), limit + 1)
    if len(own) > limit:
        following = own[limit]
        own = own[:limit]
    seen: dict[str, Record] = {}
    for record in records:
        if following is None or record.key < following:
            tx.note_read(record.object_key, record)
            seen[record.key] = record
    for key in own:
        write = live(tx.chain(ObjectKey(namespace, key)))
        if write is not None and write.record is not None:
            seen[key] = write.record
        elif write is not None:
            seen.pop(key, None)
    return sorted(seen.items()), following
