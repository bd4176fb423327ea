"""Compensations and hooks in the state: the commands that change them, and queries for due ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fennflow.backends import Job, Outcome
from fennflow_bucket.rows import Arguments, Row

if TYPE_CHECKING:
    from sqlite3 import Connection

    from fennflow_bucket.commands import Entry

_COLUMNS = "transaction_id, number, name, arguments, after, order_key, attempts, error"
_DUE = (
    "(job.after IS NOT 'aborted' OR COALESCE("
    "(SELECT outcome FROM outcomes AS o WHERE o.transaction_id = job.transaction_id), "
    "(SELECT '' FROM transactions AS t WHERE t.transaction_id = job.transaction_id), "
    "'aborted') = 'aborted')"
)
_WAITS = (
    "EXISTS (SELECT 1 FROM jobs AS other WHERE CASE WHEN job.after IS 'committed' "
    "THEN other.order_key = job.order_key AND other.position < job.position "
    "ELSE other.transaction_id = job.transaction_id AND other.number > job.number "
    "AND other.after IS NOT 'committed' AND other.attempts < :in_order "
    "AND (other.after IS NULL OR job.after IS NOT NULL) END)"
)


def job_row(job: Job) -> Row:
    """Return the row of a job that has not been called yet."""
    after = None if job.after is None else job.after.value
    return [job.transaction_id, job.number, job.name, job.arguments, after, job.key]


def job_of(row: Iterable[Any]) -> Job:
    """Return the job of a row."""
    transaction_id, number, name, arguments, after, key, attempts, error = row
    return Job(
        transaction_id=transaction_id,
        number=number,
        name=name,
        arguments=arguments,
        after=None if after is None else Outcome(after),
        key=key,
        attempts=attempts,
        error=error,
    )


def has_jobs(db: Connection) -> bool:
    """Return whether there are any."""
    return bool(db.execute("SELECT 1 FROM jobs LIMIT 1").fetchall())


def jobs_in(db: Connection, transaction_id: str | None, limit: int) -> list[Job]:
    """Return the jobs of a transaction, or those that are due or being called, oldest first."""
    which = _DUE if transaction_id is None else "job.transaction_id = :transaction"
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM jobs AS job WHERE {which} ORDER BY position LIMIT :limit",
        {"transaction": transaction_id, "limit": limit},
    )
    return [job_of(row) for row in rows.fetchall()]


def put_jobs(entry: Entry, rows: Sequence[Row]) -> None:
    """Journal jobs; a running attempt of an existing job is fenced off."""
    entry.db.executemany(
        "INSERT INTO jobs SELECT ?, ?, COALESCE(MAX(position), 0) + 1, ?, ?, ?, ?, 0, ?, 0, NULL "
        "FROM jobs WHERE true ON CONFLICT DO UPDATE SET after = excluded.after, "
        "attempts = attempts + (lease_until > 0), due_at = excluded.due_at, lease_until = 0",
        [(*row, entry.now) for row in rows],
    )


def drop_compensations(entry: Entry, transaction_id: str) -> None:
    """Remove the compensations of a transaction that commits (P34)."""
    entry.db.execute(
        "DELETE FROM jobs WHERE transaction_id = ? AND after = 'aborted'", (transaction_id,)
    )


def _add_jobs(entry: Entry, arguments: Arguments, _: Any) -> None:
    put_jobs(entry, arguments["jobs"])


def _claim_jobs(entry: Entry, arguments: Arguments, _: Any) -> list[Row]:
    names = arguments["names"]
    bound = {f"name{index}": name for index, name in enumerate(names)}
    only = arguments["transaction"]
    of_one = "true" if only is None else "job.transaction_id = :transaction"
    taken = entry.db.execute(
        f"SELECT {_COLUMNS} FROM jobs AS job "
        f"WHERE name IN ({', '.join(f':{each}' for each in bound)}) AND {of_one} "
        f"AND lease_until <= :now AND (due_at <= :now OR :hurry) AND {_DUE} AND NOT {_WAITS} "
        "ORDER BY position LIMIT :limit",
        {
            **bound,
            "transaction": only,
            "now": entry.now,
            "hurry": arguments["hurry"],
            "in_order": arguments["in_order"],
            "limit": arguments["limit"],
        },
    ).fetchall()
    entry.db.executemany(
        "UPDATE jobs SET attempts = attempts + 1, lease_until = ? "
        "WHERE transaction_id = ? AND number = ?",
        [(entry.now + entry.lease, row[0], row[1]) for row in taken],
    )
    return [[*row[:6], row[6] + 1, row[7]] for row in taken]


def _keep_job(entry: Entry, arguments: Arguments, _: Any) -> bool:
    which = arguments["id"], arguments["number"], arguments["attempts"]
    same = "WHERE transaction_id = ? AND number = ? AND attempts = ?"
    if arguments["pause"] is None:
        done = entry.db.execute(
            f"UPDATE jobs SET lease_until = ? {same}", (entry.now + entry.lease, *which)
        )
    else:
        done = entry.db.execute(
            f"UPDATE jobs SET lease_until = 0, due_at = ?, error = ? {same}",
            (entry.now + arguments["pause"], arguments["error"], *which),
        )
    return bool(done.rowcount)


def _end_jobs(entry: Entry, arguments: Arguments, _: Any) -> None:
    entry.db.executemany(
        "DELETE FROM jobs WHERE transaction_id = ? AND number = ? AND attempts = ?",
        arguments["jobs"],
    )


JOB_COMMANDS = {
    "add_jobs": _add_jobs,
    "claim_jobs": _claim_jobs,
    "keep_job": _keep_job,
    "end_jobs": _end_jobs,
}
