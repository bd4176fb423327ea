"""The commands of the log: each changes the state deterministically.

A process runs a command on its own state before it appends it. If the command raises, it is not
appended. Every other process applies the command to the same state, where it cannot fail. So a
command uses no clock and no random values: times are those of its entry.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fennflow.backends import (
    Decision,
    ObjectKey,
    Outcome,
    Record,
    TransactionToken,
    conflict,
    load_steps,
    locked,
)
from fennflow.exceptions import TransactionLostException
from fennflow.paths import after_name, after_prefix
from fennflow_bucket.clocks import SECOND
from fennflow_bucket.jobs import JOB_COMMANDS, drop_compensations, put_jobs
from fennflow_bucket.rows import Arguments, Row, intent_row, record_of

WRITER_KEPT = 7 * 86400 * SECOND
"""Microseconds for which a writer is remembered after its last entry."""


class PlanError(Exception):
    """The plan of a caller raised; this is not an error of the rows.

    Args:
        raised: the exception of the plan.
    """

    def __init__(self, raised: Exception) -> None:
        super().__init__(str(raised))
        self.raised = raised


@dataclass(frozen=True, slots=True)
class Entry:
    """The values that the commands of one entry share.

    Args:
        db: the connection, inside a transaction.
        now: the time of the entry, in microseconds.
        lease: how long a lease lasts, in microseconds, by the configuration of the writer.
        late: how long late writes are possible, also in microseconds.
    """

    db: sqlite3.Connection
    now: int
    lease: int
    late: int


@dataclass(slots=True)
class Command:
    """A command that this process wants to append.

    Args:
        name: of the function.
        arguments: the arguments, which the log stores.
        local: values that the log does not store, because they are used before the entry is sent: a
            plan, and the records that were read.
    """

    name: str
    arguments: dict[str, Any]
    local: Any = None

    def run(self, entry: Entry) -> Any:
        """Run it on this process's state; `arguments` are complete afterwards."""
        return COMMANDS[self.name](entry, self.arguments, self.local)


def forget(entry: Entry) -> None:
    """Remove expired outcomes (P5), retained locks (P20 b) and writers; runs first in each entry."""
    entry.db.execute(
        "DELETE FROM outcomes WHERE forget_at <= ? AND NOT EXISTS "
        "(SELECT 1 FROM transactions AS t WHERE t.transaction_id = outcomes.transaction_id) "
        "AND NOT EXISTS (SELECT 1 FROM jobs AS j WHERE j.transaction_id = outcomes.transaction_id)",
        (entry.now,),
    )
    entry.db.execute("DELETE FROM locks WHERE kept_until <= ?", (entry.now,))
    entry.db.execute("DELETE FROM writers WHERE seen_at <= ?", (entry.now - WRITER_KEPT,))


def seq_of(entry: Entry, writer: str) -> int:
    """Return the number of a writer's last entry; 0 before its first (L2)."""
    rows = entry.db.execute("SELECT seq FROM writers WHERE writer = ?", (writer,)).fetchall()
    return next((int(row[0]) for row in rows), 0)


def note_writer(entry: Entry, writer: str, seq: int) -> None:
    """Store the number of a writer's entry; runs last in each entry (L2)."""
    entry.db.execute(
        "INSERT INTO writers VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
        "SET seq = excluded.seq, seen_at = excluded.seen_at",
        (writer, seq, entry.now),
    )


def lost(transaction_id: str) -> TransactionLostException:
    """Return the error for a transaction that another process owns or has decided."""
    message = (
        f"Transaction {transaction_id} no longer belongs to this process: its lease ran out, or it "
        "was already decided. None of it was committed here; run the unit of work again."
    )
    return TransactionLostException(message)


def records_at(
    db: sqlite3.Connection, keys: list[Row] | list[ObjectKey]
) -> dict[ObjectKey, Record]:
    """Return the records of those keys that have one."""
    found: dict[ObjectKey, Record] = {}
    for namespace, key in keys:
        row = db.execute(
            "SELECT namespace, key, transaction_id, seq, body FROM records "
            "WHERE namespace = ? AND key = ?",
            (namespace, key),
        ).fetchone()
        if row is not None:
            found[ObjectKey(namespace, key)] = record_of(row)
    return found


