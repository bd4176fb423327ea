"""What type checkers infer of what users write: checked by the `types` session, never run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import assert_type

from pydantic import BaseModel, SecretStr
from sqlalchemy.ext.asyncio import AsyncSession

from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import InMemoryBackendConfig, SqlalchemyBackendConfig
from fennflow.connectors import (
    InMemoryConnectorConfig,
    ObstoreConnectorConfig,
    S3ConnectorConfig,
)
from fennflow.files import (
    BaseContent,
    ContentFactory,
    FileContent,
    JsonContent,
    ModelContent,
    StreamContent,
    TextContent,
    UrlContent,
)
from fennflow.paths import StoragePath
from fennflow.reports import Diagnosis, ReconcileReport, RecoveryReport, TransactionInfo
from fennflow.repositories import (
    CopyRepository,
    CrudRepository,
    DeletePrefixRepository,
    GeneratePresignedUrlRepository,
    GetPrefixRepository,
    GetRepository,
    ObjectStream,
    RepoField,
    S3RepoField,
    StatRepository,
    StreamRepository,
)
from fennflow.responses import (
    DeleteResponse,
    ListResponse,
    MediaResponse,
    ObjectInfo,
    PresignedUrlResponse,
    PutResponse,
)
from fennflow.sync import SyncRepository, SyncStream, SyncUnitOfWork, SyncWriter
from fennflow.web import Answer, answer_for


class Files(CrudRepository, StatRepository, CopyRepository, GeneratePresignedUrlRepository):
    """A repository of a user's own."""

    async def rename(self) -> int:
        return 1


class Invoice(BaseModel):
    number: int


class UOW(UnitOfWork):
    my_files = S3RepoField(Files, bucket_name="my-files")
    read_only = RepoField(GetRepository, namespace="other")
    config = ConfigDict(backend=InMemoryBackendConfig(), connector=S3ConnectorConfig())


assert_type(UOW.my_files, S3RepoField[Files])
assert_type(InMemoryConnectorConfig().name, str)
assert_type(S3ConnectorConfig().region_name, "str | None")


async def contents_have_types() -> None:
    async with UOW() as uow:
        files = await uow.my_files.get("a.txt")
        assert_type(files.one(TextContent).content, str)
        assert_type(files.one(), BaseContent)
        assert_type(await uow.my_files.read_text("a.txt"), str)
        assert_type(await uow.my_files.read_bytes(PurePosixPath("a.txt")), bytes)
        assert_type((await uow.my_files.list()).infos, Sequence[ObjectInfo])


async def fields_and_scopes() -> None:
    async with UOW() as uow:
        assert_type(uow, UOW)
        assert_type(uow.my_files, Files)
        assert_type(uow.my_files.at("a").at("b"), Files)
        assert_type(uow.my_files.cwd, StoragePath)
        assert_type(uow.read_only, GetRepository)
        assert_type(await uow.my_files.rename(), int)


async def responses() -> None:
    async with UOW() as uow:
        assert_type(await uow.my_files.put(TextContent.from_content("a")), PutResponse)
        page = await uow.my_files.list()
        assert_type(page, ListResponse)
        assert_type(page[0], StoragePath)
        assert_type(page.prefixes, tuple[StoragePath, ...])
        assert_type(await uow.my_files.delete(*page), DeleteResponse)
        assert_type(await uow.my_files.stat("a"), ObjectInfo)
        assert_type(await uow.my_files.stat("a", "b"), tuple[ObjectInfo, ...])
        assert_type(await uow.my_files.exists("a"), bool)
        urls = await uow.my_files.generate_presigned_url("a", method="PUT")
        assert_type(urls, PresignedUrlResponse)
        assert_type(urls[0], str)
        assert_type(await uow.my_files.copy("a", "b"), StoragePath)
        assert_type(await uow.my_files.move("a", "b", to=uow.read_only), StoragePath)


async def contents() -> None:
    async with UOW() as uow:
        files = await uow.my_files.get("a", "b")
        assert_type(files, MediaResponse)
        assert_type(files.one(), BaseContent)
        assert_type(files.texts, tuple[TextContent, ...])
        assert_type(files.texts[0].content, str)
        assert_type(files.filter(JsonContent), tuple[JsonContent, ...])
        assert_type(files.filter(ModelContent[Invoice]), tuple[ModelContent[Invoice], ...])
    invoice = ModelContent[Invoice].from_content(Invoice(number=7))
    assert_type(invoice, ModelContent[Invoice])
    assert_type(invoice.content, Invoice)
    assert_type(ContentFactory.from_bytes("text/css", b""), BaseContent)
    assert_type(ContentFactory.from_url("https://a.example"), UrlContent)


