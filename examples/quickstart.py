"""The main job on embedded defaults: in memory, then over HTTP on an S3 server started here.

Run it with `uv run --group quickstart examples/quickstart.py`.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from aiobotocore.session import AioSession

from fennflow import ConfigDict, UnitOfWork
from fennflow.connectors import S3ConnectorConfig
from fennflow.files import BinaryContent, JsonContent, TextContent
from fennflow.repositories import CrudRepository, S3RepoField
from fennflow.testing import S3Server, seaweedfs_server

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

BUCKET = "my-files"


class UOW(UnitOfWork):
    """Files in memory: `config` says nothing else."""

    my_files = S3RepoField(CrudRepository, bucket_name=BUCKET)


async def main_job(uow_class: type[UOW]) -> None:
    async with uow_class() as uow:
        await uow.my_files.at("folder1").put(
            TextContent.from_content("Hello, world!", filename="hello.txt"),
            JsonContent.from_content([1, 2, 3], filename="numbers.json"),
            BinaryContent(data=b"some bytes", media_type="text/plain", filename="raw.txt"),
        )
        for file in await uow.my_files.get(*await uow.my_files.list()):
            print(f"  {file.path}: {type(file).__name__} {file.content!r}")


async def fail_half_way(uow_class: type[UOW]) -> None:
    try:
        async with uow_class() as uow:
            folder = uow.my_files.at("folder1")
            await folder.put(TextContent.from_content("overwritten", filename="hello.txt"))
            await folder.put(TextContent.from_content("new", filename="new.txt"))
            await folder.delete("numbers.json")
            print("  inside:", [path.name for path in await folder.list()])
            raise RuntimeError("something goes wrong half way")
    except RuntimeError as error:
        print(f"  {error!r} left the block")


def plain_client(server: S3Server) -> AbstractAsyncContextManager[S3Client]:
    """Return a client that knows nothing of FennFlow."""
    return AioSession().create_client(
        "s3",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )


async def show_bucket(server: S3Server) -> None:
    async with plain_client(server) as client:
        listed = await client.list_objects_v2(Bucket=BUCKET)
        for item in listed["Contents"]:
            answer = await client.get_object(Bucket=BUCKET, Key=item["Key"])
            print(f"  {item['Key']}: {await answer['Body'].read()!r}")


async def on_s3(server: S3Server) -> None:
    connector = S3ConnectorConfig(
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )

    class S3UOW(UOW):
        config = ConfigDict(connector=connector)

    async with plain_client(server) as client:
        await client.create_bucket(Bucket=BUCKET)
    print(f"\nThe same on an S3 server at {server.url}:")
    await main_job(S3UOW)
    print("\nA unit of work that fails half way:")
    await fail_half_way(S3UOW)
    print("\nThe bucket, seen without FennFlow, is untouched:")
    await show_bucket(server)


if __name__ == "__main__":
    print("In memory:")
    asyncio.run(main_job(UOW))
    with seaweedfs_server() as server:
        asyncio.run(on_s3(server))
