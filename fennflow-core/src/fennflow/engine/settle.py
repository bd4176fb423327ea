"""Apply and compensation: the loop that performs a session's steps until it is settled.

The steps come from `plan`, or from the journal after a crash. Every step can be performed any
number of times, by whoever holds the session's token (P7).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import stamina

from fennflow.backends import AbortUpload, Copy, Delete, ObjectKey, Record, Step, Tombstone
from fennflow.connectors import (
    CopySource,
    Deletion,
    DeletionReport,
    Location,
    StoredObject,
)
from fennflow.engine.concurrency import run_all
from fennflow.engine.stamps import began, made_by, stamp_of
from fennflow.engine.telemetry import tell
from fennflow.exceptions import (
    BaseConnectorException,
    ConnectorUnavailableException,
    NoSuchKeyException,
    PreconditionFailedException,
)

if TYPE_CHECKING:
    from fennflow.backends import Backend
    from fennflow.config import ConfigDict
    from fennflow.connectors import Connector
    from fennflow.engine.leases import Lease, Leases

R = TypeVar("R")

CLOCK_SKEW = 960.0
"""Seconds that two clocks may differ: S3 refuses requests that are 15 minutes off."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What everything that an engine does works with.

    Args:
        config: the user's configuration.
        connector: where the objects lie.
        backend: where they are recorded, and sessions are journaled.
        leases: held by this process.
    """

    config: ConfigDict
    connector: Connector
    backend: Backend
    leases: Leases


@dataclass(slots=True)
class Settler:
    """Performs the steps of one session.

    Args:
        parts: of the engine.
        lease: whose steps, and the right to perform them.
        claimed: whether it was taken over from an owner who had begun to settle it.
        in_doubt: the keys which copies and deletions of this attempt and earlier ones may still
            reach; they stay locked for a while (P20 b, c).
    """

    parts: Parts
    lease: Lease
    claimed: bool = False
    in_doubt: set[ObjectKey] = field(default_factory=set[ObjectKey])

    async def settle(
        self,
        steps: Sequence[Step],
        tombstones: Collection[Tombstone] = (),
        *,
        buried: Collection[Tombstone] = (),
    ) -> None:
        """Perform all steps, then remove the session from the journal.

        Args:
            steps: of apply or compensation.
            tombstones: to leave.
            buried: tombstones to remove.

        Raises:
            FennFlowException: a step keeps failing; the session stays in the journal (P9).
        """
        await self.perform(steps)
        await self.parts.backend.settle(
            self.lease.token, tombstones=tombstones, keep_locked=self.in_doubt, buried=buried
        )
        self.parts.leases.release(self.lease)

    async def perform(self, steps: Sequence[Step]) -> None:
        """Perform all steps in the order of P28."""
        await self._copy_all([step for step in steps if isinstance(step, Copy)])
        uploads = [step for step in steps if isinstance(step, AbortUpload)]
        await run_all(self.parts.config.max_concurrency, self._abort_upload, uploads)
        await self._delete_all([step for step in steps if isinstance(step, Delete)])

    async def _copy_all(self, copies: Sequence[Copy]) -> None:
        keys = [ObjectKey(copy.namespace, copy.key) for copy in copies]
        if not keys:
            return
        records = await self.parts.backend.records(keys)
        # A record that names its own key was moved by an earlier run, after all its copies.
        todo = [
            (copy, records[key])
            for copy, key in zip(copies, keys, strict=True)
            if records[key].location.key != copy.key
        ]
        stored = await run_all(self.parts.config.max_concurrency, self._copy, todo)
        moved = [
            replace(record, location=target.location, etag=target.etag)
            for (_, record), target in zip(todo, stored, strict=True)
        ]
        if moved:
            await self.parts.backend.relocate(self.lease.token, moved)

    async def _copy(self, todo: tuple[Copy, Record]) -> StoredObject:
        step, record = todo
        target = Location(step.key)
        capabilities = await self.parts.connector.capabilities(step.namespace)
        conditional = capabilities.conditional_copy
        doubtful = False

        async def on_upload(upload_id: str) -> None:
            await self.parts.backend.note_upload(self.lease.token, step.seq, upload_id)

        async def send(*, overwrite: bool) -> StoredObject:
            return await self.parts.connector.copy(
                step.namespace,
                step.key,
                CopySource(step.namespace, step.source, size=record.size),
                extra=step.extra,
                if_match=None if overwrite else step.expected,
                if_none_match=not overwrite and step.expected is None,
                on_upload=on_upload,
            )

        # In doubt until it is answered: nobody else may write there if this is broken off.
        key = ObjectKey(step.namespace, step.key)
        new = step.doubtful and key not in self.in_doubt
        if new:
            self.in_doubt.add(key)
        try:
            stored, doubtful = await self._retry(lambda: send(overwrite=not conditional))
        except (PreconditionFailedException, NoSuchKeyException) as error:
            there, _ = await self._retry(lambda: self.parts.connector.head(step.namespace, target))
            if there is not None and made_by(there, self.lease.token.session_id, step.seq):
                stored, doubtful = there, True  # P30: done before, the answer was lost
            elif isinstance(error, NoSuchKeyException):
                raise
            else:
                stamp = None if there is None else stamp_of(there)
                # It may be from an earlier write of this session, the answer to which was lost.
                if stamp is None or stamp.session_id != self.lease.token.session_id:
                    tell(
                        logging.WARNING,
                        "%s/%s was changed behind the catalog; the committed bytes replace it "
                        "(P17)",
                        step.namespace,
                        step.key,
                        rule="P17",
                        session=self.lease.token.session_id,
                        key=f"{step.namespace}/{step.key}",
                    )
                stored, doubtful = await self._retry(lambda: send(overwrite=True))
        if new and not (self.claimed or doubtful or stored.retried):
            self.in_doubt.discard(key)
        return stored

    async def _abort_upload(self, step: AbortUpload) -> None:
        await self._retry(
            lambda: self.parts.connector.abort_upload(step.namespace, step.key, step.upload_id)
        )

    async def _delete_all(self, steps: Sequence[Delete]) -> None:
        found = await run_all(self.parts.config.max_concurrency, self._resolve, steps)
        if self.claimed:
            for step in steps:
                versions = (await self.parts.connector.capabilities(step.namespace)).versioned
                if step.owner is None or not versions:
                    self.in_doubt |= self._users(step.namespace, [step.location])
        batches: list[tuple[str, list[Deletion]]] = []
        by_namespace = sorted(
            ((step.namespace, each) for step, each in zip(steps, found, strict=True)),
            key=lambda pair: pair[0],
        )
        for namespace, group in groupby(by_namespace, key=lambda pair: pair[0]):
            capabilities = await self.parts.connector.capabilities(namespace)
            batch: list[Deletion] = []
            for deletion in (deletion for _, each in group for deletion in each):
                if deletion.if_match is not None and capabilities.conditional_delete == "single":
                    batches.append((namespace, [deletion]))
                    continue
                batch.append(deletion)
                if len(batch) == self.parts.connector.max_deletions:
                    batches.append((namespace, batch))
                    batch = []
            if batch:
                batches.append((namespace, batch))
        await run_all(self.parts.config.max_concurrency, self._delete_batch, batches)

    async def _resolve(self, step: Delete) -> Sequence[Deletion]:
        """Return what to delete: after a look at the object where its name proves nothing."""
        capabilities = await self.parts.connector.capabilities(step.namespace)
        conditions = capabilities.conditional_delete
        if step.owner is None:
            # A committed delete minds the ETag only where that costs no request of its own.
            etag = step.etag if conditions == "batch" else None
            return [Deletion(location=step.location, if_match=etag)]
        if step.etag is not None and conditions != "none":
            return [Deletion(location=step.location, if_match=step.etag)]
        if capabilities.versioned:
            return await self._own_versions(step)
        there, _ = await self._retry(
            lambda: self.parts.connector.head(step.namespace, step.location)
        )
        if not self._is_own(there, step):
            return []
        etag = None if conditions == "none" else there.etag
        return [Deletion(location=step.location, if_match=etag)]

    def _is_own(self, there: StoredObject | None, step: Delete) -> TypeGuard[StoredObject]:
        session_id = step.owner_session or self.lease.token.session_id
        return step.owner is not None and made_by(there, session_id, step.owner)

    async def _own_versions(self, step: Delete) -> Sequence[Deletion]:
        session_id = step.owner_session or self.lease.token.session_id
        versions, _ = await self._retry(
            lambda: versions_since(self.parts, step.namespace, step.location.key, session_id)
        )
        own: list[Deletion] = []
        for version in versions:
            head = partial(self.parts.connector.head, step.namespace, version.location)
            if self._is_own((await self._retry(head))[0], step):
                own.append(Deletion(location=version.location))
        return own

    async def _delete_batch(self, batch: tuple[str, list[Deletion]]) -> None:
        namespace, deletions = batch

        async def send() -> DeletionReport:
            report = await self.parts.connector.delete(namespace, deletions)
            for error in report.errors:
                if error is not None and _may_pass(error):
                    raise error
            return report

        new = self._users(namespace, [each.location for each in deletions]) - self.in_doubt
        self.in_doubt |= new
        report, doubtful = await self._retry(send)
        if not (doubtful or report.retried):
            self.in_doubt -= new
        for deletion, error in zip(deletions, report.errors, strict=True):
            if isinstance(error, PreconditionFailedException):
                tell(
                    logging.WARNING,
                    "%s/%s holds what this session did not know of; it was left alone (P18)",
                    namespace,
                    deletion.location.key,
                    rule="P18",
                    session=self.lease.token.session_id,
                    key=f"{namespace}/{deletion.location.key}",
                )
            elif error is not None:
                raise error

    def _users(self, namespace: str, locations: Iterable[Location]) -> set[ObjectKey]:
        """Return the keys at which a late deletion could hurt what others put there (P20 b)."""
        return {
            ObjectKey(namespace, location.key)
            for location in locations
            if location.version_id is None
            and not location.key.startswith(self.parts.config.reserved_prefix)
        }

    async def _retry(self, request: Callable[[], Awaitable[R]]) -> tuple[R, bool]:
        """Send an idempotent request again while the store is unavailable (P9).

        Returns:
            its result, and whether the answer of an earlier attempt was lost.
        """
        lost = False
        async for attempt in stamina.retry_context(
            on=_may_pass, attempts=4, wait_initial=0.1, wait_max=2.0
        ):
            with attempt:
                self.lease.check()
                try:
                    return await request(), lost
                except BaseConnectorException as error:
                    lost = lost or error.ambiguous
                    raise
        message = "unreachable: retry_context raises when it gives up"
        raise AssertionError(message)


async def versions_since(
    parts: Parts, namespace: str, key: str, session_id: str
) -> Sequence[StoredObject]:
    """Return the versions of a key that a transaction may have written: none is older than it.

    Its id bears the time of its process, a version that of the store.
    """
    started = began(session_id)
    if started is None:
        return await parts.connector.versions(namespace, key)
    margin = timedelta(seconds=max(CLOCK_SKEW, parts.config.doubt_period))
    return await parts.connector.recent_versions(namespace, key, since=started - margin)


def _may_pass(error: Exception) -> bool:
    """Whether an idempotent request may succeed when it is sent again."""
    contended = isinstance(error, PreconditionFailedException) and error.contended
    return contended or isinstance(error, ConnectorUnavailableException)
