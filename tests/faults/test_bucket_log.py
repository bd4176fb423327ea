"""The log in the bucket under lost, late and repeated requests, compared with what was acknowledged."""

from __future__ import annotations

import asyncio
import json
import random
import time
import tracemalloc
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, tzinfo
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Self, TypeVar
from unittest import mock
from uuid import uuid4

import pytest
from typing_extensions import override

from fennflow import ConfigDict, plugins
from fennflow.backends import (
    Backend,
    BucketBackendConfig,
    Commit,
    Job,
    LateWrite,
    ObjectKey,
    Settlement,
    TransactionToken,
    WriteId,
)
from fennflow.connectors import (
    Capabilities,
    Connector,
    InMemoryConnectorConfig,
    Location,
    ObjectAttributes,
    PutRequest,
    StoredObject,
)
from fennflow.exceptions import (
    AccessDeniedException,
    BackendUnavailableException,
    BaseBackendException,
    BaseConnectorException,
    CatalogDivergedException,
    ConfigException,
    ConnectorUnavailableException,
    CursorException,
    RecordLockedException,
    TransactionLostException,
)
from fennflow.testing import faults
from fennflow.testing.backend_values import (
    A,
    B,
    C,
    new_transaction,
    opened,
    plan_for,
    put,
    record,
)
from fennflow_bucket import commands, feed, following
from fennflow_bucket import replica as replica_module
from fennflow_bucket.backend import BucketBackend
from fennflow_bucket.clocks import SECOND
from fennflow_bucket.commands import Command, records_at
from fennflow_bucket.following import Limits
from fennflow_bucket.jobs import jobs_in
from fennflow_bucket.log import Log
from fennflow_bucket.replica import Replica
from fennflow_bucket.rows import record_row
from fennflow_bucket.snapshots import Loading
from fennflow_bucket.state import State
from stores import make_store, numbers

R = TypeVar("R")

ROOT = ".fennflow/catalog/default"
ENOUGH = 1e6
"""Seconds for leases and late writes, so long that they do not expire in a test."""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "PAUSE", 0.0)


def refused() -> ConnectorUnavailableException:
    return ConnectorUnavailableException("503: the request had no effect")


def lost() -> ConnectorUnavailableException:
    return ConnectorUnavailableException("the answer was lost", ambiguous=True)


def denied() -> BaseConnectorException:
    return BaseConnectorException("403: not allowed")


class NoFaults(faults.Faults):
    @override
    async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
        return await effect()


@dataclass
class Unreliable(faults.Faults):
    """Loses requests and answers, repeats requests, and lets some arrive late."""

    rng: random.Random
    late: set[asyncio.Task[Any]] = field(default_factory=set[asyncio.Task[Any]])
    over: bool = False

    @override
    async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
        for _ in range(self.rng.randrange(3)):
            await asyncio.sleep(0)
        # A load reads many entries, and has to succeed now and then.
        rate = 0.3 if operation.name == "put" else 0.03
        if self.over or self.rng.random() > rate:
            return await effect()
        match self.rng.randrange(5):
            case 0:
                raise refused()
            case 1:
                raise lost()
            case 2:
                await effect()
                raise lost()
            case 3:
                self.late.add(asyncio.ensure_future(self._later(effect)))
                raise lost()
            case _:
                await effect()
                return await effect()  # a client that sends again gets 412 for its own object

    async def _later(self, effect: faults.Effect[Any]) -> None:
        for _ in range(self.rng.randrange(1, 200)):
            await asyncio.sleep(0)
        with suppress(BaseConnectorException):
            await effect()

    async def end(self) -> None:
        self.over = True
        if self.late:
            await asyncio.wait(self.late)


@dataclass
class Place:
    """A store in memory, and replicas of the catalog in it."""

    directory: Path
    limits: Limits = field(default_factory=Limits)
    config: InMemoryConnectorConfig = field(
        default_factory=lambda: InMemoryConnectorConfig(name=f"l{next(numbers)}")
    )

    def connector(self, decides: faults.Faults) -> Connector:
        new = plugins.registry().connector_for(self.config).factory
        return faults.FaultyConnector(new(self.config, ConfigDict()), decides)

    def log(self, decides: faults.Faults | None = None) -> Log:
        return Log(self.connector(decides or NoFaults()), "bucket", ROOT)

    @asynccontextmanager
    async def replica(
        self, decides: faults.Faults | None = None, *, path: Path | None = None
    ) -> AsyncGenerator[Replica]:
        replica = Replica(self.log(decides), self.limits, lease=ENOUGH, late=ENOUGH)
        try:
            kept = path is not None
            await replica.open(path or self.directory / f"{uuid4()}.db", kept=kept)
            yield replica
        finally:
            await replica.aclose()

    async def names(self, kind: str) -> list[int]:
        return list(await self.log().list(kind))


def stage(transaction: str, *keys: str) -> Command:
    rows = [["bucket", key] for key in sorted(keys)]
    arguments = {"id": transaction, "token": 0, "keys": rows, "intents": [], "begins": True}
    arguments["by"] = "web-1:1"
    return Command("begin_writes", arguments)


def commit(transaction: str, *keys: str) -> Command:
    token = TransactionToken(transaction)
    records = [record_row(record(ObjectKey("bucket", key), token)) for key in keys]
    arguments = {
        "id": transaction,
        "token": 0,
        "records": records,
        "removed": [],
        "steps": "[]",
        "late": [],
        "jobs": [[transaction, 1, "hook", "{}", "committed", key] for key in keys[:1]],
    }
    return Command("commit", arguments)


