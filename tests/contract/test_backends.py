"""Every backend passes the suite that third parties run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from typing_extensions import override

from fennflow.backends import (
    Backend,
    BucketBackendConfig,
    InMemoryBackendConfig,
    JournaledTransaction,
    SqlalchemyBackendConfig,
    values,
)
from fennflow.config import BackendConfig
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.testing import BackendSuite, PostgresqlServer
from fennflow.testing.backend_values import A, new_transaction, opened, plan_for, run
from stores import numbers


class DurableSuite(BackendSuite):
    """What ours do, and others need not."""

    def test_a_transaction_names_the_process_that_began_it_and_then_the_one_that_claimed_it(
        self, config: BackendConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def on(host: str) -> None:
            monkeypatch.setattr(values, "socket", SimpleNamespace(gethostname=lambda: host))

        on("web-1")

        async def scenario(backend: Backend) -> None:
            await backend.begin_writes(new_transaction(), [A], plan_for(A))
            [found] = await backend.transactions(after="", limit=10)
            names = [found.process]
            on("web-2")
            claimed: Sequence[JournaledTransaction] = []
            async with opened(config, lease_ttl=0.05) as other:
                while not claimed:
                    claimed = await other.claim(10)
            names += [each.process for each in claimed]
            assert names == [f"web-1:{os.getpid()}", f"web-2:{os.getpid()}"]

        run(config, scenario, lease_ttl=0.05)


class TestInMemoryBackend(BackendSuite):
    @pytest.fixture
    @override
    def config(self) -> InMemoryBackendConfig:
        return InMemoryBackendConfig(name=f"b{next(numbers)}")


class TestSqlite(DurableSuite):
    @pytest.fixture
    @override
    def config(self, tmp_path: Path) -> SqlalchemyBackendConfig:
        return SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/fennflow.db")


class TestPostgresql(DurableSuite):
    @pytest.fixture
    @override
    def config(self, postgresql: PostgresqlServer) -> SqlalchemyBackendConfig:
        return SqlalchemyBackendConfig(url=postgresql.url, table_prefix=f"b{next(numbers)}_")


class TestBucket(DurableSuite):
    @pytest.fixture
    @override
    def config(self) -> BucketBackendConfig:
        store = InMemoryConnectorConfig(name=f"b{next(numbers)}")
        return BucketBackendConfig(namespace="bucket", connector=store)
