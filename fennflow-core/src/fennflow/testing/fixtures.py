"""A pytest plugin with fixtures for tests of programs that use FennFlow.

Switch it on in your `conftest.py`: `pytest_plugins = ["fennflow.testing.fixtures"]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import InMemoryBackendConfig
from fennflow.config import BackendConfig
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.exceptions import ConnectorUnavailableException
from fennflow.jobs import share_functions
from fennflow.repositories import ListRepository
from fennflow.repositories.fields import fields_of
from fennflow.testing.boundaries import Boundary, boundaries
from fennflow.testing.databases import PostgresqlServer, postgresql_server
from fennflow.testing.servers import S3Server, moto_server
from fennflow.testing.stream_suite import Target, keys, opened

__all__ = ["failing", "leftovers"]

U = TypeVar("U", bound=UnitOfWork)

_numbers = itertools.count(1)


@pytest.fixture
def fennflow_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[U]], type[U]]:
    """Return a function that makes a unit of work keep its files in memory until the test ends.

    The class itself is changed, so that the program under test uses it, too. The rest of its config
    is unchanged.
    """

    def in_memory(uow_class: type[U]) -> type[U]:
        _replace(monkeypatch, uow_class, InMemoryBackendConfig(name=f"test-{next(_numbers)}"))
        return uow_class

    return in_memory


@pytest.fixture
def fennflow_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Return a function that gives a unit of work a database to join, and files in memory.

    Call it with the class, and let the program create its SQLAlchemy engine with the URL that it
    returns: that of a SQLite file for this test, or the one passed as `url=`, such as
    `fennflow_postgresql.new_database()`. The class itself is changed, so that the program under
    test uses it, in whatever thread or event loop its test client runs it.
    """

    def joined(uow_class: type[UnitOfWork], *, url: str | None = None) -> str:
        from fennflow.backends import SqlalchemyBackendConfig

        where = url or f"sqlite:///{tmp_path}/fennflow-{next(_numbers)}.db"
        backend = SqlalchemyBackendConfig(url=where)
        _replace(monkeypatch, uow_class, backend)
        return backend.url.get_secret_value()

    return joined


def _replace(
    monkeypatch: pytest.MonkeyPatch, uow_class: type[UnitOfWork], backend: BackendConfig
) -> None:
    settings = {field: getattr(uow_class.config, field) for field in ConfigDict.model_fields}
    settings["connector"] = InMemoryConnectorConfig(name=f"test-{next(_numbers)}")
    settings["backend"] = backend
    config = ConfigDict(**settings)
    share_functions(uow_class.config, config)  # those registered with the class
    monkeypatch.setattr(uow_class, "config", config)


@pytest.fixture(scope="session")
def fennflow_s3() -> Generator[S3Server]:
    """Return an S3 server (moto's) that runs until the last test has ended."""
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def fennflow_postgresql() -> Generator[PostgresqlServer]:
    """Return a PostgreSQL server that runs until the last test has ended."""
    with postgresql_server() as server:
        yield server


@contextmanager
def failing(
    operation: str, *, at: int = 1, when: Literal["before", "after"] = "before"
) -> Generator[None]:
    """Make one request to the store fail in this process, as if the store were unreachable.

    Args:
        operation: a method of the connector: `put`, `upload` (long streams), `get`, `stream`,
            `head`, `copy`, `delete` or `list`.
        at: which request of that kind in the block, counted from 1.
        when: `before` it has an effect, or `after`: then its answer is lost.

    Example:
        ```python
        from fennflow.testing.fixtures import failing

        with failing("put", at=2):  # run a unit of work here, and see what it leaves
            pass
        ```
    """
    left = at

    def reached(boundary: Boundary) -> None:
        nonlocal left
        if boundary == Boundary(when, operation):
            left -= 1
            if left == 0:
                message = f"The store could not be reached {when} {operation} number {at}: a test."
                raise ConnectorUnavailableException(message)

    with boundaries(reached):
        yield


async def leftovers(uow_class: type[UnitOfWork]) -> list[str]:
    """Describe leftovers: none, if every unit of work has ended and is finished.

    Transactions that are not finished, objects without a record, and files of the catalog
    that are no longer there.

    Args:
        uow_class: the unit of work whose buckets are checked as a whole.
    """
    found = [
        f"transaction {each.transaction_id} is {each.state}"
        for each in await uow_class.transactions()
    ]
    for name, field in fields_of(uow_class).items():
        listing: dict[str, Any] = {name: field.using(ListRepository)}
        async with type(uow_class.__name__, (uow_class,), listing)() as uow:
            known = {str(path) async for path in getattr(uow, name).iter()}
        async with opened(Target(uow_class.config.connector, field.namespace)) as connector:
            inside = [
                each
                for each in await keys(connector, field.namespace)
                if each.startswith(field.prefix)
            ]
            there = {each.removeprefix(field.prefix) for each in inside}
        found += [f"{field.namespace}/{key} is unknown to the catalog" for key in there - known]
        found += [f"{field.namespace}/{key} is missing" for key in known - there]
    return sorted(found)
