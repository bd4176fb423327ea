"""The released fennflow 0.8.1, in an environment and a process of its own; started by `subjects.py`.

Each line on its standard input is an operation and its keys, each line of its output says it is done.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any


def unit_of_work(options: dict[str, Any]) -> Any:
    """Return the class of its unit of work, made from `{"endpoint": …, "bucket": …}`."""
    from aiobotocore.config import AioConfig

    from fennflow import ConfigDict, UnitOfWork
    from fennflow.backends import InMemoryBackendConfig
    from fennflow.connectors import S3ConnectorConfig
    from fennflow.repositories import (
        DeleteRepository,
        GetRepository,
        PutRepository,
        S3RepoField,
    )

    class Files(PutRepository, GetRepository, DeleteRepository):
        pass

    class UOW(UnitOfWork):
        files = S3RepoField(Files, bucket_name=options["bucket"])
        config = ConfigDict(
            backend=InMemoryBackendConfig(),
            connector=S3ConnectorConfig(
                aws_access_key_id=options["access_key"],
                aws_secret_access_key=options["secret_key"],
                endpoint_url=options["endpoint"],
                aiobotocore_config=AioConfig(
                    # It has no bound of its own.
                    max_pool_connections=options["in_flight"],
                    region_name="us-east-1",
                    s3={"addressing_style": "path"},
                ),
            ),
        )

    return UOW


async def main() -> None:
    options = json.loads(sys.argv[1])
    uow_class = unit_of_work(options)
    from fennflow.files import BinaryContent

    body = bytes(options["size"])

    def content(key: str) -> Any:
        return BinaryContent(data=body, media_type="application/octet-stream", filename=key)

    async def create(keys: list[str]) -> None:
        async with uow_class() as uow:
            await uow.files.put(*map(content, keys))

    async def read(keys: list[str]) -> None:
        async with uow_class() as uow:
            assert len(await uow.files.get(*keys)) == len(keys)

    async def delete(keys: list[str]) -> None:
        async with uow_class() as uow:
            await uow.files.delete(*keys)

    async def rollback(keys: list[str]) -> None:
        async with uow_class(auto_commit=False) as uow:
            await uow.files.put(*map(content, keys))

    async def units(keys: list[str]) -> None:
        turns = asyncio.Semaphore(options["in_flight"])

        async def one(key: str) -> None:
            async with turns:
                await create([key])

        await asyncio.gather(*map(one, keys))

    operations = {
        "create": create,
        "overwrite": create,
        "read": read,
        "delete": delete,
        "rollback": rollback,
        "units": units,
    }
    while line := await asyncio.to_thread(sys.stdin.readline):
        operation, keys = json.loads(line)
        # It gives names an extension that have none.
        await operations[operation]([f"{key}.bin" for key in keys])
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
