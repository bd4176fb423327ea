"""Catalog and journal in SQLite or PostgreSQL: the contract of `Backend`, on SQLAlchemy Core.

Every method is one transaction on PostgreSQL. On SQLite, where journal and catalog are two files,
those that touch both are one on each, in an order by which a crash between the two leaves what
recovery brings to its end: the insert of the outcome, in the catalog's, decides alone (P5).
Compensations are in the journal's database, hooks in the catalog's, where pivots write them.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uuid_utils
from typing_extensions import override

from fennflow.backends import (
    FINISHED,
    Backend,
    Commit,
    CommittedTransaction,
    Decision,
    Fill,
    FillPart,
    Guarantees,
    Intent,
    Job,
    JoinedTransaction,
    JournaledTransaction,
    LateWrite,
    ObjectKey,
    Outcome,
    Plan,
    Record,
    Settlement,
    TransactionToken,
    changed_reads,
    conflict,
    dump_commit,
    dump_steps,
    load_commit,
    load_steps,
    locked,
)
from fennflow.exceptions import CommitUncertainException, ConfigException
from fennflow.paths import after_prefix
from fennflow_sqlalchemy.database import LockWaitTimeoutError, create_tables
from fennflow_sqlalchemy.engines import LOCK_SLICE, open_databases
from fennflow_sqlalchemy.feed import Feed
from fennflow_sqlalchemy.join import Run, UserTransaction, what_to_join
from fennflow_sqlalchemy.purging import PAGE, PURGE_LOCK_WAIT, Purge
from fennflow_sqlalchemy.rows import (
    dumps,
    fill_area,
    fill_mark,
    id_rows,
    intent_of,
    intent_rows,
    job_of,
    job_rows,
    key_rows,
    late_write_of,
    late_write_rows,
    lost,
    record_of,
    record_rows,
    transaction_params,
)
from fennflow_sqlalchemy.statements import (
    CatalogStatements,
    FillStatements,
    JobStatements,
    LateWriteStatements,
    NoteStatements,
    TransactionStatements,
)
from fennflow_sqlalchemy.tables import make_tables

if TYPE_CHECKING:
    from sqlalchemy import Connection, Select

    from fennflow_sqlalchemy.config import SqlalchemyBackendConfig
    from fennflow_sqlalchemy.database import Database

LOCK_WAIT = 5.0
"""Seconds to wait for one's own pivot, of which only the answer was lost."""

SMALLEST = "\x01"
"""The first character that a database can hold: no key is between one and the same with this."""


