"""Buckets in memory, with versions, conditions and multipart uploads, like S3."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus

MAX_KEY_BYTES = 1024


class S3Error(Exception):
    """An error response.

    Args:
        status: the HTTP status.
        code: the S3 error code.
    """

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class NoObjectError(S3Error):
    """A condition on an ETag was given, but there is no object."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of an object; a delete marker has no body."""

    version_id: str
    body: bytes | None
    etag: str = ""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    modified: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))


@dataclass(slots=True)
class Upload:
    """An unfinished multipart upload, with its parts by number."""

    key: str
    headers: Mapping[str, str]
    parts: dict[int, bytes] = field(default_factory=dict[int, bytes])


@dataclass(slots=True)
class Bucket:
    """Objects and uploads; the versions of each key, oldest first.

    Args:
        versioning: empty, `Enabled` or `Suspended`.
    """

    versioning: str = ""
    objects: dict[str, list[Version]] = field(default_factory=dict[str, "list[Version]"])
    uploads: dict[str, Upload] = field(default_factory=dict[str, Upload])
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def current(self, key: str) -> Version | None:
        """Return the version that a plain GET returns."""
        versions = self.objects.get(key)
        return versions[-1] if versions and versions[-1].body is not None else None

    def found(self, key: str, version_id: str | None) -> Version:
        """Return a version, or the current one.

        Raises:
            S3Error: there is no such version.
        """
        versions = self.objects.get(key, [])
        named = (v for v in versions if v.version_id == version_id)
        version = self.current(key) if version_id is None else next(named, None)
        if version is None or version.body is None:
            code = "NoSuchKey" if version_id is None else "NoSuchVersion"
            raise S3Error(HTTPStatus.NOT_FOUND, code)
        return version

    def check(self, key: str, headers: Mapping[str, str]) -> None:
        """Enforce `If-None-Match` and `If-Match` of a write, and the limit of keys.

        Raises:
            S3Error: the write is refused.
        """
        if len(key.encode()) > MAX_KEY_BYTES:
            raise S3Error(HTTPStatus.BAD_REQUEST, "KeyTooLongError")
        if headers.get("if-none-match") == "*" and self.current(key) is not None:
            raise S3Error(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")
        self._check_etag(key, headers.get("if-match"))

    def store(self, key: str, body: bytes, etag: str, headers: Mapping[str, str]) -> Version:
        """Write an object, as a new version or in place of the null version."""
        version = Version(self._version_id(), body, etag, headers)
        self._add(key, version)
        return version

    def delete(self, key: str, version_id: str | None, etag: str | None) -> None:
        """Delete a version permanently, or the object according to the versioning state.

        Raises:
            NoObjectError: there is no current version.
            S3Error: it has another ETag.
        """
        self._check_etag(key, etag)
        if version_id is None and self.versioning:
            self._add(key, Version(self._version_id(), None))
        else:
            self._remove(key, version_id or "null")

    def _check_etag(self, key: str, etag: str | None) -> None:
        current = self.current(key)
        if etag is not None and current is None:
            raise NoObjectError(HTTPStatus.NOT_FOUND, "NoSuchKey")
        if etag is not None and current is not None and etag.strip('"') != current.etag:
            raise S3Error(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")

    def _version_id(self) -> str:
        return f"v{next(self._numbers):08}" if self.versioning == "Enabled" else "null"

    def _add(self, key: str, version: Version) -> None:
        if version.version_id == "null":
            self._remove(key, "null")
        self.objects.setdefault(key, []).append(version)

    def _remove(self, key: str, version_id: str) -> None:
        versions = self.objects.get(key, [])
        versions[:] = [each for each in versions if each.version_id != version_id]
        if not versions:
            self.objects.pop(key, None)
