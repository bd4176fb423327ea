"""How browsers treat a file: whether they show it, or save it under a name."""

from __future__ import annotations

import re
from urllib.parse import quote

# Browsers ignore a type of disposition with any other character in it, and show the file.
_SAVED = re.compile(r"attachment *(?:;.*)?", re.IGNORECASE)
_PASSIVE = frozenset(
    {"application/json", "application/pdf", "text/csv", "text/markdown", "text/plain"}
)
_PASSIVE_FAMILIES = frozenset({"audio", "font", "image", "video"})


def disposition(
    name: str, media_type: str, stored: str | None, *, download_as: str | None, inline: bool
) -> str | None:
    """Return the Content-Disposition of an answer; None if it needs none.

    Args:
        name: of the file.
        media_type: with which it is sent.
        stored: the Content-Disposition that was stored with it.
        download_as: a file name, to have browsers save the file and not show it.
        inline: show files of any type.
    """
    saved = _SAVED.fullmatch(stored or "")
    if download_as is not None or not (inline or saved or is_passive(media_type)):
        return _attachment(name if download_as is None else download_as)
    return stored


def is_passive(media_type: str) -> bool:
    """Return whether browsers show a media type without running or rendering what is in it."""
    if "," in media_type:
        return False  # browsers take what follows a comma for another type, and the last one counts
    essence = media_type.partition(";")[0].strip().lower()
    if essence in _PASSIVE:
        return True
    family, _, kind = essence.partition("/")
    return family in _PASSIVE_FAMILIES and not kind.startswith("svg") and "xml" not in kind


def _attachment(name: str) -> str:
    # Half a character, which UTF-8 cannot hold, becomes a question mark.
    return f"attachment; filename*=UTF-8''{quote(name.encode(errors='replace'), safe='')}"
