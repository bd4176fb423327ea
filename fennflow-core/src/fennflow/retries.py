"""Retries failed calls, with a log record for each wait."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fennflow.telemetry import log_event

R = TypeVar("R")


async def repeat(
    call: Callable[[], Awaitable[R]],
    *,
    on: Callable[[Exception], bool],
    attempts: int,
    what: str,
    wait_initial: float = 0.1,
    wait_max: float = 5.0,
    level: int = logging.WARNING,
    transaction: str | None = None,
) -> R:
    """Call until it succeeds, a limited number of times, with exponential back-off and jitter.

    Args:
        call: the function to try.
        on: returns whether another attempt may succeed after an exception.
        attempts: the total number of attempts.
        what: names the operation and its object in the log.
        wait_initial: seconds before the second attempt, at most.
        wait_max: seconds before any later one, at most.
        level: of the log records.
        transaction: the id of the transaction that it belongs to, if any.

    Raises:
        Exception: what the last attempt raised.
    """
    attempt = 1
    while True:
        try:
            return await call()
        except Exception as error:
            if attempt >= attempts or not on(error):
                raise
            longest = min(wait_max, wait_initial * 2 ** (attempt - 1))
            wait = longest * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
            log_event(
                level,
                "%s failed, attempt %d of %d; the next one is in %.2f s: %s: %s",
                what,
                attempt,
                attempts,
                wait,
                type(error).__name__,
                error,
                rule="retry",
                transaction=transaction,
            )
        attempt += 1
        await asyncio.sleep(wait)
