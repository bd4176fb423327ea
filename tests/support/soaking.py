"""Many concurrent transactions for any length of time, on a randomly failing server."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from crashing import StopError, start, text
from fennflow.exceptions import CommitUncertainException, FennFlowException
from fennflow.testing import S3Server, moto_server
from fennflow.testing.servers import Fault, S3Request
from stores import FullUOW

GROUPS = 40
FAULTS = (Fault.BEFORE, Fault.AFTER, Fault.CUT)


def serve(seed: str, pipe: Connection) -> None:
    """Run moto's server, in a process of its own, and let it fail at the given rate."""
    choice = random.Random(seed)
    rate = 0.0

    def fault(_: S3Request) -> Fault | None:
        return choice.choice(FAULTS) if choice.random() < rate else None

    with moto_server() as server, server.failing(fault):
        log: Any = deque(maxlen=0)  # a list would grow for as long as it runs
        server.requests = log
        pipe.send(server.url)
        while (rate := pipe.recv()) >= 0:
            pass


@contextmanager
def failing_server(seed: str) -> Generator[tuple[S3Server, Connection]]:
    """Run it; what is sent through the pipe is the rate at which it fails."""
    process, pipe = start(serve, seed)
    try:
        yield S3Server(url=pipe.recv()), pipe
        pipe.send(-1)
        process.join(30)
    finally:
        process.kill()
        process.join()
        pipe.close()


class Written(NamedTuple):
    """The result of a transaction that gave all keys of its groups one value, or deleted them."""

    values: Mapping[str, str | None]
    begun: float
    ended: float
    outcome: str


async def session(uow_class: type[FullUOW], name: str, choice: random.Random) -> Written:
    """Do something to a few groups, which may fail, be given up, or be cut off."""
    groups = [f"g{each}" for each in choice.sample(range(GROUPS), choice.randrange(1, 4))]
    deletes = choice.random() < 0.2
    values = dict.fromkeys((f"{each}/{key}" for each in groups for key in "ab"), name)
    begun, outcome = time.monotonic(), "undone"
    lock_wait = choice.uniform(0.01, 1.0) if choice.random() < 0.1 else 60.0
    try:
        async with asyncio.timeout(lock_wait):
            async with uow_class() as uow:
                await look(uow, f"g{choice.randrange(GROUPS)}")
                if deletes:
                    await uow.files.delete(*values)
                else:
                    await uow.files.put(*(text(name, key) for key in values))
                give_up(choice)
            outcome = "committed"
    except CommitUncertainException:
        outcome = "unknown"
    except (FennFlowException, StopError, TimeoutError):
        pass
    written: Mapping[str, str | None] = dict.fromkeys(values) if deletes else values
    return Written(written, begun, time.monotonic(), outcome)


def give_up(choice: random.Random) -> None:
    if choice.random() < 0.1:
        raise StopError


async def look(uow: FullUOW, group: str) -> None:
    """Read a group: both of its keys have one value, or none (I2, I9)."""
    files = await uow.files.get(f"{group}/a", f"{group}/b", missing_ok=True)
    assert len(files) in {0, 2}, f"{group}: {files}"
    assert len({file.data for file in files}) < 2, f"{group}: {files}"


def fits(key: str, found: str | None, written: list[Written]) -> bool:
    """Whether a value can be what is left under a key: no later commit changed it."""
    mine = [each for each in written if key in each.values and each.outcome != "undone"]
    committed = [each for each in mine if each.outcome == "committed"]
    if found is None and not committed:
        return True
    return any(
        each.values[key] == found and all(other.begun <= each.ended for other in committed)
        for each in mine
    )


class Held(NamedTuple):
    """The resources that this process holds."""

    sockets: int
    objects: int
    mebibytes: float

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        return cls(
            sockets=sum(
                os.path.lexists(each) and str(each.readlink()).startswith("socket:")
                for each in Path("/proc/self/fd").iterdir()
                if each.is_symlink()
            ),
            objects=len(gc.get_objects()),
            mebibytes=resident_mebibytes(),
        )


def resident_mebibytes() -> float:
    """Return how much memory this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
