"""What a request costs the processor: `uv run benchmarks/requests.py`.

Each kind of request is sent some thousand times by every client in turn, 32 at once, to a server in another
process. The result is the CPU time of this process for one request, which does not move with
what else the machine does as wall time would.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import obstore
from aiobotocore.session import AioSession
from obstore.store import S3Store
from rich.console import Console
from rich.table import Table
from server import cheap_server
from subjects import BODY, IN_FLIGHT, in_flight

from fennflow_s3 import S3ConnectorConfig
from fennflow_s3.client import client_context

BUCKET, KEY = "bucket", "directory/object.txt"
METADATA = {"fennflow_session": "0" * 36, "fennflow_seq": "1", "fennflow_sha256": "0" * 64}
Request = Callable[[], Awaitable[object]]


def requests_of(client: Any) -> dict[str, Request]:
    """Return the requests that the connector sends, by a client of aiobotocore."""
    target = {"Bucket": BUCKET, "Key": KEY}

    async def get() -> None:
        answer = await client.get_object(**target)
        async with answer["Body"] as body:
            await body.read()

    return {
        "PUT": lambda: client.put_object(
            **target, Body=BODY, ContentType="text/plain", Metadata=METADATA
        ),
        "GET": get,
        "HEAD": lambda: client.head_object(**target),
        "COPY": lambda: client.copy_object(Bucket=BUCKET, Key="copy", CopySource=target),
        "DELETE": lambda: client.delete_object(Bucket=BUCKET, Key="other"),
    }


def requests_of_obstore(url: str) -> dict[str, Request]:
    """Return those that obstore has; its COPY takes no conditions, its DELETE neither."""
    store = S3Store(
        BUCKET,
        endpoint=url,
        region="us-east-1",
        access_key_id="test",
        secret_access_key="test",
        client_options={"allow_http": True},
    )
    attributes: Any = {"Content-Type": "text/plain", **METADATA}

    async def get() -> None:
        await (await obstore.get_async(store, KEY)).bytes_async()

    return {
        "PUT": lambda: obstore.put_async(store, KEY, BODY, attributes=attributes),
        "GET": get,
        "HEAD": lambda: obstore.head_async(store, KEY),
        "COPY": lambda: obstore.copy_async(store, KEY, "copy"),
        "DELETE": lambda: obstore.delete_async(store, "other"),
    }


def requests_of_aiohttp(session: aiohttp.ClientSession, url: str) -> dict[str, Request]:
    """Return what aiohttp alone costs: nothing is signed, and of the answer only the body is read."""
    headers = {
        "Content-Type": "text/plain",
        **{f"x-amz-meta-{name}": value for name, value in METADATA.items()},
    }

    async def send(method: str, key: str, **options: Any) -> None:
        async with session.request(method, f"{url}/{BUCKET}/{key}", **options) as answer:
            await answer.read()

    copy = {"x-amz-copy-source": f"{BUCKET}/{KEY}"}
    return {
        "PUT": lambda: send("PUT", KEY, data=BODY, headers=headers),
        "GET": lambda: send("GET", KEY),
        "HEAD": lambda: send("HEAD", KEY),
        "COPY": lambda: send("PUT", "copy", headers=copy),
        "DELETE": lambda: send("DELETE", "other"),
    }


async def cpu_of(request: Request, count: int) -> float:
    """Return the microseconds of one of them."""
    await in_flight(range(2 * IN_FLIGHT), lambda _number: request())
    gc.collect()
    started = time.process_time()
    await in_flight(range(count), lambda _number: request())
    return 1e6 * (time.process_time() - started) / count


async def run(url: str, count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return the median microseconds of each kind of request, by client."""
    options: dict[str, Any] = {
        "endpoint_url": url,
        "region_name": "us-east-1",
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
    }
    async with AsyncExitStack() as stack:
        raw = await stack.enter_async_context(AioSession().create_client("s3", **options))  # pyright: ignore[reportUnknownMemberType]
        own = await stack.enter_async_context(client_context(S3ConnectorConfig(**options)))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        clients = {
            "aiobotocore": requests_of(raw),
            "FennFlow": requests_of(own),
            "obstore": requests_of_obstore(url),
            "aiohttp, unsigned": requests_of_aiohttp(session, url),
        }
        seconds: dict[str, dict[str, list[float]]] = {}
        for _, kind in itertools.product(range(repeats), clients["aiobotocore"]):
            await clients["aiobotocore"]["PUT"]()
            for name, requests in clients.items():
                cost = await cpu_of(requests[kind], count)
                seconds.setdefault(kind, {}).setdefault(name, []).append(cost)
    return {
        kind: {name: statistics.median(costs) for name, costs in by_name.items()}
        for kind, by_name in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with cheap_server() as server:
        found = asyncio.run(run(server.url, options.count, options.repeats))
    table = Table("request", title="CPU time, and its ratio to aiobotocore")
    for name in found["PUT"]:
        table.add_column(name, justify="right")
    for kind, by_name in found.items():
        base = by_name["aiobotocore"]
        table.add_row(kind, *(f"{cost:.0f} µs · {cost / base:.2f}" for cost in by_name.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
