"""Conversion of records, intents, late writes and jobs to rows and back."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from fennflow.backends import (
    Intent,
    Job,
    LateWrite,
    ObjectKey,
    Outcome,
    Placement,
    Record,
    TransactionToken,
    WriteId,
)
from fennflow.connectors import Location
from fennflow.exceptions import TransactionLostException

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HEADERS = "fennflow_headers"
MICROSECOND = timedelta(microseconds=1)


def transaction_params(token: TransactionToken) -> dict[str, str | int]:
    """Return the parameters that name a transaction and its token."""
    return {"transaction": token.transaction_id, "held": token.fence}


def dumps(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as the parameter of a bulk statement."""
    return json.dumps(list(rows))


def key_rows(keys: Iterable[ObjectKey]) -> str:
    """Return keys as a parameter, in the order in which they are locked (P3)."""
    return dumps({"namespace": key.namespace, "key": key.key} for key in sorted(keys))


def id_rows(transaction_ids: Iterable[str]) -> str:
    """Return transaction ids as a parameter."""
    return dumps({"transaction_id": each} for each in transaction_ids)


def record_rows(records: Iterable[Record]) -> str:
    """Return records as a parameter, in the order in which they are locked."""
    return dumps(
        {
            "namespace": record.namespace,
            "key": record.key,
            "location_key": record.location.key,
            "version_id": record.location.version_id,
            "etag": record.etag,
            "size": record.size,
            "media_type": record.media_type,
            "content_type": record.content_type,
            "sha256": record.sha256,
            "metadata": json.dumps(_beside(record)),
            "created_at": (record.created_at - EPOCH) // MICROSECOND,
            "modified_at": (record.modified_at - EPOCH) // MICROSECOND,
            "transaction_id": record.write.transaction_id,
            "seq": record.write.seq,
        }
        for record in sorted(records, key=lambda record: record.object_key)
    )


def _beside(record: Record) -> dict[str, Any]:
    """Return the JSON column: metadata, and headers under a name that users cannot use."""
    headers = {HEADERS: dict(record.headers)} if record.headers else {}
    return {**record.metadata, **headers}


def record_of(row: Any) -> Record:
    """Return the record of a row."""
    # Most records have none; skipping the parser makes reading a thousand records faster.
    stored: dict[str, Any] = {} if row.metadata == "{}" else json.loads(row.metadata)
    headers: Mapping[str, str] = stored.pop(HEADERS, {})
    return Record(
        namespace=row.namespace,
        key=row.key,
        location=Location(row.location_key, row.version_id),
        etag=row.etag,
        size=row.size,
        media_type=row.media_type,
        content_type=row.content_type,
        sha256=row.sha256,
        metadata=stored,
        headers=headers,
        created_at=EPOCH + timedelta(microseconds=row.created_at),
        modified_at=EPOCH + timedelta(microseconds=row.modified_at),
        write=WriteId(row.transaction_id, row.seq),
    )


def intent_rows(transaction_id: str, intents: Iterable[Intent]) -> str:
    """Return intents as a parameter."""
    return dumps(
        {
            "transaction_id": transaction_id,
            "seq": intent.seq,
            "namespace": intent.namespace,
            "key": intent.key,
            "placement": intent.placement.value,
            "target": intent.target,
            "upload_id": intent.upload_id,
        }
        for intent in intents
    )


def intent_of(row: Any) -> Intent:
    """Return the intent of a row."""
    return Intent(
        seq=row.seq,
        namespace=row.namespace,
        key=row.key,
        placement=Placement(row.placement),
        target=row.target,
        upload_id=row.upload_id,
    )


def late_write_rows(late_writes: Collection[LateWrite]) -> str:
    """Return late writes as a parameter, each once: PostgreSQL cannot insert or update a row twice."""
    return dumps(
        {
            "namespace": each.namespace,
            "key": each.key,
            "transaction_id": each.write.transaction_id,
            "seq": each.write.seq,
        }
        for each in dict.fromkeys(late_writes)
    )


def late_write_of(row: Any) -> LateWrite:
    """Return the late write of a row."""
    return LateWrite(
        namespace=row.namespace, key=row.key, write=WriteId(row.transaction_id, row.seq)
    )


def job_rows(jobs: Iterable[Job]) -> str:
    """Return jobs as a parameter."""
    return dumps(
        {
            "transaction_id": each.transaction_id,
            "number": each.number,
            "name": each.name,
            "arguments": each.arguments,
            "after": each.after,
            "order_key": each.key,
            "attempts": each.attempts,
        }
        for each in jobs
    )


def job_of(row: Any) -> Job:
    """Return the job of a row."""
    return Job(
        transaction_id=row.transaction_id,
        number=row.number,
        name=row.name,
        arguments=row.arguments,
        after=None if row.after is None else Outcome(row.after),
        key=row.order_key,
        attempts=row.attempts,
        error=row.error,
    )


def lost(token: TransactionToken) -> TransactionLostException:
    """Return the error for a token that is no longer the transaction's."""
    message = (
        f"Transaction {token.transaction_id} belongs to another process: its lease expired, or it was "
        "decided there. Nothing was committed here; run the unit of work again."
    )
    return TransactionLostException(message)
