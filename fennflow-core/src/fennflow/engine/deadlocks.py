"""Which transactions of an engine wait for which, and whether they wait for each other."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Wait:
    """A call that waits for a lock.

    Args:
        waiting: the id of its transaction.
        holder: the id of the transaction that holds the lock, once it is known.
    """

    waiting: str
    holder: str | None = None


@dataclass(slots=True)
class Waits:
    """The waits of one engine. Between processes `lock_timeout` alone ends a deadlock."""

    _waits: list[Wait] = field(default_factory=list[Wait])

    @contextmanager
    def wait(self, transaction_id: str) -> Generator[Wait]:
        """Let the block be a call that may wait."""
        wait = Wait(transaction_id)
        self._waits.append(wait)
        try:
            yield wait
        finally:
            self._waits = [each for each in self._waits if each is not wait]

    def is_victim(self, wait: Wait) -> bool:
        """Return whether a wait has to end: it is in a circle, and of its youngest transaction.

        Ids grow with time, so of all in the circle only one gives up.
        """
        ahead = set[str]() if wait.holder is None else self._ahead_of(wait.holder)
        if wait.waiting not in ahead:
            return False
        circle = [each for each in ahead if wait.waiting in self._ahead_of(each)]
        return wait.waiting == max(circle)

    def _ahead_of(self, transaction_id: str) -> set[str]:
        """Return a transaction, and all that it waits for, directly or not."""
        met: set[str] = set()
        following = [transaction_id]
        while following:
            each = following.pop()
            if each not in met:
                met.add(each)
                following += [w.holder for w in self._waits if w.waiting == each and w.holder]
        return met
