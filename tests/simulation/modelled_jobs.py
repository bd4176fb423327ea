"""What compensations and hooks should do in a simulated world (P33 to P37).

The world outside is a set: a step adds its number, its compensation removes it. At the end a number is
there if and only if its transaction has committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fennflow.jobs import current_job

if TYPE_CHECKING:
    from fennflow import UnitOfWork
    from world import World


@dataclass(eq=False)
class ModelJob:
    """A compensation or a hook, and what became of it.

    Args:
        number: by which it is called.
        kind: which of the two.
        process: that journaled it.
        transaction: whose job it is.
        behave: what its function does, attempt by attempt; nothing special in the end.
        key: by which hooks are ordered.
        committed: whether its transaction is.
        released: whether it is due however that ends.
        dropped: whether it must not be called: its savepoint was undone, or its step was not done.
        applied: whether its step took effect.
        late: whether that was after it had been called.
        begun: attempts.
        done: those that returned.
        idempotency_key: that it was called with.
        running: whether an attempt is under way.
    """

    number: int
    kind: Literal["undo", "hook"]
    process: int
    transaction: str
    behave: list[Callable[[], Awaitable[None]]] = field(
        default_factory=list[Callable[[], Awaitable[None]]]
    )
    key: str | None = None
    committed: bool = False
    released: bool = False
    dropped: bool = False
    applied: bool = False
    late: bool = False
    begun: int = 0
    done: int = 0
    idempotency_key: str = ""
    running: bool = False


ORDERED_ATTEMPTS = 3
"""Of a compensation for which those of earlier steps wait."""


@dataclass(eq=False)
class ModelJobs:
    """All of a world, and what is done outside of it."""

    world: World
    all: dict[int, ModelJob] = field(default_factory=dict[int, ModelJob])
    outside: set[int] = field(default_factory=set[int])
    committed: list[ModelJob] = field(default_factory=list[ModelJob])
    wrong: list[AssertionError] = field(default_factory=list[AssertionError])

    def register(self, uow_class: type[UnitOfWork]) -> None:
        """Let a process have the functions."""

        @uow_class.compensation("undo")
        async def undo(number: int) -> None:
            await self._checked(self.all[number])

        @uow_class.after_commit("hook")
        async def hook(number: int) -> None:
            await self._checked(self.all[number])

    def add(self, job: ModelJob) -> ModelJob:
        self.all[job.number] = job
        return job

    def apply(self, job: ModelJob) -> None:
        """Let a step take effect."""
        if not job.begun:
            journal = self.world.observer.jobs(limit=100, transaction_id=job.transaction)
            wanted = f'{{"number":{job.number}}}'
            there = [each.arguments for each in self.world.now_do(journal)]
            assert wanted in there, f"P33: the undo of step {job.number} is not journaled"
        job.applied, job.late = True, bool(job.begun)
        self.outside.add(job.number)

    def commit(self, jobs: list[ModelJob]) -> None:
        """Note that their transaction has committed."""
        for job in jobs:
            job.committed = True
            if job.kind == "hook":
                self.committed.append(job)
            elif not job.released:
                assert not job.begun, f"P34: step {job.number} was undone, and is committed"

    async def _checked(self, job: ModelJob) -> None:
        """Call a function, and keep what is wrong: the engine takes it for a failure of the function."""
        try:
            await self._call(job)
        except AssertionError as error:
            self.wrong.append(error)
            raise

    def check(self) -> None:
        """Check that no call was wrong."""
        for error in self.wrong:
            raise error

    async def _call(self, job: ModelJob) -> None:
        world, name = self.world, f"{job.kind} {job.number}"
        world.note(f"{name} is called")
        key = current_job().idempotency_key
        assert job.idempotency_key in {"", key}, f"P35: {name} has two keys"
        job.idempotency_key = key
        if job.kind == "undo":
            wrong = job.committed and not job.released
            assert not wrong, f"P34: {name} is called, and its step is committed"
        else:
            assert job.committed, f"P36: {name} is called, and nothing is committed"
        assert not job.dropped, f"P34: {name} is called, and is not due"
        self._check_order(job)
        assert not job.running or world.ambiguous, f"P35: {name} is called again while it runs"
        job.begun += 1
        job.running = True
        try:
            await (job.behave.pop() if job.behave else _nothing)()
        finally:
            job.running = False
        job.done += 1
        self.outside.discard(job.number)
        assert job.done == 1 or world.ambiguous, f"P35: {name} was called twice"

    def _check_order(self, job: ModelJob) -> None:
        if job.kind == "hook" and job.key is not None:
            before = self.committed[: self.committed.index(job)]
            waits = [each.number for each in before if each.key == job.key and not each.done]
            assert not waits, f"P36: hook {job.number} is called before {waits}"
        if job.kind == "undo" and not self.world.ambiguous:
            waits = [
                each.number
                for each in self.all.values()
                if (each.kind, each.transaction) == ("undo", job.transaction)
                and each.number > job.number
                and each.released == job.released
                and each.applied
                and not each.done
                and each.begun < ORDERED_ATTEMPTS
            ]
            assert not waits, f"P34: undo {job.number} is called before {waits}"

    def owes(self, job: ModelJob) -> bool:
        """Return whether it has to be called, and was not."""
        if job.kind == "hook":
            return job.committed and not job.done
        due = job.released or not job.committed
        return due and not job.dropped and job.number in self.outside

    def check_over(self, killed: set[int]) -> None:
        """Check what must be true when all is recovered.

        Args:
            killed: processes that could not journal again what a step had done late.
        """
        self.check()
        for job in self.all.values():
            excused = job.late and job.process in killed
            assert excused or not self.owes(job), f"{job.kind} {job.number} was never called"
            if job.kind == "undo" and job.committed and not job.released and job.applied:
                assert job.number in self.outside, f"P34: step {job.number} was undone"


async def _nothing() -> None:
    await asyncio.sleep(0)
