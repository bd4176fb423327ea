"""A real server for a simulated world: a connector that waits for no answer, but blocks for it.

On a `ControlledLoop` nothing but the test decides what happens next, and there are no sockets. So
the real connector lives on a loop of its own in a thread, and each of its operations is one instant
of the simulation, in which the server is asked and answers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from typing_extensions import override

from fennflow import ConfigDict, plugins
from fennflow.config import ConnectorConfig
from fennflow.connectors import (
    Capabilities,
    Connector,
    CopyRequest,
    Deletion,
    DeletionReport,
    Location,
    ObjectAttributes,
    PendingUpload,
    PutRequest,
    StoredObject,
)
from fennflow.hookspecs import ConnectorPlugin, hookimpl
from fennflow.testing import S3Server
from stores import new_bucket, s3_config

T = TypeVar("T")


@dataclass(eq=False)
class Remote:
    """A bucket on a server, and the connector that reaches it.

    Args:
        server: a real one.
        loop: on which the connector lives, in a thread of its own.
        connector: opened there.
    """

    server: S3Server
    loop: asyncio.AbstractEventLoop
    connector: Connector
    bucket: str = ""
    written: dict[str, float] = field(default_factory=dict[str, float])

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it now, whatever the loop of the caller thinks of time."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=60)

    def renew(self, versioning: Literal["Enabled"] | None = None) -> RemoteConnectorConfig:
        """Return the configuration of a new, empty bucket."""
        remote = replace(self, written={})
        remote.bucket = self.do(new_bucket(self.server, versioning=versioning))
        claimed = self.do(self.connector.capabilities(remote.bucket))
        return RemoteConnectorConfig(remote=remote, capabilities=claimed)


class RemoteConnectorConfig(ConnectorConfig):
    """Configuration of a bucket on a real server, in a simulated world."""

    remote: Remote


class RemoteConnector(Connector):
    """Asks the real connector, and knows the bucket by the name that the simulation gives it."""

    def __init__(self, remote: Remote, capabilities: Capabilities | None) -> None:
        super().__init__(capabilities)
        self._remote = remote
        self._inner = remote.connector

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return self._remote.do(work)

    def _dated(self, stored: StoredObject) -> StoredObject:
        """Return it with the simulation's time: the server has another one."""
        written = self._remote.written[stored.location.key]
        return replace(stored, modified_at=datetime.fromtimestamp(written, UTC))

    def _write(self, key: str, work: Coroutine[Any, Any, StoredObject]) -> StoredObject:
        stored = self._do(work)
        self._remote.written[key] = asyncio.get_running_loop().time()
        return stored

    @override
    async def open(self) -> None:
        """Nothing: it is open."""

    @override
    async def aclose(self) -> None:
        """Nothing: others use it."""

    @override
    async def probe(self, namespace: str) -> Capabilities:
        raise AssertionError(namespace)  # they are claimed

    @override
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        self._inner.validate(self._remote.bucket, key, attributes)

    @override
    async def put(self, request: PutRequest, body: bytes) -> StoredObject:
        there = replace(request, namespace=self._remote.bucket, on_upload=None)
        return self._write(request.key, self._inner.put(there, body))

    @override
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        stored, body = self._do(self._inner.get(self._remote.bucket, location, if_match=if_match))
        return self._dated(stored), body

    @override
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        stored = self._do(self._inner.head(self._remote.bucket, location))
        return None if stored is None else self._dated(stored)

    @override
    async def copy(self, request: CopyRequest) -> StoredObject:
        bucket = self._remote.bucket
        source = replace(request.source, namespace=bucket)
        there = replace(request, namespace=bucket, source=source, on_upload=None)
        return self._write(request.key, self._inner.copy(there))

    @override
    async def delete(self, namespace: str, deletions: Sequence[Deletion]) -> DeletionReport:
        return self._do(self._inner.delete(self._remote.bucket, deletions))

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        async def page() -> Sequence[StoredObject]:
            found = self._inner.list(self._remote.bucket, prefix, start_after=start_after)
            return [stored async for stored in found]

        for stored in self._do(page()):
            yield self._dated(stored)

    @override
    async def versions(self, namespace: str, key: str) -> Sequence[StoredObject]:
        found = self._do(self._inner.versions(self._remote.bucket, key))
        return [self._dated(stored) for stored in found]

    @override
    async def uploads(self, namespace: str, prefix: str) -> AsyncIterator[PendingUpload]:
        async def page() -> Sequence[PendingUpload]:
            return [each async for each in self._inner.uploads(self._remote.bucket, prefix)]

        for upload in self._do(page()):
            yield upload

    @override
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        self._do(self._inner.abort_upload(self._remote.bucket, key, upload_id))


@contextmanager
def remote(server: S3Server) -> Generator[Remote]:
    """Open the connector of a server in a thread."""
    config = s3_config(server)
    settings = ConfigDict(connector=config)
    connector = plugins.registry().connector_for(config).factory(config, settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    found = Remote(server, loop, connector)
    try:
        found.do(connector.open())
        yield found
        found.do(connector.aclose())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _new_connector(config: RemoteConnectorConfig, _settings: ConfigDict) -> Connector:
    return RemoteConnector(config.remote, config.capabilities)


@hookimpl
def fennflow_connectors() -> Iterable[ConnectorPlugin]:
    """Return the connector."""
    return [ConnectorPlugin("remote", RemoteConnectorConfig, _new_connector)]
