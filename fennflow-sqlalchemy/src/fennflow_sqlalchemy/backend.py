"""Catalog and journal in SQLite or PostgreSQL: the contract of `Backend`, on SQLAlchemy Core.

Every method is one transaction on PostgreSQL. On SQLite, where journal and catalog are two files,
methods that change both use one transaction on each. Their order lets recovery complete the work
after a crash between the two; only the insert of the outcome, in the catalog's file, decides (P5).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uuid_utils
from typing_extensions import override

from fennflow.backends import (
    FINISHED,
    Commit,
    CommittedTransaction,
    Decision,
    Fill,
    FillPart,
    JoinedTransaction,
    ObjectKey,
    Outcome,
    Plan,
    Record,
    Settlement,
    TransactionToken,
    changed_reads,
    conflict,
    dump_steps,
    load_steps,
    locked,
)
from fennflow.exceptions import CommitUncertainException, ConfigException
from fennflow.paths import after_prefix
from fennflow_sqlalchemy.database import LockWaitTimeoutError, create_tables
from fennflow_sqlalchemy.engines import LOCK_SLICE
from fennflow_sqlalchemy.filling import fill_area, fill_mark
from fennflow_sqlalchemy.join import Run, UserTransaction, what_to_join
from fennflow_sqlalchemy.journal import JournalBackend
from fennflow_sqlalchemy.rows import (
    intent_rows,
    job_rows,
    key_rows,
    late_write_rows,
    lost,
    record_of,
    record_rows,
    transaction_params,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection, Select


LOCK_WAIT = 5.0
"""Seconds to wait for this process's own pivot, if only the answer was lost."""

SMALLEST = "\x01"
"""The smallest character that a database can store: a key with it appended is the next key."""


