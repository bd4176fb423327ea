"""The database that Django's rows and FennFlow's catalog have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from django.db import connections
from sqlalchemy import Connection
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.pool import NullPool

from fennflow.backends import SqlalchemyBackendConfig
from fennflow.exceptions import ConfigException

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

_SHARED = frozenset(
    {
        "application_name",
        "channel_binding",
        "connect_timeout",
        "gsslib",
        "krbsrvname",
        "passfile",
        "sslmode",
        "target_session_attrs",
    }
)
"""Options of a connection that the catalog's own connections take, too."""
_OF_DJANGO = frozenset(
    {
        "assume_role",
        "client_encoding",
        "cursor_factory",
        "isolation_level",
        "pool",
        "server_side_binding",
    }
)
"""Options that concern Django's connections alone."""


class Ends(Protocol):
    """Ends what a shared connection is used for."""

    def commit(self) -> None:
        """Commit it."""
        ...

    def rollback(self) -> None:
        """Roll it back."""
        ...


class SharedConnection:
    """A driver's connection of Django's, as SQLAlchemy sees it: it may run statements on it.

    Args:
        raw: the driver's own.
        ends: is asked to end the transaction; the connection itself stays Django's.
    """

    def __init__(self, raw: Any, ends: Ends) -> None:
        self._raw = raw
        self.commit = ends.commit
        self.rollback = ends.rollback

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """Return a cursor of the driver's."""
        return self._raw.cursor(*args, **kwargs)

    def close(self) -> None:
        """Leave it open: it is Django's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


def connect(wrapper: BaseDatabaseWrapper, ends: Ends) -> Connection:
    """Return a connection of SQLAlchemy's on the one that Django uses, in the same transaction.

    Args:
        wrapper: Django's connection.
        ends: what SQLAlchemy's commit and rollback do.
    """
    wrapper.ensure_connection()
    raw: Any = wrapper.connection
    driver = "sqlite+pysqlite"
    if _kind(wrapper) == "postgresql":
        # The module that Django chose; the connection may be wrapped, by what traces it for instance.
        driver = f"postgresql+{cast('Any', wrapper).Database.__name__}"
    url = _place(wrapper).set(drivername=driver)
    kind = url.get_dialect()
    dialect: Any = kind(dbapi=kind.import_dbapi())  # type: ignore[call-arg]
    if dialect.name == "postgresql":
        version: int = cast("Any", wrapper).pg_version
        dialect.server_version_info = (version // 10000, version % 10000)
    # Not by create_engine: that configures the connection, and ends its transaction.
    pool = NullPool(
        lambda: cast("Any", SharedConnection(raw, ends)), dialect=dialect, reset_on_return=None
    )
    return Engine(pool, dialect, url, hide_parameters=True).connect()


def backend_config(using: str = "default", **options: Any) -> SqlalchemyBackendConfig:
    """Return the configuration of a catalog in one of the databases of `DATABASES`.

    Args:
        using: its alias.
        options: those of `SqlalchemyBackendConfig` but `url`.

    Raises:
        ConfigException: it is neither SQLite nor PostgreSQL, or is in memory; or it has options for
            which FennFlow's own connections have none.
    """
    url = _url(connections[using])
    return SqlalchemyBackendConfig(url=url.render_as_string(hide_password=False), **options)


def identity(using: str) -> tuple[object, ...]:
    """Return what distinguishes the database of an alias; a test runner replaces it."""
    settings = connections[using].settings_dict
    names = ("NAME", "USER", "PASSWORD", "HOST", "PORT")
    return (*(str(settings[name]) for name in names), repr(settings["OPTIONS"]))


def in_memory(wrapper: BaseDatabaseWrapper) -> bool:
    """Return whether a database is one of SQLite's that no other process can see."""
    return wrapper.vendor == "sqlite" and bool(cast("Any", wrapper).is_in_memory_db())


def _kind(wrapper: BaseDatabaseWrapper) -> str:
    if wrapper.vendor not in {"sqlite", "postgresql"}:
        message = (
            f"The database {wrapper.alias!a} is {wrapper.vendor}. Files can commit with the rows of "
            "SQLite and PostgreSQL only."
        )
        raise ConfigException(message)
    return wrapper.vendor


def _place(wrapper: BaseDatabaseWrapper) -> URL:
    """Return where a database is."""
    settings = wrapper.settings_dict
    if _kind(wrapper) == "sqlite":
        if in_memory(wrapper):
            message = (
                f"The SQLite database {wrapper.alias!a} is in memory, where the catalog of files "
                "cannot be. Name a file; for tests in DATABASES[...]['TEST']['NAME']."
            )
            raise ConfigException(message)
        return make_url("sqlite://").set(database=str(Path(settings["NAME"]).absolute()))
    host: str = settings["HOST"]
    socket = host.startswith("/")
    return URL.create(
        "postgresql",
        username=settings["USER"] or None,
        password=settings["PASSWORD"] or None,
        host=None if socket else host or None,
        port=int(settings["PORT"]) if settings["PORT"] else None,
        database=settings["NAME"],
        query={"host": host} if socket else {},
    )


def _url(wrapper: BaseDatabaseWrapper) -> URL:
    """Return the URL of a database for connections of FennFlow's own."""
    url = _place(wrapper)
    if wrapper.vendor == "sqlite":
        return url
    options: Mapping[str, object] = wrapper.settings_dict["OPTIONS"]
    unknown = sorted(options.keys() - _SHARED - _OF_DJANGO)
    if unknown:
        message = (
            f"FennFlow's own connections to the database {wrapper.alias!a} have no such options: "
            f"{', '.join(map(ascii, unknown))}. Give the storage a backend=SqlalchemyBackendConfig(...) "
            "that leads to the same database and schema; certificates are named by variables such as "
            "PGSSLROOTCERT."
        )
        raise ConfigException(message)
    shared = {name: str(value) for name, value in options.items() if name in _SHARED}
    return url.update_query_dict(shared)
