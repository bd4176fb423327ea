"""Metadata and headers of objects, and the options that a user may pass as `connector_extra`.

The names are those of PutObject.

Customer keys (SSE-C) are not supported: every read would need them, and the journal would store
them.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from botocore.utils import parse_to_aware_datetime

from fennflow.connectors import ObjectAttributes, UploadTerms, metadata

NOT_COPIED = frozenset(
    {
        "ACL",
        "BucketKeyEnabled",
        "ExpectedBucketOwner",
        "GrantFullControl",
        "GrantRead",
        "GrantReadACP",
        "GrantWriteACP",
        "ObjectLockLegalHoldStatus",
        "ObjectLockMode",
        "ObjectLockRetainUntilDate",
        "RequestPayer",
        "SSEKMSEncryptionContext",
        "SSEKMSKeyId",
        "ServerSideEncryption",
        "StorageClass",
        "WebsiteRedirectLocation",
    }
)
"""Options that CopyObject does not keep from its source, so that apply has to send them again."""

AT_THE_KEY_ONLY = frozenset(
    {
        "ObjectLockLegalHoldStatus",
        "ObjectLockMode",
        "ObjectLockRetainUntilDate",
        "StorageClass",
    }
)
"""Options that staged bytes must not have: an archived object cannot be copied, a locked one cannot
be deleted, and several classes are billed for at least a month."""

HEADERS = frozenset(
    {"CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "Expires"}
)
"""Options that CopyObject keeps, unless it replaces the metadata."""

FOR_PUT = NOT_COPIED | HEADERS | {"Tagging"}


TIMES = frozenset({"Expires", "ObjectLockRetainUntilDate"})
SWITCHES = frozenset({"BucketKeyEnabled"})


def is_option(name: str, value: object) -> bool:
    """Return whether S3 supports an option, and its value is valid in a header."""
    if name not in FOR_PUT:
        return False
    if name in SWITCHES:
        return isinstance(value, bool)
    if name in TIMES and isinstance(value, str):
        try:
            parse_to_aware_datetime(value)
        except (ValueError, OverflowError, RuntimeError):
            return False
        return True
    return isinstance(value, str) and value.isascii() and value.isprintable()


def described(attributes: ObjectAttributes) -> dict[str, Any]:
    """Return an object's metadata and headers as request parameters."""
    return {
        "ContentType": attributes.media_type,
        "Metadata": metadata.encode(attributes.metadata),
        **attributes.extra,
    }


def bound(terms: UploadTerms) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the request parameters for the terms of an upload, and the headers that a client sends."""
    params: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if terms.media_type is not None:
        params["ContentType"] = headers["Content-Type"] = terms.media_type
    if terms.if_none_match:
        params["IfNoneMatch"] = headers["If-None-Match"] = "*"
    if terms.sha256 is not None:
        checksum = b64encode(bytes.fromhex(terms.sha256)).decode()
        params["ChecksumSHA256"] = headers["x-amz-checksum-sha256"] = checksum
    if terms.metadata:
        params["Metadata"] = metadata.encode(terms.metadata)
        headers |= {f"x-amz-meta-{name}": value for name, value in params["Metadata"].items()}
    if terms.size is not None:
        params["ContentLength"] = terms.size
    return params, headers


def form(terms: UploadTerms) -> tuple[dict[str, str], list[Any]]:
    """Return the fields of a form that uploads, and the conditions of its policy."""
    fields = bound(terms)[1]
    conditions: list[Any] = [{name: value} for name, value in fields.items()]
    if terms.max_size is not None:
        low, high = (0, terms.max_size) if terms.size is None else (terms.size, terms.size)
        conditions.append(["content-length-range", low, high])
    return fields, conditions
