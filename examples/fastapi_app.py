"""Letters with attachments: a row and its files commit together, in one database transaction.

The parts that do not depend on the framework are in `letters.py`. To try it, let `uv run
examples/s3_server.py letters` run in one terminal, and in another one:

```bash
export AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
uv run --group examples examples/fastapi_app.py &
curl -F title=Holidays -F files=@README.md -F files=@LICENSE http://127.0.0.1:8000/letters
curl http://127.0.0.1:8000/letters/1
```
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from letters import UOW, Letter, body, contents, database, refusal, running
from sqlalchemy.ext.asyncio import AsyncSession

from fennflow.exceptions import FennFlowException
from fennflow.web import answer_for, fastapi_dependency


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Hold the resources that requests share."""
    async with running():
        yield


app = FastAPI(lifespan=lifespan)
Database = Annotated[AsyncSession, Depends(database)]
# They end before the response is sent, so a commit that fails is answered as an error.
Files = Annotated[UOW, fastapi_dependency(UOW)]
Joined = Annotated[UOW, fastapi_dependency(UOW, join=database)]


@app.exception_handler(FennFlowException)
async def refuse(_: Request, error: FennFlowException) -> Response:
    """Report what is wrong with a request."""
    status, detail = refusal(error)
    return JSONResponse({"detail": detail}, status)


@app.post("/letters", status_code=201)
async def write(
    session: Database, uow: Joined, title: Annotated[str, Form()], files: list[UploadFile]
) -> dict[str, object]:
    """Store a letter and its attachments: all of it, or nothing."""
    letter = Letter(title=title)
    session.add(letter)
    await session.flush()  # assigns the letter its id
    stored = await uow.attachments.at(f"letters/{letter.id}").put(*contents(files))
    return {"id": letter.id, "attachments": [path.name for path in stored]}


@app.put("/letters/{letter_id}")
async def rewrite(
    letter_id: int,
    session: Database,
    uow: Joined,
    title: Annotated[str, Form()],
    files: list[UploadFile],
) -> dict[str, object]:
    """Replace the title, and attachments of the same name."""
    letter = await session.get(Letter, letter_id)
    if letter is None:
        raise HTTPException(404, "There is no such letter.")
    letter.title = title
    stored = await uow.attachments.at(f"letters/{letter_id}").put(*contents(files))
    return {"id": letter_id, "attachments": [path.name for path in stored]}


@app.get("/letters/{letter_id}")
async def read(letter_id: int, session: Database, uow: Files) -> dict[str, object]:
    """Return a letter."""
    letter = await session.get(Letter, letter_id)
    if letter is None:
        raise HTTPException(404, "There is no such letter.")
    return {
        "id": letter_id,
        "title": letter.title,
        "attachments": [
            path.name async for path in uow.attachments.at(f"letters/{letter_id}").iter()
        ],
    }


@app.get("/letters/{letter_id}/{name}")
@app.head("/letters/{letter_id}/{name}")
async def download(letter_id: int, name: str, uow: Files, request: Request) -> Response:
    """Return an attachment, or a part of it: players seek, browsers ask only for what is new."""
    info = await uow.attachments.at(f"letters/{letter_id}").stat(name)
    answer = answer_for(info, request.headers, download_as=name)
    if request.method == "HEAD" or answer.start == answer.end:
        return Response(status_code=answer.status, headers=answer.headers)
    return StreamingResponse(body(info, answer), answer.status, answer.headers)


@app.post("/letters/{letter_id}/{name}/upload-url")
async def upload_url(letter_id: int, name: str, session: Database, uow: Files) -> dict[str, Any]:
    """Return a URL by which a browser sends a large attachment straight to S3, with these headers.

    Such an upload is not part of a transaction: `fennflow reconcile` records it.
    """
    if await session.get(Letter, letter_id) is None:
        raise HTTPException(404, "There is no such letter.")
    urls = await uow.attachments.at(f"letters/{letter_id}").generate_presigned_url(
        name, method="PUT", expires_in=600
    )
    return {"url": urls[0], "headers": urls.headers}


if __name__ == "__main__":
    uvicorn.run(app)
