"""FennFlow compared with what one would write without it, in one run: `uv run benchmarks/run.py`.

Each operation is done on N objects by every subject in turn, several times; the result is the
median, and its ratio to raw aiobotocore with the same number of requests in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from server import Server, cheap_server
from subjects import OPERATIONS, PART, MiB, Raw, StreamSubject, Subject, subjects

from fennflow.testing import S3Server, juicefs_gateway, moto_server, postgresql_server

MOST_UNITS = 100
"""Units of work one by one say enough with so many of them."""
LIMIT = 50 * 10**6
"""Bytes a second that a connection gets, where that is limited."""


async def timed(work: Awaitable[object]) -> float:
    # No subject pays for what another has left behind.
    gc.collect()
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def measure(
    found: Sequence[Subject],
    sizes: Sequence[int],
    repeats: int,
    label: str,
    count: Callable[[], int] = lambda: 0,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, int]]]:
    """Return the seconds of each operation, by subject, and the requests that it was."""
    seconds: dict[str, dict[str, list[float]]] = {}
    requests: dict[str, dict[str, int]] = {}
    # Existing objects, such as moto's server, are excluded from garbage collection.
    gc.freeze()
    for size, turn in itertools.product(sizes, range(repeats)):
        keys = [f"{label}/{size}/{turn}/{number:05}" for number in range(size)]
        for operation in OPERATIONS:
            if operation == "units" and size > MOST_UNITS:
                continue
            # The first subject pays for waking up the machine, so they take turns.
            for subject in (*found[turn % len(found) :], *found[: turn % len(found)]):
                before = count()
                spent = await timed(getattr(subject, operation)(keys))
                name = f"{operation} {size}"
                requests.setdefault(name, {})[subject.name] = count() - before
                seconds.setdefault(name, {}).setdefault(subject.name, []).append(spent)
    return seconds, requests


async def measure_large(
    found: Sequence[StreamSubject], size: int, repeats: int
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


async def measure_limited(
    found: Sequence[StreamSubject], size: int, repeats: int, cheap: Server
) -> dict[str, dict[str, list[float]]]:
    """Return seconds of one large object down, where a connection gets 50 MB/s."""
    row: dict[str, list[float]] = {}
    for turn, subject in itertools.product(range(repeats), found):
        key = f"limited/{turn}.bin"
        await subject.upload(key, size)
        cheap.limit(LIMIT)
        try:
            row.setdefault(subject.name, []).append(await timed(subject.download(key)))
        finally:
            cheap.limit(0)
        await subject.delete([key])
    return {f"{size // MiB} MiB down, {LIMIT // 10**6} MB/s a connection": row}


async def measure_many(
    found: Sequence[StreamSubject], size: int
) -> dict[str, dict[str, list[float]]]:
    """Return seconds, and MiB of memory that it took, of eight large objects at once."""
    keys = [f"many/{number}.bin" for number in range(8)]
    name = f"8 x {size // MiB} MiB up"
    results: dict[str, dict[str, list[float]]] = {name: {}, f"{name}, memory": {}}
    for subject in found:
        before = forget_peak()
        uploads = [subject.upload(key, size) for key in keys]
        results[name][subject.name] = [await timed(asyncio.gather(*uploads))]
        results[f"{name}, memory"][subject.name] = [peak() - before]
        await subject.delete(keys)
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
    """Restart the measurement, and return what is held now, in MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


@contextmanager
def server_named(name: str, directory: Path) -> Generator[tuple[S3Server, Any]]:
    """Start a server; the cheap ones are followed by what sets their latency."""
    if name in {"cheap", "cheap, versioned bucket"}:
        with cheap_server(versioned="versioned" in name) as server:
            yield S3Server(server.url, "test", "test"), server
    elif name == "moto":
        with moto_server() as server:
            yield server, None
    else:
        with juicefs_gateway(directory) as server:
            yield server, None


def sizes_for(name: str, sizes: Sequence[int]) -> list[int]:
    """Return which of the sizes say something new on a server."""
    if name == "cheap, versioned bucket" and len(sizes) > 1:
        return [sizes[0], sizes[-1]]
    return list(sizes)


