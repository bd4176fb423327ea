"""Catalog and journal in SQLite or PostgreSQL, on SQLAlchemy."""

from typing import TYPE_CHECKING

from fennflow_sqlalchemy.config import SqlalchemyBackendConfig

if TYPE_CHECKING:
    from fennflow_sqlalchemy.columns import StoredFile as StoredFile
    from fennflow_sqlalchemy.columns import StoredFileType as StoredFileType
    from fennflow_sqlalchemy.columns import stored_files as stored_files
    from fennflow_sqlalchemy.tables import include_object as include_object
    from fennflow_sqlalchemy.tables import include_object_for as include_object_for
    from fennflow_sqlalchemy.tables import metadata as metadata
    from fennflow_sqlalchemy.tables import metadata_for as metadata_for
else:

    def __getattr__(name: str) -> object:
        # Importing SQLAlchemy takes almost a second, and discovery imports this package.
        if name in __all__:
            from fennflow_sqlalchemy import columns, tables

            return getattr(tables if hasattr(tables, name) else columns, name)
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)


__all__ = [
    "SqlalchemyBackendConfig",
    "StoredFile",
    "StoredFileType",
    "include_object",
    "include_object_for",
    "metadata",
    "metadata_for",
    "stored_files",
]
