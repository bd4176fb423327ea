"""Writing and deleting inside a session: from files to bytes at their placement."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fennflow.backends import Intent, ObjectKey, Placement, Record, Tombstone
from fennflow.connectors import (
    CopySource,
    Location,
    ObjectAttributes,
    StoredObject,
    UploadCallback,
    headers_of,
)
from fennflow.engine.concurrency import run_all, shielded
from fennflow.engine.plan import Write, choose_placement, visible
from fennflow.engine.stamps import Stamp, made_by, stamp_of, stamped
from fennflow.engine.streaming import Source, SourceError, sha256_of
from fennflow.engine.telemetry import tell
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

CREATE_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file on its way to a key.

    Args:
        key: the full key.
        body: the bytes, or what they are read from while they are sent, or the record whose bytes
            the store is to copy.
        sha256: hexadecimal, of the bytes; None if that is not known, or not yet.
        media_type: for instance `text/plain`.
        content_type: tag of the content type.
        metadata: the user's.
        extra: the user's `connector_extra`.
        on_bytes: called with the size of a body that went whole, once it is written.
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
        """In bytes; of a stream, once it is sent."""
        if isinstance(self.body, Source):
            return self.body.count
        return self.body.size if isinstance(self.body, Record) else len(self.body)

    @property
    def whole(self) -> bool:
        """Whether all of the body was read, so that size and checksum are its own."""
        return not isinstance(self.body, Source) or self.body.sha256 is not None

    @property
    def checksum(self) -> str | None:
        """The SHA-256; of a stream, once it is sent."""
        return self.body.sha256 if isinstance(self.body, Source) else self.sha256


def check_uploads(tx: Transaction, namespace: str, uploads: Sequence[Upload]) -> None:
    """Refuse what cannot be written, before any I/O.

    Raises:
        KeyException, MetadataException: what the key rules or the store do not allow.
        FilepathsCollisionError: two files have one key.
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
        # The sequence is not known yet; no session gets to one with more digits.
        tx.connector.validate(namespace, upload.key, attributes_of(tx, upload, seq=10**9))


async def write(
    tx: Transaction, namespace: str, uploads: Sequence[Upload], *, create: bool
) -> Sequence[Record]:
    """Write files, all or none (P8).

    Raises:
        RecordAlreadyExistsException: `create`, and a key is taken.
        RecordLockedException: another session is writing one of the keys.
        BaseConnectorException: the store refused.
    """
    check_uploads(tx, namespace, uploads)
    if not uploads:
        return []
    capabilities = await tx.know(namespace)

    def place(key: ObjectKey, before: Record | None, chain: Sequence[Write]) -> Placement:
        if create and visible(chain, before) is not None:
            raise _already_exists(key)
        return choose_placement(
            before,
            written=bool(chain),
            capabilities=capabilities,
            hide_pending=tx.config.hide_pending,
        )

    seqs = await tx.stage([ObjectKey(namespace, upload.key) for upload in uploads], place)
    try:
        return await run_all(
            tx.config.max_concurrency,
            partial(send, tx, seqs, create=create),
            list(zip(tuple(seqs), uploads, strict=True)),
            finish=True,
        )
    except BaseException:
        tx.retract(seqs)
        raise


async def delete(
    tx: Transaction, namespace: str, keys: Sequence[str], *, missing_ok: bool
) -> Sequence[str]:
    """Delete at the commit what lies under keys, and return those that existed.

    Raises:
        NoSuchKeyException: not `missing_ok`, and some keys have nothing.
        RecordLockedException: another session is writing one of the keys.
    """
    for key in keys:
        check_key(key, reserved_prefix=tx.config.reserved_prefix)
    wanted = list(dict.fromkeys(ObjectKey(namespace, key) for key in keys))
    if not wanted:
        return []
    await tx.know(namespace)

    def place(_: ObjectKey, before: Record | None, chain: Sequence[Write]) -> Placement | None:
        return None if visible(chain, before) is None else Placement.DELETE

    def check(records: Mapping[ObjectKey, Record]) -> None:
        missing = [key.key for key in wanted if visible(tx.chain(key), records.get(key)) is None]
        if missing and not missing_ok:
            raise no_such_key(namespace, missing)

    seqs = await tx.stage(wanted, place, check)
    return [tx.writes[seq].intent.key for seq in seqs]