async def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, show each table when it is there, and keep it."""
    results: dict[str, Any] = {}
    directory = Path(tempfile.mkdtemp())
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        database = stack.enter_context(postgresql_server()) if options.postgresql else None
        for name in options.servers:
            here = directory / name
            here.mkdir()
            url = None if database is None else database.new_database()
            middle = options.latencies[len(options.latencies) // 2]
            with server_named(name, here) as (server, cheap):
                latencies = options.latencies if name == "cheap" else [middle if cheap else 0]
                strong = name != "juicefs"
                async with subjects(
                    server, here, postgresql=url, strong=strong, peer=options.peer
                ) as found:
                    for latency in latencies:
                        if cheap:
                            cheap.answer_after(latency / 1000)
                        label = f"{name}, {latency} ms" if cheap else name
                        sizes = sizes_for(name, options.sizes)
                        count = cheap.requests if cheap else (lambda: 0)
                        rows, requests = await measure(found, sizes, options.repeats, label, count)
                        results[label] = rows
                        keep(options.json, results)
                        show(label, rows, console)
                        if cheap:
                            show_requests(label, requests, console)
                        if len(sizes) > 1:
                            fitted(rows, console)
                    if options.large and name == "cheap":
                        cheap.answer_after(middle / 1000)
                        large = [
                            each
                            for each in found
                            if isinstance(each, StreamSubject) and each.name != "s3fs"
                        ]
                        size = options.large * MiB
                        rows = await measure_large(large, size, options.repeats)
                        rows |= await measure_limited(large, size, options.repeats, cheap)
                        rows |= await measure_many(large, max(PART, size // 5 // PART * PART))
                        results["large"] = rows
                        keep(options.json, results)
                        show("large", rows, console)
    return results


def keep(path: Path | None, results: dict[str, Any]) -> None:
    """Write down what was measured so far."""
    if path is not None:
        machine = {"python": platform.python_version(), "cpus": len(os.sched_getaffinity(0))}
        path.write_text(json.dumps({"machine": machine, "seconds": results}, indent=1))


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


def show_requests(label: str, rows: dict[str, dict[str, int]], console: Console) -> None:
    """Print how many requests each operation was, the last time."""
    names = list(next(iter(rows.values())))
    table = Table("operation", *names, title=f"{label}: requests")
    for operation, by_name in rows.items():
        table.add_row(operation, *(str(by_name[name]) for name in names))
    console.print(table)


def fitted(rows: dict[str, dict[str, list[float]]], console: Console) -> None:
    """Print how the medians grow with N: so much for a unit of work, so much for each object."""
    table = Table("operation", title="fit: ms for the whole + ms for each object")
    names = list(next(iter(rows.values())))
    for name in names:
        table.add_column(name, justify="right")
    for operation in OPERATIONS:
        mine = {
            int(each.rpartition(" ")[2]): by_name
            for each, by_name in rows.items()
            if each.startswith(operation)
        }
        if len(mine) == 1:
            continue
        cells: list[str] = []
        for name in names:
            times = [1000 * statistics.median(by_name[name]) for by_name in mine.values()]
            # The smallest weigh as much as the largest: what counts is the relative error.
            weights = [1 / time for time in times]
            slope, start = _weighted_line(list(mine), times, weights)
            cells.append(f"{start:.1f} + {slope:.2f}")
        table.add_row(operation, *cells)
    console.print(table)


def _weighted_line(
    sizes: Sequence[int], times: Sequence[float], weights: Sequence[float]
) -> tuple[float, float]:
    """Return slope and start of the line with the least squares of weighted errors."""
    squares = [weight * weight for weight in weights]
    total = sum(squares)
    size = sum(w * x for w, x in zip(squares, sizes, strict=True)) / total
    time = sum(w * y for w, y in zip(squares, times, strict=True)) / total
    spread = sum(w * (x - size) ** 2 for w, x in zip(squares, sizes, strict=True))
    both = sum(w * (x - size) * (y - time) for w, x, y in zip(squares, sizes, times, strict=True))
    slope = both / spread
    return slope, time - slope * size


def cell(operation: str, name: str, value: float, base: float) -> str:
    if operation.endswith("memory"):
        return f"{value:.0f} MiB"
    ratio = "" if name == Raw.name else f"  {value / base:.2f}"
    return f"{1000 * value:.1f} ms{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--latencies", type=int, nargs="+", default=[0, 10, 30], help="in ms")
    parser.add_argument(
        "--servers",
        nargs="+",
        default=["cheap", "cheap, versioned bucket", "moto", "juicefs"],
        help="to measure on: the versioned one with the middle latency and the extreme sizes, the last "
        "two without latency",
    )
    parser.add_argument("--no-postgresql", dest="postgresql", action="store_false")
    parser.add_argument(
        "--no-peer", dest="peer", action="store_false", help="without fennflow 0.8.1"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", type=int, default=512, help="MiB of one object; 0 for none")
    parser.add_argument("--json", type=Path, help="where to write all that was measured")
    options = parser.parse_args()
    asyncio.run(run(options, Console(width=190)))


if __name__ == "__main__":
    main()
