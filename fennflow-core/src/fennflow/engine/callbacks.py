"""What users hang on a transaction: saga steps of their own, and callbacks for its outcome."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import stamina

from fennflow.engine.telemetry import tell

Callback = Callable[[], Awaitable[object] | object]
Undo = Callable[[], Awaitable[object]]
T = TypeVar("T")


@dataclass(slots=True)
class Callbacks:
    """Callbacks of one transaction, in the order in which they were registered."""

    undos: list[Undo] = field(default_factory=list[Undo])
    on_commit: list[Callback] = field(default_factory=list[Callback])
    on_rollback: list[Callback] = field(default_factory=list[Callback])

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.undos or self.on_commit or self.on_rollback)

    def forget(self, others: Callbacks) -> list[Undo]:
        """Remove others, as far as they are here, and return the undos that were."""
        _remove(self.on_commit, others.on_commit)
        _remove(self.on_rollback, others.on_rollback)
        return _remove(self.undos, others.undos)


def _remove(callbacks: list[T], others: list[T]) -> list[T]:
    """Remove each of the others once, the last of equal ones first; return those that were found."""
    wanted = Counter(map(id, others))
    kept: list[T] = []
    removed: list[T] = []
    for each in reversed(callbacks):
        found = wanted[id(each)] > 0
        wanted[id(each)] -= found
        (removed if found else kept).append(each)
    callbacks[:] = reversed(kept)
    return removed[::-1]


async def run_undos(undos: list[Undo], session: str) -> list[str]:
    """Undo saga steps in reverse order, each up to three times, and empty the list.

    Args:
        undos: of the steps, in the order in which they were done.
        session: whose steps they are.

    Returns:
        what could not be undone.
    """
    notes: list[str] = []
    while undos:
        undo = undos.pop()
        try:
            async for attempt in stamina.retry_context(on=Exception, attempts=3, wait_initial=0.1):
                with attempt:
                    await undo()
        except Exception as error:  # noqa: BLE001 - logged, and told as a note
            name = getattr(undo, "__qualname__", repr(undo))
            notes.append(f"The undo of a step failed: {name}: {type(error).__name__}: {error}")
            message = "The undo of a step failed: %s"
            tell(logging.ERROR, message, name, rule="P9", session=session, failed=error)
    return notes


async def run_callbacks(callbacks: Sequence[Callback], session: str) -> None:
    """Run callbacks in order. The outcome stands: what they raise is logged, not raised (I8)."""
    for callback in callbacks:
        try:
            result = callback()
            if inspect.isawaitable(result):
                await result
        except Exception as error:  # noqa: BLE001 - logged
            name = getattr(callback, "__qualname__", repr(callback))
            message = "A callback failed after the outcome was settled: %s"
            tell(logging.ERROR, message, name, rule="I8", session=session, failed=error)
