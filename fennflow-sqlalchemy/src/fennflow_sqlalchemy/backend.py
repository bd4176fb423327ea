"""Catalog and journal in SQLite or PostgreSQL: the contract of `Backend`, on SQLAlchemy Core.

Every method is one transaction on PostgreSQL. On SQLite, where journal and catalog are two files,
those that touch both are one on each, in an order by which a crash between the two leaves what
recovery brings to its end: the insert of the outcome, in the catalog's, decides alone (P5).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import uuid_utils
from typing_extensions import override

from fennflow.backends import (
    Commit,
    Decision,
    JoinedTransaction,
    ObjectKey,
    Outcome,
    Plan,
    Record,
    SessionToken,
    Tombstone,
    conflict,
    dump_steps,
    load_steps,
    locked,
)
from fennflow.exceptions import (
    CommitUncertainException,
    ConfigException,
    SessionLostException,
)
from fennflow.paths import after_prefix
from fennflow_sqlalchemy.database import ImpatientError, create_tables
from fennflow_sqlalchemy.engines import LOCK_SLICE
from fennflow_sqlalchemy.join import UserTransaction
from fennflow_sqlalchemy.recovery import RecoverableBackend
from fennflow_sqlalchemy.rows import (
    intent_rows,
    key_rows,
    of,
    record_of,
    record_rows,
    tombstone_rows,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection


PATIENCE = 5.0
"""Seconds to wait for one's own pivot, of which only the answer was lost."""


