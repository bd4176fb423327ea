"""Measures what a bucket enforces and keeps: `fennflow doctor --store URL`.

The probe of an engine tries only what the protocol depends on. This module tries everything in which
stores differ, and takes some hundred requests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import md5
from typing import Literal

import uuid_utils

from fennflow.connectors import (
    Connector,
    CopyRequest,
    CopySource,
    Deletion,
    Location,
    ObjectAttributes,
    PutRequest,
    StoredObject,
    check_attributes,
)
from fennflow.engine.concurrency import run_all
from fennflow.exceptions import (
    ConnectorUnavailableException,
    FennFlowException,
    PreconditionFailedException,
)

__all__ = ["Check", "measure"]

Result = Literal["yes", "no", "unclear"]

AT_ONCE = 10
MUCH_SKEW = 60.0
TEXT = ObjectAttributes(media_type="text/plain")
OTHER_ETAG = "0" * 32
UNUSUAL = "a +%&;<>#?='~é😀.txt"
METADATA = {"under_score": "1", "wörter": "äöü €", "long": "x" * 500}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check.

    Args:
        name: what the store should do.
        result: `unclear` if the store did not answer properly.
        detail: what it answered instead.
    """

    name: str
    result: Result
    detail: str = ""


async def measure(connector: Connector, namespace: str, prefix: str) -> Sequence[Check]:
    """Test what a bucket enforces and keeps, on separate keys, and remove them.

    Args:
        connector: an open one.
        namespace: the bucket.
        prefix: below which it may write.

    Raises:
        BaseConnectorException: the bucket cannot be reached, or nothing can be written.
    """
    measurement = _Measurement(connector, namespace, f"{prefix}/probe/{uuid_utils.uuid7()}")
    try:
        await measurement.put("first", b"1")
        return [await _tried(name, check) for name, check in measurement.checks()]
    finally:
        await measurement.clean_up()


async def _tried(name: str, check: Callable[[], Awaitable[bool]]) -> Check:
    try:
        return Check(name=name, result="yes" if await check() else "no")
    except ConnectorUnavailableException as error:
        return Check(name=name, result="unclear", detail=str(error))
    except FennFlowException as error:
        return Check(name=name, result="no", detail=str(error))


async def _refused(request: Awaitable[object]) -> bool:
    """Return whether a request is refused because its condition does not hold."""
    try:
        await request
    except PreconditionFailedException:
        return True
    return False


class _StopError(Exception):
    """Leaves an upload unfinished."""


