"""The tables of catalog and journal, their versions and their creation.

All rows of a bulk statement are sent in one JSON parameter, so a call with a thousand files needs
as many statements as a call with one, and never exceeds the limit on parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Identity,
    Index,
    Inspector,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    select,
)

from fennflow.exceptions import ConfigException

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine

VERSION = 1
"""The version of the schema. The functions in `_MIGRATIONS` migrate older versions."""


def _bytewise() -> TypeEngine[str]:
    """Return a text type that sorts by UTF-8 bytes, like S3 listings."""
    return Text(collation="BINARY").with_variant(Text(collation="C"), "postgresql")


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one catalog and its journal.

    Args:
        meta: names and values: the schema's version, the catalog's id.
        records: the catalog.
        outcomes: how transactions were decided, one insert each (protocol P5), with the apply steps.
        journal_meta: like `meta`, in the journal's database.
        transactions: the journal: transactions that are not finished, with lease and fence.
        intents: the writes and deletions that they are about to make.
        locks: the keys that they hold, and those that stay locked for a while.
        late_writes: writes that may still arrive.
        compensations: journaled before durable steps, in the journal's database.
        hooks: written by pivots, in the catalog's database.
        commits: the feed of commits, written by pivots (protocol P38).
    """

    meta: Table
    records: Table
    outcomes: Table
    journal_meta: Table
    transactions: Table
    intents: Table
    locks: Table
    late_writes: Table
    compensations: Table
    hooks: Table
    commits: Table

    @property
    def catalog(self) -> Sequence[Table]:
        """The tables of the catalog, which are in the user's database if it is joined."""
        return self.meta, self.records, self.outcomes, self.hooks, self.commits

    @property
    def journal(self) -> Sequence[Table]:
        """The tables of the journal, which are in a separate file on SQLite."""
        return (
            self.journal_meta,
            self.transactions,
            self.intents,
            self.locks,
            self.late_writes,
            self.compensations,
        )


def make_tables(prefix: str, schema: str | None) -> tuple[MetaData, Tables]:
    """Return the tables under a prefix and in a schema."""
    metadata = MetaData(schema=schema)

    def table(name: str, *items: Any) -> Table:
        return Table(f"{prefix}{name}", metadata, *items, sqlite_with_rowid=False)

    def numbered(name: str) -> Column[int]:
        # An identity column, since the user's role may lack the right to use a sequence.
        kind = BigInteger().with_variant(Integer, "sqlite")
        return Column(name, kind, Identity(), primary_key=True)

    def jobs(name: str) -> Table:
        return Table(
            f"{prefix}{name}",
            metadata,
            numbered("position"),
            transaction(primary=False),
            Column("number", Integer, nullable=False),
            Column("name", Text, nullable=False),
            Column("arguments", Text, nullable=False),  # JSON
            Column("after", Text),
            Column("order_key", Text),
            Column("attempts", Integer, nullable=False),
            time("due_at"),
            time("lease_until"),
            Column("error", Text),
            UniqueConstraint("transaction_id", "number"),
        )

    def meta(name: str) -> Table:
        return table(
            name, Column("name", Text, primary_key=True), Column("value", Text, nullable=False)
        )

    def key(*, primary: bool) -> tuple[Column[str], Column[str]]:
        return (
            Column("namespace", _bytewise(), primary_key=primary, nullable=False),
            Column("key", _bytewise(), primary_key=primary, nullable=False),
        )

    def transaction(*, primary: bool) -> Column[str]:
        return Column("transaction_id", _bytewise(), primary_key=primary, nullable=False)

    def time(name: str, *, nullable: bool = False) -> Column[float]:
        # Seconds since the epoch by the database's clock (P22).
        return Column(name, Double, nullable=nullable)

    records = table(
        "records",
        *key(primary=True),
        Column("location_key", _bytewise(), nullable=False),
        Column("version_id", Text),
        Column("etag", Text, nullable=False),
        Column("size", BigInteger, nullable=False),
        Column("media_type", Text, nullable=False),
        Column("content_type", Text),
        Column("sha256", Text),
        Column("metadata", Text, nullable=False),  # JSON
        Column("created_at", BigInteger, nullable=False),  # microseconds since the epoch
        Column("modified_at", BigInteger, nullable=False),
        transaction(primary=False),
        Column("seq", BigInteger, nullable=False),
    )
    staged = records.c.location_key != records.c.key
    Index(
        f"{prefix}records_staged",
        records.c.transaction_id,
        sqlite_where=staged,
        postgresql_where=staged,
    )
    outcomes = table(
        "outcomes",
        transaction(primary=True),
        Column("outcome", Text, nullable=False),
        Column("steps", Text, nullable=False),  # JSON
        time("decided_at"),
        time("settled_at", nullable=True),
    )
    transactions = table(
        "transactions",
        transaction(primary=True),
        Column("fence", Integer, nullable=False),
        Column("process", Text, nullable=False),
        time("began_at"),
        time("lease_until"),
        Column("held_commit", Text),  # JSON
        time("held_until", nullable=True),
    )
    Index(f"{prefix}transactions_lease", transactions.c.lease_until)
    intents = table(
        "intents",
        transaction(primary=True),
        Column("seq", BigInteger, primary_key=True, autoincrement=False),
        *key(primary=False),
        Column("placement", Text, nullable=False),
        Column("target", Text, nullable=False),
        Column("upload_id", Text),
    )
    locks = table(
        "locks", *key(primary=True), transaction(primary=False), time("kept_until", nullable=True)
    )
    Index(f"{prefix}locks_transaction", locks.c.transaction_id)
    late_writes = table(
        "late_writes",
        *key(primary=True),
        transaction(primary=True),
        Column("seq", BigInteger, primary_key=True, autoincrement=False),
        time("due_at"),
    )
    Index(f"{prefix}late_writes_due", late_writes.c.due_at)
    hooks = jobs("hooks")
    Index(f"{prefix}hooks_order", hooks.c.order_key, hooks.c.position)
    commits = Table(
        f"{prefix}commits",
        metadata,
        numbered("number"),
        Column("position", BigInteger, unique=True),  # in the feed; null until it is known
        transaction(primary=False),
        time("committed_at"),
        Column("records", Text, nullable=False),  # JSON
        Column("removed", Text, nullable=False),  # JSON
    )
    Index(f"{prefix}commits_time", commits.c.committed_at)
    return metadata, Tables(
        meta=meta("meta"),
        records=records,
        outcomes=outcomes,
        journal_meta=meta("journal_meta"),
        transactions=transactions,
        intents=intents,
        locks=locks,
        late_writes=late_writes,
        compensations=jobs("compensations"),
        hooks=hooks,
        commits=commits,
    )


