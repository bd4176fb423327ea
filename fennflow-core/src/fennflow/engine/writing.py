"""Writing and deleting inside a transaction: from files to bytes at their placement."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from fennflow.backends import Intent, LateWrite, ObjectKey, Placement, Record, WriteId
from fennflow.connectors import (
    CopyRequest,
    CopySource,
    Location,
    ObjectAttributes,
    PutRequest,
    StoredObject,
    UploadCallback,
    headers_of,
)
from fennflow.engine.callbacks import notify
from fennflow.engine.concurrency import run_all, shielded
from fennflow.engine.details import check_catalog, check_listed
from fennflow.engine.directories import check_directories
from fennflow.engine.plan import Write, choose_placement, visible
from fennflow.engine.stamps import made_by, stamp_of
from fennflow.engine.streaming import Source, SourceError, sha256_of
from fennflow.engine.transaction import Transaction, no_such_key
from fennflow.engine.uploads import Upload, attributes_of, check_uploads
from fennflow.exceptions import (
    BaseConnectorException,
    ConnectorUnavailableException,
    ObjectChangedException,
    PreconditionFailedException,
    RecordAlreadyExistsException,
)
from fennflow.paths import check_key
from fennflow.telemetry import log_event

CREATE_ATTEMPTS = 3


async def write(
    tx: Transaction, namespace: str, uploads: Sequence[Upload], *, create: bool
) -> Sequence[Record]:
    """Write files, all or none (P8).

    Raises:
        RecordAlreadyExistsException: `create`, and a key is taken.
        RecordLockedException: another transaction is writing one of the keys.
        BaseConnectorException: the store refused.
    """
    check_uploads(tx, namespace, uploads)
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

    seqs = await tx.begin_writes([ObjectKey(namespace, upload.key) for upload in uploads], place)
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
    """Delete the files of keys at the commit, and return those that existed.

    Raises:
        NoSuchKeyException: not `missing_ok`, and some keys have nothing.
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

    seqs = await tx.begin_writes(wanted, place, check)
    try:
        await check_listed(tx, [tx.writes[seq].before for seq in seqs])
    except BaseException:
        tx.retract(seqs)
        raise
    return [tx.writes[seq].intent.key for seq in seqs]


