"""HTTP headers of objects: those that stores keep, and those that make browsers show or save a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from fennflow.exceptions import FileException
from fennflow.printable import brief

# A type and a subtype of RFC 6838, and parameters of printable ASCII. Servers limit all headers of an
# object to some kilobytes.
MEDIA_TYPE = r"(?=.{3,1000}\Z)[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+( *;[\x20-\x7e]*)?"
UNKNOWN_MEDIA_TYPE = "application/octet-stream"

_MEDIA_TYPE = re.compile(MEDIA_TYPE)

_HEADERS = {
    name.replace("-", "").lower(): name
    for name in (
        "Cache-Control",
        "Content-Disposition",
        "Content-Encoding",
        "Content-Language",
        "Expires",
    )
}
_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")

# Browsers ignore a disposition type with any other character, and show the file.
_SAVED = re.compile(r"attachment *(?:;.*)?", re.IGNORECASE)
_PASSIVE = frozenset(
    {"application/json", "application/pdf", "text/csv", "text/markdown", "text/plain"}
)
_PASSIVE_FAMILIES = frozenset({"audio", "font", "image", "video"})


def headers_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the HTTP headers among the options of a write, or in a store's description of an object.

    Args:
        options: by the names of S3's interface (`ContentEncoding`) or of HTTP (`Content-Encoding`).
            A value that is not valid in a header is left out: any writer may have stored it.
    """
    headers = {
        _HEADERS[plain]: value
        for name, value in options.items()
        if (plain := name.replace("-", "").lower()) in _HEADERS
        and isinstance(value, str)
        and _HEADER_VALUE.fullmatch(value)
    }
    # Some servers store the chunked transfer encoding as if it were a content encoding.
    codings = [each.strip() for each in headers.pop("Content-Encoding", "").split(",")]
    codings = [each for each in codings if each and each.lower() != "aws-chunked"]
    return {**headers, "Content-Encoding": ", ".join(codings)} if codings else headers


def media_type_of(stored: str) -> str:
    """Return a stored media type, or that of unknown bytes if it is not valid."""
    return stored if _MEDIA_TYPE.fullmatch(stored) else UNKNOWN_MEDIA_TYPE


def check_media_type(media_type: object) -> None:
    """Reject a text that is not a media type; called before any I/O.

    Raises:
        FileException: it is not a media type.
    """
    if not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type):
        message = f"{brief(media_type)} is not a media type such as text/plain. Nothing was sent."
        raise FileException(message)


def disposition(
    name: str, media_type: str, stored: str | None, *, download_as: str | None, inline: bool
) -> str | None:
    """Return the Content-Disposition of a response; None if it needs none.

    Args:
        name: of the file.
        media_type: with which it is sent.
        stored: the Content-Disposition that was stored with it.
        download_as: a file name; browsers then save the file and do not show it.
        inline: show files of any type.
    """
    saved = _SAVED.fullmatch(stored or "")
    if download_as is not None or not (inline or saved or is_passive(media_type)):
        return _attachment(name if download_as is None else download_as)
    return stored


def is_passive(media_type: str) -> bool:
    """Return whether browsers show a media type without running or rendering its content."""
    if "," in media_type:
        return False  # browsers parse a comma as the start of another type, and use the last one
    essence = media_type.partition(";")[0].strip().lower()
    if essence in _PASSIVE:
        return True
    family, _, kind = essence.partition("/")
    return family in _PASSIVE_FAMILIES and not kind.startswith("svg") and "xml" not in kind


def _attachment(name: str) -> str:
    # A lone surrogate, which UTF-8 cannot encode, becomes a question mark.
    return f"attachment; filename*=UTF-8''{quote(name.encode(errors='replace'), safe='')}"
