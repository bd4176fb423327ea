"""The catalogs that write to a bucket: each writes a note about itself there.

An object that is older than the note of another catalog cannot belong to that catalog. A bucket that
only one application uses can therefore be recorded from its listing alone. A very young catalog has no
note yet; the newest objects of a bucket show whether there is one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fennflow.backends import Area
from fennflow.connectors import Deletion, Location, ObjectAttributes, PutRequest, StoredObject
from fennflow.connectors.values import utc
from fennflow.engine.concurrency import run_all
from fennflow.engine.garbage import ask, describe
from fennflow.engine.stamps import began, is_catalog_id
from fennflow.exceptions import (
    BaseConnectorException,
    IncompleteListingException,
    NoSuchKeyException,
    PreconditionFailedException,
)
from fennflow.reports import CatalogInfo
from fennflow.telemetry import log_event

if TYPE_CHECKING:
    from fennflow.engine.context import EngineContext

MOST_NOTES = 1000
MOST_BYTES = 1 << 14
"""Of a note."""
LONGEST = 200
UNKNOWN = datetime(1970, 1, 1, tzinfo=UTC)
YOUNG = 60.0
"""Age in seconds from which a catalog leaves notes: a program that is only tried out leaves none."""
CLOCKS_DIFFER = timedelta(hours=1)
"""The largest expected error of a process's clock."""


async def catalogs_in(context: EngineContext, namespace: str) -> list[CatalogInfo]:
    """Return the catalogs that have left a note in a bucket, the oldest note first."""
    folder = f"{context.config.reserved_prefix}/catalogs/"
    listing = context.connector.list(namespace, folder)
    known: list[str] = []
    unseen: list[CatalogInfo] = []
    try:
        async for each in listing:
            name = each.location.key.removeprefix(folder)
            if is_catalog_id(name) and each.size > MOST_BYTES:
                unseen.append(without_note(name))  # not written by a catalog
            elif is_catalog_id(name):
                known.append(name)
    except IncompleteListingException:
        unseen.append(without_note("?"))  # a catalog whose note is not listed
    read = partial(_read, context, namespace)
    found = await run_all(context.config.max_concurrency, read, known[:MOST_NOTES])
    notes = [*unseen, *(each[0] for each in found if each is not None)]
    return sorted(notes, key=lambda info: info.since)


def others(context: EngineContext, area: Area, found: Sequence[CatalogInfo]) -> list[CatalogInfo]:
    """Return the other catalogs whose objects may be in an area."""
    ours = {context.backend.stamped_id, *context.config.reconcile.adopt_catalogs}
    return [
        each
        for each in found
        if each.catalog_id not in ours
        and any(area.overlaps(Area(area.namespace, prefix)) for prefix in each.prefixes)
    ]


def without_note(catalog_id: str) -> CatalogInfo:
    """Return what is known about a catalog whose objects were found, but not its note."""
    created = began(catalog_id)
    since = UNKNOWN if created is None else created - CLOCKS_DIFFER
    return CatalogInfo(catalog_id=catalog_id, since=since, last_used=datetime.now(UTC))


