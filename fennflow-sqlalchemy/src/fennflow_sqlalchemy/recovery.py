"""Late writes, leases, transaction claims, and purging of expired outcomes and locks."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from fennflow.backends import (
    Backend,
    Commit,
    CommittedTransaction,
    Guarantees,
    Intent,
    JournaledTransaction,
    LateWrite,
    Outcome,
    TransactionToken,
    dump_commit,
    load_commit,
)
from fennflow_sqlalchemy.database import LockWaitTimeoutError
from fennflow_sqlalchemy.engines import open_databases
from fennflow_sqlalchemy.feed import Feed
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

    from fennflow.backends import ObjectKey
    from fennflow_sqlalchemy.config import SqlalchemyBackendConfig
    from fennflow_sqlalchemy.database import Database

PAGE = 1000
PURGE_LOCK_WAIT = 0.05
"""Seconds to wait for the catalog's file on SQLite, which a user's transaction may hold for long."""


class RecoverableBackend(Backend):
    """What recovery asks of a catalog and a journal in a database.

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
        self._catalog_id = ""
        self._ticket_key = b""
        self._purge_every = late_write_period / 2
        self._purge_due = 0.0

    @property
    @override
    def catalog_id(self) -> str:
        return self._catalog_id

    @property
    @override
    def guarantees(self) -> Guarantees:
        return Guarantees(shared="network" if self._single_database else "machine", durable=True)

    @override
    async def aclose(self) -> None:
        await self._catalog.aclose()
        if not self._single_database:
            await self._journal.aclose()

    # --- what was probed ----------------------------------------------------------------------

    @override
    async def recall(self, name: str) -> str | None:
        return await self._noted(self._note_sql.recall, name)

    @override
    async def note(self, name: str) -> str | None:
        return await self._noted(self._note_sql.note, name)

    async def _noted(self, statement: Select[Any], name: str) -> str | None:
        def work(connection: Connection) -> str | None:
            kept = connection.scalar(statement, {"noted": name})
            return None if kept is None else str(kept).partition(" ")[2]

        return await self._journal.run(work, write=False)

    @override
    async def keep_note(self, name: str, value: str) -> None:
        await self.remember(name, value)

    @override
    async def remember(self, name: str, value: str) -> None:
        def work(connection: Connection) -> None:
            connection.execute(self._note_sql.remember, {"noted": name, "text": value})

        # In the journal's file: the catalog's may be locked by a user's transaction.
        await self._journal.run(work)

    # --- tickets for uploads ------------------------------------------------------------------

    @override
    async def ticket_key(self) -> bytes:
        # In the journal's file, like what was probed.
        if not self._ticket_key:
            kept = await self._journal.run(self._kept_key, write=False)
            if kept is None:
                await self._journal.run(self._keep_key)
                kept = await self._journal.run(self._kept_key, write=False)
            self._ticket_key = bytes.fromhex(str(kept))
        return self._ticket_key

    def _kept_key(self, connection: Connection) -> object:
        return connection.scalar(self._note_sql.ticket_key)

    def _keep_key(self, connection: Connection) -> None:
        # Of several processes the first one decides.
        connection.execute(self._note_sql.keep_ticket_key, {"text": secrets.token_hex(32)})

    # --- the feed of commits -------------------------------------------------------------------

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

    # --- late writes --------------------------------------------------------------------------

    async def _record_late_writes(self, late_writes: Collection[LateWrite]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(self._late_write_sql.record, {"rows": late_write_rows(late_writes)})

        await self._journal.run(work)

    @override
    async def late_writes(self, keys: Collection[ObjectKey]) -> Collection[LateWrite]:
        def work(connection: Connection) -> list[LateWrite]:
            rows = connection.execute(self._late_write_sql.late_writes, {"rows": key_rows(keys)})
            return [late_write_of(row) for row in rows]

        return await self._journal.run(work, write=False)

    @override
    async def due_late_writes(self, *, after: LateWrite | None, limit: int) -> Sequence[LateWrite]:
        parameters = {
            "after_namespace": "" if after is None else after.namespace,
            "after_key": "" if after is None else after.key,
            "after_transaction_id": "" if after is None else after.write.transaction_id,
            "after_seq": 0 if after is None else after.write.seq,
            "limit": limit,
        }

        def work(connection: Connection) -> list[LateWrite]:
            rows = connection.execute(self._late_write_sql.due_late_writes, parameters)
            return [late_write_of(row) for row in rows]

        return await self._journal.run(work, write=False)

    # --- leases and recovery -----------------------------------------------------------------

    @override
    async def heartbeat(
        self, transactions: Collection[TransactionToken]
    ) -> Collection[TransactionToken]:
        def work(connection: Connection) -> list[TransactionToken]:
            rows = dumps(token._asdict() for token in sorted(transactions))
            kept = connection.execute(self._transaction_sql.beat, {"rows": rows})
            return [TransactionToken(*row) for row in kept]

        return await self._journal.run(work)

    @override
    async def claim(self, limit: int) -> Sequence[JournaledTransaction]:
        await self._purge()

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
        ids = id_rows(each.token.transaction_id for each in transactions)

        def work(connection: Connection) -> dict[str, Outcome]:
            rows = connection.execute(self._catalog_sql.outcomes, {"rows": ids})
            return {row.transaction_id: Outcome(row.outcome) for row in rows}

        outcomes = await self._catalog.run(work, write=False)
        return [
            replace(each, outcome=outcomes.get(each.token.transaction_id)) for each in transactions
        ]

    @override
    async def known(self, transaction_ids: Collection[str]) -> Collection[str]:
        if not transaction_ids:
            return []
        parameters = {"rows": id_rows(transaction_ids)}

        def journaled(connection: Connection) -> set[str]:
            return set(connection.execute(self._transaction_sql.known, parameters).scalars())

        def staged(connection: Connection) -> set[str]:
            return set(
                connection.execute(self._catalog_sql.staged_transactions, parameters).scalars()
            )

        # What was lost of the journal must not cost the bytes that records still point at.
        found = await self._journal.run(journaled, write=False)
        return found | await self._catalog.run(staged, write=False)

    async def _purge(self) -> None:
        """Forget kept locks that ran out, outcomes that outlived their transactions (P5), and old commits.

        An outcome is marked when its transaction is seen to be gone, and goes a late-write period later.
        It stays while there are compensations that depend on it.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._purge_due:
            return
        self._purge_due = loop.time() + self._purge_every

        def locks(connection: Connection) -> None:
            connection.execute(self._transaction_sql.drop_kept_locks)

        def outcomes(connection: Connection) -> None:
            connection.execute(self._catalog_sql.purge_outcomes)

        last = ""
        try:
            await self._journal.run(locks, lock_wait=PURGE_LOCK_WAIT)
            await self._forget_compensations()
            while old := await self._old_outcomes(last):
                last = old[-1]
                await self._mark_settled(old)
            await self._catalog.run(outcomes, lock_wait=PURGE_LOCK_WAIT)
            await self._feed.forget(PURGE_LOCK_WAIT)
        except LockWaitTimeoutError:
            return  # another transaction holds a lock: what is old can become older

    async def _old_outcomes(self, after: str) -> list[str]:
        def work(connection: Connection) -> list[str]:
            found = connection.execute(self._catalog_sql.old_outcomes, {"after": after})
            return list(found.scalars())

        return await self._catalog.run(work, write=False)

    async def _mark_settled(self, transaction_ids: Sequence[str]) -> None:
        def known(connection: Connection) -> set[str]:
            found = connection.execute(
                self._transaction_sql.known, {"rows": id_rows(transaction_ids)}
            )
            waited_for = connection.execute(
                self._compensation_sql.waited_for, {"rows": id_rows(transaction_ids)}
            )
            return {*found.scalars(), *waited_for.scalars()}

        alive = await self._journal.run(known, write=False)
        gone = id_rows(each for each in transaction_ids if each not in alive)

        def mark(connection: Connection) -> None:
            connection.execute(self._catalog_sql.settle_outcomes, {"rows": gone})

        await self._catalog.run(mark, lock_wait=PURGE_LOCK_WAIT)

    async def _forget_compensations(self) -> None:
        """Remove those of steps whose transactions have committed."""
        after = 0
        while page := await self._page(
            self._journal,
            self._compensation_sql.jobs,
            {"transaction": None, "after_position": after},
        ):
            after = page[-1].position
            ids = id_rows({row.transaction_id for row in page})

            def committed(connection: Connection, ids: str = ids) -> set[str]:
                found = connection.execute(self._catalog_sql.outcomes, {"rows": ids})
                return {row.transaction_id for row in found if row.outcome == Outcome.COMMITTED}

            gone = await self._catalog.run(committed, write=False)
            jobs = [job_of(row) for row in page if row.transaction_id in gone]
            rows = job_rows(each for each in jobs if each.after is Outcome.ABORTED)

            def forget(connection: Connection, rows: str = rows) -> None:
                connection.execute(self._compensation_sql.end, {"rows": rows})

            await self._journal.run(forget, lock_wait=PURGE_LOCK_WAIT)

    async def _page(
        self, database: Database, statement: Any, parameters: Mapping[str, Any]
    ) -> list[Any]:
        def work(connection: Connection) -> list[Any]:
            rows: Any = connection.execute(statement, {**parameters, "limit": PAGE})
            return list(rows)

        return await database.run(work, write=False)
