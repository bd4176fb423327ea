"""Compensations, in the journal's database, and hooks, which pivots write into the catalog's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from fennflow.backends import Job, Outcome
from fennflow_sqlalchemy.database import LockWaitTimeoutError
from fennflow_sqlalchemy.recovery import PURGE_LOCK_WAIT, RecoverableBackend
from fennflow_sqlalchemy.rows import dumps, id_rows, job_of, job_rows

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from fennflow_sqlalchemy.database import Database
    from fennflow_sqlalchemy.statements import JobStatements


class JobBackend(RecoverableBackend):
    """What durable steps, and those who call compensations and hooks, ask of the database.

    Args:
        config: which one.
        late_write_period: seconds for which late writes and kept locks stand.
        lease_ttl: seconds that a lease runs.
        lock_timeout: seconds to wait for locks that users' transactions hold.
    """

    @property
    @override
    def keeps_jobs(self) -> bool:
        return True

    @override
    async def add_jobs(self, jobs: Collection[Job]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(self._compensation_sql.add, {"rows": job_rows(jobs)})

        await self._journal.run(work)

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
            page = await self._page(database, sql.candidates, {**wanted, "after_position": after})
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

        def take(connection: Connection) -> list[Any]:
            return list(connection.execute(sql.take, {"rows": rows}))

        try:
            taken = await database.run(take, lock_wait=PURGE_LOCK_WAIT)
        except LockWaitTimeoutError:
            return []  # a user's transaction holds the file
        return [job_of(row) for row in sorted(taken, key=lambda row: row.position)]

    async def _due(self, rows: Sequence[Any]) -> list[Any]:
        """Return those of jobs whose transactions are decided as they wait for.

        A transaction that has neither an outcome nor a row has not committed: an outcome is kept
        while there are compensations of it. The rows are read first: a commit writes its outcome
        before they go.
        """
        ids = id_rows({row.transaction_id for row in rows if row.after == Outcome.ABORTED})
        if ids == "[]":
            return list(rows)

        def known(connection: Connection) -> set[str]:
            return set(connection.execute(self._transaction_sql.known, {"rows": ids}).scalars())

        def outcomes(connection: Connection) -> dict[str, str]:
            found = connection.execute(self._catalog_sql.outcomes, {"rows": ids})
            return {row.transaction_id: row.outcome for row in found}

        alive = await self._journal.run(known, write=False)
        decided = await self._catalog.run(outcomes, write=False)
        return [
            row
            for row in rows
            if row.after != Outcome.ABORTED
            or decided.get(row.transaction_id, "" if row.transaction_id in alive else row.after)
            == row.after
        ]

    def _place_of(self, job: Job) -> tuple[Database, JobStatements]:
        if job.after is Outcome.COMMITTED:
            return self._catalog, self._hook_sql
        return self._journal, self._compensation_sql

    @override
    async def keep_job(
        self, job: Job, *, retry_in: float | None = None, error: str | None = None
    ) -> bool:
        database, sql = self._place_of(job)
        parameters = {
            "transaction": job.transaction_id,
            "which": job.number,
            "attempt": job.attempts,
        }
        if retry_in is not None:
            parameters |= {"pause": retry_in, "reason": error}
        statement = sql.hold if retry_in is None else sql.give_back

        def work(connection: Connection) -> bool:
            return connection.execute(statement, parameters).first() is not None

        return await database.run(work)

    @override
    async def end_jobs(self, jobs: Collection[Job]) -> None:
        hooks = [each for each in jobs if each.after is Outcome.COMMITTED]
        others = [each for each in jobs if each.after is not Outcome.COMMITTED]
        for database, sql, some in (
            (self._journal, self._compensation_sql, others),
            (self._catalog, self._hook_sql, hooks),
        ):
            if some:
                end, rows = sql.end, {"rows": job_rows(some)}

                def work(connection: Connection, end: Any = end, rows: Any = rows) -> None:
                    connection.execute(end, rows)

                await database.run(work)

    @override
    async def jobs(self, *, limit: int, transaction_id: str | None = None) -> Sequence[Job]:
        found: list[Job] = []
        for database, sql in (
            (self._journal, self._compensation_sql),
            (self._catalog, self._hook_sql),
        ):
            after = 0
            while len(found) < limit:
                parameters = {"transaction": transaction_id, "after_position": after}
                page = await self._page(database, sql.jobs, parameters)
                if not page:
                    break
                after = page[-1].position
                rows = page if transaction_id is not None else await self._due(page)
                found += [job_of(row) for row in rows]
        return found[:limit]