class Registry:
    """Notes in buckets that this catalog writes there.

    Args:
        context: of the engine.
    """

    def __init__(self, context: EngineContext) -> None:
        self._parts = context
        self._done: set[Area] = set()
        self._warned_of: set[tuple[Area, str]] = set()

    def warn_of(self, area: Area, found: Sequence[CatalogInfo]) -> None:
        """Log once for each other catalog that it writes in the same place as this one."""
        for each in found:
            if (area, each.catalog_id) not in self._warned_of:
                self._warned_of.add((area, each.catalog_id))
                log_event(logging.WARNING, "%s", shares(area, each), rule="P27")

    async def register(self, namespace: str, areas: Sequence[Area]) -> None:
        """Leave a note before anything is written, once a day; warn if others write there.

        A catalog that ends with its process leaves none, since the next one has to take over its
        objects. A new catalog leaves its note later.

        Args:
            namespace: the bucket.
            areas: the areas of it in which the caller may write.
        """
        catalog_id = self._parts.backend.stamped_id
        if catalog_id is None or self._done.issuperset(areas):
            return
        created = began(catalog_id)
        if created is not None and (datetime.now(UTC) - created).total_seconds() < YOUNG:
            return
        prefixes = sorted(area.prefix for area in areas)
        text = json.dumps([self._parts.connector.store_id, namespace, prefixes])
        name = f"catalog:{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        if await self._parts.backend.recall(name) is None:
            await self._write(namespace, catalog_id, prefixes)
            await self._parts.backend.remember(name, catalog_id)
            found = await catalogs_in(self._parts, namespace)
            for area in areas:
                self.warn_of(area, others(self._parts, area, found))
        self._done.update(areas)

    async def _write(self, namespace: str, catalog_id: str, prefixes: Sequence[str]) -> None:
        context = self._parts
        key = _key(context, catalog_id)
        described = await describe(context, namespace, Location(key))
        before: tuple[CatalogInfo, Location] | None = None
        if isinstance(described, StoredObject) and described.size > MOST_BYTES:
            before = without_note(catalog_id), described.location  # someone has replaced the note
        elif described is not None:
            before = await _read(context, namespace, catalog_id)
        values: dict[str, Any] = {
            "program": Path(sys.argv[0] if sys.argv else "").name,
            "host": platform.node(),
            "prefixes": sorted({*prefixes, *(before[0].prefixes if before else ())}),
        }
        if before is not None:
            values["since"] = before[0].since.isoformat()
        elif await context.backend.scan(namespace, prefix="", start="", limit=1):
            # It has written before notes existed, or its note was deleted.
            values["since"] = UNKNOWN.isoformat()
        attributes = ObjectAttributes(media_type="application/json")
        body = json.dumps(values).encode()
        capabilities = await context.connector.capabilities(namespace)
        first = before is None and capabilities.conditional_create
        try:
            await context.connector.put(
                PutRequest(namespace, key, attributes, if_none_match=first), body
            )
        except PreconditionFailedException:
            return  # another process of this catalog was first
        if before is not None and before[1].version_id is not None:
            await context.connector.delete(namespace, [Deletion(location=before[1])])


def shares(area: Area, other: CatalogInfo) -> str:
    """Return what to do about another catalog in the same place."""
    return (
        f"{area} is also written by the catalog {other.catalog_id} (program {other.program} on "
        f"{other.host}, last used {other.last_used:%Y-%m-%d}). If that is another instance of this "
        "application, neither sees the files of the other: let them share one database. If it is "
        "another application, give each its own prefix: RepoField(..., prefix=...). If that catalog "
        "is lost, name it in ReconcileConfig(adopt_catalogs=...)."
    )


def _key(context: EngineContext, catalog_id: str) -> str:
    return f"{context.config.reserved_prefix}/catalogs/{catalog_id}"


async def _read(
    context: EngineContext, namespace: str, catalog_id: str
) -> tuple[CatalogInfo, Location] | None:
    place = Location(_key(context, catalog_id))

    async def get() -> tuple[StoredObject, bytes] | None:
        try:
            return await context.connector.get(namespace, place)
        except NoSuchKeyException:
            return None

    found = await ask(context, namespace, get)
    if found is None:
        return None
    if isinstance(found, BaseConnectorException):  # no client can read it
        own = catalog_id == context.backend.catalog_id
        return replace(without_note(catalog_id), own=own), place
    stored, body = found
    written = UNKNOWN if stored.modified_at is None else utc(stored.modified_at)
    info = CatalogInfo(
        catalog_id=catalog_id,
        since=written,
        last_used=written,
        own=catalog_id == context.backend.catalog_id,
    )
    return _filled_in(info, body), stored.location


def _filled_in(info: CatalogInfo, body: bytes) -> CatalogInfo:
    """Return the content of a note; anyone with write access to the bucket may have written it."""
    try:
        found = cast("object", json.loads(body))
        assert isinstance(found, dict)  # noqa: S101 - caught below
        values = cast("dict[str, object]", found)
        since = (
            utc(datetime.fromisoformat(str(values["since"]))) if "since" in values else info.since
        )
        prefixes = cast("list[object]", values["prefixes"])
        return replace(
            info,
            since=max(UNKNOWN, min(since, info.since)),  # what is earlier cannot be calculated with
            program=_shown(values["program"]),
            host=_shown(values["host"]),
            prefixes=[str(each) for each in prefixes],
        )
    except (ValueError, KeyError, TypeError, AssertionError, OverflowError, RecursionError):
        return replace(info, since=UNKNOWN)


def _shown(value: object) -> str:
    text = str(value)[:LONGEST]
    return text if text.isprintable() else "?"
