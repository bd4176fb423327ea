"""What an answer of S3 says of an object."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.utils import parse_timestamp

from fennflow.connectors import Location, ObjectAttributes, StoredObject, headers_of, metadata


def time_of(text: Any) -> datetime:
    """Return a time of an answer, as botocore does; for a listing, that takes half of its time."""
    with suppress(TypeError, ValueError):
        if str(text).endswith("Z"):
            return datetime.fromisoformat(text)
        if str(text).endswith(" GMT"):
            return parsedate_to_datetime(text)
    return parse_timestamp(text)


def is_recent(version: StoredObject, since: datetime) -> bool:
    """Return whether a version is not older than a time; one without a time is not."""
    return version.modified_at is None or version.modified_at >= since


def stored_object(
    key: str, answer: Any, *, size: int, attributes: ObjectAttributes | None = None
) -> StoredObject:
    """Return what an answer of S3 says of an object."""
    version_id = answer.get("VersionId")
    if attributes is None:
        attributes = ObjectAttributes(
            media_type=answer.get("ContentType") or "application/octet-stream",
            metadata=metadata.decode(answer.get("Metadata") or {}),
        )
    return StoredObject(
        # The null version is what a bucket without versions, or with suspended ones, overwrites.
        location=Location(key, None if version_id == "null" else version_id),
        etag=str(answer["ETag"]).strip('"'),
        size=size,
        media_type=attributes.media_type,
        metadata=attributes.metadata,
        headers=headers_of(answer),
        modified_at=answer.get("LastModified"),
    )
