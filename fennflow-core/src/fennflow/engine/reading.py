"""Reading and listing inside a transaction: the catalog decides what exists, the store has the bytes (P29)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fennflow.backends import ObjectKey, Record
from fennflow.engine.concurrency import run_all
from fennflow.engine.details import detailed
from fennflow.engine.plan import live, visible
from fennflow.engine.streaming import sha256_of
from fennflow.engine.transaction import Transaction
from fennflow.exceptions import (
    ChecksumMismatchException,
    NoSuchKeyException,
    ObjectChangedException,
    PreconditionFailedException,
)
from fennflow.paths import after_name, after_prefix, next_name, rolled_up

READ_ATTEMPTS = 3
FEW, MANY = 64, 1000
"""Records to read at once where those that stand for others are deleted here, and at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page of a listing.

    Args:
        records: what the transaction sees, in key order.
        prefixes: rolled up by the delimiter, in order.
        start: where the next page starts; None on the last page.
    """

    records: Sequence[Record]
    prefixes: Sequence[str]
    start: str | None

    @property
    def keys(self) -> list[str]:
        """The keys of the records."""
        return [record.key for record in self.records]


class _MovedError(Exception):
    """A record's location has no object, or another one."""


async def read(
    tx: Transaction, namespace: str, keys: Sequence[str], *, missing_ok: bool
) -> Sequence[tuple[Record, bytes]]:
    """Return the files of keys, all from one moment, in the order of the keys (P29, I9).

    Raises:
        NoSuchKeyException: some keys have no record, and `missing_ok` is False; the message names
            them all.
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
    listing = _Listing(tx, namespace, prefix, delimiter)
    names: dict[str, Record] = {}
    cursor: str | None = max(start, prefix)
    size, one_by_one = limit + 1, False
    while cursor is not None and len(names) <= limit:
        chunk, cursor, hidden = await listing.chunk(cursor, size, one_by_one=one_by_one)
        names |= chunk
        if cursor is not None and chunk:
            following = after_name(next(reversed(chunk.values())).key, prefix, delimiter)
            cursor = None if following is None else max(cursor, following)
        one_by_one = hidden or (one_by_one and not chunk)
        # If some are deleted, more may be.
        size = FEW if hidden else min(2 * size, max(limit + 1, MANY))
    found = list(names.items())
    return Page(
        records=[record for name, record in found[:limit] if name == record.key],
        prefixes=[name for name, record in found[:limit] if name != record.key],
        start=found[limit][1].key if len(found) > limit else None,
    )


@dataclass(frozen=True, slots=True)
class _Listing:
    """A listing of names: keys, and prefixes that the delimiter rolls up."""

    tx: Transaction
    namespace: str
    prefix: str
    delimiter: str | None

    async def chunk(
        self, start: str, limit: int, *, one_by_one: bool
    ) -> tuple[dict[str, Record], str | None, bool]:
        """Return the names that the transaction sees in a range of keys, each with one of its records.

        Args:
            start: of the range.
            limit: how many records to read at most.
            one_by_one: whether to read every record under a rolled-up prefix, not only the first.

        Returns:
            also where the next range starts, and whether it has to be read one by one, because the
            record that represents a prefix is deleted here.
        """
        tx, prefix, backend = self.tx, self.prefix, self.tx.backend
        delimiter = None if one_by_one else self.delimiter
        if delimiter is None:
            records = await backend.scan(self.namespace, prefix=prefix, start=start, limit=limit)
        else:
            records = await backend.scan_names(
                self.namespace, prefix=prefix, start=start, limit=limit, delimiter=delimiter
            )
        following = None
        if len(records) == limit:
            following = after_name(records[-1].key, prefix, delimiter)
        hidden = None if delimiter is None else next(filter(self._hides_others, records), None)
        if hidden is not None:
            following = hidden.key
        own, following = self._own(start, following, limit)
        seen: dict[str, Record] = {}
        for record in records:
            if following is not None and record.key >= following:
                break
            tx.note_read(record.object_key, record)
            view = visible(tx.chain(record.object_key), record)
            if view is not None:
                seen.setdefault(self._name(record.key), view)
        for record in own:
            seen.setdefault(self._name(record.key), record)
        return dict(sorted(seen.items())), following, hidden is not None and following == hidden.key

    def _name(self, key: str) -> str:
        return rolled_up(key, self.prefix, self.delimiter) or key

    def _hides_others(self, record: Record) -> bool:
        """Return whether the record that represents a rolled-up prefix is deleted here."""
        is_rolled_up = self._name(record.key) != record.key
        return is_rolled_up and visible(self.tx.chain(record.object_key), record) is None

    def _own(self, start: str, end: str | None, limit: int) -> tuple[Sequence[Record], str | None]:
        """Return the transaction's own names in a range, and where it ends if there are too many."""
        keys = self.tx.own_keys(self.namespace)
        stop = end or after_prefix(self.prefix)
        last = len(keys) if stop is None else bisect_left(keys, stop)
        index = bisect_left(keys, start)
        found: list[Record] = []
        while index < last:
            write = live(self.tx.chain(ObjectKey(self.namespace, keys[index])))
            if write is None or write.record is None:
                index += 1
                continue
            if len(found) == limit:
                return found, keys[index]
            found.append(write.record)
            index = next_name(keys, index, self.prefix, self.delimiter)
        return found, end
