"""Recovery in the background of an engine: leases, takeover, late writes and the sweep.

`tests/crashes` kills processes at other moments.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
)
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uuid_utils
from typing_extensions import override

import crashing
import fennflow_memory.connector
from controlled_loop import controlled
from crashing import Site, make_site, start, text
from fennflow import plugins
from fennflow.backends import (
    Backend,
    Commit,
    InMemoryBackendConfig,
    Intent,
    LateWrite,
    ObjectKey,
    Placement,
    Settlement,
    SqlalchemyBackendConfig,
    TransactionToken,
    WriteId,
)
from fennflow.connectors import (
    Capabilities,
    InMemoryConnectorConfig,
    Location,
    ObjectAttributes,
    PendingUpload,
    PutRequest,
    StoredObject,
)
from fennflow.engine import garbage, leases
from fennflow.engine.concurrency import Periodic
from fennflow.engine.runtime import engine_for
from fennflow.engine.stamps import Stamp, stamped
from fennflow.exceptions import (
    AccessDeniedException,
    BackendUnavailableException,
    ConnectorUnavailableException,
    NoSuchNamespaceException,
    RecordLockedException,
    TransactionException,
    TransactionLostException,
)
from fennflow.repositories import CrudRepository, RepoField
from fennflow.testing import Boundary, S3Server, faults
from fennflow.testing.backend_values import new_transaction, opened
from stores import Store, make_store, numbers, raw_client

UNCOMMITTED = Boundary("after", "put")
COMMITTED = Boundary("before", "copy")


@pytest.fixture(params=["sqlite", "postgresql"])
async def site(request: pytest.FixtureRequest, moto: S3Server) -> Site:
    """Return moto's server with each of the databases."""
    del moto
    return await make_site("moto", request.param, request)


def changed(site: Site, **settings: object) -> Site:
    """Return a class with a separate engine, like another process."""
    return replace(site, settings={**site.settings, **settings})


async def put(site: Site, key: str, value: str) -> None:
    async with site.uow_class() as uow:
        await uow.files.put(text(value, key))


async def read(site: Site, key: str) -> str:
    async with site.uow_class() as uow:
        data = (await uow.files.get(key)).one().data
        assert isinstance(data, bytes)
        return data.decode()


async def leave(site: Site, key: str, at: Boundary) -> None:
    """Leave a transaction of a process that dies while it overwrites a key."""
    process, pipe = start(crashing.die, site, key, at)
    await asyncio.to_thread(process.join)
    pipe.close()


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 60
    while not await condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.05)


