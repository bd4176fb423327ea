"""An S3 server in memory that enforces what other test servers ignore.

moto's server ignores the conditions of CopyObject and the ETags in DeleteObjects, and never answers
409; this one follows the S3 API reference. It supports the requests that a storage library needs,
but no access control: any credentials are accepted.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from email.utils import format_datetime
from http import HTTPStatus
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from fennflow.testing.calls import Answer, Call, refusal
from fennflow.testing.s3_objects import Bucket, NoObjectError, S3Error, Upload, Version

MAX_KEYS = 1000
MAX_METADATA_BYTES = 2048
XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
META = "x-amz-meta-"

# Headers that are stored and returned, in addition to user metadata.
STORED_HEADERS = (
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-type",
    "expires",
    "x-amz-server-side-encryption",
    "x-amz-storage-class",
    "x-amz-tagging",
    "x-amz-website-redirect-location",
)
# Headers that CopyObject takes from its own request, whatever the directive.
NOT_COPIED = ("x-amz-server-side-encryption", "x-amz-storage-class")
ARCHIVED = ("GLACIER", "DEEP_ARCHIVE")


DeletionOfNothing = Literal["NoSuchKey", "PreconditionFailed", "success"]
"""The answer to a deletion by ETag if there is no object."""


Lacking = Literal[
    "batch deletions", "checksums", "conditional reads", "metadata", "ranges", "upload clean-up"
]
"""What some servers lack: DeleteObjects; headers with checksums, which they refuse; `If-Match` of a
GET, which they ignore; metadata, which they drop; ranges, which they answer with everything, as HTTP
allows it; AbortMultipartUpload and ListMultipartUploads."""


class StrictS3:
    """The buckets; requests are handled one at a time.

    Args:
        delete_of_nothing: the answer to a DELETE with `If-Match` if there is no object: 404
            NoSuchKey like AWS, 412 PreconditionFailed like SeaweedFS, or success.
        batch_delete_of_nothing: the answer of DeleteObjects for a key with an ETag if there is no
            object: one of these codes under Errors, or success.
        without: the features that it lacks.
    """

    def __init__(
        self,
        *,
        delete_of_nothing: DeletionOfNothing = "NoSuchKey",
        batch_delete_of_nothing: DeletionOfNothing = "NoSuchKey",
        without: Collection[Lacking] = (),
    ) -> None:
        self._without = without
        self._of_nothing: DeletionOfNothing = delete_of_nothing
        self._batch_of_nothing: DeletionOfNothing = batch_delete_of_nothing
        self._buckets: dict[str, Bucket] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def answer(self, call: Call) -> Answer:
        """Handle a request."""
        with self._lock:
            try:
                call = self._as_known(call)
                _check_digests(call)
                return self._route(call)(call)
            except S3Error as error:
                answer = refusal(error)
                return answer._replace(body=b"") if call.method == "HEAD" else answer

    def _as_known(self, call: Call) -> Call:
        """Return the request as a server without some features understands it."""
        batch = call.method == "POST" and "delete" in call.query
        clean_up = (call.method == "GET" and "uploads" in call.query) or (
            call.method == "DELETE" and "uploadId" in call.query
        )
        if (batch and "batch deletions" in self._without) or (
            clean_up and "upload clean-up" in self._without
        ):
            raise S3Error(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented")
        checksums = any(name.startswith(("x-amz-checksum-", "x-amz-sdk-")) for name in call.headers)
        if checksums and "checksums" in self._without:
            raise S3Error(HTTPStatus.BAD_REQUEST, "InvalidArgument")
        if "metadata" in self._without:
            headers = {
                name: each for name, each in call.headers.items() if not name.startswith(META)
            }
            call = replace(call, headers=headers)
        if call.method == "GET" and "conditional reads" in self._without:
            headers = {name: each for name, each in call.headers.items() if name != "if-match"}
            return replace(call, headers=headers)
        return call

    def unfinished_uploads(self, bucket: str) -> list[str]:
        """Return the keys of multipart uploads that were neither completed nor aborted."""
        with self._lock:
            return [upload.key for upload in self._buckets[bucket].uploads.values()]

    def _route(self, call: Call) -> Callable[[Call], Answer]:
        query, method = call.query, call.method
        if not call.key:
            if method == "POST" and "delete" in query:
                return self._delete_objects
            if "lifecycle" in query:
                raise S3Error(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented")
            routes = {
                ("PUT", "versioning"): self._put_versioning,
                ("GET", "versioning"): self._get_versioning,
                ("GET", "versions"): self._list_versions,
                ("GET", "uploads"): self._list_uploads,
            }
            found = [
                route for (verb, name), route in routes.items() if verb == method and name in query
            ]
            return (found or [self._create_bucket if method == "PUT" else self._list])[0]
        if "uploadId" in query or "uploads" in query:
            return {
                "POST": self._create_upload if "uploads" in query else self._complete_upload,
                "GET": self._list_parts,
                "PUT": self._upload_part,
                "DELETE": self._abort_upload,
            }[method]
        if method == "PUT" and "x-amz-copy-source" in call.headers:
            return self._copy
        return {
            "PUT": self._put,
            "GET": self._get,
            "HEAD": self._get,
            "DELETE": self._delete,
        }[method]

    def _bucket(self, name: str) -> Bucket:
        if name not in self._buckets:
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchBucket")
        return self._buckets[name]

    def _create_bucket(self, call: Call) -> Answer:
        self._buckets.setdefault(call.bucket, Bucket())
        return Answer(headers={"Location": f"/{call.bucket}"})

    def _put_versioning(self, call: Call) -> Answer:
        root = ET.fromstring(call.body)  # noqa: S314 - a server for tests
        self._bucket(call.bucket).versioning = root.findtext("{*}Status") or ""
        return Answer()

    def _get_versioning(self, call: Call) -> Answer:
        status = self._bucket(call.bucket).versioning
        inner = f"<Status>{status}</Status>" if status else ""
        return _xml(f"<VersioningConfiguration {XMLNS}>{inner}</VersioningConfiguration>")

    def _put(self, call: Call) -> Answer:
        bucket = self._bucket(call.bucket)
        bucket.check(call.key, call.headers)
        etag = hashlib.md5(call.body, usedforsecurity=False).hexdigest()
        version = bucket.store(call.key, call.body, etag, _stored_headers(call.headers))
        return Answer(headers={"ETag": f'"{etag}"', **_version_header(bucket, version)})

    def _get(self, call: Call) -> Answer:
        bucket = self._bucket(call.bucket)
        version = bucket.found(call.key, call.query.get("versionId"))
        if call.method == "GET":
            _check_readable(version)
        wanted = call.headers.get("if-match")
        if wanted is not None and wanted.strip('"') != version.etag:
            raise S3Error(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")
        body = version.body or b""
        headers = {
            **version.headers,
            "ETag": f'"{version.etag}"',
            "Last-Modified": format_datetime(version.modified, usegmt=True),
            **_version_header(bucket, version),
        }
        headers.pop("x-amz-tagging", None)
        if call.method == "HEAD":
            return Answer(headers={**headers, "Content-Length": str(len(body))})
        if "range" in call.headers and "ranges" not in self._without:
            first, _, last = call.headers["range"].removeprefix("bytes=").partition("-")
            if int(first) >= len(body):
                raise S3Error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "InvalidRange")
            part = body[int(first) : int(last) + 1 if last else None]
            end = int(first) + len(part) - 1
            headers["Content-Range"] = f"bytes {first}-{end}/{len(body)}"
            return Answer(HTTPStatus.PARTIAL_CONTENT, headers, part)
        return Answer(headers=headers, body=body)

    def _copy(self, call: Call) -> Answer:
        bucket = self._bucket(call.bucket)
        name, key, source = self._source(call)
        bucket.check(call.key, call.headers)
        own = _stored_headers(call.headers)
        if call.headers.get("x-amz-metadata-directive") == "REPLACE":
            headers = own
        elif (name, key) == (call.bucket, call.key):
            raise S3Error(HTTPStatus.BAD_REQUEST, "InvalidRequest")
        else:
            headers = {k: v for k, v in source.headers.items() if k not in NOT_COPIED}
            headers |= {k: v for k, v in own.items() if k in NOT_COPIED}
        body = source.body or b""
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        version = bucket.store(call.key, body, etag, headers)
        answer = _xml(
            f'<CopyObjectResult {XMLNS}><ETag>"{etag}"</ETag>'
            f"<LastModified>{_time(version)}</LastModified></CopyObjectResult>"
        )
        return answer._replace(headers={**answer.headers, **_version_header(bucket, version)})

    def _source(self, call: Call) -> tuple[str, str, Version]:
        """Return bucket, key and version of the source of a copy."""
        path, _, query = call.headers["x-amz-copy-source"].partition("?")
        name, _, key = unquote(path).removeprefix("/").partition("/")
        source = self._bucket(name).found(key, dict(parse_qsl(query)).get("versionId"))
        _check_readable(source)
        wanted = call.headers.get("x-amz-copy-source-if-match")
        if wanted is not None and wanted.strip('"') != source.etag:
            raise S3Error(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")
        return name, key, source

    def _delete(self, call: Call) -> Answer:
        bucket = self._bucket(call.bucket)
        version_id, etag = call.query.get("versionId"), call.headers.get("if-match")
        _delete(bucket, call.key, version_id, etag, self._of_nothing)
        return Answer(HTTPStatus.NO_CONTENT)

    def _delete_objects(self, call: Call) -> Answer:
        bucket = self._bucket(call.bucket)
        if not any(n == "content-md5" or n.startswith("x-amz-checksum-") for n in call.headers):
            raise S3Error(HTTPStatus.BAD_REQUEST, "MissingContentMD5")
        asked = ET.fromstring(call.body)  # noqa: S314 - a server for tests
        objects, quiet = asked.findall("{*}Object"), asked.findtext("{*}Quiet") == "true"
        if len(objects) > MAX_KEYS:
            raise S3Error(HTTPStatus.BAD_REQUEST, "MalformedXML")
        deleted = errors = ""
        for each in objects:
            key, version_id = each.findtext("{*}Key") or "", each.findtext("{*}VersionId")
            try:
                etag = each.findtext("{*}ETag")
                _delete(bucket, key, version_id, etag, self._batch_of_nothing)
            except S3Error as error:
                errors += f"<Error><Key>{escape(key)}</Key><Code>{error.code}</Code></Error>"
            else:
                if not quiet:
                    deleted += f"<Deleted><Key>{escape(key)}</Key></Deleted>"
        return _xml(f"<DeleteResult {XMLNS}>{deleted}{errors}</DeleteResult>")

    def _list(self, call: Call) -> Answer:
        bucket, query = self._bucket(call.bucket), call.query
        prefix = query.get("prefix", "")
        after = max(query.get("start-after", ""), query.get("continuation-token", ""))
        limit = min(int(query.get("max-keys") or MAX_KEYS), MAX_KEYS)
        keys = sorted(
            key
            for key in bucket.objects
            if key.startswith(prefix) and key > after and bucket.current(key)
        )
        contents = "".join(
            f'<Contents><Key>{_named(key, query)}</Key><ETag>"{version.etag}"</ETag>'
            f"<Size>{len(version.body or b'')}</Size>"
            f"<LastModified>{_time(version)}</LastModified></Contents>"
            for key in keys[:limit]
            if (version := bucket.current(key)) is not None
        )
        more = len(keys) > limit
        token = ""
        if more:
            last = escape(keys[limit - 1])
            token = f"<NextContinuationToken>{last}</NextContinuationToken>"
        return _xml(
            f"<ListBucketResult {XMLNS}><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}</ListBucketResult>"
        )

    def _list_versions(self, call: Call) -> Answer:
        bucket, prefix = self._bucket(call.bucket), call.query.get("prefix", "")
        rows = "".join(
            f"<{kind}><Key>{_named(key, call.query)}</Key><VersionId>{version.version_id}</VersionId>"
            f"<LastModified>{_time(version)}</LastModified>"
            f'<ETag>"{version.etag}"</ETag><Size>{len(version.body or b"")}</Size></{kind}>'
            for key in sorted(bucket.objects)
            if key.startswith(prefix)
            for version in reversed(bucket.objects[key])
            for kind in ["DeleteMarker" if version.body is None else "Version"]
        )
        return _xml(
            f"<ListVersionsResult {XMLNS}><EncodingType>url</EncodingType>"
            f"<IsTruncated>false</IsTruncated>{rows}</ListVersionsResult>"
        )

    def _list_uploads(self, call: Call) -> Answer:
        rows = "".join(
            f"<Upload><Key>{_named(upload.key, call.query)}</Key><UploadId>{upload_id}</UploadId></Upload>"
            for upload_id, upload in self._bucket(call.bucket).uploads.items()
        )
        encoding = escape(call.query.get("encoding-type", ""))
        return _xml(
            f"<ListMultipartUploadsResult {XMLNS}><EncodingType>{encoding}</EncodingType>{rows}"
            "</ListMultipartUploadsResult>"
        )

    def _create_upload(self, call: Call) -> Answer:
        upload_id = f"u{next(self._numbers)}"
        upload = Upload(call.key, _stored_headers(call.headers))
        self._bucket(call.bucket).uploads[upload_id] = upload
        return _xml(
            f"<InitiateMultipartUploadResult {XMLNS}><UploadId>{upload_id}</UploadId>"
            "</InitiateMultipartUploadResult>"
        )

    def _upload(self, call: Call) -> Upload:
        upload = self._bucket(call.bucket).uploads.get(call.query["uploadId"])
        if upload is None or upload.key != call.key:
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchUpload")
        return upload

    def _upload_part(self, call: Call) -> Answer:
        upload, body = self._upload(call), call.body
        copied = "x-amz-copy-source" in call.headers
        if copied:
            body = self._source(call)[2].body or b""
            first, _, last = call.headers["x-amz-copy-source-range"][len("bytes=") :].partition("-")
            body = body[int(first) : int(last) + 1]
        upload.parts[int(call.query["partNumber"])] = body
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        if copied:
            return _xml(f'<CopyPartResult {XMLNS}><ETag>"{etag}"</ETag></CopyPartResult>')
        return Answer(headers={"ETag": f'"{etag}"'})

    def _list_parts(self, call: Call) -> Answer:
        rows = "".join(
            f"<Part><PartNumber>{number}</PartNumber><Size>{len(body)}</Size>"
            f'<ETag>"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"</ETag></Part>'
            for number, body in sorted(self._upload(call).parts.items())
        )
        return _xml(
            f"<ListPartsResult {XMLNS}><IsTruncated>false</IsTruncated>{rows}</ListPartsResult>"
        )

    def _complete_upload(self, call: Call) -> Answer:
        bucket, upload = self._bucket(call.bucket), self._upload(call)
        bucket.check(call.key, call.headers)
        bodies = [upload.parts[number] for number in sorted(upload.parts)]
        digests = b"".join(hashlib.md5(b, usedforsecurity=False).digest() for b in bodies)
        etag = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(bodies)}"
        version = bucket.store(call.key, b"".join(bodies), etag, upload.headers)
        del bucket.uploads[call.query["uploadId"]]
        answer = _xml(
            f'<CompleteMultipartUploadResult {XMLNS}><ETag>"{etag}"</ETag>'
            "</CompleteMultipartUploadResult>"
        )
        return answer._replace(headers={**answer.headers, **_version_header(bucket, version)})

    def _abort_upload(self, call: Call) -> Answer:
        self._upload(call)
        del self._bucket(call.bucket).uploads[call.query["uploadId"]]
        return Answer(HTTPStatus.NO_CONTENT)


def _check_readable(version: Version) -> None:
    if version.headers.get("x-amz-storage-class") in ARCHIVED:
        raise S3Error(HTTPStatus.FORBIDDEN, "InvalidObjectState")


def _delete(
    bucket: Bucket,
    key: str,
    version_id: str | None,
    etag: str | None,
    of_nothing: DeletionOfNothing,
) -> None:
    try:
        bucket.delete(key, version_id, etag)
    except NoObjectError:
        if of_nothing == "NoSuchKey":
            raise
        if of_nothing == "PreconditionFailed":
            raise S3Error(HTTPStatus.PRECONDITION_FAILED, of_nothing) from None


def _check_digests(call: Call) -> None:
    if "aws-chunked" in call.headers.get("content-encoding", ""):
        raise S3Error(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented")
    digests = {
        "content-md5": hashlib.md5(call.body, usedforsecurity=False),
        "x-amz-checksum-sha256": hashlib.sha256(call.body),
    }
    for name, digest in digests.items():
        sent = call.headers.get(name)
        if sent is not None and base64.b64decode(sent) != digest.digest():
            raise S3Error(HTTPStatus.BAD_REQUEST, "BadDigest")


def _stored_headers(headers: Mapping[str, str]) -> dict[str, str]:
    meta = {name: value for name, value in headers.items() if name.startswith(META)}
    if sum(len(name) - len(META) + len(value) for name, value in meta.items()) > MAX_METADATA_BYTES:
        raise S3Error(HTTPStatus.BAD_REQUEST, "MetadataTooLarge")
    return meta | {name: headers[name] for name in STORED_HEADERS if name in headers}


def _version_header(bucket: Bucket, version: Version) -> dict[str, str]:
    return {"x-amz-version-id": version.version_id} if bucket.versioning else {}


def _named(key: str, query: Mapping[str, str]) -> str:
    return quote(key, safe="/") if query.get("encoding-type") == "url" else escape(key)


def _time(version: Version) -> str:
    return version.modified.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _xml(text: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
    return Answer(headers={"Content-Type": "application/xml"}, body=body)
