"""The attributes that a copy keeps, and copies of objects that are too large for one CopyObject.

CopyObject sends no `AnnotationDirective`, whose default is COPY. So `copy` and `move` keep the
annotations of a file, whether they copy directly to its key or through staged bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from botocore.exceptions import BotoCoreError, ClientError

from fennflow.connectors import headers_of
from fennflow_s3 import options
from fennflow_s3.upload import Upload, size_of_part

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

    from fennflow.connectors import ObjectAttributes, UploadCallback


async def named(
    client: S3Client,
    copy_source: Any,
    matching: Any,
    attributes: ObjectAttributes | None,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the parameters that a CopyObject has to send, since it does not keep them by itself."""
    if attributes is None:
        return {name: extra[name] for name in options.NOT_COPIED & set(extra)}
    # A copy that replaces the metadata replaces all headers, so the source's headers are read.
    head: Any = await client.head_object(**copy_source, **matching)
    kept = _headers(head)
    tagging = {"TaggingDirective": "REPLACE"} if "Tagging" in attributes.extra else {}
    return {"MetadataDirective": "REPLACE", **tagging, **kept, **options.described(attributes)}


async def taken_along(
    client: S3Client,
    copy_source: Any,
    matching: Any,
    attributes: ObjectAttributes | None,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all attributes of a multipart copy, which inherits none from its source."""
    head: Any = await client.head_object(**copy_source, **matching)
    found = _headers(head)
    if head.get("TagCount"):
        tags: Any = await client.get_object_tagging(**copy_source)
        found["Tagging"] = urlencode([(t["Key"], t["Value"]) for t in tags["TagSet"]])
    if attributes is not None:
        return found | options.described(attributes)
    own = {"ContentType": head.get("ContentType"), "Metadata": head.get("Metadata", {})}
    return found | own | dict(extra)


def _headers(head: Any) -> dict[str, Any]:
    """Return the headers that a copy keeps from its source, without invalid values."""
    found = {name: head[name] for name in options.HEADERS if head.get(name)}
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, str) or headers_of({name: value})
    }


async def copy_parts(
    client: S3Client,
    namespace: str,
    key: str,
    described: dict[str, Any],
    *,
    copy_source: dict[str, Any],
    size: int,
    part_size: int,
    on_upload: UploadCallback | None,
) -> Upload:
    """Copy the parts of an object that is too large for one CopyObject.

    Args:
        client: an open one.
        namespace: of the target.
        key: the target.
        described: metadata and headers, as request parameters.
        copy_source: the source and its condition, as parameters.
        size: of the source, in bytes.
        part_size: of most parts, in bytes.
        on_upload: awaited with the id of the upload before each of its requests.
    """
    upload = await Upload.create(client, namespace, key, described, on_upload=on_upload)
    async with _aborted(upload):
        await upload.ask()
        await upload.copy(copy_source, size, size_of_part(part_size, size, 1))
    return upload


async def complete_copy(upload: Upload, condition: dict[str, Any]) -> Any:
    """Create the target from the copied parts.

    Args:
        upload: the result of `copy_parts`.
        condition: the condition on the target, as request parameters.
    """
    async with _aborted(upload):
        return await upload.complete(condition)


@asynccontextmanager
async def _aborted(upload: Upload) -> AsyncGenerator[None]:
    """Abort the upload if the block fails."""
    try:
        yield
    except Exception:
        # If this is cut off or fails, too, the upload is in the journal.
        with suppress(ClientError, BotoCoreError, OSError):
            await upload.client.abort_multipart_upload(**upload.target, UploadId=upload.upload_id)
        raise
