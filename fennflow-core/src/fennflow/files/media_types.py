"""Media types: from a name, from bytes, and back to a file extension."""

from __future__ import annotations

import mimetypes
from typing import Any

import filetype

# The tables of the standard library alone, without those of the machine: the name of a file made
# from its media type must not depend on where the program runs.
_TYPES = mimetypes.MimeTypes(filenames=())
for _media_type, _extension in (
    ("application/x-parquet", ".parquet"),
    ("audio/flac", ".flac"),
    ("audio/ogg", ".ogg"),
    ("image/webp", ".webp"),
    ("text/markdown", ".md"),
    ("text/uri-list", ".uri"),
):
    _TYPES.add_type(_media_type, _extension)


def from_name(name: str) -> str | None:
    """Return the media type of a file name's extension, if any."""
    # After a slash, it cannot be taken for a URL, which may bring a type of its own (`data:`).
    media_type, encoding = _TYPES.guess_type(f"/{name.rpartition('/')[2]}")
    return None if encoding else media_type


def from_bytes(data: bytes) -> str | None:
    """Return the media type that the first bytes identify, if any."""
    kind: Any = filetype.guess(data[:8192])  # pyright: ignore[reportUnknownMemberType]
    return None if kind is None else str(kind.mime)


def extension(media_type: str) -> str:
    """Return the file extension of a media type, with its dot; empty if it has none."""
    essence = media_type.partition(";")[0].strip().lower()
    return _TYPES.guess_extension(essence) or ""
