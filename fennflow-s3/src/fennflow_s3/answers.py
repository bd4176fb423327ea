"""What an answer of S3 says of an object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fennflow.connectors import Location, ObjectAttributes, StoredObject, headers_of, metadata

if TYPE_CHECKING:
    from datetime import datetime


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
