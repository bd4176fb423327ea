#!/usr/bin/env bash
# aiohttp sends a PUT a second time, without telling its caller, when a reused connection is closed unanswered.
#
# Version:  aiohttp 3.14.5.
# Seen:     a server that keeps the connection open after a first answer, receives a complete PUT on it and closes
#           it without an answer, receives the same PUT again on a new connection. The caller sees one answer, 200.
# Source:   aiohttp's issue 10790.
# Matters:  clients of object stores that use aiohttp (aiobotocore among them) count attempts to know whether a
#           write may have happened twice. In a versioned bucket such a PUT leaves a version that nobody knows of.
#           `ClientSession` has no public switch; FennFlow turns it off by a private attribute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "aiohttp==3.14.5"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio

import aiohttp

received: list[str] = []


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if "Content-Length: 4" in head:
                await reader.readexactly(4)
            received.append(head.split(" HTTP")[0])
            if received.count("PUT /key") == 1 and received[-1] == "PUT /key":
                break  # the whole request has arrived; the answer is lost
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
    except asyncio.IncompleteReadError:
        pass
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/key"
    async with aiohttp.ClientSession() as session:
        async with session.get(url):
            pass
        async with session.put(url, data=b"body") as answer:
            status = answer.status
    server.close()
    print(received, status)
    assert received == ["GET /key", "PUT /key", "PUT /key"] and status == 200, "the behaviour has changed"


asyncio.run(main())
PYTHON
echo "as described"
