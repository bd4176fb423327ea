"""A simulated world: processes that share a store and a database, faults, crashes, and a clock.

Everything runs on a `ControlledLoop`: the real engine, the connector in memory, and the backend in
memory, on SQLite, on PostgreSQL, or in the bucket. The choices of a test decide which task runs next, what happens to each
operation, and when processes die. The reference model is a dictionary: what is committed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from enum import Enum
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, TypeVar, cast
from unittest import mock
from uuid import UUID

import uuid_utils
from sqlalchemy import event
from sqlalchemy.engine import URL, Engine
from typing_extensions import override

import fennflow_memory.backend
import fennflow_memory.connector
import remote
import watched_log
from controlled_loop import START, ControlledLoop
from fennflow import ConfigDict, ReconcileConfig, jobs, plugins
from fennflow.backends import (
    Backend,
    BucketBackendConfig,
    InMemoryBackendConfig,
    JournaledTransaction,
    ObjectKey,
    Record,
    SqlalchemyBackendConfig,
    WriteId,
)
from fennflow.config import BackendConfig, ConnectorConfig
from fennflow.connectors import (
    Capabilities,
    Connector,
    Deletion,
    InMemoryConnectorConfig,
    Location,
    ObjectAttributes,
    PutRequest,
    StoredObject,
)
from fennflow.engine import garbage, reconcile, runtime
from fennflow.engine.stamps import Stamp, stamp_of, stamped
from fennflow.exceptions import (
    AccessDeniedException,
    BackendUnavailableException,
    BaseConnectorException,
    CompensationPendingWarning,
    ConnectorUnavailableException,
    NoSuchKeyException,
    PreconditionFailedException,
)
from fennflow.jobs import JobCall
from fennflow.reports import RecoveryReport
from fennflow.repositories import RepoField
from fennflow.testing import faults
from fennflow.testing.faults import Effect, FaultyBackendConfig, FaultyConnectorConfig, Operation
from fennflow_memory.backend import InMemoryBackend
from fennflow_sqlalchemy import engines
from fennflow_sqlalchemy.engines import _sqlite
from modelled_jobs import ModelJob, ModelJobs
from remote import RemoteConnectorConfig
from remote_database import RemoteDatabase
from stores import FullRepository, FullUOW
from watched_log import WatchedLog, replica_of

T = TypeVar("T")
R = TypeVar("R")

TAKEN: ContextVar[list[str]] = ContextVar("TAKEN")
"""The held transactions that the running decision has taken, so as to decide them."""

Overlay = dict[str, bytes | None]
"""What a transaction has changed."""

BUCKET = "bucket"
DATABASE = "world"
NEIGHBOUR = {
    ".fennflow/neighbour/01890000-0000-7000-8000-000000000000/1": b"committed, not applied yet",
    "neighbour": b"not committed yet",
}
"""What another catalog has in the bucket: nothing is ever done to it (P27, I5)."""
DOUBT = 960.0
SIGNATURE = 900.0
"""Seconds for which a store takes a signed request (the ground for P20)."""
LEASE = 60.0
ATTEMPTS = 3
"""Calls after which a compensation or a hook of the model succeeds."""
STAGING = ".fennflow"
NOTES = (f"{STAGING}/catalogs/", f"{STAGING}/catalog/")
"""What is kept in the bucket about catalogs, and of one."""
WRITES = {"put", "upload", "copy", "delete"}
STREAMS = {"upload", "stream"}


class Fate(Enum):
    """What becomes of an operation."""

    WORKS = "works"
    FAILS = "fails, without effect"
    LOST = "takes effect, and the answer is lost"
    LATE = "takes effect later, and the answer is lost"
    CONFLICT = "is answered 409, without effect"
    PARTLY = "a part of a batch of deletions fails"
    CUT = "a stream breaks off after its first byte"
    REPEATED = "takes effect twice: the answer to the first attempt was lost"
    REFUSED = "is refused for good, without effect"
    DENIED = "takes effect, the answer is lost, and it is refused when it is sent again"


DEFINITE = {Fate.WORKS, Fate.CONFLICT, Fate.REFUSED}
"""Fates after which it is known whether a request took effect (P20)."""


@dataclass(frozen=True)
class Quirks:
    """What some stores do, whatever conditions they enforce.

    Args:
        missing_is_404: a conditional copy over an object that is gone is answered 404, not 412.
        nothing_is_412: so is a conditional deletion of nothing, with 412.
    """

    missing_is_404: bool = False
    nothing_is_412: bool = False


@dataclass(eq=False)
class Pending:
    """An operation that was sent and has not taken effect yet."""

    process: int
    operation: Operation
    sent: float
    effect: Callable[[], Coroutine[Any, Any, Any]]


@dataclass(eq=False)
class SimulatedFaults(faults.Faults):
    """Hands the operations of one process to the world."""

    world: World
    process: int

    @override
    async def around(self, operation: Operation, effect: Effect[R]) -> R:
        return await self.world.around(self.process, operation, effect)

    @override
    def cut(self, operation: Operation) -> int | None:
        if self.world.fate is not Fate.CUT:
            return None
        self.world.fate = Fate.WORKS
        self.world.trouble[self.process] += 1
        if operation.name in WRITES:
            self.world.ambiguous = True  # a connection that broke: the sender cannot know
        self.world.note(f"{self.process} {operation.name} {operation.keys[0]} is cut off")
        return 1

    @override
    def spare(
        self, operation: Operation, deletions: Sequence[Deletion]
    ) -> Mapping[int, BaseConnectorException]:
        if len(deletions) > 1 and self.world.fate is Fate.PARTLY and self.world.faulty:
            self.world.fate = Fate.WORKS
            self.world.ambiguous = True
            return {0: ConnectorUnavailableException("This one was not deleted.")}
        return self.world.nothing_to_delete(deletions)


@dataclass
class World:
    """The store, the database, the processes, and what should be true of them.

    Args:
        capabilities: of the store.
        directory: for SQLite; None to have the backend in memory.
        log: of the backend in the bucket; None for another one.
        database: of PostgreSQL; None for another one.
        server: a bucket on a real server; None to have the store in memory.
        settings: of the configuration.
        quirks: of the store.
        strikes: what the drawn fates happen to; None for every operation.
        barred: keys of which the store refuses copies and deletions, and batches with such a one.
        kept: keys of which the store may have kept a version, since it refused a deletion at some time.
        ambiguous: whether anything may still take effect that the engine does not know of.
    """

    capabilities: Capabilities
    directory: Path | None = None
    log: WatchedLog | None = None
    database: RemoteDatabase | None = None
    server: RemoteConnectorConfig | None = None
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    quirks: Quirks = field(default_factory=Quirks)
    strikes: Collection[str] | None = None
    barred: set[str] = field(default_factory=set[str])
    kept: set[str] = field(default_factory=set[str])
    ambiguous: bool = False
    loop: ControlledLoop = field(default_factory=ControlledLoop)
    committed: dict[str, bytes] = field(default_factory=dict[str, bytes])
    history: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    foreign: dict[str, bytes] = field(default_factory=dict[str, bytes])
    fate: Fate = Fate.WORKS
    faulty: bool = True
    over: bool = False
    late: list[Pending] = field(default_factory=list[Pending])
    hidden: set[str] = field(default_factory=set[str])
    strange: set[str] = field(default_factory=set[str])
    logged: list[logging.LogRecord] = field(default_factory=list[logging.LogRecord])
    effects: int = 0
    trouble: Counter[int] = field(default_factory=Counter[int])
    pending: list[Pending] = field(default_factory=list[Pending])
    held: dict[str, Any] = field(default_factory=dict[str, Any])
    on_pivot: dict[str, Callable[[], None]] = field(default_factory=dict[str, Callable[[], None]])
    trace: list[str] = field(default_factory=list[str])
    jobs: ModelJobs = field(init=False)
    _classes: dict[int, type[FullUOW]] = field(default_factory=dict[int, type[FullUOW]])
    _processes: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _patches: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.name = f"w{next(_worlds)}"
        self.jobs = ModelJobs(self)
        self.loop.before_time_passes = self._arrive_by
        self._patch()
        self.store_config: ConnectorConfig = self.server or InMemoryConnectorConfig(
            name=self.name, capabilities=self.capabilities
        )
        if self.log is not None:
            self.backend_config: BackendConfig = self.log.config(self.store_config)
        elif self.database is not None:
            self.backend_config = self.database.config
        elif self.directory is not None:
            url = f"sqlite:///{self.directory}/{DATABASE}.db"
            self.backend_config = SqlalchemyBackendConfig(url=url)
        else:
            self.backend_config = InMemoryBackendConfig(name=self.name)
        settings = ConfigDict(
            connector=self.store_config,
            backend=self.backend_config,
            late_write_period=DOUBT,
            lease_ttl=LEASE,
        )
        registry = plugins.registry()
        new_connector = registry.connector_for(self.store_config).factory
        self.store: Connector = new_connector(self.store_config, settings)
        if isinstance(self.backend_config, BucketBackendConfig) and self.log is not None:
            self.observer: Backend = self.log.watch(self.backend_config, settings, self._on_commit)
        else:
            new_backend = registry.backend_for(self.backend_config).factory
            self.observer = new_backend(self.backend_config, settings)
        self.loop.run(self.observer.open())
        stamp = Stamp(WriteId("01890000-0000-7000-8000-000000000000", 1), catalog_id="neighbour")
        theirs = ObjectAttributes(media_type="text/plain", metadata=stamped({}, stamp))
        for key, body in NEIGHBOUR.items():
            self.now_do(self.store.put(PutRequest(BUCKET, key, theirs), body))

    # --- processes ---------------------------------------------------------------------------

    def new_process(self, **settings: Any) -> int:
        """Return a process, which opens an engine of its own at first use."""
        process = next(self._processes)
        world, fate = self, SimulatedFaults(self, process)

        class UOW(FullUOW):
            files = RepoField(FullRepository, namespace=BUCKET)
            config = ConfigDict(
                **{
                    "connector": FaultyConnectorConfig(inner=world.store_config, faults=fate),
                    "backend": world._backend_of(fate),
                    "late_write_period": DOUBT,
                    "lease_ttl": LEASE,
                    "reconcile": ReconcileConfig(frequency="never"),
                    **self.settings,
                    **settings,
                }
            )

        self.jobs.register(UOW)
        self._classes[process] = UOW
        return process

    def _backend_of(self, fate: SimulatedFaults) -> BackendConfig:
        """Return the backend of a process. The requests of a log meet the faults one by one."""
        if self.log is not None:
            return self.log.config(self.store_config, fate)
        return FaultyBackendConfig(inner=self.backend_config, faults=fate)

    def uow(self, process: int) -> type[FullUOW]:
        """Return the class of units of work of a process."""
        return self._classes[process]

    def kill(self, process: int, *, arrives: Callable[[Pending], Fate]) -> None:
        """End a process. What it had sent takes effect now, later, or not at all."""
        self.note(f"kill {process}")
        self.ambiguous = True
        self.loop.dead.add(process)
        mine = [each for each in self.pending if each.process == process]
        self.pending = [each for each in self.pending if each.process != process]
        for each in mine:
            fate = arrives(each)
            if each.operation.part == "connector" and self.loop.now - each.sent > SIGNATURE:
                continue
            if fate is Fate.LOST:
                self._take_effect(each)
            elif fate is Fate.LATE and each.operation.part == "connector":
                self.late.append(each)

    def call_of(self, uow: FullUOW, name: str, number: int) -> JobCall:
        """Return a call of a function that all processes have."""
        return jobs.functions_of(uow.config)[name](number)

    def commit(self, overlay: Overlay, jobs: list[ModelJob]) -> None:
        """Note what a pivot commits."""
        self.jobs.commit(jobs)
        for key, value in overlay.items():
            if value is None:
                self.committed.pop(key, None)
            else:
                self.committed[key] = value
                self.foreign.pop(key, None)
        self.history.append(dict(self.committed))

    # --- operations --------------------------------------------------------------------------

    async def around(self, process: int, operation: Operation, effect: Effect[R]) -> R:
        """Let an operation happen as the fate says that is drawn for it."""
        if self.over:
            raise self._lost(operation)

        async def work() -> R:
            self._check_barred(process, operation)
            try:
                result = await effect()
            except PreconditionFailedException as error:
                self._check_missing(operation, error)
                raise
            self._on_effect(operation, result)
            return result

        pending = Pending(process, operation, self.loop.now, work)
        self.pending.append(pending)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.ambiguous = True
            raise
        if pending in self.pending:
            self.pending.remove(pending)
        fate = self._fate_of(pending)
        if self.loop.now > pending.sent:
            self.hidden.update(operation.keys)  # its process was stopped: it arrives late
        await self._fail(fate, pending)
        result = await (self._repeated(operation, work) if fate is Fate.REPEATED else work())
        await asyncio.sleep(0)
        if fate is Fate.LOST:
            raise self._lost(operation)
        return result

    def _on_effect(self, operation: Operation, result: object) -> None:
        self.effects += 1
        if operation.name == "commit":
            self._on_commit(operation.transaction)
        elif operation.name == "take_held" and result is not None:
            TAKEN.get([]).append(operation.transaction)
        elif operation.name == "put" and self.log is not None:
            self.now_do(replica_of(self.observer).catch_up())

    def _on_commit(self, transaction_id: str) -> None:
        """Note that the pivot of a transaction took effect."""
        if transaction_id in self.on_pivot:
            self.on_pivot[transaction_id]()

    async def _fail(self, fate: Fate, pending: Pending) -> None:
        """Raise what is answered to a request that is not simply done."""
        operation = pending.operation
        if fate is Fate.CONFLICT:
            message = f"{operation.keys} raced."
            raise PreconditionFailedException(message, contended=True)
        if fate is Fate.REFUSED:
            if operation.name == "delete":
                self.kept.update(operation.keys)
            raise _refused(operation)
        if fate is Fate.DENIED:
            with suppress(BaseConnectorException):
                await pending.effect()
            raise _refused(operation, retried=True)
        if fate is Fate.LATE:
            self.late.append(pending)
        if fate in {Fate.FAILS, Fate.LATE}:
            raise self._lost(operation)

    async def _repeated(self, operation: Operation, work: Effect[R]) -> R:
        """Send a request again like botocore after a lost response, and report that."""
        if self.capabilities.versioned:
            self.hidden.update(operation.keys)  # by the first version
        with suppress(BaseConnectorException):
            await work()
        await asyncio.sleep(0)
        try:
            result = await work()
        except PreconditionFailedException as error:
            error.retried = error.ambiguous = True
            raise
        again: Any = replace(cast("Any", result), retried=True)
        return cast("R", again)

    def _check_barred(self, process: int, operation: Operation) -> None:
        if operation.name in {"copy", "delete"} and self.barred.intersection(operation.keys):
            self.trouble[process] += 1
            raise _refused(operation)

    def _check_missing(self, operation: Operation, error: PreconditionFailedException) -> None:
        """Answer like a store which says of a condition on nothing that there is nothing."""
        if self.quirks.missing_is_404 and operation.name == "copy":
            [key] = operation.keys
            if self.now_do(self.store.head(BUCKET, Location(key))) is None:
                raise NoSuchKeyException(str(error)) from error

    def nothing_to_delete(
        self, deletions: Sequence[Deletion]
    ) -> Mapping[int, BaseConnectorException]:
        """Return the refusals of a store which takes a condition on nothing for one that fails."""
        enforced = self.capabilities.conditional_delete
        if not self.quirks.nothing_is_412 or enforced == "none":
            return {}
        return {
            index: PreconditionFailedException("Nothing is there.")
            for index, each in enumerate(deletions)
            if each.if_match is not None
            and (enforced == "batch" or len(deletions) == 1)
            and self.now_do(self.store.head(BUCKET, each.location)) is None
        }

    def _fate_of(self, pending: Pending) -> Fate:
        fate = self._drawn(pending)
        self.ambiguous |= fate not in DEFINITE
        if fate is not Fate.WORKS:
            operation = pending.operation
            self.trouble[pending.process] += 1
            keys = " ".join(operation.keys)
            self.note(f"{pending.process} {operation.name} {keys} {fate.value}")
        return fate

    def _drawn(self, pending: Pending) -> Fate:
        """Return the fate that was drawn, or what it means for such an operation."""
        fate, self.fate = self.fate, Fate.WORKS
        operation = pending.operation
        if not self.faulty or (self.strikes is not None and operation.name not in self.strikes):
            return Fate.WORKS
        if fate is Fate.CUT:
            if operation.name in STREAMS:
                self.fate = fate  # for `cut`, which is asked next
            return Fate.WORKS
        if operation.part == "connector" and self.loop.now - pending.sent > SIGNATURE:
            return Fate.FAILS  # a process that was stopped: the store refuses its old signature
        writes = operation.part == "connector" and operation.name in WRITES
        if fate in {Fate.CONFLICT, Fate.REPEATED, Fate.REFUSED, Fate.DENIED}:
            return fate if writes else Fate.WORKS
        if fate is Fate.LATE:
            return fate if writes else Fate.FAILS
        return Fate.WORKS if fate is Fate.PARTLY else fate

    def _lost(self, operation: Operation) -> Exception:
        message = f"{operation.name} {' '.join(operation.keys)} was not answered."
        if operation.part == "backend":
            return BackendUnavailableException(message)
        return ConnectorUnavailableException(message)

    def arrive(self, index: int) -> None:
        """Let one of the late requests take effect."""
        if self.late:
            self._take_effect(self.late.pop(index % len(self.late)))

    def _arrive_by(self, now: float) -> None:
        due = [each for each in self.late if each.sent + SIGNATURE <= now]
        self.late = [each for each in self.late if each not in due]
        for each in due:
            self._take_effect(each)

    def _take_effect(self, pending: Pending) -> None:
        self.note(f"late: {pending.operation.name} {' '.join(pending.operation.keys)}")
        self.hidden.update(pending.operation.keys)
        try:
            self.now_do(pending.effect())
        except Exception as error:  # noqa: BLE001 - it is not reported
            self.note(f"  {error!r}")

    # --- what can be seen --------------------------------------------------------------------

    def now_do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run what waits for nothing, at once."""
        with self.loop.running():
            try:
                work.send(None)
            except StopIteration as stop:
                result: T = stop.value
                return result
        message = f"{work} waits for something."
        raise AssertionError(message)

    def records(self) -> list[Record]:
        """Return the catalog."""
        scan = self.observer.scan(BUCKET, prefix="", start="", limit=1000)
        return list(self.now_do(scan))

    def objects(self) -> dict[str, tuple[StoredObject, bytes]]:
        """Return the current objects of the bucket."""

        async def look() -> dict[str, tuple[StoredObject, bytes]]:
            found: dict[str, tuple[StoredObject, bytes]] = {}
            async for stored in self.store.list(BUCKET):
                if stored.location.key.startswith(NOTES):
                    continue
                place = Location(stored.location.key)
                found[stored.location.key] = await self.store.get(BUCKET, place)
            return found

        return self.now_do(look())

    def put_foreign(self, key: str, body: bytes) -> None:
        """Put an object that FennFlow knows nothing of, under a key that is not in use."""
        used = {intent.key for each in self.transactions() for intent in each.intents} | set(
            self.committed
        )
        waiting = {name for each in (*self.late, *self.pending) for name in each.operation.keys}
        if key in used | waiting | set(self.objects()):
            return
        if self.capabilities.hierarchical and any(
            _exclude(key, other) for other in used | waiting | set(self.objects())
        ):
            return
        self.note(f"foreign {key}")
        self.strange.add(key)
        self.foreign[key] = body
        attributes = ObjectAttributes(media_type="text/plain")
        self.now_do(self.store.put(PutRequest(BUCKET, key, attributes), body))

    def vanish(self) -> None:
        """Let a rule of the store delete what a commit is about to replace."""
        objects = self.objects()
        for record in self.records() if not self.capabilities.versioned else ():
            stored, _ = objects.get(record.key, (None, b""))
            stamp = None if stored is None else stamp_of(stored)
            new = stamp is not None and stamp.write == record.write
            if record.location.key != record.key and stored is not None and not new:
                self.note(f"vanish {record.key}")
                self.strange.add(record.key)
                self.now_do(self.store.delete(BUCKET, [Deletion(location=stored.location)]))

    def check(self) -> None:
        """Check what holds at every moment: I1, I2, I5, I6, and P2 from outside."""
        assert self.log is None or not self.log.diverged, f"replicas differ: {self.log.diverged}"
        records = {record.key: record for record in self.records()}
        assert records.keys() == self.committed.keys(), self._differ(records)
        for key, record in records.items():
            stored, body = self.now_do(self.store.get(BUCKET, record.location))
            assert body == self.committed[key], f"{key} has {body!r}"  # I1, I2
            stamp = stamp_of(stored)
            assert stamp is not None
            assert stamp.write == record.write
        writers: dict[str, str] = {}
        for each in self.transactions():
            for intent in each.intents:
                writer = writers.setdefault(intent.key, each.token.transaction_id)
                assert writer == each.token.transaction_id, f"two write {intent.key}"  # I6
        self._check_objects(records, set(writers))
        self.kept |= self.barred
        for logged in self.logged:
            key = getattr(logged, "key", "").removeprefix(f"{BUCKET}/")
            assert key in self.strange | self.hidden | self.kept, (
                f"no other writer did that: {logged.getMessage()}"
            )

    def _differ(self, records: Mapping[str, Record]) -> str:
        return f"catalog {sorted(records)}, model {sorted(self.committed)}"

    def _check_objects(self, records: Mapping[str, Record], in_use: set[str]) -> None:
        objects = self.objects()
        for key, (stored, _) in objects.items():
            stamp = stamp_of(stored)
            expected = key in records or key in in_use or key in NEIGHBOUR
            if stamp is None or expected or key.startswith(STAGING):
                continue
            late_writes = self.now_do(self.observer.late_writes([ObjectKey(BUCKET, key)]))
            known = {each.write for each in late_writes}
            assert stamp.write in known, f"no transaction knows of {key}"  # P2
        for key, body in {**self.foreign, **NEIGHBOUR}.items():
            # In a versioned bucket a pending version may be newer.
            versioned = self.capabilities.versioned
            there = self._bodies(key) if versioned else [objects[key][1]]
            assert body in there, f"{key} was another writer's"  # I5

    def _bodies(self, key: str) -> list[bytes]:
        async def look() -> list[bytes]:
            versions = await self.store.versions(BUCKET, key)
            return [(await self.store.get(BUCKET, each.location))[1] for each in versions]

        return self.now_do(look())

    def check_leases(self) -> None:
        """Check that processes with nothing to do renew no lease: they would do so forever (P22)."""
        journaled = {each.token for each in self.transactions()}
        living = [
            self._classes[each].config for each in self._classes if each not in self.loop.dead
        ]
        for (config, _), slot in runtime._slots.get(self.loop, {}).items():
            if slot.engine is None or config not in living:
                continue
            recovery = slot.engine.recovery
            if not (recovery._taken or recovery._cleaning.locked()):
                leases = slot.engine.leases._held.items()
                idle = {each.token for name, each in leases if name not in recovery._own}
                assert not idle & journaled, "nothing is done for it, and its lease is renewed"

    def quiesce(self) -> None:
        """End all, let what is late arrive, recover; then check I3, I4 and I7."""
        self.faulty = False
        killed = set(self.loop.dead)
        if not (self.ambiguous or self.pending):
            self._check_nothing_retained()
        for process in self._classes:
            if process not in self.loop.dead:
                self.kill(process, arrives=lambda _: Fate.LATE)
        if self.barred:
            self._check_only_barred()
            self.barred.clear()
        for _ in range(4):
            self.recover()
            self.loop.pass_time(DOUBT + LEASE)
        for _ in range(len(self.jobs.all) * ATTEMPTS):
            if not self.now_do(self.observer.jobs(limit=1)):
                break
            self.recover()  # one that fails holds up others
            self.loop.pass_time(DOUBT)
        self._make_room()
        self.recover()
        self.check()
        objects = {key: body for key, (_, body) in self.objects().items()}
        right = {**NEIGHBOUR, **self.foreign, **self.committed}
        assert objects == right, f"{sorted(objects)}"
        assert self.transactions() == []
        due = self.observer.due_late_writes(after=None, limit=10)
        assert list(self.now_do(due)) == []
        before = self.objects()
        self.recover()
        assert self.objects() == before
        self.jobs.check_over(killed)
        assert list(self.now_do(self.observer.jobs(limit=10))) == []

    def transactions(self) -> Sequence[JournaledTransaction]:
        """Return the journal."""
        return self.now_do(self.observer.transactions(after="", limit=1000))

    def _check_nothing_retained(self) -> None:
        """Check that where all was answered nothing waits for what may still arrive (P20)."""
        if self.log is not None:
            late, kept = replica_of(self.observer).retained()
        elif self.database is not None:
            late, kept = self.database.retained()
        elif self.directory is None:
            tables = cast("InMemoryBackend", self.observer)._tables
            late = {each.key for each in tables.late_writes}
            kept = sum(until is not None for _, until in tables.locks.values())
        else:
            with closing(sqlite3.connect(self.directory / f"{DATABASE}.journal.db")) as journal:
                late = {key for (key,) in journal.execute("SELECT key FROM fennflow_late_writes")}
                [[kept]] = journal.execute("SELECT count(kept_until) FROM fennflow_locks")
        # Versions that the store keeps hold no path, and are deleted later (P9).
        assert (late - self.barred, kept) == (set(), 0), (
            "nothing can arrive late, and something waits for it"
        )

    def _check_only_barred(self) -> None:
        """Check that what the store refuses holds nothing else, and is reported (P9, P26)."""
        self.loop.pass_time(LEASE + 1)
        for _ in range(2):  # what has to wait for a lock of the first one
            report = self.recover()
            self.loop.pass_time(DOUBT + LEASE)
        left = self.transactions()
        held = {intent.key for each in left for intent in each.intents}
        assert held <= self.barred, f"{held - self.barred} wait for {self.barred}"
        assert report.pending >= len(left), "recover() says that nothing is left to do"
        assert bool(report.problems) or not left, "recover() does not say what is left to do"

    def _make_room(self) -> None:
        """Delete what excludes a key, where two were committed at the same moment (P2)."""
        for key in {intent.key for each in self.transactions() for intent in each.intents}:
            for other in [each for each in self.committed if _exclude(key, each)]:
                assert self.capabilities.hierarchical
                self.now_committed_without(other)
        self.recover()

    def now_committed_without(self, key: str) -> None:
        """Delete a key in a unit of work of its own."""
        process = self.new_process()

        async def delete() -> None:
            async with self.uow(process)() as uow:
                await uow.files.delete(key)

        self.loop.run(delete(), process=process)
        self.kill(process, arrives=lambda _: Fate.FAILS)
        del self.committed[key]

    def recover(self) -> RecoveryReport:
        """Recover in a new process."""
        process = self.new_process()
        report = self.loop.run(self.uow(process).recover(), process=process)
        assert report.problems or not report.pending, "recover() does not say what is pending"
        self.kill(process, arrives=lambda _: Fate.FAILS)
        return report

    def note(self, text: str) -> None:
        """Write down what happened, for the report of a failure."""
        self.trace.append(f"{self.loop.now - START:8.3f} {text}")

    # --- around it ---------------------------------------------------------------------------

    def close(self) -> None:
        """Forget everything."""
        self.over = True
        self.loop.unwind()
        for slot in runtime._slots.pop(self.loop, {}).values():
            if slot.lifetime is not None:
                self.loop.run(slot.lifetime.aclose())
        self.loop.run(self.observer.aclose())
        self.loop.close()
        for each in self._classes.values():
            jobs._registered.pop(each.config, None)
        for file in [] if self.directory is None else self.directory.glob(f"{DATABASE}.*"):
            file.unlink()
        if self.log is not None:
            self.log.close()
        if self.database is not None:
            self.database.clear()
        self._patches.close()

    def _patch(self) -> None:
        """Take time, ids and threads from the simulation."""
        loop = self.loop
        if self.database is not None:
            self.database.world = loop

        class Clock(datetime):
            @classmethod
            @override
            def now(cls, tz: tzinfo | None = None) -> Self:
                return cls.fromtimestamp(loop.now, tz or UTC)

        def new_id() -> UUID:
            number = (int(loop.now * 1000) << 80) | (7 << 76) | (2 << 62) | next(self._ids)
            return UUID(int=number)

        clock = SimpleNamespace(time=lambda: loop.now, monotonic=lambda: loop.now)
        for target, name, value in (
            (fennflow_memory.backend, "time", clock),
            (fennflow_memory.connector, "datetime", Clock),
            (Connector, "stream_threshold", 1),
            (garbage, "time", clock),
            (reconcile, "time", clock),
            (uuid_utils, "uuid7", new_id),
            (engines, "_sqlite", _shared),
            *(() if self.log is None else self.log.patches(loop, new_id)),
            *(() if self.database is None else self.database.patches()),
        ):
            self._patches.enter_context(mock.patch.object(target, name, value))
        self._patches.enter_context(listening(self.logged))
        self._patches.enter_context(mock.patch.object(plugins, "_current", _plugins()))
        self._patches.enter_context(sqlite_clock(loop))
        self._patches.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", CompensationPendingWarning)


