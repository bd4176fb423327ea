"""Conversion between obstore's attributes and FennFlow's metadata, and stream byte counting."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from fennflow.connectors import Location, ObjectAttributes, StoredObject, headers_of, metadata

if TYPE_CHECKING:
    from obstore import Attributes, ObjectMeta

EXTRA = frozenset(
    {
        "Cache-Control",
        "Content-Disposition",
        "Content-Encoding",
        "Content-Language",
        "Storage-Class",
    }
)
"""What a user may pass as `connector_extra`."""

# Azure takes names of C#; with a hyphen obstore would take them for headers, too.
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*")


def attributes_of(attributes: ObjectAttributes) -> Attributes:
    """Return the attributes to store.

    Raises:
        MetadataException: it is too much.
    """
    return {
        "Content-Type": attributes.media_type,
        **attributes.extra,
        **metadata.encode(attributes.metadata, plain_name=_PLAIN_NAME),
    }


def taken_along(
    found: Attributes, attributes: ObjectAttributes | None, extra: Mapping[str, Any]
) -> Attributes:
    """Return the attributes of a copy: headers of its source are kept, as S3 does."""
    if attributes is None:
        return {**found, **extra}
    return {**headers_of(found), **attributes_of(attributes)}


def written_object(
    key: str, etag: str | None, size: int, attributes: Attributes, *, retried: bool
) -> StoredObject:
    """Return what is known of an object from the answer to its PUT."""
    media_type, kept = _split(attributes)
    return StoredObject(
        location=Location(key),
        etag=(etag or "").strip('"'),
        size=size,
        media_type=media_type,
        metadata=kept,
        retried=retried,
    )


def stored_object(key: str, meta: ObjectMeta, attributes: Attributes) -> StoredObject:
    """Return what the store says of an object."""
    media_type, kept = _split(attributes)
    return StoredObject(
        location=Location(key),
        etag=(meta["e_tag"] or "").strip('"'),
        size=meta["size"],
        media_type=media_type,
        metadata=kept,
        headers=headers_of(attributes),
        modified_at=meta["last_modified"],
    )


def _split(attributes: Attributes) -> tuple[str, dict[str, str]]:
    """Return the media type and the metadata of attributes."""
    stored = {name: value for name, value in attributes.items() if name not in EXTRA}
    media_type = stored.pop("Content-Type", "application/octet-stream")
    return media_type, metadata.decode(stored)


class Counted:
    """Chunks of a stream for obstore, which neither counts them nor reports what they raise.

    Args:
        chunks: the bytes.
    """

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self.size = 0
        self.failure: Exception | None = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Hand them on."""
        try:
            async for chunk in self._chunks:
                self.size += len(chunk)
                yield chunk
        except Exception as error:
            self.failure = error
            raise
