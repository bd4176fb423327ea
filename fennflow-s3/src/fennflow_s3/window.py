"""Limits concurrent requests, and reduces the limit while a server asks to slow down."""

from __future__ import annotations

import asyncio
from collections import deque
from http import HTTPStatus

SLOW_DOWN = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}


class Window:
    """Limits concurrent requests to the number that the server recently accepted.

    The limit is halved when a request is refused, and raised by one after each successful round:
    additive increase and multiplicative decrease, as in TCP's congestion avoidance (RFC 5681,
    section 3.1). S3 answers 503 `SlowDown` while it scales to a new rate, and accepts more within
    minutes (Amazon S3 User Guide, "Best practices design patterns: optimizing Amazon S3
    performance").

    Unlike a limit of requests per second, it does not slow down a client that sends few requests.

    Args:
        limit: the largest number of concurrent requests.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._width = float(limit)
        self._under_way = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._narrowed = 0

    async def enter(self) -> int:
        """Wait for a turn, first come first served; return the argument for `leave`."""
        if self._under_way < int(self._width) and not self._waiting:
            self._under_way += 1
            return self._narrowed
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was granted at the same moment
                self._under_way -= 1
                self._admit()
            raise
        return self._narrowed

    def leave(self, entered: int, status: int | None) -> None:
        """Give a turn back.

        Args:
            entered: the return value of `enter`.
            status: the status of the answer; None if there was none, which does not change the
                limit.
        """
        self._under_way -= 1
        if status in SLOW_DOWN:
            # Concurrent requests are refused for the same reason, so they count only once.
            if entered == self._narrowed:
                self._narrowed += 1
                self._width = max(1.0, min(self._width, self._under_way + 1) / 2)
        elif status is not None:
            self._width = min(float(self._limit), self._width + 1 / self._width)
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._under_way < int(self._width):
            turn = self._waiting.popleft()
            if not turn.done():
                self._under_way += 1
                turn.set_result(None)
