"""Waits for locks in one engine: what each waits for, how often it checks its lock, and deadlocks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

AHEAD = 4
"""How many waits of an engine check their lock often."""


@dataclass(slots=True, eq=False)
class Wait:
    """A call that waits for a lock.

    Args:
        waiting: the id of its transaction.
        holder: the id of the transaction that holds the lock, once it is known.
        ahead: set once it is among the longest waits.
        pause: seconds until it checks the lock again.
    """

    waiting: str
    holder: str | None = None
    ahead: asyncio.Event = field(default_factory=asyncio.Event)
    pause: float = 0.002


@dataclass(slots=True)
class Waits:
    """The waits of one engine. Between processes, the younger transaction gives up earlier."""

    _waits: list[Wait] = field(default_factory=list[Wait])

    @contextmanager
    def wait(self, transaction_id: str) -> Generator[Wait]:
        """Register the block as a call that may wait."""
        wait = Wait(transaction_id)
        self._waits.append(wait)
        self._note_ahead()
        try:
            yield wait
        finally:
            self._waits.remove(wait)
            self._note_ahead()

    def _note_ahead(self) -> None:
        for each in self._waits[:AHEAD]:
            each.ahead.set()

    async def pause(self, wait: Wait, longest: float) -> None:
        """Sleep until a wait should check its lock again.

        Each check is a database transaction. If all waits checked often, they would slow down the holder of the
        lock. So only those that have waited longest check often.

        Args:
            wait: the wait for the lock.
            longest: the largest number of seconds to sleep.
        """
        if wait.ahead.is_set():
            pause, wait.pause = wait.pause, min(2 * wait.pause, 0.05)
            await asyncio.sleep(min(longest, pause * random.uniform(0.5, 1.5)))  # noqa: S311
            return
        pause = max(1.0, 0.02 * len(self._waits)) * random.uniform(0.5, 1.5)  # noqa: S311
        with suppress(TimeoutError):
            async with asyncio.timeout(min(longest, pause)):
                await wait.ahead.wait()

    def is_victim(self, wait: Wait) -> bool:
        """Return whether a wait has to end: it is in a deadlock, and its transaction is the youngest.

        Ids grow with time, so exactly one transaction of the cycle gives up.
        """
        ahead = set[str]() if wait.holder is None else self._ahead_of(wait.holder)
        if wait.waiting not in ahead:
            return False
        circle = [each for each in ahead if wait.waiting in self._ahead_of(each)]
        return wait.waiting == max(circle)

    def _ahead_of(self, transaction_id: str) -> set[str]:
        """Return a transaction and all transactions that it waits for, directly or indirectly."""
        met: set[str] = set()
        following = [transaction_id]
        while following:
            each = following.pop()
            if each not in met:
                met.add(each)
                following += [w.holder for w in self._waits if w.waiting == each and w.holder]
        return met
