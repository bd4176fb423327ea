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
"""The options that a user may pass as `connector_extra`."""

# Azure accepts names like those of C# identifiers; with a hyphen obstore would treat them as
# headers.
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*")


def attributes_of(attributes: ObjectAttributes) -> Attributes:
    """Return the attributes to store.

    Raises:
        MetadataException: the metadata are too large.
    """
    return {
        "Content-Type": attributes.media_type,
        **attributes.extra,
        **metadata.encode(attributes.metadata, plain_name=_PLAIN_NAME),
    }


def taken_along(
    found: Attributes, attributes: ObjectAttributes | None, extra: Mapping[str, Any]
) -> Attributes:
    """Return the attributes of a copy, which keeps the headers of its source, as on S3."""
    if attributes is None:
        return {**found, **extra}
    return {**headers_of(found), **attributes_of(attributes)}


def written_object(
    key: str, etag: str | None, size: int, attributes: Attributes, *, retried: bool
) -> StoredObject:
    """Return the description of an object from the answer to its PUT."""
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
    """Return the store's description of an object."""
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
    """Chunks of a stream for obstore, which neither counts their bytes nor reports their exceptions.

    Args:
        chunks: the bytes.
    """

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self.size = 0
        self.failure: Exception | None = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Pass the chunks on."""
        try:
            async for chunk in self._chunks:
                self.size += len(chunk)
                yield chunk
        except Exception as error:
            self.failure = error
            raise
