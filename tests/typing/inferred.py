"""What type checkers infer of what users write: checked by the `types` session, never run."""

from __future__ import annotations

from typing import assert_type

from pydantic import BaseModel

from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import InMemoryBackendConfig
from fennflow.connectors import InMemoryConnectorConfig, S3ConnectorConfig
from fennflow.files import (
    BaseContent,
    ContentFactory,
    JsonContent,
    ModelContent,
    TextContent,
    UrlContent,
)
from fennflow.paths import StoragePath
from fennflow.repositories import (
    CopyRepository,
    CrudRepository,
    GeneratePresignedUrlRepository,
    GetRepository,
    RepoField,
    S3RepoField,
    StatRepository,
)
from fennflow.responses import (
    DeleteResponse,
    ListResponse,
    MediaResponse,
    ObjectInfo,
    PresignedUrlResponse,
    PutResponse,
)


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
