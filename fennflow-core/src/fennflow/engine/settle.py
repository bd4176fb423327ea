"""Apply and compensation: the loop that performs a session's steps until it is settled.

The steps come from `plan`, or from the journal after a crash. Every step can be performed any
number of times, by whoever holds the session's token (P7).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import stamina

from fennflow.backends import AbortUpload, Backend, Copy, Delete, ObjectKey, Step, Tombstone
from fennflow.connectors import (
    Connector,
    CopySource,
    Deletion,
    DeletionReport,
    Location,
    StoredObject,
)
from fennflow.engine.concurrency import run_all
from fennflow.engine.stamps import made_by
from fennflow.exceptions import (
    ConnectorUnavailableException,
    NoSuchKeyException,
    PreconditionFailedException,
)

if TYPE_CHECKING:
    from fennflow.backends import SessionToken
    from fennflow.config import ConfigDict

logger = logging.getLogger("fennflow")

R = TypeVar("R")


@dataclass(slots=True)
class Settler:
    """Performs the steps of one session.

    Args:
        connector: where the objects lie.
        backend: where the session is journaled.
        session: whose steps, under which token.
        config: bounds the requests in flight, and names the reserved prefix.
    """

    connector: Connector
    backend: Backend
    session: SessionToken
    config: ConfigDict
    _keep_locked: set[ObjectKey] = field(default_factory=set[ObjectKey])

    async def settle(self, steps: Sequence[Step], tombstones: Collection[Tombstone] = ()) -> None:
        """Perform all steps in the order of P28, then remove the session from the journal.

        Raises:
            FennFlowException: a step keeps failing; the session stays in the journal (P9).
        """
        await self._copy_all([step for step in steps if isinstance(step, Copy)])
        uploads = [step for step in steps if isinstance(step, AbortUpload)]
        await run_all(self.config.max_concurrency, self._abort_upload, uploads)
        await self._delete_all([step for step in steps if isinstance(step, Delete)])
        await self.backend.settle(
            self.session, tombstones=tombstones, keep_locked=self._keep_locked
        )

    async def _copy_all(self, copies: Sequence[Copy]) -> None:
        keys = [ObjectKey(copy.namespace, copy.key) for copy in copies]
        if not keys:
            return
        records = await self.backend.records(keys)
        # A record that names its own key was moved by an earlier run, after all its copies.
        todo = [
            copy
            for copy, key in zip(copies, keys, strict=True)
            if records[key].location.key != copy.key
        ]
        stored = await run_all(self.config.max_concurrency, self._copy, todo)
        moved = [
            replace(
                records[ObjectKey(copy.namespace, copy.key)],
                location=target.location,
                etag=target.etag,
            )
            for copy, target in zip(todo, stored, strict=True)
        ]
        if moved:
            await self.backend.relocate(self.session, moved)

    async def _copy(self, step: Copy) -> StoredObject:
        target = Location(step.key)
        capabilities = await self.connector.capabilities(step.namespace)
        conditional = capabilities.conditional_copy
        doubtful = False

        async def send(*, overwrite: bool) -> StoredObject:
            return await self.connector.copy(
                step.namespace,
                step.key,
                CopySource(step.namespace, step.source),
                extra=step.extra,
                if_match=None if overwrite else step.expected,
                if_none_match=not overwrite and step.expected is None,
            )

        try:
            stored, doubtful = await self._retry(lambda: send(overwrite=not conditional))
        except (PreconditionFailedException, NoSuchKeyException) as error:
            there, _ = await self._retry(lambda: self.connector.head(step.namespace, target))
            if there is not None and made_by(there, self.session.session_id, step.seq):
                stored, doubtful = there, True  # P30: done before, the answer was lost
            elif isinstance(error, NoSuchKeyException):
                raise
            else:
                logger.warning(
                    "%s/%s was changed behind the catalog; the committed bytes replace it (P17)",
                    step.namespace,
                    step.key,
                    extra={"session": self.session.session_id, "key": step.key, "rule": "P17"},
                )
                stored, doubtful = await self._retry(lambda: send(overwrite=True))
        if step.doubtful and (doubtful or stored.retried):
            self._keep_locked.add(ObjectKey(step.namespace, step.key))
        return stored

    async def _abort_upload(self, step: AbortUpload) -> None:
        await self._retry(
            lambda: self.connector.abort_upload(step.namespace, step.key, step.upload_id)
        )

    async def _delete_all(self, steps: Sequence[Delete]) -> None:
        found = await run_all(self.config.max_concurrency, self._resolve, steps)
        batches: list[tuple[str, list[Deletion]]] = []
        by_namespace = sorted(
            ((step.namespace, each) for step, each in zip(steps, found, strict=True)),
            key=lambda pair: pair[0],
        )
        for namespace, group in groupby(by_namespace, key=lambda pair: pair[0]):
            capabilities = await self.connector.capabilities(namespace)
            batch: list[Deletion] = []
            for deletion in (deletion for _, each in group for deletion in each):
                if deletion.if_match is not None and capabilities.conditional_delete == "single":
                    batches.append((namespace, [deletion]))
                    continue
                batch.append(deletion)
                if len(batch) == self.connector.max_deletions:
                    batches.append((namespace, batch))
                    batch = []
            if batch:
                batches.append((namespace, batch))
        await run_all(self.config.max_concurrency, self._delete_batch, batches)

    async def _resolve(self, step: Delete) -> Sequence[Deletion]:
        """Return what to delete: after a look at the object where its name proves nothing."""
        capabilities = await self.connector.capabilities(step.namespace)
        conditions = capabilities.conditional_delete
        if step.owner is None:
            # A committed delete minds the ETag only where that costs no request of its own.
            etag = step.etag if conditions == "batch" else None
            return [Deletion(location=step.location, if_match=etag)]
        if step.etag is not None and conditions != "none":
            return [Deletion(location=step.location, if_match=step.etag)]
        if capabilities.versioned:
            return await self._own_versions(step)
        there, _ = await self._retry(lambda: self.connector.head(step.namespace, step.location))
        if not self._is_own(there, step):
            return []
        etag = None if conditions == "none" else there.etag
        return [Deletion(location=step.location, if_match=etag)]

    def _is_own(self, there: StoredObject | None, step: Delete) -> TypeGuard[StoredObject]:
        session_id = step.owner_session or self.session.session_id
        return step.owner is not None and made_by(there, session_id, step.owner)

    async def _own_versions(self, step: Delete) -> Sequence[Deletion]:
        versions, _ = await self._retry(
            lambda: self.connector.versions(step.namespace, step.location.key)
        )
        own: list[Deletion] = []
        for version in versions:
            head = partial(self.connector.head, step.namespace, version.location)
            if self._is_own((await self._retry(head))[0], step):
                own.append(Deletion(location=version.location))
        return own

    async def _delete_batch(self, batch: tuple[str, list[Deletion]]) -> None:
        namespace, deletions = batch

        async def send() -> DeletionReport:
            report = await self.connector.delete(namespace, deletions)
            for error in report.errors:
                if error is not None and _may_pass(error):
                    raise error
            return report

        report, doubtful = await self._retry(send)
        for deletion, error in zip(deletions, report.errors, strict=True):
            if isinstance(error, PreconditionFailedException):
                logger.warning(
                    "%s/%s holds what this session did not know of; it was left alone (P18)",
                    namespace,
                    deletion.location.key,
                    extra={
                        "session": self.session.session_id,
                        "key": deletion.location.key,
                        "rule": "P18",
                    },
                )
            elif error is not None:
                raise error
        if doubtful or report.retried:
            self._keep_locked.update(
                ObjectKey(namespace, deletion.location.key)
                for deletion in deletions
                if deletion.location.version_id is None
                and not deletion.location.key.startswith(self.config.reserved_prefix)
            )

    async def _retry(self, request: Callable[[], Awaitable[R]]) -> tuple[R, bool]:
        """Send an idempotent request again while the store is unavailable (P9).

        Returns:
            its result, and whether the answer of an earlier attempt was lost.
        """
        async for attempt in stamina.retry_context(
            on=_may_pass, attempts=4, wait_initial=0.1, wait_max=2.0
        ):
            with attempt:
                return await request(), attempt.num > 1
        message = "unreachable: retry_context raises when it gives up"
        raise AssertionError(message)


def _may_pass(error: Exception) -> bool:
    """Whether an idempotent request may succeed when it is sent again."""
    contended = isinstance(error, PreconditionFailedException) and error.contended
    return contended or isinstance(error, ConnectorUnavailableException)
