"""Records objects that were uploaded without FennFlow, in a transaction.

An upload by a ticket goes to a staging key that no other upload has. A unit of work that accepts it
copies exactly the bytes that it has checked to a key that no URL names. An upload that arrives late, or
again, therefore changes nothing that is committed. The sweep deletes it (P32).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import uuid_utils

from fennflow.backends import Delete, ObjectKey, Placement, Record, WriteId
from fennflow.connectors import (
    Location,
    ObjectAttributes,
    PresignedRequest,
    StoredObject,
    UploadMethod,
    UploadTerms,
)
from fennflow.connectors.headers import UNKNOWN_MEDIA_TYPE, headers_of, media_type_of
from fennflow.engine.concurrency import run_all
from fennflow.engine.details import check_catalog
from fennflow.engine.differences import Policy, judge
from fennflow.engine.directories import check_directories
from fennflow.engine.plan import Write, choose_placement, visible
from fennflow.engine.presigning import check_seconds, check_signs_headers
from fennflow.engine.stamps import Stamp, stamped
from fennflow.engine.streaming import Digest
from fennflow.engine.tickets import Ticket, opened, signed, ticket_key
from fennflow.engine.transaction import Transaction, no_such_key
from fennflow.engine.writing import Sending, Upload, already_exists, head
from fennflow.exceptions import (
    ChecksumMismatchException,
    ConnectorCapabilityException,
    NoSuchKeyException,
    ObjectChangedException,
    PreconditionFailedException,
    RecordAlreadyExistsException,
    UploadTicketException,
)
from fennflow.paths import check_key

PART_SIZE = 16 << 20
"""The smallest part in bytes; S3 accepts no smaller part except the last."""
MAX_SECONDS = 2**31
MAX_PARTS = 1000
"""The most URLs of one ticket."""

_NOT_CHOSEN = frozenset({"Content-Disposition", "Content-Encoding"})


async def adopt(tx: Transaction, namespace: str, keys: Sequence[str]) -> Sequence[Record]:
    """Record the objects of keys that have no record, all or none (P8).

    Only reading requests are sent to the store, so there is nothing to undo.

    Raises:
        NoSuchKeyException: some keys have no object; the message names them all.
        RecordAlreadyExistsException: a key has a record, or its object belongs to another catalog.
        RecordLockedException: another transaction is writing one of the keys.
        ObjectChangedException: an object was written by a transaction that did not commit.
    """
    for key in keys:
        check_key(key, reserved_prefix=tx.config.reserved_prefix)
    wanted = list(dict.fromkeys(ObjectKey(namespace, key) for key in keys))
    if not wanted:
        return []
    capabilities = await tx.capabilities_for(namespace)
    await check_directories(tx, namespace, [each.key for each in wanted])

    def place(key: ObjectKey, before: Record | None, chain: Sequence[Write]) -> Placement:
        if before is not None or visible(chain, before) is not None:
            message = (
                f"{key} is in the catalog already. The call was rolled back. "
                "To bring its record up to date, reconcile the catalog with the bucket."
            )
            raise RecordAlreadyExistsException(message)
        return Placement.VERSIONED if capabilities.versioned else Placement.DIRECT

    with tx.whole():
        seqs = await tx.begin_writes(wanted, place)
        found = await run_all(tx.config.max_concurrency, partial(_judged, tx), seqs)
        records = {record.key: record for record in found if record is not None}
        missing = [each.key for each in wanted if each.key not in records]
        if missing:
            raise no_such_key(namespace, missing)
    for seq in seqs:
        tx.update(seq, record=records[tx.writes[seq].intent.key])
    return [records[key] for key in keys]


async def _judged(tx: Transaction, seq: int) -> Record | None:
    """Return the record of the object at a key; None if there is no object."""
    key = tx.writes[seq].intent.object_key
    stored = await head(tx, key)
    if stored is None:
        return None
    check_catalog(tx, key, stored)
    policy = Policy(
        settings=tx.config.reconcile.model_copy(
            update={"strategy": "insert_missing", "orphans": "report"}
        ),
        filling=False,
        dead_before=0.0,
        catalog_id=tx.backend.catalog_id,
    )
    late_writes = await tx.backend.late_writes([key])
    verdict = judge(
        key,
        stored,
        None,
        policy,
        write=WriteId(tx.transaction_id, seq),
        late_writes=late_writes,
    )
    if verdict is None or verdict.record is None:
        message = (
            f"{key} has the stamp of a transaction that did not commit, so it is "
            "not an upload by someone else. The call was rolled back. Upload it under another name."
        )
        raise ObjectChangedException(message)
    return verdict.record


async def issue(
    tx: Transaction,
    namespace: str,
    key: str,
    terms: UploadTerms,
    *,
    method: UploadMethod,
    expires_in: float,
) -> tuple[str, Sequence[PresignedRequest], Ticket]:
    """Allow one upload: return the signed ticket, and the requests with which a client sends the bytes.

    Args:
        tx: the transaction; the ticket is not part of it.
        namespace: of the file.
        key: under which it will be accepted.
        terms: the limits, which were checked; they include `max_size`.
        method: how the client sends the bytes.
        expires_in: seconds for which the requests are valid.

    Raises:
        RecordAlreadyExistsException: the key is taken.
        ConnectorCapabilityException: the store has no such requests, or not for that long.
    """
    check_key(key, reserved_prefix=tx.config.reserved_prefix)
    check_seconds(expires_in)
    check_signs_headers(tx, namespace)
    if method == "MULTIPART" and terms.size is None:
        message = "An upload in parts needs its size: each part is signed with its own."
        raise ConnectorCapabilityException(message)
    if await tx.read_records(namespace, [key], missing_ok=True) != [None]:
        raise already_exists(ObjectKey(namespace, key))
    capabilities = await tx.capabilities_for(namespace)
    ticket_id = str(uuid_utils.uuid7())
    # An upload that began in time may take as long as a late write, and can still be accepted.
    seconds = expires_in if 0 < expires_in < MAX_SECONDS else 0  # the store refuses other values
    deadline = int(time.time() + seconds + tx.config.late_write_period)
    staging = ticket_key(tx.config.reserved_prefix, tx.backend.catalog_id, ticket_id, deadline)
    ticket = Ticket(
        ticket_id=ticket_id,
        staging_key=staging,
        namespace=namespace,
        key=key,
        deadline=deadline,
        max_size=terms.max_size or 0,
        size=terms.size,
        media_type=terms.media_type,
        sha256=terms.sha256,
    )
    metadata = stamped({}, Stamp(WriteId(ticket_id, 1), catalog_id=tx.backend.stamped_id))
    if method == "MULTIPART":
        ticket, requests = await _parts(tx, ticket, metadata, expires_in)
    else:
        put = method == "PUT"
        bound = replace(
            terms,
            metadata=metadata,
            sha256=terms.sha256 if put and capabilities.checksums else None,
            if_none_match=put and capabilities.conditional_create,
        )
        location = Location(staging)
        requests = [
            await tx.connector.presign(
                namespace, location, method=method, expires_in=expires_in, terms=bound
            )
        ]
    return signed(ticket, await tx.backend.ticket_key()), requests, ticket


async def _parts(
    tx: Transaction, ticket: Ticket, metadata: Mapping[str, str], expires_in: float
) -> tuple[Ticket, Sequence[PresignedRequest]]:
    """Begin an upload in parts, and return the requests that send them."""
    attributes = ObjectAttributes(
        media_type=ticket.media_type or UNKNOWN_MEDIA_TYPE, metadata=metadata
    )
    namespace, key = ticket.namespace, ticket.staging_key
    upload_id = await tx.connector.begin_upload(namespace, key, attributes, expires_in=expires_in)
    part_size = max(PART_SIZE, -(-(ticket.size or 0) // MAX_PARTS))
    ticket = replace(ticket, upload_id=upload_id, part_size=part_size)
    requests = [
        await tx.connector.presign_part(
            namespace, key, upload_id, number, size=size, expires_in=expires_in
        )
        for number, size in enumerate(ticket.part_sizes, 1)
    ]
    return ticket, requests


async def read_ticket(tx: Transaction, token: object) -> Ticket:
    """Parse a ticket.

    Raises:
        UploadTicketException: this catalog did not make it, or it has expired.
    """
    ticket = opened(token, await tx.backend.ticket_key())
    if time.time() > ticket.deadline:
        message = (
            f"The ticket for {ticket.namespace}/{ticket.key} has expired. The upload is "
            "deleted; nothing was accepted. Ask for another ticket."
        )
        raise UploadTicketException(message)
    return ticket


async def accept(tx: Transaction, ticket: Ticket) -> Record:
    """Turn the upload into the file of the ticket's key.

    Raises:
        NoSuchKeyException: nothing was uploaded, or it was accepted before.
        UploadTicketException: the upload is not what the ticket allows.
        ChecksumMismatchException: its bytes do not have the ticket's checksum.
        RecordAlreadyExistsException: the key is taken.
        RecordLockedException: another transaction is writing the key.
        ObjectChangedException: the upload was replaced while it was accepted.
    """
    capabilities = await tx.capabilities_for(ticket.namespace)
    await check_directories(tx, ticket.namespace, [ticket.key])

    def place(key: ObjectKey, before: Record | None, chain: Sequence[Write]) -> Placement:
        if visible(chain, before) is not None:
            raise already_exists(key)
        return choose_placement(
            before,
            written=bool(chain),
            # A copy that must not overwrite needs the condition on copies, not on PUTs.
            capabilities=replace(capabilities, conditional_create=capabilities.conditional_copy),
            hide_pending=tx.config.hide_pending,
        )

    with tx.whole():
        [seq] = await tx.begin_writes([ObjectKey(ticket.namespace, ticket.key)], place)
        source = await _uploaded(tx, ticket)
        _check(ticket, source)
        upload = Upload(
            key=ticket.key,
            body=_record(ticket, source),
            sha256=ticket.sha256,
            media_type=media_type_of(source.media_type),
            content_type=None,
            metadata={},
            extra={},
        )
        try:
            record = await Sending(tx, seq, upload, create=True).send()
            await _check_again(tx, ticket, source, record)
        except (NoSuchKeyException, PreconditionFailedException) as error:
            raise _replaced(ticket) from error
    discarded = Delete(namespace=ticket.namespace, location=source.location, for_key=ticket.key)
    tx.update(record.write.seq, discards=(discarded,))
    return record


async def _uploaded(tx: Transaction, ticket: Ticket) -> StoredObject:
    """Return the uploaded object; a multipart upload is completed now."""
    place = ObjectKey(ticket.namespace, ticket.staging_key)
    found = await head(tx, place)
    if found is None and ticket.upload_id is not None:
        try:
            async with tx.slots:
                tx.check()
                await tx.connector.finish_upload(
                    place.namespace, place.key, ticket.upload_id, ticket.part_sizes
                )
        except PreconditionFailedException as error:
            message = f"{error} Nothing was accepted. Send the missing parts, and accept it again."
            raise UploadTicketException(message) from error
        except NoSuchKeyException:
            pass  # finished by another attempt, or aborted
        found = await head(tx, place)
    if found is None:
        message = (
            f"Nothing was uploaded for {ticket.namespace}/{ticket.key} by this ticket, or it was "
            "accepted before. Upload the file first."
        )
        raise NoSuchKeyException(message)
    return found


def _check(ticket: Ticket, source: StoredObject) -> None:
    wrong: list[str] = []
    if source.size > ticket.max_size:
        wrong.append(f"it has {source.size} bytes, and at most {ticket.max_size} are allowed")
    if ticket.size not in {None, source.size}:
        wrong.append(f"it has {source.size} bytes, not {ticket.size}")
    if ticket.media_type not in {None, source.media_type}:
        wrong.append(f"it is {source.media_type}, not {ticket.media_type}")
    # A signature cannot exclude additional headers, and these change what browsers do with the
    # bytes.
    chosen = sorted(_NOT_CHOSEN & headers_of(source.headers).keys())
    if chosen:
        wrong.append(f"it was sent with {' and '.join(chosen)}")
    if wrong:
        message = (
            f"The upload for {ticket.namespace}/{ticket.key} is not what the ticket allows: "
            f"{'; '.join(wrong)}. Nothing was accepted. Ask for another ticket."
        )
        raise UploadTicketException(message)


async def _check_again(
    tx: Transaction, ticket: Ticket, source: StoredObject, record: Record
) -> None:
    """Check that the copied bytes are those that were checked, and have the checksum of the ticket.

    The copy is read, not the upload: no URL can change it.
    """
    if source.location.version_id is None:
        # Some stores ignore the condition on the source.
        now = await head(tx, ObjectKey(ticket.namespace, ticket.staging_key))
        if now is None or now.etag != source.etag:
            raise _replaced(ticket)
    if ticket.sha256 is None:
        return
    digest = Digest()
    async with tx.streams:
        tx.check()
        chunks = tx.connector.stream(record.namespace, record.location, if_match=record.etag)
        async with aclosing(chunks):
            async for chunk in chunks:
                tx.check()
                await digest.update(chunk)
    found = await digest.hexdigest()
    if found != ticket.sha256:
        message = (
            f"The upload for {ticket.namespace}/{ticket.key} has the SHA-256 {found}, not "
            f"{ticket.sha256}. Nothing was accepted. Ask for another ticket, and send it again."
        )
        raise ChecksumMismatchException(message)


def _replaced(ticket: Ticket) -> ObjectChangedException:
    message = (
        f"The upload for {ticket.namespace}/{ticket.key} was replaced while it was accepted. "
        "Nothing was accepted. Accept it again."
    )
    return ObjectChangedException(message)


def _record(ticket: Ticket, source: StoredObject) -> Record:
    """Return an upload as the source of a copy."""
    now = source.modified_at or datetime.now(UTC)
    return Record(
        namespace=ticket.namespace,
        key=ticket.key,
        location=source.location,
        etag=source.etag,
        size=source.size,
        media_type=media_type_of(source.media_type),
        headers=headers_of(source.headers),
        created_at=now,
        modified_at=now,
        write=WriteId(ticket.ticket_id, 1),
    )
