"""Letters with attachments, for any web framework: rows, files, and helpers for both.

`fastapi_app.py` and `litestar_app.py` serve them. S3 comes from the environment, as for all programs
on AWS, and so do `BUCKET` and `DATABASE_URL`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Protocol

from sqlalchemy import String
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import S3ConnectorConfig
from fennflow.exceptions import (
    BackendUnavailableException,
    ConnectorUnavailableException,
    FennFlowException,
    FileException,
    NoSuchKeyException,
    ObjectChangedException,
    PathException,
    RecordAlreadyExistsException,
    RecordLockedException,
)
from fennflow.files import StreamContent
from fennflow.repositories import (
    CrudRepository,
    GeneratePresignedUrlRepository,
    S3RepoField,
    StatRepository,
    StreamRepository,
)
from fennflow.responses import ObjectInfo
from fennflow.web import Answer

logger = logging.getLogger("letters")

DATABASE = SqlalchemyBackendConfig(url=os.environ.get("DATABASE_URL", "sqlite:///letters.db"))
BUCKET = os.environ.get("BUCKET", "letters")


class Base(DeclarativeBase):
    """The base of the application's tables."""


class Letter(Base):
    """A letter; its attachments are files under its id."""

    __tablename__ = "letters"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(200))


class Attachments(CrudRepository, StatRepository, StreamRepository, GeneratePresignedUrlRepository):
    """The repository of the attachments."""


class UOW(UnitOfWork):
    """The files, with their catalog in the database of the rows."""

    attachments = S3RepoField(Attachments, bucket_name=BUCKET)
    config = ConfigDict(connector=S3ConnectorConfig(), backend=DATABASE)


engine = create_async_engine(DATABASE.url.get_secret_value())
sessions = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def running() -> AsyncGenerator[None]:
    """Make the tables, and hold FennFlow's connections open while the application runs."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with UOW.lifespan():
        yield
    await engine.dispose()


async def database() -> AsyncGenerator[AsyncSession]:
    """Yield a session, which is rolled back unless it was committed."""
    async with sessions() as session:
        yield session


STATUS: dict[type[FennFlowException], int] = {
    PathException: 400,
    FileException: 400,
    NoSuchKeyException: 404,
    RecordLockedException: 409,
    RecordAlreadyExistsException: 409,
    BackendUnavailableException: 503,
    ConnectorUnavailableException: 503,
}


def refusal(error: FennFlowException) -> tuple[int, str]:
    """Return status and text for an error; errors that are not the client's fault are logged, not shown."""
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    if status < 500:  # noqa: PLR2004
        return status, str(error)
    logger.error("A request failed: %s", error, exc_info=error)
    return status, HTTPStatus(status).phrase


class Upload(Protocol):
    """A file of a form, which the frameworks hand over in much the same way."""

    @property
    def content_type(self) -> str | None:
        """Its media type, as the client sent it."""

    @property
    def filename(self) -> str | None:
        """Its name, as the client sent it."""

    async def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes."""
        ...


def contents(files: Sequence[Upload]) -> list[StreamContent]:
    """Return uploads as files that are read while they are sent, a piece at a time."""
    return [StreamContent.from_iterable(file) for file in files]


async def body(info: ObjectInfo, answer: Answer) -> AsyncGenerator[bytes]:
    """Read the requested bytes while they are sent.

    The unit of work is opened here, since a response that is never read never comes here.
    """
    async with (
        UOW() as uow,
        uow.attachments.open(info.path, start=answer.start, end=answer.end) as stream,
    ):
        if stream.info.sha256 != info.sha256:
            message = f"{info.path} was replaced while it was asked for."
            raise ObjectChangedException(message)
        async for chunk in stream:
            yield chunk
