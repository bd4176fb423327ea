"""The local copy of the catalog's state, in SQLite.

Only the commands of the log (`commands`) change its tables, so the state after a position is the
same in every process. Triggers keep a digest of all rows (L12).

All methods run in one thread. `writing` and `reading` are two connections: entries that are being
sent are applied in a transaction that is still open, while reads see what is committed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fennflow_bucket.rows import Row, dumps

SCHEMA_VERSION = 3
"""The version of the local file, which is created again from the bucket if it has another one."""

TABLES: dict[str, tuple[str, ...]] = {
    "meta": ("name", "value"),
    "notes": ("name", "value", "noted_at"),
    "records": ("namespace", "key", "transaction_id", "seq", "body"),
    "fills": ("namespace", "prefix", "fill_id"),
    "transactions": (
        "transaction_id",
        "token",
        "began_at",
        "lease_until",
        "outcome",
        "steps",
        "held",
        "held_until",
        "process",
    ),
    "outcomes": ("transaction_id", "outcome", "forget_at"),
    "intents": (
        "transaction_id",
        "seq",
        "namespace",
        "key",
        "placement",
        "target",
        "upload_id",
    ),
    "locks": ("namespace", "key", "transaction_id", "kept_until"),
    "late_writes": ("namespace", "key", "transaction_id", "seq", "due_at"),
    "jobs": (
        "transaction_id",
        "number",
        "position",
        "name",
        "arguments",
        "after",
        "order_key",
        "attempts",
        "due_at",
        "lease_until",
        "error",
    ),
    "writers": ("writer", "seq", "seen_at"),
}
"""The tables of the state and their columns, which a snapshot contains."""

_KEYS = {
    "meta": "name",
    "notes": "name",
    "records": "namespace, key",
    "fills": "namespace, prefix",
    "transactions": "transaction_id",
    "outcomes": "transaction_id",
    "intents": "transaction_id, seq",
    "locks": "namespace, key",
    "late_writes": "namespace, key, transaction_id, seq",
    "jobs": "transaction_id, number",
    "writers": "writer",
}
_INTEGERS = {
    "seq",
    "token",
    "noted_at",
    "began_at",
    "lease_until",
    "held_until",
    "number",
    "position",
    "attempts",
    "forget_at",
    "kept_until",
    "due_at",
    "seen_at",
}
_INDEXES = (
    "CREATE INDEX transactions_lease ON transactions (lease_until, transaction_id)",
    "CREATE INDEX outcomes_forget ON outcomes (forget_at)",
    "CREATE INDEX locks_transaction ON locks (transaction_id)",
    "CREATE INDEX locks_kept ON locks (kept_until) WHERE kept_until IS NOT NULL",
    "CREATE INDEX late_writes_due ON late_writes (due_at)",
    "CREATE INDEX jobs_position ON jobs (position)",
    "CREATE INDEX jobs_order ON jobs (order_key, position)",
    "CREATE INDEX writers_seen ON writers (seen_at)",
)
DIGEST_BYTES = 16
_MODULUS = 1 << (8 * DIGEST_BYTES)


def row_digest(line: str) -> int:
    """Return the digest of one row, written as a line of JSON: the table's name and the values."""
    return int.from_bytes(blake2b(line.encode(), digest_size=DIGEST_BYTES).digest(), "big")


@dataclass(frozen=True, slots=True)
class Position:
    """The position of the state in the log.

    Args:
        number: of the last entry that was applied; -1 before the first.
        digest: the digest of all rows.
        time: the time of the last entry, in microseconds since the epoch.
        last: the digest of that entry's bytes, which identifies the log.
        snapshot: position of the newest snapshot that is known; -1 for none.
        snapshot_bytes: its size.
        log_bytes: the size of the entries after it.
    """

    number: int = -1
    digest: int = 0
    time: int = 0
    last: str = ""
    snapshot: int = -1
    snapshot_bytes: int = 0
    log_bytes: int = 0


