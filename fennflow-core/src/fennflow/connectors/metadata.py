"""Encodes any Unicode for stores that keep metadata in HTTP headers; for connectors of such stores.

They all use this encoding, so that each can read what another wrote.
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
"""The header that holds, as base64 of JSON, metadata that are not valid as headers."""

# Servers fold names to lower case; values lose outer spaces, and "=?" starts an RFC 2047 word.
_PLAIN_NAME = re.compile(r"[a-z0-9_.-]+")
_PLAIN_VALUE = re.compile(r"(?!=\?)[!-~]+( [!-~]+)*")


def encode(
    metadata: Mapping[str, str], *, plain_name: re.Pattern[str] = _PLAIN_NAME
) -> dict[str, str]:
    """Return metadata encoded for headers.

    Args:
        metadata: any Unicode.
        plain_name: matches names that the store accepts unchanged.

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
    """Return metadata as it was before `encode`; metadata of other programs are returned unchanged."""
    metadata = {name.lower(): value for name, value in stored.items()}
    text = metadata.pop(ENCODED, None)
    # FennFlow never encodes a name that also has its own header, and headers may be signed.
    return metadata if text is None else _other(text) | metadata


def _other(text: str) -> dict[str, str]:
    """Return the content of `ENCODED`; empty if FennFlow did not write it: anyone may set it."""
    try:
        found: object = json.loads(base64.urlsafe_b64decode(text))
        pairs = cast("dict[object, object]", found) if isinstance(found, dict) else {}
        other = {str(name): str(value) for name, value in pairs.items()}
        # JSON can contain a lone surrogate, which no backend and no header can hold.
        "".join([*other, *other.values()]).encode()
    except (ValueError, RecursionError):
        return {}
    return other
