"""Units of work in a simulated world, compared with a reference model.

The model of a unit of work is a dictionary over the committed state: `overlay`. An operation that
returns changes it, one that raises does not; the pivot merges it into what is committed.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from fennflow.backends import ObjectKey
from fennflow.engine.plan import live
from fennflow.exceptions import (
    BaseBackendException,
    BaseConnectorException,
    ChecksumMismatchException,
    CommitUncertainException,
    FennFlowException,
    KeyException,
    NoSuchKeyException,
    ObjectChangedException,
    PreconditionFailedException,
    RecordAlreadyExistsException,
    StepNotDoneException,
    TransactionException,
    TransactionLostException,
)
from fennflow.files import BinaryContent, StreamContent
from modelled_jobs import ModelJob
from stores import FullUOW
from world import BUCKET, TAKEN, Overlay, World

READ_ATTEMPTS = 3


@dataclass(frozen=True)
class Call:
    """The next call of a unit of work.

    Args:
        kind: `put`, `send`, `create`, `delete`, `copy`, `move`, `get`, `read`, `list`, `both`,
            `savepoint`, `release`, `fail`, `step`, `hook`, `durable_step`, `durable_hook`, `hold`,
            `commit`, `rollback`, `end` or `raise`.
        keys: the keys of the call.
        value: the value to write.
    """

    kind: str
    keys: tuple[str, ...] = ()
    value: bytes = b""
    manner: Manner = "works"


Manner = Literal["works", "fails", "is cancelled", "is slow"]
"""How the user's own code behaves."""
SLOW = 100.0
"""Seconds that slow code takes; three times as long as a cancelled block waits for it."""


@dataclass(eq=False)
class Hook:
    """A callback for the outcome, and which of the two was called so far.

    Args:
        name: for the trace.
        committed: how its transaction ended; None for as long as that is open.
        called: with which outcome.
    """

    name: str
    committed: bool | None = None
    called: list[str] = field(default_factory=list[str])


@dataclass(eq=False)
class Held:
    """A transaction that waits for a decision (P37).

    Args:
        world: of it.
        transaction_id: by which it is decided.
        overlay: the changes to commit.
        jobs: of it.
        until: when its time is over.
        given_up: whether it may be undone before.
        committed: whether it is.
        aborted: whether that was reported.
    """

    world: World
    transaction_id: str
    overlay: Overlay
    jobs: list[ModelJob]
    until: float = 0.0
    given_up: bool = False
    committed: bool = False
    aborted: bool = False

    def pivot(self) -> None:
        """Note that the pivot took effect."""
        assert not self.aborted, "P37: it was undone, and is committed"
        self.committed = True
        self.world.commit(self.overlay, self.jobs)
        self.world.note(f"pivot of {self.transaction_id}: {sorted(self.overlay)}")

    def check(self) -> None:
        """Check that it waits until it is decided, or its time is over."""
        if not (self.committed or self.given_up) and self.world.loop.now < self.until:
            found = self.world.now_do(self.world.observer.transactions(after="", limit=1000))
            held = [each.token.transaction_id for each in found if each.is_held]
            assert self.transaction_id in held, "P37: it is held no more, and was not decided"

    async def decide(self, uow_class: type[FullUOW], *, commits: bool) -> None:
        """Commit it, or undo it, from any process."""
        # A commit undoes it if it finds that what was read has changed.
        self.given_up |= not commits or bool(self.world.settings.get("validate_reads"))
        method = uow_class.commit_held if commits else uow_class.abort_held
        taken: list[str] = []
        TAKEN.set(taken)
        ends = self.world.loop.now + uow_class.config.compensation_timeout
        try:
            await method(self.transaction_id)
        except (
            asyncio.CancelledError,
            BaseBackendException,
            BaseConnectorException,
            TransactionException,
        ) as error:
            self.world.note(f"decide {self.transaction_id}: {error!r}"[:150])
            cut_off = any(
                isinstance(each, asyncio.CancelledError) for each in (error, error.__cause__)
            )
            early = cut_off and taken and self.world.loop.now < ends and not self.world.over
            assert not early, "P21: it was taken, and not decided for a cancellation"
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        assert self.committed == commits, "P37: it was decided otherwise"
        self.aborted = not commits


