"""Stores for tests: a connector config and a fresh bucket, on every server that there is."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.request import urlopen

import botocore.session
import pytest
from aiobotocore.session import AioSession
from botocore.config import Config

from fennflow import ConfigDict, UnitOfWork, plugins
from fennflow.config import ConnectorConfig
from fennflow.connectors import (
    Capabilities,
    Connector,
    InMemoryConnectorConfig,
    Location,
    ObstoreConnectorConfig,
    S3ConnectorConfig,
)
from fennflow.exceptions import NoSuchKeyException
from fennflow.repositories import (
    AdoptRepository,
    CopyRepository,
    CreateRepository,
    CrudRepository,
    DeletePrefixRepository,
    GeneratePresignedUrlPrefixRepository,
    GeneratePresignedUrlRepository,
    GetPrefixRepository,
    RepoField,
    StatRepository,
    StreamRepository,
    UploadTicketRepository,
)
from fennflow.testing import S3Server, Target
from fennflow.testing.processes import find_program, free_ports, running

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

numbers = itertools.count(1)
answers: dict[tuple[str, str], Capabilities] = {}
"""What the probe has found out of each server and kind of bucket: other tests are about the probe."""
SESSION = AioSession()  # keeps what it has parsed of botocore's data, which takes 70 ms

WEAK = Capabilities()
VERSIONED = Capabilities(
    conditional_create=True, conditional_delete="batch", conditional_copy=True, versioned=True
)
FILES = Capabilities(hierarchical=True)
VERSIONING: dict[str, Literal["Enabled", "Suspended"]] = {
    "moto-versioned": "Enabled",
    "strict-versioned": "Enabled",
    "strict-suspended": "Suspended",
    "moto-suspended": "Suspended",
    "seaweedfs-versioned": "Enabled",
}
ALL_STORES = [
    "memory",
    "memory-weak",
    "memory-versioned",
    "moto",
    "moto-versioned",
    "juicefs",
    "strict",
    "strict-versioned",
]
OBSTORES = ["obstore-memory", "obstore-file", "obstore-moto", "obstore-juicefs", "obstore-strict"]


class FullRepository(
    CrudRepository,
    CreateRepository,
    StatRepository,
    GetPrefixRepository,
    DeletePrefixRepository,
    CopyRepository,
    GeneratePresignedUrlRepository,
    GeneratePresignedUrlPrefixRepository,
    StreamRepository,
    AdoptRepository,
    UploadTicketRepository,
):
    """All that a repository can do."""


class FullUOW(UnitOfWork):
    """A unit of work on one bucket, for annotations: `Store.uow` makes the class."""

    files = RepoField(FullRepository, namespace="none")


@dataclass
class Store:
    """A connector config and an empty bucket of it, with a look from outside."""

    config: ConnectorConfig
    namespace: str
    server: S3Server | None = None
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def target(self) -> Target:
        return Target(self.config, self.namespace)

    def uow(self, **changes: Any) -> type[FullUOW]:
        """Return a class of units of work on this bucket, with one catalog for all of them."""
        store = self

        class UOW(FullUOW):
            files = RepoField(FullRepository, namespace=store.namespace)
            config = ConfigDict(connector=store.config, **{**store.settings, **changes})

        return UOW

    @asynccontextmanager
    async def connector(self) -> AsyncGenerator[Connector]:
        config = ConfigDict(connector=self.config)
        connector = plugins.registry().connector_for(self.config).factory(self.config, config)
        await connector.open()
        try:
            yield connector
        finally:
            await connector.aclose()

    async def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return the objects of the bucket, those below the reserved prefix included, but no notes.

        A store over a file system lists empty directories, which an engine removes in the
        background: one that is gone before it was read is left out.
        """
        found: dict[str, bytes] = {}
        async with self.connector() as connector:
            async for stored in connector.list(self.namespace, prefix):
                key = stored.location.key
                if key.startswith(".fennflow/catalogs/"):
                    continue
                try:
                    found[key] = (await connector.get(self.namespace, Location(key)))[1]
                except NoSuchKeyException:
                    if not key.endswith("/"):
                        raise
        return found


@asynccontextmanager
async def raw_client(server: S3Server) -> AsyncGenerator[S3Client]:
    """Open a client that knows nothing of FennFlow."""
    async with SESSION.create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=server.url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    ) as client:
        yield client


def s3_config(server: S3Server, **changes: Any) -> S3ConnectorConfig:
    return S3ConnectorConfig(
        **{
            "endpoint_url": server.url,
            "region_name": "us-east-1",
            "aws_access_key_id": server.access_key,
            "aws_secret_access_key": server.secret_key,
            **changes,
        }
    )


def obstore_config(server: S3Server, **changes: Any) -> ObstoreConnectorConfig:
    options = {
        "endpoint": server.url,
        "region": "us-east-1",
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
    }
    return ObstoreConnectorConfig(**{"url": "s3://", "options": options, **changes})


async def new_bucket(
    server: S3Server, *, versioning: Literal["Enabled", "Suspended"] | None = None
) -> str:
    name = f"bucket-{next(numbers)}"
    client = blocking_client(server.url, server.access_key, server.secret_key)
    client.create_bucket(Bucket=name)
    if versioning is not None:
        client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": versioning})
    return name


@cache
def blocking_client(url: str, access_key: str, secret_key: str) -> Any:
    """Return a client that belongs to no event loop, so that all tests share it."""
    create: Any = botocore.session.get_session().create_client
    return create(
        "s3",
        region_name="us-east-1",
        endpoint_url=url,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=Config(signature_version="s3v4", request_checksum_calculation="when_required"),
    )


@contextmanager
def localbucket_server(directory: Path) -> Generator[S3Server]:
    """Run the server of the package localbucket: no batches of deletions, no metadata."""
    [port] = free_ports(1)
    server = S3Server(url=f"http://127.0.0.1:{port}")
    program = find_program("localbucket", "localbucket")

    def ready() -> None:
        urlopen(server.url, timeout=10).close()

    with running([program, "--port", str(port), str(directory)], ready):
        yield server


async def make_store(kind: str, request: pytest.FixtureRequest, **changes: Any) -> Store:
    """Return an empty bucket on a kind of server, whose probe is asked once for all tests.

    Tests about the probe ask for it by `capabilities=None`.
    """
    if kind.startswith("memory"):
        capabilities = {
            "memory-weak": WEAK,
            "memory-versioned": VERSIONED,
            "memory-files": FILES,
        }.get(kind)
        config = InMemoryConnectorConfig(name=f"m{next(numbers)}", capabilities=capabilities)
        return Store(config, "bucket")
    server: S3Server
    if kind == "obstore-memory":
        return Store(ObstoreConnectorConfig(url=f"memory:///m{next(numbers)}"), "bucket")
    if kind == "obstore-file":
        url = f"file://{request.getfixturevalue('tmp_path')}"
        return Store(ObstoreConnectorConfig(url=url), f"bucket-{next(numbers)}")
    if kind.startswith("obstore-"):
        server = request.getfixturevalue(kind.removeprefix("obstore-"))
        return Store(obstore_config(server, **changes), await new_bucket(server), server)
    server = request.getfixturevalue(kind.partition("-")[0])
    bucket = await new_bucket(server, versioning=VERSIONING.get(kind))
    store = Store(s3_config(server, **changes), bucket, server)
    if "capabilities" in changes:
        return store
    if (server.url, kind) not in answers:
        async with store.connector() as connector:
            answers[server.url, kind] = await connector.capabilities(bucket)
    known = answers[server.url, kind]
    return replace(store, config=s3_config(server, capabilities=known, **changes))
