"""Object I/O on S3."""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from fennflow.buffers import Share
from fennflow.connectors import (
    Capabilities,
    Connector,
    CopyRequest,
    Deletion,
    DeletionReport,
    LifecycleRules,
    Location,
    ObjectAttributes,
    PendingUpload,
    PresignedRequest,
    PresignMethod,
    PutRequest,
    StoredObject,
    UploadTerms,
    check_etag,
    metadata,
)
from fennflow.exceptions import (
    ConfigException,
    ConnectorCapabilityException,
    NoSuchKeyException,
    PreconditionFailedException,
)
from fennflow.printable import brief, printable, without_credentials
from fennflow_s3 import options
from fennflow_s3.answers import is_recent, stored_object
from fennflow_s3.client import client_context, connections_of, translated
from fennflow_s3.copying import complete_copy, copy_parts, named, taken_along
from fennflow_s3.deleting import (
    delete_batch,
    delete_one,
    delete_with_directories,
    named_by,
    null_version,
)
from fennflow_s3.downloads import Downloads
from fennflow_s3.probe import probe
from fennflow_s3.ranges import Answer, Rest
from fennflow_s3.rules import rules_on
from fennflow_s3.upload import Upload, size_of_part, split

if TYPE_CHECKING:
    from datetime import datetime

    from types_aiobotocore_s3 import S3Client

    from fennflow_s3.config import S3ConnectorConfig

_logger = logging.getLogger("fennflow")

CHUNK = 1 << 18
"""The most bytes that a reader gets at a time."""
COPIED_AT_ONCE = 512 << 20
"""The size of a part of a copy in bytes; they do not pass through this process."""
MAX_EXPIRES_IN = 7 * 24 * 3600
"""The longest life of a SigV4 URL; S3 API reference, "Authenticating requests: using query parameters"."""


