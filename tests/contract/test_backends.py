"""Every backend passes the suite that third parties run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typing_extensions import override

from fennflow.backends import (
    BucketBackendConfig,
    InMemoryBackendConfig,
    SqlalchemyBackendConfig,
)
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.testing import BackendSuite, PostgresqlServer
from stores import numbers


class TestInMemoryBackend(BackendSuite):
    @pytest.fixture
    @override
    def config(self) -> InMemoryBackendConfig:
        return InMemoryBackendConfig(name=f"b{next(numbers)}")


class TestSqlite(BackendSuite):
    @pytest.fixture
    @override
    def config(self, tmp_path: Path) -> SqlalchemyBackendConfig:
        return SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/fennflow.db")


class TestPostgresql(BackendSuite):
    @pytest.fixture
    @override
    def config(self, postgresql: PostgresqlServer) -> SqlalchemyBackendConfig:
        return SqlalchemyBackendConfig(url=postgresql.url, table_prefix=f"b{next(numbers)}_")


class TestBucket(BackendSuite):
    @pytest.fixture
    @override
    def config(self) -> BucketBackendConfig:
        store = InMemoryConnectorConfig(name=f"b{next(numbers)}")
        return BucketBackendConfig(namespace="bucket", connector=store)