def records_from(
    db: sqlite3.Connection, namespace: str, prefix: str, start: str, limit: int
) -> list[Record]:
    """Return what `Backend.scan` returns."""
    stop = after_prefix(prefix)
    bounded = "" if stop is None else "AND key < :stop"
    statement = (
        "SELECT namespace, key, transaction_id, seq, body FROM records "
        f"WHERE namespace = :namespace AND key >= :start {bounded} ORDER BY key LIMIT :limit"
    )
    parameters = {"namespace": namespace, "start": max(start, prefix), "limit": limit}
    if stop is not None:
        parameters["stop"] = stop
    return [record_of(row) for row in db.execute(statement, parameters).fetchall()]


def names_from(
    db: sqlite3.Connection, namespace: str, prefix: str, start: str, limit: int, delimiter: str
) -> list[Record]:
    """Return what `Backend.scan_names` returns; each look-up starts after the last name."""
    found: list[Record] = []
    following: str | None = start
    while following is not None and len(found) < limit:
        first = records_from(db, namespace, prefix, following, 1)
        found += first
        following = after_name(first[0].key, prefix, delimiter) if first else None
    return found


def _row(entry: Entry, arguments: Arguments) -> str | None:
    """Return the outcome of a transaction whose row has the token.

    Raises:
        TransactionLostException: it has no row, or a row with another token.
    """
    row = _find(entry, arguments)
    if row is None:
        raise lost(arguments["id"])
    return row[0]


def _find(entry: Entry, arguments: Arguments) -> tuple[str | None, str] | None:
    """Return outcome and steps of a transaction; None if it has no row.

    Raises:
        TransactionLostException: its row has another token.
    """
    row = entry.db.execute(
        "SELECT token, outcome, steps FROM transactions WHERE transaction_id = ?",
        (arguments["id"],),
    ).fetchone()
    if row is None:
        return None
    if row[0] != arguments["token"]:
        raise lost(arguments["id"])
    return row[1], row[2]


def _found(entry: Entry, arguments: Arguments, _: Any) -> None:
    entry.db.execute(
        "INSERT INTO meta VALUES ('catalog_id', ?) ON CONFLICT DO NOTHING", (arguments["id"],)
    )


def _keep_ticket_key(entry: Entry, arguments: Arguments, _: Any) -> None:
    entry.db.execute(
        "INSERT INTO meta VALUES ('ticket_key', ?) ON CONFLICT DO NOTHING", (arguments["key"],)
    )


def _note(entry: Entry, arguments: Arguments, _: Any) -> None:
    entry.db.execute(
        "INSERT INTO notes VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
        "SET value = excluded.value, noted_at = excluded.noted_at",
        (arguments["name"], arguments["value"], entry.now),
    )


def _stage(entry: Entry, arguments: dict[str, Any], plan: Any) -> Mapping[ObjectKey, Record]:
    db, transaction_id, keys = entry.db, arguments["id"], arguments["keys"]
    row = _find(entry, arguments)
    if row is None:
        decided = db.execute(
            "SELECT 1 FROM outcomes WHERE transaction_id = ?", (transaction_id,)
        ).fetchone()
        if decided or not arguments["begins"] or arguments["token"]:
            raise lost(transaction_id)
    elif row[0] is not None:
        raise lost(transaction_id)
    _check_locks(entry, transaction_id, keys)
    records: dict[ObjectKey, Record] = {}
    if plan is not None:
        records = records_at(db, keys)
        try:
            planned = plan(records)
        except Exception as error:
            raise PlanError(error) from error
        arguments["intents"] = [intent_row(each) for each in planned]
    lease_until = entry.now + entry.lease
    db.execute(
        "INSERT INTO transactions VALUES (?, 0, ?, ?, NULL, '[]', NULL, NULL, ?) ON CONFLICT DO UPDATE "
        "SET lease_until = excluded.lease_until",
        (transaction_id, entry.now, lease_until, arguments["by"]),
    )
    db.executemany(
        "INSERT INTO locks VALUES (?, ?, ?, NULL) ON CONFLICT DO UPDATE "
        "SET transaction_id = excluded.transaction_id, kept_until = NULL",
        [(*key, transaction_id) for key in keys],
    )
    db.executemany(
        "INSERT INTO intents VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
        "SET namespace = excluded.namespace, key = excluded.key, placement = excluded.placement, "
        "target = excluded.target, upload_id = excluded.upload_id",
        [(transaction_id, *intent) for intent in arguments["intents"]],
    )
    return records


