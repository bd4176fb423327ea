"""FennFlow beside raw aiobotocore, in one run, on one server: `uv run benchmarks/run.py`.

Each operation is done on N objects by every subject in turn, several times; what is told is the
median, and its ratio to raw aiobotocore with the same number of requests in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from rich.console import Console
from rich.table import Table
from server import Server, cheap_server
from typing_extensions import override

from fennflow import ConfigDict, ReconcileConfig, UnitOfWork
from fennflow.backends import InMemoryBackendConfig, SqlalchemyBackendConfig
from fennflow.config import BackendConfig
from fennflow.connectors import S3ConnectorConfig
from fennflow.files import BinaryContent, StreamContent
from fennflow.repositories import CrudRepository, RepoField, StreamRepository

IN_FLIGHT = 32
BODY = bytes(range(256)) * 4
MiB = 1 << 20
BLOCK = bytes(range(256)) * (MiB // 256)
PART = 8 * MiB
CREDENTIALS: dict[str, Any] = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}

OPERATIONS = ("create", "overwrite", "read", "delete", "rollback")


class Subject(ABC):
    """What is measured."""

    name: str

    @abstractmethod
    async def create(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def overwrite(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def read(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def delete(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def rollback(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def upload(self, key: str, size: int) -> None: ...
    @abstractmethod
    async def download(self, key: str) -> int: ...


async def in_flight(
    items: Iterable[Any], work: Callable[[Any], Awaitable[object]], limit: int = IN_FLIGHT
) -> None:
    """Do the work for all, so many at a time."""
    todo = iter(items)

    async def worker() -> None:
        for item in todo:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(limit):
            group.create_task(worker())


class Raw(Subject):
    """aiobotocore, as one writes it by hand."""

    name = "aiobotocore"

    def __init__(self, client: Any, bucket: str) -> None:
        self.client = client
        self.bucket = bucket

    @override
    async def create(self, keys: Sequence[str]) -> None:
        await in_flight(
            keys,
            lambda key: self.client.put_object(
                Bucket=self.bucket, Key=key, Body=BODY, IfNoneMatch="*"
            ),
        )

    @override
    async def overwrite(self, keys: Sequence[str]) -> None:
        await in_flight(
            keys, lambda key: self.client.put_object(Bucket=self.bucket, Key=key, Body=BODY)
        )

    @override
    async def read(self, keys: Sequence[str]) -> None:
        async def get(key: str) -> None:
            answer = await self.client.get_object(Bucket=self.bucket, Key=key)
            async with answer["Body"] as body:
                assert len(await body.read()) == len(BODY)

        await in_flight(keys, get)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            objects = [{"Key": key} for key in keys[start : start + 1000]]
            await self.client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True}
            )

    @override
    async def rollback(self, keys: Sequence[str]) -> None:
        await self.create(keys)
        await self.delete(keys)

    @override
    async def upload(self, key: str, size: int) -> None:
        target = {"Bucket": self.bucket, "Key": key}
        upload = (await self.client.create_multipart_upload(**target))["UploadId"]
        parts: list[dict[str, Any]] = []

        async def send(number: int) -> None:
            body = BLOCK * (PART // MiB)
            answer = await self.client.upload_part(
                **target, UploadId=upload, PartNumber=number, Body=body
            )
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})

        await in_flight(range(1, size // PART + 1), send, limit=4)
        parts.sort(key=lambda part: part["PartNumber"])
        await self.client.complete_multipart_upload(
            **target, UploadId=upload, MultipartUpload={"Parts": parts}
        )

    @override
    async def download(self, key: str) -> int:
        answer = await self.client.get_object(Bucket=self.bucket, Key=key)
        async with answer["Body"] as body:
            return sum([len(chunk) async for chunk in body.iter_chunks(1 << 18)])


class Files(CrudRepository, StreamRepository):
    """What a benchmark needs."""


class FennFlow(Subject):
    """One unit of work for all objects of an operation."""

    def __init__(self, name: str, backend: BackendConfig, url: str, bucket: str) -> None:
        connector = S3ConnectorConfig(
            endpoint_url=url, region_name="us-east-1", **CREDENTIALS, multipart_part_size=PART
        )

        class UOW(UnitOfWork):
            files = RepoField(Files, namespace=bucket)
            config = ConfigDict(
                connector=connector,
                backend=backend,
                max_concurrency=IN_FLIGHT,
                reconcile=ReconcileConfig(frequency="never"),
            )

        self.name = name
        self.uow = UOW

    @override
    async def create(self, keys: Sequence[str]) -> None:
        async with self.uow() as uow:
            await uow.files.put(*map(content, keys))

    overwrite = create

    @override
    async def read(self, keys: Sequence[str]) -> None:
        async with self.uow() as uow:
            assert len(await uow.files.get(*keys)) == len(keys)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        async with self.uow() as uow:
            await uow.files.delete(*keys)

    @override
    async def rollback(self, keys: Sequence[str]) -> None:
        async with self.uow(auto_commit=False) as uow:
            await uow.files.put(*map(content, keys))

    @override
    async def upload(self, key: str, size: int) -> None:
        async def blocks() -> AsyncGenerator[bytes]:
            for _ in range(size // MiB):
                yield BLOCK

        stream = StreamContent.from_iterable(blocks(), filename=key, media_type="a/b", size=size)
        async with self.uow() as uow:
            await uow.files.put(stream)

    @override
    async def download(self, key: str) -> int:
        async with self.uow() as uow, uow.files.open(key) as stream:
            return sum([len(chunk) async for chunk in stream])


def content(key: str) -> BinaryContent:
    return BinaryContent(data=BODY, media_type="application/octet-stream", filename=key)


@asynccontextmanager
async def subjects(server: Server, directory: Path) -> AsyncGenerator[list[Subject]]:
    """Open all that is measured, warm."""
    numbers = itertools.count(1)
    async with AsyncExitStack() as stack:
        config = AioConfig(max_pool_connections=50, s3={"addressing_style": "path"})
        client = await stack.enter_async_context(
            AioSession().create_client(
                "s3",
                region_name="us-east-1",
                endpoint_url=server.url,
                config=config,
                **CREDENTIALS,
            )
        )
        found: list[Subject] = [Raw(client, f"b{next(numbers)}")]
        backends: dict[str, BackendConfig] = {
            "FennFlow, memory": InMemoryBackendConfig(),
            "FennFlow, SQLite": SqlalchemyBackendConfig(url=f"sqlite:///{directory}/catalog.db"),
        }
        for name, backend in backends.items():
            ours = FennFlow(name, backend, server.url, f"b{next(numbers)}")
            await stack.enter_async_context(ours.uow.lifespan())
            found.append(ours)
        for subject in found:
            await subject.create(["warm"])
            await subject.read(["warm"])
        yield found


async def timed(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def measure(
    found: Sequence[Subject], sizes: Sequence[int], repeats: int, label: str
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each operation, by subject."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for size, turn in itertools.product(sizes, range(repeats)):
        keys = [f"{label}/{size}/{turn}/{number:05}" for number in range(size)]
        for operation in OPERATIONS:
            # Whoever is first pays for what the machine has to wake up: it takes turns.
            for subject in (*found[turn % len(found) :], *found[: turn % len(found)]):
                spent = await timed(getattr(subject, operation)(keys))
                row = seconds.setdefault(f"{operation} {size}", {})
                row.setdefault(subject.name, []).append(spent)
    return seconds


async def measure_large(
    found: Sequence[Subject], size: int, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Return seconds, and MiB of memory that it took, of one large object each way."""
    results: dict[str, dict[str, list[float]]] = {}
    for turn in range(repeats):
        for subject in (*found[turn % len(found) :], *found[: turn % len(found)]):
            key = f"large/{turn}.bin"
            before = forget_peak()
            up = await timed(subject.upload(key, size))
            up_memory, before = peak() - before, forget_peak()
            down = await timed(subject.download(key))
            down_memory = peak() - before
            await subject.delete([key])
            for name, value in (
                (f"{size // MiB} MiB up", up),
                (f"{size // MiB} MiB down", down),
                (f"{size // MiB} MiB up, memory", up_memory),
                (f"{size // MiB} MiB down, memory", down_memory),
            ):
                results.setdefault(name, {}).setdefault(subject.name, []).append(value)
    return results


