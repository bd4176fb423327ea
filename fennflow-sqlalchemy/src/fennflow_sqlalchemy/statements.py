"""The statements, built once per backend; each works on any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Delete,
    Double,
    FromClause,
    Integer,
    Select,
    Table,
    Text,
    Update,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    false,
    func,
    literal,
    null,
    or_,
    select,
    true,
    tuple_,
    update,
)

from fennflow.backends.values import ATTEMPTS_IN_ORDER

if TYPE_CHECKING:
    from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate

    from fennflow_sqlalchemy.database import Database
    from fennflow_sqlalchemy.tables import Tables

DAY = 86400.0
TIME_DIGITS = 10
"""The number of digits of seconds since the epoch, until the year 2286."""


IDENTITY = ("namespace", "key", "transaction_id", "seq")


class CatalogStatements:
    """The statements of records and outcomes.

    Args:
        tables: the tables.
        catalog: their database.
        late_write_period: seconds for which an outcome at least outlives its transaction.
    """

    def __init__(self, tables: Tables, catalog: Database, *, late_write_period: float) -> None:
        records, outcomes = tables.records, tables.outcomes
        transaction_id = bindparam("transaction", type_=Text())
        rows, same = _keys_in(catalog, records)
        self.records = select(records).join(rows, same)
        self.scan = {
            (after, bounded): _scan(records, after=after, bounded=bounded)
            for after in (False, True)
            for bounded in (False, True)
        }
        self.scan_names = {
            (after, bounded): _scan_names(catalog, records, after=after, bounded=bounded)
            for after in (False, True)
            for bounded in (False, True)
        }
        self.upsert_records = _upsert(catalog, records, list(records.columns))
        self.remove_records = _delete_rows(catalog, records, ("namespace", "key"))
        moved = [
            records.c.namespace,
            records.c.key,
            records.c.location_key,
            records.c.version_id,
            records.c.etag,
            records.c.transaction_id,
            records.c.seq,
        ]
        rows = catalog.rows("rows", moved)
        self.relocate = (
            update(records)
            .where(*(records.c[name] == rows.c[name] for name in IDENTITY))
            .values({name: rows.c[name] for name in ("location_key", "version_id", "etag")})
        )
        decision = select(
            transaction_id,
            bindparam("decided", type_=Text()),
            bindparam("apply", type_=Text()),
            catalog.now(),
        )
        self.decide = (
            catalog.insert(outcomes)
            .from_select(
                ["transaction_id", "outcome", "steps", "decided_at"], decision.where(true())
            )
            .on_conflict_do_nothing()
            .returning(outcomes.c.transaction_id)
        )
        self.outcome = select(outcomes.c.outcome, outcomes.c.steps).where(
            outcomes.c.transaction_id == transaction_id
        )
        rows, same = _keys_in(catalog, records)
        # A transaction that is about to change a record has locked it: skip it instead of waiting.
        self.hold_records = (
            select(records)
            .join(rows, same)
            .with_for_update(read=True, of=records, skip_locked=True)
        )
        rows = catalog.rows("rows", [outcomes.c.transaction_id])
        self.outcomes = select(outcomes.c.transaction_id, outcomes.c.outcome).join(
            rows, outcomes.c.transaction_id == rows.c.transaction_id
        )
        self.old_outcomes = (
            select(outcomes.c.transaction_id)
            .where(
                outcomes.c.settled_at.is_(None),
                outcomes.c.decided_at < catalog.now() - late_write_period,
                outcomes.c.transaction_id > bindparam("after", type_=Text()),
            )
            .order_by(outcomes.c.transaction_id)
            .limit(1000)
        )
        rows = catalog.rows("rows", [outcomes.c.transaction_id])
        self.settle_outcomes = (
            update(outcomes)
            .where(outcomes.c.transaction_id == rows.c.transaction_id)
            .values(settled_at=catalog.now())
        )
        self.purge_outcomes = delete(outcomes).where(
            outcomes.c.settled_at < catalog.now() - late_write_period
        )
        rows = catalog.rows("rows", [records.c.transaction_id])
        self.staged_transactions = (
            select(records.c.transaction_id)
            .join(rows, records.c.transaction_id == rows.c.transaction_id)
            .where(records.c.location_key != records.c.key)
            .distinct()
        )


class TransactionStatements:
    """The statements of transactions, intents and locks.

    Args:
        tables: the tables.
        journal: their database.
        single_database: whether it is also the catalog's.
        lease_ttl: seconds that a lease lasts.
        late_write_period: seconds for which retained locks are kept.
    """

    def __init__(
        self,
        tables: Tables,
        journal: Database,
        *,
        single_database: bool,
        lease_ttl: float,
        late_write_period: float,
    ) -> None:
        now = journal.now()
        outcomes, transactions = tables.outcomes, tables.transactions
        intents, locks = tables.intents, tables.locks
        transaction_id = bindparam("transaction", type_=Text())
        fence, process = bindparam("held", type_=Integer()), bindparam("by", type_=Text())
        # If they are in another file, the backend reads the outcomes itself.
        decided = exists().where(outcomes.c.transaction_id == transaction_id)
        undecided = ~decided if single_database else true()
        begun = select(transaction_id, literal(0), process, now, now + lease_ttl).where(
            fence == 0, undecided
        )
        opened = journal.insert(transactions).from_select(
            ["transaction_id", "fence", "process", "began_at", "lease_until"], begun
        )
        self.open_transaction = opened.on_conflict_do_update(
            index_elements=["transaction_id"],
            set_={"lease_until": opened.excluded.lease_until},
            where=transactions.c.fence == fence,
        ).returning(transactions.c.transaction_id)
        self.renew = (
            update(transactions)
            .where(
                transactions.c.transaction_id == transaction_id,
                transactions.c.fence == fence,
                undecided,
            )
            .values(lease_until=now + lease_ttl)
            .returning(transactions.c.transaction_id)
        )
        self.lock = _lock(journal, locks, transaction_id, true())
        # On PostgreSQL, where each statement is a round trip, one statement does both.
        self.open_and_lock, self.renew_and_lock = (
            _lock_after(journal, locks, transaction_id, begun)
            for begun in (self.open_transaction, self.renew)
        )
        rows, same = _keys_in(journal, locks)
        self.holders = (
            select(
                locks.c.namespace,
                locks.c.key,
                locks.c.transaction_id,
                (locks.c.kept_until - now).label("free_in"),
            )
            .join(rows, same)
            .where(
                locks.c.transaction_id != transaction_id,
                or_(locks.c.kept_until.is_(None), locks.c.kept_until > now),
            )
            # The caller waits for the key that stays locked longest.
            .order_by(locks.c.kept_until.is_(None), locks.c.kept_until.desc())
            .limit(1)
        )
        rows, same = _keys_in(journal, locks)
        self.written_by_others = (
            select(locks.c.namespace, locks.c.key)
            .join(rows, same)
            .where(locks.c.transaction_id != transaction_id, locks.c.kept_until.is_(None))
        )
        self.write_intents = _upsert(journal, intents, list(intents.columns))
        self.note_upload = (
            update(intents)
            .where(intents.c.transaction_id == transaction_id, intents.c.seq == bindparam("number"))
            .values(upload_id=bindparam("upload"))
        )
        self.fence = select(transactions.c.fence).where(
            transactions.c.transaction_id == transaction_id
        )
        self.hold_fence = self.fence.with_for_update() if single_database else self.fence
        self.drop_transaction = (
            delete(transactions)
            .where(transactions.c.transaction_id == transaction_id, transactions.c.fence == fence)
            .returning(transactions.c.transaction_id)
        )
        self.drop_intents = delete(intents).where(intents.c.transaction_id == transaction_id)
        # An upsert finds each lock by its key. An update with a join may compare all rows with all
        # keys.
        rows = journal.rows("rows", [locks.c.namespace, locks.c.key])
        kept = journal.insert(locks).from_select(
            ["namespace", "key", "transaction_id", "kept_until"],
            select(rows.c.namespace, rows.c.key, transaction_id, now + late_write_period).where(
                true()
            ),
        )
        self.keep_locks = kept.on_conflict_do_update(
            index_elements=["namespace", "key"],
            set_={"kept_until": kept.excluded.kept_until},
            where=locks.c.transaction_id == kept.excluded.transaction_id,
        )
        self.drop_locks = delete(locks).where(
            locks.c.transaction_id == transaction_id, locks.c.kept_until.is_(None)
        )
        # On PostgreSQL one statement removes all rows. It locks the transaction's row first.
        dropped = self.drop_transaction.cte("dropped")
        is_dropped = exists(select(dropped.c.transaction_id))
        self.drop = select(dropped.c.transaction_id).add_cte(
            self.drop_locks.where(is_dropped).cte("dropped_locks"),
            self.drop_intents.where(is_dropped).cte("dropped_intents"),
        )
        self.drop_kept_locks = delete(locks).where(locks.c.kept_until <= now)
        self.held = select(locks.c.namespace, locks.c.key).where(
            locks.c.transaction_id == transaction_id, locks.c.kept_until.is_(None)
        )
        self.release_locks = delete(locks).where(
            locks.c.transaction_id == transaction_id,
            locks.c.kept_until.is_(None),
            _among_rows(journal, locks),
        )
        self.release_intents = delete(intents).where(
            intents.c.transaction_id == transaction_id, _among_rows(journal, intents)
        )
        columns = (
            transactions.c.transaction_id,
            transactions.c.fence,
            (now - transactions.c.began_at).label("age"),
            (transactions.c.lease_until - now).label("lease_left"),
            transactions.c.held_commit,
            (transactions.c.held_until - now).label("held_left"),
            transactions.c.process,
        )
        own = and_(
            transactions.c.transaction_id == transaction_id,
            transactions.c.fence == fence,
            undecided,
        )
        until = now + bindparam("seconds", type_=Double[float]())
        self.hold = (
            update(transactions)
            .where(own)
            .values(
                held_commit=bindparam("commit", type_=Text()), held_until=until, lease_until=until
            )
            .returning(transactions.c.transaction_id)
        )
        self.take_held = (
            update(transactions)
            .where(
                transactions.c.transaction_id == transaction_id,
                transactions.c.held_until > now,
                undecided,
            )
            .values(fence=transactions.c.fence + 1, process=process, lease_until=now + lease_ttl)
            .returning(*columns)
        )
        self.beat = _beat(journal, transactions, now + lease_ttl, single_database=single_database)
        expired = (
            select(transactions.c.transaction_id)
            .where(transactions.c.lease_until <= now)
            .order_by(transactions.c.lease_until)
            .limit(bindparam("limit", type_=Integer()))
        )
        if single_database:
            expired = expired.with_for_update(skip_locked=True)
        chosen = expired.cte("expired")
        self.claim = (
            update(transactions)
            .where(transactions.c.transaction_id.in_(select(chosen.c.transaction_id)))
            .values(fence=transactions.c.fence + 1, process=process, lease_until=now + lease_ttl)
            .returning(*columns)
        )
        self.transactions = (
            select(*columns)
            .where(transactions.c.transaction_id > bindparam("after", type_=Text()))
            .order_by(transactions.c.transaction_id)
            .limit(bindparam("limit", type_=Integer()))
        )
        rows = journal.rows("rows", [intents.c.transaction_id])
        self.intents = (
            select(intents)
            .join(rows, intents.c.transaction_id == rows.c.transaction_id)
            .order_by(intents.c.transaction_id, intents.c.seq)
        )
        rows = journal.rows("rows", [transactions.c.transaction_id])
        self.known = select(transactions.c.transaction_id).join(
            rows, transactions.c.transaction_id == rows.c.transaction_id
        )


class LateWriteStatements:
    """The statements of late writes.

    Args:
        tables: the tables.
        journal: their database.
        late_write_period: seconds after which they are due.
    """

    def __init__(self, tables: Tables, journal: Database, *, late_write_period: float) -> None:
        now = journal.now()
        transactions, late_writes = tables.transactions, tables.late_writes
        identity = [late_writes.c[name] for name in IDENTITY]
        rows = journal.rows("rows", identity)
        recorded = journal.insert(late_writes).from_select(
            [*IDENTITY, "due_at"],
            select(*(rows.c[name] for name in IDENTITY), now + late_write_period).where(true()),
        )
        self.record = recorded.on_conflict_do_update(
            index_elements=list(IDENTITY), set_={"due_at": recorded.excluded.due_at}
        )
        self.clear = _delete_rows(journal, late_writes, IDENTITY)
        rows, same = _keys_in(journal, late_writes)
        self.late_writes = select(late_writes).join(rows, same)
        self.due_late_writes = (
            select(late_writes)
            .where(
                late_writes.c.due_at <= now,
                ~exists().where(transactions.c.transaction_id == late_writes.c.transaction_id),
                tuple_(*identity)
                > tuple_(*(bindparam(f"after_{c.name}", type_=c.type) for c in identity)),
            )
            .order_by(*identity)
            .limit(bindparam("limit", type_=Integer()))
        )


class NoteStatements:
    """Notes that processes share: a time and a text in one value.

    Args:
        tables: the tables.
        journal: their database.
    """

    def __init__(self, tables: Tables, journal: Database) -> None:
        meta, now = tables.journal_meta, journal.now()
        name = bindparam("noted", type_=Text())
        written = cast(func.substr(meta.c.value, 1, TIME_DIGITS), BigInteger)
        self.note = select(meta.c.value).where(meta.c.name == name)
        self.recall = self.note.where(written > now - DAY)
        value = cast(cast(now, BigInteger), Text) + " " + bindparam("text", type_=Text())
        noted = journal.insert(meta).from_select(
            ["name", "value"], select(name, value).where(true())
        )
        self.remember = noted.on_conflict_do_update(
            index_elements=["name"], set_={"value": noted.excluded.value}
        )
        self.ticket_key = select(meta.c.value).where(meta.c.name == "ticket_key")
        key = {"name": "ticket_key", "value": bindparam("text", type_=Text())}
        self.keep_ticket_key = journal.insert(meta).values(key).on_conflict_do_nothing()


class JobStatements:
    """The statements of compensations, or of hooks.

    Args:
        table: the table.
        database: the database of the table.
        lease_ttl: seconds for which a job belongs to the process that calls it.
        in_order: whether jobs with the same key are called in order; otherwise the jobs of a
            transaction are called in reverse order.
    """

    def __init__(
        self, table: Table, database: Database, *, lease_ttl: float, in_order: bool
    ) -> None:
        now = database.now()
        names = ("transaction_id", "number", "name", "arguments", "after", "order_key")
        rows = database.rows("rows", [table.c[name] for name in names])
        added = database.insert(table).from_select(
            [*names, "attempts", "due_at", "lease_until"],
            select(
                *(rows.c[name] for name in names),
                literal(0, Integer()),
                now,
                literal(0.0, Double()),
            )
            .where(true())
            .order_by(rows.c.number),
        )
        self.add = added.on_conflict_do_update(
            index_elements=["transaction_id", "number"],
            set_={
                "after": added.excluded.after,
                # A running attempt is fenced off.
                "attempts": table.c.attempts + case((table.c.lease_until > 0, 1), else_=0),
                "due_at": added.excluded.due_at,
                "lease_until": added.excluded.lease_until,
            },
        )
        free = table.c.lease_until <= now
        due = or_(table.c.due_at <= now, bindparam("hurry", type_=Boolean()))
        other = table.alias("other")
        if in_order:
            # A later hook may have been committed first, and may be running.
            under_way = and_(other.c.position != table.c.position, other.c.lease_until > now)
            waits = and_(
                other.c.order_key == table.c.order_key,
                or_(other.c.position < table.c.position, under_way),
            )
        else:
            waits = and_(
                other.c.transaction_id == table.c.transaction_id,
                other.c.number > table.c.number,
                other.c.attempts < ATTEMPTS_IN_ORDER,
                or_(other.c.after.is_(None), table.c.after.is_not(None)),
            )
        named = database.rows("names", [table.c.name])
        only = bindparam("transaction", type_=Text())
        of_one = or_(only.is_(None), table.c.transaction_id == only)
        limit = bindparam("limit", type_=Integer())
        self.candidates = (
            select(table)
            .where(
                table.c.name.in_(select(named.c.name)),
                free,
                due,
                of_one,
                table.c.position > bindparam("after_position", type_=BigInteger()),
                ~exists().where(waits),
            )
            .order_by(table.c.position)
            .limit(limit)
        )
        # Not by position: SQLite reuses the position of a removed row.
        which = [table.c[name] for name in ("transaction_id", "number", "attempts")]
        taken = database.rows("rows", which)
        self.take = (
            update(table)
            .where(
                tuple_(*which).in_(select(*(taken.c[column.name] for column in which))),
                free,
                ~exists().where(waits),
            )
            .values(attempts=table.c.attempts + 1, lease_until=now + lease_ttl)
            .returning(table)
        )
        same = and_(
            table.c.transaction_id == only,
            table.c.number == bindparam("which", type_=Integer()),
            table.c.attempts == bindparam("attempt", type_=Integer()),
        )
        self.hold = (
            update(table)
            .where(same)
            .values(lease_until=now + lease_ttl)
            .returning(table.c.position)
        )
        self.give_back = (
            update(table)
            .where(same)
            .values(
                lease_until=0.0,
                due_at=now + bindparam("pause", type_=Double[float]()),
                error=bindparam("reason", type_=Text()),
            )
            .returning(table.c.position)
        )
        self.end = _delete_rows(database, table, ("transaction_id", "number", "attempts"))
        self.jobs = (
            select(table)
            .where(of_one, table.c.position > bindparam("after_position", type_=BigInteger()))
            .order_by(table.c.position)
            .limit(limit)
        )
        ids = database.rows("rows", [table.c.transaction_id])
        self.waited_for = (
            select(table.c.transaction_id)
            .join(ids, table.c.transaction_id == ids.c.transaction_id)
            .distinct()
        )


def _keys_in(database: Database, table: Table) -> tuple[FromClause, ColumnElement[bool]]:
    """Return the rows of a parameter with keys, and the condition that joins a table with them."""
    rows = database.rows("rows", [table.c.namespace, table.c.key])
    return rows, and_(table.c.namespace == rows.c.namespace, table.c.key == rows.c.key)


def _among_rows(database: Database, table: Table) -> ColumnElement[bool]:
    """Return a condition on few rows of a table: that a parameter has their keys.

    `CASE` keeps PostgreSQL from joining the two: its statistics do not include rows that the
    transaction has just written, so it would compare each row with each key. With `IS TRUE` SQLite
    would compare them, to distinguish false from null.
    """
    key = table.c.namespace, table.c.key
    rows = database.rows("rows", key)
    among = tuple_(*key).in_(select(rows.c.namespace, rows.c.key))
    return case((among, true()), else_=false())


def _upsert(database: Database, table: Table, columns: Sequence[Column[Any]]) -> Any:
    """Return an insert of rows that replaces those with their primary keys."""
    rows = database.rows("rows", columns)
    names = [column.name for column in columns]
    inserted = database.insert(table).from_select(
        names, select(*(rows.c[name] for name in names)).where(true())
    )
    primary = {column.name for column in table.primary_key}
    return inserted.on_conflict_do_update(
        index_elements=sorted(primary),
        set_={name: inserted.excluded[name] for name in names if name not in primary},
    )


def _beat(
    database: Database, transactions: Table, until: ColumnElement[float], *, single_database: bool
) -> Update:
    """Return the statement that renews leases; it skips rows that others have locked (P22)."""
    rows = database.rows("rows", [transactions.c.transaction_id, transactions.c.fence])
    held = select(transactions.c.transaction_id).join(
        rows,
        and_(
            transactions.c.transaction_id == rows.c.transaction_id,
            transactions.c.fence == rows.c.fence,
        ),
    )
    if single_database:
        held = held.with_for_update(of=transactions, skip_locked=True)
    chosen = held.cte("held")
    return (
        update(transactions)
        .where(transactions.c.transaction_id.in_(select(chosen.c.transaction_id)))
        .values(lease_until=until)
        .returning(transactions.c.transaction_id, transactions.c.fence)
    )


def _lock(
    database: Database,
    locks: Table,
    transaction_id: ColumnElement[str],
    condition: ColumnElement[bool],
) -> ReturningInsert[Any]:
    """Return a statement that locks keys of a parameter on a condition, and returns them."""
    now = database.now()
    rows = database.rows("rows", [locks.c.namespace, locks.c.key])
    wanted = (
        select(rows.c.namespace, rows.c.key, transaction_id)
        .where(condition)
        .order_by(rows.c.namespace, rows.c.key)
    )
    locked = database.insert(locks).from_select(["namespace", "key", "transaction_id"], wanted)
    return locked.on_conflict_do_update(
        index_elements=["namespace", "key"],
        set_={"transaction_id": locked.excluded.transaction_id, "kept_until": null()},
        where=or_(
            locks.c.transaction_id == locked.excluded.transaction_id, locks.c.kept_until <= now
        ),
    ).returning(locks.c.key)


def _lock_after(
    database: Database,
    locks: Table,
    transaction_id: ColumnElement[str],
    begun: ReturningInsert[Any] | ReturningUpdate[Any],
) -> Any:
    """Return a statement that begins a transaction and locks its keys, and counts both."""
    opened = begun.cte("opened")
    locked = _lock(database, locks, transaction_id, exists(select(opened.c.transaction_id))).cte(
        "locked"
    )
    return select(
        *(
            select(func.count()).select_from(each).scalar_subquery().label(each.name)
            for each in (opened, locked)
        )
    )


def _scan(records: Table, *, after: bool, bounded: bool) -> Select[Any]:
    """Return the statement for a page of the catalog, by keyset."""
    start = bindparam("start", type_=Text())
    beyond = records.c.key > start if after else records.c.key >= start
    page = _keys(select(records), records, beyond, bounded=bounded)
    return page.limit(bindparam("limit", type_=Integer()))


def _scan_names(catalog: Database, records: Table, *, after: bool, bounded: bool) -> Select[Any]:
    """Return the statement for a page of keys, of which one represents all that are rolled up.

    It looks each of them up in the index, starting at the end of the previous one (a skip scan).
    """

    def first(beyond: ColumnElement[bool]) -> Select[Any]:
        return _keys(select(records.c.key), records, beyond, bounded=bounded).limit(1)

    start = bindparam("start", type_=Text())
    initial = first(records.c.key > start if after else records.c.key >= start)
    names = select(
        initial.scalar_subquery().label("key"), literal(1, Integer()).label("number")
    ).cte("names", recursive=True)
    place = bindparam("beyond", type_=Integer())
    rest, delimiter = func.substr(names.c.key, place), bindparam("delimiter", type_=Text())
    find = func.instr if catalog.dialect == "sqlite" else func.strpos
    found = find(rest, delimiter, type_=Integer())
    common = func.substr(names.c.key, 1, place + found - 2, type_=Text())
    following = case(
        (found > 0, common + bindparam("successor", type_=Text())),
        else_=names.c.key + bindparam("smallest", type_=Text()),
    )
    next_one = first(records.c.key >= following).correlate(names).scalar_subquery()
    limit = bindparam("limit", type_=Integer())
    names = names.union_all(
        select(next_one, names.c.number + 1).where(names.c.key.is_not(None), names.c.number < limit)
    )
    here = records.c.namespace == bindparam("namespace", type_=Text())
    each = catalog.among(records.c.key, select(names.c.key).where(names.c.key.is_not(None)))
    return select(records).where(here, each).order_by(records.c.key)


def _keys(
    rows: Select[Any], records: Table, beyond: ColumnElement[bool], *, bounded: bool
) -> Select[Any]:
    """Return a selection of records in a range of keys of a namespace, in order."""
    conditions = [records.c.namespace == bindparam("namespace", type_=Text()), beyond]
    if bounded:
        conditions.append(records.c.key < bindparam("stop", type_=Text()))
    return rows.where(*conditions).order_by(records.c.key)


def _delete_rows(database: Database, table: Table, names: Sequence[str]) -> Delete:
    columns = [table.c[name] for name in names]
    rows = database.rows("rows", columns)
    return delete(table).where(tuple_(*columns).in_(select(*(rows.c[name] for name in names))))