class S3Connector(Connector):
    """Object I/O on one S3 endpoint, through one pool of connections.

    Args:
        config: the config of the connector.
        reserved_prefix: the prefix under which the probe may write.
    """

    at_the_key_only = options.AT_THE_KEY_ONLY

    def __init__(self, config: S3ConnectorConfig, *, reserved_prefix: str) -> None:
        super().__init__(config.capabilities)
        self._config = config
        self._reserved_prefix = reserved_prefix
        self._stack = AsyncExitStack()
        self._opened: S3Client | None = None
        self._signer: S3Client
        self._downloads: Downloads
        # How much of a stream is held until it is clear that it needs a multipart upload.
        self.stream_threshold = min(config.multipart_threshold, config.multipart_part_size)

    @property
    def _client(self) -> S3Client:
        assert self._opened is not None, "the engine opens a connector before it uses it"  # noqa: S101
        return self._opened

    @property
    @override
    def store_id(self) -> str:
        return without_credentials(f"S3 {self._client.meta.endpoint_url}")

    @override
    async def open(self) -> None:
        client = await self._enter(self._config)
        self._opened = self._signer = client
        self._downloads = Downloads(connections_of(client))
        if self._config.presign_endpoint_url is not None:
            # It only signs, and opens no connection.
            url = self._config.presign_endpoint_url
            self._signer = await self._enter(self._config.model_copy(update={"endpoint_url": url}))

    async def _enter(self, config: S3ConnectorConfig) -> S3Client:
        """Open a client.

        Raises:
            ConfigException: botocore refuses the endpoint, which may come from the environment.
        """
        try:
            with translated("open a client for", "S3"):
                client = await self._stack.enter_async_context(client_context(config))
        except (AttributeError, TypeError, ValueError) as error:
            message = f"S3ConnectorConfig cannot create a client: {without_credentials(str(error))}"
            raise ConfigException(message) from None
        if "@" in client.meta.endpoint_url:
            message = (
                f"The endpoint {without_credentials(client.meta.endpoint_url)} of the environment "
                "must not contain credentials. Use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
            raise ConfigException(message)
        return client

    @override
    async def aclose(self) -> None:
        await self._stack.aclose()

    @override
    async def probe(self, namespace: str) -> Capabilities:
        with translated("probe the bucket", namespace):
            return await probe(self._client, namespace, self._reserved_prefix)

    @override
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        metadata.encode(attributes.metadata)
        wrong = [
            name for name, value in attributes.extra.items() if not options.is_option(name, value)
        ]
        if wrong:
            message = (
                f"connector_extra {', '.join(sorted(wrong))} cannot be used for "
                f"{namespace}/{key}. S3 accepts printable ASCII, times for {', '.join(options.TIMES)}, "
                f"and booleans for {', '.join(options.SWITCHES)}; it knows "
                f"{', '.join(sorted(options.FOR_PUT))}."
            )
            raise ConnectorCapabilityException(message)

    @override
    async def put(self, request: PutRequest, body: bytes) -> StoredObject:
        if len(body) >= self._config.multipart_threshold:
            return await self.upload(replace(request, size=len(body)), _once(body))
        attributes = request.attributes
        params: dict[str, Any] = {"Bucket": request.namespace, "Key": request.key}
        params |= options.described(attributes)
        if request.if_none_match:
            params["IfNoneMatch"] = "*"
        if attributes.sha256 is not None and (await self.capabilities(request.namespace)).checksums:
            digest = base64.b64encode(bytes.fromhex(attributes.sha256)).decode()
            params["ChecksumSHA256"] = digest
        with translated("put", str(request), writes=True) as attempts:
            answer = await self._client.put_object(**params, Body=body)
        stored = stored_object(request.key, answer, size=len(body), attributes=attributes)
        return replace(stored, retried=attempts.lost)

    @override
    async def upload(self, request: PutRequest, chunks: AsyncIterator[bytes]) -> StoredObject:
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if request.if_none_match else {}
        with translated("put", str(request)):
            upload = await Upload.create(
                self._client,
                request.namespace,
                request.key,
                options.described(request.attributes),
                checksums=(await self.capabilities(request.namespace)).checksums,
                on_upload=request.on_upload,
            )
            await upload.ask()
            part_size = partial(size_of_part, self._config.multipart_part_size, request.size)
            with Share(self.buffers) as share:
                await upload.send(split(chunks, part_size, share), share)
        # Before this no object can appear at the key.
        with translated("put", str(request), writes=True) as attempts:
            answer = await upload.complete(condition)
        stored = stored_object(request.key, answer, size=upload.size, attributes=request.attributes)
        return replace(stored, retried=attempts.lost)

    @override
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        condition: dict[str, Any] = {} if if_match is None else {"IfMatch": f'"{if_match}"'}
        with translated("get", f"{namespace}/{location.key}"):
            answer = await self._client.get_object(
                Bucket=namespace, **named_by(location), **condition
            )
            async with answer["Body"] as stream:
                stored = stored_object(location.key, answer, size=answer["ContentLength"])
                if if_match is not None:
                    check_etag(namespace, stored, if_match)  # some servers ignore the condition
                return stored, await stream.read()

    @override
    async def stream(
        self,
        namespace: str,
        location: Location,
        *,
        if_match: str,
        start: int = 0,
        end: int | None = None,
    ) -> AsyncGenerator[bytes]:
        request = partial(self._answer_to_get, namespace, location, if_match)
        async with self._downloads.open(f"{namespace}/{location.key}"):
            if end is not None:
                async with request(start, end) as answer:
                    async for chunk in answer.chunks:
                        yield chunk
                return
            rest = Rest(request, start, self.buffers, self._downloads)
            async with aclosing(rest.chunks()) as chunks:
                async for chunk in chunks:
                    yield chunk

    @asynccontextmanager
    async def _answer_to_get(
        self, namespace: str, location: Location, if_match: str, start: int, end: int | None
    ) -> AsyncGenerator[Answer]:
        """Request an object, or a range of it."""
        params: dict[str, Any] = {"IfMatch": f'"{if_match}"'}
        if start or end is not None:
            params["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        with translated("get", f"{namespace}/{location.key}"):
            answer = await self._client.get_object(Bucket=namespace, **named_by(location), **params)
            arriving: Any = answer["Body"].iter_chunks(CHUNK)  # a generator
            async with answer["Body"], aclosing(arriving):
                check_etag(namespace, stored_object(location.key, answer, size=0), if_match)
                # A server that ignores Range sends everything, without a Content-Range.
                is_range = bool(answer.get("ContentRange"))
                skip = 0 if is_range else start
                size = answer["ContentLength"] - skip if end is None else end - start
                async with aclosing(_cut_out(arriving, skip, size)) as chunks:
                    yield Answer(size, is_range, chunks)

    @override
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        try:
            with translated("head", f"{namespace}/{location.key}"):
                answer = await self._client.head_object(Bucket=namespace, **named_by(location))
        except NoSuchKeyException:
            return None
        return stored_object(location.key, answer, size=answer["ContentLength"])

    @override
    async def copy(self, request: CopyRequest) -> StoredObject:
        source = request.source
        copy_source: Any = {"Bucket": source.namespace, **named_by(source.location)}
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if request.if_none_match else {}
        if request.if_match is not None:
            condition["IfMatch"] = f'"{request.if_match}"'
        matching: dict[str, Any] = {}
        source_condition: dict[str, Any] = {}
        if source.if_match is not None:
            matching["IfMatch"] = source_condition["CopySourceIfMatch"] = f'"{source.if_match}"'
        if source.size is not None and source.size > self._config.multipart_copy_threshold:
            with translated("copy", str(request)):
                kept = await taken_along(
                    self._client, copy_source, matching, request.attributes, request.extra
                )
                parts = await copy_parts(
                    self._client,
                    request.namespace,
                    request.key,
                    kept,
                    copy_source={"CopySource": copy_source, **source_condition},
                    size=source.size,
                    part_size=min(COPIED_AT_ONCE, self._config.multipart_copy_threshold),
                    on_upload=request.on_upload,
                )
            with translated("copy", str(request), writes=True) as attempts:
                answer: Any = await complete_copy(parts, condition)
            stored = stored_object(request.key, answer, size=source.size)
            return replace(stored, retried=attempts.lost)
        with translated("copy", str(request)):
            names = await named(
                self._client, copy_source, matching, request.attributes, request.extra
            )
        with translated("copy", str(request), writes=True) as attempts:
            answer = await self._client.copy_object(
                Bucket=request.namespace,
                Key=request.key,
                CopySource=copy_source,
                **source_condition,
                **condition,
                **names,
            )
        stored = stored_object(request.key, {**answer, **answer["CopyObjectResult"]}, size=0)
        return replace(stored, retried=attempts.lost)

    @override
    async def delete(self, namespace: str, deletions: Sequence[Deletion]) -> DeletionReport:
        if len(deletions) == 1 and deletions[0].if_match is not None:
            return await delete_one(self._client, namespace, deletions[0])
        capabilities = await self.capabilities(namespace)
        if capabilities.suspended:
            # FennFlow's temporary objects have no older version to hide, and need no delete marker.
            deletions = [
                null_version(each)
                if each.location.key.startswith(f"{self._reserved_prefix}/")
                else each
                for each in deletions
            ]
        if capabilities.keeps_directories:
            return await delete_with_directories(self._client, namespace, deletions)
        return await delete_batch(self._client, namespace, deletions)

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=namespace, Prefix=prefix, StartAfter=start_after
        )
        with translated("list", f"{namespace}/{prefix}"):
            async for page in pages:
                for item in page.get("Contents", []):
                    yield stored_object(item.get("Key", ""), item, size=item.get("Size", 0))

    @override
    async def versions(self, namespace: str, key: str) -> Sequence[StoredObject]:
        return await self._versions(namespace, key, since=None)

    @override
    async def recent_versions(
        self, namespace: str, key: str, *, since: datetime
    ) -> Sequence[StoredObject]:
        return await self._versions(namespace, key, since=since)

    async def _versions(
        self, namespace: str, key: str, *, since: datetime | None
    ) -> Sequence[StoredObject]:
        pages = self._client.get_paginator("list_object_versions").paginate(
            Bucket=namespace, Prefix=key
        )
        found: list[StoredObject] = []
        with translated("list versions of", f"{namespace}/{key}"):
            async for page in pages:
                items = page.get("Versions", [])
                own = [
                    stored_object(key, item, size=item.get("Size", 0))
                    for item in items
                    if item.get("Key") == key
                ]
                recent = [each for each in own if since is None or is_recent(each, since)]
                found += recent
                # A version that was uploaded in parts has the time at which its upload began. So
                # only a page without any recent version shows that the rest is older.
                if (items and items[-1].get("Key", "") > key) or (own and not recent):
                    break
        return found

    @override
    async def uploads(self, namespace: str, prefix: str) -> AsyncIterator[PendingUpload]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=namespace, Prefix=prefix
        )
        with translated("list the uploads of", f"{namespace}/{prefix}"):
            async for page in pages:
                for item in page.get("Uploads", []):
                    yield PendingUpload(
                        key=item.get("Key", ""),
                        upload_id=item.get("UploadId", ""),
                        modified_at=item.get("Initiated"),
                    )

    @override
    async def rules_on(self, namespace: str, prefix: str) -> LifecycleRules:
        return await rules_on(self._client, namespace, prefix)

    @override
    async def presign(
        self,
        namespace: str,
        location: Location,
        *,
        method: PresignMethod | Literal["POST"],
        expires_in: float,
        terms: UploadTerms | None = None,
        response_headers: Mapping[str, str] | None = None,
    ) -> PresignedRequest:
        _check_seconds(expires_in)
        terms = terms or UploadTerms()
        place = {"Bucket": namespace, **named_by(location)}
        with translated("sign a URL of", f"{namespace}/{location.key}"):
            if method == "POST":
                fields, conditions = options.form(terms)
                form = await self._signer.generate_presigned_post(
                    **place, Fields=fields, Conditions=conditions, ExpiresIn=int(expires_in)
                )
                return PresignedRequest(url=form["url"], fields=form["fields"])
            params, headers = options.bound(terms)
            for name, value in (response_headers or {}).items():
                params[f"Response{name.replace('-', '')}"] = value
            url = await self._signer.generate_presigned_url(
                "get_object" if method == "GET" else "put_object",
                Params={**place, **params},
                ExpiresIn=int(expires_in),
            )
        return PresignedRequest(url=url, headers=headers)

    @override
    async def begin_upload(
        self, namespace: str, key: str, attributes: ObjectAttributes, *, expires_in: float
    ) -> str:
        _check_seconds(expires_in)
        with translated("begin an upload of", f"{namespace}/{key}"):
            answer = await self._client.create_multipart_upload(
                Bucket=namespace, Key=key, **options.described(attributes)
            )
        return answer["UploadId"]

    @override
    async def presign_part(
        self, namespace: str, key: str, upload_id: str, number: int, *, size: int, expires_in: float
    ) -> PresignedRequest:
        with translated("sign a URL of", f"{namespace}/{key}"):
            url = await self._signer.generate_presigned_url(
                "upload_part",
                Params={
                    "Bucket": namespace,
                    "Key": key,
                    "UploadId": upload_id,
                    "PartNumber": number,
                    "ContentLength": size,
                },
                ExpiresIn=int(expires_in),
            )
        return PresignedRequest(url=url)

    @override
    async def finish_upload(
        self, namespace: str, key: str, upload_id: str, sizes: Sequence[int]
    ) -> None:
        upload: Any = {"Bucket": namespace, "Key": key, "UploadId": upload_id}
        there: dict[int, Any] = {}
        with translated("list the parts of", f"{namespace}/{key}"):
            async for page in self._client.get_paginator("list_parts").paginate(**upload):
                there |= {part.get("PartNumber", 0): part for part in page.get("Parts", [])}
        wrong = [
            number
            for number, size in enumerate(sizes, 1)
            if number not in there or there[number].get("Size") != size
        ]
        if wrong or len(there) != len(sizes):
            message = (
                f"{len(wrong)} of {len(sizes)} parts of the upload of {namespace}/{key} are missing or "
                f"have another size; {len(there)} have arrived."
            )
            raise PreconditionFailedException(message)
        parts: list[Any] = [
            {"PartNumber": each, "ETag": there[each]["ETag"]} for each in sorted(there)
        ]
        with translated("put", f"{namespace}/{key}", writes=True):
            await self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

    @override
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        try:
            with translated("abort the upload of", f"{namespace}/{key}"):
                await self._client.abort_multipart_upload(
                    Bucket=namespace, Key=key, UploadId=upload_id
                )
        except NoSuchKeyException:
            return  # NoSuchUpload: completed, or aborted before
        except ConnectorCapabilityException:
            _logger.warning(
                "%s cannot abort uploads, so the parts of an unfinished one for %s stay there.",
                self.store_id,
                printable(f"{namespace}/{key}"),
            )


async def _cut_out(chunks: AsyncIterator[bytes], skip: int, left: int) -> AsyncGenerator[bytes]:
    """Skip a number of bytes, and iterate over a number of bytes after them."""
    async for chunk in chunks:
        wanted = chunk[skip : skip + left]
        skip, left = max(0, skip - len(chunk)), left - len(wanted)
        if wanted:
            yield wanted
        if left <= 0:
            break


async def _once(body: bytes) -> AsyncGenerator[bytes]:
    yield body


def _check_seconds(expires_in: float) -> None:
    """Refuse a time for which S3 does not sign.

    Raises:
        ConnectorCapabilityException: the time is out of range.
    """
    if not 1 <= expires_in <= MAX_EXPIRES_IN:
        message = f"S3 signs URLs for 1 to {MAX_EXPIRES_IN} seconds, not for {brief(expires_in)}."
        raise ConnectorCapabilityException(message)
