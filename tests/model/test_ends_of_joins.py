"""Joined database transactions that the user ends in every way: no file without its row.

A unit of work joins a session at random, and the user commits, rolls back, closes, or opens and ends
savepoints, in the block and around it. Each file is written with a row of the same name (P5). If
the block and what surrounds it end without an exception, both exist or neither does.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from unittest import mock

import pytest
from sqlalchemy import text as sql
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from crashing import Site, make_site, text
from fennflow.exceptions import FennFlowException
from fennflow_sqlalchemy import join
from stores import FullUOW

MINUTES = float(os.environ.get("FENNFLOW_MODEL_MINUTES", "0"))
WALKS = 40
AROUND = ("nothing", "nothing", "begun", "used before", "savepoint")
STEPS = (
    *["letter"] * 6,
    "rows in a savepoint",
    "file in a savepoint",
    "commit",
    "rollback",
    "close",
    "COMMIT",
    "ROLLBACK",
)
ENDS = ("ends", "ends", "ends", "raises")


class Base(DeclarativeBase):
    pass


class Letter(Base):
    __tablename__ = "letters"
    name: Mapped[str] = mapped_column(primary_key=True)


class WantedError(Exception):
    """Ends a block because the test wants it to."""


def give_up() -> None:
    raise WantedError


@dataclass
class Walk:
    """One unit of work, and what surrounds it.

    Args:
        number: of the walk, so that names are its own.
        choice: the random generator.
        done: the events.
        names: of the letters, with a file and a row each.
        ended_inside: whether the user ended the transaction in the block.
    """

    number: int
    choice: random.Random
    done: list[str] = field(default_factory=list[str])
    names: list[str] = field(default_factory=list[str])
    ended_inside: bool = False

    async def run(self, uow_class: type[FullUOW], engine: AsyncEngine) -> bool:
        """Do it, and return whether all ended without an exception, and committed."""
        around = self._draw(AROUND)
        session = AsyncSession(engine, expire_on_commit=False)
        try:
            if around == "nothing":
                await self._block(uow_class, session)
                return True
            if around == "used before":
                await session.execute(sql("SELECT 1"))
                await self._block(uow_class, session)
            elif around == "savepoint":
                await session.begin()
                async with session.begin_nested():
                    await self._block(uow_class, session)
            else:
                await session.begin()
                await self._block(uow_class, session)
            if self._draw(("commits", "commits", "rolls back", "closes")) == "commits":
                await session.commit()
                return True
            if self.done[-1] == "rolls back":
                await session.rollback()
        except (WantedError, FennFlowException, SQLAlchemyError) as error:
            self.done.append(repr(error)[:200])
        finally:
            await session.close()
        return False

    async def _block(self, uow_class: type[FullUOW], session: AsyncSession) -> None:
        async with uow_class(join=session) as uow:
            for _ in range(self.choice.randrange(1, 6)):
                await self._step(uow, session)
            if self._draw(ENDS) == "raises":
                raise WantedError

    async def _step(self, uow: FullUOW, session: AsyncSession) -> None:
        step = self._draw(STEPS)
        name = f"{self.number}.{len(self.done)}"
        self.ended_inside |= step.lower() in {"commit", "rollback", "close"}
        if step == "letter":
            self.names.append(name)
            session.add(Letter(name=name))
            await session.flush()
            await uow.files.put(text("Dear Ann", name))
        elif step == "rows in a savepoint":
            try:
                async with session.begin_nested():
                    session.add(Letter(name=f"{name} discarded"))
                    await session.flush()
                    give_up()
            except WantedError:
                pass
        elif step == "file in a savepoint":
            try:
                async with uow.savepoint():
                    await uow.files.put(text("discarded", f"{name} discarded"))
                    give_up()
            except WantedError:
                pass
        elif step.isupper():
            await session.execute(sql(step))
        else:
            await getattr(session, step)()

    def _draw(self, options: tuple[str, ...]) -> str:
        drawn = self.choice.choice(options)
        self.done.append(drawn)
        return drawn

    def check(self, files: set[str], rows: set[str], *, committed: bool) -> None:
        there = [name for name in self.names if name in files]
        described = f"walk {self.number}: {self.done}: files {there}"
        assert not any("discarded" in name for name in files | rows), described
        assert set(there) <= rows, f"files without rows: {described}"
        assert there in ([], self.names), f"some of the files: {described}"
        if committed:
            assert there == self.names, f"it ended, and was not committed: {described}"
        if not self.ended_inside:
            assert set(self.names) & rows == set(there), f"rows without files: {described}"


@asynccontextmanager
async def jointly(
    database: str, request: pytest.FixtureRequest
) -> AsyncGenerator[tuple[Site, AsyncEngine]]:
    site = await make_site("memory", database, request)
    engine = create_async_engine(site.backend.url.get_secret_value())
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    try:
        async with site.uow_class.lifespan():
            yield site, engine
    finally:
        await engine.dispose()


async def walk(seed: int, walks: int, database: str, request: pytest.FixtureRequest) -> None:
    """Walk a few times on one database, and check at the end."""
    async with jointly(database, request) as (site, engine):
        uow_class = site.uow_class
        ended: list[tuple[Walk, bool]] = []
        for number in range(walks):
            each = Walk(number, random.Random(seed + number))
            ended.append((each, await each.run(uow_class, engine)))
        deadline = asyncio.get_running_loop().time() + 60
        while await uow_class.transactions():
            assert asyncio.get_running_loop().time() < deadline, "something is never finished"
            await asyncio.sleep(0.05)
        async with uow_class() as uow:
            files = set(map(str, await uow.files.list()))
        async with engine.connect() as connection:
            rows = set((await connection.execute(sql("SELECT name FROM letters"))).scalars())
        assert {key for key in await site.store.objects() if "/" not in key} == files
        for each, committed in ended:
            each.check(files, rows, committed=committed)


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.timeout(int(300 + 120 * MINUTES))
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_no_end_of_a_joined_transaction_parts_files_and_rows(
    database: str, request: pytest.FixtureRequest
) -> None:
    seed = int(os.environ["FENNFLOW_SEED"]) * 1_000_000
    await walk(seed, WALKS + int(300 * MINUTES), database, request)


@pytest.mark.once
async def test_the_walk_finds_that_the_end_of_a_transaction_is_not_watched(
    request: pytest.FixtureRequest,
) -> None:
    """A mutation: see `test_mutations.py`."""
    unwatched = mock.patch.object(join.Watch, "end", None)
    with unwatched, pytest.raises(AssertionError):
        await walk(0, WALKS, "sqlite", request)
