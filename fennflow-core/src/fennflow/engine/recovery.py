"""Recovery: sessions that their owners could not settle are settled all the same (section 6).

Of this process's own sessions, those that could not be settled at their end are kept here with
all that is known of them, and their leases held, until store and backend are back (P9). Those of
processes that died are claimed when their lease has run out (P24), with what the journal says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace

from fennflow.backends import (
    Decision,
    JoinedTransaction,
    JournaledSession,
    Outcome,
    Placement,
    Step,
    Tombstone,
)
from fennflow.engine.callbacks import Aftermaths, Callbacks
from fennflow.engine.concurrency import Periodic, run_all
from fennflow.engine.finish import finish
from fennflow.engine.garbage import bury, sweep
from fennflow.engine.leases import Lease, clock
from fennflow.engine.parts import Parts, Progress
from fennflow.engine.plan import Write, outstanding, tombstones, undo
from fennflow.engine.settle import Settler
from fennflow.engine.stuck import unfinished
from fennflow.engine.telemetry import count_recovered, tell, with_notes
from fennflow.exceptions import CommitUncertainException, SessionLostException
from fennflow.reports import RecoveryReport

CLAIMED_AT_ONCE = 100
SETTLED_AT_ONCE = 8
PATIENCE = 0.5
"""Seconds to wait for an open transaction that holds a decision (P5)."""
LOOK_EVERY = 0.05
"""Seconds between two looks whether a user's transaction that holds a decision has ended."""
MOST_DOUBLINGS = 3
"""Of `recovery_interval`, as the pause after one more attempt that failed."""


@dataclass(slots=True, kw_only=True)
class Unsettled:
    """A session that could not be settled.

    Args:
        lease: which one, and the right to act for it.
        undo: the steps of its compensation, for the case that it is not decided `committed`.
        tombstones: what compensation leaves in doubt.
        callbacks: the user's own saga steps and callbacks, as far as they wait for the outcome.
        joined: the user's transaction that holds the decision until it ends, if there is one.
        claimed: whether its owner was another one, who had begun to settle it.
        progress: of earlier attempts.
        failures: how many attempts of recovery have failed.
        due: when the next one may begin, by the loop's clock.
    """

    lease: Lease
    undo: Sequence[Step]
    tombstones: Sequence[Tombstone]
    callbacks: Callbacks = field(default_factory=Callbacks)
    joined: JoinedTransaction | None = None
    claimed: bool = False
    progress: Progress = field(default_factory=Progress)
    failures: int = 0
    due: float = 0.0

    @property
    def waits(self) -> bool:
        """Whether nothing can be done yet, since the user's transaction is open."""
        return self.joined is not None and not self.joined.ended

    def tombstones_of(self, decision: Decision) -> Sequence[Tombstone]:
        """Return what is to be written for a decision; the pivot of a commit has written its own."""
        return () if decision.outcome is Outcome.COMMITTED else self.tombstones