def _check_locks(entry: Entry, transaction_id: str, keys: list[Row]) -> None:
    """Raise if another transaction holds one of the keys.

    Raises:
        RecordLockedException: it names the key that stays locked longest.
    """
    worst: tuple[float, ObjectKey, str, int | None] | None = None
    for namespace, key in keys:
        row = entry.db.execute(
            "SELECT transaction_id, kept_until FROM locks WHERE namespace = ? AND key = ?",
            (namespace, key),
        ).fetchone()
        if row is None or row[0] == transaction_id:
            continue
        holder, until = row
        if until is not None and until <= entry.now:
            continue
        weight = float("inf") if until is None else until
        if worst is None or weight > worst[0]:
            worst = (weight, ObjectKey(namespace, key), holder, until)
    if worst is not None:
        _, object_key, holder, until = worst
        free_in = None if until is None else (until - entry.now) / SECOND
        raise locked(object_key, free_in, holder)


def _note_upload(entry: Entry, arguments: Arguments, _: Any) -> None:
    _row(entry, arguments)
    entry.db.execute(
        "UPDATE intents SET upload_id = ? WHERE transaction_id = ? AND seq = ?",
        (arguments["upload"], arguments["id"], arguments["seq"]),
    )


def _commit(entry: Entry, arguments: Arguments, reads: Any) -> None:
    db = entry.db
    if _row(entry, arguments) is not None:
        raise lost(arguments["id"])
    if reads:
        now = records_at(db, list(reads))
        changed = [key for key, record in reads.items() if now.get(key) != record]
        if changed:
            raise conflict(changed)
    _put_records(db, arguments["records"])
    db.executemany("DELETE FROM records WHERE namespace = ? AND key = ?", arguments["removed"])
    _decide(entry, arguments["id"], Outcome.COMMITTED)
    drop_compensations(entry, arguments["id"])
    put_jobs(entry, arguments["jobs"])
    _add_late_writes(entry, arguments["late"])
    if arguments["steps"] == "[]":
        _drop(entry, arguments["id"])
        return
    db.execute(
        "UPDATE transactions SET outcome = ?, steps = ? WHERE transaction_id = ?",
        (Outcome.COMMITTED.value, arguments["steps"], arguments["id"]),
    )


def _put_records(db: sqlite3.Connection, rows: list[Row]) -> None:
    db.executemany(
        "INSERT INTO records VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
        "transaction_id = excluded.transaction_id, seq = excluded.seq, body = excluded.body",
        rows,
    )


def _decide(entry: Entry, transaction_id: str, outcome: Outcome) -> None:
    entry.db.execute(
        "INSERT INTO outcomes VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
        "SET outcome = excluded.outcome, forget_at = excluded.forget_at",
        (transaction_id, outcome.value, entry.now + entry.late),
    )


def _add_late_writes(entry: Entry, rows: list[Row]) -> None:
    entry.db.executemany(
        "INSERT INTO late_writes VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
        "SET due_at = excluded.due_at",
        [(*row, entry.now + entry.late) for row in rows],
    )


