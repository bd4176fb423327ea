"""Presigned URLs: of committed objects at their final key, and for uploads to free keys."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from fennflow.backends import ObjectKey, Record
from fennflow.connectors import Location, PresignedRequest, UploadTerms
from fennflow.connectors.headers import (
    UNKNOWN_MEDIA_TYPE,
    check_media_type,
    disposition,
    media_type_of,
)
from fennflow.engine.details import with_details
from fennflow.engine.plan import live
from fennflow.engine.stamps import unstampable
from fennflow.engine.transaction import Transaction
from fennflow.engine.writing import head
from fennflow.exceptions import (
    ConnectorCapabilityException,
    RecordAlreadyExistsException,
    RecordLockedException,
    TransactionException,
)
from fennflow.paths import check_key
from fennflow.printable import brief

PAUSE = 0.02


async def presign_downloads(
    tx: Transaction,
    namespace: str,
    keys: Sequence[str],
    *,
    expires_in: float,
    media_type: str | None = None,
    download_as: str | None = None,
    inline: bool = False,
) -> list[PresignedRequest]:
    """Return a request for each key that reads the committed object.

    Args:
        tx: the transaction.
        namespace: of the keys.
        keys: which objects.
        expires_in: seconds.
        media_type: of the responses; None for the catalog's.
        download_as: a file name under which browsers save the responses.
        inline: let browsers show files of any type.

    Raises:
        NoSuchKeyException: some keys have no record; the message names them all.
        RecordLockedException: an object was not yet copied to its key after `lock_timeout`.
        TransactionException: the transaction itself has uncommitted changes of a key.
        ConnectorCapabilityException: the store has no such URLs, or cannot fix the headers of the
            response.
    """
    _check(tx, namespace, keys, expires_in)
    if media_type is not None:
        check_media_type(media_type)
    named = cast("object", download_as)
    if named is not None and not isinstance(named, str):
        message = f"download_as={brief(named)} is not a file name."
        raise ConnectorCapabilityException(message)
    found: list[PresignedRequest] = []
    for record in await _settled(tx, namespace, keys):
        stored = record.headers.get("Content-Disposition")
        kind = record.media_type if media_type is None else media_type
        name = record.key.rpartition("/")[2]
        value = disposition(name, kind, stored, download_as=download_as, inline=inline)
        headers: dict[str, str] | None = None
        if tx.connector.signs_headers:
            # Fix the type, too: the URL may outlive the object, and browsers may run the next one.
            headers = {"Content-Type": kind}
            if value is not None:
                headers["Content-Disposition"] = value
        elif (media_type, download_as) != (None, None) or (
            value != stored and await _may_run(tx, record)
        ):
            raise _cannot_bind(tx, record)
        found.append(
            await tx.connector.presign(
                namespace,
                record.location,
                method="GET",
                expires_in=expires_in,
                response_headers=headers,
            )
        )
    return found


async def presign_uploads(
    tx: Transaction,
    namespace: str,
    keys: Sequence[str],
    terms: UploadTerms,
    *,
    expires_in: float,
) -> list[PresignedRequest]:
    """Return a request for each key that uploads to it.

    Its signature fixes the metadata, so that the upload cannot have a stamp. If the store enforces
    it, the upload replaces no object.

    Raises:
        RecordAlreadyExistsException: a key is taken.
        TransactionException: the transaction itself has uncommitted changes of a key.
        ConnectorCapabilityException: the store has no such URLs, or cannot enforce the terms.
    """
    _check(tx, namespace, keys, expires_in)
    check_signs_headers(tx, namespace)
    view = await tx.read_records(namespace, keys, missing_ok=True)
    taken = [record.key for record in view if record is not None]
    if taken:
        # An upload would replace committed bytes without changing the catalog (I1).
        message = (
            f"Already taken: {', '.join(f'{namespace}/{key}' for key in taken)}. "
            "Upload URLs are made only for free paths; choose another path."
        )
        raise RecordAlreadyExistsException(message)
    capabilities = await tx.connector.capabilities(namespace)
    if terms.sha256 is not None and not capabilities.checksums:
        message = f"{namespace} does not compare checksums, so no URL can bind an upload to one."
        raise ConnectorCapabilityException(message)
    bound = replace(
        terms,
        metadata={**terms.metadata, **unstampable()},
        # Otherwise an upload could replace an object that is committed there before the URL expires
        # (I1).
        if_none_match=capabilities.conditional_create,
    )
    return [
        await tx.connector.presign(
            namespace, Location(key), method="PUT", expires_in=expires_in, terms=bound
        )
        for key in keys
    ]


def check_seconds(expires_in: object) -> None:
    """Refuse a value that is not a number of seconds; the store checks the range.

    Raises:
        ConnectorCapabilityException: it is not one.
    """
    if not isinstance(expires_in, (int, float)):
        message = f"expires_in={brief(expires_in)} is not a number of seconds."
        raise ConnectorCapabilityException(message)


def check_signs_headers(tx: Transaction, namespace: str) -> None:
    """Refuse upload URLs if the connector cannot sign headers.

    Raises:
        ConnectorCapabilityException: the connector signs no headers.
    """
    if not tx.connector.signs_headers:
        message = (
            f"{type(tx.connector).__name__} signs no headers, so the holder of an upload URL for "
            f"{namespace} could choose FennFlow's own metadata, and replace committed objects "
            "later. No URL was made. Use fennflow-s3 for uploads by others."
        )
        raise ConnectorCapabilityException(message)


def _check(tx: Transaction, namespace: str, keys: Sequence[str], expires_in: object) -> None:
    check_seconds(expires_in)
    for key in keys:
        check_key(key, reserved_prefix=tx.config.reserved_prefix)
        if live(tx.chain(ObjectKey(namespace, key))) is not None:
            message = (
                f"{namespace}/{key} was changed by this unit of work, but a URL names what is "
                "committed. Commit first."
            )
            raise TransactionException(message)


async def _may_run(tx: Transaction, record: Record) -> bool:
    """Return whether a browser may run a file of a type that is not passive.

    Of the application types, browsers run only these, and save all others.
    """
    media_type = record.media_type
    if media_type == UNKNOWN_MEDIA_TYPE and record.sha256 is None:
        # A foreign object may have an invalid type, which the store sends and browsers interpret.
        stored = await head(tx, record.object_key)
        media_type = UNKNOWN_MEDIA_TYPE if stored is None else stored.media_type
        if media_type_of(media_type) != media_type:
            return True
    family, _, kind = media_type.partition(";")[0].strip().lower().partition("/")
    active = any(word in kind for word in ("html", "xml", "script"))
    return "," in media_type or family != "application" or active


def _cannot_bind(tx: Transaction, record: Record) -> ConnectorCapabilityException:
    message = (
        f"{type(tx.connector).__name__} signs no headers, so it cannot say how a browser is to treat "
        f"{record.namespace}/{record.key}, which is {record.media_type}. No URL was made. Pass "
        "inline=True if no stranger chose the bytes, or send the file with answer_for."
    )
    return ConnectorCapabilityException(message)


async def _settled(tx: Transaction, namespace: str, keys: Sequence[str]) -> Sequence[Record]:
    """Return the records of committed objects, once all of them have been copied to their keys."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + tx.config.lock_timeout
    while True:
        view = await tx.read_records(namespace, keys, missing_ok=False)
        # In a versioned bucket the URL names the version.
        records = await with_details(tx, [record for record in view if record is not None])
        moving = [record for record in records if record.location.key != record.key]
        if not moving:
            return records
        tx.free_locks()
        if loop.time() >= deadline:
            raise _on_its_way(moving)
        await asyncio.sleep(PAUSE)


def _on_its_way(moving: Sequence[Record]) -> RecordLockedException:
    names = ", ".join(f"{record.namespace}/{record.key}" for record in moving)
    message = f"Committed, but not yet copied to its key: {names}. Try again in a moment."
    return RecordLockedException(message)
