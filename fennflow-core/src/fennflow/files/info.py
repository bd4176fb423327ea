"""What the catalog says of an object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from fennflow.paths import StoragePath


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What the catalog says of an object; no object request is made for it.

    Args:
        path: its full path.
        size: in bytes.
        media_type: for instance `text/plain`. In `ListResponse.infos` it is empty, and metadata are missing,
            where a file was adopted and not used yet: `stat` asks the store.
        etag: of the object at its current location; changes with the bytes, but is not a checksum.
        sha256: hexadecimal; None if FennFlow did not write the object.
        created_at: when the path was first written, UTC.
        modified_at: when this content was written, UTC.
        metadata: the user's.
        version_id: of a versioned bucket.
        headers: HTTP headers that are stored with the object: what `connector_extra` named, such as
            Content-Encoding.
    """

    path: StoragePath
    size: int
    media_type: str
    etag: str
    sha256: str | None
    created_at: datetime
    modified_at: datetime
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    version_id: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