_POSITION = ("number", "digest", "time", "last", "snapshot", "snapshot_bytes", "log_bytes")


_SELECT_POSITION = f"SELECT {', '.join(_POSITION)} FROM position"


def _position_of(row: Iterable[Any]) -> Position:
    values: dict[str, Any] = dict(zip(_POSITION, row, strict=True))
    values["digest"] = int(values["digest"], 16)
    return Position(**values)


@dataclass(frozen=True, slots=True)
class Frozen:
    """The state at one moment, to be written as a snapshot.

    Args:
        connection: inside a transaction that sees this moment.
        position: the position of the state.
    """

    connection: sqlite3.Connection
    position: Position

    def lines(self, at_once: int) -> Iterator[list[str]]:
        """Return all rows as lines of JSON, in an order that depends only on the rows.

        Args:
            at_once: how many rows are held in memory.
        """
        for table, columns in TABLES.items():
            found = self.connection.execute(
                f"SELECT {', '.join(columns)} FROM {table} ORDER BY {_KEYS[table]}"
            )
            while rows := found.fetchmany(at_once):
                yield [dumps([table, *row]) for row in rows]

    def close(self) -> None:
        """End the transaction that sees this moment."""
        self.connection.close()


class State:
    """The tables and their position in the log.

    Args:
        path: of the file, which is created.
        kept: whether it outlives the process, so it has to survive a crash.
    """

    def __init__(self, path: Path, *, kept: bool) -> None:
        self.writing = self._connect(path, kept=kept)
        try:
            self.reading = self._connect(path, kept=kept)
        except BaseException:
            self.writing.close()
            raise
        self._path = path
        self._digest = 0
        self.position = Position()
        try:
            self.position = self._prepare()
        except BaseException:
            self.close()
            raise
        self._digest = self.position.digest

    def _connect(self, path: Path, *, kept: bool) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # Lost data are read from the bucket again, but a kept file must not be corrupted.
            connection.execute(f"PRAGMA synchronous = {'NORMAL' if kept else 'OFF'}")
            connection.execute("PRAGMA cache_size = -16384")
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.create_function("fennflow_digest", -1, self._fold)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self) -> Position:
        """Create the tables unless the file has them, and return its position."""
        version = self.writing.execute("PRAGMA user_version").fetchone()[0]
        if version == SCHEMA_VERSION:
            return _position_of(self.writing.execute(_SELECT_POSITION).fetchall()[0])
        if version or self.writing.execute("SELECT 1 FROM sqlite_schema").fetchone():
            message = f"{self._path} has the version {version}, not {SCHEMA_VERSION}"
            raise sqlite3.DatabaseError(message)
        self.begin()
        try:
            for table, columns in TABLES.items():
                typed = ", ".join(f"{c} {'INTEGER' if c in _INTEGERS else 'TEXT'}" for c in columns)
                key = _KEYS[table]
                self.writing.execute(
                    f"CREATE TABLE {table} ({typed}, PRIMARY KEY ({key})) WITHOUT ROWID"
                )
            for index in _INDEXES:
                self.writing.execute(index)
            self._create_triggers()
            self.writing.execute(f"CREATE TABLE position ({', '.join(_POSITION)})")
            self.writing.execute("INSERT INTO position VALUES (-1, '0', 0, '', -1, 0, 0)")
            self.writing.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            self.rollback()
            raise
        self.writing.execute("COMMIT")
        return Position()

    def _create_triggers(self) -> None:
        for table, columns in TABLES.items():
            added = f"fennflow_digest(1, '{table}', {', '.join(f'NEW.{c}' for c in columns)})"
            taken = f"fennflow_digest(-1, '{table}', {', '.join(f'OLD.{c}' for c in columns)})"
            for event, calls in (
                ("INSERT", added),
                ("DELETE", taken),
                ("UPDATE", f"{taken}, {added}"),
            ):
                self.writing.execute(
                    f"CREATE TRIGGER {table}_{event} AFTER {event} ON {table} "
                    f"BEGIN SELECT {calls}; END"
                )

    def _fold(self, sign: int, *values: Any) -> None:
        self._digest = (self._digest + sign * row_digest(dumps(values))) % _MODULUS

    def close(self) -> None:
        """Close the connections."""
        self.reading.close()
        self.writing.close()

    # --- transactions ------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a transaction on `writing`."""
        self.writing.execute("BEGIN IMMEDIATE")

    def rollback(self) -> None:
        """Roll it back."""
        self.writing.execute("ROLLBACK")
        self._digest = self.position.digest

    def commit(self, position: Position) -> None:
        """Commit it together with a new position."""
        values = (
            position.number,
            f"{position.digest:x}",
            position.time,
            position.last,
            position.snapshot,
            position.snapshot_bytes,
            position.log_bytes,
        )
        assignments = ", ".join(f"{name} = ?" for name in _POSITION)
        self.writing.execute(f"UPDATE position SET {assignments}", values)
        self.writing.execute("COMMIT")
        self.position = position
        self._digest = position.digest

    @contextmanager
    def savepoint(self) -> Generator[None]:
        """Undo only the block if it raises."""
        digest = self._digest
        self.writing.execute("SAVEPOINT command")
        try:
            yield
        except BaseException:
            self.writing.execute("ROLLBACK TO command")
            self.writing.execute("RELEASE command")
            self._digest = digest
            raise
        self.writing.execute("RELEASE command")

    @property
    def digest(self) -> int:
        """The digest of all rows, including those of the open transaction."""
        return self._digest

    # --- snapshots ---------------------------------------------------------------------------

    def frozen(self) -> Frozen:
        """Return the state as it is now, whatever is applied meanwhile."""
        connection = self._connect(self._path, kept=False)
        connection.execute("BEGIN")
        row = connection.execute(_SELECT_POSITION).fetchall()[0]
        return Frozen(connection, _position_of(row))

    def clear(self) -> None:
        """Remove all rows, in a transaction that `fill` follows."""
        for table in TABLES:
            for event in ("INSERT", "DELETE", "UPDATE"):
                self.writing.execute(f"DROP TRIGGER IF EXISTS {table}_{event}")
            self.writing.execute(f"DELETE FROM {table}")
        self._digest = 0

    def fill(self, rows: Sequence[tuple[str, Row]]) -> None:
        """Insert rows of a snapshot.

        Args:
            rows: for each row the line and its values, with the table's name first.
        """
        start = 0
        for index in range(1, len(rows) + 1):
            table = rows[start][1][0]
            if index < len(rows) and rows[index][1][0] == table:
                continue
            marks = ", ".join("?" * len(TABLES[table]))
            self.writing.executemany(
                f"INSERT INTO {table} VALUES ({marks})",
                [row[1:] for _, row in rows[start:index]],
            )
            start = index
        added = sum(row_digest(line) for line, _ in rows)
        self._digest = (self._digest + added) % _MODULUS

    def filled(self) -> None:
        """Create the triggers again, which keep the digest up to date."""
        self._create_triggers()

    # --- queries of the replica --------------------------------------------------------------

    def writer_seq(self, writer: str) -> int | None:
        """Return the number of a writer's last entry; None if it has none."""
        rows = self.reading.execute("SELECT seq FROM writers WHERE writer = ?", (writer,))
        return next((int(row[0]) for row in rows.fetchall()), None)

    def meta(self, name: str) -> str | None:
        """Return a fixed value of the catalog, its `catalog_id` or its `ticket_key`, if it has one."""
        rows = self.reading.execute("SELECT value FROM meta WHERE name = ?", (name,))
        return next((str(row[0]) for row in rows.fetchall()), None)
