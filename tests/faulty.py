"""Faults between the engine and its parts: a connector and a backend that ask before they act.

Both wrap real ones and call a script before and after every operation takes effect. What the
script raises is raised there: before, the operation had no effect; after, its answer is lost.
"""

from __future__ import annotations

import sys
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from typing import Any, TypeVar

from typing_extensions import override

from fennflow import ConfigDict, plugins
from fennflow.backends import (
    Backend,
    Commit,
    Guarantees,
    ObjectKey,
    Plan,
    Record,
    SessionToken,
    Tombstone,
)
from fennflow.config import BackendConfig, ConnectorConfig
from fennflow.connectors import (
    Capabilities,
    Connector,
    CopySource,
    Deletion,
    Location,
    ObjectAttributes,
    PendingUpload,
    PresignMethod,
    StoredObject,
    UploadCallback,
)
from fennflow.hookspecs import BackendPlugin, ConnectorPlugin, hookimpl

R = TypeVar("R")

Script = Callable[[str, str, str], Awaitable[None]]
"""Called with `before` or `after`, the operation, and a key (or nothing)."""


class FaultyConnectorConfig(ConnectorConfig):
    inner: ConnectorConfig
    script: Any


class FaultyBackendConfig(BackendConfig):
    inner: BackendConfig
    script: Any


