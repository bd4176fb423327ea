"""Tables and statements that all engines of the process share: building them takes longer than most tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fennflow_sqlalchemy import journal
from fennflow_sqlalchemy.database import Database

T = TypeVar("T")
MOST = 64
"""Many tests have tables of their own, which others do not need."""


def made_once(make: Callable[..., T]) -> Callable[..., T]:
    """Return what makes one object for all that is alike; of a database it needs only the dialect."""
    made: dict[object, T] = {}

    def once(*given: object, **options: object) -> T:
        alike = (each.dialect if isinstance(each, Database) else each for each in given)
        key = (*alike, *sorted(options.items()))
        if key not in made:
            if len(made) >= MOST:
                made.clear()
            made[key] = make(*given, **options)
        return made[key]

    return once


def share() -> None:
    """Let all backends that are made from now on share them."""
    for name in (
        "make_tables",
        "CatalogStatements",
        "TransactionStatements",
        "LateWriteStatements",
        "JobStatements",
        "NoteStatements",
        "FillStatements",
    ):
        setattr(journal, name, made_once(getattr(journal, name)))