async def send(
    tx: Transaction, seqs: list[int], numbered: tuple[int, Upload], *, create: bool
) -> Record:
    """Bring a file's bytes to its placement, whatever lies there (P14, P16).

    Args:
        tx: the transaction.
        seqs: of the call; a fallback adds its own.
        numbered: the write's sequence and the file.
        create: whether an object that lies there is an error.
    """
    seq, upload = numbered
    if isinstance(upload.body, Source):
        try:
            async with tx.streams, aclosing(upload.body):
                return await _send_stream(tx, seqs, seq, upload, upload.body, create=create)
        except SourceError as error:
            failed = error.error
        raise failed  # as the user raised it
    record = await _send(tx, seqs, seq, upload, create=create)
    if upload.on_bytes is not None:
        upload.on_bytes(upload.size)
    return record


async def _send_stream(
    tx: Transaction, seqs: list[int], seq: int, upload: Upload, source: Source, *, create: bool
) -> Record:
    """Send a stream, in one piece if it is short."""
    body = await source.whole(tx.connector.stream_threshold)
    if body is not None:
        short = replace(upload, body=body, sha256=await sha256_of(body))
        record = await _send(tx, seqs, seq, short, create=create)
        source.tell_all()
        return record
    write = tx.writes[seq]
    key = write.intent.object_key
    if write.intent.placement is Placement.DIRECT:
        # Who learns at the end of a long upload that the key is taken has sent it in vain.
        there = await _head(tx, key)
        if there is not None and create and not await _is_garbage(tx, key, there):
            raise _already_exists(key)
        if there is not None:
            seq = await _stage_instead(tx, seqs, seq)
    return await _send(tx, seqs, seq, upload, create=create)


async def _send(
    tx: Transaction, seqs: list[int], seq: int, upload: Upload, *, create: bool
) -> Record:
    write = tx.writes[seq]
    key = write.intent.object_key
    placement = write.intent.placement
    if placement is Placement.DIRECT:
        record = await _put_if_free(tx, seq, upload, create=create)
        if record is not None:
            return record
        seq = await _stage_instead(tx, seqs, seq)
    elif create and write.before is None:
        # The catalog has nothing there; what lies there may be somebody else's, or garbage of ours.
        earlier = [each for each in tx.chain(key) if each.sent and each.intent.target == key.key]
        conditional = tx.capabilities[key.namespace].conditional_create
        if placement is Placement.VERSIONED and conditional and not earlier:
            record = await _put_if_free(tx, seq, upload, create=create)
            if record is not None:
                return record
        else:
            there = await _head(tx, key)
            if there is not None and not await _is_garbage(tx, key, there):
                raise _already_exists(key)
    return await _put(tx, seq, upload)


async def _stage_instead(tx: Transaction, seqs: list[int], seq: int) -> int:
    """Take a write back, and journal one that replaces what lies at the key at the commit."""
    tx.retract([seq])
    [seq] = await tx.stage([tx.writes[seq].intent.object_key], _staged)
    seqs.append(seq)
    return seq


def _staged(_key: ObjectKey, _before: Record | None, _chain: Sequence[Write]) -> Placement:
    return Placement.STAGED


async def _put_if_free(tx: Transaction, seq: int, upload: Upload, *, create: bool) -> Record | None:
    """PUT with `If-None-Match`; None if what lies there may be replaced (P14)."""
    key = tx.writes[seq].intent.object_key
    for _ in range(CREATE_ATTEMPTS):
        try:
            return await _put(tx, seq, upload, if_none_match=True)
        except (PreconditionFailedException, ConnectorUnavailableException) as error:
            there = await _head(tx, key)
            if there is not None and upload.whole and made_by(there, tx.session_id, seq):
                # An earlier attempt had succeeded, and its answer was lost.
                return _written(tx, seq, upload, there, doubtful=True)
            if isinstance(error, ConnectorUnavailableException):
                raise
            if there is not None and create and not await _is_garbage(tx, key, there):
                raise _already_exists(key) from error
            if isinstance(upload.body, Source) and not upload.body.repeatable:
                raise _cannot_repeat(key) from error
            if there is None:
                continue  # contended (409), or deleted since
            tell(
                logging.INFO,
                "%s/%s holds an object that the catalog does not know (P14)",
                key.namespace,
                key.key,
                rule="P14",
                session=tx.session_id,
                key=f"{key.namespace}/{key.key}",
            )
            return None
    return None