class FaultyConnector(Connector):
    def __init__(self, inner: Connector, script: Script) -> None:
        super().__init__()
        self.inner = inner
        self.script = script

    async def around(self, operation: str, key: str, work: Callable[[], Awaitable[R]]) -> R:
        await self.script("before", operation, key)
        result = await work()
        await self.script("after", operation, key)
        return result

    @override
    async def open(self) -> None:
        await self.inner.open()

    @override
    async def aclose(self) -> None:
        await self.inner.aclose()

    @override
    async def probe(self, namespace: str) -> Capabilities:
        return await self.inner.capabilities(namespace)

    @override
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        self.inner.validate(namespace, key, attributes)

    @override
    async def put(
        self,
        namespace: str,
        key: str,
        body: bytes,
        attributes: ObjectAttributes,
        *,
        if_none_match: bool = False,
        on_upload: UploadCallback | None = None,
    ) -> StoredObject:
        return await self.around(
            "put",
            key,
            lambda: self.inner.put(
                namespace,
                key,
                body,
                attributes,
                if_none_match=if_none_match,
                on_upload=on_upload,
            ),
        )

    @override
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        return await self.around(
            "get", location.key, lambda: self.inner.get(namespace, location, if_match=if_match)
        )

    @override
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        return await self.around("head", location.key, lambda: self.inner.head(namespace, location))

    @override
    async def copy(
        self,
        namespace: str,
        key: str,
        source: CopySource,
        *,
        attributes: ObjectAttributes | None = None,
        extra: Mapping[str, Any] | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> StoredObject:
        return await self.around(
            "copy",
            key,
            lambda: self.inner.copy(
                namespace,
                key,
                source,
                attributes=attributes,
                extra=extra,
                if_match=if_match,
                if_none_match=if_none_match,
            ),
        )

    @override
    async def delete(self, namespace: str, deletions: Sequence[Deletion]) -> Any:
        keys = " ".join(deletion.location.key for deletion in deletions)
        return await self.around("delete", keys, lambda: self.inner.delete(namespace, deletions))

    @override
    def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        return self.inner.list(namespace, prefix, start_after=start_after)

    @override
    async def versions(self, namespace: str, key: str) -> Sequence[StoredObject]:
        return await self.around("versions", key, lambda: self.inner.versions(namespace, key))

    @override
    async def presign(
        self, namespace: str, location: Location, *, method: PresignMethod, expires_in: float
    ) -> str:
        return await self.inner.presign(namespace, location, method=method, expires_in=expires_in)

    @override
    def uploads(self, namespace: str, prefix: str) -> AsyncIterator[PendingUpload]:
        return self.inner.uploads(namespace, prefix)

    @override
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        await self.around(
            "abort_upload", key, lambda: self.inner.abort_upload(namespace, key, upload_id)
        )


class FaultyBackend(Backend):
    def __init__(self, inner: Backend, script: Script) -> None:
        self.inner = inner
        self.script = script

    async def around(self, operation: str, work: Callable[[], Awaitable[R]]) -> R:
        await self.script("before", operation, "")
        result = await work()
        await self.script("after", operation, "")
        return result

    @property
    @override
    def catalog_id(self) -> str:
        return self.inner.catalog_id

    @override
    async def open(self) -> None:
        await self.inner.open()

    @override
    async def aclose(self) -> None:
        await self.inner.aclose()

    @property
    @override
    def guarantees(self) -> Guarantees:
        return self.inner.guarantees

    @override
    async def recall(self, name: str) -> str | None:
        return await self.inner.recall(name)

    @override
    async def remember(self, name: str, value: str) -> None:
        await self.inner.remember(name, value)

    @override
    async def records(self, keys: Collection[ObjectKey]) -> Any:
        return await self.around("records", lambda: self.inner.records(keys))

    @override
    async def scan(self, namespace: str, *, prefix: str, start: str, limit: int) -> Any:
        return await self.inner.scan(namespace, prefix=prefix, start=start, limit=limit)

    @override
    async def stage(self, session: SessionToken, keys: Collection[ObjectKey], plan: Plan) -> Any:
        return await self.around("stage", lambda: self.inner.stage(session, keys, plan))

    @override
    async def note_upload(self, session: SessionToken, seq: int, upload_id: str) -> None:
        await self.around("note_upload", lambda: self.inner.note_upload(session, seq, upload_id))

    @override
    async def commit(self, session: SessionToken, commit: Commit) -> None:
        await self.around("commit", lambda: self.inner.commit(session, commit))

    @override
    async def abort(self, session: SessionToken, *, patience: float | None = None) -> Any:
        return await self.around("abort", lambda: self.inner.abort(session, patience=patience))

    @override
    async def join(self, transaction: object) -> Any:
        return await self.inner.join(transaction)

    @override
    async def relocate(self, session: SessionToken, records: Sequence[Record]) -> None:
        await self.around("relocate", lambda: self.inner.relocate(session, records))

    @override
    async def settle(
        self,
        session: SessionToken,
        *,
        tombstones: Collection[Tombstone] = (),
        keep_locked: Collection[ObjectKey] = (),
        buried: Collection[Tombstone] = (),
    ) -> None:
        await self.around(
            "settle",
            lambda: self.inner.settle(
                session, tombstones=tombstones, keep_locked=keep_locked, buried=buried
            ),
        )

    @override
    async def tombstones(self, keys: Collection[ObjectKey]) -> Collection[Tombstone]:
        return await self.inner.tombstones(keys)

    @override
    async def due_tombstones(self, *, after: Tombstone | None, limit: int) -> Any:
        return await self.inner.due_tombstones(after=after, limit=limit)

    @override
    async def heartbeat(self, sessions: Collection[SessionToken]) -> Any:
        return await self.around("heartbeat", lambda: self.inner.heartbeat(sessions))

    @override
    async def claim(self, limit: int) -> Any:
        return await self.inner.claim(limit)

    @override
    async def sessions(self, *, after: str, limit: int) -> Any:
        return await self.inner.sessions(after=after, limit=limit)

    @override
    async def known(self, session_ids: Collection[str]) -> Any:
        return await self.inner.known(session_ids)


def _new_connector(config: FaultyConnectorConfig, settings: ConfigDict) -> Connector:
    plugin = plugins.registry().connector_for(config.inner)
    return FaultyConnector(plugin.factory(config.inner, settings), config.script)


def _new_backend(config: FaultyBackendConfig, settings: ConfigDict) -> Backend:
    plugin = plugins.registry().backend_for(config.inner)
    return FaultyBackend(plugin.factory(config.inner, settings), config.script)


@hookimpl
def fennflow_connectors() -> Iterable[ConnectorPlugin]:
    return [ConnectorPlugin("faulty", FaultyConnectorConfig, _new_connector)]


@hookimpl
def fennflow_backends() -> Iterable[BackendPlugin]:
    return [BackendPlugin("faulty", FaultyBackendConfig, _new_backend)]


THIS = sys.modules[__name__]
