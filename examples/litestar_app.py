"""The letters of `fastapi_app.py` with Litestar: a row and its files commit together.

To try it, let `uv run examples/s3_server.py letters` run in one terminal, and in another one:

```bash
export AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
uv run --group examples examples/litestar_app.py &
curl -F title=Holidays -F files=@README.md -F files=@LICENSE http://127.0.0.1:8000/letters
curl http://127.0.0.1:8000/letters/1
```
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from letters import UOW, Letter, body, contents, database, refusal, running
from litestar import Litestar, Request, Response, get, post, put, route
from litestar.datastructures import UploadFile
from litestar.di import NamedDependency, Provide
from litestar.enums import HttpMethod
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, MultipartBody
from litestar.response import Stream
from sqlalchemy.ext.asyncio import AsyncSession

from fennflow.exceptions import FennFlowException
from fennflow.web import answer_for


@asynccontextmanager
async def lifespan(_: Litestar) -> AsyncGenerator[None]:
    """Hold the resources that requests share."""
    async with running():
        yield


def refuse(_: Request[Any, Any, Any], error: FennFlowException) -> Response[dict[str, str]]:
    """Report what is wrong with a request."""
    status, detail = refusal(error)
    return Response({"detail": detail}, status_code=status)


@dataclass
class Form:
    """A letter as it is sent."""

    title: str
    files: list[UploadFile]


Database = NamedDependency[AsyncSession]


@post("/letters")
async def write(session: Database, data: MultipartBody[Form]) -> dict[str, object]:
    """Store a letter and its attachments: all of it, or nothing."""
    async with UOW(join=session) as uow:
        letter = Letter(title=data.title)
        session.add(letter)
        await session.flush()  # assigns the letter its id
        stored = await uow.attachments.at(f"letters/{letter.id}").put(*contents(data.files))
    return {"id": letter.id, "attachments": [path.name for path in stored]}


@put("/letters/{letter_id:int}")
async def rewrite(
    letter_id: FromPath[int], session: Database, data: MultipartBody[Form]
) -> dict[str, object]:
    """Replace the title, and attachments of the same name."""
    async with UOW(join=session) as uow:
        letter = await session.get(Letter, letter_id)
        if letter is None:
            raise NotFoundException("There is no such letter.")
        letter.title = data.title
        stored = await uow.attachments.at(f"letters/{letter_id}").put(*contents(data.files))
    return {"id": letter_id, "attachments": [path.name for path in stored]}


@get("/letters/{letter_id:int}")
async def read(letter_id: FromPath[int], session: Database) -> dict[str, object]:
    """Return a letter."""
    letter = await session.get(Letter, letter_id)
    if letter is None:
        raise NotFoundException("There is no such letter.")
    async with UOW() as uow:
        paths = [path async for path in uow.attachments.at(f"letters/{letter_id}").iter()]
    return {
        "id": letter_id,
        "title": letter.title,
        "attachments": [path.name for path in paths],
    }


@route("/letters/{letter_id:int}/{name:str}", http_method=[HttpMethod.GET, HttpMethod.HEAD])
async def download(
    letter_id: FromPath[int], name: FromPath[str], request: Request[Any, Any, Any]
) -> Response[Any]:
    """Return an attachment, or a part of it: players seek, browsers ask only for what is new."""
    async with UOW() as uow:
        info = await uow.attachments.at(f"letters/{letter_id}").stat(name)
    answer = answer_for(info, request.headers, download_as=name)
    headers = dict(answer.headers)
    media_type = headers.pop("Content-Type", None)
    if request.method == "HEAD" or answer.start == answer.end:
        return Response(b"", status_code=answer.status, headers=headers, media_type=media_type)
    return Stream(
        body(info, answer), status_code=answer.status, headers=headers, media_type=media_type
    )


@post("/letters/{letter_id:int}/{name:str}/upload-url")
async def upload_url(
    letter_id: FromPath[int], name: FromPath[str], session: Database
) -> dict[str, Any]:
    """Return a URL by which a browser sends a large attachment straight to S3, with these headers.

    Such an upload is not part of a transaction: `fennflow reconcile` records it.
    """
    if await session.get(Letter, letter_id) is None:
        raise NotFoundException("There is no such letter.")
    async with UOW() as uow:
        urls = await uow.attachments.at(f"letters/{letter_id}").generate_presigned_url(
            name, method="PUT", expires_in=600
        )
    return {"url": urls[0], "headers": urls.headers}


app = Litestar(
    route_handlers=[write, rewrite, read, download, upload_url],
    dependencies={"session": Provide(database)},
    exception_handlers={FennFlowException: refuse},
    lifespan=[lifespan],
    logging_config=None,  # the server's will do
)

if __name__ == "__main__":
    uvicorn.run(app)
