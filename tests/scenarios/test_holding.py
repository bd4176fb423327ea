"""The changes of a unit of work, and transactions that another process decides (P37)."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import fennflow_memory.backend
from fennflow import ConfigDict, UnitOfWork, plugins
from fennflow.backends import (
    Backend,
    BucketBackendConfig,
    InMemoryBackendConfig,
    SqlalchemyBackendConfig,
)
from fennflow.config import BackendConfig
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.engine import recovery
from fennflow.engine.leases import clock
from fennflow.exceptions import (
    CommitUncertainException,
    ConfigException,
    ConflictException,
    RecordLockedException,
    TransactionException,
)
from fennflow.files import TextContent
from fennflow.repositories import CrudRepository, RepoField
from fennflow.testing import faults
from fennflow_memory.backend import InMemoryBackend
from fennflow_sqlalchemy.backend import SqlalchemyBackend
from stores import numbers


class FilesUOW(UnitOfWork):
    """A unit of work on one bucket."""

    files = RepoField(CrudRepository, namespace="files")


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


def make_uow(backend: BackendConfig, **settings: object) -> type[FilesUOW]:
    class UOW(FilesUOW):
        config = ConfigDict(
            backend=backend,
            connector=InMemoryConnectorConfig(name=f"held{next(numbers)}"),
            **{"lock_timeout": 0.0, **settings},
        )

    return UOW


@pytest.fixture(params=["memory", "sqlite", "bucket"])
async def uow_class(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncGenerator[type[FilesUOW]]:
    backends: dict[str, BackendConfig] = {
        "memory": InMemoryBackendConfig(name=f"held{next(numbers)}"),
        "sqlite": SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/held.db"),
        "bucket": BucketBackendConfig(namespace="files"),
    }
    found = make_uow(backends[request.param])
    async with found.lifespan(check=False):
        async with found() as uow:
            await uow.files.put(text("old a", "a"), text("old b", "b"))
        yield found


async def hold(uow_class: type[FilesUOW], **options: float) -> str:
    async with uow_class() as uow:
        await uow.files.put(text("new a", "a"), text("new c", "c"), text("new d", "d"))
        await uow.files.delete("b", "d", missing_ok=True)
        return await uow.hold(**options)


async def contents(uow_class: type[FilesUOW]) -> dict[str, str]:
    async with uow_class() as uow:
        paths = [path async for path in uow.files.iter()]
        return {str(each.path): each.data.decode() for each in await uow.files.get(*paths)}


OLD = {"a": "old a", "b": "old b"}
NEW = {"a": "new a", "c": "new c"}


async def test_changes_are_what_a_commit_would_do(uow_class: type[FilesUOW]) -> None:
    async with uow_class() as uow:
        assert uow.changes() == []
        await uow.files.put(text("new a", "a"), text("new c", "c"), text("new d", "d"))
        await uow.files.delete("b", "d")
        changes = uow.changes()
        with suppress(LookupError):
            async with uow.savepoint():
                await uow.files.delete("c")
                raise LookupError
        assert uow.changes() == changes
        await uow.rollback()
        assert uow.changes() == []
    assert [(each.kind, each.path, each.size, each.old_size) for each in changes] == [
        ("overwrite", "a", 5, 5),
        ("delete", "b", None, 5),
        ("create", "c", 5, None),
    ]
    assert changes[0].sha256 == hashlib.sha256(b"new a").hexdigest()
    assert changes[0].old_sha256 == hashlib.sha256(b"old a").hexdigest()


async def test_a_held_transaction_is_committed_by_its_id(uow_class: type[FilesUOW]) -> None:
    """P37: until then its paths are locked, and its changes are invisible."""
    held = await hold(uow_class)
    [info] = await uow_class.transactions()
    assert (info.transaction_id, info.state) == (held, "held")
    assert info.lease_left > uow_class.config.max_transaction_age - 600
    assert [(each.kind, each.path) for each in info.changes] == [
        ("overwrite", "a"),
        ("delete", "b"),
        ("create", "c"),
    ]
    assert await contents(uow_class) == OLD
    with pytest.raises(RecordLockedException, match="is held"):
        async with uow_class() as uow:
            await uow.files.delete("a")
    report = await uow_class.recover()
    assert (report.pending, report.problems) == (0, ())
    await uow_class.commit_held(held)
    assert await contents(uow_class) == NEW
    assert await uow_class.transactions() == []
    for decide in (uow_class.commit_held, uow_class.abort_held):
        with pytest.raises(TransactionException, match="is not held"):
            await decide(held)


async def test_a_held_transaction_is_undone_by_its_id(uow_class: type[FilesUOW]) -> None:
    """P37."""
    held = await hold(uow_class)
    await uow_class.abort_held(held)
    assert await contents(uow_class) == OLD
    assert await uow_class.transactions() == []
    with pytest.raises(TransactionException, match="is not held"):
        await uow_class.commit_held(held)


@pytest.mark.parametrize("given", ["", "\0", "\ud800", "'", "x" * 5000])
async def test_what_cannot_be_an_id_is_not_held(uow_class: type[FilesUOW], given: str) -> None:
    """A client may have sent it. The catalog goes on."""
    for decide in (uow_class.commit_held, uow_class.abort_held):
        with pytest.raises(TransactionException, match="is not held"):
            await decide(given)
    assert await contents(uow_class) == OLD


async def test_of_two_decisions_at_once_one_is_made(uow_class: type[FilesUOW]) -> None:
    """P37, P5: by two processes; a later second decision is refused, too."""

    class Other(FilesUOW):
        config = uow_class.config.model_copy(update={"lease_ttl": 59.0})

    held = await hold(uow_class)
    both = uow_class.commit_held(held), Other.abort_held(held)
    committed, aborted = await asyncio.gather(*both, return_exceptions=True)
    assert isinstance(committed or aborted, TransactionException)
    assert None in {committed, aborted}
    assert await uow_class.transactions() == []
    assert await contents(uow_class) == (OLD if committed else NEW)
    for decide in (Other.commit_held, uow_class.abort_held):
        with pytest.raises(TransactionException, match="is not held"):
            await decide(held)


@pytest.mark.parametrize("late", ["commit_held", "abort_held"])
@pytest.mark.parametrize("first", ["commit_held", "abort_held"])
async def test_a_second_decision_at_the_same_time_finishes_the_first_one(
    first: str, late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P37: on SQLite the outcome is in another file, so a second caller may not see it yet."""
    waiting = [late]

    async def script(moment: str, asked: str, _key: str) -> None:
        if waiting and deciding and (moment, asked) == ("after", deciding.removesuffix("_held")):
            both_abort = first == late == "abort_held"
            refused = pytest.raises(TransactionException, match="is not held")
            with nullcontext() if both_abort else refused:
                await getattr(uow_class, waiting.pop())(held)

    deciding = ""
    with plugins.override(faults):
        inner = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/held.db")
        backend = faults.FaultyBackendConfig(inner=inner, faults=faults.Scripted(script))
        uow_class = make_uow(backend, recovery_interval=600.0)
        async with uow_class.lifespan(check=False):
            async with uow_class() as uow:
                await uow.files.put(text("old a", "a"), text("old b", "b"))
            held = await hold(uow_class)
            monkeypatch.setattr(SqlalchemyBackend, "_is_decided", lambda *_: False)
            deciding = first
            with suppress(TransactionException):  # an abort that the second one finished
                await getattr(uow_class, first)(held)
            assert waiting == []
            assert await uow_class.transactions() == []
            assert await contents(uow_class) == (NEW if first == "commit_held" else OLD)


