"""Garbage: late writes, and objects under the reserved prefix without a transaction (P20 a, P27)."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TypeVar

import uuid_utils

from fennflow.backends import (
    AbortUpload,
    Commit,
    Delete,
    LateWrite,
    ObjectKey,
    Record,
    Step,
    TransactionToken,
    WriteId,
)
from fennflow.connectors import Location, PendingUpload, StoredObject
from fennflow.engine import tickets
from fennflow.engine.concurrency import run_all
from fennflow.engine.context import EngineContext
from fennflow.engine.finish import Finisher, versions_since
from fennflow.engine.leases import Lease, Leases
from fennflow.engine.stamps import checked_write, made_by
from fennflow.exceptions import (
    BaseConnectorException,
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    RecordLockedException,
)
from fennflow.telemetry import log_event

R = TypeVar("R")

CHECKED_AT_ONCE = 500
SWEPT_AT_ONCE = 1000
PROBES = "probe"
"""The directory below the reserved prefix for probe objects."""


async def lock_free(
    leases: Leases, lease: Lease, keys: Sequence[ObjectKey], busy: list[ObjectKey]
) -> dict[ObjectKey, Record]:
    """Lock all keys that are free, note the others, and return the records of the locked ones."""
    try:
        return dict(await leases.begin_writes(lease, keys, lambda _: ()))
    except RecordLockedException:
        if len(keys) == 1:
            busy += keys
            return {}
        half = len(keys) // 2
        first = await lock_free(leases, lease, keys[:half], busy)
        return first | await lock_free(leases, lease, keys[half:], busy)


HeadResult = StoredObject | None | BaseConnectorException
"""The store's description of an object, or the error if it cannot describe this one."""


async def describe(context: EngineContext, namespace: str, location: Location) -> HeadResult:
    """Return the store's description of an object.

    Raises:
        BaseConnectorException: the store does not describe any object.
    """
    return await ask(context, namespace, partial(context.connector.head, namespace, location))


async def ask(
    context: EngineContext, namespace: str, request: Callable[[], Awaitable[R]]
) -> R | BaseConnectorException:
    """Return the response to a request about an object, or the error if it is about this object alone.

    The store can deny access to a foreign object, or the object can have headers that no client can parse. A
    HEAD of another key shows whether the cause is this object, or a store that does not respond or refuses
    everything.

    Args:
        context: of the engine.
        namespace: of the object.
        request: sends it.

    Raises:
        BaseConnectorException: the store does not describe any object.
    """
    try:
        return await request()
    except BaseConnectorException as error:
        await _check_answers(context, namespace)
        if not isinstance(error, ConnectorUnavailableException):
            return error
    try:
        return await request()
    except BaseConnectorException as error:
        return error


async def _check_answers(context: EngineContext, namespace: str) -> None:
    """Raise unless the store answers a request for a key without an object."""
    # The name is new each time, so no stranger can have put an object there.
    absent = Location(f"{context.config.reserved_prefix}/{PROBES}/{uuid_utils.uuid7()}")
    await context.connector.head(namespace, absent)


async def check_late_writes(context: EngineContext, problems: list[str]) -> int:
    """Delete the objects of late requests, once no more can arrive, and return how many (P20 a).

    Args:
        context: of the engine.
        problems: gets a line for each failure; the rest is cleaned up anyway.
    """
    late_writes_checked = 0
    last: LateWrite | None = None
    while due := await context.backend.due_late_writes(after=last, limit=CHECKED_AT_ONCE):
        last = due[-1]
        for namespace, group in groupby(due, key=lambda each: each.namespace):
            try:
                await context.connector.capabilities(namespace)
                late_writes_checked += await _check_group(context, list(group), problems)
            except BaseConnectorException as error:
                _report(problems, f"Late writes to {namespace} were not deleted", error, "P20")
    return late_writes_checked


async def _check_group(
    context: EngineContext, due: Sequence[LateWrite], problems: list[str]
) -> int:
    """Check late writes under the locks of their keys; late writes of keys in use have to wait."""
    lease = Lease(TransactionToken(str(uuid_utils.uuid7())))
    busy: list[ObjectKey] = []
    keys = sorted({ObjectKey(each.namespace, each.key) for each in due})
    records: dict[ObjectKey, Record] = {}
    unknown: list[BaseConnectorException] = []
    away = False

    async def look(late_write: LateWrite) -> Sequence[Delete] | None:
        nonlocal away
        if away:
            return None
        try:
            return await _garbage(context, lease, records, late_write)
        except BaseConnectorException as error:
            unknown.append(error)
            try:
                await _check_answers(context, late_write.namespace)
            except BaseConnectorException:
                away = True
            return None

    # If this fails the transaction is left to be claimed, and the late writes stay. Its deletions are
    # journaled before they are sent, so that the process that claims it knows what may still arrive (P20 b).
    try:
        records = await lock_free(context.leases, lease, keys, busy)
        free = [each for each in due if ObjectKey(each.namespace, each.key) not in set(busy)]
        if not free:
            return 0
        found = await run_all(context.config.max_concurrency, look, free)
        garbage = [step for steps in found for step in steps or ()]
        if garbage:
            await context.backend.commit(lease.token, Commit(steps=garbage))
        else:
            await context.backend.abort(lease.token)
        seen_to = [each for each, steps in zip(free, found, strict=True) if steps is not None]
        if unknown:
            left = len(free) - len(seen_to)
            what = f"{left} late writes to {free[0].namespace} were not looked for"
            _report(problems, what, unknown[0], "P20")
        held = {ObjectKey(each.namespace, each.key) for each in free}
        finisher = Finisher(context, lease)
        await finisher.finish(garbage, keys=held, late_writes_checked=seen_to)
    finally:
        context.leases.release(lease)
    for late_write, error in finisher.retained.items():
        what = f"A version of {late_write.namespace}/{late_write.key} was not committed, and stays"
        _report(problems, what, error, "P20")
    return len(seen_to) - len(finisher.retained)


