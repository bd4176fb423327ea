"""Rows: what commands carry and the local state stores, and the objects of the contract."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import NoneType
from typing import Any, cast

from fennflow.backends import Intent, LateWrite, Placement, Record, WriteId
from fennflow.connectors import Location

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

Row = list[Any]
"""The values of a row, all of which JSON can hold, in the order of the table's columns."""


_TEXT_OR_NONE = (str, NoneType)
_BODY: tuple[type | tuple[type, ...], ...] = (
    *(str, _TEXT_OR_NONE, str, int, str, _TEXT_OR_NONE, _TEXT_OR_NONE),
    *(dict, dict, int, int),
)
"""The types of the values in the body of a record."""


def dumps(value: object) -> str:
    """Return JSON: compact, of ASCII alone, and the same for equal values."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def record_row(record: Record) -> Row:
    """Return the row of a record."""
    body = [
        record.location.key,
        record.location.version_id,
        record.etag,
        record.size,
        record.media_type,
        record.content_type,
        record.sha256,
        dict(record.metadata),
        dict(record.headers),
        (record.created_at - EPOCH) // MICROSECOND,
        (record.modified_at - EPOCH) // MICROSECOND,
    ]
    return [record.namespace, record.key, *record.write, dumps(body)]


def _checked(values: object) -> Sequence[Any]:
    """Return what the body of a record holds; anyone who can write to the bucket may have written it.

    Raises:
        TypeError: it is not one that `record_row` wrote.
    """
    found = cast("list[object]", values) if isinstance(values, list) else []
    kinds = zip(found, _BODY, strict=False)
    if len(found) != len(_BODY) or not all(isinstance(value, kind) for value, kind in kinds):
        message = "it is not a record"
        raise TypeError(message)
    return found


def record_of(row: Iterable[Any]) -> Record:
    """Return the record of a row."""
    namespace, key, transaction_id, seq, body = row
    (
        location_key,
        version_id,
        etag,
        size,
        media_type,
        content_type,
        sha256,
        metadata,
        headers,
        created,
        modified,
    ) = _checked(json.loads(body))
    return Record(
        namespace=namespace,
        key=key,
        location=Location(location_key, version_id),
        etag=etag,
        size=size,
        media_type=media_type,
        content_type=content_type,
        sha256=sha256,
        metadata=metadata,
        headers=headers,
        created_at=EPOCH + timedelta(microseconds=created),
        modified_at=EPOCH + timedelta(microseconds=modified),
        write=WriteId(transaction_id, seq),
    )


def intent_row(intent: Intent) -> Row:
    """Return the row of an intent, without its transaction."""
    return [
        intent.seq,
        intent.namespace,
        intent.key,
        intent.placement.value,
        intent.target,
        intent.upload_id,
    ]


def intent_of(row: Iterable[Any]) -> Intent:
    """Return the intent of a row."""
    seq, namespace, key, placement, target, upload_id = row
    return Intent(
        seq=seq,
        namespace=namespace,
        key=key,
        placement=Placement(placement),
        target=target,
        upload_id=upload_id,
    )


def late_row(write: LateWrite) -> Row:
    """Return the row of a write that may arrive late."""
    return [write.namespace, write.key, *write.write]


def late_of(row: Iterable[Any]) -> LateWrite:
    """Return the write of a row."""
    namespace, key, *write = row
    return LateWrite(namespace=namespace, key=key, write=WriteId(*write))


def key_rows(keys: Iterable[tuple[str, str]]) -> list[Row]:
    """Return keys as rows, in the order in which they are locked (P3)."""
    return [list(key) for key in sorted(set(keys))]


Arguments = Mapping[str, Any]
