"""Catalog and journal in the memory of the process: the contract of `Backend`, on dictionaries.

Every transaction holds one lock and awaits nothing, so it is atomic for all event loops and
threads of the process.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import uuid_utils
from typing_extensions import override

from fennflow.backends import (
    Backend,
    Commit,
    Decision,
    Intent,
    JournaledSession,
    ObjectKey,
    Outcome,
    Plan,
    Record,
    SessionToken,
    Step,
    Tombstone,
    conflict,
    locked,
)
from fennflow.exceptions import SessionLostException

if TYPE_CHECKING:
    from fennflow.config import ConfigDict, ConnectorConfig
    from fennflow_memory.config import InMemoryBackendConfig


@dataclass(slots=True)
class _Session:
    """A session's row."""

    token: int
    began: float = 0.0
    lease_until: float = 0.0
    outcome: Outcome | None = None
    intents: dict[int, Intent] = field(default_factory=dict[int, Intent])
    locks: set[ObjectKey] = field(default_factory=set[ObjectKey])
    steps: Sequence[Step] = ()


@dataclass(slots=True)
class _Tables:
    """What a database would hold."""

    catalog_id: str = field(default_factory=lambda: str(uuid_utils.uuid7()))
    lock: threading.Lock = field(default_factory=threading.Lock)
    records: dict[ObjectKey, Record] = field(default_factory=dict[ObjectKey, Record])
    keys: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    sessions: dict[str, _Session] = field(default_factory=dict[str, _Session])
    # Of a key: the session that holds it, and until when if that session is settled (P20 b).
    locks: dict[ObjectKey, tuple[str, float | None]] = field(
        default_factory=dict[ObjectKey, "tuple[str, float | None]"]
    )
    tombstones: dict[Tombstone, float] = field(default_factory=dict[Tombstone, float])
    outcomes: dict[str, tuple[Outcome, float]] = field(
        default_factory=dict[str, "tuple[Outcome, float]"]
    )


_tables: dict[tuple[InMemoryBackendConfig, ConnectorConfig], _Tables] = {}
_tables_lock = threading.Lock()


def new_backend(config: InMemoryBackendConfig, settings: ConfigDict) -> Backend:
    """Return a backend on the process's tables for this pair of configs."""
    with _tables_lock:
        tables = _tables.setdefault((config, settings.connector), _Tables())
    return InMemoryBackend(tables, doubt_period=settings.doubt_period, lease_ttl=settings.lease_ttl)


