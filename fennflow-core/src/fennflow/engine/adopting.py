"""Filling: records the objects of a bucket in a catalog that has no record of it.

The listing of the store is enough: it has the size, ETag and time of each object. The rest is read at
the first use of an object. Only an object that another catalog, or a late request, may have written is
read at once. To readers the whole fill is one transaction: the records are hidden until the last one is
written. After an interruption, the next process that opens the catalog continues the fill.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import uuid_utils

from fennflow.backends import Area, Fill, FillPart, LateWrite, ObjectKey, Record, WriteId
from fennflow.connectors import Location, StoredObject
from fennflow.connectors.values import utc
from fennflow.engine.catalogs import catalogs_in, others, without_note
from fennflow.engine.concurrency import run_all
from fennflow.engine.differences import Policy, judge, refused, unreadable
from fennflow.engine.garbage import HeadResult, describe
from fennflow.engine.hidden import note_hidden
from fennflow.engine.stamps import stamp_of
from fennflow.engine.tally import Tally, warn_of_unreadable
from fennflow.engine.walking import is_key, pairs
from fennflow.exceptions import BaseConnectorException, IncompleteListingException
from fennflow.paths import StoragePath
from fennflow.reports import Difference, Finding, ReconcileAction
from fennflow.telemetry import log_event

if TYPE_CHECKING:
    from fennflow.config import ReconcileConfig
    from fennflow.engine.catalogs import Registry
    from fennflow.engine.context import EngineContext
    from fennflow.reports import CatalogInfo

LOGGED_EVERY = 10.0
"""Seconds."""
ROUNDED = timedelta(seconds=2)
"""Seconds by which a store may round times."""
TRANSACTIONS_AT_ONCE = 1000
NEWEST = 8
"""How many of the newest objects get a HEAD: a very new catalog has no note yet."""


async def unfinished(context: EngineContext, area: Area) -> list[Fill]:
    """Return the unfinished fills of an area and of areas that overlap it."""
    return [fill for fill in await context.backend.fills() if fill.area.overlaps(area)]


@dataclass(slots=True)
class Adoption:
    """One reading of an area into the catalog.

    Args:
        context: of the engine.
        registry: of this catalog's notes in buckets.
        settings: of reconciliation.
        fill: the fill, which may have begun in another process.
        begun: whether it has begun.
        tally: counts the findings.
    """

    context: EngineContext
    registry: Registry
    settings: ReconcileConfig
    fill: Fill
    begun: bool
    tally: Tally
    _others: Sequence[CatalogInfo] | None = None
    _newest: list[tuple[datetime, str]] = field(default_factory=list[tuple[datetime, str]])
    _looked_at: set[str] = field(default_factory=set[str])
    _incomplete: list[IncompleteListingException] = field(
        default_factory=list[IncompleteListingException]
    )
    _twice: set[str] = field(default_factory=set[str])
    _lost: bool = False
    _logged: float = field(default_factory=lambda: asyncio.get_running_loop().time())

    async def run(self) -> bool:
        """Record all objects, and make the records visible.

        Returns:
            whether this process completed the fill. If not, another process has ended it, or has
            begun another one.
        """
        area = self.fill.area
        if self.begun:
            log_event(
                logging.INFO,
                "The first reading of %s was interrupted, and is resumed",
                str(area),
                rule="reconcile",
            )
        complete = False
        while not complete:
            await self._record_all()
            if self._lost:
                return False
            if not (self.begun or self._others):
                break
            # Listed objects may belong to a catalog that began to write in the meantime.
            before = {each.catalog_id for each in self._others or ()}
            self._others = await self._look_for_others()
            complete = before.issuperset(each.catalog_id for each in self._others)
        self.registry.warn_of(area, self._others or ())
        self.tally.add_unlisted(area, self._incomplete)
        await self.tally.pass_on()
        await note_hidden(self.context, area, self.tally.differences)
        if self.begun:
            await self.context.backend.end_fill(self.fill)
        return True

    async def _look_for_others(self) -> list[CatalogInfo]:
        """Return the other catalogs, from their notes and, for new catalogs, from the newest objects."""
        namespace = self.fill.area.namespace
        known = {each.catalog_id: each for each in self._others or ()}
        known |= {each.catalog_id: each for each in await catalogs_in(self.context, namespace)}
        look = partial(describe, self.context, namespace)
        newest = {key for _, key in self._newest} - self._looked_at
        self._looked_at |= newest
        for each in await run_all(NEWEST, look, map(Location, newest)):
            stamp = stamp_of(each) if isinstance(each, StoredObject) else None
            if stamp is not None and stamp.catalog_id is not None:
                known.setdefault(stamp.catalog_id, without_note(stamp.catalog_id))
        return others(self.context, self.fill.area, list(known.values()))

    async def _record_all(self) -> None:
        """Make the hidden records match the store's listing."""
        (namespace, prefix), size = self.fill.area, self.settings.batch_size
        self.tally.begin()
        self._newest.clear()
        self._incomplete.clear()
        batch: dict[str, tuple[StoredObject, bool]] = {}
        gone: list[str] = []
        walk = pairs(
            self.context,
            namespace,
            prefix,
            size,
            records_of=self.fill.hidden,
            incomplete=self._incomplete,
        )
        async with aclosing(walk) as walking:
            async for key, stored, record in walking:
                self.tally.records += record is not None
                if stored is None:
                    gone.append(key)
                    continue
                self.tally.objects += 1
                self._remember_newest(stored)
                if record is None and not is_key(key):
                    self.tally.add(refused(ObjectKey(namespace, key)).finding)
                elif record is None or not self._agrees(stored, record):
                    if key in batch:
                        self._twice.add(key)
                    batch[key] = stored, record is not None
                if len(batch) + len(gone) >= size:
                    await self._record(batch, gone)
                    batch, gone = {}, []
                if self._lost:
                    return
                if self.tally.objects % size == 0:
                    await self._progress()
        await self._record(batch, gone)

    def _remember_newest(self, stored: StoredObject) -> None:
        found = (utc(stored.modified_at or datetime.now(UTC)), stored.location.key)
        if len(self._newest) < NEWEST:
            heapq.heappush(self._newest, found)
        else:
            heapq.heappushpop(self._newest, found)

    def _agrees(self, stored: StoredObject, record: Record) -> bool:
        if stored.etag != record.etag:
            return False
        return not (record.only_listed and self._is_doubtful(stored))

    def _is_doubtful(self, stored: StoredObject) -> bool:
        """Return whether another catalog may have written an object, by its time."""
        if not self._others:
            return False
        since = min(each.since for each in self._others)
        return stored.modified_at is None or utc(stored.modified_at) >= since - ROUNDED

    async def _record(self, batch: dict[str, tuple[StoredObject, bool]], gone: list[str]) -> None:
        if self._incomplete and gone:
            gone = await self._look_at_unlisted(batch, gone)
        if not batch and not gone:
            await self.tally.pass_on()
            return
        if self._others is None:
            self._others = await self._look_for_others()
        records = await self._records_of(list(batch.values()), gone)
        if records or self.begun:
            if not self.begun:
                await self.registry.register(self.fill.area.namespace, [self.fill.area])
            part = FillPart(records=records, removed=gone, begins=not self.begun)
            added = await self.context.backend.fill(self.fill, part)
            self._lost = not added
            self.begun = True
        if not self._lost:
            await self.tally.pass_on()

    async def _look_at_unlisted(
        self, batch: dict[str, tuple[StoredObject, bool]], keys: Sequence[str]
    ) -> list[str]:
        """Return the keys that have no object; add those that have one to the batch."""
        look = partial(describe, self.context, self.fill.area.namespace)
        found = await run_all(self.context.config.max_concurrency, look, map(Location, keys))
        there = dict(zip(keys, found, strict=True))
        batch |= {key: (at, True) for key, at in there.items() if isinstance(at, StoredObject)}
        return [key for key, at in there.items() if at is None]

    async def _records_of(
        self, batch: Sequence[tuple[StoredObject, bool]], gone: list[str]
    ) -> list[Record]:
        """Return the records to add, and add to `gone` the keys of those to remove."""
        namespace = self.fill.area.namespace
        keys = [ObjectKey(namespace, stored.location.key) for stored, _ in batch]
        writing = await self._written(keys)
        late = await self.context.backend.late_writes(keys)
        asked = await self._ask(batch, {each.key for each in late} - writing)
        records: list[Record] = []
        for stored, recorded in batch:
            key = stored.location.key
            record = None
            if key in writing:
                self.tally.add(Finding(namespace, StoragePath(key), Difference.BUSY))
            elif key in asked:
                record, finding = self._judged(ObjectKey(namespace, key), asked[key], late)
                if finding is not None and not (recorded and record is not None):
                    self.tally.add(finding)
            else:
                record = self._listed(stored)
            if record is not None:
                records.append(replace(record, namespace=self.fill.hidden))
            elif recorded:
                gone.append(key)
        return records

    async def _written(self, keys: Sequence[ObjectKey]) -> set[str]:
        """Return the keys that transactions of this catalog are writing."""
        wanted, found = set(keys), set[str]()
        last = ""
        while True:
            page = await self.context.backend.transactions(after=last, limit=TRANSACTIONS_AT_ONCE)
            found.update(
                intent.key
                for each in page
                for intent in each.intents
                if intent.object_key in wanted
            )
            if len(page) < TRANSACTIONS_AT_ONCE:
                return found
            last = page[-1].token.transaction_id

    async def _ask(
        self, batch: Sequence[tuple[StoredObject, bool]], late: set[str]
    ) -> dict[str, HeadResult]:
        """Return the store's description of the objects for which the listing is not enough."""
        keys = [
            stored.location.key
            for stored, recorded in batch
            if recorded or stored.location.key in late | self._twice or self._is_doubtful(stored)
        ]
        look = partial(describe, self.context, self.fill.area.namespace)
        found = await run_all(self.context.config.max_concurrency, look, map(Location, keys))
        return dict(zip(keys, found, strict=True))

    def _judged(
        self, key: ObjectKey, there: HeadResult, late: Collection[LateWrite]
    ) -> tuple[Record | None, Finding | None]:
        if isinstance(there, BaseConnectorException):
            warn_of_unreadable(key, there)
            return None, unreadable(key, there).finding
        policy = Policy(
            settings=self.settings,
            filling=True,
            dead_before=0.0,
            catalog_id=self.context.backend.catalog_id,
        )
        write = WriteId(self.fill.fill_id, 1)
        verdict = judge(key, there, None, policy, write=write, late_writes=late)
        return (None, None) if verdict is None else (verdict.record, verdict.finding)

    def _listed(self, stored: StoredObject) -> Record:
        """Return the record of an object that is known only from the listing."""
        namespace, key = self.fill.area.namespace, stored.location.key
        modified_at = utc(stored.modified_at or datetime.now(UTC))
        self.tally.add(
            Finding(namespace, StoragePath(key), Difference.UNKNOWN, ReconcileAction.INSERTED)
        )
        return Record(
            namespace=namespace,
            key=key,
            location=stored.location,
            etag=stored.etag,
            size=stored.size,
            media_type="",
            created_at=modified_at,
            modified_at=modified_at,
            write=WriteId(self.fill.fill_id, 1),
        )

    async def _progress(self) -> None:
        await self.tally.progress()
        now = asyncio.get_running_loop().time()
        if now - self._logged >= LOGGED_EVERY:
            self._logged = now
            log_event(
                logging.INFO,
                "The catalog of %s is being filled: %d objects so far",
                str(self.fill.area),
                self.tally.objects,
                rule="reconcile",
            )


def new_fill(area: Area) -> Fill:
    """Return a fill that has not begun."""
    return Fill(area, str(uuid_utils.uuid7()))
