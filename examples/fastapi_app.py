"""Letters with attachments: a row and its files commit together, in one database transaction.

It takes S3 from the environment, as all programs on AWS do, and `BUCKET` and `DATABASE_URL`. To try
it, let `uv run examples/s3_server.py letters` run in one terminal, and in another one:

```bash
export AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
uv run --group examples examples/fastapi_app.py &
curl -F title=Holidays -F files=@README.md -F files=@LICENSE http://127.0.0.1:8000/letters
curl http://127.0.0.1:8000/letters/1
```
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import String
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import S3ConnectorConfig
from fennflow.exceptions import (
    FennFlowException,
    FileException,
    NoSuchKeyException,
    ObjectChangedException,
    PathException,
    RecordAlreadyExistsException,
    RecordLockedException,
)
from fennflow.files import BaseContent, ContentFactory
from fennflow.repositories import (
    CrudRepository,
    GeneratePresignedUrlRepository,
    S3RepoField,
    StatRepository,
    StreamRepository,
)
from fennflow.responses import ObjectInfo
from fennflow.web import Answer, answer_for

DATABASE = SqlalchemyBackendConfig(url=os.environ.get("DATABASE_URL", "sqlite:///letters.db"))
BUCKET = os.environ.get("BUCKET", "letters")


class Base(DeclarativeBase):
    """Of the application's own tables."""


class Letter(Base):
    """What is known of a letter; its attachments are files under its id."""

    __tablename__ = "letters"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(200))


class Attachments(CrudRepository, StatRepository, StreamRepository, GeneratePresignedUrlRepository):
    """What the application does with them."""


class UOW(UnitOfWork):
    """The files, with their catalog in the database of the rows."""

    attachments = S3RepoField(Attachments, bucket_name=BUCKET)
    config = ConfigDict(connector=S3ConnectorConfig(), backend=DATABASE)


engine = create_async_engine(DATABASE.url.get_secret_value())
sessions = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Make the tables, and hold FennFlow's connections open while the application runs."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with UOW.lifespan():
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
STATUS: dict[type[FennFlowException], int] = {
    PathException: 400,
    FileException: 400,
    NoSuchKeyException: 404,
    RecordLockedException: 409,
    RecordAlreadyExistsException: 409,
}


@app.exception_handler(FennFlowException)
async def refuse(_: Request, error: FennFlowException) -> Response:
    """Answer what is the client's fault as such; all else is the server's."""
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    detail = str(error) if status < 500 else "Internal Server Error"  # noqa: PLR2004
    return JSONResponse({"detail": detail}, status)


async def database() -> AsyncGenerator[AsyncSession]:
    """Yield a session, which is rolled back unless somebody committed it."""
    async with sessions() as session:
        yield session


Database = Annotated[AsyncSession, Depends(database)]


@app.post("/letters", status_code=201)
async def write(
    session: Database, title: Annotated[str, Form()], files: list[UploadFile]
) -> dict[str, object]:
    """Store a letter and its attachments: all of it, or nothing."""
    async with UOW(join=session) as uow:
        letter = Letter(title=title)
        session.add(letter)
        await session.flush()  # it gives the letter its id
        stored = await uow.attachments.at(f"letters/{letter.id}").put(*await contents(files))
    return {"id": letter.id, "attachments": [path.name for path in stored]}


@app.put("/letters/{letter_id}")
async def rewrite(
    letter_id: int, session: Database, title: Annotated[str, Form()], files: list[UploadFile]
) -> dict[str, object]:
    """Replace the title, and attachments of the same name."""
    async with UOW(join=session) as uow:
        letter = await session.get(Letter, letter_id)
        if letter is None:
            raise HTTPException(404, "There is no such letter.")
        letter.title = title
        stored = await uow.attachments.at(f"letters/{letter_id}").put(*await contents(files))
    return {"id": letter_id, "attachments": [path.name for path in stored]}


@app.get("/letters/{letter_id}")
async def read(letter_id: int, session: Database) -> dict[str, object]:
    """Return what is known of a letter."""
    letter = await session.get(Letter, letter_id)
    if letter is None:
        raise HTTPException(404, "There is no such letter.")
    async with UOW() as uow:
        paths = await uow.attachments.at(f"letters/{letter_id}").list()
    return {
        "id": letter_id,
        "title": letter.title,
        "attachments": [path.name for path in paths],
    }


@app.get("/letters/{letter_id}/{name}")
@app.head("/letters/{letter_id}/{name}")
async def download(letter_id: int, name: str, request: Request) -> Response:
    """Return an attachment, or a part of it: players seek, browsers ask only for what is new."""
    async with UOW() as uow:
        info = await uow.attachments.at(f"letters/{letter_id}").stat(name)
    answer = answer_for(info, request.headers, download_as=name)
    if request.method == "HEAD" or answer.start == answer.end:
        return Response(status_code=answer.status, headers=answer.headers)
    return StreamingResponse(body(info, answer), answer.status, answer.headers)


async def body(info: ObjectInfo, answer: Answer) -> AsyncGenerator[bytes]:
    """Read what was asked for, while it is sent.

    The unit of work is opened here, since a response that nobody reads never comes here.
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


@app.post("/letters/{letter_id}/{name}/upload-url")
async def upload_url(letter_id: int, name: str, session: Database) -> dict[str, str]:
    """Return a URL by which a browser sends a large attachment straight to S3.

    What arrives there is no part of a transaction: `fennflow reconcile` records it.
    """
    if await session.get(Letter, letter_id) is None:
        raise HTTPException(404, "There is no such letter.")
    async with UOW() as uow:
        [url] = await uow.attachments.at(f"letters/{letter_id}").generate_presigned_url(
            name, method="PUT", expires_in=600
        )
    return {"url": url}


async def contents(files: list[UploadFile]) -> list[BaseContent]:
    """Return uploads as files of the classes that their media types ask for."""
    return [
        ContentFactory.from_bytes(
            file.content_type or "application/octet-stream",
            await file.read(),
            filename=file.filename,
        )
        for file in files
    ]


if __name__ == "__main__":
    uvicorn.run(app)
