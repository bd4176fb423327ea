"""What is measured: FennFlow, and what one would write without it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import json
import shutil
import sys
from abc import ABC, abstractmethod
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import obstore
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from obstore.store import S3Store
from typing_extensions import override

from fennflow import ConfigDict, ReconcileConfig, UnitOfWork
from fennflow.backends import BucketBackendConfig, InMemoryBackendConfig, SqlalchemyBackendConfig
from fennflow.config import BackendConfig, ConnectorConfig
from fennflow.connectors import ObstoreConnectorConfig, S3ConnectorConfig
from fennflow.files import BinaryContent, StreamContent
from fennflow.repositories import CrudRepository, RepoField, StreamRepository
from fennflow.testing import S3Server

IN_FLIGHT = 32
RELEASED = "0.8.1"
BODY = bytes(range(256)) * 4
MiB = 1 << 20
BLOCK = bytes(range(256)) * (MiB // 256)
PART = 8 * MiB

OPERATIONS = ("create", "overwrite", "read", "delete", "rollback", "units")
"""`units`: each object in a unit of work of its own, `IN_FLIGHT` at once."""


class Subject(ABC):
    """What is measured."""

    name: str

    @abstractmethod
    async def create(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def overwrite(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def read(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def delete(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def rollback(self, keys: Sequence[str]) -> None: ...
    @abstractmethod
    async def units(self, keys: Sequence[str]) -> None: ...


class StreamSubject(Subject):
    """One whose streams are measured, too."""

    @abstractmethod
    async def upload(self, key: str, size: int) -> None: ...
    @abstractmethod
    async def download(self, key: str) -> int: ...


async def in_flight(
    items: Iterable[Any], work: Callable[[Any], Awaitable[object]], limit: int = IN_FLIGHT
) -> None:
    """Do the work for all, so many at a time."""
    todo = iter(items)

    async def worker() -> None:
        for item in todo:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(limit):
            group.create_task(worker())


class Raw(StreamSubject):
    """aiobotocore, used directly."""

    name = "aiobotocore"

    def __init__(self, client: Any, bucket: str) -> None:
        self.client = client
        self.bucket = bucket

    @override
    async def create(self, keys: Sequence[str]) -> None:
        await in_flight(
            keys,
            lambda key: self.client.put_object(
                Bucket=self.bucket, Key=key, Body=BODY, IfNoneMatch="*"
            ),
        )

    @override
    async def overwrite(self, keys: Sequence[str]) -> None:
        await in_flight(
            keys, lambda key: self.client.put_object(Bucket=self.bucket, Key=key, Body=BODY)
        )

    @override
    async def read(self, keys: Sequence[str]) -> None:
        async def get(key: str) -> None:
            answer = await self.client.get_object(Bucket=self.bucket, Key=key)
            async with answer["Body"] as body:
                assert len(await body.read()) == len(BODY)

        await in_flight(keys, get)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            objects = [{"Key": key} for key in keys[start : start + 1000]]
            await self.client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True}
            )

    @override
    async def rollback(self, keys: Sequence[str]) -> None:
        await self.create(keys)
        await self.delete(keys)

    @override
    async def units(self, keys: Sequence[str]) -> None:
        await self.create(keys)

    @override
    async def upload(self, key: str, size: int) -> None:
        target = {"Bucket": self.bucket, "Key": key}
        upload = (await self.client.create_multipart_upload(**target))["UploadId"]
        parts: list[dict[str, Any]] = []

        async def send(number: int) -> None:
            body = BLOCK * (PART // MiB)
            answer = await self.client.upload_part(
                **target, UploadId=upload, PartNumber=number, Body=body
            )
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})

        await in_flight(range(1, size // PART + 1), send, limit=4)
        parts.sort(key=lambda part: part["PartNumber"])
        await self.client.complete_multipart_upload(
            **target, UploadId=upload, MultipartUpload={"Parts": parts}
        )

    @override
    async def download(self, key: str) -> int:
        answer = await self.client.get_object(Bucket=self.bucket, Key=key)
        async with answer["Body"] as body:
            return sum([len(chunk) async for chunk in body.iter_chunks(1 << 18)])


class Obstore(Raw):
    """obstore, used directly."""

    name = "obstore"

    def __init__(self, store: S3Store) -> None:
        self.store = store

    @override
    async def create(self, keys: Sequence[str]) -> None:
        await in_flight(keys, lambda key: obstore.put_async(self.store, key, BODY, mode="create"))

    @override
    async def overwrite(self, keys: Sequence[str]) -> None:
        await in_flight(keys, lambda key: obstore.put_async(self.store, key, BODY))

    @override
    async def read(self, keys: Sequence[str]) -> None:
        async def get(key: str) -> None:
            answer = await obstore.get_async(self.store, key)
            assert len(await answer.bytes_async()) == len(BODY)

        await in_flight(keys, get)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        await obstore.delete_async(self.store, list(keys))

    @override
    async def upload(self, key: str, size: int) -> None:
        async def blocks() -> AsyncGenerator[bytes]:
            for _ in range(size // MiB):
                yield BLOCK

        await obstore.put_async(self.store, key, blocks(), chunk_size=PART, max_concurrency=4)

    @override
    async def download(self, key: str) -> int:
        answer = await obstore.get_async(self.store, key)
        return sum([len(chunk) async for chunk in answer.stream(min_chunk_size=1 << 18)])


class Boto3(Raw):
    """boto3 in as many threads as the others have requests in flight."""

    name = "boto3, threads"

    def __init__(self, client: Any, bucket: str, threads: ThreadPoolExecutor) -> None:
        super().__init__(client, bucket)
        self.threads = threads

    async def each(self, keys: Iterable[str], work: Callable[[str], object]) -> None:
        loop = asyncio.get_running_loop()
        await in_flight(keys, lambda key: loop.run_in_executor(self.threads, work, key))

    @override
    async def create(self, keys: Sequence[str]) -> None:
        target = {"Bucket": self.bucket, "Body": BODY, "IfNoneMatch": "*"}
        await self.each(keys, lambda key: self.client.put_object(Key=key, **target))

    @override
    async def overwrite(self, keys: Sequence[str]) -> None:
        target = {"Bucket": self.bucket, "Body": BODY}
        await self.each(keys, lambda key: self.client.put_object(Key=key, **target))

    @override
    async def read(self, keys: Sequence[str]) -> None:
        def get(key: str) -> None:
            body = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            assert len(body) == len(BODY)

        await self.each(keys, get)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        objects = [{"Key": key} for key in keys]
        await asyncio.to_thread(
            self.client.delete_objects,
            Bucket=self.bucket,
            Delete={"Objects": objects, "Quiet": True},
        )

    @override
    async def upload(self, key: str, size: int) -> None:
        from boto3.s3.transfer import TransferConfig

        transfer = TransferConfig(multipart_chunksize=PART, max_concurrency=4)
        await asyncio.to_thread(
            self.client.upload_fileobj, Blocks(size), self.bucket, key, Config=transfer
        )

    @override
    async def download(self, key: str) -> int:
        def get() -> int:
            body = self.client.get_object(Bucket=self.bucket, Key=key)["Body"]
            return sum(map(len, body.iter_chunks(1 << 18)))

        return await asyncio.to_thread(get)


class Blocks(io.RawIOBase):
    """A file of so many bytes, not stored anywhere."""

    def __init__(self, size: int) -> None:
        self.left = size

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.left, MiB)
        buffer[:count] = BLOCK[:count]
        self.left -= count
        return count


class S3fs(Raw):
    """s3fs, by its asynchronous methods."""

    name = "s3fs"

    def __init__(self, files: Any, bucket: str) -> None:
        self.files = files
        self.bucket = bucket

    def path(self, key: str) -> str:
        return f"{self.bucket}/{key}"

    @override
    async def create(self, keys: Sequence[str]) -> None:
        await in_flight(keys, lambda key: self.files._pipe_file(self.path(key), BODY))

    overwrite = create

    @override
    async def read(self, keys: Sequence[str]) -> None:
        await in_flight(keys, lambda key: self.files._cat_file(self.path(key)))

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        await self.files._bulk_delete([self.path(key) for key in keys])


class Released(Subject):
    """fennflow 0.8.1 with its catalog in memory: `released.py`."""

    name = f"fennflow {RELEASED}"

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def _do(self, operation: str, keys: Sequence[str]) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([operation, keys]).encode() + b"\n")
        assert await self.process.stdout.readline() == b"done\n"

    @override
    async def create(self, keys: Sequence[str]) -> None:
        await self._do("create", keys)

    @override
    async def overwrite(self, keys: Sequence[str]) -> None:
        await self._do("overwrite", keys)

    @override
    async def read(self, keys: Sequence[str]) -> None:
        await self._do("read", keys)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        await self._do("delete", keys)

    @override
    async def rollback(self, keys: Sequence[str]) -> None:
        await self._do("rollback", keys)

    @override
    async def units(self, keys: Sequence[str]) -> None:
        await self._do("units", keys)


@asynccontextmanager
async def released(server: S3Server, bucket: str, directory: Path) -> AsyncGenerator[Released]:
    """Run it; uv makes its environment, and it makes a file in the directory."""
    options = {
        "endpoint": server.url,
        "access_key": server.access_key,
        "secret_key": server.secret_key,
        "bucket": bucket,
        "in_flight": IN_FLIGHT,
        "size": len(BODY),
    }
    command = ["uv", "run", "--quiet", "--no-project", "--python", sys.executable]
    command += ["--with", f"fennflow=={RELEASED}", "python"]
    script = str(Path(__file__).with_name("released.py"))
    process = await asyncio.create_subprocess_exec(
        *command,
        script,
        json.dumps(options),
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,
        cwd=directory,
    )
    try:
        yield Released(process)
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Files(CrudRepository, StreamRepository):
    """What a benchmark needs."""


class FennFlow(StreamSubject):
    """One unit of work for all objects of an operation."""

    def __init__(
        self, name: str, connector: ConnectorConfig, backend: BackendConfig, bucket: str
    ) -> None:
        class UOW(UnitOfWork):
            files = RepoField(Files, namespace=bucket)
            config = ConfigDict(
                connector=connector,
                backend=backend,
                max_concurrency=IN_FLIGHT,
                reconcile=ReconcileConfig(frequency="never"),
            )

        self.name = name
        self.uow = UOW

    @override
    async def create(self, keys: Sequence[str]) -> None:
        async with self.uow() as uow:
            await uow.files.put(*map(content, keys))

    overwrite = create

    @override
    async def read(self, keys: Sequence[str]) -> None:
        async with self.uow() as uow:
            assert len(await uow.files.get(*keys)) == len(keys)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        async with self.uow() as uow:
            await uow.files.delete(*keys)

    @override
    async def rollback(self, keys: Sequence[str]) -> None:
        async with self.uow(auto_commit=False) as uow:
            await uow.files.put(*map(content, keys))

    @override
    async def units(self, keys: Sequence[str]) -> None:
        await in_flight(keys, lambda key: self.create([key]))

    @override
    async def upload(self, key: str, size: int) -> None:
        async def blocks() -> AsyncGenerator[bytes]:
            for _ in range(size // MiB):
                yield BLOCK

        stream = StreamContent.from_iterable(blocks(), filename=key, media_type="a/b", size=size)
        async with self.uow() as uow:
            await uow.files.put(stream)

    @override
    async def download(self, key: str) -> int:
        async with self.uow() as uow, uow.files.open(key) as stream:
            return sum([len(chunk) async for chunk in stream])


class WithoutAsync(Subject):
    """The same without `async`, in a thread of the caller's."""

    name = "FennFlow, without async"

    def __init__(self, same: FennFlow, threads: ThreadPoolExecutor) -> None:
        self.uow = same.uow
        self.threads = threads

    async def call(self, work: Callable[..., object], *arguments: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def _put(self, keys: Sequence[str], *, auto_commit: bool = True) -> None:
        with self.uow.sync(auto_commit=auto_commit) as uow:
            uow.files.put(*map(content, keys))

    @override
    async def create(self, keys: Sequence[str]) -> None:
        await self.call(self._put, keys)

    overwrite = create

    @override
    async def read(self, keys: Sequence[str]) -> None:
        def get() -> None:
            with self.uow.sync() as uow:
                assert len(uow.files.get(*keys)) == len(keys)

        await self.call(get)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        def delete() -> None:
            with self.uow.sync() as uow:
                uow.files.delete(*keys)

        await self.call(delete)

    @override
    async def rollback(self, keys: Sequence[str]) -> None:
        await self.call(partial(self._put, keys, auto_commit=False))

    @override
    async def units(self, keys: Sequence[str]) -> None:
        await in_flight(keys, lambda key: self.create([key]))


@asynccontextmanager
async def without_async(same: FennFlow) -> AsyncGenerator[WithoutAsync]:
    """Hold its engine open, which is another one."""
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        found = WithoutAsync(same, threads)
        lifespan = same.uow.sync().lifespan()
        await found.call(lifespan.__enter__)
        try:
            yield found
        finally:
            await found.call(lifespan.__exit__, None, None, None)


def add_content_md5(request: Any, **_kwargs: Any) -> None:
    """Name the MD5 that weak servers ask of DeleteObjects."""
    digest = hashlib.md5(request.body, usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def content(key: str) -> BinaryContent:
    return BinaryContent(data=BODY, media_type="application/octet-stream", filename=key)


@asynccontextmanager
async def subjects(
    server: S3Server,
    directory: Path,
    *,
    postgresql: str | None = None,
    strong: bool = True,
    peer: bool = True,
) -> AsyncGenerator[list[Subject]]:
    """Open all that is measured, warm; s3fs where it is installed.

    Args:
        server: every name is a bucket of it, or those that `buckets` makes.
        directory: for SQLite.
        postgresql: URL of a database.
        strong: whether the server does what S3 does. On a weak one obstore deletes one by one, and
            s3fs not at all.
        peer: whether the released fennflow is measured, too, where uv is installed.
    """
    buckets = (f"bucket-{number}" for number in itertools.count(1))
    async with AsyncExitStack() as stack:
        credentials: dict[str, Any] = {
            "aws_access_key_id": server.access_key,
            "aws_secret_access_key": server.secret_key,
            "region_name": "us-east-1",
            "endpoint_url": server.url,
        }
        config = AioConfig(max_pool_connections=50, s3={"addressing_style": "path"})
        session = AioSession()
        session.register("before-sign.s3.DeleteObjects", add_content_md5)
        client = await stack.enter_async_context(
            session.create_client("s3", config=config, **credentials)
        )

        async def bucket() -> str:
            name = next(buckets)
            await client.create_bucket(Bucket=name)
            return name

        found: list[Subject] = [Raw(client, await bucket())]
        backends: dict[str, BackendConfig] = {
            "memory": InMemoryBackendConfig(),
            "SQLite": SqlalchemyBackendConfig(url=f"sqlite:///{directory}/catalog.db"),
        }
        if postgresql is not None:
            backends["PostgreSQL"] = SqlalchemyBackendConfig(url=postgresql)
        s3 = S3ConnectorConfig(**credentials, multipart_part_size=PART)
        ours = [
            FennFlow(f"FennFlow, {name}", s3, backend, await bucket())
            for name, backend in backends.items()
        ]
        if strong:
            own = await bucket()
            backend = BucketBackendConfig(namespace=own)
            ours.append(FennFlow("FennFlow, bucket", s3, backend, own))
        options = {
            "access_key_id": server.access_key,
            "secret_access_key": server.secret_key,
            "region": "us-east-1",
            "endpoint": server.url,
        }
        rust = ObstoreConnectorConfig(url="s3://", options=options, part_size=PART)
        ours.append(FennFlow("FennFlow, obstore", rust, backends["memory"], await bucket()))
        for each in ours:
            await stack.enter_async_context(each.uow.lifespan())
        found += ours
        found.append(
            await stack.enter_async_context(
                without_async(FennFlow("", s3, backends["memory"], await bucket()))
            )
        )
        allow: Any = {"allow_http": True}
        if not strong:
            options["disable_bulk_delete"] = "true"
        store = S3Store(await bucket(), config=options, client_options=allow)  # type: ignore[arg-type]
        found.append(Obstore(store))
        if find_spec("boto3"):
            import boto3
            from botocore.config import Config

            pool = Config(max_pool_connections=50, s3={"addressing_style": "path"})
            threads = stack.enter_context(ThreadPoolExecutor(IN_FLIGHT))
            made = boto3.client("s3", config=pool, **credentials)
            made.meta.events.register("before-sign.s3.DeleteObjects", add_content_md5)
            found.append(Boto3(made, await bucket(), threads))
        if shutil.which("uv") and peer:
            found.append(
                await stack.enter_async_context(released(server, await bucket(), directory))
            )
        if find_spec("s3fs") and strong:
            from s3fs import S3FileSystem

            files = S3FileSystem(
                key=server.access_key,
                secret=server.secret_key,
                endpoint_url=server.url,
                client_kwargs={"region_name": "us-east-1"},
                config_kwargs={"max_pool_connections": 50, "s3": {"addressing_style": "path"}},
                asynchronous=True,
                skip_instance_cache=True,
            )
            stack.push_async_callback((await files.set_session()).close)
            found.append(S3fs(files, await bucket()))
        for subject in found:
            await subject.create(["warm"])
            await subject.read(["warm"])
        yield found
