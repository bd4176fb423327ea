"""Processes that write the same keys and are killed at random: nothing committed is lost (I1 to I6)."""

from __future__ import annotations

import asyncio
import itertools
import random
from multiprocessing.connection import Connection

import pytest

from crashing import FULL, SEED, Event, Site, catalog_aside, check, make_site, start, work

pytestmark = [pytest.mark.crashes, pytest.mark.timeout(3600)]

WORKERS = 8
SESSIONS = 200 if FULL else 30
FEW, MORE = 20, 60
"""Of processes whose commits all contend for one log, in the gate and in full."""
KEYS = 60
KILL_EVERY = (0.25, 2.0)
KILL_SLOW = (2.0, 6.0)
"""Of processes that wait for each other at each commit: most have to finish."""


async def drive(
    site: Site, worker: int, sessions: int, choice: random.Random, kill_every: tuple[float, float]
) -> list[Event]:
    """Run one worker's transactions, in a new process after each time that it was killed."""
    last: dict[int, Event] = {}
    turn = 0
    while turn < sessions:
        process, pipe = await asyncio.to_thread(
            start, work, site, worker, range(turn, sessions), KEYS
        )
        killer = asyncio.get_running_loop().call_later(
            choice.uniform(*kill_every) * WORKERS, process.kill
        )
        for event in await asyncio.to_thread(drain, pipe):
            number = int(event.value.partition(".")[2])
            last[number] = event
            turn = number + 1
        killer.cancel()
        await asyncio.to_thread(process.join)
    return list(last.values())


def drain(pipe: Connection) -> list[Event]:
    """Return everything that a process reports until its end."""
    events: list[Event] = []
    try:
        while True:
            events.append(pipe.recv())
    except EOFError:
        return events


@pytest.mark.parametrize(
    ("kind", "database", "sessions"),
    [
        ("juicefs", "sqlite", SESSIONS),
        ("juicefs", "postgresql", SESSIONS),
        ("seaweedfs", "bucket", FEW),
        pytest.param("seaweedfs", "bucket", MORE, marks=pytest.mark.thorough),
        pytest.param("moto", "bucket", MORE, marks=pytest.mark.thorough),
    ],
)
async def test_no_committed_write_is_lost_and_nothing_else_stays(
    kind: str, database: str, sessions: int, request: pytest.FixtureRequest
) -> None:
    site = await make_site(kind, database, request)
    site.settings.update(lease_ttl=3.0, lock_timeout=30.0, recovery_interval=1.0)
    kill_every = KILL_EVERY
    if database == "bucket":
        site.settings.update(lease_ttl=10.0)
        kill_every = KILL_SLOW
    choice = random.Random(f"{SEED} {database}")
    async with asyncio.TaskGroup() as group:
        workers = [
            group.create_task(drive(site, each, sessions, choice, kill_every))
            for each in range(WORKERS)
        ]
    events = list(itertools.chain.from_iterable(each.result() for each in workers))
    assert len(events) == WORKERS * sessions
    by_value = {event.value: event for event in events}
    committed = [event for event in events if event.outcome == "committed"]
    killed = [event for event in events if event.outcome == "unknown"]
    # On a slow machine a kill hits many transactions, most of them where each commit waits for the others.
    assert len(committed) > WORKERS * sessions / (8 if database == "bucket" else 4)
    assert killed
    await asyncio.sleep(1.0)
    await site.recover()
    await check(site, {})
    found = catalog_aside(await site.store.objects())
    objects = {key: body.decode() for key, body in found.items()}
    for key in range(KEYS):
        if f"k{key}" not in objects:
            assert not [each for each in committed if key in each.keys]
            continue
        final = by_value[objects[f"k{key}"]]
        assert key in final.keys
        assert final.outcome in {"committed", "unknown"}
        lost = [each for each in committed if key in each.keys and each.begun > final.ended]
        assert not lost, f"k{key}: {lost[0]} was committed after {final}"