class InMemoryBackend(Backend):
    """Catalog and journal on dictionaries.

    Args:
        tables: the rows.
        doubt_period: seconds for which tombstones and kept locks stand.
        lease_ttl: seconds for which a lease runs.
    """

    def __init__(self, tables: _Tables, *, doubt_period: float, lease_ttl: float) -> None:
        self._tables = tables
        self._doubt_period = doubt_period
        self._lease_ttl = lease_ttl

    @property
    @override
    def catalog_id(self) -> str:
        return self._tables.catalog_id

    @override
    async def open(self) -> None:
        """Do nothing: the tables are there."""

    @override
    async def aclose(self) -> None:
        """Do nothing: the tables stay for the process."""

    @override
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        with self._tables.lock:
            return self._records(keys)

    @override
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        with self._tables.lock:
            keys = self._tables.keys.get(namespace, [])
            found: list[Record] = []
            for index in range(bisect_left(keys, max(start, prefix)), len(keys)):
                if len(found) == limit or not keys[index].startswith(prefix):
                    break
                found.append(self._tables.records[ObjectKey(namespace, keys[index])])
            return found

    @override
    async def stage(
        self,
        session: SessionToken,
        keys: Collection[ObjectKey],
        plan: Plan,
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        tables = self._tables
        with tables.lock:
            row = tables.sessions.get(session.session_id)
            if row is None and begins and session.session_id not in tables.outcomes:
                row = _Session(token=0, began=time.monotonic())
            if row is None or row.token != session.token or row.outcome is not None:
                raise _lost(session)
            for key in sorted(keys):
                holder, until = tables.locks.get(key, (session.session_id, None))
                free_in = None if until is None else until - time.monotonic()
                if holder != session.session_id and (free_in is None or free_in > 0):
                    raise locked(key, free_in, holder)
            records = self._records(keys)
            intents = plan(records)
            tables.sessions[session.session_id] = row
            row.lease_until = time.monotonic() + self._lease_ttl
            for key in keys:
                tables.locks[key] = (session.session_id, None)
            row.locks.update(keys)
            row.intents.update({intent.seq: intent for intent in intents})
            return records

    @override
    async def note_upload(self, session: SessionToken, seq: int, upload_id: str) -> None:
        with self._tables.lock:
            intents = self._row(session).intents
            intents[seq] = replace(intents[seq], upload_id=upload_id)

    @override
    async def commit(self, session: SessionToken, commit: Commit) -> None:
        tables = self._tables
        with tables.lock:
            row = self._row(session)
            if row.outcome is not None:
                raise _lost(session)
            now = self._records(commit.reads)
            changed = [key for key, record in commit.reads.items() if now.get(key) != record]
            if changed:
                raise conflict(changed)
            for record in commit.records:
                self._put_record(record)
            for key in commit.removed:
                self._remove_record(key)
            self._decide(session, row, Outcome.COMMITTED)
            self._bury(commit.tombstones)
            row.steps = commit.steps
            if not commit.steps:
                self._drop(session, row)

    @override
    async def abort(self, session: SessionToken, *, patience: float | None = None) -> Decision:
        del patience  # no transaction is ever open
        with self._tables.lock:
            row = self._tables.sessions.get(session.session_id)
            if row is None:
                decided = self._tables.outcomes.get(session.session_id)
                if decided is None:
                    # Nothing of it was ever staged; decided all the same, so nothing ever is.
                    self._decide(session, _Session(session.token), Outcome.ABORTED)
                return Decision(outcome=decided[0] if decided else Outcome.ABORTED, finished=True)
            if row.token != session.token:
                raise _lost(session)
            if row.outcome is None:
                self._decide(session, row, Outcome.ABORTED)
            outcome = row.outcome or Outcome.ABORTED
            return Decision(outcome=outcome, keys=frozenset(row.locks), steps=row.steps)

    @override
    async def relocate(self, session: SessionToken, records: Sequence[Record]) -> None:
        with self._tables.lock:
            self._row(session)
            for record in records:
                now = self._tables.records.get(record.object_key)
                if now is not None and (now.session_id, now.seq) == (record.session_id, record.seq):
                    self._put_record(record)

    @override
    async def settle(
        self,
        session: SessionToken,
        *,
        keys: Collection[ObjectKey] | None = None,
        tombstones: Collection[Tombstone] = (),
        keep_locked: Collection[ObjectKey] = (),
        buried: Collection[Tombstone] = (),
    ) -> None:
        with self._tables.lock:
            if session.session_id not in self._tables.sessions:
                return
            row = self._row(session)
            for tombstone in buried:
                self._tables.tombstones.pop(tombstone, None)
            self._bury(tombstones)
            released = row.locks if keys is None else row.locks.intersection(keys)
            kept = released.intersection(keep_locked)
            self._release(row, released)
            if keys is None:
                self._drop(session, row)
            until = time.monotonic() + self._doubt_period
            self._tables.locks.update(dict.fromkeys(kept, (session.session_id, until)))

    @override
    async def tombstones(self, keys: Collection[ObjectKey]) -> Collection[Tombstone]:
        wanted = set(keys)
        with self._tables.lock:
            return [
                tombstone
                for tombstone in self._tables.tombstones
                if ObjectKey(tombstone.namespace, tombstone.key) in wanted
            ]

    @override
    async def due_tombstones(self, *, after: Tombstone | None, limit: int) -> Sequence[Tombstone]:
        now = time.monotonic()
        with self._tables.lock:
            due = [
                tombstone
                for tombstone, until in self._tables.tombstones.items()
                if until <= now
                and tombstone.session_id not in self._tables.sessions
                and (after is None or _order(tombstone) > _order(after))
            ]
        return sorted(due, key=_order)[:limit]

    @override
    async def heartbeat(self, sessions: Collection[SessionToken]) -> Collection[SessionToken]:
        until = time.monotonic() + self._lease_ttl
        kept: list[SessionToken] = []
        with self._tables.lock:
            for session in sessions:
                row = self._tables.sessions.get(session.session_id)
                if row is not None and row.token == session.token:
                    row.lease_until = until
                    kept.append(session)
        return kept

    @override
    async def claim(self, limit: int) -> Sequence[JournaledSession]:
        now = time.monotonic()
        with self._tables.lock:
            self._purge(now)
            expired = [
                (session_id, row)
                for session_id, row in self._tables.sessions.items()
                if row.lease_until <= now
            ]
            for _, row in expired[:limit]:
                row.token += 1
                row.lease_until = now + self._lease_ttl
            return [_journaled(session_id, row, now) for session_id, row in expired[:limit]]

    @override
    async def sessions(self, *, after: str, limit: int) -> Sequence[JournaledSession]:
        with self._tables.lock:
            ids = sorted(each for each in self._tables.sessions if each > after)[:limit]
            now = time.monotonic()
            return [_journaled(each, self._tables.sessions[each], now) for each in ids]

    @override
    async def known(self, session_ids: Collection[str]) -> Collection[str]:
        with self._tables.lock:
            return [each for each in session_ids if each in self._tables.sessions]

    def _records(self, keys: Collection[ObjectKey]) -> dict[ObjectKey, Record]:
        records = self._tables.records
        return {key: records[key] for key in keys if key in records}

    def _put_record(self, record: Record) -> None:
        key = record.object_key
        if key not in self._tables.records:
            insort(self._tables.keys.setdefault(key.namespace, []), key.key)
        self._tables.records[key] = record

    def _remove_record(self, key: ObjectKey) -> None:
        if self._tables.records.pop(key, None) is not None:
            keys = self._tables.keys[key.namespace]
            del keys[bisect_left(keys, key.key)]

    def _row(self, session: SessionToken) -> _Session:
        row = self._tables.sessions.get(session.session_id)
        if row is None or row.token != session.token:
            raise _lost(session)
        return row

    def _decide(self, session: SessionToken, row: _Session, outcome: Outcome) -> None:
        row.outcome = outcome
        until = time.monotonic() + self._doubt_period
        self._tables.outcomes[session.session_id] = (outcome, until)

    def _bury(self, tombstones: Collection[Tombstone]) -> None:
        due = time.monotonic() + self._doubt_period
        self._tables.tombstones.update(dict.fromkeys(tombstones, due))

    def _drop(self, session: SessionToken, row: _Session) -> None:
        if row.outcome is not None:
            self._decide(session, row, row.outcome)  # it outlives the rows by the doubt period
        self._release(row, row.locks)
        del self._tables.sessions[session.session_id]

    def _release(self, row: _Session, keys: Collection[ObjectKey]) -> None:
        for key in keys:
            self._tables.locks.pop(key, None)
        kept = {seq: each for seq, each in row.intents.items() if each.object_key not in keys}
        row.locks, row.intents = row.locks.difference(keys), kept

    def _purge(self, now: float) -> None:
        """Forget outcomes and kept locks that have outlived the doubt period."""
        tables = self._tables
        for session_id, (_, until) in list(tables.outcomes.items()):
            if until <= now and session_id not in tables.sessions:
                del tables.outcomes[session_id]
        for key, (_, kept_until) in list(tables.locks.items()):
            if kept_until is not None and kept_until <= now:
                del tables.locks[key]


def _order(tombstone: Tombstone) -> tuple[str, str, str, int]:
    return tombstone.namespace, tombstone.key, tombstone.session_id, tombstone.seq


def _journaled(session_id: str, row: _Session, now: float) -> JournaledSession:
    return JournaledSession(
        session=SessionToken(session_id, row.token),
        outcome=row.outcome,
        age=now - row.began,
        lease_left=row.lease_until - now,
        intents=list(row.intents.values()),
    )


def _lost(session: SessionToken) -> SessionLostException:
    message = (
        f"Session {session.session_id} is no longer this process's: its lease ran out, or it was "
        "decided otherwise. Nothing of it was committed here; run the unit of work again."
    )
    return SessionLostException(message)
