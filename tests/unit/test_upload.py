"""Multipart uploads: how bodies are cut, and servers without checksums."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from fennflow.buffers import Buffers, Share
from fennflow_s3.body import Body
from fennflow_s3.upload import MAX_PART_SIZE, MAX_PARTS, Upload, size_of_part, split

MiB = 1 << 20
SHARE = Share(Buffers())
TiB = 1 << 40


@pytest.mark.parametrize("smallest", [5 * MiB, 8 * MiB, 512 * MiB])
def test_five_tebibytes_fit_into_ten_thousand_parts(smallest: int) -> None:
    known = size_of_part(smallest, 5 * TiB, 1)
    assert known * MAX_PARTS >= 5 * TiB
    sizes = [size_of_part(smallest, None, number) for number in range(1, MAX_PARTS + 1)]
    assert sum(sizes) >= 5 * TiB
    assert max(*sizes, known) <= MAX_PART_SIZE
    assert sizes[0] == smallest


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 21, 22])
async def test_a_body_is_cut_into_parts_whatever_its_chunks(length: int, chunk: int) -> None:
    body = bytes(range(length))

    async def chunks() -> AsyncGenerator[bytes]:
        for start in range(0, length, chunk):
            yield body[start : start + chunk]

    share = Share(Buffers())
    parts: list[bytes] = []
    async for part in split(chunks(), lambda number: 7 if number < 3 else 10, share):
        assert len(part) <= share.held <= len(part) + 10
        parts.append(part)
        share.give(len(part))
    assert share.held == 0
    assert b"".join(parts) == body
    assert [len(part) for part in parts[:-1]] == [7, 7, 10][: len(parts) - 1]
    assert all(parts) or parts == [b""]


class Client:
    """Refuses unknown parameters, like some servers."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.asked: list[bool] = []

    async def create_multipart_upload(self, **params: Any) -> dict[str, str]:
        self.asked.append("ChecksumAlgorithm" in params)
        if self.asked[-1]:
            answer: Any = {"ResponseMetadata": {"HTTPStatusCode": self.status}}
            raise ClientError(answer, "CreateMultipartUpload")
        return {"UploadId": "u"}


@pytest.mark.parametrize("status", [400, 501])
async def test_a_server_that_refuses_checksums_is_sent_none(status: int) -> None:
    client: Any = Client(status)
    upload = await Upload.create(client, "bucket", "key", {}, checksums=True)
    assert client.asked == [True, False]
    assert not upload.checksums


async def test_other_refusals_are_raised() -> None:
    client: Any = Client(403)
    with pytest.raises(ClientError):
        await Upload.create(client, "bucket", "key", {}, checksums=True)
    assert client.asked == [True]


class Parts:
    """Fails for every part except the first, which waits until it is released."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.let_go = asyncio.Event()

    async def upload_part(self, **params: Any) -> dict[str, Any]:
        number = params["PartNumber"]
        self.begun.append(number)
        if number > 1:
            message = f"part {number}"
            raise OSError(message)
        await self.let_go.wait()
        return {"ETag": "e", "CopyPartResult": {"ETag": "e"}}

    upload_part_copy = upload_part


@pytest.mark.parametrize("copies", [False, True], ids=["sent", "copied"])
async def test_running_requests_end_before_the_failure_of_a_part_is_raised(
    copies: bool,  # noqa: FBT001 - a parameter
) -> None:
    """S3 may keep what it receives while an upload is aborted."""
    client: Any = Parts()
    upload = Upload(client, {}, "u", checksums=False)

    async def parts() -> AsyncGenerator[bytes]:
        for _ in range(9):
            yield b"part"

    work = upload.copy({}, 900, 100) if copies else upload.send(parts(), SHARE)
    task = asyncio.create_task(work)
    for _ in range(20):
        await asyncio.sleep(0)
    begun = list(client.begun)
    assert begun[:2] == [1, 2]
    assert len(begun) <= 4
    assert not task.done()
    client.let_go.set()
    with pytest.raises(OSError, match="part 2"):
        await task
    assert client.begun == begun


async def test_a_body_that_fails_lets_its_parts_end_and_is_closed() -> None:
    client: Any = Parts()
    upload = Upload(client, {}, "u", checksums=False)
    closed: list[bool] = []

    async def parts() -> AsyncGenerator[bytes]:
        try:
            yield b"part"
            message = "the body"
            raise LookupError(message)
        finally:
            closed.append(True)

    task = asyncio.create_task(upload.send(parts(), SHARE))
    for _ in range(20):
        await asyncio.sleep(0)
    assert closed
    assert not task.done()
    client.let_go.set()
    with pytest.raises(LookupError, match="the body"):
        await task


async def test_a_failure_does_not_wait_for_a_body_that_takes_its_time() -> None:
    client: Any = Parts()
    client.let_go.set()
    upload = Upload(client, {}, "u", checksums=False)
    closed: list[bool] = []

    async def parts() -> AsyncGenerator[bytes]:
        try:
            yield b"part"
            yield b"part"
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async with asyncio.timeout(60):
        with pytest.raises(OSError, match="part 2"):
            await upload.send(parts(), SHARE)
    assert closed


async def test_a_cancelled_upload_ends_all_of_its_parts() -> None:
    client: Any = Parts()
    upload = Upload(client, {}, "u", checksums=False)

    async def parts() -> AsyncGenerator[bytes]:
        yield b"part"
        await asyncio.Event().wait()

    before = asyncio.all_tasks()
    task = asyncio.create_task(upload.send(parts(), SHARE))
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before


def test_a_body_is_read_as_a_file_and_not_copied() -> None:
    part = bytes(range(256))
    body = Body(part)
    assert body.getbuffer().obj is part
    assert (body.read(2), body.read()) == (part[:2], part[2:])
