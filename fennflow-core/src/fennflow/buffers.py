"""The memory that the transfers of an engine share."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

MAX_BUFFERED_BYTES = 128 << 20


@dataclass(slots=True, eq=False)
class Buffers:
    """A budget of bytes for the parts of files that are being transferred.

    Args:
        limit: bytes that may be held at once, apart from the first part of each transfer.

    Attributes:
        held: bytes that are held now.
        waiting: transfers that want more, first come first served.
    """

    limit: int = MAX_BUFFERED_BYTES
    held: int = field(default=0, init=False)
    waiting: deque[_Turn] = field(default_factory=deque["_Turn"], init=False)


@dataclass(slots=True, eq=False)
class Share:
    """The bytes that one transfer holds of a budget; the end of the block gives all of them back.

    A transfer that holds nothing gets what it asks for immediately, even above the limit. So every
    transfer makes progress part by part, whatever the others hold, even if one waits for bytes of
    another. Anything more has to wait until others have given enough back.

    Args:
        buffers: the budget.

    Attributes:
        held: in bytes.
    """

    buffers: Buffers
    held: int = field(default=0, init=False)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Give everything back."""
        self.give(self.held)

    async def take(self, size: int) -> None:
        """Take more bytes; if the transfer already holds some, wait until they are available."""
        if self.held == 0:
            self._hold(size)
            return
        if self.try_take(size):
            return
        turn = _Turn(self, size, asyncio.get_running_loop().create_future())
        self.buffers.waiting.append(turn)
        try:
            await turn.future
        except asyncio.CancelledError:
            if turn.future.cancelled():
                self.buffers.waiting.remove(turn)
                self._admit()
            else:
                self.give(size)  # they were granted at the moment of the cancellation
            raise

    def try_take(self, size: int) -> bool:
        """Take more bytes if that needs no waiting; return whether it took them."""
        free = not self.buffers.waiting and self.buffers.held + size <= self.buffers.limit
        if free:
            self._hold(size)
        return free

    def give(self, size: int) -> None:
        """Give bytes back."""
        self._hold(-size)
        self._admit()

    def _hold(self, size: int) -> None:
        self.held += size
        self.buffers.held += size

    def _admit(self) -> None:
        waiting = self.buffers.waiting
        first = True
        for turn in [turn for turn in waiting if not turn.future.cancelled()]:
            free = first and self.buffers.held + turn.size <= self.buffers.limit
            if free or turn.share.held == 0:
                waiting.remove(turn)
                turn.share.held += turn.size
                self.buffers.held += turn.size
                turn.future.set_result(None)
            else:
                first = False


@dataclass(slots=True, eq=False)
class _Turn:
    share: Share
    size: int
    future: asyncio.Future[None]