async def send(
    tx: Transaction, seqs: list[int], numbered: tuple[int, Upload], *, create: bool
) -> Record:
    """Send a file's bytes to its placement, even if an object is there already (P14, P16).

    Args:
        tx: the transaction.
        seqs: of the call; a fallback adds its own.
        numbered: the write's sequence and the file.
        create: whether an existing object is an error.
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
        await notify(upload.on_bytes, upload.size)
    return record


async def _send_stream(
    tx: Transaction, seqs: list[int], seq: int, upload: Upload, source: Source, *, create: bool
) -> Record:
    """Send a stream, in one piece if it is short."""
    body = await source.whole(tx.connector.stream_threshold, tx.config.upload_idle_timeout)
    if body is not None:
        short = replace(upload, body=body, sha256=await sha256_of(body))
        record = await _send(tx, seqs, seq, short, create=create)
        await source.report_all()
        return record
    write = tx.writes[seq]
    key = write.intent.object_key
    direct = write.intent.placement is Placement.DIRECT
    if direct or (write.intent.placement is Placement.VERSIONED and write.before is None):
        # Who learns at the end of a long upload that the key is taken has sent it in vain.
        there = await head(tx, key)
        if there is not None and create and not await _is_garbage(tx, key, there):
            raise already_exists(key)
        if there is not None:
            check_catalog(tx, key, there)
            if direct:
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
    elif write.before is None:
        # The catalog has no record; the object may be another writer's, or our garbage.
        earlier = [each for each in tx.chain(key) if each.sent and each.intent.target == key.key]
        conditional = tx.capabilities[key.namespace].conditional_create
        looked = isinstance(upload.body, Source) and not create
        if placement is Placement.VERSIONED and conditional and not earlier and not looked:
            record = await _put_if_free(tx, seq, upload, create=create)
            if record is not None:
                return record
        elif create or not (earlier or looked):
            there = await head(tx, key)
            if there is not None and create and not await _is_garbage(tx, key, there):
                raise already_exists(key)
            if there is not None:
                check_catalog(tx, key, there)
    else:
        await check_listed(tx, [write.before])
    return await _put(tx, seq, upload)


async def _stage_instead(tx: Transaction, seqs: list[int], seq: int) -> int:
    """Take a write back, and journal one that replaces the object at the commit."""
    tx.retract([seq])
    [seq] = await tx.begin_writes([tx.writes[seq].intent.object_key], _staged)
    seqs.append(seq)
    return seq


def _staged(_key: ObjectKey, _before: Record | None, _chain: Sequence[Write]) -> Placement:
    return Placement.STAGED


async def _put_if_free(tx: Transaction, seq: int, upload: Upload, *, create: bool) -> Record | None:
    """PUT with `If-None-Match`; None if the existing object may be replaced (P14)."""
    key = tx.writes[seq].intent.object_key
    for _ in range(CREATE_ATTEMPTS):
        try:
            return await _put(tx, seq, upload, if_none_match=True)
        except PreconditionFailedException as error:
            there = await head(tx, key)
            if (
                there is not None
                and upload.whole
                and made_by(there, WriteId(tx.transaction_id, seq))
            ):
                # An earlier attempt had succeeded, and its answer was lost.
                return _written(tx, seq, upload, there, ambiguous=True)
            if there is not None and create and not await _is_garbage(tx, key, there):
                raise already_exists(key) from error
            if there is not None:
                check_catalog(tx, key, there)
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
                transaction=tx.transaction_id,
                key=str(key),
            )
            return None
    return None


async def _put(tx: Transaction, seq: int, upload: Upload, *, if_none_match: bool = False) -> Record:
    intent = tx.writes[seq].intent

    async def on_upload(upload_id: str) -> None:
        tx.lease.check()  # no part is sent once the lease may have run out (P23)
        if tx.writes[seq].intent.upload_id == upload_id:
            return
        tx.update(seq, intent=replace(intent, upload_id=upload_id))
        await tx.backend.note_upload(tx.lease.token, seq, upload_id)

    def grace() -> float:
        # A PUT that is cut off may take effect after all was undone (P20): let it end.
        # An upload in parts has no effect before its end, and can be aborted.
        in_parts = tx.writes[seq].intent.upload_id is not None
        return 0 if in_parts else tx.config.compensation_timeout

    staged = intent.placement is Placement.STAGED
    await _try_options(tx, intent, upload)
    async with tx.slots:
        if intent.upload_id is not None:
            await tx.connector.abort_upload(intent.namespace, intent.target, intent.upload_id)
        ambiguous = tx.writes[seq].ambiguous
        # Until the response arrives, the write counts as done and as ambiguous (P19).
        tx.update(seq, sent=True, ambiguous=True)
        attributes = attributes_of(tx, upload, seq, staged=staged)

        transfer = _transfer(tx, intent, upload, attributes, on_upload, if_none_match=if_none_match)
        put, cancellation = await shielded(transfer, grace=grace)
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
        landed = await _landed(tx, seq, upload, error, if_none_match=if_none_match)
        if landed is None:
            raise
        return _written(tx, seq, upload, landed, ambiguous=True)
    record = _written(tx, seq, upload, stored, ambiguous=ambiguous or stored.retried)
    if cancellation is not None:
        raise cancellation
    return record


async def _try_options(tx: Transaction, intent: Intent, upload: Upload) -> None:
    """Learn now what the store would refuse at the copy to the key, when it is committed."""
    # In a versioned bucket the trial could leave a version behind that is locked.
    versioned = tx.capabilities[intent.namespace].versioned
    if intent.placement is Placement.STAGED and not versioned:
        key = f"{tx.config.reserved_prefix}/probe/{tx.transaction_id}"
        await tx.connector.try_options(intent.namespace, key, upload.extra)


async def _landed(
    tx: Transaction, seq: int, upload: Upload, error: Exception, *, if_none_match: bool
) -> StoredObject | None:
    """Return what a write has made that was answered with an error all the same (P14).

    An upload in parts whose completion is sent twice is unknown the second time. What a failed
    condition means is looked up by who set it.
    """
    ambiguous = isinstance(error, BaseConnectorException) and error.ambiguous
    if not ambiguous or isinstance(error, PreconditionFailedException) or not upload.whole:
        return None
    if isinstance(error, ConnectorUnavailableException) and not if_none_match:
        return None  # a store that is away is asked no more: the write is undone by its name
    intent = tx.writes[seq].intent
    try:
        there = await head(tx, ObjectKey(intent.namespace, intent.target))
    except BaseConnectorException as unknown:
        error.add_note(f"Whether it was written is not known: {unknown}")
        return None
    return there if made_by(there, WriteId(tx.transaction_id, seq)) else None


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
            CopyRequest(
                intent.namespace,
                intent.target,
                CopySource(body.namespace, body.location, body.etag, body.size),
                attributes=attributes,
                if_none_match=if_none_match,
                on_upload=on_upload,
            )
        )
    request = PutRequest(
        intent.namespace,
        intent.target,
        attributes,
        if_none_match=if_none_match,
        on_upload=on_upload,
    )
    if isinstance(body, Source):
        # No part is sent once the lease may have run out (P23).
        async with aclosing(body.read(tx.check, tx.config.upload_idle_timeout)) as chunks:
            return await tx.connector.upload(replace(request, size=body.size), chunks)
    return await tx.connector.put(request, body)


def _written(
    tx: Transaction, seq: int, upload: Upload, stored: StoredObject, *, ambiguous: bool
) -> Record:
    """Note that the store has confirmed the bytes, and return the record to commit."""
    write = tx.writes[seq]
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
    # What a copy is not given it takes over from its source.
    taken_over: Mapping[str, str] = upload.body.headers if isinstance(upload.body, Record) else {}
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


async def head(tx: Transaction, key: ObjectKey) -> StoredObject | None:
    """Return what the store says of the object at a key."""
    async with tx.slots:
        tx.check()
        with tx.circuit.request(key.namespace):
            return await tx.connector.head(key.namespace, Location(key.key))


async def _is_garbage(tx: Transaction, key: ObjectKey, there: StoredObject) -> bool:
    """Whether this transaction put this here, or a late request of one that is done (P14)."""
    stamp = stamp_of(there)
    if stamp is None or stamp.write.transaction_id == tx.transaction_id:
        return stamp is not None
    late = LateWrite(namespace=key.namespace, key=key.key, write=stamp.write)
    return late in await tx.backend.late_writes([key])


def _cannot_repeat(key: ObjectKey) -> ObjectChangedException:
    message = (
        f"Another writer replaced {key} during a one-shot upload. The call was "
        "rolled back; open the stream again and retry."
    )
    return ObjectChangedException(message)


def already_exists(key: ObjectKey) -> RecordAlreadyExistsException:
    """Return the exception for a key that `create` finds taken."""
    message = (
        f"{key} already exists. The call was rolled back. "
        "Use put() to overwrite it, or choose another name."
    )
    return RecordAlreadyExistsException(message)
