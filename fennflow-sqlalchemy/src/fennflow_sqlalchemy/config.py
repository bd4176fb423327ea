"""What a user configures of the backend on SQLite or PostgreSQL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from fennflow.config import BackendConfig, Seconds
from fennflow.exceptions import ConfigException
from fennflow_sqlalchemy.urls import check_file, checked

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")
"""With which a URL begins, as a path has it; one letter would be a drive."""


class SqlalchemyBackendConfig(BackendConfig):
    """Catalog and journal in a database: what is committed outlives every process.

    On SQLite several processes of one machine share the file. The catalog is in the file that
    the URL names, and the journal in a file next to it, so that transactions continue while
    another process holds the write lock of the first. Back both up together.

    Give every object store a database, a schema or a table prefix of its own: a catalog names
    buckets, and cannot distinguish two stores that have buckets of one name.

    Args:
        url: of SQLAlchemy: `sqlite:///fennflow.db` (relative to the working directory),
            `sqlite:////var/lib/app.db`, `postgresql://user:password@host/database`; shown
            nowhere. A driver need not be named: whichever it is, the backend uses sqlite3 or
            asyncpg. PostgreSQL takes options such as `?sslmode=require&application_name=shop`;
            others than the ones it knows are refused.
        table_prefix: of all tables.
        schema_name: of PostgreSQL, where the tables are; it must exist. None for the first of
            the user's `search_path`.
        create_tables: whether tables are created, and migrated to this version, at first use.
            If not, that is Alembic's: give it `fennflow_sqlalchemy.metadata`.
        journal: file of the journal, for SQLite only; by default next to the catalog, for
            instance `fennflow.journal.db`.
        pool_size: database connections of one event loop.
        busy_timeout: seconds to wait for another process to release a SQLite file; for that of the
            catalog, to which your own transactions write, `lock_timeout` is the limit if it is
            shorter (at least 5 seconds).
        commit_retention: seconds for which `UOW.commits()` can go on behind a commit; by default three
            days. All processes need the same.
        file_mode: of SQLite files that are created, for instance `0o660` for a group. By default
            they are private, as they hold keys and metadata.

    Raises:
        ConfigException: another database, one in memory, a URL in which `@` is not escaped, an
            option that is not known, or a prefix that is not an identifier.

    Example:
        ```python
        from fennflow.backends import SqlalchemyBackendConfig

        config = SqlalchemyBackendConfig(url="postgresql://app:secret@db.internal/app")
        print(config.url)
        #> **********
        ```
    """

    url: Annotated[SecretStr, Field(validate_default=True)] = SecretStr("sqlite:///fennflow.db")
    table_prefix: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,30}$|^$")] = "fennflow_"
    schema_name: Annotated[str | None, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_$]{0,62}$")] = None
    create_tables: bool = True
    journal: Path | None = None
    pool_size: Annotated[int, Field(gt=0, le=10_000)] = 10
    busy_timeout: Seconds = 30.0
    commit_retention: Seconds = 259200.0
    file_mode: Annotated[int, Field(ge=0o600, le=0o777)] = 0o600

    if TYPE_CHECKING:
        # Checkers take the types of the fields for those of the arguments, and a secret may be a str.
        def __init__(
            self,
            *,
            url: str | SecretStr = ...,
            table_prefix: str = ...,
            schema_name: str | None = ...,
            create_tables: bool = ...,
            journal: str | Path | None = ...,
            pool_size: int = ...,
            busy_timeout: float = ...,
            commit_retention: float = ...,
            file_mode: int = ...,
        ) -> None: ...

    @field_validator("url")
    @classmethod
    def _known_database(cls, url: SecretStr) -> SecretStr:
        return SecretStr(checked(url.get_secret_value()))

    @field_validator("journal")
    @classmethod
    def _file(cls, journal: Path | None) -> Path | None:
        if journal is not None:
            if _SCHEME.match(str(journal)):
                message = "must be the path of a file, not a URL"
                raise ValueError(message)
            check_file(str(journal))
        return journal

    @model_validator(mode="after")
    def _of_this_database(self) -> Self:
        sqlite = self.url.get_secret_value().startswith("sqlite")
        wrong = self.schema_name if sqlite else self.journal
        if wrong is not None:
            name, other = ("schema_name", "PostgreSQL") if sqlite else ("journal", "SQLite")
            message = f"SqlalchemyBackendConfig is not valid: {name} is only for {other}."
            raise ConfigException(message)
        return self