@pytest.fixture
def frequent_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines renew leases every half second; the leases stay as long as before."""

    def often(interval: float, work: Callable[[], Coroutine[Any, Any, bool]]) -> Periodic:
        return Periodic(interval / 40, work)

    monkeypatch.setattr(leases, "Periodic", often)


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_a_transaction_keeps_its_lease_as_long_as_it_lives(site: Site) -> None:
    """P22: the heartbeat renews it; no other process can claim the transaction."""
    other = changed(site, lease_ttl=59.0)

    async def lease_until() -> float:
        [found] = await site.sql("SELECT lease_until FROM {}transactions")
        return float(found)

    async with site.uow_class() as uow:
        await uow.files.put(text("mine", "a"))
        for _ in range(3):
            before = await lease_until()

            async def renewed(before: float = before) -> bool:
                return await lease_until() > before

            await eventually(renewed)
            report = await other.uow_class.recover()
            assert report.rolled_forward == report.compensated == report.pending == 0
        await uow.files.put(text("mine", "b"))
    assert await read(site, "b") == "mine"


async def test_a_transaction_that_was_claimed_sends_nothing_more(site: Site) -> None:
    """P23, P25: its token is outdated, and it sends no request although its work is unfinished."""
    uow_class, other = site.uow_class, changed(site, lease_ttl=59.0)
    with pytest.raises(TransactionLostException):
        async with uow_class() as uow:
            await uow.files.put(text("mine", "a"))
            await site.expire()
            assert (await other.uow_class.recover()).compensated == 1
            await uow.files.put(text("mine", "b"))
    assert await site.store.objects() == {}
    assert await site.journal() == {"transactions": 0, "intents": 0, "locks": 0, "late_writes": 1}


async def test_a_lease_that_cannot_be_renewed_ends_by_the_clock_of_its_owner(
    site: Site, moto: S3Server
) -> None:
    """P23: before it ends by the database's, and before others take over."""

    async def no_heartbeat(_when: str, operation: str, _key: str) -> None:
        if operation == "heartbeat":
            raise ConnectionError

    backend = faults.FaultyBackendConfig(inner=site.backend, faults=faults.Scripted(no_heartbeat))
    with plugins.override(faults):
        settings = {**site.settings, "lease_ttl": 3.0, "max_concurrency": 1}
        uow_class = site.store.uow(backend=backend, **settings)
        async with uow_class() as uow:
            await uow.files.put(text("up", "warm"))
        files = [text("mine", str(number)) for number in range(9)]
        lost = pytest.raises(TransactionLostException, match="lease")
        # One after the other; the first is answered when the lease is over.
        with moto.watched() as requests, moto.delayed(3.0), lost:
            async with uow_class() as uow:
                await uow.files.put(*files)
    assert [each.operation for each in requests] == ["PUT"]
    await asyncio.sleep(1.0)
    await site.recover()
    assert await site.store.objects() == {"warm": b"up"}


async def test_a_transaction_does_not_commit_when_it_is_too_old(site: Site) -> None:
    """P27: the sweep of other processes treats it as dead."""
    aged = changed(site, max_transaction_age=0.3)
    with pytest.raises(TransactionException, match="max_transaction_age"):
        async with aged.uow_class() as uow:
            await uow.files.put(text("mine", "a"))
            await asyncio.sleep(0.4)
    assert await site.store.objects() == {}


@pytest.mark.parametrize(("at", "value"), [(UNCOMMITTED, "old"), (COMMITTED, "new")])
async def test_transactions_of_a_dead_process_are_finished_at_first_use(
    site: Site, at: Boundary, value: str
) -> None:
    """P24, P26."""
    await put(site, "a", "old")
    await leave(site, "a", at)
    [transaction] = await site.uow_class.transactions()
    assert transaction.state == ("committed" if at == COMMITTED else "open")
    assert transaction.paths == [f"{site.namespace}/a"]
    assert transaction.lease_left > 0
    await site.expire()
    other = changed(site, recovery_interval=3600.0)
    assert await read(other, "a") == value

    async def finished() -> bool:
        return not await other.uow_class.transactions()

    await eventually(finished)
    assert (await site.store.objects())["a"] == value.encode()


async def test_transactions_of_a_dead_process_are_finished_at_intervals(site: Site) -> None:
    """P26: by an engine that was in use before."""
    other = changed(site, recovery_interval=0.1)
    await put(other, "a", "old")
    await leave(site, "a", COMMITTED)
    await site.expire()

    async def finished() -> bool:
        return not (await site.journal())["transactions"]

    await eventually(finished)
    assert await site.store.objects() == {"a": b"new"}


async def test_a_call_that_waits_for_a_path_of_a_dead_process_takes_it_over(site: Site) -> None:
    """P3, P24: it need not wait for the interval."""
    other = changed(site, recovery_interval=3600.0, lock_timeout=60.0)
    await put(other, "a", "old")
    await leave(site, "a", UNCOMMITTED)
    await site.expire()
    await put(other, "a", "newer")
    assert await read(other, "a") == "newer"