def abort(transaction: str) -> Command:
    return Command("abort", {"id": transaction, "token": 0})


def settle(transaction: str) -> Command:
    arguments = {"id": transaction, "token": 0, "keys": None, "late": [], "keep": [], "checked": []}
    return Command("settle", arguments)


def note(name: str, value: str = "x") -> Command:
    return Command("note", {"name": name, "value": value})


async def rows(replica: Replica, table: str) -> list[tuple[Any, ...]]:
    return await replica.read(lambda db: db.execute(f"SELECT * FROM {table}").fetchall())


async def until_known(run: Callable[[], Awaitable[R]]) -> R:
    while True:
        try:
            return await run()
        except (BackendUnavailableException, ConnectorUnavailableException):
            await asyncio.sleep(0)


async def followed(replica: Replica, after: str | None = None) -> list[str]:
    """Return the transactions in the rest of the feed."""
    found: list[str] = []
    while page := await feed.commits(replica, after, 3):
        found += [each.transaction_id for each in page]
        after = page[-1].cursor
    return found


async def work(replica: Replica, rng: random.Random, answered: dict[str, str]) -> None:
    """Run transactions, and note their known outcomes."""
    for _ in range(rng.randrange(2, 6)):
        transaction, key = str(uuid4()), rng.choice("abc")
        try:
            await replica.run(stage(transaction, key))
            await replica.run(commit(transaction, key))
        except (RecordLockedException, TransactionLostException):
            answered[transaction] = "aborted"
        except (BackendUnavailableException, ConnectorUnavailableException):
            decision = await until_known(partial(replica.run, abort(transaction)))
            answered[transaction] = decision.outcome.value
            await until_known(partial(replica.run, settle(transaction)))
        else:
            answered[transaction] = "committed"
        if rng.random() < 0.3:
            await until_known(lambda: rows(replica, "records"))


