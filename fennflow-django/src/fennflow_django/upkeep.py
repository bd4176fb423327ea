"""The maintenance of catalogs and buckets for `manage.py`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from django.core.checks import Error
from django.core.files.storage import storages
from django.db import connections, transaction
from django.utils.connection import ConnectionDoesNotExist
from django.utils.module_loading import import_string

from fennflow.backends import SqlalchemyBackendConfig
from fennflow.exceptions import FennFlowException
from fennflow_django.database import connect, in_memory
from fennflow_django.storage import FennFlowStorage
from fennflow_sqlalchemy.database import create_catalog, has_catalog

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from django.core.checks import CheckMessage
    from django.db.backends.base.base import BaseDatabaseWrapper


class _EndedByDjango:
    def commit(self) -> None:
        """Leave it to the migration."""

    def rollback(self) -> None:
        """Leave it to the migration."""


def fennflow_storages() -> dict[str, FennFlowStorage]:
    """Return the FennFlow storages of `STORAGES`, by name."""
    found = {name: _storage(name) for name in storages.backends}
    return {name: storage for name, storage in found.items() if storage is not None}


def _storage(name: str) -> FennFlowStorage | None:
    """Return a FennFlow storage of `STORAGES`; None for any other storage."""
    backends = cast("Mapping[str, Mapping[str, str]]", storages.backends)
    kind = import_string(backends[name]["BACKEND"])
    # Other storages may not be usable yet, such as that for static files without STATIC_URL.
    if isinstance(kind, type) and not issubclass(kind, FennFlowStorage):
        return None
    storage = storages[name]
    return storage if isinstance(storage, FennFlowStorage) else None


def check_storages() -> list[CheckMessage]:
    """Return an error for each storage of `STORAGES` with invalid options; run by `manage.py check`.

    It does not connect to databases and stores; `manage.py fennflow doctor` does.
    """
    found: list[CheckMessage] = []
    for name in storages.backends:
        try:
            storage = _storage(name)
            if storage is not None and not in_memory(connections[storage.using]):
                _ = storage.unit_of_work
        except (FennFlowException, ImportError, TypeError, ConnectionDoesNotExist) as error:
            found.append(Error(f"STORAGES[{name!r}] is not valid: {error}", id="fennflow.E001"))
    return found


def create_catalogs(wrapper: BaseDatabaseWrapper) -> None:
    """Create the tables of the catalogs in a database; called by a migration that is not atomic.

    Args:
        wrapper: Django's connection to it.
    """
    for storage in fennflow_storages().values():
        if storage.using != wrapper.alias or in_memory(wrapper):
            continue  # a database in memory has no catalog: using the storage raises an error
        if wrapper.vendor == "sqlite":
            # This sets the mode of the file permanently; it is not possible inside a transaction.
            with wrapper.cursor() as cursor:
                cursor.execute("PRAGMA journal_mode = WAL")
        backend = storage.unit_of_work.config.backend
        assert isinstance(backend, SqlalchemyBackendConfig)  # noqa: S101 - no other can be joined
        connection = connect(wrapper, _EndedByDjango())
        try:
            # If there is nothing to do, do not wait for a lock, which a running site may hold.
            if not has_catalog(connection, backend):
                with _writing(wrapper):
                    create_catalog(connection, backend)
        finally:
            connection.close()


@contextmanager
def _writing(wrapper: BaseDatabaseWrapper) -> Generator[None]:
    """Open a transaction that may write from its start.

    Django begins a transaction that reads first. If another process writes meanwhile, SQLite
    immediately refuses its first writing statement, however long it may wait for locks.
    https://www.sqlite.org/isolation.html
    """
    if wrapper.vendor != "sqlite" or wrapper.in_atomic_block:
        with transaction.atomic(using=wrapper.alias):
            yield
        return
    with wrapper.cursor() as cursor:
        cursor.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            cursor.execute("ROLLBACK")
            raise
        cursor.execute("COMMIT")


def complete_catalogs(wrapper: BaseDatabaseWrapper) -> None:
    """Create missing tables: the migration may have run before `STORAGES` had a storage.

    Args:
        wrapper: Django's connection to the database of the catalogs.
    """
    create_catalogs(wrapper)
    if wrapper.vendor == "sqlite" and not (in_memory(wrapper) or wrapper.in_atomic_block):
        # Django's test runner copies only the database file, while this connection is open.
        with wrapper.cursor() as cursor:
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