def status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return 0.0


def peak() -> float:
    """Return the most memory that was held since `forget_peak`, in MiB."""
    return status("VmHWM")


def forget_peak() -> float:
    """Begin to watch anew, and return what is held now, in MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


async def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, and show each table when it is there."""
    results: dict[str, Any] = {}
    directory = Path(tempfile.mkdtemp())
    try:
        for versioned in (False, True):
            (directory / str(versioned)).mkdir()
            with cheap_server(versioned=versioned) as server:
                async with subjects(server, directory / str(versioned)) as found:
                    for latency in options.latencies:
                        server.answer_after(latency / 1000)
                        label = f"{latency} ms{', versioned bucket' if versioned else ''}"
                        rows = await measure(found, options.sizes, options.repeats, label)
                        results[label] = rows
                        show(label, rows, console)
                    server.answer_after(0)
                    if options.large and not versioned:
                        rows = await measure_large(
                            found, options.large * MiB, min(3, options.repeats)
                        )
                        results["large"] = rows
                        show("large", rows, console)
    finally:
        shutil.rmtree(directory)
    return results


def show(label: str, rows: dict[str, dict[str, list[float]]], console: Console) -> None:
    """Print medians in milliseconds, and their ratios to raw aiobotocore."""
    names = list(next(iter(rows.values())))
    table = Table("operation", title=label)
    for name in names:
        table.add_column(name, justify="right")
    for operation, by_name in rows.items():
        medians = {name: statistics.median(values) for name, values in by_name.items()}
        cells = [cell(operation, name, value, medians[Raw.name]) for name, value in medians.items()]
        table.add_row(operation, *cells)
    console.print(table)


def cell(operation: str, name: str, value: float, base: float) -> str:
    if operation.endswith("memory"):
        return f"{value:.0f} MiB"
    ratio = "" if name == Raw.name else f"  {value / base:.2f}"
    return f"{1000 * value:.1f} ms{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--latencies", type=int, nargs="+", default=[0, 10, 30], help="in ms")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", type=int, default=512, help="MiB of one object; 0 for none")
    parser.add_argument("--json", type=Path, help="where to write all that was measured")
    options = parser.parse_args()
    results = asyncio.run(run(options, Console(width=120)))
    if options.json is not None:
        machine = {"python": platform.python_version(), "cpus": len(os.sched_getaffinity(0))}
        options.json.write_text(json.dumps({"machine": machine, "seconds": results}, indent=1))


if __name__ == "__main__":
    main()
