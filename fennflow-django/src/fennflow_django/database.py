"""The database that Django's rows and FennFlow's catalog share."""

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
"""Options of a connection that the catalog's own connections support, too."""
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
"""Options that are only for Django's connections."""


class Ends(Protocol):
    """Ends the transaction on a shared connection."""

    def commit(self) -> None:
        """Commit it."""
        ...

    def rollback(self) -> None:
        """Roll it back."""
        ...


class SharedConnection:
    """Django's driver connection for use by SQLAlchemy, which may only run statements on it.

    Args:
        raw: the driver's connection.
        ends: ends the transaction; the connection itself still belongs to Django.
    """

    def __init__(self, raw: Any, ends: Ends) -> None:
        self._raw = raw
        self.commit = ends.commit
        self.rollback = ends.rollback

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """Return a cursor of the driver."""
        return self._raw.cursor(*args, **kwargs)

    def close(self) -> None:
        """Leave it open: it belongs to Django."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


def connect(wrapper: BaseDatabaseWrapper, ends: Ends) -> Connection:
    """Return an SQLAlchemy connection on Django's connection, in the same transaction.

    Args:
        wrapper: Django's connection.
        ends: what SQLAlchemy's commit and rollback do.
    """
    wrapper.ensure_connection()
    raw: Any = wrapper.connection
    driver = "sqlite+pysqlite"
    if _kind(wrapper) == "postgresql":
        # The module that Django chose; the connection itself may be wrapped, for instance by a
        # tracer.
        driver = f"postgresql+{cast('Any', wrapper).Database.__name__}"
    url = _place(wrapper).set(drivername=driver)
    kind = url.get_dialect()
    dialect: Any = kind(dbapi=kind.import_dbapi())  # type: ignore[call-arg]
    if dialect.name == "postgresql":
        version: int = cast("Any", wrapper).pg_version
        dialect.server_version_info = (version // 10000, version % 10000)
    # Not with create_engine, which configures the connection and ends its transaction.
    pool = NullPool(
        lambda: cast("Any", SharedConnection(raw, ends)), dialect=dialect, reset_on_return=None
    )
    return Engine(pool, dialect, url, hide_parameters=True).connect()


def backend_config(using: str = "default", **options: Any) -> SqlalchemyBackendConfig:
    """Return the configuration of a catalog in one of the databases of `DATABASES`.

    Args:
        using: its alias.
        options: those of `SqlalchemyBackendConfig` except `url`.

    Raises:
        ConfigException: it is neither SQLite nor PostgreSQL, or is in memory; or it has options
            that FennFlow's own connections do not support.
    """
    url = _url(connections[using])
    return SqlalchemyBackendConfig(url=url.render_as_string(hide_password=False), **options)


def identity(using: str) -> tuple[object, ...]:
    """Return a value that identifies the database of an alias; test runners change it."""
    settings = connections[using].settings_dict
    names = ("NAME", "USER", "PASSWORD", "HOST", "PORT")
    return (*(str(settings[name]) for name in names), repr(settings["OPTIONS"]))


def in_memory(wrapper: BaseDatabaseWrapper) -> bool:
    """Return whether a database is an SQLite database in memory, which no other process can see."""
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
    """Return the location of a database."""
    settings = wrapper.settings_dict
    if _kind(wrapper) == "sqlite":
        if in_memory(wrapper):
            message = (
                f"The SQLite database {wrapper.alias!a} is in memory, but the catalog of files "
                "needs a file. Name one; for tests in DATABASES[...]['TEST']['NAME']."
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
            f"FennFlow's own connections to {wrapper.alias!a} do not support these options: "
            f"{', '.join(map(ascii, unknown))}. Give the storage a backend=SqlalchemyBackendConfig(...) "
            "that leads to the same database and schema; certificates are named by variables such as "
            "PGSSLROOTCERT."
        )
        raise ConfigException(message)
    shared = {name: str(value) for name, value in options.items() if name in _SHARED}
    return url.update_query_dict(shared)