async def test_a_held_transaction_that_is_not_decided_is_undone_in_time(
    uow_class: type[FilesUOW],
) -> None:
    """P37."""
    held = await hold(uow_class, expires_in=0.01)
    async with asyncio.timeout(60):
        while await uow_class.transactions():
            await uow_class.recover()
    assert await contents(uow_class) == OLD
    with pytest.raises(TransactionException, match="is not held"):
        await uow_class.commit_held(held)


async def test_hooks_and_compensations_follow_the_decision(uow_class: type[FilesUOW]) -> None:
    """P34, P36, P37."""
    calls: list[str] = []

    @uow_class.compensation("refund")
    async def refund(number: int) -> None:
        calls.append(f"refunded {number}")

    @uow_class.after_commit("send")
    async def send(number: int) -> None:
        calls.append(f"sent {number}")

    async def charge() -> None:
        calls.append("charged")

    held: list[str] = []
    for number in (1, 2):
        async with uow_class() as uow:
            await uow.step(charge, undo=refund(number))
            uow.on_commit(send(number))
            held.append(await uow.hold())
    await uow_class.recover()
    assert calls == ["charged", "charged"]
    await uow_class.commit_held(held[0])
    await uow_class.abort_held(held[1])
    async with asyncio.timeout(60):
        while (await uow_class.recover()).jobs_pending:
            pass
    assert sorted(calls[2:]) == ["refunded 2", "sent 1"]


