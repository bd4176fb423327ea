"""The statements that fill the catalog from a bucket, and add details of its objects later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Text, bindparam, delete, select, true, update

from fennflow.backends import Area
from fennflow_sqlalchemy.statements import IDENTITY

if TYPE_CHECKING:
    from fennflow_sqlalchemy.database import Database
    from fennflow_sqlalchemy.tables import Tables

FILL = "fill:"
"""The prefix of the names of values that mark areas as being filled."""


class FillStatements:
    """The statements of fills, and of the details that a listing does not contain.

    Args:
        tables: the tables.
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


def fill_mark(area: Area) -> str:
    """Return the name of the value that marks an area as being filled."""
    return f"{FILL}{area.namespace}\x1f{area.prefix}"


def fill_area(mark: str) -> Area:
    """Return the area that a value marks as being filled."""
    namespace, _, prefix = mark.removeprefix(FILL).partition("\x1f")
    return Area(namespace, prefix)
