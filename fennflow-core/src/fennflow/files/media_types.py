"""Media types: from a name, from bytes, and back to a file extension."""

from __future__ import annotations

import mimetypes
from typing import Any

ANY = "application/octet-stream"
"""The media type of unknown bytes."""
# Only the tables of the standard library, not those of the machine: a file name that is derived
# from a media type must not depend on where the program runs.
_TYPES = mimetypes.MimeTypes(filenames=())
_OFFICE = "application/vnd.openxmlformats-officedocument."
_OPEN = "application/vnd.oasis.opendocument."
for _media_type, _extension in (
    ("application/gzip", ".gz"),
    ("application/toml", ".toml"),
    ("application/x-7z-compressed", ".7z"),
    ("application/x-ndjson", ".jsonl"),
    ("application/x-ndjson", ".ndjson"),
    ("application/x-parquet", ".parquet"),
    ("application/yaml", ".yaml"),
    ("application/yaml", ".yml"),
    ("audio/flac", ".flac"),
    ("audio/mp4", ".m4a"),
    ("audio/ogg", ".ogg"),
    ("font/woff", ".woff"),
    ("font/woff2", ".woff2"),
    ("image/avif", ".avif"),
    ("image/heic", ".heic"),
    ("image/webp", ".webp"),
    ("text/markdown", ".md"),
    ("text/plain", ".log"),
    ("text/uri-list", ".uri"),
    ("video/x-matroska", ".mkv"),
    (f"{_OFFICE}presentationml.presentation", ".pptx"),
    (f"{_OFFICE}spreadsheetml.sheet", ".xlsx"),
    (f"{_OFFICE}wordprocessingml.document", ".docx"),
    (f"{_OPEN}presentation", ".odp"),
    (f"{_OPEN}spreadsheet", ".ods"),
    (f"{_OPEN}text", ".odt"),
):
    _TYPES.add_type(_media_type, _extension)
_COMPRESSED = {
    "br": ANY,
    "bzip2": "application/x-bzip2",
    "compress": "application/x-compress",
    "gzip": "application/gzip",
    "xz": "application/x-xz",
}
"""Media types by Python's name of the encoding: FennFlow stores compressed bytes as they are."""


def from_name(name: str) -> str | None:
    """Return the media type that a file name's extension names, if any."""
    # With a leading slash it is not parsed as a URL, which may have a type of its own (`data:`).
    media_type, encoding = _TYPES.guess_type(f"/{name.rpartition('/')[2]}")
    return media_type if encoding is None else _COMPRESSED.get(encoding, ANY)


def from_bytes(data: bytes) -> str | None:
    """Return the media type that the first bytes identify, if any."""
    import filetype  # it imports seventy modules, and is needed only for bytes without a name

    kind: Any = filetype.guess(data[:8192])  # pyright: ignore[reportUnknownMemberType]
    return None if kind is None else str(kind.mime)


def extension(media_type: str) -> str:
    """Return the file extension of a media type, with its dot; empty if it has none."""
    essence = media_type.partition(";")[0].strip().lower()
    return _TYPES.guess_extension(essence) or ""