async def steps() -> None:
    async def do() -> int:
        return 1

    async def undo() -> None: ...

    async with UOW() as uow:
        assert_type(await uow.step(do, undo), int)
        assert_type(await uow.step(do, lambda: None), int)
        assert_type(await uow.step(lambda: "plain", undo), str)
        assert_type(await uow.step(partial(do), partial(undo)), int)


class Films(StreamRepository, GetPrefixRepository, DeletePrefixRepository):
    """What is too large for memory."""


class JoinedUOW(UnitOfWork):
    films = RepoField(Films, namespace="films")
    config = ConfigDict(
        connector=ObstoreConnectorConfig(url="s3://"),
        backend=SqlalchemyBackendConfig(url="sqlite:///a.db"),
    )


# A secret is given as a str, and is never shown.
assert_type(SqlalchemyBackendConfig(url="postgresql://db.internal/app").url, SecretStr)
assert_type(ObstoreConnectorConfig(url="s3://", options={"region": "eu-central-1"}).part_size, int)
assert_type(S3ConnectorConfig(aws_secret_access_key="s").aws_secret_access_key, "SecretStr | None")


async def streams(session: AsyncSession) -> None:
    async def blocks() -> AsyncGenerator[bytes]:
        yield b""

    assert_type(StreamContent.from_iterable(blocks(), filename="a.bin"), StreamContent)
    assert_type(FileContent.from_local_path("a.bin"), FileContent)
    async with JoinedUOW(join=session) as uow:
        assert_type(uow, JoinedUOW)
        async with uow.films.open("a.bin", start=1) as stream:
            assert_type(stream, ObjectStream)
            assert_type(stream.info, ObjectInfo)
            async for chunk in stream:
                assert_type(chunk, bytes)
        assert_type(await uow.films.at("a").get_prefix(), MediaResponse)
        assert_type(await uow.films.at("a").delete_prefix(), DeleteResponse)
        async with uow.savepoint() as value:
            assert_type(value, None)


class WithoutAsync(SyncUnitOfWork):
    my_files = RepoField(Files, namespace="files")
    films = RepoField(Films, namespace="films")
    read_only = RepoField(GetRepository, namespace="other")


def without_async() -> None:
    async def later() -> str:
        return ""

    with UOW.sync(auto_commit=False) as uow:
        assert_type(uow.my_files.put(TextContent.from_content("1")), PutResponse)
        assert_type(uow.my_files.at("a").get("b"), MediaResponse)
        assert_type(uow.commit(), None)
        assert_type(uow.step(lambda: 1, lambda: None), int)
        assert_type(uow.step(later, later), str)
    with WithoutAsync() as declared:
        assert_type(declared, WithoutAsync)
        assert_type(declared.my_files, SyncRepository[Files])
        assert_type(declared.my_files.at("a"), SyncRepository[Files])
        assert_type(declared.my_files.put(TextContent.from_content("1")), PutResponse)
        assert_type(declared.my_files.stat("a"), ObjectInfo)
        assert_type(declared.my_files.stat("a", "b"), tuple[ObjectInfo, ...])
        assert_type(declared.my_files.list(), ListResponse)
        assert_type(declared.films.open("a"), SyncStream)
        assert_type(declared.my_files.open("a", "wb"), SyncWriter)
        declared.read_only.put()  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]
        declared.wrong  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue] # noqa: B018
        with declared.savepoint() as value:
            assert_type(value, None)
    with WithoutAsync.lifespan():
        assert_type(WithoutAsync.recover(), RecoveryReport)
        assert_type(UOW.sync().reconcile(), Mapping[str, ReconcileReport])


async def maintenance() -> None:
    assert_type(await UOW.recover(), RecoveryReport)
    assert_type(await UOW.reconcile(), Mapping[str, ReconcileReport])
    assert_type(await UOW.transactions(), Sequence[TransactionInfo])
    assert_type(await UOW.diagnose(), Diagnosis)


def web(info: ObjectInfo) -> None:
    answer = answer_for(info, {})
    assert_type(answer, Answer)
    assert_type(answer.headers, Mapping[str, str])
