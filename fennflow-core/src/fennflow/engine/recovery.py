"""Sessions that could not be settled at their end are settled later (P9).

What is left over stays in the journal, decided or not, and keeps its keys locked. This process
holds its token still, so it may finish the work whenever store and backend are back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fennflow.backends import Outcome, SessionToken, Step, Tombstone
from fennflow.engine.callbacks import Undo, run_undos
from fennflow.engine.settle import Settler
from fennflow.exceptions import SessionLostException

if TYPE_CHECKING:
    from fennflow.backends import Backend
    from fennflow.config import ConfigDict
    from fennflow.connectors import Connector

logger = logging.getLogger("fennflow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsettled:
    """A session that could not be settled.

    Args:
        session: which one.
        undo: the steps of its compensation, for the case that it is not decided `committed`.
        tombstones: what compensation leaves in doubt.
        undos: of the user's own saga steps, if they were not run yet.
    """

    session: SessionToken
    undo: Sequence[Step]
    tombstones: Sequence[Tombstone]
    undos: list[Undo]


@dataclass(slots=True)
class Leftovers:
    """The unsettled sessions of an engine.

    Args:
        config: for limits and the interval of attempts.
        connector: where the objects lie.
        backend: where the sessions are journaled.
    """

    config: ConfigDict
    connector: Connector
    backend: Backend
    _sessions: dict[str, Unsettled] = field(default_factory=dict[str, Unsettled])
    _due: float = 0.0
    _working: asyncio.Lock = field(default_factory=asyncio.Lock)

    def add(self, unsettled: Unsettled) -> None:
        """Take over a session; the next attempt is due at once."""
        self._sessions[unsettled.session.session_id] = unsettled
        self._due = 0.0

    async def settle(self, *, now: bool = False) -> bool:
        """Try to settle all of them; what fails is logged, and tried again later.

        Args:
            now: whether to try although `recovery_interval` is not over since an attempt failed:
                somebody waits for a lock.

        Returns:
            whether any was settled, so that locks are free.
        """
        loop = asyncio.get_running_loop()
        if not self._sessions or self._working.locked() or (loop.time() < self._due and not now):
            return False
        before = len(self._sessions)
        async with self._working:
            for session_id, unsettled in list(self._sessions.items()):
                try:
                    async with asyncio.timeout(self.config.compensation_timeout):
                        await self._settle(unsettled)
                except SessionLostException:
                    del self._sessions[session_id]  # P25: it is somebody else's now
                except Exception as error:  # noqa: BLE001 - logged, and tried again
                    self._due = loop.time() + self.config.recovery_interval
                    logger.warning(
                        "Session %s could not be settled yet: %r",
                        session_id,
                        error,
                        extra={"session": session_id, "rule": "P9"},
                    )
                else:
                    del self._sessions[session_id]
        return len(self._sessions) < before

    async def _settle(self, unsettled: Unsettled) -> None:
        outcome, steps = await self.backend.abort(unsettled.session)
        settler = Settler(self.connector, self.backend, unsettled.session, self.config)
        if outcome is Outcome.COMMITTED:
            await settler.settle(steps)
        else:
            await run_undos(unsettled.undos)
            await settler.settle(unsettled.undo, unsettled.tombstones)