def _refused(operation: Operation, *, retried: bool = False) -> AccessDeniedException:
    return AccessDeniedException(f"{' '.join(operation.keys)}: 403.", retried=retried)


def _exclude(key: str, other: str) -> bool:
    """Whether a file system cannot hold both."""
    return key.startswith(f"{other}/") or other.startswith(f"{key}/")


_worlds = itertools.count(1)
_engines: dict[str, Engine] = {}


def _shared(url: URL, config: SqlalchemyBackendConfig, lock_wait: float) -> engines.Sqlite:
    """Return a file of SQLite's with the one engine of all processes and worlds for it."""
    name = str(url.database)
    if name not in _engines:
        _engines[name] = _sqlite(url, config, lock_wait).engine
    threads = ThreadPoolExecutor()  # it starts none: here all is done at once
    return engines.Sqlite(
        name, _engines[name], threads, busy_timeout=config.busy_timeout, lock_wait=lock_wait
    )


@cache
def _plugins() -> plugins.PluginRegistry:
    """Return what plugins bring, looked for once: that takes a third of a walk."""
    with plugins.override(faults, remote, watched_log) as registry:
        return registry


@contextmanager
def listening(logged: list[logging.LogRecord]) -> Generator[None]:
    """Collect what the engine says of objects that others changed (P14, P17)."""
    logger = logging.getLogger("fennflow")

    class Handler(logging.Handler):
        @override
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "rule", "") in {"P14", "P17"}:
                logged.append(record)

    handler = Handler()
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def sqlite_clock(loop: ControlledLoop) -> Generator[None]:
    """Let SQLite use simulated time."""

    def julianday(_: str) -> float:
        return loop.now / 86400.0 + 2440587.5

    def on_connect(connection: object, _record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.create_function("julianday", 1, julianday)

    event.listen(Engine, "connect", on_connect)
    try:
        yield
    finally:
        event.remove(Engine, "connect", on_connect)
