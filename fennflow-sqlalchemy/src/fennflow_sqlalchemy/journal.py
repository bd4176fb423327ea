"""The journal: late writes, leases, claims, held transactions, compensations and hooks.

Its rows are in the journal's database, except hooks, which are in the catalog's, where pivots write
them. `backend.py` has the methods that owners of transactions use.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from fennflow.backends import (
    Backend,
    Commit,
    Guarantees,
    Intent,
    Job,
    JournaledTransaction,
    LateWrite,
    ObjectKey,
    Outcome,
    TransactionToken,
    dump_commit,
    load_commit,
    process_name,
)
from fennflow_sqlalchemy.database import LockWaitTimeoutError
from fennflow_sqlalchemy.engines import open_databases
from fennflow_sqlalchemy.feed import Feed
from fennflow_sqlalchemy.filling import FillStatements
from fennflow_sqlalchemy.purging import PAGE, PURGE_LOCK_WAIT, Purge
from fennflow_sqlalchemy.rows import (
    dumps,
    id_rows,
    intent_of,
    job_of,
    job_rows,
    key_rows,
    late_write_of,
    late_write_rows,
    lost,
    transaction_params,
)
from fennflow_sqlalchemy.statements import (
    CatalogStatements,
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
"""Seconds to wait for this process's own pivot, if only the answer was lost."""

SMALLEST = "\x01"
"""The smallest character that a database can store: a key with it appended is the next key."""


class JournalBackend(Backend):
    """The part of the backend for recovery, compensations and hooks.

    Args:
        config: the config of the database.
        late_write_period: seconds for which late writes and retained locks are kept.
        lease_ttl: seconds that a lease lasts.
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
        self._process = process_name()
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
    def guarantees(self) -> Guarantees:
        return Guarantees(shared="network" if self._single_database else "machine", durable=True)

    @override
    async def aclose(self) -> None:
        await self._catalog.aclose()
        if not self._single_database:
            await self._journal.aclose()

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

    # --- leases, and transactions that are claimed -------------------------------------------

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
            parameters = {"limit": limit, "by": self._process}
            rows = connection.execute(self._transaction_sql.claim, parameters).all()
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
                process=row.process,
            )
            for row in rows
        ]

    async def _with_outcomes(
        self, transactions: Sequence[JournaledTransaction]
    ) -> Sequence[JournaledTransaction]:
        """Add the outcomes of transactions, read after they were claimed."""
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
        # Even if rows of the journal were lost, bytes to which records point are kept.
        staged = await self._catalog.read(self._catalog_sql.staged_transactions, ids)
        return {row[0] for row in (*journaled, *staged)}

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
        parameters = {"transaction": transaction_id, "by": self._process}

        def work(connection: Connection) -> list[JournaledTransaction]:
            if self._is_decided(connection, transaction_id):
                return []
            rows = connection.execute(self._transaction_sql.take_held, parameters).all()
            return self._journaled(connection, rows)

        taken = await self._journal.run(work)
        return taken[0] if taken else None

    def _is_decided(self, connection: Connection, transaction_id: str) -> bool:
        """Return whether the other file has an outcome; in a single database the statements check it."""
        if self._single_database:
            return False
        with self._catalog.peek(connection) as catalog:
            decided = catalog.execute(self._catalog_sql.outcome, {"transaction": transaction_id})
            return decided.first() is not None

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
        """Return the jobs whose transactions have the outcome for which they wait.

        A transaction with neither an outcome nor a row has not committed, since an outcome is kept
        while it has compensations. The rows are read first: a commit writes its outcome before it
        removes the rows.
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

    # --- notes and the ticket key, in the journal: a user's transaction may lock the catalog's file
    # ---

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
                new = {"text": secrets.token_hex(32)}  # the first process wins
                await self._journal.write(self._note_sql.keep_ticket_key, new)
                kept = await self._journal.read(self._note_sql.ticket_key)
            self._ticket_key = bytes.fromhex(kept[0].value)
        return self._ticket_key
