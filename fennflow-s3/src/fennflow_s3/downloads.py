"""Limits open downloads: each holds a connection for as long as its reader takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fennflow.exceptions import ConnectorUnavailableException

WAIT = 15.0
"""Seconds that a download waits for another one to end."""

_logger = logging.getLogger("fennflow")


class Downloads:
    """Limits the number of open downloads, which use separate connections.

    A server answers other requests as fast as it can, but a download takes as long as its reader does.
    On shared connections, slow readers would leave none for other requests.

    Args:
        limit: the number of concurrent downloads.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = asyncio.Semaphore(limit)
        self.has_ranges = True
        """Whether the server sends ranges; False once it has ignored a range."""

    @asynccontextmanager
    async def open(self, name: str) -> AsyncGenerator[None]:
        """Wait for a turn, and keep it inside the block.

        Args:
            name: of the object, for the message.

        Raises:
            ConnectorUnavailableException: no other download ended in time.
        """
        if self._free.locked():
            _logger.warning(
                "The download of %s waits: %d are open, as many as max_pool_connections allows.",
                name,
                self._limit,
            )
        try:
            async with asyncio.timeout(WAIT):
                await self._free.acquire()
        except TimeoutError as error:
            message = (
                f"Could not get {name}: {self._limit} downloads are open, and none of them has ended "
                f"within {WAIT:.0f} s. Close streams that are not read to their end, or raise "
                "max_pool_connections."
            )
            raise ConnectorUnavailableException(message, ambiguous=False) from error
        try:
            yield
        finally:
            self.end()

    async def begin_if_free(self) -> bool:
        """Take a turn if there is a free one; return whether it was taken."""
        return not self._free.locked() and await self._free.acquire()

    def end(self) -> None:
        """Give a turn back."""
        self._free.release()
