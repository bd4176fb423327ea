"""Real servers for all tests, started once each, and a fresh bucket for every test."""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from fennflow.engine import diagnosis
from fennflow.testing import (
    PostgresqlServer,
    S3Server,
    juicefs_gateway,
    moto_server,
    postgresql_server,
    seaweedfs_server,
    strict_s3_server,
)
from made_once import share
from stores import ALL_STORES, Store, localbucket_server, make_store

# Passed to the workers of xdist, too; it picks where processes are killed.
os.environ.setdefault("FENNFLOW_SEED", str(random.SystemRandom().randrange(1 << 32)))
# No server here uses TLS, and loading the CA certificates takes 30 ms for each client.
os.environ["AWS_CA_BUNDLE"] = str(Path(__file__).parent / "support" / "authority.pem")

share()
# A disk that others keep busy may take more than the doctor's five seconds for a write.
diagnosis.WRITES_WITHIN = 60.0

# How long examples take to draw says how busy the machine is.
limits: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=60, print_blob=True, **limits)
settings.register_profile("thorough", max_examples=2000, print_blob=True, **limits)
settings.load_profile("quick")


def pytest_xdist_auto_num_workers() -> int:
    """Return two workers for each core, since tests spend half of their time waiting for servers or timers."""
    return 2 * (os.cpu_count() or 1)


def pytest_report_header() -> str:
    return f"FENNFLOW_SEED={os.environ['FENNFLOW_SEED']}"


@pytest.fixture(scope="session")
def moto() -> Generator[S3Server]:
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def juicefs(tmp_path_factory: pytest.TempPathFactory) -> Generator[S3Server]:
    directory: Path = tmp_path_factory.mktemp("juicefs")
    with juicefs_gateway(directory) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs() -> Generator[S3Server]:
    with seaweedfs_server() as server:
        yield server


@pytest.fixture(scope="session")
def localbucket(tmp_path_factory: pytest.TempPathFactory) -> Generator[S3Server]:
    with localbucket_server(tmp_path_factory.mktemp("localbucket")) as server:
        yield server


@pytest.fixture(scope="session")
def strict() -> Generator[S3Server]:
    with strict_s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgresql() -> Generator[PostgresqlServer]:
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=ALL_STORES)
async def store(request: pytest.FixtureRequest) -> Store:
    """Return each kind of store in turn, with an empty bucket."""
    return await make_store(request.param, request)


@pytest.fixture
async def moto_store(request: pytest.FixtureRequest) -> Store:
    """Return moto's server, whose requests are counted and failed, with an empty bucket."""
    return await make_store("moto", request)
