"""The catalog in the bucket, contended and large: `uv run benchmarks/bucket.py`, on a quiet machine.

Units of work of one process, and of several that contend for the log; a catalog of many records that is
opened with and without a kept copy. What one process does alone is compared by `benchmarks/run.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import uuid_utils
from rich.console import Console
from rich.table import Table
from server import cheap_server
from subjects import Files

from fennflow import ConfigDict, ReconcileConfig, UnitOfWork
from fennflow.backends import Area, BucketBackendConfig, Fill, FillPart, Record, WriteId
from fennflow.connectors import Location, S3ConnectorConfig
from fennflow.files import TextContent
from fennflow.repositories import RepoField
from fennflow.testing.backend_values import opened
from fennflow_bucket.backend import BucketBackend

BUCKET = "bucket"
AT_ONCE = 10_000
LOOKS = 21
START_UP = 3.0
"""Seconds that a process takes to start, for each, on two cores."""
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TARGETS = {
    "throughput of all, of one process's": "at least 70 %",
    "slowest in a hundred": "at most 30 round trips",
    "opened without a copy": "at most 15 s",
    "opened with a copy": "at most 2 s",
    "page of 100": "at most 10 ms",
    "memory without a copy": "at most 150 MiB",
}


def connector(url: str) -> S3ConnectorConfig:
    return S3ConnectorConfig(
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def contend(url: str, number: int, units: int, begin: float) -> list[float]:
    """Return the seconds of units of work that create a file each, one after the other."""

    class UOW(UnitOfWork):
        files = RepoField(Files, namespace=BUCKET)
        config = ConfigDict(
            connector=connector(url),
            backend=BucketBackendConfig(namespace=BUCKET),
            reconcile=ReconcileConfig(frequency="never"),
        )

    async def unit(path: str) -> float:
        started = time.perf_counter()
        async with UOW() as uow:
            await uow.files.put(TextContent.from_content("body", filename=path))
        return time.perf_counter() - started

    async def work() -> list[float]:
        async with UOW.lifespan():
            await unit(f"{number}/first")
            await asyncio.sleep(max(0.0, begin - time.time()))
            return [await unit(f"{number}/{each}") for each in range(units)]

    return asyncio.run(work())


def contention(processes: int, units: int, latency: float) -> tuple[float, float]:
    """Return units of work a second, and the seconds of the slowest in a hundred."""
    with cheap_server() as server, get_context("spawn").Pool(processes) as pool:
        server.answer_after(latency)
        begin = time.time() + START_UP * processes
        calls = [(server.url, number, units, begin) for number in range(processes)]
        found = pool.starmap(contend, calls)
    all_units = [each for spent in found for each in spent]
    return len(all_units) / max(map(sum, found)), statistics.quantiles(all_units, n=100)[98]


async def fill(config: BucketBackendConfig, count: int) -> None:
    """Give a catalog so many records, and a snapshot."""
    area = Fill(Area(BUCKET), str(uuid_utils.uuid7()))
    async with opened(config, connector=config.connector) as backend:
        assert isinstance(backend, BucketBackend)
        for first in range(0, count, AT_ONCE):
            records = [
                Record(
                    namespace=area.hidden,
                    key=f"{number % 10}/{number:07}",
                    location=Location(f"{number % 10}/{number:07}"),
                    etag=f"{number:032x}",
                    size=4,
                    media_type="text/plain",
                    content_type="text",
                    sha256=f"{number:064x}",
                    created_at=NOW,
                    modified_at=NOW,
                    write=WriteId(area.fill_id, number),
                )
                for number in range(first, min(first + AT_ONCE, count))
            ]
            await backend.fill(area, FillPart(records=records, begins=True))
        await backend.end_fill(area)
        await backend._replica._write_snapshot()


def look(config: BucketBackendConfig, start: str) -> tuple[float, float, float]:
    """Return the seconds to open a catalog and for a page, and the MiB that this process held."""

    async def work() -> tuple[float, float]:
        started = time.perf_counter()
        async with opened(config, connector=config.connector) as backend:
            took = time.perf_counter() - started
            pages: list[float] = []
            for _ in range(LOOKS):
                started = time.perf_counter()
                assert await backend.scan(BUCKET, prefix="4/", start=start, limit=100)
                pages.append(time.perf_counter() - started)
            return took, statistics.median(pages)

    took, page = asyncio.run(work())
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return took, page, 0.0 if found is None else int(found[1]) / 1024


def large(count: int, latency: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory, cheap_server() as server:
        server.answer_after(latency)
        # A page is looked up in the local copy: what a look at the log takes is the latency.
        config = BucketBackendConfig(
            namespace=BUCKET, connector=connector(server.url), max_staleness=60.0
        )
        asyncio.run(fill(config, count))
        kept = config.model_copy(update={"cache_dir": Path(directory)})
        found: list[Any] = []
        for each in (config, kept, kept):
            with get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(look, (each, f"4/{count // 2:07}")))
    (without, page, memory), _, (with_copy, _, less) = found
    return {
        "opened without a copy": without,
        "opened with a copy": with_copy,
        "page of 100": page,
        "memory without a copy": memory,
        "memory with a copy": less,
    }


def measured(options: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Return what was measured, and as text."""
    latency = options.latency / 1000
    alone, _ = contention(1, options.units, latency)
    together, slowest = contention(options.processes, options.units, latency)
    rows = {
        "units of work a second, one process": (alone, f"{alone:.1f}"),
        "units of work a second, all": (together, f"{together:.1f}"),
        "throughput of all, of one process's": (together / alone, f"{together / alone:.0%}"),
        "slowest in a hundred": (slowest / latency, f"{slowest / latency:.1f} round trips"),
    }
    for name, value in large(options.records, latency).items():
        shown = f"{value:.0f} MiB" if name.startswith("memory") else f"{value:.3f} s"
        rows[name] = (value, shown)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=10.0, help="of the server, in ms")
    parser.add_argument("--processes", type=int, default=8, help="that contend")
    parser.add_argument("--units", type=int, default=100, help="of work, of each process")
    parser.add_argument("--records", type=int, default=1_000_000, help="of the catalog")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    options = parser.parse_args(arguments)
    rows = measured(options)
    table = Table(
        "", "measured", "target", title=f"{options.latency} ms, {options.records:,} records"
    )
    for name, (_, shown) in rows.items():
        table.add_row(name, shown, TARGETS.get(name, ""))
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps({name: value for name, (value, _) in rows.items()}))


if __name__ == "__main__":
    main()
