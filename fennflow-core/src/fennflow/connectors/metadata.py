"""Any Unicode in the metadata of stores that keep it in HTTP headers; for connectors of such stores.

All of them encode it in this one way, so that each reads what another wrote.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import cast

from fennflow.exceptions import MetadataException

MAX_BYTES = 2048
"""Names and values together; S3 user guide, "Working with object metadata". Others hold more."""

ENCODED = "fennflow_encoded"
"""Holds, as base64 of JSON, what cannot stand in headers of its own."""

# Servers fold names to lower case; values lose outer spaces, and "=?" starts an RFC 2047 word.
_PLAIN_NAME = re.compile(r"[a-z0-9_.-]+")
_PLAIN_VALUE = re.compile(r"(?!=\?)[!-~]+( [!-~]+)*")


def encode(
    metadata: Mapping[str, str], *, plain_name: re.Pattern[str] = _PLAIN_NAME
) -> dict[str, str]:
    """Return metadata as headers hold it.

    Args:
        metadata: any Unicode.
        plain_name: names that the store takes as they are.

    Raises:
        MetadataException: it is over 2 KB in that form.
    """
    plain: dict[str, str] = {}
    other: dict[str, str] = {}
    for name, value in metadata.items():
        fits = plain_name.fullmatch(name) and _PLAIN_VALUE.fullmatch(value)
        (plain if fits else other)[name] = value
    if other:
        text = json.dumps(other, ensure_ascii=False, separators=(",", ":"))
        plain[ENCODED] = base64.urlsafe_b64encode(text.encode()).decode()
    size = sum(len(name) + len(value) for name, value in plain.items())
    if size > MAX_BYTES:
        message = (
            f"Metadata takes {size} bytes with FennFlow's own and encoded for a header; stores hold "
            f"{MAX_BYTES}. Shorten it, or put it into a file of its own."
        )
        raise MetadataException(message)
    return plain


def decode(stored: Mapping[str, str]) -> dict[str, str]:
    """Return metadata as it was before `encode`; what others wrote is returned as it is."""
    metadata = {name.lower(): value for name, value in stored.items()}
    text = metadata.pop(ENCODED, None)
    # FennFlow encodes no name that stands in a header of its own, and headers may be signed.
    return metadata if text is None else _other(text) | metadata


def _other(text: str) -> dict[str, str]:
    """Return the content of `ENCODED`: nothing if FennFlow did not write it; any writer may set it."""
    try:
        found: object = json.loads(base64.urlsafe_b64decode(text))
        pairs = cast("dict[object, object]", found) if isinstance(found, dict) else {}
        other = {str(name): str(value) for name, value in pairs.items()}
        # JSON can name half a character, which no backend and no header holds.
        "".join([*other, *other.values()]).encode()
    except (ValueError, RecursionError):
        return {}
    return other
