"""The feed of commits: pivots write its rows, which get their positions when they are seen (P38).

On PostgreSQL a transaction may commit long after another one that began its pivot later. So a
number that the pivot assigns cannot be a position in the feed: a reader would skip rows that become
visible later with a lower number. Therefore readers assign the positions: one reader at a time
gives the next positions to all visible rows without one. Of two pivots that change the same key,
the later one begins when the earlier one is visible, since it needs the key's lock, so they keep
their order. SQLite has one writer at a time, so the pivot assigns the position.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from zlib import crc32

from sqlalchemy import (
    BigInteger,
    Integer,
    Text,
    bindparam,
    delete,
    func,
    literal_column,
    null,
    select,
    update,
)

from fennflow.backends import CommittedTransaction, ObjectKey, bad_cursor
from fennflow_sqlalchemy.rows import EPOCH, key_rows, record_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from fennflow.backends import Commit
    from fennflow_sqlalchemy.database import Database
    from fennflow_sqlalchemy.statements import CatalogStatements
    from fennflow_sqlalchemy.tables import Tables

DIGITS = 19
"""The most digits of a position that a column can hold."""


class Feed:
    """The feed of one catalog.

    Args:
        tables: the tables of the catalog.
        catalog: their database.
        statements: the statements of the catalog.
        retention: seconds for which a commit is kept.
    """

    def __init__(
        self, tables: Tables, catalog: Database, statements: CatalogStatements, retention: float
    ) -> None:
        self._catalog = catalog
        self._by_reader = catalog.dialect == "postgresql"
        commits, now = tables.commits, catalog.now()
        changes = [bindparam(name, type_=Text()) for name in ("records", "removed")]
        columns = ["transaction_id", "committed_at", "records", "removed"]
        last = select(func.coalesce(func.max(commits.c.position), 0)).scalar_subquery()
        self._decide = statements.decide
        if self._by_reader:
            # One statement, and so one round trip, for the outcome and its row.
            decided = statements.decide.cte("decided")
            row = select(decided.c.transaction_id, now, *changes)
        else:
            row = select(bindparam("transaction", type_=Text()), now, *changes, last + 1)
            columns.append("position")
        added = catalog.insert(commits).from_select(columns, row)
        self._add = added.returning(commits.c.transaction_id)
        self._page = (
            select(commits)
            .where(commits.c.position >= bindparam("start", type_=BigInteger()))
            .order_by(commits.c.position)
            .limit(bindparam("limit", type_=Integer()))
        )
        self._last = (
            select(commits.c.position, commits.c.transaction_id)
            .where(commits.c.position.is_not(None))
            .order_by(commits.c.position.desc())
            .limit(1)
        )
        self._new = select(commits.c.number).where(commits.c.position.is_(None)).limit(1)
        name = f"fennflow {commits.schema}.{commits.name}".encode()
        self._turn = select(func.pg_advisory_xact_lock(literal_column(str(crc32(name)))))
        placed = (
            select(
                commits.c.number,
                (last + func.row_number().over(order_by=commits.c.number)).label("position"),
            )
            .where(commits.c.position.is_(null()))
            .subquery("placed")
        )
        self._place = (
            update(commits)
            .where(commits.c.number == placed.c.number)
            .values(position=placed.c.position)
        )
        # Rows after a cursor are kept for the retention, and so is the row of the cursor, even if
        # it is older, like the last row of an idle catalog. A row that got its position long after
        # its pivot may be older than rows before it.
        kept = commits.alias("kept")
        first = (
            select(kept.c.position)
            .where(kept.c.committed_at >= now - retention, kept.c.position.is_not(None))
            .order_by(kept.c.position)
            .limit(1)
            .scalar_subquery()
        )
        expired = func.coalesce(first - 1, last)
        self._forget = delete(commits).where(commits.c.position < expired)

    def decide(
        self, connection: Connection, decision: dict[str, Any], commit: Commit, records: str
    ) -> bool:
        """Decide a transaction and publish its changes, in its pivot.

        Args:
            connection: a connection in the transaction of the pivot.
            decision: parameters of `CatalogStatements.decide`.
            commit: the contents of the pivot.
            records: the rows of its records.

        Returns:
            whether it was undecided before.
        """
        if not commit.records and not commit.removed:
            return connection.execute(self._decide, decision).first() is not None
        changes = {"records": records, "removed": key_rows(commit.removed)}
        if self._by_reader:
            return connection.execute(self._add, {**decision, **changes}).first() is not None
        if connection.execute(self._decide, decision).first() is None:
            return False
        row = {"transaction": decision["transaction"], **changes}
        connection.execute(self._add, row).close()
        return True

    async def commits(
        self, catalog_id: str, *, after: str | None, limit: int
    ) -> Sequence[CommittedTransaction]:
        """Implement `Backend.commits`."""
        start, transaction_id = 0, catalog_id
        if after is not None:
            digits, _, transaction_id = after.partition(".")
            if not digits.isdecimal() or len(digits) >= DIGITS:
                raise bad_cursor(after)
            start = int(digits)

        def work(connection: Connection) -> tuple[list[Any], bool]:
            parameters = {"start": start, "limit": limit + 1}
            rows: list[Any] = list(connection.execute(self._page, parameters))
            return rows, len(rows) <= limit and self._has_new(connection)

        rows, more = await self._catalog.run(work, write=False)
        if more:
            await self._place_new()
            rows, _ = await self._catalog.run(work, write=False)
        if after is None:
            return [_commit_of(row) for row in rows[:limit]]
        if start == 0:
            # Before the first commit, where the feed begins or will begin.
            if transaction_id != catalog_id or (rows and rows[0].position > 1):
                raise bad_cursor(after)
            return [_commit_of(row) for row in rows[:limit]]
        if not rows or (rows[0].position, rows[0].transaction_id) != (start, transaction_id):
            raise bad_cursor(after)
        return [_commit_of(row) for row in rows[1:]]

    async def cursor(self, catalog_id: str) -> str:
        """Return the cursor of the end."""

        def work(connection: Connection) -> tuple[Any, bool]:
            return connection.execute(self._last).first(), self._has_new(connection)

        last, more = await self._catalog.run(work, write=False)
        if more:
            await self._place_new()
            last, _ = await self._catalog.run(work, write=False)
        return f"0.{catalog_id}" if last is None else _cursor_of(last)

    async def forget(self, lock_wait: float) -> None:
        """Remove commits whose successors are older than the retention.

        Args:
            lock_wait: seconds to wait for locks.

        Raises:
            LockWaitTimeoutError: another transaction held a lock.
        """

        def work(connection: Connection) -> None:
            connection.execute(self._forget)

        if self._by_reader:
            await self._place_new(lock_wait)
        await self._catalog.run(work, lock_wait=lock_wait)

    def _has_new(self, connection: Connection) -> bool:
        return self._by_reader and connection.execute(self._new).first() is not None

    async def _place_new(self, lock_wait: float | None = None) -> None:
        """Assign positions to all visible commits that have none."""

        def work(connection: Connection) -> None:
            # Each statement has its own snapshot (READ COMMITTED), so the second one sees the
            # changes of earlier lock holders.
            connection.execute(self._turn).close()
            connection.execute(self._place)

        await self._catalog.run(work, lock_wait=lock_wait)


def _cursor_of(row: Any) -> str:
    return f"{row.position}.{row.transaction_id}"


def _commit_of(row: Any) -> CommittedTransaction:
    return CommittedTransaction(
        cursor=_cursor_of(row),
        transaction_id=row.transaction_id,
        committed_at=EPOCH + timedelta(seconds=row.committed_at),
        records=[record_of(SimpleNamespace(**each)) for each in json.loads(row.records)],
        removed=[ObjectKey(**each) for each in json.loads(row.removed)],
    )