def _drop(entry: Entry, transaction_id: str) -> None:
    """Remove the rows of a transaction; its outcome is kept for a while (P5)."""
    db = entry.db
    db.execute(
        "UPDATE outcomes SET forget_at = ? WHERE transaction_id = ?",
        (entry.now + entry.late, transaction_id),
    )
    db.execute(
        "DELETE FROM locks WHERE transaction_id = ? AND kept_until IS NULL", (transaction_id,)
    )
    for table in ("intents", "transactions"):
        db.execute(f"DELETE FROM {table} WHERE transaction_id = ?", (transaction_id,))


def _abort(entry: Entry, arguments: Arguments, _: Any) -> Decision:
    db, transaction_id = entry.db, arguments["id"]
    row = _find(entry, arguments)
    if row is None:
        decided = db.execute(
            "SELECT outcome FROM outcomes WHERE transaction_id = ?", (transaction_id,)
        ).fetchone()
        if decided is None:
            # It has no rows; deciding it anyway ensures that it never gets any.
            _decide(entry, transaction_id, Outcome.ABORTED)
            return Decision(outcome=Outcome.ABORTED, finished=True)
        return Decision(outcome=Outcome(decided[0]), finished=True)
    outcome, steps = row
    if outcome is None:
        outcome = Outcome.ABORTED.value
        _decide(entry, transaction_id, Outcome.ABORTED)
        db.execute(
            "UPDATE transactions SET outcome = ? WHERE transaction_id = ?",
            (outcome, transaction_id),
        )
    held = db.execute(
        "SELECT namespace, key FROM locks WHERE transaction_id = ? AND kept_until IS NULL",
        (transaction_id,),
    ).fetchall()
    return Decision(
        outcome=Outcome(outcome),
        keys=frozenset(ObjectKey(*key) for key in held),
        steps=load_steps(steps),
    )


def _relocate(entry: Entry, arguments: Arguments, _: Any) -> None:
    _row(entry, arguments)
    entry.db.executemany(
        "UPDATE records SET body = ? WHERE namespace = ? AND key = ? AND transaction_id = ? "
        "AND seq = ? AND body <> ?",
        [(body, *key, body) for *key, body in arguments["records"]],
    )


def _settle(entry: Entry, arguments: Arguments, _: Any) -> None:
    db, transaction_id = entry.db, arguments["id"]
    if _find(entry, arguments) is None:
        return
    db.executemany(
        "DELETE FROM late_writes WHERE namespace = ? AND key = ? AND transaction_id = ? "
        "AND seq = ?",
        arguments["checked"],
    )
    _add_late_writes(entry, arguments["late"])
    # A lock is retained only if it is released now for the first time.
    released = arguments["keys"]
    among = None if released is None else {tuple(key) for key in released}
    kept = [key for key in arguments["keep"] if among is None or tuple(key) in among]
    db.executemany(
        "UPDATE locks SET kept_until = ? WHERE namespace = ? AND key = ? AND transaction_id = ? "
        "AND kept_until IS NULL",
        [(entry.now + entry.late, *key, transaction_id) for key in kept],
    )
    if released is None:
        _drop(entry, transaction_id)
        return
    db.executemany(
        "DELETE FROM locks WHERE transaction_id = ? AND namespace = ? AND key = ? "
        "AND kept_until IS NULL",
        [(transaction_id, *key) for key in released],
    )
    intents = db.execute(
        "SELECT seq, namespace, key FROM intents WHERE transaction_id = ? ORDER BY seq",
        (transaction_id,),
    ).fetchall()
    db.executemany(
        "DELETE FROM intents WHERE transaction_id = ? AND seq = ?",
        [(transaction_id, seq) for seq, *key in intents if among and tuple(key) in among],
    )


def _heartbeat(entry: Entry, arguments: Arguments, _: Any) -> list[TransactionToken]:
    kept: list[TransactionToken] = []
    for transaction_id, token in arguments["tokens"]:
        renewed = entry.db.execute(
            "UPDATE transactions SET lease_until = ? WHERE transaction_id = ? AND token = ?",
            (entry.now + entry.lease, transaction_id, token),
        )
        if renewed.rowcount:
            kept.append(TransactionToken(transaction_id, token))
    return kept


