"""Any Unicode in S3's user metadata, which holds US-ASCII alone."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from fennflow.connectors import ObjectAttributes
from fennflow.exceptions import MetadataException

MAX_BYTES = 2048
"""Names and values together; S3 user guide, "Working with object metadata"."""

ENCODED = "fennflow_encoded"
"""Holds, as base64 of JSON, what cannot stand in headers of its own."""

# S3 folds names to lower case; values lose outer spaces, and "=?" starts an RFC 2047 word.
_PLAIN_NAME = re.compile(r"[a-z0-9_.-]+")
_PLAIN_VALUE = re.compile(r"(?!=\?)[!-~]+( [!-~]+)*")


def encode(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata as S3 holds it.

    Raises:
        MetadataException: it is over 2 KB in that form.
    """
    plain: dict[str, str] = {}
    other: dict[str, str] = {}
    for name, value in metadata.items():
        fits = _PLAIN_NAME.fullmatch(name) and _PLAIN_VALUE.fullmatch(value)
        (plain if fits else other)[name] = value
    if other:
        text = json.dumps(other, ensure_ascii=False, separators=(",", ":"))
        plain[ENCODED] = base64.urlsafe_b64encode(text.encode()).decode()
    size = sum(len(name) + len(value) for name, value in plain.items())
    if size > MAX_BYTES:
        message = (
            f"Metadata takes {size} bytes with FennFlow's own and encoded for S3, which holds "
            f"{MAX_BYTES}. Shorten it, or put it into a file of its own."
        )
        raise MetadataException(message)
    return plain


def decode(stored: Mapping[str, str]) -> dict[str, str]:
    """Return metadata as it was before `encode`; what others wrote is returned as it is."""
    metadata = {name.lower(): value for name, value in stored.items()}
    text = metadata.pop(ENCODED, None)
    if text is not None:
        try:
            other: object = json.loads(base64.urlsafe_b64decode(text))
        except (ValueError, binascii.Error):
            other = None
        if isinstance(other, dict):
            pairs = cast("dict[object, object]", other)
            metadata |= {str(name): str(value) for name, value in pairs.items()}
    return metadata


def described(attributes: ObjectAttributes) -> dict[str, Any]:
    """Return the parameters that say what is stored beside the bytes."""
    return {
        "ContentType": attributes.media_type,
        "Metadata": encode(attributes.metadata),
        **attributes.extra,
    }
