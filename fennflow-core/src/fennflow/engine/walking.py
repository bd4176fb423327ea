"""Reads a bucket and its catalog together, in the order in which the store lists."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from fennflow.backends import Backend, ObjectKey, Record
from fennflow.connectors import StoredObject
from fennflow.engine.concurrency import shielded
from fennflow.engine.context import EngineContext
from fennflow.exceptions import IncompleteListingException, ReconcileFailedException
from fennflow.paths import after_key, fault_of

T = TypeVar("T")

SPILL_TIMEOUT = 60.0
"""Seconds that a cancelled caller waits for the temporary file."""

Pair = tuple[str, StoredObject | None, Record | None]


async def pairs(
    context: EngineContext,
    namespace: str,
    prefix: str,
    batch_size: int,
    *,
    records_of: str | None = None,
    incomplete: list[IncompleteListingException],
) -> AsyncGenerator[Pair]:
    """Yield each key of a bucket and its catalog once, with its object and its record.

    The catalog is read in key order, as far as the store has listed. Records whose keys the store
    has not listed by then are noted, and looked up again when the store lists their keys later. So
    a store that lists in key order costs one pass over both, and any other order works, too. The
    notes are in a temporary file, so that memory stays constant.

    Args:
        context: of the engine.
        namespace: the bucket.
        prefix: of the keys.
        batch_size: how many objects and records are read at a time.
        records_of: the namespace of the records, if it differs.
        incomplete: gets the reasons why not all objects could be listed. An object that could not
            be listed is not yielded, and its record is yielded without it. So a record without an
            object does not prove that the object is missing.

    Raises:
        ReconcileFailedException: the temporary file cannot be written.
    """
    recorded = records_of or namespace
    catalog = _Catalog(context.backend, recorded, prefix, batch_size)
    noted = _NotedKeys()
    try:
        async with aclosing(objects(context, namespace, prefix, incomplete)) as listing:
            async for page in _batches(listing, batch_size):
                stored = {each.location.key: each for each in page}
                behind = [key for key in stored if key <= catalog.passed and is_key(key)]
                if behind:
                    wanted = [ObjectKey(recorded, key) for key in behind]
                    records = await context.backend.records(wanted)
                    await noted.discard(behind)
                    for each in wanted:
                        yield each.key, stored.pop(each.key), records.get(each)
                last = max(filter(is_key, stored), default="")
                async with aclosing(catalog.up_to(last, stored, noted)) as found:
                    async for record in found:
                        yield record.key, stored.pop(record.key), record
                for key, unrecorded in stored.items():
                    yield key, unrecorded, None
        async with aclosing(catalog.up_to(None, {}, noted)) as found:
            async for record in found:
                yield record.key, None, record
        async with aclosing(noted.batches(batch_size)) as batches:
            async for keys in batches:
                wanted = [ObjectKey(recorded, key) for key in keys]
                for record in (await context.backend.records(wanted)).values():
                    yield record.key, None, record
    finally:
        await noted.aclose()


async def objects(
    context: EngineContext,
    namespace: str,
    prefix: str,
    incomplete: list[IncompleteListingException],
) -> AsyncGenerator[StoredObject]:
    """List the objects of users, without FennFlow's own objects and directory markers."""
    listing = context.connector.list(namespace, prefix)
    try:
        async for stored in listing:
            key = stored.location.key
            if not key.startswith(context.config.reserved_prefix) and not key.endswith("/"):
                yield stored
    except IncompleteListingException as error:
        incomplete.append(error)
    finally:
        if isinstance(listing, AsyncGenerator):
            await listing.aclose()


def is_key(key: str) -> bool:
    """Return whether a record can have this key."""
    return fault_of(key) is None


async def _batches(items: AsyncIterator[T], size: int) -> AsyncGenerator[list[T]]:
    batch: list[T] = []
    async for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(slots=True)
class _Catalog:
    """The records of a namespace, read once in key order.

    Args:
        backend: the backend that has them.
        namespace: which one.
        prefix: of the keys.
        batch_size: how many records are read at a time.

    Attributes:
        passed: all records up to this key have been read.
    """

    backend: Backend
    namespace: str
    prefix: str
    batch_size: int
    passed: str = ""
    _start: str | None = ""
    _page: deque[Record] = field(default_factory=deque[Record])

    async def up_to(
        self, last: str | None, stored: dict[str, StoredObject], noted: _NotedKeys
    ) -> AsyncGenerator[Record]:
        """Yield the records up to a key that have an object, and note the others.

        Args:
            last: the key; None for all remaining records, which are then yielded.
            stored: the objects.
            noted: gets the keys of the others.
        """
        others: list[str] = []
        while self._page or self._start is not None:
            if not self._page:
                await self._read()
                continue
            if last is not None and self._page[0].key > last:
                break
            record = self._page.popleft()
            if last is None or record.key in stored:
                yield record
                continue
            others.append(record.key)
            if len(others) == self.batch_size:
                await noted.add(others)
                others = []
        await noted.add(others)
        self.passed = max(self.passed, last or "")

    async def _read(self) -> None:
        page = await self.backend.scan(
            self.namespace, prefix=self.prefix, start=self._start or "", limit=self.batch_size
        )
        self._start = after_key(page[-1].key) if len(page) == self.batch_size else None
        self._page.extend(page)


class _NotedKeys:
    """A set of keys that may be larger than the memory: SQLite keeps it in a temporary file."""

    def __init__(self) -> None:
        self._database: sqlite3.Connection | None = None

    async def add(self, keys: Sequence[str]) -> None:
        """Add keys."""
        if keys:
            await self._run(lambda it: it.executemany("INSERT INTO noted VALUES (?)", _rows(keys)))

    async def discard(self, keys: Sequence[str]) -> None:
        """Remove keys, as far as they are in it."""
        if self._database is not None:
            await self._run(
                lambda it: it.executemany("DELETE FROM noted WHERE key = ?", _rows(keys))
            )

    async def batches(self, size: int) -> AsyncGenerator[list[str]]:
        """Yield all keys in order, in batches."""
        last = ""
        while self._database is not None and (keys := await self._run(partial(_page, last, size))):
            last = keys[-1]
            yield keys

    async def aclose(self) -> None:
        """Remove the file."""
        if self._database is not None:
            self._database.close()

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a function in a thread, and wait for it even if the caller is cancelled meanwhile."""
        done, cancellation = await shielded(
            asyncio.to_thread(self._do, work), grace=lambda: SPILL_TIMEOUT
        )
        if cancellation is not None:
            raise cancellation
        return done.result()

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._database is None:
                self._database = _temporary_database()
            with self._database:
                return work(self._database)
        except sqlite3.Error as error:
            message = (
                "The records that the store has not listed yet are noted in a temporary file, which "
                f"cannot be written: {error}. The findings reported so far are valid; the rest was not "
                "compared. Give the process room for temporary files (SQLITE_TMPDIR), and try again."
            )
            raise ReconcileFailedException(message) from error


def _temporary_database() -> sqlite3.Connection:
    # A database without a name is in memory while it is small, and its file has no name, either.
    database = sqlite3.connect("", check_same_thread=False)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("CREATE TABLE noted (key TEXT PRIMARY KEY) WITHOUT ROWID")
    return database


def _page(last: str, size: int, database: sqlite3.Connection) -> list[str]:
    page = "SELECT key FROM noted WHERE key > ? ORDER BY key LIMIT ?"
    return [str(key) for (key,) in database.execute(page, (last, size))]


def _rows(keys: Sequence[str]) -> list[tuple[str]]:
    return [(key,) for key in keys]
