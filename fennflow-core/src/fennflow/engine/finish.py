"""Finishing a decided transaction: apply after a commit, compensation after an abort.

The steps come from `plan`, or from the journal after a crash. They are performed in batches, and each
batch is noted in the journal when it is done. The owner of the transaction's token may finish it any
number of times (P7). A noted batch is not repeated: its records were moved, or its keys released
(P9, P28).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeGuard, TypeVar

from fennflow.backends import (
    AbortUpload,
    Copy,
    Decision,
    Delete,
    LateWrite,
    ObjectKey,
    Outcome,
    Record,
    Settlement,
    Step,
    WriteId,
)
from fennflow.connectors import (
    CopyRequest,
    CopySource,
    Deletion,
    DeletionReport,
    Location,
    StoredObject,
)
from fennflow.engine.concurrency import run_all, shielded
from fennflow.engine.context import EngineContext, Progress
from fennflow.engine.plan import outstanding
from fennflow.engine.stamps import began, made_by, stamp_of
from fennflow.exceptions import (
    BaseConnectorException,
    ConnectorUnavailableException,
    NoSuchKeyException,
    NoSuchNamespaceException,
    PreconditionFailedException,
    TransactionLostException,
)
from fennflow.retries import repeat
from fennflow.telemetry import log_event

if TYPE_CHECKING:
    from fennflow.engine.leases import Lease

R = TypeVar("R")
S = TypeVar("S", Copy, Delete, AbortUpload)
T = TypeVar("T")

ATTEMPTS = 4
"""Attempts at a request that the store does not answer."""
KEYS_AT_ONCE = 1000
"""How many keys are finished and released together."""
OUTAGE = 8
"""Consecutive steps without a response until the store counts as unreachable; and single deletions
that are refused until the rest is not tried one by one."""
UNDER_WAY = 5.0
"""Seconds for which a copy may continue if it is cancelled while its upload begins."""
NAMED = 5
"""The most keys that an error names."""

_DeletionBatch = tuple[str, Sequence[tuple[Delete, Deletion]]]

CLOCK_SKEW = 960.0
"""Seconds that two clocks may differ: S3 refuses requests that are 15 minutes off."""


@dataclass(slots=True)
class Finisher:
    """One attempt to perform steps of one transaction. A step that fails blocks only its own key (P9).

    Args:
        context: of the engine.
        lease: the transaction, and the right to act for it.
        claimed: whether it was taken over from an owner that had begun to finish it.
        progress: of earlier attempts.
        failed: the keys with a failed step, and the error.
        retained: uncommitted versions that the store refuses to delete, for instance because of
            Object Lock. They lock no key; their deletion is retried like that of a late write.
    """

    context: EngineContext
    lease: Lease
    claimed: bool = False
    progress: Progress = field(default_factory=Progress)
    failed: dict[ObjectKey, Exception] = field(default_factory=dict[ObjectKey, Exception])
    retained: dict[LateWrite, BaseConnectorException] = field(
        default_factory=dict[LateWrite, BaseConnectorException]
    )
    _missed: int = 0
    _refusals: int = 0

    async def finish_decided(
        self, decision: Decision, undo: Iterable[Step], late_writes: Collection[LateWrite]
    ) -> None:
        """Finish a decided transaction, committed or aborted (P6).

        Args:
            decision: the state of the transaction in the journal.
            undo: the steps of its compensation, used if it was aborted.
            late_writes: the late writes to record in that case; the pivot of a commit has written
                its own.

        Raises:
            FennFlowException: as for `finish`.
        """
        if decision.finished:
            self.context.leases.release(self.lease)
            return
        await self.finish(
            outstanding(decision, undo),
            () if decision.outcome is Outcome.COMMITTED else late_writes,
            keys=decision.keys,
        )

    async def finish(
        self,
        steps: Iterable[Step],
        late_writes: Collection[LateWrite] = (),
        *,
        keys: Iterable[ObjectKey] = (),
        late_writes_checked: Collection[LateWrite] = (),
    ) -> None:
        """Perform all steps, release their keys, and remove the transaction from the journal.

        Args:
            steps: of apply or compensation.
            late_writes: the late writes to record.
            keys: other keys that the transaction holds, for which there is nothing to do.
            late_writes_checked: the late writes to remove.

        Raises:
            FennFlowException: steps of some keys failed. These keys stay in the journal, all others
                are released (P9).
        """
        by_key: dict[ObjectKey, list[Step]] = {key: [] for key in keys}
        for step in steps:
            by_key.setdefault(step.object_key, []).append(step)
        order = sorted(by_key)
        if self.claimed:
            random.shuffle(order)  # it is not known which ones failed before
        order.sort(key=self.progress.failures.__getitem__)  # those that failed before come last
        batches = list(batches_of(order, KEYS_AT_ONCE)) or [[]]
        journaled = set(late_writes_checked)
        for batch in batches:
            await self._attempt([step for key in batch for step in by_key[key]])
            done = {key for key in batch if key not in self.failed}
            whole = batch is batches[-1] and not self.failed
            if not (whole or done):
                continue
            gone = {
                each
                for each in late_writes_checked
                if (whole or ObjectKey(each.namespace, each.key) in done)
                and each not in self.retained
            }
            new = self.retained.keys() - journaled
            journaled |= new
            await self.context.backend.settle(
                self.lease.token,
                Settlement(
                    keys=None if whole else done,
                    late_writes=[*late_writes, *new],
                    keep_locked=self.progress.keys_in_flight & done,
                    late_writes_checked=gone,
                ),
            )
            self.progress.keys_in_flight -= done
            late_writes = ()
            late_writes_checked = [each for each in late_writes_checked if each not in gone]
        self._raise_failures()
        self.context.leases.release(self.lease)

    async def perform(self, steps: Sequence[Step]) -> None:
        """Perform all steps in the order of P28, without the journal.

        Raises:
            FennFlowException: some failed; all others are done.
        """
        await self._attempt(steps)
        self._raise_failures()

    def _raise_failures(self) -> None:
        """Raise the first failure, if there was one, with the keys of all failures as a note."""
        if not self.failed:
            return
        error = next(iter(self.failed.values()))
        names = [str(key) for key in list(self.failed)[:NAMED]]
        more = len(self.failed) - len(names)
        error.add_note(
            f"Not finished yet: {', '.join(names)}{f' and {more} more' if more > 0 else ''}."
        )
        raise error

    async def _attempt(self, steps: Sequence[Step]) -> None:
        """Perform steps in the order of P28; `failed` gets the keys that failed."""
        await self._copy_all([step for step in steps if isinstance(step, Copy)])
        uploads = [step for step in steps if isinstance(step, AbortUpload)]
        await self._each(self._abort_upload, uploads)
        await self._delete_all([step for step in steps if isinstance(step, Delete)])

    async def _each(self, do: Callable[[S], Awaitable[R]], steps: Sequence[S]) -> list[tuple[S, R]]:
        """Perform steps concurrently; return those that are done, with their results."""

        async def one(step: S) -> tuple[S, R] | None:
            if step.object_key in self.failed or self._is_away([step.object_key]):
                return None
            try:
                result = await do(step)
            except TransactionLostException:
                raise
            except Exception as error:  # noqa: BLE001 - raised when all else is done
                self._fail(step.object_key, error)
                return None
            self._missed = 0
            return step, result

        done = await run_all(self.context.config.max_concurrency, one, steps)
        return [each for each in done if each is not None]

    async def _retry(
        self, key: ObjectKey, request: Callable[[], Awaitable[R]], *, lost: bool = False
    ) -> tuple[R, bool]:
        """Send an idempotent request until it is answered, with a few retries, while the lease is held.

        Args:
            key: the key of the object.
            request: sends the request.
            lost: whether the answer to an earlier attempt was lost.

        Returns:
            its result, and whether the answer to an attempt was lost. Its exceptions say so, too.
        """
        circuit, namespace = self.context.circuit, key.namespace

        async def send() -> R:
            nonlocal lost
            self.lease.check()
            try:
                circuit.check(namespace)
                with circuit.request(namespace):
                    return await request()
            except BaseConnectorException as error:
                lost = error.ambiguous = lost or error.ambiguous
                raise

        result = await repeat(
            send,
            on=lambda error: may_pass(error) and not circuit.is_open(namespace),
            attempts=ATTEMPTS,
            what=f"A request for {key}",
            wait_max=2.0,
            transaction=self.lease.token.transaction_id,
        )
        return result, lost

    def _fail(self, key: ObjectKey, error: Exception) -> None:
        self.failed[key] = error
        self.progress.failures[key] += 1
        self._missed = self._missed + 1 if isinstance(error, ConnectorUnavailableException) else 0

    def _is_away(self, keys: Iterable[ObjectKey]) -> bool:
        """Whether the store does not respond: then nothing more is sent, and the keys stay locked."""
        if self._missed < OUTAGE:
            return False
        last = next(reversed(self.failed.values()))
        for key in keys:
            self.failed.setdefault(key, last)
        return True

    async def _copy_all(self, copies: Sequence[Copy]) -> None:
        if not copies:
            return
        if self.claimed:  # the owner may have sent copies, even of moved records
            late = {copy.object_key for copy in copies if self._may_be_late(copy)}
            self.progress.keys_in_flight |= late
        records = await self.context.backend.records([copy.object_key for copy in copies])
        # A record that names its own key was moved by an earlier attempt.
        todo = [
            copy
            for copy in copies
            if copy.object_key in records and records[copy.object_key].location.key != copy.key
        ]

        moved = [
            replace(records[copy.object_key], location=target.location, etag=target.etag)
            for copy, target in await self._each(partial(self._copy, records), todo)
        ]
        if moved:
            await self.context.backend.relocate(self.lease.token, moved)

    async def _copy(self, records: Mapping[ObjectKey, Record], step: Copy) -> StoredObject:
        # The key stays locked until there is a response, even if this call is cut off.
        key = step.object_key
        new = self._may_be_late(step) and key not in self.progress.keys_in_flight
        if new:
            self.progress.keys_in_flight.add(key)
        try:
            stored, lost = await self._copied(step, records[key].size)
        except BaseConnectorException as error:
            if new and not error.ambiguous:
                self.progress.keys_in_flight.discard(key)
            raise
        if new and not (lost or stored.retried):
            self.progress.keys_in_flight.discard(key)
        return stored

    def _may_be_late(self, step: Copy) -> bool:
        """Whether a copy may arrive although the staging object is gone by then (P20 c)."""
        return step.ambiguous or self.context.connector.copies_through_client

    async def _copied(self, step: Copy, size: int) -> tuple[StoredObject, bool]:
        """Copy; return the object at the target, and whether the answer to an attempt was lost."""
        key = step.object_key
        copy = partial(self._copy_once, step, size)
        capabilities = await self.context.connector.capabilities(step.namespace)
        conditional = capabilities.conditional_copy
        try:
            stored, lost = await self._retry(key, partial(copy, overwrite=not conditional))
        except (PreconditionFailedException, NoSuchKeyException) as error:
            head = partial(self.context.connector.head, step.namespace, Location(step.key))
            there, _ = await self._retry(key, head)
            if there is not None and made_by(
                there, WriteId(self.lease.token.transaction_id, step.seq)
            ):
                # P30: done before, the answer was lost
                await self._retry(key, partial(self._end_upload_of, step))
                self.progress.uploads.pop(step.seq, None)
                return there, True
            if isinstance(error, NoSuchKeyException) and (there is not None or not conditional):
                raise  # the source is gone
            # Some stores also answer 404 if the target of a conditional copy is gone.
            stamp = None if there is None else stamp_of(there)
            # It may be from an earlier write of this transaction whose response was lost.
            if stamp is None or stamp.write.transaction_id != self.lease.token.transaction_id:
                log_event(
                    logging.WARNING,
                    "%s/%s was modified outside FennFlow; overwriting it with the committed version (P17)",
                    step.namespace,
                    step.key,
                    rule="P17",
                    transaction=self.lease.token.transaction_id,
                    key=f"{step.namespace}/{step.key}",
                )
            stored, lost = await self._retry(
                key, partial(copy, overwrite=True), lost=error.ambiguous
            )
        self.progress.uploads.pop(step.seq, None)
        return stored, lost

    async def _copy_once(self, step: Copy, size: int, *, overwrite: bool) -> StoredObject:
        await self._end_upload_of(step)

        async def on_upload(upload_id: str) -> None:
            self.lease.check()  # no part is sent once the lease may have run out (P23)
            if self.progress.uploads.get(step.seq) == upload_id:
                return
            self.progress.uploads[step.seq] = upload_id
            await self.context.backend.note_upload(self.lease.token, step.seq, upload_id)

        async def copy() -> StoredObject:
            self.lease.check()  # checked here, since time may have passed after the task was created
            return await self.context.connector.copy(
                CopyRequest(
                    step.namespace,
                    step.key,
                    CopySource(step.namespace, step.source, size=size),
                    extra=step.extra,
                    if_match=None if overwrite else step.expected,
                    if_none_match=not overwrite and step.expected is None,
                    on_upload=on_upload,
                )
            )

        # Only the response that begins an upload has its id.
        limit = min(UNDER_WAY, self.context.config.compensation_timeout)
        copying, cancellation = await shielded(
            copy(), grace=lambda: 0.0 if step.seq in self.progress.uploads else limit
        )
        if cancellation is not None:
            raise cancellation
        return copying.result()

    async def _end_upload_of(self, step: Copy) -> None:
        """Abort the multipart copy that an earlier attempt has left (P13)."""
        upload_id = self.progress.uploads.get(step.seq)
        if upload_id is not None:
            await self.context.connector.abort_upload(step.namespace, step.key, upload_id)
            del self.progress.uploads[step.seq]

    async def _abort_upload(self, step: AbortUpload) -> None:
        abort = self.context.connector.abort_upload
        await self._retry(step.object_key, partial(abort, step.namespace, step.key, step.upload_id))

    async def _delete_all(self, steps: Sequence[Delete]) -> None:
        batches: list[_DeletionBatch] = []
        together: dict[str, list[tuple[Delete, Deletion]]] = {}
        for step, deletions in await self._each(self._resolve, steps):
            capabilities = await self.context.connector.capabilities(step.namespace)
            for deletion in deletions:
                if deletion.if_match is not None and capabilities.conditional_delete == "single":
                    batches.append((step.namespace, [(step, deletion)]))
                else:
                    together.setdefault(step.namespace, []).append((step, deletion))
        for namespace, all_of_it in together.items():
            split = batches_of(all_of_it, self.context.connector.max_deletions)
            batches += [(namespace, batch) for batch in split]
        await run_all(self.context.config.max_concurrency, self._delete_batch, batches)

    async def _resolve(self, step: Delete) -> Sequence[Deletion]:
        """Return what to delete, after checking the object if its name does not identify the write."""
        capabilities = await self.context.connector.capabilities(step.namespace)
        conditions = capabilities.conditional_delete
        if self.claimed and (step.owner is None or not capabilities.versioned):
            self.progress.keys_in_flight |= self._users(step.namespace, [step.location])
        if step.owner is None:
            # A committed delete checks the ETag only where that needs no extra request.
            etag = step.etag if conditions == "batch" else None
            return [Deletion(location=step.location, if_match=etag)]
        if step.location.version_id is not None:
            return [Deletion(location=step.location)]
        if step.etag is not None and conditions != "none":
            return [Deletion(location=step.location, if_match=step.etag)]
        reserved = step.location.key.startswith(f"{self.context.config.reserved_prefix}/")
        # If versioning is suspended, versions of a staging key are older.
        if capabilities.versioned or (capabilities.suspended and reserved):
            return await self._own_versions(step, step.owner)
        head = partial(self.context.connector.head, step.namespace, step.location)
        there, _ = await self._retry(step.object_key, head)
        if not self._is_own(there, step):
            return []
        etag = None if conditions == "none" else there.etag
        return [Deletion(location=step.location, if_match=etag)]

    def _is_own(self, there: StoredObject | None, step: Delete) -> TypeGuard[StoredObject]:
        return step.owner is not None and made_by(there, step.owner)

    async def _own_versions(self, step: Delete, owner: WriteId) -> Sequence[Deletion]:
        find = partial(versions_since, self.context, step.namespace, step.location.key)
        versions, _ = await self._retry(step.object_key, partial(find, owner.transaction_id))
        own: list[Deletion] = []
        for version in versions:
            head = partial(self.context.connector.head, step.namespace, version.location)
            if self._is_own((await self._retry(step.object_key, head))[0], step):
                own.append(Deletion(location=version.location))
        return own

    async def _delete_batch(self, batch: _DeletionBatch) -> None:
        """Delete, and note failures; retry those that may succeed."""
        namespace, left = batch[0], list(batch[1])
        if self._is_away(step.object_key for step, _ in left):
            return

        new = (
            self._users(namespace, [each.location for _, each in left])
            - self.progress.keys_in_flight
        )
        self.progress.keys_in_flight |= new
        try:
            report, ambiguous = await self._retry(
                left[0][0].object_key, partial(self._delete_once, namespace, left)
            )
        except TransactionLostException:
            raise
        except Exception as error:  # noqa: BLE001 - raised when all else is done
            if isinstance(error, BaseConnectorException) and not error.ambiguous:
                self.progress.keys_in_flight -= new
            self._refusals += len(left) == 1
            if len(left) == 1 or self._refusals >= OUTAGE or not _may_be_about_one(error):
                for step, deletion in left:
                    self._fail_deletion(step, deletion, error)
                return
            # The batch was refused as a whole, perhaps because of one key.
            half = len(left) // 2
            for part in (left[:half], left[half:]):
                await self._delete_batch((namespace, part))
            return
        self._missed = self._refusals = 0
        if not (ambiguous or report.retried):
            self.progress.keys_in_flight -= new

    async def _delete_once(
        self, namespace: str, left: list[tuple[Delete, Deletion]]
    ) -> DeletionReport:
        """Delete, and leave in the list what another attempt may delete."""
        report = await self.context.connector.delete(namespace, [each for _, each in left])
        failed = [(each, error) for each, error in zip(left, report.errors, strict=True) if error]
        for (step, deletion), error in failed:
            if not may_pass(error):
                self._refused(step, deletion, error)
        left[:] = [each for each, error in failed if may_pass(error)]
        for _, error in failed:
            if may_pass(error):
                raise error
        return report

    def _fail_deletion(self, step: Delete, deletion: Deletion, error: Exception) -> None:
        """Note a failed deletion; a version that the store refuses to delete locks no key."""
        location = deletion.location
        if (
            location.version_id is None
            or not isinstance(error, BaseConnectorException)
            or error.ambiguous
            or may_pass(error)
            or not _may_be_about_one(error)
        ):
            self._fail(step.object_key, error)
            return
        log_event(
            logging.WARNING,
            "The version %s of %s/%s could not be deleted and stays: %s",
            location.version_id,
            step.namespace,
            location.key,
            error,
            rule="P9",
            transaction=self.lease.token.transaction_id,
            key=f"{step.namespace}/{location.key}",
        )
        if step.owner is not None:
            kept = LateWrite(namespace=step.namespace, key=location.key, write=step.owner)
            self.retained[kept] = error

    def _refused(self, step: Delete, deletion: Deletion, error: BaseConnectorException) -> None:
        """Note that one deletion of a batch was refused, which is correct for another writer's object."""
        if not isinstance(error, PreconditionFailedException):
            self._fail_deletion(step, deletion, error)
            return
        log_event(
            logging.WARNING,
            "%s/%s was changed by another writer; not deleted (P18)",
            step.namespace,
            deletion.location.key,
            rule="P18",
            transaction=self.lease.token.transaction_id,
            key=f"{step.namespace}/{deletion.location.key}",
        )

    def _users(self, namespace: str, locations: Iterable[Location]) -> set[ObjectKey]:
        """Return the keys at which a late deletion could delete a later object (P20 b)."""
        return {
            ObjectKey(namespace, location.key)
            for location in locations
            if location.version_id is None
            and not location.key.startswith(self.context.config.reserved_prefix)
        }


async def versions_since(
    context: EngineContext, namespace: str, key: str, transaction_id: str
) -> Sequence[StoredObject]:
    """Return the versions of a key that are not older than a transaction: it may have written them.

    The id of the transaction has the time of its process, a version has the time of the store.
    """
    started = began(transaction_id)
    if started is None:
        return await context.connector.versions(namespace, key)
    margin = timedelta(seconds=max(CLOCK_SKEW, context.config.late_write_period))
    return await context.connector.recent_versions(namespace, key, since=started - margin)


def may_pass(error: Exception) -> bool:
    """Return whether an idempotent request may succeed when it is sent again."""
    contended = isinstance(error, PreconditionFailedException) and error.contended
    return contended or isinstance(error, ConnectorUnavailableException)


def _may_be_about_one(error: Exception) -> bool:
    """Return whether a batch may have been refused because of one of its keys."""
    about_all = (ConnectorUnavailableException, NoSuchNamespaceException)
    return isinstance(error, BaseConnectorException) and not isinstance(error, about_all)


def batches_of(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield items in batches."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
