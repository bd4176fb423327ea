"""Multipart uploads of bodies of any size, with a few parts in memory."""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from fennflow.buffers import Share
from fennflow.printable import printable
from fennflow_s3.body import Body

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client
    from types_aiobotocore_s3.type_defs import CompletedPartTypeDef

    from fennflow.connectors import UploadCallback


PARTS_IN_FLIGHT = 4
MAX_PARTS = 10_000
MAX_PART_SIZE = 5 << 30
GROWS_EVERY = 900
"""After so many parts of a body of unknown size their size doubles: 5 TiB need fewer than 10,000."""


def size_of_part(smallest: int, total: int | None, number: int) -> int:
    """Return the size of a part in bytes.

    S3 allows at most 10,000 parts, and objects of up to 5 TiB (user guide, "Amazon S3 multipart
    upload limits").

    Args:
        smallest: the configured size.
        total: the size of the body, if it is known.
        number: the number of the part, from 1.
    """
    if total is not None:
        return max(smallest, -(-total // MAX_PARTS))
    return min(smallest << ((number - 1) // GROWS_EVERY), MAX_PART_SIZE)


async def split(
    chunks: AsyncIterator[bytes], size_of: Callable[[int], int], share: Share
) -> AsyncGenerator[bytes]:
    """Cut a body into parts; an empty body has one empty part.

    Args:
        chunks: the chunks of the body.
        size_of: returns the size of a part, by its number.
        share: accounts for the bytes of each part from its first byte on; the consumer of the part
            returns them.
    """
    number, wanted = 1, size_of(1)
    pieces: list[memoryview] = []
    have = 0
    async for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            if not have:
                await share.take(wanted)
            pieces.append(rest[: wanted - have])
            have += len(pieces[-1])
            rest = rest[len(pieces[-1]) :]
            if have == wanted:
                part, pieces, have = b"".join(pieces), [], 0
                yield part
                number += 1
                wanted = size_of(number)
    if have or number == 1:
        share.give(wanted - have if have else 0)
        yield b"".join(pieces)


@dataclass(slots=True)
class Upload:
    """One multipart upload, which S3 keeps until it is completed or aborted.

    Args:
        client: an open one.
        target: bucket and key, as request parameters.
        upload_id: the id from S3.
        checksums: whether S3 should check the CRC32 of each part.
        on_upload: awaited with the id before each further request.
    """

    client: S3Client
    target: dict[str, Any]
    upload_id: str
    checksums: bool
    size: int = 0
    on_upload: UploadCallback | None = None
    _parts: dict[int, CompletedPartTypeDef] = field(default_factory=dict[int, Any])

    @classmethod
    async def create(
        cls,
        client: S3Client,
        namespace: str,
        key: str,
        described: dict[str, Any],
        *,
        checksums: bool = False,
        on_upload: UploadCallback | None = None,
    ) -> Upload:
        """Begin an upload.

        Args:
            client: an open one.
            namespace: the bucket.
            key: of the object.
            described: metadata and headers, as request parameters.
            checksums: whether its parts should have a CRC32, if the server supports it.
            on_upload: awaited with its id before each further request.
        """
        target: dict[str, Any] = {"Bucket": namespace, "Key": key}
        checked: dict[str, Any] = {"ChecksumAlgorithm": "CRC32"} if checksums else {}
        try:
            created: Any = await client.create_multipart_upload(**target, **described, **checked)
        except ClientError as error:
            status: object = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if not checked or status not in {HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_IMPLEMENTED}:
                raise
            # Some servers refuse an unknown header.
            created = await client.create_multipart_upload(**target, **described)
        # A server without support does not mention it in its answer, and gets no checksums.
        known = "ChecksumAlgorithm" in created
        return cls(client, target, created["UploadId"], known, on_upload=on_upload)

    async def ask(self) -> None:
        """Let the engine journal the id, or stop the upload if it may send nothing more."""
        if self.on_upload is not None:
            await self.on_upload(self.upload_id)

    async def send(self, parts: AsyncGenerator[bytes], share: Share) -> None:
        """Send all parts, a few at a time; after a failure, wait for the running requests.

        S3 may keep parts that it receives while the upload is aborted (API reference,
        AbortMultipartUpload).

        Args:
            parts: the parts of the body.
            share: accounts for their bytes, which are returned part by part.
        """
        failures: list[Exception] = []
        under_way: set[asyncio.Task[None]] = set()

        async def read() -> None:
            with _collected(failures):
                async with aclosing(parts):
                    number = 0
                    async for part in parts:
                        while len(under_way) == PARTS_IN_FLIGHT:
                            done, _ = await asyncio.wait(
                                under_way, return_when=asyncio.FIRST_COMPLETED
                            )
                            under_way.difference_update(done)
                        number += 1
                        self.size += len(part)
                        under_way.add(group.create_task(send(number, part)))
                        del part  # otherwise it would stay in memory while the next one is read

        async def send(number: int, part: bytes) -> None:
            try:
                with _collected(failures):
                    await self._send(number, part)
            finally:
                share.give(len(part))
            if failures:
                # The next part may take a long time to arrive, and is no longer needed.
                reading.cancel()

        async with asyncio.TaskGroup() as group:
            reading = group.create_task(read())
        _raise_first(failures)

    async def _send(self, number: int, part: bytes) -> None:
        checksum: dict[str, Any] = {}
        if self.checksums:
            crc = await asyncio.to_thread(zlib.crc32, part)
            checksum = {"ChecksumCRC32": base64.b64encode(crc.to_bytes(4, "big")).decode()}
        await self.ask()
        answer = await self.client.upload_part(
            **self.target, **checksum, UploadId=self.upload_id, PartNumber=number, Body=Body(part)
        )
        self._parts[number] = {"PartNumber": number, "ETag": answer["ETag"], **checksum}  # type: ignore[typeddict-item]

    async def complete(self, condition: dict[str, Any]) -> Any:
        """Create the object from the parts.

        Args:
            condition: the condition on the key, as request parameters.
        """
        await self.ask()
        parts = [self._parts[number] for number in sorted(self._parts)]
        return await self.client.complete_multipart_upload(
            **self.target, **condition, UploadId=self.upload_id, MultipartUpload={"Parts": parts}
        )

    async def copy(self, copy_source: dict[str, Any], size: int, part_size: int) -> None:
        """Copy all parts from another object, a few at a time; failures are as in `send`."""
        failures: list[Exception] = []
        starts = iter(range(0, size, part_size))

        async def worker() -> None:
            with _collected(failures):
                while not failures and (start := next(starts, None)) is not None:
                    await copy(start)

        async def copy(start: int) -> None:
            await self.ask()
            number = start // part_size + 1
            answer: Any = await self.client.upload_part_copy(
                **self.target,
                **copy_source,
                UploadId=self.upload_id,
                PartNumber=number,
                CopySourceRange=f"bytes={start}-{min(start + part_size, size) - 1}",
            )
            self._parts[number] = {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        async with asyncio.TaskGroup() as group:
            for _ in range(PARTS_IN_FLIGHT):
                group.create_task(worker())
        _raise_first(failures)


@contextmanager
def _collected(failures: list[Exception]) -> Generator[None]:
    """Collect a failure without cancelling the parallel calls."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - `_raise_first` raises it
        failures.append(error)


def _raise_first(failures: Sequence[Exception]) -> None:
    if failures:
        first, *others = failures
        for other in others:
            first.add_note(printable(f"Also failed: {type(other).__name__}: {other}"))
        raise first
