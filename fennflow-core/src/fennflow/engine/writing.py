"""Writing and deleting inside a transaction: sends the bytes of files to their placement."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from fennflow.backends import LateWrite, ObjectKey, Placement, Record, WriteId
from fennflow.buffers import Share
from fennflow.connectors import (
    CopyRequest,
    CopySource,
    Location,
    ObjectAttributes,
    PutRequest,
    StoredObject,
    check_attributes,
    headers_of,
)
from fennflow.engine.callbacks import notify
from fennflow.engine.concurrency import run_all, shielded
from fennflow.engine.details import check_catalog, check_listed
from fennflow.engine.directories import check_directories
from fennflow.engine.plan import Write, choose_placement, visible
from fennflow.engine.stamps import Stamp, made_by, stamp_of, stamped
from fennflow.engine.streaming import Source, SourceError, sha256_of
from fennflow.engine.transaction import Transaction, no_such_key
from fennflow.exceptions import (
    BaseConnectorException,
    ConnectorUnavailableException,
    FilepathsCollisionError,
    ObjectChangedException,
    PreconditionFailedException,
    RecordAlreadyExistsException,
)
from fennflow.paths import check_key
from fennflow.telemetry import log_event

CREATE_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file that is to be written to a key.

    Args:
        key: the full key.
        body: the bytes, or the source from which they are read while they are sent, or the record
            whose bytes the store copies.
        sha256: hexadecimal, of the bytes; None if that is not known, or not yet.
        media_type: for instance `text/plain`.
        content_type: tag of the content type.
        metadata: the user's.
        extra: the user's `connector_extra`.
        on_bytes: called with the size of a body that was sent in one request, once it is written.
    """

    key: str
    body: bytes | Source | Record
    sha256: str | None
    media_type: str
    content_type: str | None
    metadata: Mapping[str, str]
    extra: Mapping[str, Any]
    on_bytes: Callable[[int], object] | None = None

    @property
    def size(self) -> int:
        """The size in bytes; of a stream, once it is sent."""
        if isinstance(self.body, Source):
            return self.body.count
        return self.body.size if isinstance(self.body, Record) else len(self.body)

    @property
    def whole(self) -> bool:
        """Whether the whole body was read, so that size and checksum are known."""
        return not isinstance(self.body, Source) or self.body.sha256 is not None

    @property
    def checksum(self) -> str | None:
        """The SHA-256; of a stream, once it is sent."""
        return self.body.sha256 if isinstance(self.body, Source) else self.sha256


async def write(
    tx: Transaction, namespace: str, uploads: Sequence[Upload], *, create: bool
) -> Sequence[Record]:
    """Write files, all or none (P8).

    Raises:
        RecordAlreadyExistsException: `create`, and a key is taken.
        RecordLockedException: another transaction is writing one of the keys.
        BaseConnectorException: the store refused.
    """
    _check_uploads(tx, namespace, uploads)
    if not uploads:
        return []
    capabilities = await tx.capabilities_for(namespace)
    await check_directories(tx, namespace, [upload.key for upload in uploads])

    def place(key: ObjectKey, before: Record | None, chain: Sequence[Write]) -> Placement:
        if create and visible(chain, before) is not None:
            raise already_exists(key)
        return choose_placement(
            before,
            written=bool(chain),
            capabilities=capabilities,
            hide_pending=tx.config.hide_pending,
        )

    with tx.whole():
        seqs = await tx.begin_writes([ObjectKey(namespace, each.key) for each in uploads], place)
        sendings = [
            Sending(tx, seq, upload, create=create)
            for seq, upload in zip(seqs, uploads, strict=True)
        ]
        return await run_all(tx.config.max_concurrency, Sending.send, sendings, finish=True)


async def delete(
    tx: Transaction, namespace: str, keys: Sequence[str], *, missing_ok: bool
) -> Sequence[str]:
    """Delete the files of keys at the commit, and return those that existed.

    Raises:
        NoSuchKeyException: some keys have no record, and `missing_ok` is False.
        RecordLockedException: another transaction is writing one of the keys.
        RecordAlreadyExistsException: an object belongs to another catalog.
    """
    for key in keys:
        check_key(key, reserved_prefix=tx.config.reserved_prefix)
    wanted = list(dict.fromkeys(ObjectKey(namespace, key) for key in keys))
    if not wanted:
        return []
    await tx.capabilities_for(namespace)

    def place(_: ObjectKey, before: Record | None, chain: Sequence[Write]) -> Placement | None:
        return None if visible(chain, before) is None else Placement.DELETE

    def check(records: Mapping[ObjectKey, Record]) -> None:
        missing = [key.key for key in wanted if visible(tx.chain(key), records.get(key)) is None]
        if missing and not missing_ok:
            raise no_such_key(namespace, missing)

    with tx.whole():
        seqs = await tx.begin_writes(wanted, place, check)
        await check_listed(tx, [tx.writes[seq].before for seq in seqs])
    return [tx.writes[seq].intent.key for seq in seqs]


