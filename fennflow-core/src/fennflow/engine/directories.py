"""Keys on stores that are file systems, where a key and a key below it cannot both exist (P2).

After the commit, staged bytes could never be copied to such a key. So the key is refused before it is
journaled, and again before the pivot, since another transaction may have committed in the meantime. If
two transactions commit at the same moment, one key may still have to wait until the other one is
deleted. No other key waits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, cast

from fennflow.backends import ObjectKey, Placement
from fennflow.connectors import Location, StoredObject
from fennflow.engine.concurrency import run_all
from fennflow.engine.plan import live
from fennflow.exceptions import IncompleteListingException, KeyException

if TYPE_CHECKING:
    from fennflow.engine.transaction import Transaction

SEGMENT_BYTES = 255


async def check_directories(tx: Transaction, namespace: str, keys: Sequence[str]) -> None:
    """Refuse keys that a file system cannot hold together with others, before anything is journaled.

    Raises:
        KeyException: a segment is too long, or a key is below or above another one.
    """
    capabilities = tx.capabilities[namespace]
    if capabilities.hierarchical or capabilities.short_names:
        for key in keys:
            _check_names(key)
    if not capabilities.hierarchical:
        return
    _check_own(tx, namespace, keys)
    named = [ObjectKey(namespace, key) for key in keys]
    records = await tx.backend.records(named)
    new = [key.key for key in named if key not in records]
    await _check_catalog(tx, namespace, new)
    await _check_store(tx, namespace, new)


async def check_directories_again(tx: Transaction) -> None:
    """Refuse to commit keys that conflict with keys committed since they were journaled.

    Raises:
        KeyException: as for `check_directories`.
    """
    if not any(each.hierarchical for each in tx.capabilities.values()):
        return
    new: dict[str, list[str]] = {}
    for key in tx.chains:
        alive = live(tx.chain(key))
        if alive is None or alive.before is not None:
            continue
        if alive.intent.placement is Placement.DELETE:
            continue
        if tx.capabilities[key.namespace].hierarchical:
            new.setdefault(key.namespace, []).append(key.key)
    for namespace, keys in new.items():
        await _check_catalog(tx, namespace, keys)


def _check_names(key: str) -> None:
    long = [part for part in key.split("/") if len(part.encode()) > SEGMENT_BYTES]
    if long:
        message = (
            f"Key {key!a} has a segment of {len(long[0].encode())} bytes; this store keeps names like "
            f"a file system, which takes at most {SEGMENT_BYTES}. Choose another key; nothing was sent."
        )
        raise KeyException(message)


def _above(key: str) -> list[str]:
    """Return the directories that a key is in, the outermost one first."""
    segments = key.split("/")
    return ["/".join(segments[:count]) for count in range(1, len(segments))]


def _check_own(tx: Transaction, namespace: str, keys: Sequence[str]) -> None:
    """Compare with the keys that the transaction has written or deleted, and with each other."""
    names = set(keys)
    for key in keys:
        for directory in _above(key):
            if directory in names or _is_own(tx, ObjectKey(namespace, directory)):
                raise _excluded(namespace, key, directory)
        if ObjectKey(namespace, key) in tx.directories:
            below = f"{key}/"
            own = tx.own_keys(namespace)
            for index in range(bisect_left(own, below), len(own)):
                if not own[index].startswith(below):
                    break
                if _is_own(tx, ObjectKey(namespace, own[index])):
                    raise _excluded(namespace, key, own[index])
    tx.directories.update(ObjectKey(namespace, each) for key in keys for each in _above(key))


def _is_own(tx: Transaction, key: ObjectKey) -> bool:
    return any(not write.retracted for write in tx.chain(key))


async def _check_catalog(tx: Transaction, namespace: str, keys: Sequence[str]) -> None:
    above = {ObjectKey(namespace, each): key for key in keys for each in _above(key)}
    for found in await tx.backend.records(list(above)):
        raise _excluded(namespace, above[found], found.key)

    async def below(key: str) -> None:
        prefix = f"{key}/"
        for record in await tx.backend.scan(namespace, prefix=prefix, start=prefix, limit=1):
            raise _excluded(namespace, key, record.key)

    await run_all(tx.config.max_concurrency, below, keys)


async def _check_store(tx: Transaction, namespace: str, keys: Sequence[str]) -> None:
    """Look for objects that the catalog does not know."""
    parents = {key.rpartition("/")[0] for key in keys} - {""}
    exist = partial(_is_directory, tx, namespace)
    checked = zip(parents, await run_all(tx.config.max_concurrency, exist, parents), strict=True)
    unknown = {parent for parent, known in checked if not known}
    above = {each: parent for parent in unknown for each in [*_above(parent), parent]}

    async def file(directory: str) -> None:
        async with tx.slots:
            there = await tx.connector.head(namespace, Location(directory))
        if there is not None:
            raise _excluded(namespace, f"{above[directory]}/…", directory)

    # The outermost first: a request below a file fails.
    for directory in sorted(above, key=lambda each: each.count("/")):
        await file(directory)

    async def below(key: str) -> None:
        listed = tx.connector.list(namespace, f"{key}/")
        async with tx.slots, aclosing(cast("AsyncGenerator[StoredObject]", listed)) as found:
            try:
                async for each in found:
                    raise _excluded(namespace, key, each.location.key)
            except IncompleteListingException as error:
                raise _excluded(namespace, key, error.prefixes[0]) from error

    await run_all(tx.config.max_concurrency, below, keys)


async def _is_directory(tx: Transaction, namespace: str, path: str) -> bool:
    """Return whether a directory has an object of the catalog at its final key."""
    prefix = f"{path}/"
    found = await tx.backend.scan(namespace, prefix=prefix, start=prefix, limit=1)
    return any(record.location.key == record.key for record in found)


def _excluded(namespace: str, key: str, other: str) -> KeyException:
    message = (
        f"{namespace}/{key} and {namespace}/{other} exclude each other: this store is a file system, "
        "where a name is either a file or a directory. The call was rolled back. Choose another "
        "key, or delete the other file in an earlier unit of work."
    )
    return KeyException(message)
