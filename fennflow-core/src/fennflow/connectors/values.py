"""The values of the connector contract: locations, requests, and descriptions of objects."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

from typing_extensions import override

from fennflow.connectors.headers import check_media_type
from fennflow.exceptions import (
    ConfigException,
    ConnectorCapabilityException,
    FileException,
    MetadataException,
)
from fennflow.printable import brief

if TYPE_CHECKING:
    from fennflow.exceptions import BaseConnectorException

UploadCallback = Callable[[str], Awaitable[None]]

_SHA256 = re.compile(r"[0-9a-f]{64}")


SIZES = 1 << 63
"""No object is as large, and no database holds the number."""


def check_terms(terms: UploadTerms) -> None:
    """Reject terms that no upload can have; called before any I/O.

    Raises:
        FileException: the media type, the size or the checksum is not valid.
    """
    if terms.media_type is not None:
        check_media_type(terms.media_type)
    size, sha256 = cast("object", terms.size), cast("object", terms.sha256)
    if size is not None and not _is_size(size):
        message = f"size={brief(size)} is not a number of bytes."
        raise FileException(message)
    if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        message = f"checksum={brief(sha256)} is not a SHA-256: 64 hexadecimal digits in lower case."
        raise FileException(message)


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < SIZES


def check_max_size(max_size: object, size: int | None) -> None:
    """Reject an invalid size limit; called before any I/O.

    Raises:
        FileException: it is not valid, or the size exceeds it.
    """
    if not _is_size(max_size) or max_size == 0:
        message = f"max_size={brief(max_size)} is not a number of bytes of at least 1."
        raise FileException(message)
    if size is not None and size > max_size:
        message = f"size={size} is over max_size={max_size}."
        raise FileException(message)


def check_attributes(attributes: ObjectAttributes) -> None:
    """Reject attributes that no store can hold; called before any I/O.

    Raises:
        FileException: the media type is not valid.
        MetadataException: metadata that are not text.
        ConnectorCapabilityException: an option that is not a JSON value, or has a line break, another
            control character or a lone surrogate.
    """
    check_media_type(attributes.media_type)
    for name, value in cast("Mapping[object, object]", attributes.metadata).items():
        if not _is_text(name) or not _is_text(value):
            message = f"Metadata {name!a} is not a text that UTF-8 can hold. Nothing was sent."
            raise MetadataException(message)
    for name, value in cast("Mapping[object, object]", attributes.extra).items():
        try:
            fits = isinstance(name, str) and _is_option(name) and _is_option(value)
        except RecursionError:
            fits = False
        if not fits:
            message = (
                f"connector_extra {name!a} is not an option that a store accepts: a value is text "
                "without line breaks and control characters, a number or a boolean. "
                "Nothing was sent."
            )
            raise ConnectorCapabilityException(message)


def _is_text(value: object) -> bool:
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return isinstance(value, str)


def _is_option(value: object) -> bool:
    if isinstance(value, str):
        return value.isprintable()  # excludes control characters and surrogates
    if isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value).items()
        return all(
            isinstance(name, str) and _is_option(name) and _is_option(v) for name, v in pairs
        )
    if isinstance(value, (list, tuple)):
        return all(map(_is_option, cast("Sequence[object]", value)))
    finite = isinstance(value, float) and value - value == 0
    return value is None or isinstance(value, int) or finite


def utc(moment: datetime) -> datetime:
    """Return a time with Python's own UTC; a time without a zone is treated as UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a namespace enforces, as measured or documented.

    Args:
        conditional_create: a PUT with `if_none_match` fails if the key has an object. A probe does
            not report it for a store that drops metadata, since written objects could not be
            recognised.
        conditional_delete: whether a deletion with `if_match` spares an object with another ETag:
            in a batch (and in a single request), only in a single request, or not at all.
        conditional_copy: a copy with `if_match` or `if_none_match` honours the condition on the target.
        versioned: every write makes a version with an id of its own (S3: versioning `Enabled`).
        keeps_directories: a batch of deletions leaves empty directories behind, which are listed
            as keys that end in `/` (JuiceFS).
        hierarchical: the store is a file system: an object under `a` and one under `a/b` exclude each
            other, and a segment of a key has at most 255 bytes.
        short_names: a segment of a key has at most 255 bytes, whether or not the store is
            hierarchical.
        suspended: the namespace had versions once (S3: versioning `Suspended`), so that a deletion
            by key alone leaves a delete marker.
        checksums: a PUT can have the SHA-256 of its body in a header, and the store compares it
            (S3).
    """

    conditional_create: bool = False
    conditional_delete: Literal["batch", "single", "none"] = "none"
    conditional_copy: bool = False
    versioned: bool = False
    keeps_directories: bool = False
    hierarchical: bool = False
    short_names: bool = False
    suspended: bool = False
    checksums: bool = False

    def __post_init__(self) -> None:
        """Refuse a value that is not a boolean, or not one of the allowed words.

        Raises:
            ConfigException: a value is not allowed.
        """
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            known = ("batch", "single", "none") if name == "conditional_delete" else (True, False)
            if not isinstance(value, (bool, str)) or value not in known:
                message = f"Capabilities: {name} must be one of {', '.join(map(str, known))}."
                raise ConfigException(message)


@dataclass(frozen=True, slots=True)
class Location:
    """Where bytes are stored: a key, and a version id if the store returned one."""

    key: str
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class CopySource:
    """The source of a copy.

    Args:
        namespace: it may differ from the target's.
        location: its key and version id.
        if_match: copy only if it has this ETag. A store that cannot check that copies anyway; the
            engine checks afterwards that the catalog's record is unchanged.
        size: in bytes, if it is known: stores copy large objects in parts.
    """

    namespace: str
    location: Location
    if_match: str | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectAttributes:
    """The attributes that are stored with the bytes.

    Args:
        media_type: for instance `text/plain`.
        metadata: any Unicode; the connector encodes it, and decodes it when it is read.
        sha256: hexadecimal, of the body; a connector may let the store verify it.
        extra: the user's `connector_extra`, in the store's own terms.
    """

    media_type: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    sha256: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class PutRequest:
    """A request to write an object, without the bytes.

    Args:
        namespace: bucket, container or directory.
        key: the key to write to.
        attributes: stored with the bytes; for `upload` they have no `sha256`, which is not known
            yet.
        size: of an upload, in bytes, if it is known.
        if_none_match: write only if the key has no object.
        on_upload: awaited with the id of a multipart upload before its first part is sent, so that
            it can be journaled (P13), and before each further request of the upload; an exception
            of it ends the upload (P23). A failed upload is left to `abort_upload`.
    """

    namespace: str
    key: str
    attributes: ObjectAttributes
    _: KW_ONLY
    size: int | None = None
    if_none_match: bool = False
    on_upload: UploadCallback | None = None

    @override
    def __str__(self) -> str:
        return f"{self.namespace}/{self.key}"


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """A request to copy an object inside a store.

    Args:
        namespace: of the target.
        key: the target.
        source: the object to copy.
        attributes: media type and metadata of the target in place of the source's, and options
            that take precedence over the source's; its `sha256` is that of the source.
        extra: the options of the source, for those that a copy does not keep by itself; not
            together with `attributes`.
        if_match: copy only if the object at the target has this ETag.
        if_none_match: copy only if the target has no object. Both are given only if
            `Capabilities.conditional_copy` is true.
        on_upload: like that of `PutRequest`, for copies in parts. A failed copy is aborted.
    """

    namespace: str
    key: str
    source: CopySource
    _: KW_ONLY
    attributes: ObjectAttributes | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    if_match: str | None = None
    if_none_match: bool = False
    on_upload: UploadCallback | None = None

    @override
    def __str__(self) -> str:
        source = f"{self.source.namespace}/{self.source.location.key}"
        return f"{source} to {self.namespace}/{self.key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """A store's description of an object.

    Args:
        location: its key and version id.
        etag: an opaque text that changes with the bytes; without quotes.
        size: in bytes.
        media_type: as stored.
        metadata: decoded, as it was given to `put`.
        headers: HTTP headers that are stored with it, such as Content-Encoding; see `headers_of`.
        modified_at: by the store's clock, if it reports it.
        retried: whether the answer to an earlier attempt of the request that returned this was
            lost, so that it may still take effect (protocol P20). An attempt that was certainly
            refused, as with 503 `SlowDown`, does not count.
    """

    location: Location
    etag: str
    size: int
    media_type: str = "application/octet-stream"
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    modified_at: datetime | None = None
    retried: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingUpload:
    """A multipart upload that was neither completed nor aborted.

    Args:
        key: of the object that it is to become.
        upload_id: the id for `abort_upload`.
        modified_at: when it began, by the store's clock, if it reports it.
    """

    key: str
    upload_id: str
    modified_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleRules:
    """What the lifecycle rules of a bucket do.

    Args:
        removing: names of the rules that delete or archive objects under the requested prefix.
        abort_uploads: whether a rule aborts unfinished multipart uploads in the whole bucket.
    """

    removing: Sequence[str] = ()
    abort_uploads: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadTerms:
    """The terms that the signature of an upload covers. Everything else is the uploader's choice.

    Args:
        media_type: the only media type that the upload may have; None for any.
        metadata: the metadata that the upload must have.
        size: in bytes; None for any.
        max_size: the largest size in bytes; only for forms. None for any.
        sha256: hexadecimal, of the bytes; None for any. Given only if `Capabilities.checksums` is
            true.
        if_none_match: upload only if there is no object. Given only if
            `Capabilities.conditional_create` is true.
    """

    media_type: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    size: int | None = None
    max_size: int | None = None
    sha256: str | None = None
    if_none_match: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PresignedRequest:
    """A request that anyone who has it can send for a limited time; `repr` does not show it.

    Args:
        url: the target; its signature covers the headers.
        headers: to send with it, exactly. `Content-Length` is not named: clients send it anyway.
        fields: of a form (`POST`); the field `file` with the bytes follows them.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    fields: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """One object to delete.

    Args:
        location: its key; with a version id, only that version is deleted, permanently.
        if_match: delete only if the object has this ETag. Given only if the store enforces it,
            according to `Capabilities`.
    """

    location: Location
    if_match: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletionReport:
    """The result of a batch of deletions.

    Args:
        errors: for each deletion, in order, None if the object is gone (or never existed),
            otherwise the error: a PreconditionFailedException if `if_match` did not hold.
        retried: whether the answer to an earlier attempt of a request was lost, so that it may
            still take effect (protocol P20).
    """

    errors: Sequence[BaseConnectorException | None]
    retried: bool = False
