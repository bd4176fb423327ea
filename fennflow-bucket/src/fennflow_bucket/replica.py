"""A replica of the catalog: it appends to the log, and applies what others append.

It implements rules L1 to L4 of the design page `docs/design/009-catalog-in-the-bucket.md`.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    CatalogDivergedException,
    ConnectorUnavailableException,
    PreconditionFailedException,
)
from fennflow_bucket.clocks import SECOND, Moment, boot_time
from fennflow_bucket.commands import Command, Entry, PlanError, forget, note_writer
from fennflow_bucket.following import Limits, not_storable, position_after, start
from fennflow_bucket.loading import Loader
from fennflow_bucket.log import DAMAGE, LOG, Log, LogEntry
from fennflow_bucket.state import Position, State

ATTEMPTS = 6
"""How often an entry is sent and read back before its outcome is reported as unknown."""
PAUSE = 0.1
"""Seconds to wait after the first failed request; doubled after each further one."""
WRITER_TRUSTED = 86400.0
"""Seconds after which a writer no longer looks for its entry: the log may have removed it."""


@dataclass(slots=True, eq=False)
class _Pending:
    """A command that waits for its result."""

    command: Command
    answer: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class _Trial:
    """The result of running commands on this process's state, in a transaction that is still open.

    Args:
        answers: the result or the exception of each command.
        body: the bytes of the entry; None if there is nothing to append and no transaction is open.
        position: the position of the state if the entry is appended.
        waited: seconds from the first attempt to append these commands to this one.
    """

    answers: Sequence[tuple[_Pending, Any, Exception | None]]
    body: bytes | None
    position: Position
    waited: float = 0.0


_MINE, _UNTRUSTED = b"mine", b"untrusted"
"""Results of an attempt to create an entry."""


@dataclass(slots=True)
class _Doubts:
    """The unknowns of an entry that was sent, perhaps several times.

    Args:
        ambiguous: whether an attempt may have created it, or still may.
        failure: the last error.
        refused: why it was definitely refused, if no attempt can have created it.
    """

    ambiguous: bool = False
    failure: Exception | None = None
    refused: BaseConnectorException | None = None

    def note(self, error: Exception, *, ambiguous: bool) -> None:
        """Note how an attempt failed."""
        self.ambiguous = self.ambiguous or ambiguous
        self.failure = error


class _UnknownError(Exception):
    """It could not be found out whether an entry was appended."""


class Replica(Loader):
    """The state of a catalog, which it keeps up to date and changes.

    Args:
        log: the objects in the bucket.
        limits: the limits in the rules.
        lease: seconds that a lease lasts.
        late: seconds after which a write whose answer was lost can no longer arrive.
    """

    def __init__(self, log: Log, limits: Limits, *, lease: float, late: float) -> None:
        super().__init__(log, limits)
        self._lease = round(lease * SECOND)
        self._late = round(late * SECOND)
        self._probed = False
        self._writer = str(uuid4())
        self._seq = 0
        self._queue: list[_Pending] = []
        # When the entry at the end of the log was created, if it is one of this process.
        self._created: float | None = None

    async def run(self, command: Command) -> Any:
        """Append a command and return its answer (L1, L4).

        Raises:
            BackendUnavailableException: it is not known whether it was appended.
            Exception: raised by the command, which then was not appended.
        """
        self._check()
        pending = _Pending(command, asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        if self._appending is None or self._appending.done():
            self._appending = start(self._append_all())
        return await pending.answer

    async def _append_all(self) -> None:
        """Append the queued commands, batch by batch."""
        while self._queue:
            batch = self._queue[: self._limits.max_batch]
            del self._queue[: len(batch)]
            self._created = None
            try:
                async with self._turn:
                    await self._append(batch)
            except asyncio.CancelledError:
                batch += self._queue
                self._queue.clear()
                _fail(batch, self._unavailable("closed"))
                raise
            except _UnknownError as error:
                unknown = self._unavailable(error.__cause__)
                unknown.__cause__ = error.__cause__
                _fail(batch, unknown)
            except Exception as error:  # noqa: BLE001 - raised by the waiting calls
                _fail(batch, self._as_backend_error(error))
            else:
                await self._tend()

    async def _append(self, batch: list[_Pending]) -> None:
        """Append a batch and give each command its result.

        Raises:
            _UnknownError: it is not known whether they were appended.
            Exception: nothing was appended.
        """
        if not self._trusted:
            await self._load()
        sent: dict[int, _Trial] = {}
        began = Moment.now()
        while not await self._attempt(batch, sent, began):
            if began.age() > WRITER_TRUSTED:
                # The log may have removed this writer, and with it the information whether an entry
                # was applied.
                self._writer = str(uuid4())
                raise _UnknownError

    async def _attempt(self, batch: list[_Pending], sent: dict[int, _Trial], began: Moment) -> bool:
        """Try to append a batch once.

        Args:
            batch: the commands; those that were cancelled or do not fit are removed.
            sent: the entries of this batch that were sent, by number; a new one is added.
            began: when the first attempt began.

        Returns:
            whether all commands have their results.
        """
        pause = self._turns.pause(began.age() if sent else 0.0)
        if pause:
            await asyncio.sleep(pause)
        # A caller that was cancelled before an entry was sent no longer needs it.
        batch[:] = [each for each in batch if not each.answer.done()]
        if not batch:
            return True
        self._check()
        state = self._opened()
        waited = began.age() if sent else 0.0
        trial = await self._thread(lambda: self._try(state, batch, self._seq + 1, waited))
        if trial.body is None:
            # Commands that are refused or change nothing need no entry, if time and state were
            # current.
            current = not (await self._learn_time() or await self._advance())
            if current:
                _deliver(trial)
            return current
        if not await self._may_be_sent(trial.body, batch):
            return False
        self._seq += 1
        contended = bool(sent) or self._turns.contended
        sent[self._seq] = trial
        try:
            found = await self._create(trial.position.number, trial.body, contended=contended)
        except BaseConnectorException as error:
            await self._thread(state.rollback)
            if len(sent) > 1:
                raise _UnknownError from error  # an entry that was sent before may have arrived since
            raise
        except BaseException:
            await self._thread(state.rollback)
            raise
        if found is _MINE:
            self._created = boot_time()
            await self._thread(lambda: state.commit(trial.position))
            self._turns.won(trial.waited)
            _deliver(trial)
            return True
        await self._thread(state.rollback)
        return await self._arrived(found, sent)

    async def _may_be_sent(self, body: bytes, batch: list[_Pending]) -> bool:
        """Return whether an entry can be sent; if not, its trial is undone and has to be repeated.

        Args:
            body: of the entry.
            batch: loses its second half if the entry is too long.

        Raises:
            ConfigException: the store cannot hold a log (L13).
        """
        state = self._opened()
        if len(body) > self._limits.max_bytes and len(batch) > 1:
            await self._thread(state.rollback)
            half = len(batch) // 2
            self._queue[:0] = batch[half:]
            del batch[half:]
            return False
        if not self._probed:
            # Checked only now, since a process that appends nothing needs no permission to write.
            # The entry needs the store's time, which is known after that.
            await self._thread(state.rollback)
            await self._probe()
            return False
        return True

    async def _probe(self) -> None:
        await self._log.probe(self._clock.sample)
        self._probed = True

    async def learn_time(self) -> None:
        """Determine the store's time before a read that depends on it; appends do it, too (L10).

        Raises:
            BackendUnavailableException: the store cannot be reached.
        """
        try:
            async with self._turn:
                await self._learn_time()
        except Exception as error:
            raise self._as_backend_error(error) from error

    async def _learn_time(self) -> bool:
        """Determine the store's time, with the lock held; return whether it was unknown before."""
        if self._probed:
            return False
        try:
            await self._probe()
        except AccessDeniedException:
            return False  # a process that may not write changes nothing, so its own clock is sufficient
        return True

    async def _arrived(self, found: bytes, sent: Mapping[int, _Trial]) -> bool:
        """Apply entries of others; return whether an entry of this writer was among them.

        Args:
            found: what `_create` returned.
            sent: the entries that were sent, by number.

        Raises:
            _UnknownError: the log could not be read.
        """
        state = self._opened()
        try:
            if found is _UNTRUSTED:
                await self._load()
            else:
                await self._catch_up(found)
        except CatalogDivergedException:
            raise
        except Exception as error:
            raise _UnknownError from error
        counted = await self._thread(lambda: state.writer_seq(self._writer))
        if counted is None or counted not in sent:
            return False
        _deliver(sent[counted])
        return True

    async def _create(self, number: int, body: bytes, *, contended: bool) -> bytes:
        """Create an entry at a position, and find out whether it is there (L3).

        Args:
            number: the position.
            body: of the entry.
            contended: whether another writer is likely to be faster.

        Returns:
            `_MINE`; or the other entry that is there; or `_UNTRUSTED` if the last contact was so
            long ago that neither can be trusted.

        Raises:
            _UnknownError: it is not known whether it is there.
            BaseConnectorException: it was not created.
        """
        doubts = _Doubts()
        # An earlier attempt may have created it, so the position was free when the first one began.
        start = Moment.now()
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311
            there = await self._send(number, body, doubts, contended=contended)
            if not self._trusted:
                return _UNTRUSTED
            if there == body:
                self._met(start)
                if not attempt:
                    self._turns.round_trip += (start.age() - self._turns.round_trip) / 8
                return _MINE
            if there is not None:
                return there
        if doubts.failure is None or doubts.ambiguous:
            raise _UnknownError from doubts.failure
        raise doubts.failure

    async def _send(
        self, number: int, body: bytes, doubts: _Doubts, *, contended: bool
    ) -> bytes | None:
        """Send an entry, and return the entry that is at its position afterwards.

        Args:
            number: the position.
            body: of the entry.
            doubts: the unknowns of earlier attempts; those of this one are added.
            contended: whether to read the position meanwhile: if another writer was faster, its
                entry is known a round trip earlier, and all writers together append twice as fast.

        Returns:
            the entry; None if there is none, or it could not be read.

        Raises:
            BaseConnectorException: it was definitely refused, and no attempt can have created it.
        """
        reading: asyncio.Task[bytes | None] | None = None
        async with asyncio.TaskGroup() as group:
            if contended:
                reading = group.create_task(self._find(number, doubts))
            created = await self._sent(number, body, doubts)
        if created:
            return body
        if doubts.refused is not None:
            raise doubts.refused
        found = None if reading is None else reading.result()
        return found or await self._find(number, doubts)

    async def _sent(self, number: int, body: bytes, doubts: _Doubts) -> bool:
        """Send an entry; return whether it was definitely created."""
        try:
            await self._log.create(LOG, number, body)
        except PreconditionFailedException:
            return False
        except BaseConnectorException as error:
            doubts.note(error, ambiguous=error.ambiguous)
            if not doubts.ambiguous and not isinstance(error, ConnectorUnavailableException):
                doubts.refused = error
            return False
        except Exception as error:  # noqa: BLE001 - its outcome is read back
            doubts.note(error, ambiguous=True)
            return False
        return True

    async def _find(self, number: int, doubts: _Doubts) -> bytes | None:
        """Return the entry at a position; None if there is none, or it could not be read."""
        try:
            return await self._log.read(number)
        except Exception as error:  # noqa: BLE001 - tried again
            doubts.note(error, ambiguous=True)
            return None

    def _try(self, state: State, batch: Sequence[_Pending], seq: int, waited: float) -> _Trial:
        """Run commands on this process's state, in a transaction that is left open for their entry."""
        position = state.position
        now = max(position.time, self._clock.now())
        context = Entry(state.writing, now, self._lease, self._late)
        answers: list[tuple[_Pending, Any, Exception | None]] = []
        kept: list[Command] = []
        state.begin()
        try:
            forget(context)
            for pending in batch:
                changes = state.writing.total_changes
                try:
                    with state.savepoint():
                        result = pending.command.run(context)
                except sqlite3.Error:
                    raise
                except PlanError as error:
                    answers.append((pending, None, error.raised))
                    continue
                except UnicodeEncodeError as error:
                    answers.append((pending, None, not_storable(error)))
                    continue
                except DAMAGE as error:
                    raise self.unreadable(error) from error
                except Exception as error:  # noqa: BLE001 - raised by the waiting call
                    answers.append((pending, None, error))
                    continue
                answers.append((pending, result, None))
                if state.writing.total_changes != changes:
                    kept.append(pending.command)
            if not kept:
                state.rollback()
                return _Trial(answers, None, position)
            note_writer(context, self._writer, seq)
            body = LogEntry(
                position=position.number + 1,
                writer=self._writer,
                seq=seq,
                at=now,
                digest=position.digest,
                lease=self._lease,
                late=self._late,
                waited=round(waited * SECOND),
                commands=[(each.name, each.arguments) for each in kept],
            ).dump()
        except BaseException:
            state.rollback()
            raise
        return _Trial(answers, body, position_after(position, state.digest, now, body), waited)

    async def _tend(self) -> None:
        """Do the work that is due after a batch."""
        # An earlier entry does not show the present time: the log may have been idle.
        if self._created is not None and self._clock.due:
            with suppress(BaseConnectorException):
                stored = await self._log.head(self.position.number)
                if stored is not None and stored.modified_at is not None:
                    self._clock.sample(stored.modified_at.timestamp(), self._created)
        # Objects are deleted after a snapshot if they are old by the store's clock (L8).
        if not self._probed or not self._snapshot_due:
            return
        if self._tidying is None or self._tidying.done():
            self._tidying = start(self._tidy())


def _deliver(trial: _Trial) -> None:
    for pending, result, error in trial.answers:
        if pending.answer.done():
            continue  # the waiting task was cancelled
        if error is None:
            pending.answer.set_result(result)
        else:
            pending.answer.set_exception(error)


def _fail(batch: Sequence[_Pending], error: Exception) -> None:
    for pending in batch:
        if not pending.answer.done():
            pending.answer.set_exception(error)
