"""Presigned URLs of committed objects at their final key."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import get_args

from fennflow.backends import ObjectKey, Record
from fennflow.connectors import Location, PresignMethod
from fennflow.engine.details import with_details
from fennflow.engine.plan import live
from fennflow.engine.transaction import Transaction
from fennflow.exceptions import (
    ConnectorCapabilityException,
    RecordAlreadyExistsException,
    RecordLockedException,
    TransactionException,
)
from fennflow.paths import check_key
from fennflow.printable import brief

PAUSE = 0.02


async def presign(
    tx: Transaction,
    namespace: str,
    keys: Sequence[str],
    *,
    method: PresignMethod,
    expires_in: float,
) -> tuple[list[str], dict[str, str]]:
    """Return a URL for every key, and the headers that a client has to send with its request.

    Raises:
        NoSuchKeyException: `GET`, and some keys have nothing; names them all.
        RecordAlreadyExistsException: `PUT`, and a key is taken.
        RecordLockedException: an object was still on its way to its key after `lock_timeout`.
        TransactionException: the transaction itself has uncommitted changes of a key.
        ConnectorCapabilityException: the store has no such URLs.
    """
    if method not in get_args(PresignMethod):
        message = f"There are presigned URLs for GET and PUT, not for {method!a}."
        raise ConnectorCapabilityException(message)
    _check_seconds(expires_in)
    for key in keys:
        check_key(key, reserved_prefix=tx.config.reserved_prefix)
        if live(tx.chain(ObjectKey(namespace, key))) is not None:
            message = (
                f"{namespace}/{key} was changed by this unit of work, and a URL names what is "
                "committed. Commit first."
            )
            raise TransactionException(message)
    if method == "GET":
        locations = await _settled(tx, namespace, keys)
    else:
        view = await tx.read_records(namespace, keys, missing_ok=True)
        taken = [record.key for record in view if record is not None]
        if taken:
            # An upload over it would replace committed bytes behind the catalog (I1).
            message = (
                f"Taken already: {', '.join(f'{namespace}/{key}' for key in taken)}. "
                "A URL for uploads is given for free paths alone; choose another."
            )
            raise RecordAlreadyExistsException(message)
        locations = [Location(key) for key in keys]
        if (await tx.connector.capabilities(namespace)).conditional_create:
            # Else an upload could replace what is committed there before the URL expires (I1).
            urls = [
                await tx.connector.presign(
                    namespace, each, method=method, expires_in=expires_in, if_none_match=True
                )
                for each in locations
            ]
            return urls, {"If-None-Match": "*"}
    urls = [
        await tx.connector.presign(namespace, each, method=method, expires_in=expires_in)
        for each in locations
    ]
    return urls, {}


def _check_seconds(expires_in: object) -> None:
    # The range is the store's to say.
    if not isinstance(expires_in, (int, float)):
        message = f"expires_in={brief(expires_in)} is not a number of seconds."
        raise ConnectorCapabilityException(message)


async def _settled(tx: Transaction, namespace: str, keys: Sequence[str]) -> Sequence[Location]:
    """Return the locations of committed objects, once none of them is at a staging key any more."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + tx.config.lock_timeout
    while True:
        view = await tx.read_records(namespace, keys, missing_ok=False)
        # Of an object in a versioned bucket the URL names the version.
        records = await with_details(tx, [record for record in view if record is not None])
        moving = [record for record in records if record.location.key != record.key]
        if not moving:
            return [record.location for record in records]
        tx.free_locks()
        if loop.time() >= deadline:
            raise _on_its_way(moving)
        await asyncio.sleep(PAUSE)


def _on_its_way(moving: Sequence[Record]) -> RecordLockedException:
    names = ", ".join(f"{record.namespace}/{record.key}" for record in moving)
    message = f"Committed, but still on the way to its key: {names}. Try again in a moment."
    return RecordLockedException(message)
