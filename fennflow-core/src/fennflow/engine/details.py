"""Details of an object that a listing does not contain: media type, metadata, headers and version.

A catalog that was filled from a listing has the size, ETag and time of each object. The rest is read at
the first use of the object, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fennflow.engine.concurrency import run_all
from fennflow.engine.differences import details_of
from fennflow.engine.stamps import stamp_of
from fennflow.exceptions import ObjectChangedException, RecordAlreadyExistsException

if TYPE_CHECKING:
    from fennflow.backends import ObjectKey, Record
    from fennflow.connectors import StoredObject
    from fennflow.engine.transaction import Transaction


async def with_details(tx: Transaction, records: Sequence[Record]) -> list[Record]:
    """Return records completed with the store's description of their objects, in the same order.

    Raises:
        ObjectChangedException: an object was changed or deleted outside FennFlow.
    """
    listed = [record for record in records if record.only_listed]
    if not listed:
        return list(records)
    asked = await run_all(tx.config.max_concurrency, partial(_ask, tx), listed)
    await tx.backend.add_details(asked)
    found = {record.object_key: record for record in asked}
    return [found.get(record.object_key, record) for record in records]


async def _ask(tx: Transaction, record: Record) -> Record:
    async with tx.slots:
        stored = await tx.connector.head(record.namespace, record.location)
    if stored is None or stored.etag != record.etag:
        message = (
            f"{record.namespace}/{record.key} is not what the catalog has recorded. It was changed or "
            "deleted outside FennFlow. Put it again, or reconcile the catalog with the bucket."
        )
        raise ObjectChangedException(message)
    return detailed(tx, record, stored)


def detailed(tx: Transaction, record: Record, stored: StoredObject) -> Record:
    """Return a record completed with the store's current description of its object.

    Raises:
        ObjectChangedException: the object belongs to another catalog.
    """
    if not record.only_listed:
        return record
    other = _other_catalog(tx, stored)
    if other is not None:
        message = (
            f"{record.namespace}/{record.key} belongs to another application, with the catalog "
            f"{other}. Reconcile the catalog with the bucket."
        )
        raise ObjectChangedException(message)
    return replace(record, location=stored.location, **details_of(stored))


async def check_listed(tx: Transaction, records: Sequence[Record | None]) -> None:
    """Refuse to change objects of another catalog, if only their listing was read so far.

    Raises:
        RecordAlreadyExistsException: an object belongs to another catalog.
    """

    async def check(record: Record) -> None:
        async with tx.slots:
            tx.check()
            there = await tx.connector.head(record.namespace, record.location)
        if there is not None:
            check_catalog(tx, record.object_key, there)

    listed = [record for record in records if record is not None and record.only_listed]
    if listed:
        await run_all(tx.config.max_concurrency, check, listed)


def check_catalog(tx: Transaction, key: ObjectKey, there: StoredObject) -> None:
    """Refuse to replace or delete an object of another catalog.

    Raises:
        RecordAlreadyExistsException: the object belongs to another catalog.
    """
    other = _other_catalog(tx, there)
    if other is not None:
        message = (
            f"{key} belongs to another application, with the catalog "
            f"{other}. The call was rolled back. Choose another name, or, if that "
            "catalog is lost, name it in ReconcileConfig(adopt_catalogs=...)."
        )
        raise RecordAlreadyExistsException(message)


def _other_catalog(tx: Transaction, stored: StoredObject) -> str | None:
    """Return the id of the catalog that an object belongs to, if it is not this one's."""
    stamp = stamp_of(stored)
    ours = {tx.backend.catalog_id, *tx.config.reconcile.adopt_catalogs}
    return None if stamp is None or stamp.catalog_id in ours else stamp.catalog_id