@dataclass(slots=True)
class Sending:
    """Sends one file to its placement, even if an object is already there (P14, P16).

    Args:
        tx: the transaction.
        seq: the sequence of the write; a fallback uses another one.
        upload: the file.
        create: whether an existing object is an error.
    """

    tx: Transaction
    seq: int
    upload: Upload
    create: bool = False

    @property
    def write(self) -> Write:
        """The current state of the write."""
        return self.tx.writes[self.seq]

    async def send(self) -> Record:
        """Send the bytes, and return the record to commit."""
        source = self.upload.body
        if isinstance(source, Source):
            try:
                async with self.tx.streams, aclosing(source):
                    return await self._send_stream(source)
            except SourceError as error:
                failed = error.error
            raise failed  # as the user raised it
        large = self.upload.size >= self.tx.connector.stream_threshold
        if isinstance(source, Record) and large and not self.tx.connector.uploads_conditionally:
            await self._look_first()
        record = await self._send_over()
        if self.upload.on_bytes is not None:
            await notify(self.upload.on_bytes, self.upload.size)
        return record

    async def _send_stream(self, source: Source) -> Record:
        """Send a stream, in one piece if it is short."""
        tx, threshold = self.tx, self.tx.connector.stream_threshold
        with Share(tx.connector.buffers) as share:
            await share.take(threshold if source.size is None else min(source.size, threshold))
            body = await source.whole(threshold, tx.config.upload_idle_timeout)
            if body is not None:
                self.upload = replace(self.upload, body=body, sha256=await sha256_of(body))
                record = await self._send_over()
                await source.report_all()
                return record
            source.held = share
            await self._look_first()
            return await self._send_over()

    async def _look_first(self) -> None:
        """Look for an object at the key of a large file; if there is one, stage the file.

        Otherwise a long upload could fail at its end because the key is taken.
        """
        placement = self.write.intent.placement
        direct = placement is Placement.DIRECT
        if direct or (placement is Placement.VERSIONED and self.write.before is None):
            there = await head(self.tx, self.write.intent.object_key)
            await self._check_replaceable(there)
            if direct and (there is not None or not self.tx.connector.uploads_conditionally):
                await self._stage_instead()

    async def _send_over(self) -> Record:
        """Send the bytes under the condition that their placement and the catalog require."""
        tx, write = self.tx, self.write
        key, placement = write.intent.object_key, write.intent.placement
        if placement is Placement.DIRECT:
            record = await self._put_if_free()
            if record is not None:
                return record
            await self._stage_instead()
        elif write.before is None:
            # The catalog has no record; the object may be another writer's, or garbage of this
            # catalog.
            earlier = [
                each for each in tx.chain(key) if each.sent and each.intent.target == key.key
            ]
            conditional = tx.capabilities[key.namespace].conditional_create
            looked = isinstance(self.upload.body, Source) and not self.create
            if placement is Placement.VERSIONED and conditional and not earlier and not looked:
                record = await self._put_if_free()
                if record is not None:
                    return record
            elif self.create or not (earlier or looked):
                await self._check_replaceable(await head(tx, key))
        else:
            await check_listed(tx, [write.before])
        return await self._put()

    async def _stage_instead(self) -> None:
        """Retract the write, and journal one that replaces the object at the commit."""
        self.tx.retract([self.seq])
        key = self.write.intent.object_key
        [self.seq] = await self.tx.begin_writes([key], _staged)

    async def _check_replaceable(self, there: StoredObject | None) -> None:
        """Refuse to replace an object with `create`, or an object of another catalog.

        Raises:
            RecordAlreadyExistsException: the object must not be replaced.
        """
        key = self.write.intent.object_key
        if there is not None and self.create and not await self._is_garbage(there):
            raise already_exists(key)
        if there is not None:
            check_catalog(self.tx, key, there)

    async def _is_garbage(self, there: StoredObject) -> bool:
        """Return whether this transaction made the object, or a late request of a finished one (P14)."""
        stamp, key = stamp_of(there), self.write.intent.object_key
        if stamp is None or stamp.write.transaction_id == self.tx.transaction_id:
            return stamp is not None
        late = LateWrite(namespace=key.namespace, key=key.key, write=stamp.write)
        return late in await self.tx.backend.late_writes([key])

    async def _put_if_free(self) -> Record | None:
        """PUT with `If-None-Match`; None if the existing object may be replaced (P14)."""
        key, upload = self.write.intent.object_key, self.upload
        for _ in range(CREATE_ATTEMPTS):
            try:
                return await self._put(if_none_match=True)
            except PreconditionFailedException as error:
                there = await head(self.tx, key)
                if there is not None and upload.whole and self._made(there):
                    # An earlier attempt had succeeded, and its answer was lost.
                    return self._written(there, ambiguous=True)
                await self._check_replaceable(there)
                if isinstance(upload.body, Source) and not upload.body.repeatable:
                    raise _cannot_repeat(key) from error
                if there is None:
                    continue  # contended (409), or deleted since
                log_event(
                    logging.INFO,
                    "%s/%s has an object without a record in the catalog (P14)",
                    key.namespace,
                    key.key,
                    rule="P14",
                    transaction=self.tx.transaction_id,
                    key=str(key),
                )
                return None
        return None

    async def _put(self, *, if_none_match: bool = False) -> Record:
        """Send the bytes once, and note all effects that this may have had."""
        tx, seq, intent = self.tx, self.seq, self.write.intent

        async def on_upload(upload_id: str) -> None:
            tx.lease.check()  # no part is sent once the lease may have run out (P23)
            if self.write.intent.upload_id == upload_id:
                return
            tx.update(seq, intent=replace(intent, upload_id=upload_id))
            await tx.backend.note_upload(tx.lease.token, seq, upload_id)

        def grace() -> float:
            # A PUT that is cut off may take effect after everything was undone (P20), so let it
            # end. An upload in parts has no effect before its end, and can be aborted.
            in_parts = self.write.intent.upload_id is not None
            return 0 if in_parts else tx.config.compensation_timeout

        await self._try_options()
        async with tx.slots:
            if intent.upload_id is not None:
                await tx.connector.abort_upload(intent.namespace, intent.target, intent.upload_id)
            ambiguous = self.write.ambiguous
            # Until the response arrives, the write counts as done and as ambiguous (P19).
            tx.update(seq, sent=True, ambiguous=True)
            staged = intent.placement is Placement.STAGED
            attributes = _attributes_of(tx, self.upload, seq, staged=staged)
            request = PutRequest(
                intent.namespace,
                intent.target,
                attributes,
                if_none_match=if_none_match,
                on_upload=on_upload,
            )
            put, cancellation = await shielded(self._transfer(request), grace=grace)
        try:
            with tx.circuit.request(intent.namespace):
                stored = put.result()
        except Exception as error:
            if isinstance(error, SourceError) or (
                isinstance(error, BaseConnectorException) and not error.ambiguous
            ):
                tx.update(seq, sent=ambiguous, ambiguous=ambiguous)
            if cancellation is not None:
                raise cancellation from error
            landed = await self._landed(error, if_none_match=if_none_match)
            if landed is None:
                raise
            return self._written(landed, ambiguous=True)
        record = self._written(stored, ambiguous=ambiguous or stored.retried)
        if cancellation is not None:
            raise cancellation
        return record

    async def _try_options(self) -> None:
        """Find out now which options the store would refuse at the copy to the key, after the commit."""
        tx, intent = self.tx, self.write.intent
        # In a versioned bucket the trial could leave a locked version behind.
        versioned = tx.capabilities[intent.namespace].versioned
        if intent.placement is Placement.STAGED and not versioned:
            probe = f"{tx.config.reserved_prefix}/probe/{tx.transaction_id}"
            await tx.connector.try_options(intent.namespace, probe, self.upload.extra)

    async def _transfer(self, request: PutRequest) -> StoredObject:
        tx, body = self.tx, self.upload.body
        tx.check()  # checked here, since time may have passed after the task was created
        if isinstance(body, Record):
            return await tx.connector.copy(
                CopyRequest(
                    request.namespace,
                    request.key,
                    CopySource(body.namespace, body.location, body.etag, body.size),
                    attributes=request.attributes,
                    if_none_match=request.if_none_match,
                    on_upload=request.on_upload,
                )
            )
        if isinstance(body, Source):
            # No part is sent once the lease may have run out (P23).
            async with aclosing(body.read(tx.check, tx.config.upload_idle_timeout)) as chunks:
                return await tx.connector.upload(replace(request, size=body.size), chunks)
        return await tx.connector.put(request, body)

    async def _landed(self, error: Exception, *, if_none_match: bool) -> StoredObject | None:
        """Return the object of a write that took effect although it was answered with an error (P14).

        If the completion of a multipart upload is sent twice, the second answer is that the upload
        does not exist. If the caller set a condition, it examines the failure itself.
        """
        ambiguous = isinstance(error, BaseConnectorException) and error.ambiguous
        if not ambiguous or isinstance(error, PreconditionFailedException):
            return None
        if not self.upload.whole:
            return None
        if isinstance(error, ConnectorUnavailableException) and not if_none_match:
            return None  # the store does not respond: the write is undone by its key
        intent = self.write.intent
        try:
            there = await head(self.tx, ObjectKey(intent.namespace, intent.target))
        except BaseConnectorException as unknown:
            error.add_note(f"It is not known whether the object was written: {unknown}")
            return None
        return there if self._made(there) else None

    def _made(self, there: StoredObject | None) -> bool:
        """Return whether an object is this complete write: some servers keep a part of a body."""
        whole = there is not None and there.size == self.upload.size
        return whole and made_by(there, WriteId(self.tx.transaction_id, self.seq))

    def _written(self, stored: StoredObject, *, ambiguous: bool) -> Record:
        """Note that the store has confirmed the bytes, and return the record to commit."""
        tx, seq, upload, write = self.tx, self.seq, self.upload, self.write
        if ambiguous:
            log_event(
                logging.INFO,
                "A write of %s/%s was sent more than once; one attempt may arrive late (P20)",
                write.intent.namespace,
                write.intent.key,
                rule="P20",
                transaction=tx.transaction_id,
                key=f"{write.intent.namespace}/{write.intent.key}",
            )
        now = datetime.now(UTC)
        # A copy takes over from its source what it is not given.
        taken_over: Mapping[str, str] = {}
        if isinstance(upload.body, Record):
            taken_over = upload.body.headers
        record = Record(
            namespace=write.intent.namespace,
            key=write.intent.key,
            location=stored.location,
            etag=stored.etag,
            size=upload.size,
            media_type=upload.media_type,
            content_type=upload.content_type,
            sha256=upload.checksum,
            metadata=upload.metadata,
            headers={**taken_over, **headers_of(upload.extra)},
            created_at=now if write.before is None else write.before.created_at,
            modified_at=now,
            write=WriteId(tx.transaction_id, seq),
        )
        tx.update(seq, sent=True, ambiguous=ambiguous, record=record, extra=upload.extra)
        return record