async def _put(tx: Transaction, seq: int, upload: Upload, *, if_none_match: bool = False) -> Record:
    intent = tx.writes[seq].intent

    async def on_upload(upload_id: str) -> None:
        tx.update(seq, intent=replace(intent, upload_id=upload_id))
        await tx.backend.note_upload(tx.lease.token, seq, upload_id)

    def grace() -> float:
        # A PUT that is cut off may take effect after all was undone (P20): let it end.
        # An upload in parts has no effect before its end, and can be aborted.
        in_parts = tx.writes[seq].intent.upload_id is not None
        return 0 if in_parts else tx.config.compensation_timeout

    async with tx.slots:
        if intent.upload_id is not None:
            await tx.connector.abort_upload(intent.namespace, intent.target, intent.upload_id)
        doubtful = tx.writes[seq].doubtful
        # Until the answer is there, the write counts as done and as doubtful (P19).
        tx.update(seq, sent=True, doubtful=True)
        attributes = attributes_of(tx, upload, seq)

        transfer = _transfer(tx, intent, upload, attributes, on_upload, if_none_match=if_none_match)
        put, cancellation = await shielded(transfer, grace=grace)
    try:
        stored = put.result()
    except Exception as error:
        known = isinstance(error, (BaseConnectorException, SourceError))
        if known and not isinstance(error, ConnectorUnavailableException):
            retried = isinstance(error, PreconditionFailedException) and error.retried
            tx.update(seq, sent=doubtful or retried, doubtful=doubtful or retried)
        if cancellation is not None:
            raise cancellation from error
        raise
    record = _written(tx, seq, upload, stored, doubtful=doubtful or stored.retried)
    if cancellation is not None:
        raise cancellation
    return record


async def _transfer(
    tx: Transaction,
    intent: Intent,
    upload: Upload,
    attributes: ObjectAttributes,
    on_upload: UploadCallback,
    *,
    if_none_match: bool,
) -> StoredObject:
    tx.check()  # here, since others may have run after the task was made
    body = upload.body
    if isinstance(body, Record):
        return await tx.connector.copy(
            intent.namespace,
            intent.target,
            CopySource(body.namespace, body.location, body.etag, body.size),
            attributes=attributes,
            if_none_match=if_none_match,
            on_upload=on_upload,
        )
    if isinstance(body, Source):
        # No part is sent once the lease may have run out (P23).
        async with aclosing(body.read(tx.check)) as chunks:
            return await tx.connector.upload(
                intent.namespace,
                intent.target,
                chunks,
                attributes,
                size=body.size,
                if_none_match=if_none_match,
                on_upload=on_upload,
            )
    return await tx.connector.put(
        intent.namespace,
        intent.target,
        body,
        attributes,
        if_none_match=if_none_match,
        on_upload=on_upload,
    )


def _written(
    tx: Transaction, seq: int, upload: Upload, stored: StoredObject, *, doubtful: bool
) -> Record:
    """Note that the store has confirmed the bytes, and return the record to commit."""
    write = tx.writes[seq]
    if doubtful:
        tell(
            logging.INFO,
            "A write of %s/%s was sent more than once; one may arrive late (P20)",
            write.intent.namespace,
            write.intent.key,
            rule="P20",
            session=tx.session_id,
            key=f"{write.intent.namespace}/{write.intent.key}",
        )
    now = datetime.now(UTC)
    # What a copy is not given it takes over from its source.
    taken_over = upload.body.headers if isinstance(upload.body, Record) else {}
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
        session_id=tx.session_id,
        seq=seq,
    )
    tx.update(seq, sent=True, doubtful=doubtful, record=record, extra=upload.extra)
    return record


def attributes_of(tx: Transaction, upload: Upload, seq: int) -> ObjectAttributes:
    """Return what is stored beside the bytes of a write: the user's, and the stamp (P11)."""
    stamp = Stamp(tx.session_id, seq, upload.content_type, upload.sha256)
    return ObjectAttributes(
        media_type=upload.media_type,
        metadata=stamped(upload.metadata, stamp),
        sha256=upload.sha256,
        extra=upload.extra,
    )


async def _head(tx: Transaction, key: ObjectKey) -> StoredObject | None:
    async with tx.slots:
        tx.check()
        return await tx.connector.head(key.namespace, Location(key.key))


async def _is_garbage(tx: Transaction, key: ObjectKey, there: StoredObject) -> bool:
    """Whether this session put this here, or a late request of one that is done (P14)."""
    stamp = stamp_of(there)
    if stamp is None or stamp.session_id == tx.session_id:
        return stamp is not None
    late = Tombstone(
        namespace=key.namespace, key=key.key, session_id=stamp.session_id, seq=stamp.seq
    )
    return late in await tx.backend.tombstones([key])


def _cannot_repeat(key: ObjectKey) -> ObjectChangedException:
    message = (
        f"Somebody else wrote {key.namespace}/{key.key} while a stream was sent to it, which can "
        "be read once only; nothing of this call stays. Open the stream again, and repeat the call."
    )
    return ObjectChangedException(message)


def _already_exists(key: ObjectKey) -> RecordAlreadyExistsException:
    message = (
        f"{key.namespace}/{key.key} exists already; nothing of this call stays. "
        "Use put() to overwrite it, or choose another name."
    )
    return RecordAlreadyExistsException(message)