def metadata_for(table_prefix: str = "fennflow_", schema_name: str | None = None) -> MetaData:
    """Return the metadata of FennFlow's tables, for Alembic's `target_metadata`.

    Args:
        table_prefix: as in `SqlalchemyBackendConfig`.
        schema_name: as in `SqlalchemyBackendConfig`.
    """
    return make_tables(table_prefix, schema_name)[0]


metadata = metadata_for()
"""The metadata of the tables with the default prefix."""


def include_object_for(
    table_prefix: str = "fennflow_", schema_name: str | None = None
) -> Callable[..., bool]:
    """Return Alembic's `include_object` that leaves FennFlow's tables alone.

    Args:
        table_prefix: as in `SqlalchemyBackendConfig`.
        schema_name: as in `SqlalchemyBackendConfig`.
    """
    own = {table.name for table in make_tables(table_prefix, None)[0].tables.values()}

    def include_object(item: Any, name: str | None, type_: str, *_: object) -> bool:
        # Alembic reflects the tables of the default schema without one.
        return type_ != "table" or name not in own or item.schema not in {None, schema_name}

    return include_object


include_object = include_object_for()
"""Alembic's `include_object` for the default prefix."""

_MIGRATIONS: dict[int, Callable[[Connection, Sequence[Table]], None]] = {}
"""For each version the migration to the next one; called with the tables of one file."""


def catalog_id_of(connection: Connection, meta: Table) -> str | None:
    """Return the id of the catalog if its tables exist in this version; else None."""
    if not inspect(connection).has_table(meta.name, schema=meta.schema):
        return None
    rows = connection.execute(select(meta.c.name, meta.c.value))
    found: dict[str, str] = {row.name: row.value for row in rows}
    return found.get("catalog_id") if found.get("schema_version") == str(VERSION) else None


def migrate(connection: Connection, tables: Sequence[Table], *, create: bool) -> None:
    """Create or migrate tables; the caller holds the lock for that.

    Args:
        connection: a connection inside a transaction.
        tables: the tables of one file, first the one with names and values.
        create: whether tables may be created and changed; if not, they have to exist.

    Raises:
        ConfigException: something is missing and must not be created; or the tables are newer than
            this version of FennFlow.
    """
    meta = tables[0]
    inspector = inspect(connection)
    version = 0
    if inspector.has_table(meta.name, schema=meta.schema):
        found = select(meta.c.value).where(meta.c.name == "schema_version")
        version = int(connection.execute(found).scalar() or 0)
    if version > VERSION:
        message = (
            f"The tables {meta.name} … have version {version}; this fennflow-sqlalchemy supports "
            f"version {VERSION}. Upgrade it."
        )
        raise ConfigException(message)
    if version == VERSION:
        return
    if not create:
        _check_columns(inspector, tables)
    elif version == 0:
        meta.metadata.create_all(connection, tables=tables)
    else:
        for each in range(version, VERSION):
            _MIGRATIONS[each](connection, tables)
    connection.execute(meta.delete().where(meta.c.name == "schema_version"))
    connection.execute(meta.insert().values(name="schema_version", value=str(VERSION)))


def _check_columns(inspector: Inspector, tables: Sequence[Table]) -> None:
    missing: list[str] = []
    for table in tables:
        there: set[str] = set()
        if inspector.has_table(table.name, schema=table.schema):
            there = {each["name"] for each in inspector.get_columns(table.name, table.schema)}
        missing += [f"{table.name}.{each.name}" for each in table.columns if each.name not in there]
    if missing:
        message = (
            f"Missing in the database: {', '.join(missing)}. Run your migrations with "
            "fennflow_sqlalchemy.metadata, or set create_tables=True."
        )
        raise ConfigException(message)
