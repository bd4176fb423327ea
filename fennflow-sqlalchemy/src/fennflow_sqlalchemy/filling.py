"""The first reading of a bucket into the catalog, and later details of its objects."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, bindparam, delete, select, true, update
from typing_extensions import override

from fennflow.backends import Area, Fill, FillPart, ObjectKey, Record
from fennflow.paths import after_prefix
from fennflow_sqlalchemy.database import LockWaitTimeoutError
from fennflow_sqlalchemy.jobs import JobBackend
from fennflow_sqlalchemy.rows import key_rows, record_of, record_rows
from fennflow_sqlalchemy.statements import IDENTITY

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from fennflow_sqlalchemy.database import Database
    from fennflow_sqlalchemy.tables import Tables

SMALLEST = "\x01"
"""The first character that a database can hold: no key is between one and the same with this."""

FILL = "fill:"
"""What the name of a value begins with that says that a fill is under way."""


class FillingBackend(JobBackend):
    """What a first reading, and readers, ask of the catalog.

    Args:
        config: which one.
        late_write_period: seconds for which late writes and kept locks stand.
        lease_ttl: seconds that a lease runs.
        lock_timeout: seconds to wait for locks that users' transactions hold.
    """

    @cached_property
    def _fill_sql(self) -> FillStatements:
        return FillStatements(self._tables, self._catalog)

    @override
    async def fills(self) -> Sequence[Fill]:
        def work(connection: Connection) -> list[Fill]:
            rows = connection.execute(self._fill_sql.fills).all()
            return [Fill(_area_of(row.name), row.value) for row in rows]

        return await self._catalog.run(work, write=False)

    @override
    async def fill(self, fill: Fill, part: FillPart) -> bool:
        mark = {"mark": _mark_of(fill.area)}
        namespace, prefix = fill.area

        def work(connection: Connection) -> bool:
            # Held until the end of this, so that no other process ends the fill meanwhile.
            found = connection.execute(self._fill_sql.hold, mark).scalar()
            begins = found is None and part.begins
            if begins and not self._scan(connection, namespace, prefix, "", 1):
                connection.execute(self._fill_sql.begin, {**mark, "fill": fill.fill_id})
                found = connection.execute(self._fill_sql.hold, mark).scalar()
            if found != fill.fill_id:
                return False
            if part.records:
                rows = {"rows": record_rows(part.records)}
                connection.execute(self._catalog_sql.upsert_records, rows)
            if part.removed:
                keys = [ObjectKey(fill.hidden, key) for key in part.removed]
                connection.execute(self._catalog_sql.remove_records, {"rows": key_rows(keys)})
            return True

        return await self._catalog.run(work)

    @override
    async def end_fill(self, fill: Fill) -> None:
        mark = {"mark": _mark_of(fill.area), "fill": fill.fill_id}
        names = {"hidden": fill.hidden, "shown": fill.area.namespace}

        def work(connection: Connection) -> None:
            # First, since it waits for those who are adding records.
            if connection.execute(self._fill_sql.end, mark).first() is not None:
                connection.execute(self._fill_sql.show, names)
                connection.execute(self._fill_sql.clear, {"hidden": fill.hidden})

        await self._catalog.run(work)

    @override
    async def add_details(self, records: Collection[Record]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(self._fill_sql.add_details, {"rows": record_rows(records)})

        with suppress(LockWaitTimeoutError):  # a transaction of the user's may hold what is needed
            await self._catalog.run(work, lock_wait=0.0)

    def _scan(
        self, connection: Connection, namespace: str, prefix: str, start: str, limit: int
    ) -> list[Record]:
        variant, parameters = _stretch(namespace, prefix, start, limit)
        rows = connection.execute(self._catalog_sql.scan[variant], parameters)
        return [record_of(row) for row in rows.all()]

    @override
    async def scan_names(
        self, namespace: str, *, prefix: str, start: str, limit: int, delimiter: str
    ) -> Sequence[Record]:
        successor = after_prefix(delimiter)
        if successor is None:  # of the last character alone
            return await super().scan_names(
                namespace, prefix=prefix, start=start, limit=limit, delimiter=delimiter
            )
        variant, parameters = _stretch(namespace, prefix, start, limit)
        parameters |= {
            "beyond": len(prefix) + 1,
            "delimiter": delimiter,
            "successor": successor,
            "smallest": SMALLEST,
        }

        def work(connection: Connection) -> list[Record]:
            rows = connection.execute(self._catalog_sql.scan_names[variant], parameters)
            return [record_of(row) for row in rows.all()]

        return await self._catalog.run(work, write=False)


def _stretch(
    namespace: str, prefix: str, start: str, limit: int
) -> tuple[tuple[bool, bool], dict[str, Any]]:
    """Return which statement finds a stretch of keys, and its parameters."""
    # No key holds a NUL, which PostgreSQL does not take either: "a\0" is what follows "a".
    start, nul, _ = max(start, prefix).partition("\0")
    stop = after_prefix(prefix)
    parameters: dict[str, Any] = {"namespace": namespace, "start": start, "limit": limit}
    if stop is not None:
        parameters["stop"] = stop
    return (bool(nul), stop is not None), parameters


class FillStatements:
    """Of fills, and of what is not known yet of the objects that they recorded.

    Args:
        tables: that they are about.
        catalog: their database.
    """

    def __init__(self, tables: Tables, catalog: Database) -> None:
        meta, records = tables.meta, tables.records
        mark, fill = bindparam("mark", type_=Text()), bindparam("fill", type_=Text())
        hidden = bindparam("hidden", type_=Text())
        self.fills = select(meta.c.name, meta.c.value).where(meta.c.name.like(f"{FILL}%"))
        self.hold = select(meta.c.value).where(meta.c.name == mark).with_for_update(read=True)
        self.begin = (
            catalog.insert(meta)
            .from_select(["name", "value"], select(mark, fill).where(true()))
            .on_conflict_do_nothing()
        )
        self.end = (
            delete(meta).where(meta.c.name == mark, meta.c.value == fill).returning(meta.c.name)
        )
        names = [column.name for column in records.columns if column.name != "namespace"]
        shown = bindparam("shown", type_=Text())
        self.show = (
            catalog.insert(records)
            .from_select(
                ["namespace", *names],
                select(shown, *(records.c[name] for name in names)).where(
                    records.c.namespace == hidden
                ),
            )
            .on_conflict_do_nothing()
        )
        self.clear = delete(records).where(records.c.namespace == hidden)
        found = ("version_id", "media_type", "metadata")
        rows = catalog.rows("rows", [records.c[name] for name in (*IDENTITY, *found)])
        self.add_details = (
            update(records)
            .where(
                *(records.c[name] == rows.c[name] for name in IDENTITY),
                records.c.media_type == "",
            )
            .values({name: rows.c[name] for name in found})
        )


def _mark_of(area: Area) -> str:
    """Return the name of the value that says that a fill is under way."""
    return f"{FILL}{area.namespace}\x1f{area.prefix}"


def _area_of(mark: str) -> Area:
    namespace, _, prefix = mark.removeprefix(FILL).partition("\x1f")
    return Area(namespace, prefix)