@pytest.mark.parametrize("seed", range(20))
async def test_what_was_acknowledged_is_in_the_log_and_nothing_else(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    place = Place(tmp_path)
    answered: dict[str, str] = {}
    trouble = [Unreliable(random.Random(rng.random())) for _ in range(3)]

    async def process(decides: Unreliable) -> None:
        while True:
            try:
                async with place.replica(decides) as replica:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(3):
                            group.create_task(work(replica, random.Random(rng.random()), answered))
                    return
            except (BackendUnavailableException, ConnectorUnavailableException):
                continue  # it could not be opened
            except ExceptionGroup as error:
                if error.subgroup((BackendUnavailableException, ConnectorUnavailableException)):
                    continue
                raise

    async with asyncio.TaskGroup() as group:
        for decides in trouble:
            group.create_task(process(decides))
    for decides in trouble:
        await decides.end()
    async with place.replica() as reader:
        outcomes = {name: outcome for name, outcome, _ in await rows(reader, "outcomes")}
        for transaction, outcome in answered.items():
            assert outcomes.get(transaction, "aborted") == outcome
        assert await rows(reader, "locks") == []
        assert {row[2] for row in await rows(reader, "records")} <= {
            name for name, outcome in answered.items() if outcome == "committed"
        }
        committed = [name for name, outcome in answered.items() if outcome == "committed"]
        assert sorted(await followed(reader)) == sorted(committed)


async def test_a_lost_answer_does_not_append_twice(tmp_path: Path) -> None:
    """L3."""
    place = Place(tmp_path)
    keys: list[str] = []

    async def lose(when: str, operation: str, key: str) -> None:
        if when == "after" and operation == "put" and "/log/" in key and not keys:
            keys.append(key)
            raise lost()

    async with place.replica(faults.Scripted(lose)) as replica:
        await replica.run(note("a"))
        assert keys
        assert replica.position.number == 0
    assert await place.names("log") == [0]


async def test_a_request_that_arrives_late_is_found_by_the_next_one(tmp_path: Path) -> None:
    """L3: its commands fail with an unknown outcome, and the next entry settles the question."""
    place = Place(tmp_path)
    held: list[Callable[[], Awaitable[Any]]] = []

    class Late(faults.Faults):
        away = False

        @override
        async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
            if self.away:
                if operation.name == "put":
                    held.append(effect)
                raise lost()
            return await effect()

    late = Late()
    async with place.replica(late) as replica:
        await replica.run(note("a"))
        late.away = True
        with pytest.raises(BackendUnavailableException, match="may or may not"):
            await replica.run(note("b"))
        late.away = False
        await held[0]()
        await replica.run(note("c"))
        assert [row[0] for row in await rows(replica, "notes")] == ["a", "b", "c"]
        for each in held:
            with pytest.raises(BaseConnectorException):
                await each()
    assert await place.names("log") == [0, 1, 2]


async def test_a_refusal_is_reported_as_one(tmp_path: Path) -> None:
    place = Place(tmp_path)
    refusing = False

    async def refuse(when: str, operation: str, key: str) -> None:
        if refusing and when == "before" and operation == "put":
            raise denied()

    async with place.replica(faults.Scripted(refuse)) as replica:
        await replica.run(note("a"))
        refusing = True
        with pytest.raises(BaseConnectorException, match="403"):
            await replica.run(note("b"))
        refusing = False
        await replica.run(note("c"))
        assert [row[0] for row in await rows(replica, "notes")] == ["a", "c"]


async def test_commands_that_wait_share_an_entry_and_each_gets_its_own_answer(
    tmp_path: Path,
) -> None:
    """L4."""
    place = Place(tmp_path)
    async with place.replica() as replica:
        await replica.run(note("first"))
        answers: list[object] = []

        async def ask(command: Command) -> None:
            try:
                answers.append(await replica.run(command))
            except RecordLockedException:
                answers.append("locked")

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(ask(stage(f"t{number}", "a", f"k{number}")))
        assert answers.count("locked") == 19
    assert len(await place.names("log")) <= 3


async def test_what_is_refused_or_changes_nothing_is_not_appended(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.replica() as replica, place.replica() as other:
        await replica.run(stage("t1", "a"))
        before = await place.names("log")
        with pytest.raises(RecordLockedException):
            await other.run(stage("t2", "a"))
        await other.run(Command("claim", {"limit": 10, "by": "web-1:1"}))
        await other.run(settle("t3"))
        assert await place.names("log") == before


async def test_a_command_that_was_cancelled_before_it_was_sent_does_not_happen(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    async with place.replica() as replica:
        await replica.run(note("a"))
        task = asyncio.ensure_future(replica.run(note("b")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await replica.run(note("c"))
        names = [row[0] for row in await rows(replica, "notes")]
        assert names in (["a", "c"], ["a", "b", "c"])
        assert len(await place.names("log")) == len(names)


async def test_reads_that_come_together_share_a_request_and_see_what_was_acknowledged(
    tmp_path: Path,
) -> None:
    """L9."""
    place = Place(tmp_path)
    requests: list[str] = []

    async def count(when: str, operation: str, key: str) -> None:
        if when == "before":
            requests.append(f"{operation} {key}")

    async with place.replica(faults.Scripted(count)) as reader, place.replica() as writer:
        await writer.run(note("a"))
        requests.clear()
        async with asyncio.TaskGroup() as group:
            found = [group.create_task(rows(reader, "notes")) for _ in range(10)]
        assert all(len(task.result()) == 1 for task in found)
        assert len(requests) <= 4
        requests.clear()
        await rows(reader, "notes")
        assert len(requests) == 1


async def test_a_text_that_no_state_can_hold_is_refused_and_stops_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.replica() as replica, place.replica() as other:
        await replica.run(note("a"))
        before = await place.names("log")
        asked = replica.read(lambda db: db.execute("SELECT ?", ("\ud800",)).fetchall())
        for act in (replica.run(note("\ud800")), asked):
            with pytest.raises(BaseBackendException, match="lone surrogate"):
                await act
        assert await place.names("log") == before
        await replica.run(note("b"))
        assert len(await rows(other, "notes")) == 2


async def test_a_changed_log_stops_the_replica(tmp_path: Path) -> None:
    """L12."""
    place = Place(tmp_path)
    async with place.replica() as victim, place.replica() as writer:
        await writer.run(note("a"))
        await rows(victim, "notes")
        await writer.run(note("b"))
        # An entry is moved: it was made for another state.
        log = place.log()
        body = await log.read(1)
        assert body is not None
        await log.create("log", 2, body)
        with pytest.raises(CatalogDivergedException, match="position 1"):
            await rows(victim, "notes")
        with pytest.raises(CatalogDivergedException):
            await victim.run(note("c"))


async def test_a_state_with_other_rows_stops_the_replica(tmp_path: Path) -> None:
    """L12."""
    place = Place(tmp_path)
    path = tmp_path / "victim.db"
    async with place.replica() as writer:
        await writer.run(note("a"))
        async with place.replica(path=path) as victim:
            await rows(victim, "notes")

            def corrupt() -> None:
                state = victim._opened()
                state.begin()
                state.writing.execute("UPDATE notes SET value = 'other'")
                state.commit(replace(state.position, digest=state.digest))

            await victim._thread(corrupt)
            await writer.run(note("b"))
            with pytest.raises(CatalogDivergedException, match="other rows"):
                await rows(victim, "notes")


async def test_without_digests_a_state_with_other_rows_would_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L12, switched off."""
    monkeypatch.setattr(State, "digest", 0)
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        await test_a_state_with_other_rows_stops_the_replica(tmp_path)


async def test_without_the_probe_a_store_that_ignores_conditions_would_lose_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L13, switched off."""

    async def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(Log, "probe", nothing)
    config = InMemoryConnectorConfig(name=f"l{next(numbers)}", capabilities=Capabilities())
    place = Place(tmp_path, config=config)
    async with place.replica() as one, place.replica() as two:
        await one.run(note("a"))
        await two.run(note("b"))
    async with place.replica() as reader:
        assert [row[0] for row in await rows(reader, "notes")] == ["b"]


async def test_one_entry_renews_all_leases_and_there_is_none_without_a_transaction(
    tmp_path: Path,
) -> None:
    """L11."""
    place = Place(tmp_path)
    async with place.replica() as replica:
        for each in "ab":
            await replica.run(stage(each, each))
        before = await place.names("log")
        tokens = [["a", 0], ["b", 0]]
        kept = await replica.run(Command("heartbeat", {"tokens": tokens}))
        assert [list(each) for each in kept] == tokens
        assert len(await place.names("log")) == len(before) + 1
        assert await replica.run(Command("heartbeat", {"tokens": []})) == []
        assert len(await place.names("log")) == len(before) + 1


async def test_what_a_heartbeat_renewed_cannot_be_claimed(tmp_path: Path) -> None:
    """L11, P22: one heartbeat keeps all transactions of a process from being claimed."""
    place = Place(tmp_path)
    async with place.replica() as owner, place.replica() as other:
        owner._lease = 1000 * SECOND
        for each in "ab":
            await owner.run(stage(each, each))
        await other.learn_time()
        for _ in range(3):
            other._clock.sample(owner.position.time / SECOND + 900)
            owner._clock.sample(owner.position.time / SECOND + 900)
            assert await other.run(Command("claim", {"limit": 9, "by": "web-1:1"})) == []
            await owner.run(Command("heartbeat", {"tokens": [["a", 0], ["b", 0]]}))
        other._clock.sample(owner.position.time / SECOND + 1100)
        assert sorted(await other.run(Command("claim", {"limit": 9, "by": "web-1:1"}))) == [
            "a",
            "b",
        ]


async def test_without_renewing_all_leases_a_living_transaction_would_be_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L11, switched off."""
    heartbeat = commands.COMMANDS["heartbeat"]

    def first_alone(entry: commands.Entry, arguments: Any, local: Any) -> Any:
        return heartbeat(entry, {"tokens": arguments["tokens"][:1]}, local)

    changed = {**commands.COMMANDS, "heartbeat": first_alone}
    for module in (commands, following):
        monkeypatch.setattr(module, "COMMANDS", changed)
    with pytest.raises(AssertionError):
        await test_what_a_heartbeat_renewed_cannot_be_claimed(tmp_path)


class HourAgo(datetime):
    """The clock of a store, an hour ago."""

    @classmethod
    @override
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls.fromtimestamp(time.time() - 3600, tz)


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
async def test_a_machine_whose_clock_is_wrong_ends_no_lease_and_no_late_write_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """L10: times are the store's, even in reads before the first entry of a process."""
    store = InMemoryConnectorConfig(name=f"l{next(numbers)}")
    config = BucketBackendConfig(namespace="bucket", connector=store)
    late = LateWrite(namespace="bucket", key="a", write=WriteId("t", 1))
    async with opened(config) as right:
        await right.begin_writes(new_transaction(), [A], plan_for(A))
        done = new_transaction()
        await right.begin_writes(done, [B], plan_for(B))
        await right.abort(done)
        settlement = Settlement(late_writes=[late], keep_locked=[B])
        await right.settle(done, settlement)
        monkeypatch.setattr(time, "time", lambda now=time.time: now() + ahead)
        async with opened(config) as wrong:
            assert await wrong.due_late_writes(after=None, limit=9) == []
            assert await wrong.claim(9) == []
            with pytest.raises(RecordLockedException):
                await wrong.begin_writes(new_transaction(), [A], plan_for(A))
            with pytest.raises(RecordLockedException):
                await wrong.begin_writes(new_transaction(), [B], plan_for(B))
            await put(wrong, C)
            assert await wrong.due_late_writes(after=None, limit=9) == []
            monkeypatch.undo()
            assert isinstance(wrong, BucketBackend)
            assert abs(wrong._replica.position.time / SECOND - time.time()) < 60
        assert len(await right.claim(9)) == 0


async def claimed(backend: Backend) -> bool:
    return len(await backend.claim(9)) == 1


async def taken_over(backend: Backend) -> bool:
    return len(await backend.claim_jobs(["undo"], limit=9)) == 1


async def locked_again(backend: Backend) -> bool:
    await backend.begin_writes(new_transaction(), [B], plan_for(B))
    return True


async def seen_to_be_over(backend: Backend) -> bool:
    [found] = await backend.transactions(after="", limit=9)
    return found.lease_left < 0


@pytest.mark.parametrize("finds", [claimed, taken_over, locked_again, seen_to_be_over])
async def test_a_machine_whose_clock_is_behind_finds_at_once_what_is_over(
    monkeypatch: pytest.MonkeyPatch, finds: Callable[[Backend], Awaitable[bool]]
) -> None:
    """L10: an answer that appends nothing uses the store's time, too."""
    store = InMemoryConnectorConfig(name=f"l{next(numbers)}")
    config = BucketBackendConfig(namespace="bucket", connector=store)
    job = Job(transaction_id="t", number=1, name="undo", arguments="{}", after=None)
    with monkeypatch.context() as patch:
        patch.setattr("fennflow_memory.connector.datetime", HourAgo)
        async with opened(config) as dead:
            await dead.begin_writes(new_transaction(), [A], plan_for(A))
            done = new_transaction()
            await dead.begin_writes(done, [B], plan_for(B))
            await dead.abort(done)
            await dead.settle(done, Settlement(keep_locked=[B]))
            await dead.add_jobs([job])
            await dead.claim_jobs(["undo"], limit=9)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - 7200)
    async with opened(config) as behind:
        assert await finds(behind)


async def test_a_machine_whose_clock_is_ahead_finds_what_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """L10, P37: otherwise it answers that the time of the transaction has expired."""
    store = InMemoryConnectorConfig(name=f"l{next(numbers)}")
    config = BucketBackendConfig(namespace="bucket", connector=store)
    token = new_transaction()
    async with opened(config) as owner:
        await owner.begin_writes(token, [A], plan_for(A))
        await owner.hold(token, Commit(), 1800.0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda now=time.time: now() + 3600)
        async with opened(config) as ahead:
            [found] = await ahead.transactions(after="", limit=9)
            assert found.is_held
        async with opened(config) as ahead:
            assert await ahead.take_held(token.transaction_id) is not None


async def test_a_machine_whose_clock_is_ahead_deletes_nothing_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L8: not even after a snapshot before its first entry."""
    place = Place(tmp_path, Limits(snapshot_entries=3, retention=1000.0))
    async with place.replica() as replica:
        for number in range(8):
            await replica.run(note(f"n{number}"))
            await tidied(replica)
    place.limits = Limits(snapshot_entries=1, retention=1000.0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda now=time.time: now() + 3600)
        async with place.replica() as ahead:
            await ahead.run(Command("claim", {"limit": 9, "by": "web-1:1"}))
            await tidied(ahead)
    assert max(await place.names("snapshot")) == 7
    assert await place.names("boundary") == []


async def test_a_process_that_may_not_write_takes_over_nothing(tmp_path: Path) -> None:
    """Others work meanwhile; the missing permission is an error only when it has to write."""

    class ReadOnly(faults.Faults):
        @override
        async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
            if operation.name == "put":
                message = "403: not allowed"
                raise AccessDeniedException(message)
            return await effect()

    place = Place(tmp_path)
    async with place.replica() as writer, place.replica(ReadOnly()) as reader:
        await writer.run(stage("t", "a"))
        assert await reader.run(Command("claim", {"limit": 9, "by": "web-1:1"})) == []
        await reader.learn_time()
        writer._lease = -1
        await writer.run(Command("heartbeat", {"tokens": [["t", 0]]}))
        with pytest.raises(AccessDeniedException):
            await reader.run(Command("claim", {"limit": 9, "by": "web-1:1"}))


async def test_a_command_that_changes_nothing_learns_no_time_from_an_old_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L10: otherwise a process that joins an idle catalog would use the time of its last entry."""

    place = Place(tmp_path)
    monkeypatch.setattr("fennflow_memory.connector.datetime", HourAgo)
    async with place.replica() as first:
        await first.run(stage("a", "a"))
    monkeypatch.undo()
    async with place.replica() as second:
        assert await second.run(Command("heartbeat", {"tokens": []})) == []
        assert abs(second.now() / SECOND - time.time()) < 60
        await second.run(stage("b", "b"))
        assert abs(second.now() / SECOND - time.time()) < 60


async def test_a_catalog_that_cannot_be_read_when_it_is_opened_is_unavailable(
    tmp_path: Path,
) -> None:
    class NoReads(faults.Faults):
        @override
        async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
            if operation.name == "get":
                raise refused()
            return await effect()

    place = Place(tmp_path)
    async with place.replica() as replica:
        await replica.run(stage("a", "a"))
    with pytest.raises(BackendUnavailableException, match="could not be reached: Connector"):
        async with place.replica(NoReads()):
            pass


@dataclass
class Dies(faults.Faults):
    """The process is killed at a request, before or after the store has done it."""

    at: int = 1 << 30
    done: bool = False
    count: int = 0

    @override
    async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
        self.count += 1
        if self.count == self.at and self.done:
            await effect()
        if self.count >= self.at:
            raise refused()
        return await effect()


async def tidy_and_die(tmp_path: Path, *, at: int | None, done: bool) -> int:
    """Write a snapshot and delete what it replaces, killed at a request; return how many there were."""
    place = Place(tmp_path, Limits(snapshot_entries=3, retention=-1.0))
    dying = Dies(done=done)
    async with place.replica(dying) as replica:
        replica._limits = Limits()  # with which it does not tidy up by itself
        for name in "abcd":
            await replica.run(stage(name, name))
            await replica.run(commit(name, name))
            if name == "b":
                await replica._write_snapshot()
        state = await rows(replica, "records")
        replica._limits = place.limits
        begun = dying.count
        dying.at = 1 << 30 if at is None else begun + at
        await replica._tidy()
        requests = dying.count - begun
    async with place.replica() as survivor:
        survivor._limits = Limits()
        assert await rows(survivor, "records") == state
        kept = await followed(survivor)
        assert kept == list("abcd")[4 - len(kept) :]
        await survivor.run(stage("e", "e"))
        await survivor.run(commit("e", "e"))
        survivor._limits = place.limits
        await survivor._write_snapshot()
        await survivor.collect()
        last = survivor.position.number
        assert await place.names("snapshot") == await place.names("boundary") == [last]
        assert await place.names("log") == []
    return requests


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
async def test_a_process_that_dies_at_any_request_of_a_snapshot_or_a_deletion_loses_nothing(
    tmp_path: Path, *, done: bool
) -> None:
    """L7, L8: the next process has the same state, goes on, and leaves no more than it would alone."""
    requests = await tidy_and_die(tmp_path, at=None, done=done)
    assert requests > 3
    for at in range(1, requests + 1):
        await tidy_and_die(tmp_path, at=at, done=done)


async def test_an_entry_of_a_newer_version_is_refused_and_both_versions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    async with place.replica() as writer:
        with monkeypatch.context() as patch:
            patch.setattr("fennflow_bucket.log.FORMAT", 2)
            await writer.run(note("a"))
    with pytest.raises(ConfigException, match=r"version 2 .* supports version 1"):
        async with place.replica():
            pass


@pytest.mark.parametrize("weak", ["condition", "listing"])
async def test_an_unsuitable_store_is_refused_with_the_reason_and_an_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weak: str
) -> None:
    """L13."""
    capabilities = Capabilities() if weak == "condition" else None
    config = InMemoryConnectorConfig(name=f"l{next(numbers)}", capabilities=capabilities)
    place = Place(tmp_path, config=config)

    async def nothing() -> AsyncGenerator[StoredObject]:
        found: list[StoredObject] = []
        for each in found:
            yield each

    async with place.replica() as replica:
        if weak == "listing":
            log = replica._log
            monkeypatch.setattr(log.connector, "list", lambda *_, **__: nothing())
        with pytest.raises(ConfigException, match="SqlalchemyBackendConfig") as caught:
            await replica.run(note("a"))
        observed = {"condition": "If-None-Match", "listing": "did not list"}[weak]
        assert observed in str(caught.value)
    assert await place.names("log") == []
    outside = place.connector(NoFaults())
    assert [each async for each in outside.list("bucket", ROOT)] == []


async def test_a_snapshot_replaces_the_entries_before_it(tmp_path: Path) -> None:
    """L6, L7."""
    place = Place(tmp_path, Limits(snapshot_entries=5))
    async with place.replica() as replica:
        for number in range(12):
            await replica.run(note(f"n{number}"))
            await tidied(replica)
        state = await rows(replica, "notes")
    snapshots = await place.names("snapshot")
    assert len(snapshots) >= 2
    log = place.log()
    entries = await log.list("log")
    await log.create("boundary", snapshots[-1], b"")
    await log.delete([each for number, each in entries.items() if number <= snapshots[-1]])
    async with place.replica() as reader:
        assert await rows(reader, "notes") == state
        await reader.run(note("more"))


async def test_a_snapshot_that_comes_in_one_piece_is_not_held_as_a_whole(tmp_path: Path) -> None:
    """A large file comes in chunks of several MiB, whose lines take many times as much."""
    place = Place(tmp_path)
    async with place.replica() as replica:
        notes = [replica.run(note(f"n{number}", token_hex(4000))) for number in range(300)]
        await asyncio.gather(*notes)
        await replica._write_snapshot()
        expected = await rows(replica, "notes")
    number, stored = max((await place.log().list("snapshot")).items())
    body = b"".join([chunk async for chunk in place.log().stream(stored)])
    state = State(tmp_path / "other.db", kept=False)
    state.begin()
    loading = Loading(state, "a snapshot")
    tracemalloc.start()
    loading.feed(body)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    state.commit(loading.finish(number, len(body)))
    assert state.reading.execute("SELECT * FROM notes").fetchall() == expected
    state.close()
    assert most < 2 * len(body)


async def tidied(replica: Replica) -> None:
    """Wait until no snapshot is being written."""
    if replica._tidying is not None:
        await asyncio.wait({replica._tidying})
        replica._tidying.result()


@pytest.mark.parametrize("error", [denied(), OSError("not a connector's")])
async def test_a_snapshot_that_is_cancelled_ends_so_if_its_upload_cannot_be_aborted(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the upload; nothing masks the cancellation."""
    log = Log(Place(Path()).connector(NoFaults()), "bucket", ROOT)
    uploading = asyncio.Event()

    async def upload(request: PutRequest, _: object) -> None:
        assert request.on_upload is not None
        await request.on_upload("upload 7")
        uploading.set()
        await asyncio.Event().wait()

    async def abort_upload(*_: object) -> None:
        raise error

    async def nothing() -> AsyncIterator[bytes]:
        yield b""

    with mock.patch.multiple(log.connector, upload=upload, abort_upload=abort_upload):
        writing = asyncio.create_task(log.upload_snapshot(3, nothing()))
        await uploading.wait()
        writing.cancel()
        await asyncio.wait({writing})
    assert writing.cancelled()
    assert "upload 7" in caplog.text
    assert str(error) in caplog.text


async def test_only_a_snapshot_that_is_old_enough_lets_entries_be_deleted(tmp_path: Path) -> None:
    """L8."""
    place = Place(tmp_path, Limits(snapshot_entries=3, retention=1000.0))
    async with place.replica() as replica:
        for number in range(8):
            await replica.run(note(f"n{number}"))
            await tidied(replica)
        await replica.collect()
        assert await place.names("log") == list(range(8))
        assert await place.names("boundary") == []
        replica._limits = Limits(snapshot_entries=3, retention=-1.0)
        await replica.collect()
        last = (await place.names("snapshot"))[-1]
        assert await place.names("snapshot") == [last]
        assert await place.names("boundary") == [last]
        assert await place.names("log") == list(range(last + 1, 8))
        state = await rows(replica, "notes")
    async with place.replica() as reader:
        assert await rows(reader, "notes") == state


async def test_uploads_of_snapshots_that_processes_left_which_died_are_aborted(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """L8: those that are old and replaced, of this catalog alone."""
    store = await make_store("moto", request)
    async with store.connector() as connector:
        log, other = [Log(connector, store.namespace, f"{ROOT}{each}") for each in ("", "2")]
        replica = Replica(log, Limits(snapshot_entries=3), lease=ENOUGH, late=ENOUGH)
        await replica.open(tmp_path / "state.db", kept=False)
        for number in range(6):
            await replica.run(note(f"n{number}"))
            await tidied(replica)
        newest = max(await log.list("snapshot"))
        keys = [log.name("snapshot", 1), log.name("snapshot", newest + 1)]
        keys += [other.name("snapshot", 1), f"{ROOT}/snapshot/1", "user's"]
        for key in keys:
            await connector.begin_upload(
                store.namespace, key, ObjectAttributes(media_type="text/plain"), expires_in=60
            )

        async def unfinished() -> list[str]:
            return [each.key async for each in connector.uploads(store.namespace, "")]

        await log.abort_uploads(until=newest, before=0.0)  # all are younger
        assert sorted(await unfinished()) == sorted(keys)
        await replica.collect()
        assert sorted(await unfinished()) == sorted(keys[1:])
        assert len(await rows(replica, "notes")) == 6
        await replica.aclose()


async def test_a_feed_is_refused_where_the_log_was_deleted_and_goes_on_where_it_was_not(
    tmp_path: Path,
) -> None:
    """P38, L8: also if a late request creates again what was deleted."""
    place = Place(tmp_path, Limits(snapshot_entries=4, retention=-1.0))
    async with place.replica() as replica:
        cursors = [await feed.last_cursor(replica)]
        for name in "abcdefg":
            await replica.run(stage(name, name))
            await replica.run(commit(name, name))
            await tidied(replica)
            cursors.append(await feed.last_cursor(replica))
        [boundary] = await place.names("boundary")
        log = place.log()
        late = await log.read(boundary + 1)
        assert late is not None
        for position in range(boundary + 1):
            await log.create("log", position, late)
        kept = [cursor for cursor in cursors if int(cursor.partition(".")[0]) > boundary]
        assert 1 < len(kept) < len(cursors)
        for cursor in cursors:
            if cursor not in kept:
                with pytest.raises(CursorException, match="Start over"):
                    await feed.commits(replica, cursor, 1)
        for number, cursor in enumerate(reversed(kept)):
            assert await followed(replica, cursor) == list("abcdefg")[7 - number :]
        assert await followed(replica) == list("abcdefg")[8 - len(kept) :]


async def test_commits_that_share_an_entry_are_in_the_feed_one_by_one(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.replica() as replica:
        await replica.run(note("first"))
        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(replica.run(stage(name, name)))
        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(replica.run(commit(name, name)))
        assert len(await place.names("log")) < 6
        seen: list[str] = []
        after: str | None = None
        while page := await feed.commits(replica, after, 1):
            assert await followed(replica, page[0].cursor) == list("abc")[len(seen) + 1 :]
            seen.append(page[0].transaction_id)
            after = page[0].cursor
        assert seen == list("abc")


async def test_a_cursor_of_another_log_is_refused(tmp_path: Path) -> None:
    """As after the bucket was restored: the positions are there, and other entries."""
    cursors: list[str] = []
    for name in "ab":
        place = Place(tmp_path)
        async with place.replica() as replica:
            for number in range(3):
                await replica.run(note(f"{name}{number}"))
            for cursor in cursors:
                with pytest.raises(CursorException):
                    await feed.commits(replica, cursor, 1)
            cursors.append(await feed.last_cursor(replica))
            await replica.run(note("more"))
            for cursor in cursors[:-1]:
                with pytest.raises(CursorException):
                    await feed.commits(replica, cursor, 1)
            assert await feed.commits(replica, cursors[-1], 1) == []
            with pytest.raises(CursorException):
                await feed.commits(replica, "0.1.", 1)  # the entry has no commits


async def test_an_entry_that_is_missing_from_the_feed_is_reported(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.replica() as replica:
        for number in range(3):
            await replica.run(note(f"n{number}"))
        log = place.log()
        await log.delete([(await log.list("log"))[1]])
        with pytest.raises(CatalogDivergedException, match="it was removed"):
            await feed.commits(replica, None, 1)


async def test_a_replica_that_slept_does_not_believe_a_log_that_was_truncated_meanwhile(
    tmp_path: Path,
) -> None:
    """L5: below a boundary a free position, and an entry that was accepted there, mean nothing."""
    place = Place(tmp_path, Limits(snapshot_entries=3, retention=-1.0))
    async with place.replica() as sleeper, place.replica() as writer:
        await sleeper.run(note("a"))
        slept_at = sleeper.position.number
        for number in range(9):
            await writer.run(note(f"n{number}"))
            await tidied(writer)
        assert slept_at + 1 < (await place.names("log"))[0]
        sleeper._contact = None
        await sleeper.run(note("b"))
        assert sleeper.position.number == slept_at + 10
        assert await rows(sleeper, "notes") == await rows(writer, "notes")


async def test_readers_go_on_while_the_log_is_truncated(tmp_path: Path) -> None:
    """L6."""
    place = Place(tmp_path, Limits(snapshot_entries=2, retention=-1.0))
    async with place.replica() as writer:
        done = asyncio.Event()

        async def write() -> None:
            for number in range(25):
                await writer.run(note(f"n{number:02}"))
            done.set()

        async def look() -> None:
            while not done.is_set():
                async with place.replica() as reader:
                    # What is deleted at once may be missed; what is read is still a state of the log.
                    seen = [row[0] for row in await rows(reader, "notes")]
                    assert seen == [f"n{number:02}" for number in range(len(seen))]

        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            group.create_task(look())


async def test_a_snapshot_that_is_missing_or_damaged_is_reported(tmp_path: Path) -> None:
    place = Place(tmp_path, Limits(snapshot_entries=2, retention=-1.0))
    async with place.replica() as writer:
        for number in range(6):
            await writer.run(note(f"n{number}"))
            await tidied(writer)
    log = place.log()
    newest, stored = (await log.list("snapshot")).popitem()
    _, body = await log.connector.get("bucket", Location(log.name("snapshot", newest)))
    await log.delete([stored])
    with pytest.raises(CatalogDivergedException, match="is missing"):
        async with place.replica():
            pass
    await log.create("snapshot", newest, body[:-20])
    with pytest.raises(CatalogDivergedException, match="is damaged"):
        async with place.replica():
            pass


ENTRY: dict[str, Any] = {
    "format": 1, "position": 0, "writer": "w", "seq": 1, "at": 1, "digest": "0", "lease": 1,
    "late": 1, "waited": 0, "commands": [],
}  # fmt: skip
HEADER: dict[str, Any] = {"format": 1, "position": 0, "digest": "0", "time": 1, "last": ""}
FORGED: list[bytes] = [b"", b"null", b"1" * 6000, b"[" * 100_000, b'{"format": 1}']
FORGED_VALUES: dict[str, Any] = {
    "at": 2**70, "position": "0", "digest": "z", "writer": ["w"], "seq": "1", "waited": "x", "commands": 5,
}  # fmt: skip
FORGED_COMMANDS: list[Any] = [
    ["os.system", {"id": "id"}],
    [["note"], {}],
    ["note", {"name": 2**70, "value": ""}],
    ["note", {"name": "n", "value": "\ud800"}],
    ["note", {"name": {}, "value": ""}],
    ["commit", None],
]
FORGED_ROWS: list[Any] = [5, [], [["notes"]], ["notes", 1], ["notes", {}, ""], ["sqlite_master", 1]]


def lines(*values: Any) -> bytes:
    return b"\n".join(json.dumps(each).encode() for each in values)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *(("log", each) for each in FORGED),
        *(("log", lines(ENTRY | {name: value})) for name, value in FORGED_VALUES.items()),
        *(("log", lines(ENTRY | {"commands": [each]})) for each in FORGED_COMMANDS),
        *(("snapshot", each) for each in FORGED),
        ("snapshot", lines(HEADER | {"time": 2**70}, {"rows": 0})),
        *(("snapshot", lines(HEADER, each, {"rows": 1})) for each in FORGED_ROWS),
    ],
)
async def test_an_object_that_fennflow_did_not_write_is_an_error_of_ours(
    kind: str, text: bytes, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    packed = zlib.compress(text + b"\n", wbits=15 if kind == "log" else 31)
    await place.log().create(kind, 0, packed)
    for _ in range(2):
        with pytest.raises(CatalogDivergedException, match="changed by something other"):
            async with place.replica():
                pass


@pytest.mark.parametrize(
    "commands",
    [
        [
            ["fill", {"id": "f", "area": ["n", ""], "begins": True, "hidden": "h", "removed": [],
                      "records": [["h", "k", "t", 1, body]]}],
            ["end_fill", {"id": "f", "area": ["n", ""], "hidden": "h"}],
        ]
        for body in ("", "{}", "[]", "[" * 9999, json.dumps([1] * 11), json.dumps(["a"] * 11))
    ],
)  # fmt: skip
async def test_a_row_that_fennflow_did_not_write_is_an_error_of_ours(
    commands: list[Any], tmp_path: Path
) -> None:
    place = Place(tmp_path)
    entry = zlib.compress(lines(ENTRY | {"commands": commands}))
    await place.log().create("log", 0, entry)
    async with place.replica() as replica:
        with pytest.raises(CatalogDivergedException, match="changed by something other"):
            await replica.read(lambda db: records_at(db, [ObjectKey("n", "k")]))


COMMIT: dict[str, Any] = {
    "id": "t", "token": 0, "records": [], "removed": [["n", "a"]], "steps": "[]", "late": [], "jobs": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "forged",
    [
        {"id": 5},
        {"removed": [["n", "a"], ["n", None]]},
        {"removed": [[5, "a"]]},
        *(
            {"records": [[namespace, "k", "t", seq, json.dumps([*"kveabcd", {}, headers, 1, 1])]]}
            for namespace, seq, headers in ((5, 1, {}), ("n", "x", {}), ("n", 1, {"a": 5}))
        ),
    ],
)
async def test_a_commit_that_fennflow_did_not_write_is_an_error_of_ours(
    forged: dict[str, Any], tmp_path: Path
) -> None:
    place = Place(tmp_path)
    arguments = COMMIT | forged
    begin = {"id": arguments["id"], "begins": True, "token": 0, "keys": [], "intents": [], "by": ""}
    entry = ENTRY | {"commands": [["begin_writes", begin], ["commit", arguments]]}
    await place.log().create("log", 0, zlib.compress(lines(entry)))
    async with place.replica() as replica:
        with pytest.raises(CatalogDivergedException, match="changed by something other"):
            await feed.commits(replica, None, 10)


@pytest.mark.parametrize("after", ["x", "os.system"])
async def test_a_job_that_fennflow_did_not_write_is_an_error_of_ours(
    after: str, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    command = ["add_jobs", {"jobs": [["t", 1, "name", "{}", after, None]]}]
    await place.log().create("log", 0, zlib.compress(lines(ENTRY | {"commands": [command]})))
    async with place.replica() as replica:
        with pytest.raises(CatalogDivergedException, match="changed by something other"):
            await replica.read(lambda db: jobs_in(db, "t", 10))


async def test_a_kept_file_is_brought_up_to_date_and_one_of_another_log_is_not_believed(
    tmp_path: Path,
) -> None:
    place, other = Place(tmp_path), Place(tmp_path)
    path = tmp_path / "kept.db"
    async with place.replica(path=path) as replica:
        await replica.run(note("a"))
    async with other.replica() as foreign:
        await foreign.run(note("other"))
    async with place.replica() as writer:
        await writer.run(note("b"))
    async with place.replica(path=path) as replica:
        assert [row[0] for row in await rows(replica, "notes")] == ["a", "b"]
    async with other.replica(path=path) as replica:
        assert [row[0] for row in await rows(replica, "notes")] == ["other"]


async def test_a_log_that_disappears_is_reported_by_the_processes_that_know_it(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    async with place.replica() as replica:
        await replica.run(note("a"))
        log = place.log()
        await log.delete(list((await log.list("log")).values()))
        replica._contact = None
        with pytest.raises(CatalogDivergedException, match="removed or replaced"):
            await rows(replica, "notes")