def _claim(entry: Entry, arguments: Arguments, _: Any) -> list[str]:
    expired = entry.db.execute(
        "SELECT transaction_id FROM transactions WHERE lease_until <= ? "
        "ORDER BY lease_until, transaction_id LIMIT ?",
        (entry.now, arguments["limit"]),
    ).fetchall()
    entry.db.executemany(
        "UPDATE transactions SET token = token + 1, lease_until = ?, process = ? "
        "WHERE transaction_id = ?",
        [(entry.now + entry.lease, arguments["by"], *each) for each in expired],
    )
    return [str(each[0]) for each in expired]


def _hold(entry: Entry, arguments: Arguments, _: Any) -> None:
    if _row(entry, arguments) is not None:
        raise lost(arguments["id"])
    until = entry.now + arguments["seconds"]
    entry.db.execute(
        "UPDATE transactions SET held = ?, held_until = ?, lease_until = ? WHERE transaction_id = ?",
        (arguments["commit"], until, until, arguments["id"]),
    )


def _take_held(entry: Entry, arguments: Arguments, _: Any) -> int | None:
    """Return the new token of a transaction that is held; None if it is not."""
    taken = entry.db.execute(
        "UPDATE transactions SET token = token + 1, lease_until = ?, process = ? "
        "WHERE transaction_id = ? AND outcome IS NULL AND held_until > ? RETURNING token",
        (entry.now + entry.lease, arguments["by"], arguments["id"], entry.now),
    ).fetchall()
    return next((int(row[0]) for row in taken), None)


def _fill(entry: Entry, arguments: Arguments, _: Any) -> bool:
    db, (namespace, prefix) = entry.db, arguments["area"]
    if arguments["begins"]:
        stop = after_prefix(prefix)
        bounded = "" if stop is None else "AND key < :stop"
        taken = db.execute(
            f"SELECT 1 FROM records WHERE namespace = :namespace AND key >= :start {bounded} LIMIT 1",
            {"namespace": namespace, "start": prefix, "stop": stop},
        ).fetchall()
        if not taken:
            db.execute(
                "INSERT INTO fills VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (namespace, prefix, arguments["id"]),
            )
    if not _fills(entry, arguments):
        return False
    _put_records(db, arguments["records"])
    db.executemany(
        "DELETE FROM records WHERE namespace = ? AND key = ?",
        [(arguments["hidden"], key) for key in arguments["removed"]],
    )
    return True


def _end_fill(entry: Entry, arguments: Arguments, _: Any) -> None:
    if not _fills(entry, arguments):
        return
    db, (namespace, prefix) = entry.db, arguments["area"]
    db.execute("DELETE FROM fills WHERE namespace = ? AND prefix = ?", (namespace, prefix))
    db.execute(
        "INSERT INTO records SELECT ?, key, transaction_id, seq, body FROM records "
        "WHERE namespace = ? ORDER BY key ON CONFLICT DO NOTHING",
        (namespace, arguments["hidden"]),
    )
    db.execute("DELETE FROM records WHERE namespace = ?", (arguments["hidden"],))


def _fills(entry: Entry, arguments: Arguments) -> bool:
    """Return whether this fill of its area is in progress, and no other."""
    found = entry.db.execute(
        "SELECT 1 FROM fills WHERE namespace = ? AND prefix = ? AND fill_id = ?",
        (*arguments["area"], arguments["id"]),
    )
    return bool(found.fetchall())


COMMANDS: Mapping[str, Callable[[Entry, Any, Any], Any]] = {
    "found": _found,
    "keep_ticket_key": _keep_ticket_key,
    "note": _note,
    "fill": _fill,
    "end_fill": _end_fill,
    "begin_writes": _stage,
    "note_upload": _note_upload,
    "commit": _commit,
    "abort": _abort,
    "relocate": _relocate,
    "settle": _settle,
    "heartbeat": _heartbeat,
    "claim": _claim,
    "hold": _hold,
    "take_held": _take_held,
    **JOB_COMMANDS,
}
"""The commands by name. Their effect on the state is part of the format: a different effect needs
another name, or another version of the format."""