async def test_what_no_other_process_could_do_is_not_held(uow_class: type[FilesUOW]) -> None:
    """P37: and the block continues."""

    async def call() -> None:
        """Do nothing."""

    async with uow_class() as uow:
        with pytest.raises(TransactionException, match="nothing to hold"):
            await uow.hold()
        await uow.files.put(text("x", "x"))
        with pytest.raises(ConfigException, match="max_transaction_age"):
            await uow.hold(expires_in=1e6)
        uow.on_rollback(call)
        with pytest.raises(TransactionException, match="not registered"):
            await uow.hold()
    assert await contents(uow_class) == {**OLD, "x": "x"}


async def test_a_read_that_has_changed_undoes_what_is_held() -> None:
    """P37."""
    uow_class = make_uow(InMemoryBackendConfig(name=f"held{next(numbers)}"), validate_reads=True)
    async with uow_class.lifespan(check=False):
        async with uow_class() as uow:
            await uow.files.put(text("old a", "a"))
        async with uow_class() as uow:
            await uow.files.get("a")
            await uow.files.put(text("new b", "b"))
            held = await uow.hold()
        async with uow_class() as uow:
            await uow.files.put(text("newer a", "a"))
        with pytest.raises(ConflictException):
            await uow_class.commit_held(held)
        assert await contents(uow_class) == {"a": "newer a"}
        assert await uow_class.transactions() == []


async def test_a_backend_that_cannot_hold_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InMemoryBackend, "hold", Backend.hold)
    uow_class = make_uow(InMemoryBackendConfig(name=f"held{next(numbers)}"))
    async with uow_class.lifespan(check=False):
        with pytest.raises(ConfigException, match="cannot hold"):
            await hold(uow_class)
        assert await uow_class.transactions() == []


class BackendGoneError(Exception):
    """What a driver raises."""


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("operation", ["hold", "take_held", "commit", "abort"])
async def test_whatever_the_backend_loses_it_is_held_committed_or_undone(
    operation: str, phase: str
) -> None:
    """P37: as a whole; a decision that failed can be repeated."""
    fails = False

    async def script(moment: str, asked: str, _key: str) -> None:
        if fails and (moment, asked) == (phase, operation):
            raise BackendGoneError(operation)

    with plugins.override(faults):
        uow_class = make_uow(
            faults.FaultyBackendConfig(
                inner=InMemoryBackendConfig(name=f"held{next(numbers)}"),
                faults=faults.Scripted(script),
            ),
            lease_ttl=3.0,
            recovery_interval=600.0,
        )
        async with uow_class.lifespan(check=False):
            async with uow_class() as uow:
                await uow.files.put(text("old a", "a"), text("old b", "b"))
            commits = operation != "abort"
            fails = operation == "hold"
            held = None
            with suppress(BackendGoneError):
                held = await hold(uow_class)
            fails = True
            if held is not None:
                with suppress(BackendGoneError, CommitUncertainException, TransactionException):
                    await (uow_class.commit_held if commits else uow_class.abort_held)(held)
            fails = False
            async with asyncio.timeout(60):
                while left := await uow_class.transactions():
                    await uow_class.recover()
                    if held is not None and left[0].state == "held":
                        with suppress(TransactionException):
                            await (uow_class.commit_held if commits else uow_class.abort_held)(held)
            found = await contents(uow_class)
            assert found == (NEW if held is not None and commits else OLD)


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("withdrawn", [True, False])
async def test_a_decision_whose_caller_is_cancelled_is_made(
    *, commits: bool, withdrawn: bool
) -> None:
    """P21, P37: the decision stands, and the cancellation arrives afterwards, unless it was withdrawn."""
    deciding, go_on = asyncio.Event(), asyncio.Event()
    waits = False

    async def script(moment: str, asked: str, _key: str) -> None:
        if waits and (moment, asked) == ("before", "commit" if commits else "abort"):
            deciding.set()
            await go_on.wait()

    with plugins.override(faults):
        uow_class = make_faulty(script)
        async with uow_class.lifespan(check=False):
            async with uow_class() as uow:
                await uow.files.put(text("old a", "a"), text("old b", "b"))
            held = await hold(uow_class)
            waits = True
            after: list[str] = []

            async def decide() -> None:
                await (uow_class.commit_held if commits else uow_class.abort_held)(held)
                task = asyncio.current_task()
                if withdrawn and task is not None:
                    task.uncancel()
                after.append("decided")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                after.append("not cancelled")

            decision = asyncio.create_task(decide())
            await deciding.wait()
            decision.cancel()
            await asyncio.sleep(0)
            go_on.set()
            await asyncio.wait({decision})
            assert after == ["decided", "not cancelled"][: 1 + withdrawn]
            assert await uow_class.transactions() == []
            assert await contents(uow_class) == (NEW if commits else OLD)


