"""The part of a replica that follows the log: it applies what others append (design 009).

It implements rules L5, L9, L10 and L12.
"""

from __future__ import annotations

import asyncio
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fennflow.exceptions import (
    BackendUnavailableException,
    BaseBackendException,
    CatalogDivergedException,
    ConnectorUnavailableException,
    FennFlowException,
)
from fennflow.printable import brief
from fennflow.threads import Threads
from fennflow_bucket.cache import remove
from fennflow_bucket.clocks import SECOND, Moment, StoreClock
from fennflow_bucket.commands import COMMANDS, Entry, forget, note_writer, seq_of
from fennflow_bucket.log import DAMAGE, LOG, Log, load_entry
from fennflow_bucket.state import Position, State
from fennflow_bucket.turns import Turns

if TYPE_CHECKING:
    from sqlite3 import Connection

R = TypeVar("R")

READ_AT_ONCE = 32
CLOSING = 30.0
"""Seconds for which closing waits for an unfinished snapshot."""


def not_storable(error: UnicodeEncodeError) -> BaseBackendException:
    """Return the error for a text of a caller that no state can hold: the state itself is intact."""
    message = (
        f"{brief(error.object)} has a lone surrogate, which no catalog holds. Nothing was changed."
    )
    return BaseBackendException(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits in the design's rules.

    Args:
        retention: the age in seconds of a snapshot at which the objects that it replaces are
            deleted (L8).
        trusted: seconds for which a contact is trusted (L5).
        max_staleness: seconds for which reads need no request (L9).
        max_batch: commands that share an entry (L4).
        max_bytes: the largest size of an entry with several commands (L4).
        snapshot_bytes: the size of the log after which a snapshot is written (L7).
        snapshot_entries: the number of entries after which a snapshot is written.
    """

    retention: float = 1920.0
    trusted: float = 300.0
    max_staleness: float = 0.0
    max_batch: int = 256
    max_bytes: int = 4 << 20
    snapshot_bytes: int = 1 << 20
    snapshot_entries: int = 10_000


class Follower(ABC):
    """The state of a catalog, kept up to date.

    Args:
        log: the objects in the bucket.
        limits: the limits in the rules.
    """

    def __init__(self, log: Log, limits: Limits) -> None:
        self._log = log
        self._limits = limits
        self._clock = StoreClock()
        self._turns = Turns()
        self._threads = Threads(max_workers=1, thread_name_prefix="fennflow-bucket")
        self._state: State | None = None
        self._contact: Moment | None = None
        # Held while entries are applied, and from the trial of an entry to its outcome.
        self._turn = asyncio.Lock()
        self._readers: list[asyncio.Future[None]] = []
        self._looking: asyncio.Task[None] | None = None
        self._appending: asyncio.Task[None] | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._diverged: CatalogDivergedException | None = None
        self._closed = False

    @abstractmethod
    async def _load(self, *, opening: bool = False) -> None:
        """Bring the state up to date, however old it is; call it with the lock held (L6).

        Raises:
            BackendUnavailableException: the log changed faster than it could be read.
            CatalogDivergedException: it is not the log that this process has read before, or it is
                damaged.
        """

    # --- what the backend calls --------------------------------------------------------------

    async def open(self, path: Path, *, kept: bool) -> None:
        """Load the catalog into a local file.

        Args:
            path: of the file; its content is used if it belongs to this catalog.
            kept: whether it outlives the process.

        Raises:
            BackendUnavailableException: the store cannot be reached.
        """
        self._state = await self._thread(partial(_open_state, path, kept=kept))
        try:
            async with self._turn:
                await self._load(opening=True)
        except Exception as error:
            raise self._as_backend_error(error) from error

    async def aclose(self) -> None:
        """Stop, and close the local file."""
        self._closed = True
        if self._tidying is not None and not self._tidying.done():
            await asyncio.wait({self._tidying}, timeout=CLOSING)
        tasks = [
            task
            for task in (self._appending, self._looking, self._tidying)
            if task is not None and not task.done()
        ]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._state is not None:
            await self._thread(self._state.close)
        self._threads.shutdown(wait=False)

    async def read(self, work: Callable[[Connection], R], *, current: bool = True) -> R:
        """Read the local state.

        Args:
            work: runs statements in the thread of the state.
            current: whether the state must not be older than the call (L9).

        Raises:
            BackendUnavailableException: the store cannot be reached.
            BaseBackendException: a text that is asked for cannot be in a catalog.
            CatalogDivergedException: there is a row that FennFlow did not write.
        """
        self._check()
        if current:
            await self._current(self._limits.max_staleness)
        state = self._opened()
        try:
            return await self._thread(lambda: work(state.reading))
        except UnicodeEncodeError as error:
            raise not_storable(error) from error
        except DAMAGE as error:
            raise self.unreadable(error) from error

    def now(self) -> int:
        """Return the log's time, in microseconds (L10)."""
        return max(self._clock.now(), self._opened().position.time)

    @property
    def position(self) -> Position:
        """The position of the state in the log."""
        return self._opened().position

    async def meta(self, name: str) -> str | None:
        """Return a fixed value of the catalog, its `catalog_id` or its `ticket_key`, if it has one."""
        state = self._opened()
        return await self._thread(lambda: state.meta(name))

    # --- state and trust ---------------------------------------------------------------------

    def _check(self) -> None:
        if self._diverged is not None:
            raise self._diverged
        if self._closed:
            message = f"The catalog in {self._log.namespace} is closed. Nothing was done."
            raise BackendUnavailableException(message)

    def _opened(self) -> State:
        assert self._state is not None  # noqa: S101 - nothing is called before `open`
        return self._state

    async def _thread(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @property
    def _trusted(self) -> bool:
        """Whether the known end of the log can still be trusted (L5)."""
        return self._contact is not None and self._contact.age() <= self._limits.trusted

    def _met(self, start: Moment) -> None:
        """Note that a request, which began at a moment, found the next position free (L5)."""
        if self._contact is None or start > self._contact:
            self._contact = start

    def _diverge(self, position: int, reason: str) -> CatalogDivergedException:
        name = f"{self._log.namespace}/{self._log.name(LOG, position)}"
        message = (
            f"{name} does not continue the state of this process: {reason}. Either the log was "
            "changed by something other than FennFlow, or this is a bug of FennFlow. This process "
            "no longer uses it, and has changed nothing. Keep a copy of the bucket, restart the "
            "process, and report it if it happens again."
        )
        self._diverged = CatalogDivergedException(message)
        return self._diverged

    def unreadable(self, error: Exception) -> CatalogDivergedException:
        """Return the error for a row of the state that is not one of FennFlow's."""
        return self._diverge(self.position.number, f"a row cannot be read ({error!r})")

    # --- reading (L9) ------------------------------------------------------------------------

    async def _current(self, allowed: float = 0.0) -> None:
        """Bring the state up to date as far as required.

        Args:
            allowed: the largest age of the last contact in seconds; if it is older, the log is read
                again.
        """
        contact = self._contact
        if allowed and contact is not None and contact.age() <= allowed:
            return
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers.append(waiting)
        if self._looking is None or self._looking.done():
            self._looking = start(self._look_all())
        await waiting

    async def _look_all(self) -> None:
        """Look for new entries for the waiting reads; later reads wait for the next look."""
        while self._readers:
            readers, self._readers = self._readers, []
            try:
                await self._look()
            except asyncio.CancelledError:
                _answer(readers, error=self._unavailable("closed"))
                raise
            except Exception as error:  # noqa: BLE001 - raised by the waiting calls
                _answer(readers, error=self._as_backend_error(error))
            else:
                _answer(readers)

    async def _look(self) -> None:
        """Bring the state up to a moment after the call."""
        after = self.position.number
        start = Moment.now()
        body = await self._log.read(after + 1)
        if body is None and self._trusted:
            self._met(start)
            return
        async with self._turn:
            if not self._trusted:
                await self._load()
            elif body is not None and self.position.number == after:
                await self._catch_up(body)
            else:
                await self._advance()

    async def _advance(self) -> bool:
        """Apply new entries, with the lock held; return whether there were any."""
        start = Moment.now()
        body = await self._log.read(self.position.number + 1)
        if not self._trusted:
            await self._load()
            return True
        if body is None:
            self._met(start)
            return False
        await self._catch_up(body)
        return True

    async def _catch_up(self, body: bytes) -> None:
        """Apply the entry after the state and those that follow it, in growing batches."""
        bodies, width = [body], 1
        while bodies:
            await self._apply(bodies)
            if len(bodies) < width:
                return
            width = min(2 * width, READ_AT_ONCE)
            start = Moment.now()
            bodies = await self._read_many(self.position.number + 1, width)
            if not self._trusted:
                await self._load()
                return
            if len(bodies) < width:
                self._met(start)

    async def _read_many(self, first: int, count: int) -> list[bytes]:
        """Return consecutive entries, up to the first that does not exist.

        Raises:
            Exception: the first exception of a read.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._log.read(position))
                    for position in range(first, first + count)
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        bodies: list[bytes] = []
        for task in tasks:
            body = task.result()
            if body is None:
                break
            bodies.append(body)
        return bodies

    async def _apply(self, bodies: Sequence[bytes]) -> None:
        state = self._opened()
        await self._thread(lambda: self._replay(state, bodies))

    def _replay(self, state: State, bodies: Sequence[bytes]) -> None:
        """Apply entries to the state, in one transaction.

        Raises:
            CatalogDivergedException: one of them was made for another state (L12).
        """
        position = state.position
        state.begin()
        try:
            for body in bodies:
                position = self._replay_one(state, position, body)
        except BaseException:
            state.rollback()
            raise
        state.commit(position)

    def _replay_one(self, state: State, position: Position, body: bytes) -> Position:
        number = position.number + 1
        try:
            return self._replayed(state, position, body)
        except DAMAGE as error:
            reason = f"it is not an entry of this log ({error!r})"
            raise self._diverge(number, reason) from error

    def _replayed(self, state: State, position: Position, body: bytes) -> Position:
        number = position.number + 1
        entry = load_entry(body, self._log.name(LOG, number))
        if entry.position != number:
            raise self._diverge(number, f"it was written for position {entry.position}")
        if entry.digest != state.digest:
            raise self._diverge(number, "it was written for a state with other rows")
        now = max(position.time, entry.at)
        context = Entry(state.writing, now, entry.lease, entry.late)
        forget(context)
        if seq_of(context, entry.writer) < entry.seq:
            for name, arguments in entry.commands:
                try:
                    COMMANDS[name](context, arguments, None)
                except FennFlowException as error:
                    raise self._diverge(number, f"its command {name!r} fails: {error!r}") from error
            note_writer(context, entry.writer, entry.seq)
        self._turns.saw(entry.waited / SECOND)
        return position_after(position, state.digest, now, body)

    # --- errors ------------------------------------------------------------------------------

    def _unavailable(self, reason: object) -> BackendUnavailableException:
        message = (
            f"The catalog {self._log.namespace}/{self._log.root} could not be reached: {reason}. "
            "Operations in progress may or may not have been done."
        )
        return BackendUnavailableException(message)

    def _as_backend_error(self, error: Exception) -> Exception:
        """Return the exception that callers get for a failed request."""
        if isinstance(error, FennFlowException) and not isinstance(
            error, ConnectorUnavailableException
        ):
            return error
        unavailable = self._unavailable(f"{type(error).__name__}: {error}")
        unavailable.__cause__ = error
        return unavailable


def _open_state(path: Path, *, kept: bool) -> State:
    """Open a local file; if it cannot be used, create it again from the bucket."""
    try:
        return State(path, kept=kept)
    except sqlite3.DatabaseError:
        remove(path)
        return State(path, kept=kept)


def position_after(position: Position, digest: int, now: int, body: bytes) -> Position:
    """Return the position after an entry."""
    return replace(
        position,
        number=position.number + 1,
        digest=digest,
        time=now,
        last=sha256(body).hexdigest(),
        log_bytes=position.log_bytes + len(body),
    )


def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a task that outlives its request, without the request's context variables."""
    return asyncio.get_running_loop().create_task(work, context=Context())


def _answer(readers: Sequence[asyncio.Future[None]], *, error: Exception | None = None) -> None:
    for each in readers:
        if each.done():
            continue  # the waiting task was cancelled
        if error is None:
            each.set_result(None)
        else:
            each.set_exception(error)
