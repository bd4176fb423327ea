"""Checks the URL of a database, and converts its options for the driver."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

MAX_PORT = 65535

_URL = re.compile(r"(?P<dialect>sqlite|postgresql|postgres)(?:\+(?P<driver>\w+))?://(?P<rest>.*)")
_SERVER = re.compile(
    r"([^:/?@]*(:[^@]*)?@)?"  # user and password
    r"(\[[^]/?@]+\]|[^]\[:/?@]*)(:(?P<port>[0-9]{1,5}))?"  # host and port
    r"(/[^?@]*)?(\?[^@]*)?"  # database and options
)
"""The part after `postgresql://`. With another `@`, a part of the password would become the host."""
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_DRIVERS = {"sqlite": "aiosqlite", "postgresql": "asyncpg"}
_OTHER_DRIVERS = {
    "sqlite": {"pysqlite"},
    "postgresql": {"psycopg", "psycopg_async", "psycopg2"},
}
"""Drivers of users' engines: the backend accepts the same URL, and uses its own driver."""
_PLACES = frozenset({"host", "port", "user", "password", "database"})
"""Options that replace parts of the URL; SQLAlchemy reads them."""
_MAX_NUMBER = (1 << 31) - 1


def _one_of(*known: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in known:
            raise ValueError(text)
        return text

    return check


def _text(text: str) -> str:
    if not text or _UNUSABLE.search(text):
        raise ValueError(text)
    return text


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= _MAX_NUMBER:
        raise ValueError(text)
    return seconds


def _count(text: str, most: int = _MAX_NUMBER) -> int:
    number = int(text)
    if not 0 <= number <= most:
        raise ValueError(text)
    return number


_SSL = _one_of("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_OPTIONS: Mapping[str, tuple[str | None, Callable[[str], object]]] = {
    "application_name": ("application_name", _text),
    # asyncpg does not support it, so requiring it is refused.
    "channel_binding": (None, _one_of("disable", "prefer")),
    "command_timeout": ("command_timeout", _seconds),
    "connect_timeout": ("timeout", _seconds),
    "gsslib": ("gsslib", _one_of("gssapi", "sspi")),
    "krbsrvname": ("krbsrvname", _text),
    "max_cacheable_statement_size": ("max_cacheable_statement_size", _count),
    "max_cached_statement_lifetime": ("max_cached_statement_lifetime", _count),
    "passfile": ("passfile", _text),
    "prepared_statement_cache_size": ("prepared_statement_cache_size", _count),
    "ssl": ("ssl", _SSL),
    "sslmode": ("ssl", _SSL),
    "statement_cache_size": ("statement_cache_size", _count),
    "target_session_attrs": (
        "target_session_attrs",
        _one_of("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
    ),
    "timeout": ("timeout", _seconds),
}
"""Options of a PostgreSQL URL: their names in asyncpg and SQLAlchemy, and how they are parsed.

`sslmode`, `connect_timeout` and `application_name` are libpq's names. asyncpg takes the last one as
a server setting, see `driver_options`."""
_SETTINGS = frozenset({"application_name"})


def checked(url: str) -> str:
    """Return the URL with its driver.

    Raises:
        ValueError: no driver can use it. The message does not show it.
    """
    found = _URL.fullmatch(url)
    if found is None:
        message = "must be sqlite:///path or postgresql://user:password@host/database"
        raise ValueError(message)
    dialect = "sqlite" if found["dialect"] == "sqlite" else "postgresql"
    driver = _DRIVERS[dialect]
    known = {None, driver, *_OTHER_DRIVERS[dialect]}
    if found["driver"] not in known:
        message = f"names a driver that is not one of {', '.join(sorted(filter(None, known)))}"
        raise ValueError(message)
    if _UNUSABLE.search(found["rest"]):
        message = "must not contain control characters or lone surrogates"
        raise ValueError(message)
    if dialect == "sqlite":
        _check_sqlite(found["rest"])
    else:
        _check_postgresql(found["rest"])
    return f"{dialect}+{driver}://{found['rest']}"


def _check_sqlite(rest: str) -> None:
    if not rest.startswith("/"):
        message = "needs three slashes before a relative path, and four before an absolute one"
        raise ValueError(message)
    path, question, _ = rest.partition("?")
    if question:
        message = "must not have options for SQLite; busy_timeout is an option of the config"
        raise ValueError(message)
    path = path.removeprefix("/")
    if path in {"", ":memory:"} or path.startswith("file:"):
        message = "has no path; for a catalog in memory use InMemoryBackendConfig"
        raise ValueError(message)
    check_file(path)


def check_file(path: str) -> None:
    """Refuse a path that cannot be a database file.

    Raises:
        ValueError: it names a directory, or has characters that no path can have.
    """
    if _UNUSABLE.search(path):
        message = "must not contain control characters or lone surrogates"
        raise ValueError(message)
    if path.endswith("/") or PurePath(path).name in {"", "..", "."}:
        message = "must name a file, not a directory"
        raise ValueError(message)


def _check_postgresql(rest: str) -> None:
    server = _SERVER.fullmatch(rest)
    if server is None or int(server["port"] or 0) > MAX_PORT:
        message = (
            "must be postgresql://user:password@host:port/database; inside user name, password "
            "and options write @ as %40, and in a user name / as %2F and : as %3A"
        )
        raise ValueError(message)
    # Imported here: discovery of plugins imports configs, but does not need SQLAlchemy.
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(f"postgresql+asyncpg://{rest}")
        _, options = url.get_dialect()().create_connect_args(url.difference_update_query(_OPTIONS))
        for port in _ports(options.get("port")):
            _count(str(port), MAX_PORT)
    except (ArgumentError, ValueError):
        message = "has hosts and ports that do not match, or a port that is not a number"
        raise ValueError(message) from None
    unknown = sorted(options.keys() - _PLACES)
    if unknown:
        message = (
            f"has unknown options: {', '.join(map(ascii, unknown))}; known are "
            f"{', '.join(sorted(_OPTIONS))}"
        )
        raise ValueError(message)
    for value in options.values():
        # The values are no longer escaped.
        if _UNUSABLE.search(str(value)):
            message = "must not contain control characters, not even escaped ones"
            raise ValueError(message)
    driver_options(url.query)


def _ports(given: object) -> Sequence[object]:
    if isinstance(given, list):
        return cast("list[object]", given)
    return [] if given is None else [given]


def driver_options(query: Mapping[str, str | tuple[str, ...]]) -> dict[str, Any]:
    """Return the driver's arguments for the options of a PostgreSQL URL.

    Args:
        query: the query of the URL.

    Raises:
        ValueError: the value of an option cannot be used.
    """
    options: dict[str, Any] = {}
    for name in _OPTIONS.keys() & query.keys():
        text = query[name]
        its_name, read = _OPTIONS[name]
        try:
            # An option that is named twice has a tuple of values.
            value = read(text if isinstance(text, str) else "")
        except ValueError:
            message = f"has a value of the option {name} that cannot be used"
            raise ValueError(message) from None
        if its_name is None:
            continue
        if name in _SETTINGS:
            options.setdefault("server_settings", {})[its_name] = value
        else:
            options[its_name] = value
    return options


def without_driver_options(url: URL) -> URL:
    """Return an SQLAlchemy URL without the options that `driver_options` returns."""
    return url.difference_update_query(_OPTIONS)
