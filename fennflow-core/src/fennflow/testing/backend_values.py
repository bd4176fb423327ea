"""Transactions, records and intents for the tests of backends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from fennflow import ConfigDict, plugins
from fennflow.backends import (
    Backend,
    Commit,
    Intent,
    ObjectKey,
    Placement,
    Record,
    TransactionToken,
    WriteId,
)
from fennflow.config import BackendConfig
from fennflow.connectors import Location

A, B, C = (ObjectKey("bucket", name) for name in "abc")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@asynccontextmanager
async def opened(config: BackendConfig, **changes: Any) -> AsyncGenerator[Backend]:
    """Open a backend as an engine does, through its plugin.

    Args:
        config: of the backend.
        changes: to the whole configuration, for instance its `lease_ttl`.
    """
    settings = ConfigDict(backend=config, **changes)
    backend = plugins.registry().backend_for(config).factory(config, settings)
    try:
        await backend.open()
        yield backend
    finally:
        await backend.aclose()


def new_transaction() -> TransactionToken:
    """Return a transaction that is not in any journal."""
    return TransactionToken(str(uuid4()))


def record(
    key: ObjectKey, transaction: TransactionToken, *, etag: str = "e1", seq: int = 1
) -> Record:
    """Return a record with something in every field."""
    return Record(
        namespace=key.namespace,
        key=key.key,
        location=Location(key.key, "v1"),
        etag=etag,
        size=3,
        media_type="text/plain",
        content_type="text",
        sha256="0" * 64,
        metadata={"schlüssel": "wert"},
        created_at=NOW,
        modified_at=NOW,
        write=WriteId(transaction.transaction_id, seq),
    )


def plan_for(*keys: ObjectKey) -> Callable[[Mapping[ObjectKey, Record]], Sequence[Intent]]:
    """Return a plan that writes an intent for each key."""
    return lambda _records: [
        Intent(
            seq=seq,
            namespace=key.namespace,
            key=key.key,
            placement=Placement.DIRECT,
            target=key.key,
        )
        for seq, key in enumerate(keys, 1)
    ]


async def put(backend: Backend, *keys: ObjectKey, etag: str = "e1") -> TransactionToken:
    """Commit a record for each key."""
    transaction = new_transaction()
    await backend.begin_writes(transaction, keys, plan_for(*keys))
    records = [record(key, transaction, etag=etag, seq=seq) for seq, key in enumerate(keys, 1)]
    await backend.commit(transaction, Commit(records=records))
    return transaction


def run(
    config: BackendConfig, scenario: Callable[[Backend], Awaitable[None]], **changes: Any
) -> None:
    """Run a scenario on a backend."""

    async def main() -> None:
        async with opened(config, **changes) as backend:
            await scenario(backend)

    asyncio.run(main())