class SqlalchemyBackend(RecoverableBackend):
    """Catalog and journal in a database.

    Args:
        config: which one.
        doubt_period: seconds for which tombstones and kept locks stand.
        lease_ttl: seconds that a lease runs.
        lock_timeout: seconds to wait for locks that users' transactions hold.
    """

    @override
    async def open(self) -> None:
        tables, create = self._tables, self._config.create_tables
        if self._together:
            everything = [*tables.catalog, *tables.journal]
            self._catalog_id = await create_tables(
                self._catalog, everything, str(uuid_utils.uuid7()), create=create
            )
            return
        self._catalog_id = await create_tables(
            self._catalog, tables.catalog, str(uuid_utils.uuid7()), create=create
        )
        of_journal = await create_tables(
            self._journal, tables.journal, self._catalog_id, create=create
        )
        if of_journal != self._catalog_id:
            message = (
                f"The journal {self._journal.name} belongs to another catalog than "
                f"{self._catalog.name}. Restore the two files together, or name the right one "
                "with SqlalchemyBackendConfig(journal=...)."
            )
            raise ConfigException(message)

    # --- catalog -----------------------------------------------------------------------------

    @override
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        if not keys:
            return {}

        def work(connection: Connection) -> dict[ObjectKey, Record]:
            return self._records(connection, keys)

        return await self._catalog.run(work, write=False)

    def _records(
        self, connection: Connection, keys: Collection[ObjectKey]
    ) -> dict[ObjectKey, Record]:
        if not keys:
            return {}
        rows = connection.execute(self._of_catalog.records, {"rows": key_rows(keys)}).all()
        return {record.object_key: record for record in map(record_of, rows)}

    @override
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        # No key holds a NUL, which PostgreSQL does not take either: "a\0" is what follows "a".
        start, nul, _ = max(start, prefix).partition("\0")
        stop = after_prefix(prefix)
        statement = self._of_catalog.scan[bool(nul), stop is not None]
        parameters = {"namespace": namespace, "start": start, "limit": limit}
        if stop is not None:
            parameters["stop"] = stop

        def work(connection: Connection) -> list[Record]:
            return [record_of(row) for row in connection.execute(statement, parameters).all()]

        return await self._catalog.run(work, write=False)

    # --- a session ---------------------------------------------------------------------------

    @override
    async def stage(
        self,
        session: SessionToken,
        keys: Collection[ObjectKey],
        plan: Plan,
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        locking = {"rows": key_rows(keys), "of_session": session.session_id}
        open_it = self._of_session.open_session if begins else self._of_session.renew

        def work(connection: Connection) -> Mapping[ObjectKey, Record]:
            opened = connection.execute(open_it, of(session))
            if opened.first() is None:
                raise _lost(session)
            if keys:
                taken = connection.execute(self._of_session.lock, locking).all()
                if len(taken) < len(set(keys)):
                    holders = connection.execute(self._of_session.holders, locking)
                    holder = holders.first()
                    if holder is None:
                        raise locked(None)
                    key = ObjectKey(holder.namespace, holder.key)
                    raise locked(key, holder.free_in, holder.session_id)
            records = self._see(connection, session, keys)
            if intents := plan(records):
                rows = intent_rows(session.session_id, intents)
                connection.execute(self._of_session.write_intents, {"rows": rows})
            return records

        try:
            # Who has a lock in PostgreSQL's journal holds it for a moment; the engine tries again.
            patience = LOCK_SLICE if self._together else self._catalog.patience
            return await self._journal.run(work, patience=patience)
        except ImpatientError as error:
            raise locked(None) from error

    def _see(
        self, connection: Connection, session: SessionToken, keys: Collection[ObjectKey]
    ) -> Mapping[ObjectKey, Record]:
        """Return the records of keys that were just locked, so that nobody changes them."""
        with self._catalog.beside(connection) as catalog:
            # In one database the statement that renewed the lease has looked for it.
            if not self._together:
                decided = catalog.execute(self._of_catalog.outcome, of(session))
                if decided.first() is not None:
                    raise _lost(session)
            return self._records(catalog, keys)

    @override
    async def note_upload(self, session: SessionToken, seq: int, upload_id: str) -> None:
        def work(connection: Connection) -> None:
            self._check_token(connection, session)
            parameters = {"of_session": session.session_id, "number": seq, "upload": upload_id}
            connection.execute(self._of_session.note_upload, parameters)

        await self._journal.run(work)

    @override
    async def commit(self, session: SessionToken, commit: Commit) -> None:
        if commit.tombstones:
            # They name what is garbage if the session aborts, and are spared if it commits.
            await self._dig(commit.tombstones)
        done = not commit.steps

        def pivot(connection: Connection) -> None:
            self._check_reads(connection, session, commit)
            self._pivot(connection, session, commit)
            # Last, since on PostgreSQL it locks the row that heartbeats renew.
            with self._journal.beside(connection) as journal:
                self._check_token(journal, session)
            if done and self._together:
                self._drop(connection, session)

        await self._catalog.run(pivot, once=True)
        if done and not self._together:
            await self._journal.run(lambda each: self._drop(each, session))

    @override
    async def join(self, transaction: object) -> JoinedTransaction:
        joined = UserTransaction(transaction, self._catalog, self._tables.meta, self._pivot_joined)
        await joined.open(self._catalog_id)
        return joined

    async def _pivot_joined(
        self, connection: AsyncConnection, session: SessionToken, commit: Commit
    ) -> None:
        """Write the pivot in a user's transaction, which may not see the journal's rows (P5)."""
        if commit.tombstones:
            await self._dig(commit.tombstones)

        # A block without files has no rows of the journal; one with files must have kept them.
        empty = not (commit.records or commit.removed or commit.steps)

        def check(journal: Connection) -> None:
            self._check_token(journal, session, missing_ok=empty)

        await self._journal.run(check, write=False)

        def check_reads(catalog: Connection) -> None:
            self._check_reads(catalog, session, commit)

        if commit.reads:
            # The user's transaction may have a snapshot from before what others committed since.
            await self._catalog.run(check_reads, write=False)
        await connection.run_sync(self._pivot, session, commit)

    def _check_reads(self, connection: Connection, session: SessionToken, commit: Commit) -> None:
        """Check that what was read is as it was, and that nobody is about to write what was not there.

        On PostgreSQL two pivots run at the same time. What both would create, or change, is locked
        in the journal by then: of two sessions that each read what the other one writes, the later
        one at least sees that here or in `_hold_reads`. Nobody waits.

        Raises:
            ConflictException: something was changed, or is being written.
        """
        if self._together:
            missing = [key for key, record in commit.reads.items() if record is None]
            if missing:
                parameters = {"rows": key_rows(missing), "of_session": session.session_id}
                found = connection.execute(self._of_session.written_by_others, parameters).all()
                if found:
                    raise conflict([ObjectKey(*row) for row in found])
        now = self._records(connection, commit.reads)
        changed = [key for key, record in commit.reads.items() if now.get(key) != record]
        if changed:
            raise conflict(changed)

    def _hold_reads(self, connection: Connection, commit: Commit) -> None:
        """Let nobody change what was read before this transaction ends.

        Raises:
            ConflictException: somebody does at this moment, or has.
        """
        written = {record.object_key for record in commit.records} | set(commit.removed)
        read = {
            key: record
            for key, record in commit.reads.items()
            if record is not None and key not in written
        }
        if not read or not self._together:
            return  # SQLite has one writer at a time
        rows = connection.execute(self._of_catalog.hold_records, {"rows": key_rows(read)}).all()
        held = {record.object_key: record for record in map(record_of, rows)}
        changed = [key for key, record in read.items() if held.get(key) != record]
        if changed:
            raise conflict(changed)

    def _pivot(self, connection: Connection, session: SessionToken, commit: Commit) -> None:
        """Decide `committed`, and write the records; inserts alone decide (P5)."""
        decision = {
            "of_session": session.session_id,
            "decided": Outcome.COMMITTED.value,
            "apply": dump_steps(commit.steps),
        }
        if connection.execute(self._of_catalog.decide, decision).first() is None:
            raise _lost(session)
        if commit.records:
            rows = record_rows(commit.records)
            connection.execute(self._of_catalog.upsert_records, {"rows": rows})
        if commit.removed:
            rows = key_rows(commit.removed)
            connection.execute(self._of_catalog.remove_records, {"rows": rows})
        # After the writes, so that two who read what the other one writes do not wait for each other.
        self._hold_reads(connection, commit)

    @override
    async def abort(self, session: SessionToken, *, patience: float | None = None) -> Decision:
        def left(journal: Connection) -> Decision:
            if not self._check_token(journal, session, missing_ok=True):
                return Decision(outcome=Outcome.ABORTED, finished=True)
            held = journal.execute(self._of_session.held, of(session))
            keys = [ObjectKey(row.namespace, row.key) for row in held]
            return Decision(outcome=Outcome.ABORTED, keys=keys)

        def decide(connection: Connection) -> Decision:
            decision = {
                "of_session": session.session_id,
                "decided": Outcome.ABORTED.value,
                "apply": "[]",
            }
            decided = connection.execute(self._of_catalog.decide, decision).first()
            # Last, since on PostgreSQL it locks the row that heartbeats renew.
            with self._journal.beside(connection) as journal:
                found = left(journal)
            if decided is not None:
                return found
            stands = connection.execute(self._of_catalog.outcome, of(session))
            outcome, steps = stands.one()
            stored = () if found.finished else load_steps(steps)
            return replace(found, outcome=Outcome(outcome), steps=stored)

        if patience is None:
            patience = PATIENCE
        try:
            decision = await self._catalog.run(decide, patience=patience)
        except ImpatientError as error:
            # A pivot inside a user's transaction may hold the decision for long (P5).
            message = (
                f"Session {session.session_id} waits for a transaction of the database that has "
                "not ended yet."
            )
            raise CommitUncertainException(message) from error
        if self._together or decision.finished:
            return decision
        # Who claimed the session meanwhile did not see this decision: it is theirs to act on.
        found = await self._journal.run(left, write=False)
        return replace(found, outcome=decision.outcome, steps=decision.steps)

    @override
    async def relocate(self, session: SessionToken, records: Sequence[Record]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(self._of_catalog.relocate, {"rows": record_rows(records)})
            # Last, since on PostgreSQL it locks the row that heartbeats renew.
            with self._journal.beside(connection) as journal:
                self._check_token(journal, session)

        await self._catalog.run(work)

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
        released = None if keys is None else {**of(session), "rows": key_rows(keys)}

        def work(connection: Connection) -> None:
            if not self._check_token(connection, session, missing_ok=True):
                return
            if buried:
                connection.execute(self._of_tombstones.fill_in, {"rows": tombstone_rows(buried)})
            if tombstones:
                connection.execute(self._of_tombstones.dig, {"rows": tombstone_rows(tombstones)})
            if keep_locked:
                kept = {"rows": key_rows(keep_locked), "of_session": session.session_id}
                connection.execute(self._of_session.keep_locks, kept)
            if released is None:
                self._drop(connection, session)
            else:
                connection.execute(self._of_session.release_locks, released)
                connection.execute(self._of_session.release_intents, released)

        await self._journal.run(work)

    def _drop(self, connection: Connection, session: SessionToken) -> None:
        for statement in (
            self._of_session.drop_locks,
            self._of_session.drop_intents,
            self._of_session.drop_session,
        ):
            connection.execute(statement, of(session))

    def _check_token(
        self, connection: Connection, session: SessionToken, *, missing_ok: bool = False
    ) -> bool:
        """Return whether the journal has the session, which nobody claims until the end of this.

        Raises:
            SessionLostException: it is somebody else's, or gone and that is not `missing_ok`.
        """
        found = connection.execute(self._of_session.hold_token, of(session))
        token = found.scalar()
        if token == session.token:
            return True
        if token is None and missing_ok:
            return False
        raise _lost(session)


def _lost(session: SessionToken) -> SessionLostException:
    message = (
        f"Session {session.session_id} is no longer this process's: its lease ran out, or it was "
        "decided otherwise. Nothing of it was committed here; run the unit of work again."
    )
    return SessionLostException(message)
