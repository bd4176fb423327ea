"""The configuration of the backend on SQLite or PostgreSQL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from fennflow.config import BackendConfig, Seconds
from fennflow.exceptions import ConfigException
from fennflow_sqlalchemy.urls import check_file, checked

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")
"""Matches a URL scheme at the beginning of a path; a single letter would be a drive."""


class SqlalchemyBackendConfig(BackendConfig):
    """Catalog and journal in a database, which outlive every process.

    On SQLite several processes of one machine share the file. The catalog is in the file that
    the URL names, and the journal in a file next to it, so that transactions continue while
    another process holds the write lock of the first. Back both up together.

    Give every object store a separate database, schema or table prefix: a catalog names buckets,
    and cannot distinguish two stores that have buckets with the same name.

    Args:
        url: an SQLAlchemy URL: `sqlite:///fennflow.db` (relative to the working directory),
            `sqlite:////var/lib/app.db`, `postgresql://user:password@host/database`; never shown.
            The driver in the URL does not matter: the backend uses sqlite3 or asyncpg. For
            PostgreSQL it may have options such as `?sslmode=require&application_name=shop`; unknown
            options are refused.
        table_prefix: the prefix of all tables.
        schema_name: the PostgreSQL schema of the tables, which must exist. None for the first one
            in the user's `search_path`.
        create_tables: whether tables are created, and migrated to this version, at first use. If
            not, Alembic has to do that: give it `fennflow_sqlalchemy.metadata`.
        journal: the file of the journal, only for SQLite; by default next to the catalog, for
            instance `fennflow.journal.db`.
        pool_size: the number of database connections of one event loop.
        busy_timeout: seconds to wait for another process to release a SQLite file. For the
            catalog's file, to which your own transactions write, `lock_timeout` (but at least 5
            seconds) is the limit if it is shorter.
        commit_retention: seconds for which `UOW.commits()` can continue after a commit; by default
            three days. All processes need the same value.
        file_mode: the mode of SQLite files that are created, for instance `0o660` for a group. By
            default they are private, since they contain keys and metadata.

    Raises:
        ConfigException: another kind of database, one in memory, a URL with an unescaped `@`, an
            unknown option, or a prefix that is not an identifier.

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
        # Type checkers use the types of the fields for the arguments, but a secret may be given as
        # a str.
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
