"""A page that uploads files directly to the store; each commits together with its row.

To try it, let `uv run examples/s3_server.py videos` run in one terminal, and in another one:

```bash
export AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
uv run --group examples examples/direct_upload.py
```

Then open http://127.0.0.1:8000. Another store needs CORS rules for the page: docs/direct-uploads.md has them.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel, Field
from sqlalchemy import String, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.requests import Request

from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import S3ConnectorConfig
from fennflow.exceptions import (
    FileException,
    NoSuchKeyException,
    PathException,
    RecordAlreadyExistsException,
)
from fennflow.repositories import (
    GeneratePresignedUrlRepository,
    S3RepoField,
    UploadTicketRepository,
)
from fennflow.responses import UploadTicket
from fennflow.web import fastapi_dependency

DATABASE = SqlalchemyBackendConfig(url=os.environ.get("DATABASE_URL", "sqlite:///videos.db"))
PAGE = Path(__file__).with_suffix(".html")
MEBIBYTE = 1 << 20


class Base(DeclarativeBase):
    """The base of the application's tables."""


class Video(Base):
    """A video; its file is named after its id."""

    __tablename__ = "videos"
    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    title: Mapped[str] = mapped_column(String(200))
    size: Mapped[int]


class Videos(UploadTicketRepository, GeneratePresignedUrlRepository):
    """The repository of the files."""


class UOW(UnitOfWork):
    """The files, with their catalog in the database of the rows."""

    videos = S3RepoField(Videos, bucket_name=os.environ.get("BUCKET", "videos"))
    config = ConfigDict(connector=S3ConnectorConfig(), backend=DATABASE)


engine = create_async_engine(DATABASE.url.get_secret_value())
sessions = async_sessionmaker(engine, expire_on_commit=False)


async def database() -> AsyncGenerator[AsyncSession]:
    """Yield a session, which is rolled back unless it was committed."""
    async with sessions() as session:
        yield session


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Make the tables, and hold FennFlow's connections open while the application runs."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with UOW.lifespan():
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
Database = Annotated[AsyncSession, Depends(database)]
Files = Annotated[UOW, fastapi_dependency(UOW)]
Joined = Annotated[UOW, fastapi_dependency(UOW, join=database)]


@app.exception_handler(FileException)
@app.exception_handler(NoSuchKeyException)
@app.exception_handler(PathException)
@app.exception_handler(RecordAlreadyExistsException)
async def refuse(_: Request, error: Exception) -> JSONResponse:
    """Report what is wrong with an upload."""
    return JSONResponse({"detail": str(error)}, 400)


class Wanted(BaseModel):
    """An upload that a page requests."""

    size: int = Field(ge=0, le=5000 * MEBIBYTE)
    media_type: str = "application/octet-stream"


class Uploaded(BaseModel):
    """An upload that a page has completed."""

    token: str
    title: str = Field(max_length=200)


@app.get("/")
async def page() -> FileResponse:
    """Return the page."""
    return FileResponse(PAGE)


@app.post("/tickets", status_code=201)
async def allow(wanted: Wanted, uow: Files) -> UploadTicket:
    """Allow one upload: large ones in parts."""
    return await uow.videos.upload_ticket(
        str(uuid.uuid4()),
        max_size=5000 * MEBIBYTE,
        size=wanted.size,
        media_type=wanted.media_type,
        expires_in=600,
        method="MULTIPART" if wanted.size > 16 * MEBIBYTE else "PUT",
    )


@app.post("/videos", status_code=201)
async def accept(uploaded: Uploaded, session: Database, uow: Joined) -> dict[str, object]:
    """Make the upload a file with a row: both, or none."""
    info = await uow.videos.accept(uploaded.token)
    session.add(Video(id=str(info.path), title=uploaded.title, size=info.size))
    return {"id": info.path, "size": info.size, "media_type": info.media_type}


@app.get("/videos")
async def videos(session: Database) -> list[dict[str, object]]:
    """List the videos."""
    found = await session.scalars(select(Video).order_by(Video.title))
    return [{"id": each.id, "title": each.title, "size": each.size} for each in found]


@app.get("/videos/{video_id}")
async def download(video_id: uuid.UUID, session: Database, uow: Files) -> RedirectResponse:
    """Send the browser to the store, which has it save the file under its title."""
    video = await session.get(Video, str(video_id))
    if video is None:
        raise HTTPException(404, "There is no such video.")
    [url] = await uow.videos.generate_presigned_url(video.id, download_as=video.title)
    return RedirectResponse(url)


if __name__ == "__main__":
    uvicorn.run(app)