@dataclass(slots=True)
class Recovery:
    """Settles what is left, when an engine is first used, at intervals and on demand (P26).

    Args:
        parts: of the engine.
        namespaces: whose reserved prefix the sweep looks through (P27).
        aftermaths: of sessions that have ended.
    """

    parts: Parts
    namespaces: set[str] = field(default_factory=set[str])
    aftermaths: Aftermaths = field(default_factory=Aftermaths)
    _own: dict[str, Unsettled] = field(default_factory=dict[str, Unsettled])
    _sweep_due: float = 0.0
    _working: asyncio.Lock = field(default_factory=asyncio.Lock)
    _turns: Periodic = field(init=False)
    _looks: Periodic = field(init=False)

    def __post_init__(self) -> None:
        self._turns = Periodic(self.parts.config.recovery_interval, self._turn)
        self._looks = Periodic(LOOK_EVERY, self._look)

    def start(self) -> None:
        """Run at once in the background, and from then on at intervals."""
        # Nobody who is only passing by pays for the requests of a sweep.
        self._sweep_due = asyncio.get_running_loop().time() + self.parts.config.doubt_period
        self._turns.start(delay=0.0)

    async def aclose(self) -> None:
        """Try the own sessions once more; what is left then is other processes' to claim."""
        await self._turns.aclose()
        await self._looks.aclose()
        await self.settle(now=True)
        await self.aftermaths.aclose(self.parts.config.compensation_timeout)

    def add(self, unsettled: Unsettled) -> None:
        """Take over a session of this process; the next attempt is due at once."""
        self._own[unsettled.lease.token.session_id] = unsettled
        if unsettled.joined is not None:
            self._looks.start()

    async def settle(self, *, now: bool = False) -> bool:
        """Try to settle this process's own sessions; what fails is logged, and tried again later.

        The caller waits for `compensation_timeout` at most; what is done by then stays done.

        Args:
            now: whether to try although an attempt failed a moment ago.

        Returns:
            whether any was settled, so that locks are free.
        """
        if not self._own or self._working.locked():
            return False
        async with self._working:
            try:
                async with asyncio.timeout(self.parts.config.compensation_timeout):
                    return bool(await self._settle_own(now=now))
            except TimeoutError as error:
                for each in self._own.values():
                    self._postpone(each, error)
                return False

    async def free_locks(self) -> bool:
        """Settle what is due: another session waits for a lock.

        Returns:
            whether any session was settled.
        """
        if self._working.locked():
            return False
        async with self._working:
            own = await self._settle_own()
            return any([*own, *await self._settle_claimed()])

    async def run(self, namespaces: Collection[str]) -> RecoveryReport:
        """Settle, bury and sweep everything that is due.

        Args:
            namespaces: to sweep, besides those that the engine has used.
        """
        self.namespaces.update(namespaces)
        async with self._working:
            report = await self._run(sweeping=True, now=True)
        # Others may hold the lease of what fails, so that no attempt of this one says so.
        left = await unfinished(self.parts.backend)
        pending = max(report.pending, len(left))
        return replace(report, pending=pending, problems=(*report.problems, *left))

    async def _turn(self) -> bool:
        try:
            async with self._working:
                await self._run(sweeping=asyncio.get_running_loop().time() >= self._sweep_due)
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            tell(
                logging.WARNING,
                "Recovery failed, and will be tried again: %r",
                error,
                rule="P26",
            )
        return True

    async def _look(self) -> bool:
        """Settle sessions whose joined transaction has ended; go on while there are such."""
        if not all(each.waits for each in self._joined()):
            await self.settle()
        return bool(self._joined())

    def _joined(self) -> Sequence[Unsettled]:
        return [each for each in self._own.values() if each.joined is not None]

    async def _run(self, *, sweeping: bool, now: bool = False) -> RecoveryReport:
        outcomes = [*await self._settle_own(now=now), *await self._settle_claimed()]
        problems: list[str] = []
        report = RecoveryReport(
            rolled_forward=outcomes.count(Outcome.COMMITTED),
            compensated=outcomes.count(Outcome.ABORTED),
            pending=outcomes.count(None) + len(self._own),
            buried=await bury(self.parts, problems),
        )
        if sweeping:
            self._sweep_due = asyncio.get_running_loop().time() + self.parts.config.doubt_period
            for namespace in sorted(self.namespaces):
                objects, uploads = await sweep(self.parts, namespace, problems)
                report = replace(
                    report, swept=report.swept + objects, uploads=report.uploads + uploads
                )
        report = replace(report, problems=tuple(problems))
        if report != RecoveryReport():
            tell(logging.INFO, "Recovered: %s", report, rule="P24")
            count_recovered({**asdict(report), "problems": len(problems)})
        return report

    async def _settle_own(self, *, now: bool = False) -> list[Outcome]:
        clock = asyncio.get_running_loop().time()
        due = [each for each in self._own.values() if not each.waits and (now or each.due <= clock)]
        outcomes = await run_all(SETTLED_AT_ONCE, self._try_own, due)
        return [outcome for outcome in outcomes if outcome is not None]

    async def _try_own(self, unsettled: Unsettled) -> Outcome | None:
        """Settle a session of this process; None if it has to wait."""
        session_id = unsettled.lease.token.session_id
        try:
            outcome = await self._settle(unsettled)
        except SessionLostException as error:
            # P25: it is another owner's now. How it was decided is asked once more for the callbacks.
            self.parts.leases.release(unsettled.lease)
            if unsettled.callbacks:
                self._postpone(unsettled, error)
            else:
                del self._own[session_id]
            return None
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            self._postpone(unsettled, error)
            return None
        del self._own[session_id]
        return outcome

    def _postpone(self, unsettled: Unsettled, error: Exception) -> None:
        """Try again later, and later each time: what fails may need a person."""
        # What another transaction keeps from a decision is looked at again soon.
        held = unsettled.joined is not None and isinstance(error, CommitUncertainException)
        pause = self.parts.config.recovery_interval * 2 ** min(unsettled.failures, MOST_DOUBLINGS)
        unsettled.due = asyncio.get_running_loop().time() + (LOOK_EVERY if held else pause)
        unsettled.failures += not held
        _log_pending(unsettled, error)

    async def _settle_claimed(self) -> list[Outcome | None]:
        """Claim sessions whose owner is gone, and roll them forward or compensate them (P24).

        Returns:
            how each was decided; None of those that have to wait.
        """
        outcomes: list[Outcome | None] = []
        seen: set[str] = set()
        while True:
            started = clock()
            claimed = await self.parts.backend.claim(CLAIMED_AT_ONCE)
            new = [each for each in claimed if each.session.session_id not in seen]
            if not new:
                return outcomes
            seen.update(each.session.session_id for each in new)
            leases = [Lease(each.session) for each in new]
            for lease in leases:
                self.parts.leases.hold(lease, started)
            outcomes += await run_all(
                SETTLED_AT_ONCE, self._take_over, zip(leases, new, strict=True)
            )

    async def _take_over(self, claimed: tuple[Lease, JournaledSession]) -> Outcome | None:
        """Settle a session that was claimed; None if it has to wait."""
        lease, found = claimed
        # An owner that had decided nothing has sent nothing to undo its work, nor to apply it.
        decided = found.outcome is not None
        unsettled = Unsettled(lease=lease, undo=(), tombstones=(), claimed=decided)
        # Nothing is known of how far the owner got: every write counts as done and as in doubt.
        writes = [
            Write(intent=intent, sent=True, doubtful=True)
            for intent in found.intents
            if intent.placement is not Placement.DELETE
        ]
        # If this was the upload of the bytes themselves, a copy has nothing to abort.
        unsettled.progress.uploads = {
            intent.seq: intent.upload_id for intent in found.intents if intent.upload_id is not None
        }
        try:
            capabilities = {
                namespace: await self.parts.connector.capabilities(namespace)
                for namespace in {write.intent.namespace for write in writes}
            }
            unsettled.undo = undo(writes, capabilities)
            unsettled.tombstones = tombstones(found.session.session_id, writes)
            return await self._settle(unsettled)
        except SessionLostException:
            return None
        except Exception as error:  # noqa: BLE001 - logged, and claimed again when it has expired
            _log_pending(unsettled, error)
            return None
        finally:
            self.parts.leases.release(lease)

    async def _settle(self, unsettled: Unsettled) -> Outcome:
        """Finish what the journal says is left, and call back once the outcome is known."""
        lease = unsettled.lease
        decision = await self.parts.backend.abort(lease.token, patience=PATIENCE)
        try:
            if decision.finished:
                self.parts.leases.release(lease)
            else:
                settler = Settler(
                    self.parts, lease, claimed=unsettled.claimed, progress=unsettled.progress
                )
                await finish(
                    settler,
                    outstanding(decision, unsettled.undo),
                    unsettled.tombstones_of(decision),
                    keys=decision.keys,
                )
        finally:
            callbacks, unsettled.callbacks = unsettled.callbacks, Callbacks()
            if callbacks:
                self.aftermaths.start(callbacks, decision.outcome, lease.token.session_id)
        return decision.outcome


def _log_pending(unsettled: Unsettled, error: Exception) -> None:
    session_id = unsettled.lease.token.session_id
    waiting = isinstance(error, CommitUncertainException)
    tell(
        logging.INFO if waiting else logging.WARNING,
        "Session %s could not be settled yet: %s: %s",
        session_id,
        type(error).__name__,
        with_notes(error),
        rule="P5" if waiting else "P9",
        session=session_id,
    )
