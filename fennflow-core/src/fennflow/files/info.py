"""The catalog's information about an object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from fennflow.paths import StoragePath


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """The catalog's information about an object; it costs no object request.

    Args:
        path: its full path.
        size: in bytes.
        media_type: for instance `text/plain`. For a file that was adopted and not used yet,
            `ListResponse.infos` has no media type and no metadata; `stat` asks the store.
        etag: of the object at its current location; changes with the bytes, but is not a checksum.
        sha256: hexadecimal; None if FennFlow did not write the object.
        created_at: when the path was first written, UTC.
        modified_at: when this content was written, UTC.
        metadata: the user's.
        version_id: of a versioned bucket.
        headers: HTTP headers that are stored with the object, from `connector_extra`, such as
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