class SqlalchemyBackend(Backend):
    """Catalog and journal in a database.

    Args:
        config: which one.
        late_write_period: seconds for which late writes and kept locks stand.
        lease_ttl: seconds that a lease runs.
        lock_timeout: seconds to wait for locks that users' transactions hold.
    """

    def __init__(
        self,
        config: SqlalchemyBackendConfig,
        *,
        late_write_period: float,
        lease_ttl: float,
        lock_timeout: float,
    ) -> None:
        self._config = config
        self._tables = make_tables(config.table_prefix, config.schema_name)[1]
        self._catalog, self._journal = open_databases(
            config, lease_ttl=lease_ttl, lock_timeout=lock_timeout
        )
        self._single_database = self._catalog is self._journal
        self._catalog_sql = CatalogStatements(
            self._tables, self._catalog, late_write_period=late_write_period
        )
        self._transaction_sql = TransactionStatements(
            self._tables,
            self._journal,
            single_database=self._single_database,
            lease_ttl=lease_ttl,
            late_write_period=late_write_period,
        )
        self._late_write_sql = LateWriteStatements(
            self._tables, self._journal, late_write_period=late_write_period
        )
        self._compensation_sql = JobStatements(
            self._tables.compensations, self._journal, lease_ttl=lease_ttl, in_order=False
        )
        self._hook_sql = JobStatements(
            self._tables.hooks, self._catalog, lease_ttl=lease_ttl, in_order=True
        )
        self._feed = Feed(self._tables, self._catalog, self._catalog_sql, config.commit_retention)
        self._note_sql = NoteStatements(self._tables, self._journal)
        self._fill_sql = FillStatements(self._tables, self._catalog)
        self._catalog_id = ""
        self._ticket_key = b""
        self._purge = Purge(
            self._catalog,
            self._journal,
            self._catalog_sql,
            self._transaction_sql,
            self._compensation_sql,
            self._feed,
            interval=late_write_period / 2,
        )

    @property
    @override
    def catalog_id(self) -> str:
        return self._catalog_id

    @property
    @override
    def guarantees(self) -> Guarantees:
        return Guarantees(shared="network" if self._single_database else "machine", durable=True)

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
                f"The journal {self._journal.name} belongs to another catalog than "
                f"{self._catalog.name}. Restore the two files together, or name the right one "
                "with SqlalchemyBackendConfig(journal=...)."
            )
            raise ConfigException(message)

    @override
    async def aclose(self) -> None:
        await self._catalog.aclose()
        if not self._single_database:
            await self._journal.aclose()

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
        if successor is None:  # of the last character alone
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
            # Held until the end of this, so that no other process ends the fill meanwhile.
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
            # First, since it waits for those who are adding records.
            if connection.execute(self._fill_sql.end, mark).first() is not None:
                connection.execute(self._fill_sql.show, names)
                connection.execute(self._fill_sql.clear, {"hidden": fill.hidden})

        await self._catalog.run(work)

    @override
    async def add_details(self, records: Collection[Record]) -> None:
        rows = {"rows": record_rows(records)}
        with suppress(LockWaitTimeoutError):  # a transaction of the user's may hold what is needed
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
        locking = {"rows": key_rows(keys), **transaction_params(token)}

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
            # Who has a lock in PostgreSQL's journal holds it for a moment; the engine tries again.
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
        """Return the records of keys that were just locked, so that they do not change."""
        with self._catalog.peek(connection) as catalog:
            # In one database the statement that renewed the lease has looked for it.
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
            # They name what is garbage if the transaction aborts, and are spared if it commits.
            await self._record_late_writes(commit.late_writes)
        done = not commit.steps

        def pivot(connection: Connection) -> None:
            self._check_reads(connection, token, commit)
            self._pivot(connection, token, commit)
            # Last, since on PostgreSQL it locks the row that heartbeats renew.
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

        # A block without files has no rows of the journal; one with files must have kept them.
        empty = not (commit.records or commit.removed or commit.steps or commit.jobs)

        def check(journal: Connection) -> None:
            self._check_token(journal, token, missing_ok=empty)

        await self._journal.run(check, write=False)

        def check_reads(catalog: Connection) -> None:
            self._check_reads(catalog, token, commit)

        if commit.reads:
            # The user's transaction may have a snapshot from before what others committed since.
            await self._catalog.run(check_reads, write=False)
        await run(lambda connection: self._pivot(connection, token, commit))

    def _check_reads(self, connection: Connection, token: TransactionToken, commit: Commit) -> None:
        """Check that records that were read are unchanged, and that no absent one is being written.

        On PostgreSQL two pivots run at the same time. What both would create, or change, is locked
        in the journal by then: of two transactions that each read what the other one writes, the later
        one at least sees that here or in `_hold_reads`. None waits.

        Raises:
            ConflictException: something was changed, or is being written.
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
            ConflictException: one is being changed, or was.
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
        """Decide `committed`, and write the records; inserts alone decide (P5)."""
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
        # After the writes, so that two who read what the other one writes do not wait for each other.
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
            # Last, since on PostgreSQL it locks the row that heartbeats renew.
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
        # Who claimed the transaction meanwhile did not see this decision: it is theirs to act on.
        found = await self._journal.run(left, write=False)
        return replace(found, outcome=decision.outcome, steps=decision.steps)

    @override
    async def relocate(self, token: TransactionToken, records: Sequence[Record]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(self._catalog_sql.relocate, {"rows": record_rows(records)})
            # Last, since on PostgreSQL it locks the row that heartbeats renew.
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
        """Remove the rows of a transaction; return whether it was there, under its token."""
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
        """Return whether the journal has the transaction, and keep it from being claimed meanwhile.

        Raises:
            TransactionLostException: another process owns it, or it is gone and not `missing_ok`.
        """
        found = connection.execute(self._transaction_sql.hold_fence, transaction_params(token))
        fence = found.scalar()
        if fence == token.fence:
            return True
        if fence is None and missing_ok:
            return False
        raise lost(token)

    # --- held transactions -------------------------------------------------------------------

    @override
    async def hold(self, token: TransactionToken, commit: Commit, seconds: float) -> None:
        parameters = {
            **transaction_params(token),
            "seconds": seconds,
            "commit": dump_commit(commit),
        }

        def work(connection: Connection) -> None:
            decided = self._is_decided(connection, token.transaction_id)
            if (
                decided
                or connection.execute(self._transaction_sql.hold, parameters).first() is None
            ):
                raise lost(token)

        await self._journal.run(work)

    @override
    async def take_held(self, transaction_id: str) -> JournaledTransaction | None:
        parameters = {"transaction": transaction_id}

        def work(connection: Connection) -> list[JournaledTransaction]:
            if self._is_decided(connection, transaction_id):
                return []
            rows = connection.execute(self._transaction_sql.take_held, parameters).all()
            return self._journaled(connection, rows)

        taken = await self._journal.run(work)
        return taken[0] if taken else None

    def _is_decided(self, connection: Connection, transaction_id: str) -> bool:
        """Return whether another file says so; in one database the statements look for it."""
        if self._single_database:
            return False
        with self._catalog.peek(connection) as catalog:
            decided = catalog.execute(self._catalog_sql.outcome, {"transaction": transaction_id})
            return decided.first() is not None

    # --- leases and recovery -----------------------------------------------------------------

    @override
    async def heartbeat(
        self, transactions: Collection[TransactionToken]
    ) -> Collection[TransactionToken]:
        rows = {"rows": dumps(token._asdict() for token in sorted(transactions))}
        kept = await self._journal.write(self._transaction_sql.beat, rows)
        return [TransactionToken(*row) for row in kept]

    @override
    async def claim(self, limit: int) -> Sequence[JournaledTransaction]:
        await self._purge.run()

        def work(connection: Connection) -> list[JournaledTransaction]:
            rows = connection.execute(self._transaction_sql.claim, {"limit": limit}).all()
            return self._journaled(connection, rows)

        return await self._with_outcomes(await self._journal.run(work))

    @override
    async def transactions(self, *, after: str, limit: int) -> Sequence[JournaledTransaction]:
        def work(connection: Connection) -> list[JournaledTransaction]:
            parameters = {"after": after, "limit": limit}
            rows = connection.execute(self._transaction_sql.transactions, parameters).all()
            return self._journaled(connection, rows)

        return await self._with_outcomes(await self._journal.run(work, write=False))

    def _journaled(self, connection: Connection, rows: Sequence[Any]) -> list[JournaledTransaction]:
        if not rows:
            return []
        intents: dict[str, list[Intent]] = {row.transaction_id: [] for row in rows}
        for row in connection.execute(self._transaction_sql.intents, {"rows": id_rows(intents)}):
            intents[row.transaction_id].append(intent_of(row))
        return [
            JournaledTransaction(
                token=TransactionToken(row.transaction_id, row.fence),
                outcome=None,
                age=row.age,
                lease_left=row.lease_left,
                intents=intents[row.transaction_id],
                held=None if row.held_commit is None else load_commit(row.held_commit),
                held_left=row.held_left or 0.0,
            )
            for row in rows
        ]

    async def _with_outcomes(
        self, transactions: Sequence[JournaledTransaction]
    ) -> Sequence[JournaledTransaction]:
        """Add how transactions were decided, as it stands after they were claimed."""
        if not transactions:
            return transactions
        ids = {"rows": id_rows(each.token.transaction_id for each in transactions)}
        rows = await self._catalog.read(self._catalog_sql.outcomes, ids)
        outcomes = {row.transaction_id: Outcome(row.outcome) for row in rows}
        return [
            replace(each, outcome=outcomes.get(each.token.transaction_id)) for each in transactions
        ]

    @override
    async def known(self, transaction_ids: Collection[str]) -> Collection[str]:
        if not transaction_ids:
            return []
        ids = {"rows": id_rows(transaction_ids)}
        journaled = await self._journal.read(self._transaction_sql.known, ids)
        # If rows of the journal were lost, the bytes to which records still point are kept all the same.
        staged = await self._catalog.read(self._catalog_sql.staged_transactions, ids)
        return {row[0] for row in (*journaled, *staged)}

    # --- late writes -------------------------------------------------------------------------

    async def _record_late_writes(self, late_writes: Collection[LateWrite]) -> None:
        rows = {"rows": late_write_rows(late_writes)}
        await self._journal.write(self._late_write_sql.record, rows)

    @override
    async def late_writes(self, keys: Collection[ObjectKey]) -> Collection[LateWrite]:
        rows = {"rows": key_rows(keys)}
        found = await self._journal.read(self._late_write_sql.late_writes, rows)
        return [late_write_of(row) for row in found]

    @override
    async def due_late_writes(self, *, after: LateWrite | None, limit: int) -> Sequence[LateWrite]:
        parameters = {
            "after_namespace": "" if after is None else after.namespace,
            "after_key": "" if after is None else after.key,
            "after_transaction_id": "" if after is None else after.write.transaction_id,
            "after_seq": 0 if after is None else after.write.seq,
            "limit": limit,
        }
        rows = await self._journal.read(self._late_write_sql.due_late_writes, parameters)
        return [late_write_of(row) for row in rows]

    # --- compensations and hooks -------------------------------------------------------------

    @property
    @override
    def keeps_jobs(self) -> bool:
        return True

    @override
    async def add_jobs(self, jobs: Collection[Job]) -> None:
        await self._journal.write(self._compensation_sql.add, {"rows": job_rows(jobs)})

    @override
    async def claim_jobs(
        self,
        names: Collection[str],
        *,
        limit: int,
        transaction_id: str | None = None,
        hurry: bool = False,
    ) -> Sequence[Job]:
        wanted = {
            "names": dumps({"name": each} for each in names),
            "transaction": transaction_id,
            "hurry": hurry,
        }
        taken = await self._claim_from(self._journal, self._compensation_sql, wanted, limit)
        if len(taken) < limit:
            taken += await self._claim_from(
                self._catalog, self._hook_sql, wanted, limit - len(taken)
            )
        return taken

    async def _claim_from(
        self, database: Database, sql: JobStatements, wanted: Mapping[str, Any], limit: int
    ) -> list[Job]:
        after, due = 0, list[Any]()
        while len(due) < limit:
            page = await database.read(
                sql.candidates, {**wanted, "after_position": after, "limit": PAGE}
            )
            if not page:
                break
            after = page[-1].position
            due += await self._due(page)
        if not due:
            return []
        rows = dumps(
            {name: getattr(each, name) for name in ("transaction_id", "number", "attempts")}
            for each in due[:limit]
        )
        try:
            taken = await database.write(sql.take, {"rows": rows}, lock_wait=PURGE_LOCK_WAIT)
        except LockWaitTimeoutError:
            return []  # a user's transaction holds the file
        return [job_of(row) for row in sorted(taken, key=lambda row: row.position)]

    async def _due(self, rows: Sequence[Any]) -> list[Any]:
        """Return those of jobs whose transactions are decided as they wait for.

        A transaction that has neither an outcome nor a row has not committed: an outcome is kept
        while there are compensations of it. The rows are read first: a commit writes its outcome
        before they go.
        """
        ids = {row.transaction_id for row in rows if row.after == Outcome.ABORTED}
        if not ids:
            return list(rows)
        wanted = {"rows": id_rows(ids)}
        journaled = await self._journal.read(self._transaction_sql.known, wanted)
        outcomes = await self._catalog.read(self._catalog_sql.outcomes, wanted)
        decided = dict.fromkeys(ids, Outcome.ABORTED.value)
        decided |= {row.transaction_id: "" for row in journaled}
        decided |= {row.transaction_id: row.outcome for row in outcomes}
        return [
            row
            for row in rows
            if row.after != Outcome.ABORTED or decided[row.transaction_id] == row.after
        ]

    @override
    async def keep_job(
        self, job: Job, *, retry_in: float | None = None, error: str | None = None
    ) -> bool:
        database, sql = self._journal, self._compensation_sql
        if job.after is Outcome.COMMITTED:
            database, sql = self._catalog, self._hook_sql
        parameters = {
            "transaction": job.transaction_id,
            "which": job.number,
            "attempt": job.attempts,
        }
        if retry_in is None:
            return bool(await database.write(sql.hold, parameters))
        parameters |= {"pause": retry_in, "reason": error}
        return bool(await database.write(sql.give_back, parameters))

    @override
    async def end_jobs(self, jobs: Collection[Job]) -> None:
        hooks = [each for each in jobs if each.after is Outcome.COMMITTED]
        others = [each for each in jobs if each.after is not Outcome.COMMITTED]
        if others:
            await self._journal.write(self._compensation_sql.end, {"rows": job_rows(others)})
        if hooks:
            await self._catalog.write(self._hook_sql.end, {"rows": job_rows(hooks)})

    @override
    async def jobs(self, *, limit: int, transaction_id: str | None = None) -> Sequence[Job]:
        found: list[Job] = []
        for database, sql in (
            (self._journal, self._compensation_sql),
            (self._catalog, self._hook_sql),
        ):
            after = 0
            while len(found) < limit:
                parameters = {
                    "transaction": transaction_id,
                    "after_position": after,
                    "limit": PAGE,
                }
                page = await database.read(sql.jobs, parameters)
                if not page:
                    break
                after = page[-1].position
                rows = page if transaction_id is not None else await self._due(page)
                found += [job_of(row) for row in rows]
        return found[:limit]

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

    # --- notes, and the key of tickets; in the journal's file, since a user's transaction may lock the catalog's ---

    @override
    async def recall(self, name: str) -> str | None:
        return await self._noted(self._note_sql.recall, name)

    @override
    async def remember(self, name: str, value: str) -> None:
        await self._journal.write(self._note_sql.remember, {"noted": name, "text": value})

    @override
    async def note(self, name: str) -> str | None:
        return await self._noted(self._note_sql.note, name)

    @override
    async def keep_note(self, name: str, value: str) -> None:
        await self.remember(name, value)

    async def _noted(self, statement: Select[Any], name: str) -> str | None:
        rows = await self._journal.read(statement, {"noted": name})
        return str(rows[0][0]).partition(" ")[2] if rows else None

    @override
    async def ticket_key(self) -> bytes:
        if not self._ticket_key:
            kept = await self._journal.read(self._note_sql.ticket_key)
            if not kept:
                new = {"text": secrets.token_hex(32)}  # of several processes the first one decides
                await self._journal.write(self._note_sql.keep_ticket_key, new)
                kept = await self._journal.read(self._note_sql.ticket_key)
            self._ticket_key = bytes.fromhex(kept[0].value)
        return self._ticket_key


def _found(
    connection: Connection, statement: Select[Any], parameters: Mapping[str, Any]
) -> list[Record]:
    return [record_of(row) for row in connection.execute(statement, parameters)]


def _stretch(
    namespace: str, prefix: str, start: str, limit: int
) -> tuple[tuple[bool, bool], dict[str, Any]]:
    """Return which statement finds a stretch of keys, and its parameters."""
    # No key holds a NUL, which PostgreSQL does not take either: "a\0" is what follows "a".
    start, nul, _ = max(start, prefix).partition("\0")
    stop = after_prefix(prefix)
    parameters: dict[str, Any] = {"namespace": namespace, "start": start, "limit": limit}
    if stop is not None:
        parameters["stop"] = stop
    return (bool(nul), stop is not None), parameters