async def test_late_writes_are_deleted_when_they_are_due(site: Site, moto: S3Server) -> None:
    """P20 a: only an object that a lost request made after everything was undone."""
    late, fresh = new_transaction(), new_transaction()
    doubts = [
        LateWrite(namespace=site.namespace, key=key, write=WriteId(late.transaction_id, seq))
        for seq, key in enumerate(["a", "b"], start=1)
    ]
    async with opened(site.backend) as backend:
        await backend.begin_writes(
            late, [ObjectKey(site.namespace, key) for key in "ab"], lambda _: ()
        )
        await backend.abort(late)
        await backend.settle(late, Settlement(late_writes=doubts))
    async with raw_client(moto) as client:
        for key, transaction, seq in [("a", late, 1), ("b", fresh, 2)]:
            stamp = {"fennflow_transaction": transaction.transaction_id, "fennflow_seq": str(seq)}
            await client.put_object(Bucket=site.namespace, Key=key, Body=b"late", Metadata=stamp)
    assert (await site.uow_class.recover()).late_writes_checked == 0
    await site.expire()
    assert (await site.uow_class.recover()).late_writes_checked == 2
    assert set(await site.store.objects()) == {"b"}
    assert (await site.journal())["late_writes"] == 0


async def test_an_interrupted_check_of_late_writes_may_still_delete(
    site: Site, moto: S3Server
) -> None:
    """P20 b: its deletion may arrive late, so the key stays locked, whichever process finishes the check."""
    late = new_transaction()
    doubt = LateWrite(namespace=site.namespace, key="a", write=WriteId(late.transaction_id, 1))
    async with opened(site.backend) as backend:
        await backend.begin_writes(late, [ObjectKey(site.namespace, "a")], lambda _: ())
        await backend.abort(late)
        await backend.settle(late, Settlement(late_writes=[doubt]))
    stamp = {"fennflow_transaction": late.transaction_id, "fennflow_seq": "1"}
    async with raw_client(moto) as client:
        await client.put_object(Bucket=site.namespace, Key="a", Body=b"late", Metadata=stamp)

    failed: list[str] = []

    async def fail(when: str, operation: str, key: str) -> None:
        del key
        if (when, operation) == ("before", "settle"):
            failed.append(operation)
            message = "It went away."
            raise BackendUnavailableException(message)

    faulty = faults.FaultyBackendConfig(inner=site.backend, faults=faults.Scripted(fail))
    settings = {**site.settings, "lock_timeout": 0.0}
    await site.expire()
    # The first background turn of the engine may find it.
    with plugins.override(faults), suppress(BackendUnavailableException):
        await site.store.uow(backend=faulty, **settings).recover()
    assert failed
    assert await site.store.objects() == {}
    await site.expire()
    patient = changed(site, late_write_period=960.0, lock_timeout=0.0)
    assert (await patient.uow_class.recover()).pending == 0
    with pytest.raises(RecordLockedException):
        await put(patient, "a", "mine")


async def test_the_sweep_deletes_garbage_and_nothing_else(site: Site, moto: S3Server) -> None:
    """P27: old staged bytes and uploads of this catalog without a live transaction."""
    async with opened(site.backend) as backend:
        own = f".fennflow/{backend.catalog_id}"
    foreign = ".fennflow/another-catalog/some-transaction/1"
    async with raw_client(moto) as client:
        for key in (f"{own}/dead/1", foreign):
            await client.put_object(Bucket=site.namespace, Key=key, Body=b"left")
        patient = changed(site, late_write_period=960.0)
        assert (await patient.uow_class.recover()).swept == 0  # they are too young
        # For moto's server every upload began in 2010.
        await client.create_multipart_upload(Bucket=site.namespace, Key=f"{own}/dead/2")
        await put(patient, "a", "old")
        async with patient.uow_class() as uow:
            await uow.files.put(text("new", "a"))
            await asyncio.sleep(1.1)  # S3 counts seconds; `late_write_period` is half of one
            await changed(site, lock_timeout=1.0).uow_class.recover()
            assert f"{own}/dead/1" not in await site.store.objects()
            uploads = await client.list_multipart_uploads(Bucket=site.namespace)
            assert not uploads.get("Uploads")
    assert await site.store.objects() == {"a": b"new", foreign: b"left"}


