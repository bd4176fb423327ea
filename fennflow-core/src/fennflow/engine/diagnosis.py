"""Diagnosis: what a configuration guarantees, found out by trying it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import uuid_utils

from fennflow.backends import ObjectKey, SessionToken
from fennflow.connectors import Deletion, Location, ObjectAttributes
from fennflow.engine.concurrency import run_all
from fennflow.engine.stamps import Stamp, made_by, stamped
from fennflow.engine.stuck import long_open, overdue, unfinished
from fennflow.exceptions import ConnectorCapabilityException, FennFlowException
from fennflow.reports import Diagnosis, NamespaceDiagnosis

if TYPE_CHECKING:
    from fennflow.engine.parts import Parts

MUCH_SKEW = 60.0
"""Seconds: S3 refuses requests that are 15 minutes off, and the sweep compares clocks."""
PROBES_AT_ONCE = 4
WRITES_WITHIN = 5.0
"""Seconds in which the backend has to take a small change."""


async def diagnose(parts: Parts, namespaces: Sequence[str]) -> Diagnosis:
    """Reach the backend and the namespaces, and tell what results."""
    started = time.monotonic()
    try:
        sessions = len(await parts.backend.sessions(after="", limit=1000))
        latency = time.monotonic() - started
        left = [
            *await unfinished(parts.backend),
            *await long_open(parts.backend, parts.config.doubt_period),
            *await overdue(parts.backend),
            *await _refuses_writes(parts),
        ]
    except FennFlowException as error:
        return Diagnosis(problems=[f"The backend cannot be reached: {error}"])

    async def look(namespace: str) -> NamespaceDiagnosis:
        return await _look(parts, namespace)

    seen = dict(zip(namespaces, await run_all(PROBES_AT_ONCE, look, namespaces), strict=True))
    diagnosis = Diagnosis(
        guarantees=parts.backend.guarantees, latency=latency, sessions=sessions, namespaces=seen
    )
    return replace(
        diagnosis, problems=(*_problems(seen), *left), advice=tuple(_advice(parts, diagnosis))
    )


async def reach(parts: Parts, namespaces: Sequence[str]) -> None:
    """List the beginning of each namespace, and ask the backend for its oldest session.

    Raises:
        BaseConnectorException: a namespace is missing, or cannot be listed.
        BaseBackendException: the backend cannot be reached.
    """

    async def look(namespace: str) -> None:
        try:
            await _first(parts.connector.list(namespace, f"{parts.config.reserved_prefix}/"))
        except FennFlowException as error:
            error.add_note(
                f"UOW.lifespan() checks that {namespace} can be listed. To start without that, use "
                "UOW.lifespan(check=False)."
            )
            raise

    await parts.backend.sessions(after="", limit=1)
    await run_all(PROBES_AT_ONCE, look, namespaces)


async def _refuses_writes(parts: Parts) -> list[str]:
    """Journal a session that does nothing, and say if the backend does not take that."""
    token = SessionToken(str(uuid_utils.uuid7()))
    key = ObjectKey("", f"{parts.config.reserved_prefix}/probe/{token.session_id}")
    try:
        async with asyncio.timeout(WRITES_WITHIN):
            await parts.backend.stage(token, [key], lambda _: ())
            await parts.backend.abort(token)
            await parts.backend.settle(token)
    except (FennFlowException, TimeoutError) as error:
        reason = str(error) or f"it did not within {WRITES_WITHIN} s"
        return [
            (
                f"The backend can be read, and takes no changes: {reason}. Nothing can be written, "
                "committed or recovered until it does. Look for a process that is stopped, or a "
                "transaction that does not end, and holds a lock of the database; and for its disk "
                "and the rights of its user."
            )
        ]
    return []


async def _look(parts: Parts, namespace: str) -> NamespaceDiagnosis:
    stamp = Stamp(str(uuid_utils.uuid7()), 1)
    key = f"{parts.config.reserved_prefix}/probe/{stamp.session_id}"
    place = Location(key)
    try:
        capabilities = await parts.connector.capabilities(namespace, anew=True)
        attributes = ObjectAttributes(
            media_type="text/plain", metadata=stamped({"Wörter": "äöü"}, stamp)
        )
        started = time.monotonic()
        place = (await parts.connector.put(namespace, key, b"1", attributes)).location
        latency = time.monotonic() - started
        try:
            found = await parts.connector.head(namespace, place)
        finally:
            await parts.connector.delete(namespace, [Deletion(location=place)])
    except FennFlowException as error:
        return NamespaceDiagnosis(error=f"{type(error).__name__}: {error}")
    kept = made_by(found, stamp.session_id, 1)
    skew = None
    if found is not None and found.modified_at is not None:
        skew = found.modified_at.timestamp() - time.time()
    diagnosis = NamespaceDiagnosis(
        capabilities=capabilities, keeps_stamps=kept, latency=latency, clock_skew=skew
    )
    prefix = f"{parts.config.reserved_prefix}/"
    try:
        await _first(parts.connector.list(namespace, prefix))
        await _first(parts.connector.uploads(namespace, prefix))
    except ConnectorCapabilityException:
        return replace(diagnosis, lists_uploads=False)
    except FennFlowException as error:
        return replace(diagnosis, unswept=f"{type(error).__name__}: {error}")
    return diagnosis


async def _first(listing: AsyncIterator[object]) -> None:
    """Ask for a listing, and for no more than its beginning."""
    try:
        await anext(listing, None)
    finally:
        if isinstance(listing, AsyncGenerator):
            await listing.aclose()


def _problems(seen: Mapping[str, NamespaceDiagnosis]) -> list[str]:
    problems: list[str] = []
    for namespace, found in seen.items():
        if found.error is not None:
            problems.append(f"{namespace} cannot be used: {found.error}")
            continue
        if not found.keeps_stamps:
            problems.append(
                f"{namespace} loses metadata whose names have underscores, so that objects cannot "
                "tell whose they are. If a proxy drops such headers, let them pass (nginx: "
                "underscores_in_headers on)."
            )
        if found.unswept is not None:
            problems.append(
                f"What dead processes leave in {namespace} cannot be found and deleted, since a "
                f"listing is refused: {found.unswept}"
            )
        if found.clock_skew is not None and abs(found.clock_skew) > MUCH_SKEW:
            problems.append(
                f"The clock of {namespace} is {found.clock_skew:+.0f} s off this machine's. Set "
                "the clock: requests 15 minutes off are refused, and sweeps go by both."
            )
    return problems


def _advice(parts: Parts, diagnosis: Diagnosis) -> list[str]:
    advice: list[str] = []
    guarantees = diagnosis.guarantees
    if guarantees is not None and not guarantees.durable:
        advice.append(
            "The backend is in memory: what a crash cuts off stays half done. Use "
            "SqlalchemyBackendConfig (fennflow[sqlite] or fennflow[postgresql]) where that matters."
        )
    elif guarantees is not None and guarantees.shared == "machine":
        advice.append("The backend serves one machine. Use PostgreSQL if several use the buckets.")
    for namespace, found in diagnosis.namespaces.items():
        capabilities = found.capabilities
        if not found.lists_uploads:
            advice.append(
                f"{namespace} does not list unfinished multipart uploads: those of dead processes "
                "stay. Let a lifecycle rule of the store abort them."
            )
        if capabilities is None or capabilities.versioned:
            continue
        if not capabilities.conditional_create:
            advice.append(
                f"{namespace} ignores If-None-Match: new files are staged and copied, two "
                "requests each, and objects of others may be overwritten in a race."
            )
        if capabilities.conditional_delete == "none" and not parts.config.hide_pending:
            advice.append(
                f"{namespace} ignores If-Match on deletes: undoing a new file looks first, and "
                "deletes then. hide_pending=True closes that gap, for one more request per file."
            )
    return advice