class _Measurement:
    """The checks, each on separate keys below one directory."""

    def __init__(self, connector: Connector, namespace: str, directory: str) -> None:
        self._connector = connector
        self._namespace = namespace
        self._directory = directory

    def checks(self) -> Sequence[tuple[str, Callable[[], Awaitable[bool]]]]:
        return (
            ("refuses to create an object that exists", self._creates),
            ("lets one of ten simultaneous creates succeed", self._one_create_of_ten),
            ("refuses an upload in parts to a key that exists", self._creates_in_parts),
            ("refuses a copy to a key that exists", self._copies_to_free_key),
            ("refuses a copy if the target has another ETag", self._copies_over_etag),
            ("refuses a copy if the source has another ETag", self._copies_etag),
            ("refuses to delete another ETag", self._deletes_etag),
            ("refuses to delete other ETags in a batch", self._deletes_etags),
            ("deletes several objects in a batch", self._deletes_batch),
            ("accepts the deletion of a missing object", self._deletes_nothing),
            ("leaves no directory after the last deletion", self._leaves_no_directory),
            ("reads and lists new objects immediately", self._lists_new),
            ("reads overwritten objects immediately", self._reads_new),
            ("stops listing deleted objects immediately", self._lists_no_deleted),
            ("lists in the order of the bytes of keys", self._lists_in_order),
            ("lists the keys after a given key", self._lists_after),
            ("keeps metadata with any characters", self._keeps_metadata),
            ("keeps media types", self._keeps_media_type),
            ("keeps headers such as Cache-Control", self._keeps_headers),
            ("the ETag is the MD5 of the bytes", self._etag_is_md5),
            ("refuses bytes with another SHA-256", self._checks_checksum),
            ("reads ranges", self._reads_range),
            ("keeps versions", self._keeps_versions),
            ("lists unfinished uploads", self._lists_uploads),
            ("aborts unfinished uploads", self._aborts_uploads),
            ("signs URLs", self._signs),
            ("accepts empty objects", self._takes_nothing),
            ("accepts keys of 1,024 bytes", self._takes_long_key),
            ("accepts names of 300 bytes", self._takes_long_name),
            ("accepts names with spaces, + % & < # ? and emoji", self._takes_unusual),
            ("accepts an object below another one (a and a/b)", self._takes_below),
            ("has a clock within a minute of this machine's", self._clock),
        )

    def _key(self, name: str) -> str:
        return f"{self._directory}/{name}"

    async def put(
        self,
        name: str,
        body: bytes,
        attributes: ObjectAttributes = TEXT,
        *,
        if_none_match: bool = False,
    ) -> StoredObject:
        """Write an object below the directory."""
        key = self._key(name)
        check_attributes(attributes)
        self._connector.validate(self._namespace, key, attributes)
        return await self._connector.put(
            PutRequest(self._namespace, key, attributes, if_none_match=if_none_match), body
        )

    async def _get(self, name: str) -> bytes:
        return (await self._connector.get(self._namespace, Location(self._key(name))))[1]

    async def _names(self, directory: str, start_after: str = "") -> list[str]:
        first = self._key(f"{directory}/")
        after = self._key(start_after) if start_after else ""
        listed = self._connector.list(self._namespace, first, start_after=after)
        return [each.location.key.removeprefix(first) async for each in listed]

    async def _delete(self, *names: str, if_match: str | None = None) -> Sequence[object]:
        deletions = [Deletion(location=Location(self._key(n)), if_match=if_match) for n in names]
        return (await self._connector.delete(self._namespace, deletions)).errors

    async def _creates(self) -> bool:
        await self.put("create", b"1")
        return await _refused(self.put("create", b"2", if_none_match=True))

    async def _one_create_of_ten(self) -> bool:
        bodies = [str(number).encode() for number in range(AT_ONCE)]
        succeeded: list[bytes] = []

        async def create(body: bytes) -> None:
            if not await _refused(self.put("race", body, if_none_match=True)):
                succeeded.append(body)

        await run_all(AT_ONCE, create, bodies)
        return succeeded == [await self._get("race")]

    async def _creates_in_parts(self) -> bool:
        await self.put("parts", b"1")
        key = self._key("parts")
        upload = self._connector.upload(
            PutRequest(self._namespace, key, TEXT, if_none_match=True), _chunks(b"2")
        )
        return await _refused(upload)

    async def _copy(
        self,
        name: str,
        *,
        source_etag: str | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> StoredObject:
        source = CopySource(self._namespace, Location(self._key("first")), if_match=source_etag)
        return await self._connector.copy(
            CopyRequest(
                self._namespace,
                self._key(name),
                source,
                if_match=if_match,
                if_none_match=if_none_match,
            )
        )

    async def _copies_to_free_key(self) -> bool:
        await self.put("copy", b"2")
        return await _refused(self._copy("copy", if_none_match=True))

    async def _copies_over_etag(self) -> bool:
        await self.put("copy", b"2")
        return await _refused(self._copy("copy", if_match=OTHER_ETAG))

    async def _copies_etag(self) -> bool:
        return await _refused(self._copy("copied", source_etag=OTHER_ETAG))

    async def _deletes_etag(self) -> bool:
        await self.put("delete", b"1")
        [error] = await self._delete("delete", if_match=OTHER_ETAG)
        return isinstance(error, PreconditionFailedException)

    async def _deletes_etags(self) -> bool:
        names = ["batch/1", "batch/2"]
        for name in names:
            await self.put(name, b"1")
        errors = await self._delete(*names, if_match=OTHER_ETAG)
        return all(isinstance(error, PreconditionFailedException) for error in errors)

    async def _deletes_batch(self) -> bool:
        names = [f"several/{number}" for number in range(5)]
        for name in names:
            await self.put(name, b"1")
        errors = await self._delete(*names)
        return not any(errors) and await self._objects("several") == []

    async def _objects(self, directory: str) -> list[str]:
        return [name for name in await self._names(directory) if name]

    async def _deletes_nothing(self) -> bool:
        return not any(await self._delete("nothing"))

    async def _leaves_no_directory(self) -> bool:
        await self.put("alone/1", b"1")
        await self._delete("alone/1")
        return await self._names("alone") == []

    async def _lists_new(self) -> bool:
        for number in range(5):
            await self.put(f"new/{number}", b"1")
            if f"{number}" not in await self._names("new") or await self._get("new/0") != b"1":
                return False
        return True

    async def _reads_new(self) -> bool:
        for body in (b"1", b"2", b"3"):
            await self.put("overwritten", body)
            if await self._get("overwritten") != body:
                return False
        return True

    async def _lists_no_deleted(self) -> bool:
        for number in range(5):
            await self.put(f"old/{number}", b"1")
            await self._delete(f"old/{number}")
            if await self._objects("old"):
                return False
        return True

    async def _lists_in_order(self) -> bool:
        names = ["a-", "a/1", "a0", "aé", "a\uff5e", "a😀"]
        for name in names:
            await self.put(f"order/{name}", b"1")
        found = await self._names("order")
        return found == sorted(names, key=str.encode)

    async def _lists_after(self) -> bool:
        for name in ("1", "2", "3"):
            await self.put(f"after/{name}", b"1")
        return await self._names("after", "after/1") == ["2", "3"]

    async def _head(self, name: str) -> StoredObject:
        found = await self._connector.head(self._namespace, Location(self._key(name)))
        assert found is not None, "it was written just now"  # noqa: S101
        return found

    async def _keeps_metadata(self) -> bool:
        await self.put("meta", b"1", ObjectAttributes(media_type="text/plain", metadata=METADATA))
        return dict((await self._head("meta")).metadata) == METADATA

    async def _keeps_media_type(self) -> bool:
        await self.put("type", b"1", ObjectAttributes(media_type="application/x-odd"))
        return (await self._head("type")).media_type == "application/x-odd"

    async def _keeps_headers(self) -> bool:
        for name in ("CacheControl", "Cache-Control"):  # of S3, of obstore
            extra = {name: "max-age=5"}
            with suppress(FennFlowException):
                await self.put("headers", b"1", ObjectAttributes(media_type="a/b", extra=extra))
                return (await self._head("headers")).headers.get("Cache-Control") == "max-age=5"
        return False

    async def _etag_is_md5(self) -> bool:
        digest = md5(b"1", usedforsecurity=False).hexdigest()
        return (await self.put("etag", b"1")).etag == digest

    async def _checks_checksum(self) -> bool:
        return (await self._connector.capabilities(self._namespace)).checksums

    async def _reads_range(self) -> bool:
        stored = await self.put("range", b"0123456789")
        chunks = self._connector.stream(
            self._namespace, stored.location, if_match=stored.etag, start=2, end=5
        )
        return b"".join([chunk async for chunk in chunks]) == b"234"

    async def _keeps_versions(self) -> bool:
        before = await self.put("version", b"1")
        await self.put("version", b"2")
        if before.location.version_id is None:
            return False
        return (await self._connector.get(self._namespace, before.location))[1] == b"1"

    async def _begin_upload(self, name: str) -> str:
        """Leave an upload unfinished; return its id, or an empty text if that is not possible."""
        begun: list[str] = []

        async def stop(upload_id: str) -> None:
            begun.append(upload_id)
            raise _StopError

        with suppress(_StopError):
            await self._connector.upload(
                PutRequest(self._namespace, self._key(name), TEXT, on_upload=stop), _chunks(b"1")
            )
        return "".join(begun)

    async def _pending(self) -> list[str]:
        found = self._connector.uploads(self._namespace, f"{self._directory}/")
        return [each.upload_id async for each in found]

    async def _lists_uploads(self) -> bool:
        upload_id = await self._begin_upload("listed")
        return bool(upload_id) and upload_id in await self._pending()

    async def _aborts_uploads(self) -> bool:
        upload_id = await self._begin_upload("aborted")
        if not upload_id:
            return False
        await self._connector.abort_upload(self._namespace, self._key("aborted"), upload_id)
        return upload_id not in await self._pending()

    async def _signs(self) -> bool:
        place = Location(self._key("first"))
        return bool(
            await self._connector.presign(self._namespace, place, method="GET", expires_in=60)
        )

    async def _takes(self, name: str, body: bytes = b"1") -> bool:
        await self.put(name, body)
        directory, _, last = name.rpartition("/")
        return await self._get(name) == body and last in await self._names(directory)

    async def _takes_nothing(self) -> bool:
        return await self._takes("empty/object", b"")

    async def _takes_long_key(self) -> bool:
        room = 1024 - len(self._key("long/").encode())
        return await self._takes("long/" + "/".join(["x" * 99] * 20)[:room].rstrip("/"))

    async def _takes_long_name(self) -> bool:
        return await self._takes(f"name/{'x' * 300}")

    async def _takes_unusual(self) -> bool:
        return await self._takes(f"unusual/{UNUSUAL}")

    async def _takes_below(self) -> bool:
        await self.put("both/a", b"1")
        await self.put("both/a/b", b"2")
        return [await self._get("both/a"), await self._get("both/a/b")] == [b"1", b"2"]

    async def _clock(self) -> bool:
        await self.put("clock", b"1")
        at = (await self._head("clock")).modified_at
        return at is not None and abs((datetime.now(UTC) - at).total_seconds()) < MUCH_SKEW

    async def clean_up(self) -> None:
        """Remove all objects that were written, one by one, including their versions."""
        connector, namespace = self._connector, self._namespace
        versioned = (await connector.capabilities(namespace)).versioned
        keys = {
            each.location.key async for each in connector.list(namespace, f"{self._directory}/")
        }
        for key in sorted(keys):
            places = [Location(key)]
            if versioned:
                places = [each.location for each in await connector.versions(namespace, key)]
            for place in places:
                await connector.delete(namespace, [Deletion(location=place)])
        with suppress(FennFlowException):
            async for pending in connector.uploads(namespace, f"{self._directory}/"):
                await connector.abort_upload(namespace, pending.key, pending.upload_id)


async def _chunks(body: bytes) -> AsyncGenerator[bytes]:
    yield body
