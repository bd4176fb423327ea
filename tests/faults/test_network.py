"""aiobotocore over a network that cuts, stalls and duplicates: all or nothing, without leftovers."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from fennflow.exceptions import CommitUncertainException, FennFlowException
from fennflow.files import TextContent
from network import Network, Trouble
from stores import FullUOW, Store, make_store, s3_config

WORKERS = 4
SESSIONS = 12
KEYS = ("a", "b", "c")

Files = dict[str, str]


class StopError(Exception):
    """Ends a block because the test wants it to."""


class Worker:
    """Runs transactions one after the other on its own keys, and keeps their possible outcomes."""

    def __init__(self, number: int, choice: random.Random) -> None:
        self.number = number
        self.choice = choice
        self.possible: list[Files] = [{}]

    async def run(self, uow_class: type[FullUOW]) -> None:
        for turn in range(SESSIONS):
            before = self.possible
            changes: dict[str, str | None] = {}
            try:
                async with uow_class() as uow:
                    await self._change(uow, changes, turn)
            except CommitUncertainException:
                self.possible = [*before, *self._after(before, changes)]
            except (FennFlowException, StopError):
                pass
            else:
                self.possible = self._after(before, changes)

    async def _change(self, uow: FullUOW, changes: dict[str, str | None], turn: int) -> None:
        files = uow.files.at(f"w{self.number}")
        for _ in range(self.choice.randrange(1, 4)):
            name = self.choice.choice(KEYS)
            if self.choice.random() < 0.3:
                await files.delete(name, missing_ok=True)
                changes[name] = None
            else:
                value = f"{turn}: {self.choice.random()}"
                await files.put(TextContent.from_content(value, filename=name))
                changes[name] = value
        if self.choice.random() < 0.2:
            raise StopError

    @staticmethod
    def _after(before: list[Files], changes: dict[str, str | None]) -> list[Files]:
        laid: list[dict[str, str | None]] = [{**each, **changes} for each in before]
        return [{k: v for k, v in each.items() if v is not None} for each in laid]


def troubles(choice: random.Random) -> Iterator[Trouble]:
    """Yield them like shuffled cards, so that each of them occurs even with few requests."""
    while True:
        dealt = [Trouble.NONE] * 20 + list(Trouble)
        choice.shuffle(dealt)
        yield from dealt


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["moto", "juicefs"])
async def test_all_or_nothing_over_a_network_that_cannot_be_relied_upon(
    kind: str, request: pytest.FixtureRequest
) -> None:
    store: Store = await make_store(kind, request)
    assert store.server is not None
    choice = random.Random(f"{os.environ['FENNFLOW_SEED']} {kind}")
    network = Network(store.server.url)
    async with network.listening():
        through = replace(
            store, config=s3_config(store.server, endpoint_url=network.url, max_attempts=2)
        )
        uow_class = through.uow(late_write_period=1.0, lock_timeout=10.0)
        async with uow_class.lifespan():
            async with uow_class() as uow:  # probed while the network works
                await uow.files.list()
            network.draw = partial(next, troubles(choice))
            workers = [Worker(number, choice) for number in range(WORKERS)]
            async with asyncio.TaskGroup() as group:
                for worker in workers:
                    group.create_task(worker.run(uow_class))
            network.draw = lambda: Trouble.NONE
            for _ in range(2):
                await asyncio.sleep(1.5)
                assert (await uow_class.recover()).pending == 0
            async with uow_class() as uow:
                paths = await uow.files.list()
                files = await uow.files.get(*paths)
    assert network.seen == set(Trouble)
    found = {str(file.path): file.data for file in files}
    assert await store.objects() == found
    for worker in workers:
        mine = {name: found.get(f"w{worker.number}/{name}") for name in KEYS}
        possible = [{name: encoded(each.get(name)) for name in KEYS} for each in worker.possible]
        assert mine in possible


def encoded(value: str | None) -> bytes | None:
    return None if value is None else value.encode()
