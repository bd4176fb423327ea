"""The deadline of a unit of work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fennflow.exceptions import TransactionTimeoutException


class Deadline:
    """Until when a unit of work may work; to be made on the running event loop.

    Args:
        timeout: seconds from now; None for ever.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._at = None if timeout is None else asyncio.get_running_loop().time() + timeout

    def check(self) -> None:
        """Refuse to begin anything when it is over.

        Raises:
            TransactionTimeoutException: it is over.
        """
        if self._at is not None and asyncio.get_running_loop().time() >= self._at:
            raise self._over()

    @asynccontextmanager
    async def limit(self) -> AsyncGenerator[None]:
        """Cut the block off when the deadline is over.

        Raises:
            TransactionTimeoutException: it is over.
        """
        if self._at is None:
            yield
            return
        self.check()
        timer = asyncio.timeout_at(self._at)
        try:
            async with timer:
                yield
        except TimeoutError as error:
            if timer.expired():
                raise self._over() from error
            raise

    def _over(self) -> TransactionTimeoutException:
        message = (
            f"The unit of work did not end within timeout={self._timeout} s. Nothing of it is "
            "committed; what it has written is undone. Run it again, or give it more time."
        )
        return TransactionTimeoutException(message)
