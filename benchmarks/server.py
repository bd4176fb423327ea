"""An S3 that costs next to nothing: in memory, on bare asyncio, with a latency of one's choice.

It knows what a benchmark sends and no more, and verifies nothing. Run in a process of its own, it
leaves the measured one alone.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape
from zlib import crc32

from typing_extensions import override

XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
LONG_AGO = b"Thu, 26 Nov 2026 00:00:00 GMT"
KEPT = (b"content-type", b"x-amz-meta-")
PAGE = 1000
COUNT, SCATTER = "count", "scatter"
SORTED_AT_ONCE = 20_000
SLICE = 1 << 16


@dataclass(slots=True)
class Stored:
    """An object: its parts are not joined, since that is not needed."""

    parts: list[bytes]
    headers: dict[bytes, bytes]
    etag: bytes
    version: bytes = b""

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))


@dataclass(slots=True)
class Store:
    """All buckets; every name is one."""

    versioned: bool = False
    requests: int = 0
    objects: dict[str, dict[str, Stored]] = field(default_factory=dict[str, dict[str, Stored]])
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict[str, dict[int, bytes]])
    described: dict[str, dict[bytes, bytes]] = field(default_factory=dict[str, dict[bytes, bytes]])
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    ordered: tuple[int, int, list[str]] = (0, 0, [])
    scattered: list[str] = field(default_factory=list[str])

    def fill(self, bucket: str, count: int) -> None:
        """Make objects that are alike, all with the ETag that their number makes."""
        headers = {b"content-type": b"text/plain"}
        for number in range(1, count + 1):
            stored = Stored([b"body"], headers, b'"%032x"' % number)
            self.bucket(bucket)[f"{number % 10}/{number:07}"] = stored

    def scatter(self) -> None:
        """List objects in no order from now on."""
        keys = [key for objects in self.objects.values() for key in objects]
        self.scattered = sorted(keys, key=lambda key: crc32(key.encode()))

    def in_order(self, objects: dict[str, Stored]) -> list[str]:
        """Return the keys of a bucket; of a large one, which `fill` made, sorted once."""
        bucket, count, keys = self.ordered
        if len(objects) < SORTED_AT_ONCE or (bucket, count) != (id(objects), len(objects)):
            keys = sorted(objects)
            self.ordered = id(objects), len(objects), keys
        return keys

    def bucket(self, name: str) -> dict[str, Stored]:
        return self.objects.setdefault(name, {})

    def put(self, bucket: str, key: str, parts: list[bytes], headers: dict[bytes, bytes]) -> Stored:
        number = next(self.numbers)
        version = b"v%d" % number if self.versioned else b""
        stored = Stored(parts, headers, b'"%032x"' % number, version)
        self.bucket(bucket)[key] = stored
        return stored


Answer = tuple[int, dict[bytes, bytes], list[bytes]]


def answer(
    store: Store, method: str, target: str, headers: Mapping[bytes, bytes], body: bytes
) -> Answer:
    """Return status, headers and body for a request."""
    path, _, query_string = target.partition("?")
    bucket, _, key = unquote(path.lstrip("/")).partition("/")
    query = {name: values[0] for name, values in parse_qs(query_string, True).items()}
    objects = store.bucket(bucket)
    if not key:
        return on_bucket(store, objects, method, query, body)
    if "uploads" in query or "uploadId" in query:
        return on_upload(store, bucket, key, method, query, headers, body)
    there = objects.get(key)
    if method == "PUT":
        if headers.get(b"if-none-match") == b"*" and there is not None:
            return error(412, "PreconditionFailed")
        source = headers.get(b"x-amz-copy-source")
        if source is not None:
            return on_copy(store, bucket, key, unquote(source.decode()))
        kept = {name: value for name, value in headers.items() if name.startswith(KEPT)}
        stored = store.put(bucket, key, [body], kept)
        return 200, {b"ETag": stored.etag, **version_of(stored)}, []
    if method == "DELETE":
        if there is not None and headers.get(b"if-match", there.etag) != there.etag:
            return error(412, "PreconditionFailed")
        objects.pop(key, None)
        return 204, {}, []
    if there is None:
        return error(404, "NoSuchKey")
    reply = {b"ETag": there.etag, b"Last-Modified": LONG_AGO, **there.headers, **version_of(there)}
    if method == "HEAD":
        return 200, {**reply, b"Content-Length": b"%d" % there.size}, []
    return on_get(there, headers, reply)


def on_get(there: Stored, headers: Mapping[bytes, bytes], reply: dict[bytes, bytes]) -> Answer:
    if b"range" not in headers:
        return 200, reply, there.parts
    first, _, last = headers[b"range"].removeprefix(b"bytes=").partition(b"-")
    start, end = int(first), min(int(last or there.size), there.size - 1)
    reply[b"Content-Range"] = b"bytes %d-%d/%d" % (start, end, there.size)
    return 206, reply, cut_out(there.parts, start, end + 1)


def cut_out(parts: list[bytes], start: int, end: int) -> list[bytes]:
    """Return the bytes of a range of what is stored in parts."""
    found: list[bytes] = []
    for part in parts:
        piece = part[max(0, start) : max(0, end)]
        start, end = start - len(part), end - len(part)
        if piece:
            found.append(piece)
    return found


def on_copy(store: Store, bucket: str, key: str, source: str) -> Answer:
    other, _, name = source.lstrip("/").partition("/")
    found = store.bucket(other).get(name.partition("?versionId=")[0])
    if found is None:
        return error(404, "NoSuchKey")
    stored = store.put(bucket, key, found.parts, found.headers)
    result = f"<CopyObjectResult {XMLNS}><ETag>{stored.etag.decode()}</ETag></CopyObjectResult>"
    return 200, version_of(stored), [result.encode()]


def version_of(stored: Stored) -> dict[bytes, bytes]:
    return {b"x-amz-version-id": stored.version} if stored.version else {}


def error(status: int, code: str) -> Answer:
    return status, {}, [f"<Error><Code>{code}</Code></Error>".encode()]


def on_bucket(
    store: Store, objects: dict[str, Stored], method: str, query: Mapping[str, str], body: bytes
) -> Answer:
    if method == "POST":
        keys = re.findall(rb"<Key>([^<]*)</Key>", body)
        for key in keys:
            objects.pop(key.decode(), None)
        reply = b"".join(b"<Deleted><Key>%s</Key></Deleted>" % key for key in keys)
        if b"<Quiet>true</Quiet>" in body:
            reply = b""
        return 200, {}, [b"<DeleteResult %s>%s</DeleteResult>" % (XMLNS.encode(), reply)]
    if method == "GET" and "versioning" in query:
        status = "<Status>Enabled</Status>" if store.versioned else ""
        text = f"<VersioningConfiguration {XMLNS}>{status}</VersioningConfiguration>"
        return 200, {}, [text.encode()]
    if method == "GET":
        return 200, {}, [on_list(store, objects, query).encode()]
    return 200, {}, []


def on_list(store: Store, objects: dict[str, Stored], query: Mapping[str, str]) -> str:
    prefix, token = query.get("prefix", ""), query.get("continuation-token", "")
    if store.scattered:
        keys, start = store.scattered, int(token or 0)
    else:
        keys = store.in_order(objects)
        start = max(
            bisect_left(keys, prefix), bisect_right(keys, token or query.get("start-after", ""))
        )
    page = [key for key in keys[start : start + PAGE + 1] if key.startswith(prefix)]
    more = ""
    if len(page) > PAGE:
        page.pop()
        next_one = f"{start + PAGE}" if store.scattered else escape(page[-1])
        more = f"<NextContinuationToken>{next_one}</NextContinuationToken>"
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><ETag>{objects[key].etag.decode()}</ETag>"
        f"<LastModified>2026-11-26T00:00:00.000Z</LastModified><Size>{objects[key].size}</Size></Contents>"
        for key in page
    )
    truncated = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>"
    return f"<ListBucketResult {XMLNS}>{truncated}{more}{contents}</ListBucketResult>"


def on_upload(
    store: Store,
    bucket: str,
    key: str,
    method: str,
    query: Mapping[str, str],
    headers: Mapping[bytes, bytes],
    body: bytes,
) -> Answer:
    if "uploads" in query:
        upload_id = f"u{next(store.numbers)}"
        store.uploads[upload_id] = {}
        store.described[upload_id] = {n: v for n, v in headers.items() if n.startswith(KEPT)}
        text = (
            f"<InitiateMultipartUploadResult {XMLNS}><UploadId>{upload_id}</UploadId>"
            "</InitiateMultipartUploadResult>"
        )
        return 200, {}, [text.encode()]
    upload_id = query["uploadId"]
    if method == "PUT":
        store.uploads[upload_id][int(query["partNumber"])] = body
        return 200, {b"ETag": b'"%s"' % query["partNumber"].encode()}, []
    parts = store.uploads.pop(upload_id, {})
    if method == "DELETE":
        return 204, {}, []
    ordered = [parts[number] for number in sorted(parts)]
    stored = store.put(bucket, key, ordered, store.described.pop(upload_id))
    text = (
        f"<CompleteMultipartUploadResult {XMLNS}><ETag>{stored.etag.decode()}</ETag>"
        "</CompleteMultipartUploadResult>"
    )
    return 200, version_of(stored), [text.encode()]


class Http(asyncio.Protocol):
    """Just enough of HTTP/1.1."""

    def __init__(self, store: Store, settings: dict[str, float]) -> None:
        self.store = store
        self.settings = settings
        self.buffer = bytearray()
        self.wanted = 0
        self.transport: asyncio.WriteTransport

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) < self.wanted:
            return
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = bytes(self.buffer[:end]).split(b"\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in lines)
        }
        length = int(headers.get(b"content-length", 0))
        self.wanted = end + 4 + length
        if len(self.buffer) < self.wanted:
            if headers.get(b"expect") and len(self.buffer) == end + 4:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        body = bytes(self.buffer[end + 4 : self.wanted])
        del self.buffer[: self.wanted]
        self.wanted = 0
        method, target, _ = first.decode().split(" ")
        latency = self.settings["latency"]
        if latency:
            loop = asyncio.get_running_loop()
            loop.call_later(latency, self._answer, method, target, headers, body)
        else:
            self._answer(method, target, headers, body)

    def _answer(self, method: str, target: str, headers: dict[bytes, bytes], body: bytes) -> None:
        self.store.requests += 1
        status, reply, parts = answer(self.store, method, target, headers, body)
        reply = {b"Content-Length": b"%d" % sum(map(len, parts)), **reply}
        head = b"HTTP/1.1 %d OK\r\n" % status
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in reply.items())
        self.transport.write(head + lines + b"\r\n")
        if method == "HEAD":
            return
        if not self.settings["rate"]:
            self.transport.writelines(parts)
            return
        loop = asyncio.get_running_loop()
        slices = (part[at : at + SLICE] for part in parts for at in range(0, len(part), SLICE))
        self._send_slowly(slices, loop.time())

    def _send_slowly(self, slices: Iterator[bytes], due: float) -> None:
        """Send a slice whenever the rate allows it; what was late is made up for."""
        loop = asyncio.get_running_loop()
        while due <= loop.time():
            piece = next(slices, None)
            if piece is None or self.transport.is_closing():
                return
            self.transport.write(piece)
            due += len(piece) / self.settings["rate"]
        loop.call_at(due, self._send_slowly, slices, due)


def serve(pipe: Connection, versioned: bool) -> None:  # noqa: FBT001 - of a process
    """Serve until asked to stop; other orders are the latency in seconds, or what to fill.

    The answer is how many requests there were.
    """

    async def main() -> None:
        loop = asyncio.get_running_loop()
        settings = {"latency": 0.0, "rate": 0.0}
        store = Store(versioned)
        server = await loop.create_server(lambda: Http(store, settings), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        while (order := await loop.run_in_executor(None, pipe.recv)) is not None:
            if isinstance(order, dict):
                settings.update(order)
            elif isinstance(order, tuple):
                store.fill(*order)
            elif order == SCATTER:
                store.scatter()
            elif order != COUNT:
                settings["latency"] = order
            pipe.send(store.requests)
        server.close()

    asyncio.run(main())


@dataclass(frozen=True)
class Server:
    """A running one."""

    url: str
    pipe: Connection

    def answer_after(self, seconds: float) -> None:
        """Let each answer take so long from now on."""
        self.pipe.send(seconds)
        self.pipe.recv()

    def limit(self, rate: float) -> None:
        """Give each connection so many bytes a second from now on; 0 for as many as it takes."""
        self.pipe.send({"rate": rate})
        self.pipe.recv()

    def requests(self) -> int:
        """Return how many there were."""
        self.pipe.send(COUNT)
        return int(self.pipe.recv())

    def scatter(self) -> None:
        """Let the server list objects in no order."""
        self.pipe.send(SCATTER)
        self.pipe.recv()

    def fill(self, bucket: str, count: int) -> None:
        """Make so many objects at once."""
        self.pipe.send((bucket, count))
        self.pipe.recv()


@contextmanager
def cheap_server(*, versioned: bool = False) -> Generator[Server]:
    """Run the server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, versioned), daemon=True)
    process.start()
    try:
        yield Server(f"http://127.0.0.1:{here.recv()}", here)
        here.send(None)
        process.join(5)
    finally:
        process.kill()
        process.join()


if __name__ == "__main__":
    sys.exit("It is started by run.py.")