def _staged(_key: ObjectKey, _record: Record | None, _writes: Sequence[Write]) -> Placement:
    return Placement.STAGED


async def head(tx: Transaction, key: ObjectKey) -> StoredObject | None:
    """Return the store's description of the object at a key."""
    async with tx.slots:
        tx.check()
        with tx.circuit.request(key.namespace):
            return await tx.connector.head(key.namespace, Location(key.key))


def _check_uploads(tx: Transaction, namespace: str, uploads: Sequence[Upload]) -> None:
    """Refuse files that cannot be written, before any I/O.

    Raises:
        KeyException, MetadataException: the key rules or the store do not allow it.
        FilepathsCollisionError: two files have one key. FileException,
        ConnectorCapabilityException: a media type or an option is not valid.
    """
    by_key = {upload.key: upload for upload in uploads}
    for upload in uploads:
        check_key(upload.key, reserved_prefix=tx.config.reserved_prefix)
        if by_key[upload.key] is not upload:
            message = (
                f"Two files of this call are named {upload.key}; nothing was sent. "
                "Give them different filenames."
            )
            raise FilepathsCollisionError(message)
        check_beside(tx, namespace, upload)


def check_beside(tx: Transaction, namespace: str, upload: Upload) -> None:
    """Reject attributes that cannot be stored, before any I/O."""
    # The sequence is not known yet; no transaction reaches one with more digits.
    attributes = _attributes_of(tx, upload, seq=10**9)
    check_attributes(attributes)
    tx.connector.validate(namespace, upload.key, attributes)


