"""A network between a client and a server that cuts, stalls and duplicates what is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import urlsplit

STALLED = 0.3
"""Seconds for which a stalled answer is held back."""


class Trouble(Enum):
    """The fate of a request and its answer."""

    NONE = "none"
    CUT_REQUEST = "the connection breaks in the middle of the request"
    CUT_ANSWER = "the connection breaks before the answer"
    CUT_HALF = "the connection breaks in the middle of the answer"
    STALL = "the answer is held back"
    DUPLICATE = "the request reaches the server twice"


@dataclass(eq=False)
class Network:
    """A TCP proxy in front of a server.

    Args:
        upstream: the server's URL.
        draw: returns the fate of the next request.
    """

    upstream: str
    draw: Callable[[], Trouble] = lambda: Trouble.NONE
    url: str = ""
    seen: set[Trouble] = field(default_factory=set[Trouble])

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[None]:
        """Serve while the block runs."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        try:
            yield
        finally:
            server.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.upstream)
        return await asyncio.open_connection(parts.hostname, parts.port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await self._connect()
        exchange = Exchange(self)
        ends = {
            asyncio.ensure_future(exchange.forth(reader, up_writer)),
            asyncio.ensure_future(exchange.back(up_reader, writer)),
        }
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in ends:
                each.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            writer.transport.abort()
            up_writer.transport.abort()

    async def repeat(self, request: bytes) -> None:
        """Send a request once more, on a connection of its own, and drop the answer."""
        reader, writer = await self._connect()
        writer.write(request)
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1), 5.0)
        writer.transport.abort()


@dataclass(eq=False)
class Exchange:
    """One connection: request after request, each with its trouble."""

    network: Network
    request: bytearray = field(default_factory=bytearray)
    trouble: Trouble = Trouble.NONE

    async def forth(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry requests to the server."""
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if not self.request:
                    self.trouble = self.network.draw()
                    self.network.seen.add(self.trouble)
                self.request += data
                if self.trouble is Trouble.CUT_REQUEST:
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    return
                writer.write(data)
                await writer.drain()

    async def back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry answers to the client."""
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if data.split(b" ", 2)[1:2] != [b"100"]:  # that one asks for the body
                    trouble, self.trouble = self.trouble, Trouble.NONE
                    if trouble is Trouble.CUT_ANSWER:
                        return
                    if trouble is Trouble.CUT_HALF:
                        writer.write(data[: len(data) // 2])
                        await writer.drain()
                        return
                    if trouble is Trouble.STALL:
                        await asyncio.sleep(STALLED)
                    if trouble is Trouble.DUPLICATE:
                        await self.network.repeat(bytes(self.request))
                    self.request.clear()
                writer.write(data)
                await writer.drain()
