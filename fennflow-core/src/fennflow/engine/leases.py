"""Leases: how long this process may act for a transaction (P22, P23, P25)."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fennflow.backends import Intent, ObjectKey, Record, TransactionToken
from fennflow.engine.concurrency import Periodic
from fennflow.engine.deadlocks import Waits
from fennflow.exceptions import TransactionLostException
from fennflow.telemetry import log_event

if TYPE_CHECKING:
    from fennflow.backends import Backend

LEASE_MARGIN = 1 / 6
"""The share of a lease that is reserved for the time from the check to the sending of a request."""
_COUNTS_SUSPENSION: int | None = getattr(time, "CLOCK_BOOTTIME", None)
if sys.platform == "darwin":
    _COUNTS_SUSPENSION = time.CLOCK_MONOTONIC  # `time.monotonic` reads another clock there


def clock() -> float:
    """Return the running loop's time, which includes the time for which the machine was suspended.

    A laptop that wakes up, or a virtual machine that is resumed, may have lost its leases in the
    meantime; on Linux and macOS the loop's own clock stands still during that time.
    """
    return asyncio.get_running_loop().time() + suspended()


def suspended() -> float:
    """Return for how many seconds the machine was suspended, since some fixed point in time."""
    if _COUNTS_SUSPENSION is None:
        return 0.0  # the clock on Windows includes them
    return round(time.clock_gettime(_COUNTS_SUSPENSION) - time.monotonic(), 3)


@dataclass(slots=True)
class Lease:
    """The right of this process to act for one transaction.

    Args:
        token: the transaction's id, and the fencing token under which it is held.
        until: when it ends, by `clock`. The backend's clock decides when others
            may take over; this one started earlier and ends earlier (P23).
        since: when it was first held, by `clock`; None once a long hold was logged.
    """

    token: TransactionToken
    until: float = float("inf")
    since: float | None = None

    @property
    def held(self) -> bool:
        """Whether it cannot have run out, so that no other process acts for the transaction (P23)."""
        return clock() < self.until

    def check(self) -> None:
        """Refuse to send anything once the lease may have run out (P23).

        Raises:
            TransactionLostException: it may have, or it was released.
        """
        if not self.held:
            message = (
                f"Transaction {self.token.transaction_id} could not renew its lease in time, so another "
                "process may be rolling it back. Nothing was committed; run the unit of work again."
            )
            raise TransactionLostException(message)


@dataclass(slots=True)
class Leases:
    """The leases that an engine holds; renews them.

    Args:
        backend: where the transactions are journaled.
        ttl: seconds that a lease lasts.
        waits: the waits of their transactions for locks.
        long: seconds after which a transaction that is still open is logged.
    """

    backend: Backend
    ttl: float
    long: float
    waits: Waits = field(default_factory=Waits)
    _held: dict[str, Lease] = field(default_factory=dict[str, Lease])
    _heart: Periodic = field(init=False)

    def __post_init__(self) -> None:
        self._heart = Periodic(self.ttl / 3, self._beat)

    async def begin_writes(
        self,
        lease: Lease,
        keys: Collection[ObjectKey],
        plan: Callable[[Mapping[ObjectKey, Record]], Sequence[Intent]],
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        """Begin writes, and hold the lease that the transaction has from then on."""
        started = clock()
        records = await self.backend.begin_writes(lease.token, keys, plan, begins=begins)
        self.hold(lease, started)
        return records

    def hold(self, lease: Lease, started: float) -> None:
        """Renew a lease until it is released.

        Args:
            lease: of a transaction in the journal.
            started: when the call that created or renewed it began, by `clock`.
        """
        lease.until = started + self.ttl * (1 - LEASE_MARGIN)
        if lease.token.transaction_id not in self._held:
            lease.since = started
        self._held[lease.token.transaction_id] = lease
        self._heart.start()

    def release(self, lease: Lease) -> None:
        """End a lease: its transaction is finished, or another owner's. Nothing more is sent for it."""
        lease.until = float("-inf")
        if self._held.get(lease.token.transaction_id) is lease:  # not another lease that took over
            del self._held[lease.token.transaction_id]

    async def aclose(self) -> None:
        """Stop renewing leases."""
        await self._heart.aclose()

    async def _beat(self) -> bool:
        held = list(self._held.values())
        started = clock()
        if self._heart.late >= self.ttl / 2:
            log_event(
                logging.WARNING,
                "The event loop was blocked for %.1f s, so no lease could be renewed. Of %d open "
                "transactions, those whose lease of %.0f s ran out are lost. Run blocking calls in "
                "asyncio.to_thread, or raise lease_ttl",
                self._heart.late,
                len(held),
                self.ttl,
                rule="P22",
            )
        try:
            async with asyncio.timeout(self.ttl / 3):
                kept = set(await self.backend.heartbeat([lease.token for lease in held]))
        except Exception as error:  # noqa: BLE001 - tried again; a lease that runs out is noticed
            log_event(logging.WARNING, "Leases could not be renewed: %r", error, rule="P22")
            return True
        for lease in held:
            if self._held.get(lease.token.transaction_id) is not lease:
                continue  # it was released in the meantime
            if lease.token in kept:
                lease.until = started + self.ttl * (1 - LEASE_MARGIN)
                self._log_long_open(lease, started)
            elif lease.until <= started:
                self.release(lease)  # P25: finished, taken over, or not renewed in time
        return bool(self._held)

    def _log_long_open(self, lease: Lease, now: float) -> None:
        """Log once that a transaction has locked its paths for a long time."""
        if lease.since is None or now - lease.since < self.long:
            return
        message = "Transaction %s has been open for %.0f s; its files stay locked until it ends"
        transaction = lease.token.transaction_id
        log_event(
            logging.WARNING,
            message,
            transaction,
            now - lease.since,
            rule="P6",
            transaction=transaction,
        )
        lease.since = None
