"""Structured concurrency: bounded fan-out, and work that outlives a cancellation of its caller."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


async def run_all(limit: int, function: Callable[[T], Awaitable[R]], items: Iterable[T]) -> list[R]:
    """Call the function for every item, at most `limit` at a time, and return the results.

    If one call fails the others are cancelled and awaited; the first failure is raised, and the
    others are told as notes on it.
    """
    todo = list(items)
    results: dict[int, R] = {}
    numbered = iter(enumerate(todo))

    async def worker() -> None:
        for index, item in numbered:
            results[index] = await function(item)

    if len(todo) == 1:
        return [await function(todo[0])]
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(limit, len(todo))):
                group.create_task(worker())
    except BaseExceptionGroup as failures:
        first, *others = _leaves(failures)
        for other in others:
            first.add_note(f"Also failed: {type(other).__name__}: {other}")
        raise first from first.__cause__
    return [results[index] for index in range(len(todo))]


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    group = cast("BaseExceptionGroup[BaseException]", error)
    return [leaf for each in group.exceptions for leaf in _leaves(each)]


async def shielded(
    work: Coroutine[Any, Any, R], *, grace: float
) -> tuple[asyncio.Task[R], asyncio.CancelledError | None]:
    """Run work to its end although the caller is cancelled meanwhile (protocol P21).

    Args:
        work: what must not be cut off.
        grace: seconds that it may take after a cancellation; then it is cancelled too.

    Returns:
        the task, which is done, and the cancellation that arrived meanwhile: the caller has to
        honour it.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    deadline: float | None = None
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        left = None if deadline is None else deadline - loop.time()
        if left is not None and left <= 0:
            task.cancel()
            left = None
        try:
            await asyncio.wait({task}, timeout=left)
        except asyncio.CancelledError as error:
            cancellation = error
            deadline = deadline or loop.time() + grace
    return task, cancellation
