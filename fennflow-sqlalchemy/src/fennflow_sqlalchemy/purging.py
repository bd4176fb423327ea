"""Removes expired rows: retained locks, void compensations, outcomes and old commits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fennflow.backends import Outcome
from fennflow_sqlalchemy.database import LockWaitTimeoutError
from fennflow_sqlalchemy.rows import id_rows, job_of, job_rows

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from fennflow_sqlalchemy.database import Database
    from fennflow_sqlalchemy.feed import Feed
    from fennflow_sqlalchemy.statements import (
        CatalogStatements,
        JobStatements,
        TransactionStatements,
    )

PAGE = 1000
PURGE_LOCK_WAIT = 0.05
"""Seconds to wait for the catalog's file on SQLite, which a user's transaction may hold for long."""


@dataclass
class Purge:
    """Purges a catalog and its journal, no more often than at an interval.

    An outcome is marked when its transaction is gone, and removed a late-write period later (P5).
    It is kept while compensations depend on it.

    Args:
        catalog: the database of the catalog.
        journal: the database of the journal.
        catalog_sql: the statements of the catalog.
        transaction_sql: the statements of transactions.
        compensation_sql: the statements of compensations.
        feed: the feed of commits.
        interval: seconds between two purges.
    """

    catalog: Database
    journal: Database
    catalog_sql: CatalogStatements
    transaction_sql: TransactionStatements
    compensation_sql: JobStatements
    feed: Feed
    interval: float
    _due: float = field(default=0.0, init=False)

    async def run(self) -> None:
        """Purge, if it is due."""
        now = asyncio.get_running_loop().time()
        if now < self._due:
            return
        self._due = now + self.interval
        last = {"after": ""}
        try:
            await self.journal.write(
                self.transaction_sql.drop_kept_locks, lock_wait=PURGE_LOCK_WAIT
            )
            await self._remove_void_compensations()
            while old := await self.catalog.read(self.catalog_sql.old_outcomes, last):
                last = {"after": old[-1][0]}
                await self._mark_outcomes([row[0] for row in old])
            await self.catalog.write(self.catalog_sql.purge_outcomes, lock_wait=PURGE_LOCK_WAIT)
            await self.feed.forget(PURGE_LOCK_WAIT)
        except LockWaitTimeoutError:
            return  # another transaction holds a lock: purge later

    async def _mark_outcomes(self, transaction_ids: Sequence[str]) -> None:
        """Mark the outcomes of transactions that are gone."""
        ids = {"rows": id_rows(transaction_ids)}

        def alive(connection: Connection) -> set[str]:
            known = connection.execute(self.transaction_sql.known, ids)
            waiting = connection.execute(self.compensation_sql.waited_for, ids)
            return {*known.scalars(), *waiting.scalars()}

        kept = await self.journal.run(alive, write=False)
        gone = {"rows": id_rows(each for each in transaction_ids if each not in kept)}
        await self.catalog.write(self.catalog_sql.settle_outcomes, gone, lock_wait=PURGE_LOCK_WAIT)

    async def _remove_void_compensations(self) -> None:
        """Remove the compensations of committed transactions."""
        after = 0
        while page := await self.journal.read(
            self.compensation_sql.jobs,
            {"transaction": None, "after_position": after, "limit": PAGE},
        ):
            after = page[-1].position
            ids = {"rows": id_rows({row.transaction_id for row in page})}
            outcomes = await self.catalog.read(self.catalog_sql.outcomes, ids)
            committed = {row.transaction_id for row in outcomes if row.outcome == Outcome.COMMITTED}
            jobs = [job_of(row) for row in page if row.transaction_id in committed]
            void = job_rows(each for each in jobs if each.after is Outcome.ABORTED)
            await self.journal.write(
                self.compensation_sql.end, {"rows": void}, lock_wait=PURGE_LOCK_WAIT
            )