def _attributes_of(
    tx: Transaction, upload: Upload, seq: int, *, staged: bool = False
) -> ObjectAttributes:
    """Return the attributes of a write: the user's, and the stamp (P11).

    Args:
        tx: the transaction.
        upload: the file.
        seq: of the write.
        staged: whether the bytes go to a staging key, without options that are only for the final
            object.
    """
    write = WriteId(tx.transaction_id, seq)
    stamp = Stamp(write, upload.content_type, upload.sha256, tx.backend.stamped_id)
    left_out = tx.connector.at_the_key_only if staged else frozenset[str]()
    return ObjectAttributes(
        media_type=upload.media_type,
        metadata=stamped(upload.metadata, stamp),
        sha256=upload.sha256,
        extra={name: value for name, value in upload.extra.items() if name not in left_out},
    )


def _cannot_repeat(key: ObjectKey) -> ObjectChangedException:
    message = (
        f"Another writer replaced {key} during a one-shot upload. The call was "
        "rolled back; open the stream again and retry."
    )
    return ObjectChangedException(message)


def already_exists(key: ObjectKey) -> RecordAlreadyExistsException:
    """Return the exception for a key that is taken."""
    message = (
        f"{key} already exists. The call was rolled back. "
        "Use put() to overwrite it, or choose another name."
    )
    return RecordAlreadyExistsException(message)
