"""Leases: how long this process may act for a session (P22, P23, P25)."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fennflow.backends import Intent, ObjectKey, Record, SessionToken
from fennflow.engine.concurrency import Periodic
from fennflow.engine.telemetry import tell
from fennflow.exceptions import SessionLostException

if TYPE_CHECKING:
    from fennflow.backends import Backend

MARGIN = 1 / 6
"""Of the lease's length: what a request may take from the check to the wire."""
_COUNTS_SUSPENSION: int | None = getattr(time, "CLOCK_BOOTTIME", None)
if sys.platform == "darwin":
    _COUNTS_SUSPENSION = time.CLOCK_MONOTONIC  # not what `time.monotonic` reads there


def clock() -> float:
    """Return the running loop's time, which includes the time for which the machine was suspended.

    A laptop that wakes up, or a virtual machine that is resumed, may have lost its leases meanwhile;
    the loop's own clock stood still on Linux and macOS.
    """
    return asyncio.get_running_loop().time() + suspended()


def suspended() -> float:
    """Return the seconds for which the machine was suspended, from some fixed point on."""
    if _COUNTS_SUSPENSION is None:
        return 0.0  # the clock of Windows counts them
    return round(time.clock_gettime(_COUNTS_SUSPENSION) - time.monotonic(), 3)


@dataclass(slots=True)
class Lease:
    """The right of this process to act for one session.

    Args:
        token: the session's id, and the fencing token under which it is held.
        until: when it ends, by `clock`. The backend's clock decides when others
            may take over; this one started earlier and ends earlier (P23).
        since: when it was first held, by `clock`, until it was told that this is long ago.
    """

    token: SessionToken
    until: float = float("inf")
    since: float | None = None

    def check(self) -> None:
        """Refuse to send anything once the lease may have run out (P23).

        Raises:
            SessionLostException: it may have, or it was released.
        """
        if clock() >= self.until:
            message = (
                f"Session {self.token.session_id} could not renew its lease in time, so it may be "
                "recovery's now. Run the unit of work again."
            )
            raise SessionLostException(message)


@dataclass(slots=True)
class Leases:
    """The leases that an engine holds, renewed while it holds them.

    Args:
        backend: where the sessions are journaled.
        ttl: seconds that a lease runs.
        long: seconds after which it is logged that a session is still open.
    """

    backend: Backend
    ttl: float
    long: float
    _held: dict[str, Lease] = field(default_factory=dict[str, Lease])
    _heart: Periodic = field(init=False)

    def __post_init__(self) -> None:
        self._heart = Periodic(self.ttl / 3, self._beat)

    async def stage(
        self,
        lease: Lease,
        keys: Collection[ObjectKey],
        plan: Callable[[Mapping[ObjectKey, Record]], Sequence[Intent]],
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        """Stage, and hold the lease that the session has from then on."""
        started = clock()
        records = await self.backend.stage(lease.token, keys, plan, begins=begins)
        self.hold(lease, started)
        return records

    def hold(self, lease: Lease, started: float) -> None:
        """Renew a lease until it is released.

        Args:
            lease: of a session in the journal.
            started: when the call that gave or renewed it began, by `clock`.
        """
        lease.until = started + self.ttl * (1 - MARGIN)
        if lease.token.session_id not in self._held:
            lease.since = started
        self._held[lease.token.session_id] = lease
        self._heart.start()

    def release(self, lease: Lease) -> None:
        """End a lease: its session is settled, or another owner's. Nothing is sent for it now."""
        lease.until = float("-inf")
        self._held.pop(lease.token.session_id, None)

    async def aclose(self) -> None:
        """Renew nothing any more."""
        await self._heart.aclose()

    async def _beat(self) -> bool:
        held = list(self._held.values())
        started = clock()
        try:
            async with asyncio.timeout(self.ttl / 3):
                kept = set(await self.backend.heartbeat([lease.token for lease in held]))
        except Exception as error:  # noqa: BLE001 - tried again; a lease that runs out is noticed
            tell(logging.WARNING, "Leases could not be renewed: %r", error, rule="P22")
            return True
        for lease in held:
            if lease.token in kept:
                lease.until = started + self.ttl * (1 - MARGIN)
                self._tell_long(lease, started)
            elif lease.until <= started:
                self.release(lease)  # P25: settled, or another process's, or not renewed in time
        return bool(self._held)

    def _tell_long(self, lease: Lease, now: float) -> None:
        """Log once that a session holds its paths for long."""
        if lease.since is None or now - lease.since < self.long:
            return
        message = "Session %s has not ended for %.0f s; what it writes stays locked for others until it has"
        session = lease.token.session_id
        tell(logging.WARNING, message, session, now - lease.since, rule="P6", session=session)
        lease.since = None
