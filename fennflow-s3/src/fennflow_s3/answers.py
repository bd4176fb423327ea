"""Descriptions of objects from S3's responses."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.utils import parse_timestamp

from fennflow.connectors import Location, ObjectAttributes, StoredObject, headers_of, metadata


def time_of(text: Any) -> datetime:
    """Parse a time in a response, like botocore, where this took half of the time of a listing."""
    with suppress(TypeError, ValueError):
        if str(text).endswith("Z"):
            return datetime.fromisoformat(text)
        if str(text).endswith(" GMT"):
            return parsedate_to_datetime(text)
    return parse_timestamp(text)


def is_recent(version: StoredObject, since: datetime) -> bool:
    """Return whether a version is not older than a time; a version without a time is recent."""
    return version.modified_at is None or version.modified_at >= since


def stored_object(
    key: str, answer: Any, *, size: int, attributes: ObjectAttributes | None = None
) -> StoredObject:
    """Return the description of an object from a response of S3."""
    version_id = answer.get("VersionId")
    if attributes is None:
        attributes = ObjectAttributes(
            media_type=answer.get("ContentType") or "application/octet-stream",
            metadata=metadata.decode(answer.get("Metadata") or {}),
        )
    return StoredObject(
        # A bucket without versioning, or with suspended versioning, overwrites the null version.
        location=Location(key, None if version_id == "null" else version_id),
        etag=str(answer["ETag"]).strip('"'),
        size=size,
        media_type=attributes.media_type,
        metadata=attributes.metadata,
        headers=headers_of(answer),
        modified_at=answer.get("LastModified"),
    )