class WantedError(Exception):
    """Ends a block or a savepoint because the test wants it to."""


@dataclass(eq=False)
class SimulatedSession:
    """One `async with UOW()` block of a process, which does one call after the other."""

    world: World
    process: int
    number: int
    auto_commit: bool = True
    overlay: Overlay = field(default_factory=dict[str, "bytes | None"])
    pivots: int = 0
    acknowledged: int = 0
    transaction_id: str = ""
    ended: str = ""
    busy: bool = False
    effects: set[str] = field(default_factory=set[str])
    hooks: list[Hook] = field(default_factory=list[Hook])
    due: list[Hook] = field(default_factory=list[Hook])
    jobs: list[ModelJob] = field(default_factory=list[ModelJob])
    slow: bool = False
    failed: bool = False
    touched: set[str] = field(default_factory=set[str])
    task: asyncio.Task[None] = field(init=False)
    depth: int = 0
    _trouble: int = 0
    _calls: list[Call] = field(default_factory=list[Call])
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _steps: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def start(self) -> None:
        """Begin, with nothing to do yet."""
        self._trouble = self.world.trouble[self.process]
        self.task = self.world.loop.spawn(self.process, self._run())

    @property
    def waiting(self) -> bool:
        """Whether it has nothing to do, and can be given a call."""
        return not self.ended and not self.busy and not self._calls

    @property
    def lives(self) -> bool:
        """Whether its process does, and its block has not ended."""
        return not self.ended and self.process not in self.world.loop.dead

    @property
    def troubled(self) -> bool:
        """Whether anything went wrong in its process since it began, or it had no time."""
        return self.world.trouble[self.process] > self._trouble

    def do(self, call: Call) -> None:
        """Give it a call."""
        self._calls.append(call)
        with self.world.loop.running():
            self._wake.set()

    def pivot(self) -> None:
        """Note that the pivot took effect: the model commits what the session had done."""
        self.pivots += 1
        self._decide_hooks(committed=True)
        self.world.commit(self.overlay, self.jobs)
        self.jobs = []
        self.world.note(f"pivot of s{self.number}: {sorted(self.overlay)}")

    def _decide_hooks(self, *, committed: bool) -> None:
        """Note how the transaction ended on which callbacks wait."""
        for hook in self.hooks:
            hook.committed = committed
        self.due += self.hooks
        self.hooks = []

    def check_hooks(self, *, over: bool = False) -> None:
        """Check that callbacks are called once, for the outcome that stands.

        Args:
            over: whether all of them must have been called by now.
        """
        for hook in [*self.due, *self.hooks]:
            assert len(hook.called) <= 1, f"{hook.name} was called twice"
            if hook.committed is not None:
                right = ["on_commit" if hook.committed else "on_rollback"]
                assert hook.called in ([], right), f"{hook.name}: {hook.called}, not {right}"
                assert hook.called or not over, f"{hook.name} was not called"
        if over and self.failed:
            assert not self.effects, "the steps of a failed session were never undone"

    @property
    def waits_for_user_code(self) -> bool:
        """Whether it has ended, and user code that it owes has not been called yet."""
        late = [each for each in self.due if not each.called]
        jobs = [each for each in self.world.jobs.all.values() if each.process == self.process]
        return bool(
            late
            or (self.failed and self.effects)
            or any(each.late and self.world.jobs.owes(each) for each in jobs)
        )

    async def _run(self) -> None:
        try:
            async with self.world.uow(self.process)(auto_commit=self.auto_commit) as uow:
                await self._work(uow)
                changed = bool(self.overlay)
                if not self.auto_commit:
                    self.transaction_id = ""  # a warning says what it cannot undo
        except GeneratorExit:
            raise  # it was killed, and is thrown away
        except BaseException as error:
            self._end(repr(error)[:150], uncertain=isinstance(error, CommitUncertainException))
            if not isinstance(error, (WantedError, FennFlowException, asyncio.CancelledError)):
                raise
            if isinstance(error, ChecksumMismatchException):
                error.add_note("Nothing corrupts data here.")
                raise
            if isinstance(error, CommitUncertainException):
                assert self.troubled, "nothing kept it from learning how the commit ended"
            else:
                assert self.pivots == self.acknowledged, "I8: it raised, and was committed"
                self.failed = True
                self._check_undone(error)
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            if self.auto_commit:
                self._decide_hooks(committed=True)  # without changes it has no pivot
            self._end("committed" if self.auto_commit else "rolled back")
            new = self.pivots - self.acknowledged
            assert new >= (self.auto_commit and changed), "I8: it ended, and was not committed"
            assert new <= self.auto_commit, "I8: it committed more than it was to"

    def _check_undone(self, error: BaseException) -> None:
        """Check that nothing is left of a session that failed, unless that was said (I3, P21)."""
        notes = " ".join(note for each in _chain(error) for note in getattr(each, "__notes__", ()))
        lost = any(isinstance(each, TransactionLostException) for each in _chain(error))
        acknowledged = lost or "is not undone completely" in notes
        if acknowledged:
            assert self.troubled or self.slow, "nothing kept it from undoing all"
        else:
            assert not self.effects, "the steps of a failed session were not undone"
            sessions = self.world.now_do(self.world.observer.transactions(after="", limit=1000))
            left = {each.token.transaction_id for each in sessions}
            assert self.transaction_id not in left, (
                "a failed session waits, and that was not reported"
            )

    def _end(self, how: str, *, uncertain: bool = False) -> None:
        self.ended = how
        if not uncertain or self.world.log is None:  # the commit of a log may arrive later
            self._decide_hooks(committed=False)
        self.world.note(f"s{self.number} ends: {how}")

    async def _work(self, uow: FullUOW) -> None:
        while True:
            while not self._calls:
                self._wake.clear()
                await self._wake.wait()
            call = self._calls.pop(0)
            session: Any = uow._session
            self.transaction_id = session._tx.transaction_id
            self.world.on_pivot[self.transaction_id] = self.pivot
            self.world.note(f"s{self.number} {call.kind} {' '.join(call.keys)}")
            if call.kind in {"end", "release"}:
                return
            if call.kind in {"raise", "fail"}:
                raise WantedError
            self.busy = True
            touched = self.touched | set(call.keys)
            try:
                await self._perform(uow, call)
            finally:
                self.busy = False
                self.touched = touched

    async def _perform(self, uow: FullUOW, call: Call) -> None:
        if call.kind == "savepoint":
            await self._savepoint(uow)
            return
        if call.kind in {"commit", "rollback"}:
            await self._decide(uow, call.kind)
            return
        if call.kind == "hold":
            await self._hold(uow, call)
            return
        before = len(self.world.history)
        try:
            await getattr(self, f"_{call.kind}")(uow, call)
        except (BaseBackendException, BaseConnectorException, KeyException) as error:
            self.world.note(f"s{self.number} {call.kind}: {error!r}"[:150])
            self._judge(call, error, before)

    def _judge(self, call: Call, error: Exception, before: int) -> None:
        """Check that a call had a reason to raise this."""
        views = [self._view(committed) for committed in self.world.history[before - 1 :]]
        if isinstance(error, KeyException):
            assert self.world.capabilities.hierarchical, "the store can hold it"
        elif isinstance(error, RecordAlreadyExistsException):
            taken = set(call.keys) & (set(self.world.foreign) | {k for v in views for k in v})
            assert taken, f"{call.keys} were free"
        elif isinstance(error, NoSuchKeyException):
            wanted = call.keys[:1] if call.kind in {"copy", "move"} else call.keys
            assert any(set(wanted) - set(view) for view in views), f"{wanted} were there"
        elif isinstance(error, ObjectChangedException):
            # Only others that commit all the time can move what is looked for so often, and only a
            # store that answers 409 all the time can keep it from being copied.
            cause = error.__cause__
            contended = isinstance(cause, PreconditionFailedException) and cause.contended
            # What is read or sent byte by byte cannot start again.
            hidden = set(call.keys) & (self.world.hidden | self.world.strange)
            once = (call.kind == "read" and len(views) > 1) or (call.kind == "send" and hidden)
            assert contended or once or len(views) > READ_ATTEMPTS, "nothing had been changed"

    def _view(self, committed: Mapping[str, bytes]) -> dict[str, bytes]:
        laid: Overlay = {**committed, **self.overlay}
        return {key: value for key, value in laid.items() if value is not None}

    async def _savepoint(self, uow: FullUOW) -> None:
        before = dict(self.overlay)
        effects = set(self.effects)
        hooks = list(self.hooks)
        jobs = list(self.jobs)
        self.depth += 1
        self.busy = False
        try:
            async with uow.savepoint():
                await self._work(uow)
        except WantedError:
            self.overlay = before
            assert self.effects == effects, "the steps of a savepoint were not undone"
            self.hooks = hooks
            undone = [each for each in self.jobs if each not in jobs]
            for each in undone:
                each.dropped |= each.kind == "hook"
                each.released = True
            self.jobs = jobs + [each for each in undone if each.kind == "undo"]
        except BaseException:
            self.hooks = hooks
            raise
        finally:
            self.depth -= 1

    async def _decide(self, uow: FullUOW, kind: str) -> None:
        if self.depth:
            return
        changed = bool(self.overlay)
        if kind == "commit":
            await uow.commit()
            assert self.pivots >= self.acknowledged + changed, (
                "I8: commit() returned, and did nothing"
            )
            self._decide_hooks(committed=True)
            self.acknowledged = self.pivots
            self.transaction_id = ""  # committed, whatever is still to be applied
            self.effects.clear()
        else:
            self.transaction_id = ""  # a warning says what it cannot undo
            await uow.rollback()
            self._decide_hooks(committed=False)
            assert self.pivots == self.acknowledged, "I8: rollback() committed"
            assert not self.effects, "rollback() did not undo the steps"
        self.jobs = []
        self.overlay = {}

    async def _hold(self, uow: FullUOW, call: Call) -> None:
        """Leave what was done to be decided by another process (P37)."""
        if self.depth or self.hooks or self.effects or not (self.overlay or self.jobs):
            return
        held = Held(self.world, self.transaction_id, dict(self.overlay), list(self.jobs))
        self.world.on_pivot[self.transaction_id] = held.pivot
        seconds = {"works": 600.0, "fails": 0.1}.get(call.manner, 50.0)
        held.until = self.world.loop.now + seconds
        try:
            await uow.hold(expires_in=seconds)
        except TransactionException as error:
            if "nothing to hold" not in str(error):
                raise
            return
        self.world.held[held.transaction_id] = held
        self.world.ambiguous = True  # the process that undoes it does not know what was sent for it
        self.world.note(f"s{self.number} is held as {held.transaction_id}")
        self.transaction_id = ""
        self.jobs = []
        self.overlay = {}

    # --- the calls ---------------------------------------------------------------------------

    async def _put(self, uow: FullUOW, call: Call) -> None:
        await uow.files.put(*_files(call))
        self.overlay.update(dict.fromkeys(call.keys, call.value))

    async def _send(self, uow: FullUOW, call: Call) -> None:
        async def pieces() -> AsyncGenerator[bytes]:
            yield call.value[:1]
            await asyncio.sleep(0)
            yield call.value[1:]

        await uow.files.put(
            *(
                StreamContent.from_iterable(pieces(), filename=key, media_type="a/b")
                for key in call.keys
            )
        )
        self.overlay.update(dict.fromkeys(call.keys, call.value))

    async def _read(self, uow: FullUOW, call: Call) -> None:
        for key in call.keys:
            before = len(self.world.history)
            async with uow.files.open(key) as stream:
                body = b"".join([chunk async for chunk in stream])
            views = [self._view(each) for each in self.world.history[before - 1 :]]
            assert body in [view.get(key) for view in views], f"{key} was never {body!r}"

    async def _create(self, uow: FullUOW, call: Call) -> None:
        taken = set(call.keys) & set(self.world.foreign)
        await uow.files.create(*_files(call))
        if self.world.capabilities.versioned:
            # A newer version may hide it, since an own call that failed, a late request, or an undo that is refused.
            taken -= self.touched | self.world.hidden | self.world.barred
        assert not taken, f"{taken} held another writer's object"
        self.overlay.update(dict.fromkeys(call.keys, call.value))

    async def _delete(self, uow: FullUOW, call: Call) -> None:
        gone = await uow.files.delete(*call.keys)
        self.overlay.update(dict.fromkeys(map(str, gone), None))

    async def _copy(self, uow: FullUOW, call: Call) -> None:
        await self._transfer(uow, call, move=False)

    async def _move(self, uow: FullUOW, call: Call) -> None:
        await self._transfer(uow, call, move=True)

    async def _transfer(self, uow: FullUOW, call: Call, *, move: bool) -> None:
        source, target = call.keys[:2]
        if source == target:
            return
        before = len(self.world.history)
        method = uow.files.move if move else uow.files.copy
        await method(source, target)
        sources = [self._view(each).get(source) for each in self.world.history[before - 1 :]]
        session: Any = uow._session
        write = live(session._tx.chain(ObjectKey(BUCKET, target)))
        assert write is not None
        assert write.record is not None
        digests = {hashlib.sha256(each).hexdigest(): each for each in sources if each is not None}
        assert write.record.sha256 in digests, f"{target} is not a copy of {source}"
        self.overlay[target] = digests[write.record.sha256]
        if move:
            self.overlay[source] = None

    async def _get(self, uow: FullUOW, call: Call) -> None:
        before = len(self.world.history)
        files = await uow.files.get(*call.keys, missing_ok=True)
        seen: dict[str, bytes | None] = dict.fromkeys(call.keys)
        seen.update({str(file.path): file.data for file in files})
        views = [self._view(each) for each in self.world.history[before - 1 :]]
        fits = [view for view in views if all(view.get(key) == seen[key] for key in call.keys)]
        assert fits, f"I9: {call.keys} were never {seen}"

    async def _list(self, uow: FullUOW, call: Call) -> None:
        before = len(self.world.history)
        seen = set(map(str, await uow.files.list()))
        views = [set(self._view(each)) for each in self.world.history[before - 1 :]]
        assert seen in views, f"list() was {sorted(seen)}, and never was that true"
        del call

    async def _both(self, uow: FullUOW, call: Call) -> None:
        """Do two things at once that meet in their keys; what is left of each key is one of them."""
        other = call.value + b"'"
        self.world.strange.update(call.keys)  # one finds the bytes of the other

        async def in_vain() -> None:
            with suppress(WantedError):
                async with uow.savepoint():
                    await uow.files.put(*_files(replace(call, value=other)))
                    raise WantedError

        async def again() -> None:
            await uow.files.put(*_files(replace(call, value=other, keys=call.keys[-1:])))

        async def delete() -> None:
            await uow.files.delete(*call.keys)

        async def clear() -> None:
            await uow.files.delete_prefix("")

        second = {"works": again, "fails": in_vain, "is cancelled": delete, "is slow": clear}
        work = (uow.files.put(*_files(call)), second[call.manner]())
        results = await asyncio.gather(*work, return_exceptions=True)
        failed = [each for each in results if isinstance(each, BaseException)]
        earlier = dict(self.overlay)
        for key in {*call.keys, *self._view(self.world.committed)}:
            self._note_one_of(uow, call, key, other)
            if self.overlay.get(key) == call.value != earlier.get(key):
                assert not isinstance(results[0], BaseException), "a call that failed is there"
        if call.manner == "fails" and not failed:
            wrong = [key for key in call.keys if self.overlay.get(key) != call.value]
            assert not wrong, f"a savepoint has undone what it does not contain: {wrong}"
        for error in failed:
            raise error

    def _note_one_of(self, uow: FullUOW, call: Call, key: str, other: bytes) -> None:
        """Note which of two calls at once the session has under a key."""
        session: Any = uow._session
        write = live(session._tx.chain(ObjectKey(BUCKET, key)))
        before = self.overlay.pop(key, None)
        if write is None:
            return
        body = None
        if write.record is not None:
            digests = {hashlib.sha256(each).hexdigest(): each for each in (call.value, other)}
            body = digests.get(write.record.sha256 or "", before)
            in_vain = call.manner != "works" and body == other != before
            assert not in_vain, "a savepoint that was undone is there"
        self.overlay[key] = body

    async def _hook(self, uow: FullUOW, call: Call) -> None:
        hook = Hook(f"hook {call.value.decode()} of s{self.number}")
        self.hooks.append(hook)

        def called(how: str) -> Callable[[], Awaitable[None]]:
            async def callback() -> None:
                self.world.note(f"{hook.name} is called after {how}, and {call.manner}")
                hook.called.append(how)
                await _behave(call.manner)

            return callback

        uow.on_commit(called("on_commit"))
        uow.on_rollback(called("on_rollback"))

    async def _durable_hook(self, uow: FullUOW, call: Call) -> None:
        number = int(call.value)
        key = "key" if number % 2 else None
        job = self._job(call, "hook", key)
        uow.on_commit(self.world.call_of(uow, "hook", number), key=key)
        self.jobs.append(job)

    async def _durable_step(self, uow: FullUOW, call: Call) -> None:
        number = int(call.value)
        job = self._job(call, "undo")
        self.jobs.append(job)
        self.slow = self.slow or call.manner == "is slow"

        async def do() -> None:
            await asyncio.sleep(SLOW if call.manner == "is slow" else 0)
            if number % 5 == 1:
                raise StepNotDoneException
            self.world.jobs.apply(job)
            await asyncio.sleep(0)
            if number % 5 == 2:
                raise WantedError

        try:
            await uow.step(do, undo=self.world.call_of(uow, "undo", number))
        except StepNotDoneException:
            job.dropped = not self.troubled
        except BaseException as error:
            # A commit may follow, and does not keep it.
            job.released = True
            if not isinstance(error, WantedError):
                raise

    def _job(self, call: Call, kind: Literal["undo", "hook"], key: str | None = None) -> ModelJob:
        manners: list[Manner] = {"works": [], "is slow": [call.manner]}.get(
            call.manner, [call.manner] * 2
        )
        behave = [partial(_behave, manner) for manner in manners]
        number = int(call.value)
        job = ModelJob(number, kind, self.process, self.transaction_id, [*behave], key)
        return self.world.jobs.add(job)

    async def _step(self, uow: FullUOW, call: Call) -> None:
        token = f"s{self.number}.{next(self._steps)}"
        manners = {"works": [], "is slow": [call.manner]}.get(call.manner, [call.manner] * 2)
        self.slow = self.slow or call.manner == "is slow"

        async def do() -> None:
            await asyncio.sleep(0)
            self.effects.add(token)

        async def undo() -> None:
            await _behave(manners.pop() if manners else "works")
            self.effects.discard(token)

        await uow.step(do, undo)


async def _behave(manner: Manner) -> None:
    await asyncio.sleep(SLOW if manner == "is slow" else 0)
    if manner == "fails":
        raise WantedError
    if manner == "is cancelled":
        raise asyncio.CancelledError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and the exceptions in its context."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _files(call: Call) -> Sequence[BinaryContent]:
    return [
        BinaryContent(data=call.value, media_type="application/octet-stream", filename=key)
        for key in call.keys
    ]
