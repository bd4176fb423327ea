"""Probes what a bucket enforces: some servers answer 200 to conditions that they ignore.

It implements P15 of the protocol, on one key under the reserved prefix.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Awaitable
from contextlib import suppress
from hashlib import sha256
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import uuid_utils
from botocore.exceptions import ClientError, ConnectionClosedError

from fennflow.connectors import Capabilities
from fennflow_s3.client import sent_once

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

UNKNOWN = frozenset(
    {HTTPStatus.BAD_REQUEST, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED}
)
"""The answers of servers to a request, a header or a condition that they do not support."""
STAMP = {"fennflow_seq": "1"}
"""Metadata like those by which FennFlow recognises its objects (P11)."""
OTHER_ETAG = '"00000000000000000000000000000000"'
"""An ETag that no object has."""


async def probe(client: S3Client, bucket: str, reserved_prefix: str) -> Capabilities:
    """Find out what a bucket enforces.

    AWS's own endpoints are not probed, but used as documented: conditional writes, deletes (also in
    DeleteObjects) and copies in general purpose buckets (S3 user guide, "Conditional requests").
    """
    versioning = await _versioning(client, bucket)
    if is_aws(client.meta.endpoint_url):
        return Capabilities(
            conditional_create=True,
            conditional_delete="batch",
            conditional_copy=True,
            versioned=versioning == "Enabled",
            suspended=versioning == "Suspended",
            checksums=True,
        )
    # In a separate directory, so that objects of concurrent probes are not in it.
    key = f"{reserved_prefix}/probe/{uuid_utils.uuid7()}/object"
    try:
        checksums = await _put_checked(client, bucket, key)
        # Without its stamp, an object that FennFlow wrote at a user's key could not be recognised.
        stamps = await _keeps_stamps(client, bucket, key)
        hierarchical = await _refuses_key(client, bucket, _below(key))
        short_names = await _refuses_key(client, bucket, _long(key))
        conditional_create = stamps and await _refused(
            client.put_object(Bucket=bucket, Key=key, Body=b"2", IfNoneMatch="*")
        )
        conditional_copy = stamps and await _copy_conditions(client, bucket, key)
        conditional_delete: Literal["batch", "single", "none"] = "batch"
        keeps_directories = False
        if not await _batch_conditions(client, bucket, key):
            # The batch has deleted the object.
            keeps_directories = await _keeps_directory(client, bucket, key)
            await client.put_object(Bucket=bucket, Key=key, Body=b"1")
            spared = await _refused(
                client.delete_object(Bucket=bucket, Key=key, IfMatch=OTHER_ETAG)
            )
            conditional_delete = "single" if spared else "none"
    finally:
        await _clean_up(client, bucket, key, versions=versioning is not None)
    return Capabilities(
        conditional_create=conditional_create,
        conditional_delete=conditional_delete,
        conditional_copy=conditional_copy,
        versioned=versioning == "Enabled",
        keeps_directories=keeps_directories,
        hierarchical=hierarchical,
        short_names=short_names,
        suspended=versioning == "Suspended",
        checksums=checksums,
    )


def is_aws(endpoint_url: str) -> bool:
    """Return whether an endpoint is Amazon's own."""
    host = urlsplit(endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


async def _versioning(client: S3Client, bucket: str) -> str | None:
    """Return `Enabled`, `Suspended`, or None if the bucket never had versions."""
    try:
        answer = await client.get_bucket_versioning(Bucket=bucket)
    except ClientError as error:
        if _status(error) in UNKNOWN:
            return None  # servers without versioning
        raise
    return answer.get("Status")


async def _keeps_stamps(client: S3Client, bucket: str, key: str) -> bool:
    there = await client.head_object(Bucket=bucket, Key=key)
    return STAMP.items() <= there.get("Metadata", {}).items()


async def _copy_conditions(client: S3Client, bucket: str, key: str) -> bool:
    source: Any = {"Bucket": bucket, "Key": key}
    onto_itself: Any = {"CopySource": source, "MetadataDirective": "REPLACE"}
    return await _refused(
        client.copy_object(Bucket=bucket, Key=key, IfNoneMatch="*", **onto_itself)
    ) and await _refused(
        client.copy_object(Bucket=bucket, Key=key, IfMatch=OTHER_ETAG, **onto_itself)
    )


async def _refuses_key(client: S3Client, bucket: str, key: str) -> bool:
    """Return whether nothing can be written below a key, as on a file system."""
    for last in (False, True):
        try:
            with sent_once():
                await client.put_object(Bucket=bucket, Key=key, Body=b"1")
        except (ClientError, ConnectionClosedError) as error:
            # Gateways answer 400, 409 or 500, or close the connection, and would do so each time.
            if isinstance(error, ClientError) and _status(error) in {
                HTTPStatus.TOO_MANY_REQUESTS,
                HTTPStatus.SERVICE_UNAVAILABLE,
            }:
                raise
            if last:
                return True
        else:
            return False
    return False


async def _put_checked(client: S3Client, bucket: str, key: str) -> bool:
    """Write the object; return whether a PUT may have a SHA-256, and a wrong one is refused."""
    right, wrong = (b64encode(sha256(body).digest()).decode() for body in (b"1", b"2"))
    what: Any = {"Bucket": bucket, "Key": key, "Body": b"1", "Metadata": STAMP}
    try:
        await client.put_object(**what, ChecksumSHA256=right)
    except ClientError as error:
        if _status(error) not in UNKNOWN:
            raise
        await client.put_object(**what)  # older servers refuse an unknown header
        return False
    try:
        await client.put_object(**what, ChecksumSHA256=wrong)
    except ClientError as error:
        if _status(error) == HTTPStatus.BAD_REQUEST:
            return True
        raise
    return False


def _below(key: str) -> str:
    return f"{key}/below"


def _long(key: str) -> str:
    """Return a key with a name that is too long for a file system."""
    return f"{key.rpartition('/')[0]}/{'x' * 256}"


async def _batch_conditions(client: S3Client, bucket: str, key: str) -> bool:
    objects: Any = [{"Key": key, "ETag": OTHER_ETAG}, {"Key": _below(key)}, {"Key": _long(key)}]
    try:
        answer = await client.delete_objects(Bucket=bucket, Delete={"Objects": objects})
    except ClientError as error:
        if _status(error) in UNKNOWN:
            return False  # the server does not support the request or its condition
        raise
    codes = {error.get("Code") for error in answer.get("Errors", [])}
    return "PreconditionFailed" in codes


async def _keeps_directory(client: S3Client, bucket: str, key: str) -> bool:
    # JuiceFS lists an empty directory only under its name without the slash.
    parent = key.rpartition("/")[0]
    there = await client.list_objects_v2(Bucket=bucket, Prefix=parent)
    return f"{parent}/" in {item.get("Key") for item in there.get("Contents", [])}


async def _refused(request: Awaitable[object]) -> bool:
    """Return whether a request was refused because its condition did not hold."""
    try:
        await request
    except ClientError as error:
        if _status(error) == HTTPStatus.PRECONDITION_FAILED:
            return True
        if _status(error) in {*UNKNOWN, HTTPStatus.CONFLICT}:
            return False  # the server does not support the condition on this request
        raise
    return False


def _status(error: ClientError) -> int:
    metadata: Any = error.response.get("ResponseMetadata", {})
    return int(metadata.get("HTTPStatusCode", 0))


async def _clean_up(client: S3Client, bucket: str, key: str, *, versions: bool) -> None:
    if not versions:
        # The batch may have been refused as a whole.
        for each in (_below(key), _long(key), key):
            with suppress(ClientError):
                await client.delete_object(Bucket=bucket, Key=each)
        return
    directory = key.rpartition("/")[0]
    listed = await client.list_object_versions(Bucket=bucket, Prefix=f"{directory}/")
    for version in [*listed.get("Versions", []), *listed.get("DeleteMarkers", [])]:
        await client.delete_object(
            Bucket=bucket,
            Key=version.get("Key", key),
            VersionId=version.get("VersionId", "null"),
        )