@pytest.mark.parametrize("commits", [True, False])
async def test_a_decision_that_is_cut_off_leaves_it_held_and_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, commits: bool
) -> None:
    """P37: its lease is not renewed, and it is reported that it has to be decided again."""
    deciding = asyncio.Event()
    hangs = False

    async def script(moment: str, asked: str, _key: str) -> None:
        if hangs and (moment, asked) == ("before", "commit" if commits else "abort"):
            deciding.set()
            await asyncio.Event().wait()

    with plugins.override(faults):
        uow_class = make_faulty(script, compensation_timeout=0.01)
        async with uow_class.lifespan(check=False):
            async with uow_class() as uow:
                await uow.files.put(text("old a", "a"), text("old b", "b"))
            held = await hold(uow_class)
            hangs = True
            decide = uow_class.commit_held if commits else uow_class.abort_held
            decision = asyncio.create_task(decide(held))
            await deciding.wait()
            decision.cancel()
            await asyncio.wait({decision})
            hangs = False
            if commits:
                with pytest.raises(CommitUncertainException, match="if it is still held"):
                    decision.result()
            else:
                assert decision.cancelled()
            let_pass(100.0, monkeypatch)
            assert f"Transaction {held} is held" in str((await uow_class.diagnose()).problems)
            report = await uow_class.recover()
            assert (report.pending, len(report.problems)) == (1, 1)
            assert f"Transaction {held} is held" in report.problems[0]
            assert f"{held} is still held: its commit or abort was interrupted" in caplog.text
            await decide(held)
            assert await contents(uow_class) == (NEW if commits else OLD)


async def test_a_commit_that_fails_does_not_hold_it_for_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P37: however often it is tried, it is undone when its own time is over."""
    fails = False

    async def script(moment: str, asked: str, _key: str) -> None:
        if fails and (moment, asked) == ("before", "commit"):
            monkeypatch.setattr(recovery, "clock", lambda: clock() + 3000.0)
            raise ConnectionError

    with plugins.override(faults):
        uow_class = make_faulty(script)
        async with uow_class.lifespan(check=False):
            async with uow_class() as uow:
                await uow.files.put(text("a", "a"))
                held = await uow.hold(expires_in=3600.0)
            fails = True
            with pytest.raises(ConnectionError):
                await uow_class.commit_held(held)
            [waiting] = await uow_class.transactions()
            assert waiting.state == "held"
            assert waiting.lease_left < 601.0
            await uow_class.abort_held(held)


async def test_what_waits_long_for_a_decision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """P37: its paths are locked until a person decides."""
    uow_class = make_uow(InMemoryBackendConfig(name=f"held{next(numbers)}"))
    async with uow_class.lifespan(check=False):
        async with uow_class() as uow:
            await uow.files.put(text("a", "a"))
            held = await uow.hold()
        assert (await uow_class.recover()).problems == ()
        let_pass(1000.0, monkeypatch)
        report, diagnosis = await uow_class.recover(), await uow_class.diagnose()
        for problems in (report.problems, diagnosis.problems):
            assert f"Transaction {held} is held: files/a." in str(problems)
        await uow_class.abort_held(held)


def make_faulty(script: faults.Script, **settings: object) -> type[FilesUOW]:
    inner = InMemoryBackendConfig(name=f"held{next(numbers)}")
    backend = faults.FaultyBackendConfig(inner=inner, faults=faults.Scripted(script))
    return make_uow(backend, recovery_interval=600.0, **settings)


def let_pass(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time pass for the backend in memory."""
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds)
    monkeypatch.setattr(fennflow_memory.backend, "time", later)
