"""What a user configures of the backend on SQLite or PostgreSQL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, SecretStr, field_validator

from fennflow.config import BackendConfig

_URL = re.compile(r"(?P<dialect>sqlite|postgresql|postgres)(?:\+(?P<driver>\w+))?://(?P<rest>.*)")
_SERVER = re.compile(
    r"([^:/?@]*(:[^@]*)?@)?"  # user and password
    r"(\[[^]/?@]+\]|[^]\[:/?@]*)(:(?P<port>[0-9]{1,5}))?"  # host and port
    r"(/[^?@]*)?(\?[^@]*)?"  # database and options
)
"""What follows `postgresql://`. With another `@`, a part of the password would pass for a host."""
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
MAX_PORT = 65535
_DRIVERS = {"sqlite": "aiosqlite", "postgresql": "asyncpg"}


class SqlalchemyBackendConfig(BackendConfig):
    """Catalog and journal in a database: what is committed outlives every process.

    On SQLite several processes of one machine share the file. The catalog lies in the file that
    the URL names, and the journal in a file of its own beside it, so that transactions go on while
    somebody holds the one write lock of the first. Back both up together.

    Give every object store a database, a schema or a table prefix of its own: a catalog names
    buckets, and cannot tell two stores that have buckets of one name.

    Args:
        url: of SQLAlchemy: `sqlite:///fennflow.db` (relative to the working directory),
            `sqlite:////var/lib/app.db`, `postgresql://user:password@host/database`; shown
            nowhere. The asynchronous driver need not be named.
        table_prefix: of all tables.
        schema_name: of PostgreSQL, where the tables are; it must exist. None for the first of
            the user's `search_path`.
        create_tables: whether tables are created, and migrated to this version, at first use.
            If not, that is Alembic's: give it `fennflow_sqlalchemy.metadata`.
        journal: file of the journal, for SQLite alone; by default beside the catalog, for
            instance `fennflow.journal.db`.
        pool_size: database connections of one event loop.
        busy_timeout: seconds to wait for another process to release a SQLite file; for that of the
            catalog, to which your own transactions write, `lock_timeout` is the limit if it is
            shorter (at least 5 seconds).
        file_mode: of SQLite files that are created, for instance `0o660` for a group. By default
            they are private, as they hold keys and metadata.

    Raises:
        ConfigException: another database, one in memory, a URL in which `@` is not escaped, or a
            prefix that is not an identifier.

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
    pool_size: Annotated[int, Field(gt=0)] = 10
    busy_timeout: Annotated[float, Field(gt=0)] = 30.0
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
            file_mode: int = ...,
        ) -> None: ...

    @field_validator("url")
    @classmethod
    def _known_database(cls, url: SecretStr) -> SecretStr:
        found = _URL.fullmatch(url.get_secret_value())
        if found is None:
            message = "must be sqlite:///path or postgresql://user:password@host/database"
            raise ValueError(message)
        dialect = "sqlite" if found["dialect"] == "sqlite" else "postgresql"
        driver = _DRIVERS[dialect]
        if found["driver"] not in {None, driver}:
            message = f"names a driver that is not {driver}; leave the driver out"
            raise ValueError(message)
        rest = found["rest"]
        if _UNUSABLE.search(rest):
            message = "must not hold control characters or lone surrogates"
            raise ValueError(message)
        server = _SERVER.fullmatch(rest)
        if dialect == "postgresql" and (server is None or int(server["port"] or 0) > MAX_PORT):
            message = (
                "must be postgresql://user:password@host:port/database; inside user name, password "
                "and options write @ as %40, and in a user name / as %2F and : as %3A"
            )
            raise ValueError(message)
        if dialect == "sqlite" and not rest.startswith("/"):
            message = "needs three slashes before a relative path, and four before an absolute one"
            raise ValueError(message)
        path = rest.partition("?")[0].removeprefix("/")
        if dialect == "sqlite" and (path in {"", ":memory:"} or path.startswith("file:")):
            message = "names no path; for a catalog in memory use InMemoryBackendConfig"
            raise ValueError(message)
        return SecretStr(f"{dialect}+{driver}://{rest}")