async def _garbage(
    context: EngineContext, lease: Lease, records: Mapping[ObjectKey, Record], late_write: LateWrite
) -> Sequence[Delete]:
    """Return the deletions of objects that a late write has made and that no record names."""
    namespace, key = late_write.namespace, late_write.key
    record = records.get(ObjectKey(namespace, key))
    versioned = (await context.connector.capabilities(namespace)).versioned
    lease.check()
    if versioned:
        found = await versions_since(context, namespace, key, late_write.write.transaction_id)
        places = [each.location for each in found]
    else:
        places = [Location(key)]
    garbage: list[Delete] = []
    for place in places:
        if record is not None and record.location == place:
            continue
        lease.check()
        there = await context.connector.head(namespace, place)
        if made_by(there, late_write.write):
            garbage.append(
                Delete(
                    namespace=namespace,
                    location=place,
                    owner=late_write.write,
                )
            )
    return garbage


async def sweep(context: EngineContext, namespace: str, problems: list[str]) -> tuple[int, int]:
    """Delete objects of this catalog under the reserved prefix that belong to no transaction (P27).

    Objects of another catalog stay: they may be the only bytes of a transaction that was committed
    just before its application went down.

    Args:
        context: of the engine.
        namespace: which bucket.
        problems: gets a line for each refusal; the rest is swept anyway.

    Returns:
        how many objects were deleted and how many uploads aborted.
    """
    prefix = f"{context.config.reserved_prefix}/"
    objects = await _sweep(context, namespace, context.connector.list(namespace, prefix), problems)
    uploads = await _sweep(
        context, namespace, context.connector.uploads(namespace, prefix), problems
    )
    return objects, uploads


async def _sweep(
    context: EngineContext,
    namespace: str,
    listing: AsyncIterator[StoredObject | PendingUpload],
    problems: list[str],
) -> int:
    """Sweep the objects of a listing, as far as it goes, and return how many steps were performed."""
    swept = 0
    batch: list[StoredObject | PendingUpload] = []
    try:
        async for each in listing:
            batch.append(each)
            if len(batch) == SWEPT_AT_ONCE:
                swept += await _delete(context, namespace, batch, problems)
                batch.clear()
    except ConnectorCapabilityException as error:
        log_event(
            logging.INFO, "Leftovers in %s are not all listed: %s", namespace, error, rule="P27"
        )
    except BaseConnectorException as error:
        _report(problems, f"Leftovers in {namespace} were not all listed", error, "P27")
    return swept + await _delete(context, namespace, batch, problems)


async def _delete(
    context: EngineContext,
    namespace: str,
    found: Sequence[StoredObject | PendingUpload],
    problems: list[str],
) -> int:
    if not found:
        return 0
    try:
        steps = await _swept(context, namespace, found)
        # No lease guards this: the name of what is deleted contains its transaction's id.
        await Finisher(context, Lease(TransactionToken(""))).perform(steps)
    except BaseConnectorException as error:
        _report(problems, f"Leftovers in {namespace} were not all deleted", error, "P27")
        return 0
    return len(steps)


async def _swept(
    context: EngineContext, namespace: str, found: Sequence[StoredObject | PendingUpload]
) -> list[Step]:
    """Return the garbage of a batch: objects that are old enough and whose transaction is gone."""
    config = context.config
    now = time.time()
    capabilities = await context.connector.capabilities(namespace)
    has_versions = capabilities.versioned or capabilities.suspended
    candidates: list[tuple[str, Step]] = []
    for each in found:
        key = each.location.key if isinstance(each, StoredObject) else each.key
        names = key.removeprefix(f"{config.reserved_prefix}/").split("/")
        if names[0] not in {context.backend.catalog_id, PROBES, *context.connector.incoming}:
            continue
        if (
            each.modified_at is None
            or now - each.modified_at.timestamp() < config.late_write_period
        ):
            continue
        own = names[0] == context.backend.catalog_id
        write, deadline = _write_of(names[1:]) if own else (None, 0)
        if now - deadline < config.late_write_period:
            continue  # a ticket that may still be accepted (P32)
        step: Step
        if isinstance(each, PendingUpload):
            step = AbortUpload(namespace=namespace, key=key, upload_id=each.upload_id)
        else:
            step = Delete(
                namespace=namespace,
                location=each.location,
                owner=write if has_versions else None,
            )
        candidates.append((write.transaction_id if write else "", step))
    known = set(
        await context.backend.known({transaction for transaction, _ in candidates if transaction})
    )
    return [step for transaction, step in candidates if transaction not in known]


def _write_of(names: Sequence[str]) -> tuple[WriteId | None, int]:
    """Return the write that a staging key names; None if the key is not a staging key (P10).

    The staging key of an upload by a ticket names the ticket and its deadline.
    """
    match names:
        case [transaction_id, seq]:
            return checked_write(transaction_id, seq), 0
        case [tickets.DIRECTORY, deadline, ticket_id]:
            named = checked_write(ticket_id, deadline)
            return (None, 0) if named is None else (WriteId(ticket_id, 1), named.seq)
        case _:
            return None, 0


def _report(problems: list[str], what: str, error: BaseConnectorException, rule: str) -> None:
    log_event(logging.WARNING, "%s: %s", what, error, rule=rule)
    problems.append(f"{what}: {error}")