class Refusing(faults.FaultyConnector):
    """Has no bucket named gone, lists no uploads, and refuses to read `denied`."""

    @override
    async def probe(self, namespace: str) -> Capabilities:
        if namespace == "gone":
            message = "There is no such bucket."
            raise NoSuchNamespaceException(message)
        return await super().probe(namespace)

    @override
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        if location.key == "denied":
            message = "Not for you."
            raise AccessDeniedException(message)
        return await super().head(namespace, location)

    @override
    async def uploads(self, namespace: str, prefix: str) -> AsyncIterator[PendingUpload]:
        nothing: tuple[PendingUpload, ...] = ()
        for upload in nothing:
            yield upload
        message = "Not for you."
        raise AccessDeniedException(message)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Generator[Store]:
    """Return a store that refuses, with a catalog; the clock is set a day ahead."""

    async def script(*_: str) -> None: ...

    monkeypatch.setattr(faults, "FaultyConnector", Refusing)
    later = SimpleNamespace(time=lambda: time.time() + 86400)
    monkeypatch.setattr(garbage, "time", later)
    inner = InMemoryConnectorConfig(name=f"r{next(numbers)}")
    connector = faults.FaultyConnectorConfig(inner=inner, faults=faults.Scripted(script))
    backend = InMemoryBackendConfig(name=f"r{next(numbers)}")
    with plugins.override(faults):
        yield Store(connector, "bucket", settings={"backend": backend, "late_write_period": 0.001})


def catalog_of(store: Store) -> AbstractAsyncContextManager[Backend]:
    settings = dict(store.settings)
    return opened(settings.pop("backend"), connector=store.config, **settings)


async def leave_late_writes(store: Store, backend: Backend, *places: ObjectKey) -> None:
    """Leave objects of late requests, and their rows in the journal."""
    late = TransactionToken(str(uuid_utils.uuid7()))
    doubts = [
        LateWrite(namespace=n, key=k, write=WriteId(late.transaction_id, 1)) for n, k in places
    ]
    async with store.connector() as connector:
        await backend.begin_writes(late, places, lambda _: ())
        attributes = ObjectAttributes(
            media_type="text/plain", metadata=stamped({}, Stamp(WriteId(late.transaction_id, 1)))
        )
        for namespace, key in places:
            await connector.put(PutRequest(namespace, key, attributes), b"late")
        # From then on an engine's background work may look for them.
        await backend.abort(late)
        await backend.settle(late, Settlement(late_writes=doubts))


