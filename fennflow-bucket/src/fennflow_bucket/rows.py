"""Conversion between rows, which commands and the local state use, and the values of the contract."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import NoneType
from typing import Any, cast

from fennflow.backends import Intent, LateWrite, ObjectKey, Placement, Record, WriteId
from fennflow.connectors import Location

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

Row = list[Any]
"""The values of a row, in the order of the table's columns; JSON can hold all of them."""


_TEXT_OR_NONE = (str, NoneType)
_RECORD: tuple[type | tuple[type, ...], ...] = (
    *(str, str, str, int),
    *(str, _TEXT_OR_NONE, str, int, str, _TEXT_OR_NONE, _TEXT_OR_NONE),
    *(dict, dict, int, int),
)
"""The types of the values in the row of a record, and in its body."""


def dumps(value: object) -> str:
    """Return compact ASCII JSON, which is the same for equal values."""
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


def _checked(values: Sequence[object], types: Sequence[type | tuple[type, ...]]) -> Sequence[Any]:
    """Return values if they have the types; they are not trusted.

    Raises:
        TypeError: they are not what `record_row` or `key_rows` wrote.
    """
    texts: list[object] = []
    for value in values:
        if isinstance(value, dict):
            texts += cast("dict[str, object]", value).values()
    right = len(values) == len(types) and all(map(isinstance, values, types))
    if not (right and all(isinstance(each, str) for each in texts)):
        message = "it is not a record, or not a key"
        raise TypeError(message)
    return values


def key_of(row: Sequence[object]) -> ObjectKey:
    """Return the key of a row."""
    return ObjectKey(*_checked(row, (str, str)))


def record_of(row: Iterable[Any]) -> Record:
    """Return the record of a row."""
    *name, body = row
    (
        namespace,
        key,
        transaction_id,
        seq,
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
    ) = _checked([*name, *json.loads(body)], _RECORD)
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