class SqlalchemyBackend(JournalBackend):
    """Catalog and journal in a database.

    Args:
        config: the config of the database.
        late_write_period: seconds for which late writes and retained locks are kept.
        lease_ttl: seconds that a lease lasts.
        lock_timeout: seconds to wait for locks that users' transactions hold.
    """

    @property
    @override
    def catalog_id(self) -> str:
        return self._catalog_id

    @override
    async def open(self) -> None:
        tables, create = self._tables, self._config.create_tables
        if self._single_database:
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
                f"The journal {self._journal.name} does not belong to the catalog "
                f"{self._catalog.name}. Restore the two files together, or name the right one "
                "with SqlalchemyBackendConfig(journal=...)."
            )
            raise ConfigException(message)

    # --- the catalog -------------------------------------------------------------------------

    @override
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        if not keys:
            return {}
        return await self._catalog.run(lambda each: self._records(each, keys), write=False)

    def _records(
        self, connection: Connection, keys: Collection[ObjectKey]
    ) -> dict[ObjectKey, Record]:
        if not keys:
            return {}
        found = _found(connection, self._catalog_sql.records, {"rows": key_rows(keys)})
        return {record.object_key: record for record in found}

    @override
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        variant, parameters = _stretch(namespace, prefix, start, limit)
        statement = self._catalog_sql.scan[variant]
        return await self._catalog.run(
            lambda each: _found(each, statement, parameters), write=False
        )

    @override
    async def scan_names(
        self, namespace: str, *, prefix: str, start: str, limit: int, delimiter: str
    ) -> Sequence[Record]:
        successor = after_prefix(delimiter)
        if successor is None:  # the prefix consists only of the last character
            return await super().scan_names(
                namespace, prefix=prefix, start=start, limit=limit, delimiter=delimiter
            )
        variant, parameters = _stretch(namespace, prefix, start, limit)
        parameters |= {
            "beyond": len(prefix) + 1,
            "delimiter": delimiter,
            "successor": successor,
            "smallest": SMALLEST,
        }
        statement = self._catalog_sql.scan_names[variant]
        return await self._catalog.run(
            lambda each: _found(each, statement, parameters), write=False
        )

    # --- filling the catalog from a bucket ---------------------------------------------------

    @override
    async def fills(self) -> Sequence[Fill]:
        rows = await self._catalog.read(self._fill_sql.fills)
        return [Fill(fill_area(row.name), row.value) for row in rows]

    @override
    async def fill(self, fill: Fill, part: FillPart) -> bool:
        mark = {"mark": fill_mark(fill.area)}
        variant, area = _stretch(*fill.area, "", 1)

        def work(connection: Connection) -> bool:
            # Held until the end of this transaction, so that no other process ends the fill
            # meanwhile.
            found = connection.execute(self._fill_sql.hold, mark).scalar()
            begins = found is None and part.begins
            if begins and not _found(connection, self._catalog_sql.scan[variant], area):
                connection.execute(self._fill_sql.begin, {**mark, "fill": fill.fill_id})
                found = connection.execute(self._fill_sql.hold, mark).scalar()
            if found != fill.fill_id:
                return False
            if part.records:
                rows = {"rows": record_rows(part.records)}
                connection.execute(self._catalog_sql.upsert_records, rows)
            if part.removed:
                keys = [ObjectKey(fill.hidden, key) for key in part.removed]
                connection.execute(self._catalog_sql.remove_records, {"rows": key_rows(keys)})
            return True

        return await self._catalog.run(work)

    @override
    async def end_fill(self, fill: Fill) -> None:
        mark = {"mark": fill_mark(fill.area), "fill": fill.fill_id}
        names = {"hidden": fill.hidden, "shown": fill.area.namespace}

        def work(connection: Connection) -> None:
            # This comes first, since it waits for processes that are adding records.
            if connection.execute(self._fill_sql.end, mark).first() is not None:
                connection.execute(self._fill_sql.show, names)
                connection.execute(self._fill_sql.clear, {"hidden": fill.hidden})

        await self._catalog.run(work)

    @override
    async def add_details(self, records: Collection[Record]) -> None:
        rows = {"rows": record_rows(records)}
        with suppress(LockWaitTimeoutError):  # a user's transaction may hold a lock that is needed
            await self._catalog.write(self._fill_sql.add_details, rows, lock_wait=0.0)

    # --- a transaction: locks and intents ----------------------------------------------------

    @override
    async def begin_writes(
        self,
        token: TransactionToken,
        keys: Collection[ObjectKey],
        plan: Plan,
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        locking = {"rows": key_rows(keys), "by": self._process, **transaction_params(token)}

        def work(connection: Connection) -> Mapping[ObjectKey, Record]:
            opened, taken = self._open_and_lock(connection, locking, begins=begins)
            if not opened:
                raise lost(token)
            if taken < len(set(keys)):
                holder = connection.execute(self._transaction_sql.holders, locking).first()
                if holder is None:
                    raise locked(None)
                key = ObjectKey(holder.namespace, holder.key)
                raise locked(key, holder.free_in, holder.transaction_id)
            records = self._see(connection, token, keys)
            if intents := plan(records):
                rows = intent_rows(token.transaction_id, intents)
                connection.execute(self._transaction_sql.write_intents, {"rows": rows})
            return records

        try:
            # Locks in PostgreSQL's journal are held only for a moment; the engine tries again.
            lock_wait = LOCK_SLICE if self._single_database else self._catalog.lock_wait
            return await self._journal.run(work, lock_wait=lock_wait)
        except LockWaitTimeoutError as error:
            raise locked(None) from error

    def _open_and_lock(
        self, connection: Connection, locking: Mapping[str, Any], *, begins: bool
    ) -> tuple[bool, int]:
        """Return whether the transaction has a row now, and how many of its keys it holds."""
        sql = self._transaction_sql
        if self._single_database:
            both = sql.open_and_lock if begins else sql.renew_and_lock
            found: Any = connection.execute(both, locking).one()
            return bool(found.opened), int(found.locked)
        first = sql.open_transaction if begins else sql.renew
        if connection.execute(first, locking).first() is None:
            return False, 0
        return True, len(connection.execute(sql.lock, locking).all())

    def _see(
        self, connection: Connection, token: TransactionToken, keys: Collection[ObjectKey]
    ) -> Mapping[ObjectKey, Record]:
        """Return the records of keys that were just locked, so they cannot change."""
        with self._catalog.peek(connection) as catalog:
            # In a single database, the statement that renewed the lease has checked this.
            if not self._single_database:
                decided = catalog.execute(self._catalog_sql.outcome, transaction_params(token))
                if decided.first() is not None:
                    raise lost(token)
            return self._records(catalog, keys)

    @override
    async def note_upload(self, token: TransactionToken, seq: int, upload_id: str) -> None:
        def work(connection: Connection) -> None:
            self._check_token(connection, token)
            parameters = {"transaction": token.transaction_id, "number": seq, "upload": upload_id}
            connection.execute(self._transaction_sql.note_upload, parameters)

        await self._journal.run(work)

    # --- a transaction: the pivot ------------------------------------------------------------

    @override
    async def commit(self, token: TransactionToken, commit: Commit) -> None:
        if commit.late_writes:
            # They name garbage if the transaction aborts, and are harmless if it commits.
            await self._record_late_writes(commit.late_writes)
        done = not commit.steps

        def pivot(connection: Connection) -> None:
            self._check_reads(connection, token, commit)
            self._pivot(connection, token, commit)
            # This comes last, since on PostgreSQL it locks the row that heartbeats renew.
            if done and self._single_database:
                if not self._drop(connection, token):
                    raise lost(token)
                return
            with self._journal.peek(connection) as journal:
                self._check_token(journal, token)

        await self._catalog.run(pivot, once=True)
        if done and not self._single_database:
            await self._journal.run(lambda each: self._drop(each, token))

    @override
    async def join(self, transaction: object) -> JoinedTransaction:
        joined = UserTransaction(
            await what_to_join(transaction), self._catalog, self._tables.meta, self._pivot_joined
        )
        await joined.open(self._catalog_id)
        return joined

    async def _pivot_joined(self, run: Run, token: TransactionToken, commit: Commit) -> None:
        """Write the pivot in a user's transaction, which may not see the journal's rows (P5)."""
        if commit.late_writes:
            await self._record_late_writes(commit.late_writes)

        # A block without files has no journal rows; a block with files must still have them.
        empty = not (commit.records or commit.removed or commit.steps or commit.jobs)

        def check(journal: Connection) -> None:
            self._check_token(journal, token, missing_ok=empty)

        await self._journal.run(check, write=False)

        def check_reads(catalog: Connection) -> None:
            self._check_reads(catalog, token, commit)

        if commit.reads:
            # The snapshot of the user's transaction may be older than later commits of others.
            await self._catalog.run(check_reads, write=False)
        await run(lambda connection: self._pivot(connection, token, commit))

    def _check_reads(self, connection: Connection, token: TransactionToken, commit: Commit) -> None:
        """Check that the records that were read are unchanged, and missing ones are not being written.

        On PostgreSQL two pivots can run at the same time. The keys that they create or change are
        already locked in the journal. If two transactions each read what the other one writes, at
        least the later one sees that here or in `_hold_reads`. Neither waits.

        Raises:
            ConflictException: a record was changed, or is being written.
        """
        if self._single_database:
            missing = [key for key, record in commit.reads.items() if record is None]
            if missing:
                parameters = {"rows": key_rows(missing), "transaction": token.transaction_id}
                found = connection.execute(
                    self._transaction_sql.written_by_others, parameters
                ).all()
                if found:
                    raise conflict([ObjectKey(*row) for row in found])
        changed = changed_reads(commit.reads, self._records(connection, commit.reads))
        if changed:
            raise conflict(changed)

    def _hold_reads(self, connection: Connection, commit: Commit) -> None:
        """Keep the records that were read from changing until this transaction ends.

        Raises:
            ConflictException: a record is being changed, or was changed.
        """
        written = {record.object_key for record in commit.records} | set(commit.removed)
        read = {
            key: record
            for key, record in commit.reads.items()
            if record is not None and key not in written
        }
        if not read or not self._single_database:
            return  # SQLite has one writer at a time
        held = _found(connection, self._catalog_sql.hold_records, {"rows": key_rows(read)})
        changed = changed_reads(read, {record.object_key: record for record in held})
        if changed:
            raise conflict(changed)

    def _pivot(self, connection: Connection, token: TransactionToken, commit: Commit) -> None:
        """Decide `committed`, and write the records; only inserts decide (P5)."""
        decision = {
            "transaction": token.transaction_id,
            "decided": Outcome.COMMITTED.value,
            "apply": dump_steps(commit.steps),
        }
        records = record_rows(commit.records)
        if not self._feed.decide(connection, decision, commit, records):
            raise lost(token)
        if commit.records:
            connection.execute(self._catalog_sql.upsert_records, {"rows": records})
        if commit.removed:
            rows = key_rows(commit.removed)
            connection.execute(self._catalog_sql.remove_records, {"rows": rows})
        if commit.jobs:
            connection.execute(self._hook_sql.add, {"rows": job_rows(commit.jobs)})
        # This follows the writes, so that two transactions that read each other's keys do not
        # deadlock.
        self._hold_reads(connection, commit)

    # --- a transaction: the other outcome, and the end ---------------------------------------

    @override
    async def abort(self, token: TransactionToken, *, lock_wait: float | None = None) -> Decision:
        def left(journal: Connection) -> Decision:
            if not self._check_token(journal, token, missing_ok=True):
                return Decision(outcome=Outcome.ABORTED, finished=True)
            held = journal.execute(self._transaction_sql.held, transaction_params(token))
            keys = [ObjectKey(row.namespace, row.key) for row in held]
            return Decision(outcome=Outcome.ABORTED, keys=keys)

        def decide(connection: Connection) -> Decision:
            decision = {
                "transaction": token.transaction_id,
                "decided": Outcome.ABORTED.value,
                "apply": "[]",
            }
            decided = connection.execute(self._catalog_sql.decide, decision).first()
            # This comes last, since on PostgreSQL it locks the row that heartbeats renew.
            with self._journal.peek(connection) as journal:
                found = left(journal)
            if decided is not None:
                return found
            stands = connection.execute(self._catalog_sql.outcome, transaction_params(token))
            outcome, steps = stands.one()
            stored = () if found.finished else load_steps(steps)
            return replace(found, outcome=Outcome(outcome), steps=stored)

        if lock_wait is None:
            lock_wait = LOCK_WAIT
        try:
            decision = await self._catalog.run(decide, lock_wait=lock_wait)
        except LockWaitTimeoutError as error:
            # A pivot inside a user's transaction may hold the decision for long (P5).
            message = (
                f"Transaction {token.transaction_id} waits for a database transaction that has not "
                "ended yet."
            )
            raise CommitUncertainException(message) from error
        if self._single_database or decision.finished:
            return decision
        # A process that claimed the transaction meanwhile has not seen this decision, but must act
        # on it.
        found = await self._journal.run(left, write=False)
        return replace(found, outcome=decision.outcome, steps=decision.steps)

    @override
    async def relocate(self, token: TransactionToken, records: Sequence[Record]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(self._catalog_sql.relocate, {"rows": record_rows(records)})
            # This comes last, since on PostgreSQL it locks the row that heartbeats renew.
            with self._journal.peek(connection) as journal:
                self._check_token(journal, token)

        await self._catalog.run(work)

    @override
    async def settle(self, token: TransactionToken, settlement: Settlement = FINISHED) -> None:
        keys, kept = settlement.keys, settlement.keep_locked
        late, checked = settlement.late_writes, settlement.late_writes_checked
        only_drops = keys is None and not (kept or late or checked)
        released = None if keys is None else {**transaction_params(token), "rows": key_rows(keys)}

        def work(connection: Connection) -> None:
            if only_drops and self._drop(connection, token):
                return
            if not self._check_token(connection, token, missing_ok=True):
                return
            if checked:
                connection.execute(self._late_write_sql.clear, {"rows": late_write_rows(checked)})
            if late:
                connection.execute(self._late_write_sql.record, {"rows": late_write_rows(late)})
            if kept:
                locks = {"rows": key_rows(kept), "transaction": token.transaction_id}
                connection.execute(self._transaction_sql.keep_locks, locks)
            if released is None:
                self._drop(connection, token)
            else:
                connection.execute(self._transaction_sql.release_locks, released)
                connection.execute(self._transaction_sql.release_intents, released)

        await self._journal.run(work)

    def _drop(self, connection: Connection, token: TransactionToken) -> bool:
        """Remove the rows of a transaction; return whether it existed with this token."""
        sql, parameters = self._transaction_sql, transaction_params(token)
        if self._single_database:
            return connection.execute(sql.drop, parameters).first() is not None
        if connection.execute(sql.drop_transaction, parameters).first() is None:
            return False
        connection.execute(sql.drop_locks, parameters)
        connection.execute(sql.drop_intents, parameters)
        return True

    def _check_token(
        self, connection: Connection, token: TransactionToken, *, missing_ok: bool = False
    ) -> bool:
        """Return whether the journal has the transaction, and prevent it from being claimed meanwhile.

        Raises:
            TransactionLostException: another process owns it, or it is gone and `missing_ok` is
                False.
        """
        found = connection.execute(self._transaction_sql.hold_fence, transaction_params(token))
        fence = found.scalar()
        if fence == token.fence:
            return True
        if fence is None and missing_ok:
            return False
        raise lost(token)

    # --- the feed of commits -----------------------------------------------------------------

    @property
    @override
    def keeps_commits(self) -> bool:
        return True

    @override
    async def commits(self, *, after: str | None, limit: int) -> Sequence[CommittedTransaction]:
        return await self._feed.commits(self._catalog_id, after=after, limit=limit)

    @override
    async def commit_cursor(self) -> str:
        return await self._feed.cursor(self._catalog_id)


def _found(
    connection: Connection, statement: Select[Any], parameters: Mapping[str, Any]
) -> list[Record]:
    return [record_of(row) for row in connection.execute(statement, parameters)]


def _stretch(
    namespace: str, prefix: str, start: str, limit: int
) -> tuple[tuple[bool, bool], dict[str, Any]]:
    """Return the statement that finds a range of keys, and its parameters."""
    # No key has a NUL, which PostgreSQL does not accept either: "a\0" is the successor of "a".
    start, nul, _ = max(start, prefix).partition("\0")
    stop = after_prefix(prefix)
    parameters: dict[str, Any] = {"namespace": namespace, "start": start, "limit": limit}
    if stop is not None:
        parameters["stop"] = stop
    return (bool(nul), stop is not None), parameters
