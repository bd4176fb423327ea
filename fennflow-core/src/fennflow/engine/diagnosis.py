"""Diagnosis: tests what a configuration guarantees."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import uuid_utils

from fennflow.backends import Area, ObjectKey, TransactionToken, WriteId
from fennflow.connectors import Deletion, Location, ObjectAttributes, PutRequest
from fennflow.engine.catalogs import catalogs_in, others, shares
from fennflow.engine.concurrency import run_all
from fennflow.engine.hidden import hidden_in
from fennflow.engine.stamps import Stamp, made_by, stamped
from fennflow.engine.stuck import overdue, undecided, unfinished
from fennflow.exceptions import (
    CatalogDivergedException,
    ConnectorCapabilityException,
    FennFlowException,
    IncompleteListingException,
)
from fennflow.reports import Diagnosis, NamespaceDiagnosis

if TYPE_CHECKING:
    from fennflow.engine.context import EngineContext
    from fennflow.engine.jobs import Jobs

MUCH_SKEW = 60.0
"""Seconds: S3 refuses requests that are 15 minutes off, and the sweep compares clocks."""
PROBES_AT_ONCE = 4
WRITES_WITHIN = 5.0
"""Seconds within which the backend has to accept a small change."""


async def diagnose(context: EngineContext, areas: Sequence[Area], jobs: Jobs) -> Diagnosis:
    """Connect to the backend and the buckets of areas, and report the result."""
    started = time.monotonic()
    try:
        transactions = len(await context.backend.transactions(after="", limit=1000))
        latency = time.monotonic() - started
        left = [
            *await unfinished(context.backend),
            *(await undecided(context.backend, context.config.late_write_period)).values(),
            *await overdue(context.backend),
            *(await jobs.left())[1],
            *await _unfilled(context),
            *await _hidden(context, areas),
            *await _refuses_writes(context),
        ]
    except FennFlowException as error:
        return Diagnosis(problems=[f"The backend cannot be reached: {error}"])

    namespaces = sorted({area.namespace for area in areas})

    async def look(namespace: str) -> NamespaceDiagnosis:
        return await _look(context, namespace)

    seen = dict(zip(namespaces, await run_all(PROBES_AT_ONCE, look, namespaces), strict=True))
    diagnosis = Diagnosis(
        guarantees=context.backend.guarantees,
        latency=latency,
        transactions=transactions,
        namespaces=seen,
    )
    advice = [*_advice(context, diagnosis), *_shared(context, areas, seen)]
    return replace(diagnosis, problems=(*_problems(context, seen), *left), advice=tuple(advice))


async def _unfilled(context: EngineContext) -> list[str]:
    """Return what to do about first readings of buckets that were interrupted."""
    return [
        (
            f"The first reading of {fill.area} has not ended, so none of the files that it found can be "
            "seen yet. It continues when a unit of work or a lifespan is opened, or by fennflow adopt "
            "MODULE:UOW; what was recorded stays."
        )
        for fill in await context.backend.fills()
    ]


async def _hidden(context: EngineContext, areas: Sequence[Area]) -> list[str]:
    """Return what to do about objects that could not be recorded."""
    problems: list[str] = []
    for area in areas:
        try:
            counts = await hidden_in(context, area)
        except CatalogDivergedException as error:
            problems.append(str(error))
            continue
        if counts:
            shown = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            problems.append(
                f"Not all files of {area} can be seen. When they were last compared with the catalog, these "
                f"could not be recorded: {shown}. fennflow reconcile MODULE:UOW names them, and compares again."
            )
    return problems


def _shared(
    context: EngineContext, areas: Sequence[Area], seen: Mapping[str, NamespaceDiagnosis]
) -> list[str]:
    """Return what to do about other catalogs that write in the same place as this one."""
    return [
        shares(area, other)
        for area in areas
        for other in others(context, area, seen[area.namespace].catalogs)
    ]


async def reach(context: EngineContext, namespaces: Sequence[str]) -> None:
    """Read the beginning of each namespace's listing, and the backend's oldest transaction.

    Raises:
        BaseConnectorException: a namespace is missing, or cannot be listed.
        BaseBackendException: the backend cannot be reached.
    """

    async def look(namespace: str) -> None:
        try:
            await _first(context.connector.list(namespace, f"{context.config.reserved_prefix}/"))
        except FennFlowException as error:
            error.add_note(
                f"UOW.lifespan() checks that {namespace} can be listed. To start without that, use "
                "UOW.lifespan(check=False)."
            )
            raise

    await context.backend.transactions(after="", limit=1)
    await run_all(PROBES_AT_ONCE, look, namespaces)


async def _refuses_writes(context: EngineContext) -> list[str]:
    """Journal an empty transaction; if the backend does not accept it, return what to do."""
    token = TransactionToken(str(uuid_utils.uuid7()))
    key = ObjectKey("", f"{context.config.reserved_prefix}/probe/{token.transaction_id}")
    try:
        async with asyncio.timeout(WRITES_WITHIN):
            await context.backend.begin_writes(token, [key], lambda _: ())
            await context.backend.abort(token)
            await context.backend.settle(token)
    except (FennFlowException, TimeoutError) as error:
        reason = str(error) or f"it did not within {WRITES_WITHIN} s"
        return [
            (
                f"The backend can be read, but accepts no changes: {reason}. Nothing can be written, "
                "committed or recovered until it does. Look for a process that is stopped, or a "
                "transaction that does not end, and holds a lock of the database; and for its disk "
                "and the rights of its user."
            )
        ]
    return []


async def _look(context: EngineContext, namespace: str) -> NamespaceDiagnosis:
    stamp = Stamp(WriteId(str(uuid_utils.uuid7()), 1))
    key = f"{context.config.reserved_prefix}/probe/{stamp.write.transaction_id}"
    place = Location(key)
    try:
        capabilities = await context.connector.capabilities(namespace, refresh=True)
        attributes = ObjectAttributes(
            media_type="text/plain", metadata=stamped({"Wörter": "äöü"}, stamp)
        )
        started = time.monotonic()
        place = (await context.connector.put(PutRequest(namespace, key, attributes), b"1")).location
        latency = time.monotonic() - started
        try:
            found = await context.connector.head(namespace, place)
        finally:
            await context.connector.delete(namespace, [Deletion(location=place)])
    except FennFlowException as error:
        return NamespaceDiagnosis(error=f"{type(error).__name__}: {error}")
    kept = made_by(found, stamp.write)
    skew = None
    if found is not None and found.modified_at is not None:
        skew = found.modified_at.timestamp() - time.time()
    try:
        catalogs = await catalogs_in(context, namespace)
    except FennFlowException:
        catalogs = []  # the error of this listing is reported below
    diagnosis = NamespaceDiagnosis(
        capabilities=capabilities,
        keeps_stamps=kept,
        latency=latency,
        clock_skew=skew,
        catalogs=catalogs,
    )
    prefix = f"{context.config.reserved_prefix}/"
    try:
        rules = await context.connector.rules_on(namespace, prefix)
    except FennFlowException as error:
        diagnosis = replace(diagnosis, rules_unread=f"{type(error).__name__}: {error}")
    else:
        if rules is not None:
            aborts = rules.abort_uploads
            diagnosis = replace(diagnosis, rules=rules.removing, aborts_uploads=aborts)
    try:
        await _first(context.connector.list(namespace, prefix))
        await _first(context.connector.uploads(namespace, prefix))
    except ConnectorCapabilityException:
        return replace(diagnosis, lists_uploads=False)
    except FennFlowException as error:
        return replace(diagnosis, unswept=f"{type(error).__name__}: {error}")
    return diagnosis


async def _first(listing: AsyncIterator[object]) -> None:
    """Read only the beginning of a listing."""
    try:
        await anext(listing, None)
    except IncompleteListingException:
        pass  # it can be listed; an odd key is not an error of the store
    finally:
        if isinstance(listing, AsyncGenerator):
            await listing.aclose()


def _problems(context: EngineContext, seen: Mapping[str, NamespaceDiagnosis]) -> list[str]:
    problems: list[str] = []
    for namespace, found in seen.items():
        if found.error is not None:
            problems.append(f"{namespace} cannot be used: {found.error}")
            continue
        if not found.keeps_stamps:
            problems.append(
                f"{namespace} drops metadata, or those whose names contain underscores, so FennFlow "
                "cannot recognise its own objects, and another catalog treats them as foreign. "
                "Allow such headers in your proxy (nginx: underscores_in_headers on)."
            )
        if found.rules:
            problems.append(
                f"Lifecycle rules of {namespace} delete or archive objects under "
                f"{context.config.reserved_prefix}/: {', '.join(found.rules)}. Bytes of a committed "
                "transaction are there until they are copied to their paths. Limit the rules to other "
                "prefixes."
            )
        if found.unswept is not None:
            problems.append(
                f"Leftovers of crashed processes in {namespace} cannot be found and deleted, since a "
                f"listing is refused: {found.unswept}"
            )
        if found.clock_skew is not None and abs(found.clock_skew) > MUCH_SKEW:
            problems.append(
                f"The clock of {namespace} differs from this machine's by {found.clock_skew:+.0f} s. Set "
                "the clock: requests 15 minutes off are refused, and sweeps depend on both clocks."
            )
    return problems


def _advice(context: EngineContext, diagnosis: Diagnosis) -> list[str]:
    advice: list[str] = []
    guarantees = diagnosis.guarantees
    if guarantees is not None and not guarantees.durable:
        advice.append(
            "The backend is in memory: work that a crash interrupts stays half done. Use "
            "SqlalchemyBackendConfig (fennflow[sqlite] or fennflow[postgresql]) if that matters."
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
        elif found.aborts_uploads is False:
            advice.append(
                f"No lifecycle rule of {namespace} aborts unfinished multipart uploads. FennFlow aborts "
                "its own, but not one whose process died before it knew the id. Add a rule with "
                "AbortIncompleteMultipartUpload after 7 days."
            )
        if found.rules_unread is not None:
            advice.append(
                f"The lifecycle rules of {namespace} cannot be read: {found.rules_unread} Make sure "
                f"that none of them deletes or archives objects under "
                f"{context.config.reserved_prefix}/, and that one aborts unfinished multipart uploads."
            )
        if capabilities is None or capabilities.versioned:
            continue
        if not capabilities.conditional_create:
            advice.append(
                f"{namespace} ignores If-None-Match: new files are staged and copied, two "
                "requests each, and objects of other writers may be overwritten in a race."
            )
        if capabilities.conditional_delete == "none" and not context.config.hide_pending:
            advice.append(
                f"{namespace} ignores If-Match on deletes: undoing a new file checks first, and then "
                "deletes. hide_pending=True closes that gap, for one more request per file."
            )
    return advice