async def test_one_refusal_does_not_stop_the_clean_up_of_the_rest(
    refusing: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """P26, P27: a refusal of a bucket, a listing or an object."""

    class Two(refusing.uow()):  # type: ignore[misc]  # a class made at run time
        gone = RepoField(CrudRepository, namespace="gone")

    places = [ObjectKey("bucket", "denied"), ObjectKey("bucket", "z"), ObjectKey("gone", "a")]
    async with catalog_of(refusing) as backend:
        await leave_late_writes(refusing, backend, *places)

        async def due() -> bool:
            return len(await backend.due_late_writes(after=None, limit=10)) == len(places)

        await eventually(due)
        staged = f".fennflow/{backend.catalog_id}/{uuid_utils.uuid7()}/1"
        async with refusing.connector() as connector:
            attributes = ObjectAttributes(media_type="text/plain")
            await connector.put(PutRequest("bucket", staged, attributes), b"left")
        report = await Two.recover()
    assert set(await refusing.objects()) == {"denied"}
    for what in ("1 late writes to bucket", "Late writes to gone", "Leftovers in bucket"):
        assert sum(what in problem for problem in report.problems) == 1
        assert what in caplog.text
    diagnosis = await Two.diagnose()
    assert sum("a listing is refused" in problem for problem in diagnosis.problems) == 1
    assert sum("gone cannot be used" in problem for problem in diagnosis.problems) == 1
    late = "2 late writes still have to be checked and deleted: bucket/denied, gone/a."
    assert sum(late in problem for problem in diagnosis.problems) == 1
    # No lock is left behind by those that could not be looked for.
    async with Two() as uow:
        await uow.files.put(text("mine", "z"))


@pytest.mark.parametrize("database", ["memory", "sqlite"])
async def test_a_bucket_that_is_gone_keeps_no_path_of_another_one_locked(
    refusing: Store, tmp_path: Path, database: str
) -> None:
    """P9, P26: even if a dead process wrote to both; recovery and diagnosis report what is left."""
    if database == "sqlite":
        url = f"sqlite:///{tmp_path}/catalog.db"
        refusing.settings["backend"] = SqlalchemyBackendConfig(url=url)
    refusing.settings |= {"lease_ttl": 2.0, "lock_timeout": 0.0}
    dead = new_transaction()
    keys = [ObjectKey("bucket", "a"), ObjectKey("gone", "a")]
    async with catalog_of(refusing) as backend:
        await backend.begin_writes(
            dead,
            keys,
            lambda _: [
                Intent(
                    seq=seq,
                    namespace=key.namespace,
                    key=key.key,
                    placement=Placement.DIRECT,
                    target=key.key,
                )
                for seq, key in enumerate(keys, 1)
            ],
        )
        # It does not know the bucket that is gone.
        uow_class = refusing.uow(lease_ttl=60.0)

        async def undone() -> bool:
            return (await uow_class.recover()).pending == 1

        async with uow_class.lifespan():
            await eventually(undone)
            async with uow_class() as uow:
                await uow.files.put(text("mine", "a"))
            problems = (await uow_class.recover()).problems
            [left] = [each for each in problems if each.startswith("Transaction")]
            assert "rolled back, and not undone completely yet: gone/a." in left
            assert left in (await uow_class.diagnose()).problems


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_what_is_open_for_longer_than_late_writes_take_is_reported_by_all_who_are_asked(
    refusing: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """P6: other processes need to know why its paths are locked; recovery cannot finish it."""
    uow_class = refusing.uow(lock_timeout=0.0)
    async with uow_class.lifespan(), uow_class() as uow:
        await uow.files.put(text("1", "a"))

        async def logged() -> bool:
            return any("has been open for" in each.getMessage() for each in caplog.records)

        await eventually(logged)
        report = await uow_class.recover()
        named = [each for each in report.problems if "has been open for" in each]
        assert (report.pending, len(named)) == (0, 1)
        assert "bucket/a" in named[0]
        problems = (await uow_class.diagnose()).problems
        assert sum("has been open for" in each and "bucket/a" in each for each in problems) == 1
        with pytest.raises(RecordLockedException, match="has been open for"):
            async with uow_class() as other:
                await other.files.put(text("2", "a"))


async def test_what_another_catalog_staged_is_never_swept(refusing: Store) -> None:
    """P27: whatever its age, it may be the only copy of what was committed."""
    staged = [
        f".fennflow/{uuid_utils.uuid7()}/{uuid_utils.uuid7()}/1",
        ".fennflow/b7/01890000-0000-7000-8000-000000000000/1",
        ".fennflow/something",
    ]
    async with refusing.connector() as connector:
        for key in staged:
            await connector.put(
                PutRequest("bucket", key, ObjectAttributes(media_type="text/plain")), b"1"
            )
    assert (await refusing.uow().recover()).swept == 0
    assert set(await refusing.objects()) == set(staged)


@pytest.mark.parametrize("name", ["dead/1", "0/1", "x\0y/1", f"{'9' * 40}/{'9' * 40}", "a/b/c", ""])
async def test_names_that_no_transaction_has_do_not_stop_the_sweep(
    refusing: Store, name: str
) -> None:
    async with catalog_of(refusing) as backend, refusing.connector() as connector:
        key = f".fennflow/{backend.catalog_id}/{name}"
        await connector.put(
            PutRequest("bucket", key, ObjectAttributes(media_type="text/plain")), b"1"
        )
        assert (await refusing.uow().recover()).swept == 1
    assert await refusing.objects() == {}


async def test_undoing_looks_only_at_versions_that_the_transaction_may_have_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P18: however many older ones there are."""
    looked: list[str] = []

    async def script(when: str, operation: str, key: str) -> None:
        if (when, operation) == ("before", "head"):
            looked.append(key)
        if (when, operation) == ("after", "put"):
            message = "The answer got lost."
            raise ConnectorUnavailableException(message)

    inner = await make_store("memory-versioned", None)  # type: ignore[arg-type]
    old = SimpleNamespace(now=lambda zone: datetime(2020, 1, 1, tzinfo=zone))
    async with inner.connector() as connector:
        with monkeypatch.context() as patched:
            patched.setattr(fennflow_memory.connector, "datetime", old)
            for _ in range(20):
                await connector.put(
                    PutRequest("bucket", "a", ObjectAttributes(media_type="text/plain")), b"old"
                )
    with plugins.override(faults):
        connector_config = faults.FaultyConnectorConfig(
            inner=inner.config, faults=faults.Scripted(script)
        )
        store = Store(connector_config, "bucket")
        backend = InMemoryBackendConfig(name=f"r{next(numbers)}")
        with pytest.raises(ConnectorUnavailableException):
            async with store.uow(backend=backend)() as uow:
                await uow.files.put(text("new", "a"))
    async with inner.connector() as connector:
        assert len(await connector.versions("bucket", "a")) == 20
    assert len(looked) < 5


PROGRAM = """
import asyncio
import pickle
import sys

site = pickle.loads(bytes.fromhex(sys.argv[1]))


async def main():
    uow_class = site.uow_class
    async with uow_class() as uow:
        from fennflow.files import TextContent
        await uow.files.put(TextContent.from_content("mine", filename="a"))


for _ in range(2):
    asyncio.run(main())
"""


def test_a_program_without_lifespan_ends_without_a_warning(site: Site) -> None:
    """It leaves no task behind, neither heartbeat nor recovery."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, pickle.dumps(site).hex()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Leftovers:
    """Units of work that cannot be undone, since the store does not answer.

    Attributes:
        undone: how often the undo of each was started.
    """

    def __init__(self, store: Store, **settings: Any) -> None:
        self.undone: Counter[str] = Counter()
        self.hangs = True
        self.refused = asyncio.Event()
        self.fails = False
        connector = faults.FaultyConnectorConfig(
            inner=store.config, faults=faults.Scripted(self._script)
        )
        faulty = replace(store, config=connector, settings={"compensation_timeout": 0.3})
        self.uow_class = faulty.uow(**settings)

    async def _script(self, when: str, operation: str, key: str) -> None:
        if (when, operation) == ("before", "delete"):
            self.undone[key] += 1
            if self.fails:
                message = "not now"
                raise AccessDeniedException(message)
            if self.hangs:
                await self.refused.wait()
                message = "not any more"
                raise AccessDeniedException(message)

    async def leave(self, *names: str) -> None:
        async def one(name: str) -> None:
            async with self.uow_class() as uow:
                await uow.files.put(text("1", name))
                written.release()
                await asyncio.Event().wait()

        written = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(one(name)) for name in names]
        for _ in names:
            await written.acquire()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.fixture
async def memory(request: pytest.FixtureRequest) -> AsyncGenerator[Store]:
    with plugins.override(faults):
        yield await make_store("memory", request)


@controlled
async def test_what_is_left_over_delays_neither_opening_nor_closing(memory: Store) -> None:
    """P26, P27: closing has one time limit for all of it, and opening does not wait for it."""
    left = Leftovers(memory)
    async with asyncio.timeout(10):
        async with left.uow_class.lifespan():
            await left.leave(*map(str, range(12)))
            async with asyncio.timeout(0.2), left.uow_class() as uow:
                assert await uow.files.list() == []
            begun = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begun < 12 * 0.3 / 2


async def test_recover_tries_again_what_fails_while_it_waits_for_it(memory: Store) -> None:
    """P26: a running attempt may fail because of a cause that the operator has fixed since."""
    left = Leftovers(memory)
    await left.leave("a")

    async def under_way() -> bool:
        return left.undone["a"] == 2

    await eventually(under_way)
    left.hangs = False
    recovering = asyncio.create_task(left.uow_class.recover())
    for _ in range(10):
        await asyncio.sleep(0)
    left.refused.set()
    report = await recovering
    assert (report.compensated, report.pending) == (1, 0)
    assert await memory.objects() == {}


async def test_recover_reports_what_a_turn_finishes_that_was_claiming_when_it_began(
    memory: Store,
) -> None:
    """P26: it is finished before recover() claims, which then does not find it."""
    claims: list[str] = []
    claiming, go_on = asyncio.Event(), asyncio.Event()

    async def script(when: str, operation: str, key: str) -> None:
        if (when, operation) != ("before", "claim"):
            return
        claims.append(key)
        if len(claims) == 1:
            claiming.set()
            await go_on.wait()
        elif recovery._taken:
            await asyncio.wait(recovery._taken)

    backend = faults.FaultyBackendConfig(
        inner=InMemoryBackendConfig(), faults=faults.Scripted(script)
    )
    uow_class = memory.uow(backend=backend)
    async with engine_for(uow_class.config, plugins.registry(), lifespan=True) as engine:
        recovery = engine.recovery
        await claiming.wait()
        token = new_transaction()
        await engine.backend.begin_writes(token, [ObjectKey("bucket", "a")], lambda _: ())
        await engine.backend.hold(token, Commit(), 0.0)  # its lease is over
        recovering = asyncio.create_task(uow_class.recover())
        for _ in range(100):
            await asyncio.sleep(0)
        go_on.set()
        report = await recovering
    assert len(claims) > 2
    assert (report.compensated, report.pending) == (1, 0)


@controlled
async def test_a_wait_for_a_lock_does_not_exceed_its_limit(memory: Store) -> None:
    """Whatever recovery does in the meantime."""
    left = Leftovers(memory, lock_timeout=0.1)
    await left.leave("a")
    with pytest.raises(RecordLockedException):
        async with asyncio.timeout(0.25), left.uow_class() as uow:
            await uow.files.put(text("2", "a"))
    left.hangs = False


@controlled
async def test_waiting_for_a_lock_does_not_retry_failed_steps_earlier(memory: Store) -> None:
    """P9: before the pause ends, nothing is sent to a store that refuses."""
    left = Leftovers(memory, lock_timeout=0.0)
    left.fails = True
    with pytest.raises(ZeroDivisionError):
        async with left.uow_class() as uow:
            await uow.files.put(text("1", "a"))
            raise ZeroDivisionError

    async def tried_again() -> bool:
        return left.undone["a"] == 2

    await eventually(tried_again)
    for _ in range(5):
        with pytest.raises(RecordLockedException):
            async with left.uow_class() as uow:
                await uow.files.put(text("2", "a"))
        await asyncio.sleep(0)
    assert left.undone["a"] == 2
    left.fails = left.hangs = False
    assert (await left.uow_class.recover()).compensated == 1
    async with left.uow_class() as uow:
        await uow.files.put(text("2", "a"))


async def test_a_transaction_that_hangs_does_not_delay_other_leftovers(memory: Store) -> None:
    left = Leftovers(memory)
    await left.leave("a")
    left.fails = True
    with pytest.raises(ZeroDivisionError):
        async with left.uow_class() as uow:
            await uow.files.put(text("1", "b"))
            left.hangs = False
            raise ZeroDivisionError
    left.fails = False

    async def finished() -> bool:
        return [each.paths for each in await left.uow_class.transactions()] == [["bucket/a"]]

    await eventually(finished)
