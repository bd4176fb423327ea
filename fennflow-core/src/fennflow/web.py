"""For web applications: a unit of work for each request, and responses to requests for a file.

Responses follow RFC 9110: `If-None-Match` (13.1.2), `Range` and `If-Range` (14.2, 13.1.5).
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from email.utils import format_datetime
from http import HTTPStatus
from typing import Any

from fennflow.connectors.headers import disposition, headers_of, media_type_of
from fennflow.connectors.values import utc
from fennflow.exceptions import ConfigException, FileException
from fennflow.printable import brief
from fennflow.responses import ObjectInfo
from fennflow.uow import UnitOfWork

__all__ = ["Answer", "answer_for", "fastapi_dependency", "litestar_dependency"]

# No size has more than 18 digits, and Python refuses to parse numbers of thousands of digits.
_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")

_VISIBLE = re.compile(r"[\x20-\x7e]+")
_ON_EVERY_ANSWER = frozenset({"Cache-Control", "Expires"})


@dataclass(frozen=True, slots=True)
class Answer:
    """The status, the headers, and the range of the file that is the body.

    Args:
        status: 200, 206, 304 or 416.
        headers: all headers to send, including the length of the body.
        start: the first byte of the body, counted from 0.
        end: the byte before which it stops; equal to `start` if there is no body.
    """

    status: int
    headers: Mapping[str, str]
    start: int
    end: int


def answer_for(
    info: ObjectInfo,
    headers: Mapping[str, str],
    *,
    download_as: str | None = None,
    inline: bool = False,
) -> Answer:
    """Return the response to a GET or HEAD request for a file.

    Only one range is served; a request for several is answered with the whole file, as RFC 9110
    allows. Headers that were stored with the file, such as Content-Encoding, are sent.

    A file that a browser could run or render with the rights of your site (HTML, SVG, XML, scripts,
    and any type not known to be passive) is sent as an attachment, which browsers save and do not
    open. Send all headers, including `X-Content-Type-Options`: it keeps browsers from guessing a
    type.

    Args:
        info: what `stat` or `open` returned for the file.
        headers: of the request; names in any case.
        download_as: a file name; browsers then save the file and do not show it.
        inline: show files of any type; safe only if no stranger chooses their bytes or type.

    Raises:
        FileException: the file's ETag is not valid in a header.

    Example:
        ```python
        import asyncio

        from fennflow import UnitOfWork
        from fennflow.files import TextContent
        from fennflow.repositories import CrudRepository, RepoField, StatRepository
        from fennflow.web import answer_for


        class Letters(CrudRepository, StatRepository):
            pass


        class UOW(UnitOfWork):
            letters = RepoField(Letters, namespace="letters")


        async def main():
            async with UOW() as uow:
                await uow.letters.put(TextContent.from_content("Dear Ann", filename="a.txt"))
                answer = answer_for(await uow.letters.stat("a.txt"), {"Range": "bytes=5-"})
            print(answer.status, answer.start, answer.end, answer.headers["Content-Range"])
            #> 206 5 8 bytes 5-7/8


        asyncio.run(main())
        ```
    """
    asked = {name.lower(): value for name, value in headers.items()}
    etag = f'"{info.sha256 or info.etag}"'
    if not _VISIBLE.fullmatch(etag):
        message = f"The ETag of {info.path!a} cannot be sent in a header. Reconcile the catalog."
        raise FileException(message)
    reply = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Last-Modified": format_datetime(utc(info.modified_at), usegmt=True),
        "X-Content-Type-Options": "nosniff",
    }
    stored = headers_of(info.headers)
    kept = stored.pop("Content-Disposition", None)
    reply |= {name: value for name, value in stored.items() if name in _ON_EVERY_ANSWER}
    known = [each.strip().removeprefix("W/") for each in asked.get("if-none-match", "").split(",")]
    if etag in known or known == ["*"]:
        return Answer(HTTPStatus.NOT_MODIFIED, reply, 0, 0)
    media_type = media_type_of(info.media_type)
    value = disposition(info.path.name, media_type, kept, download_as=download_as, inline=inline)
    if value is not None:
        reply["Content-Disposition"] = value
    reply |= {"Content-Type": media_type, **stored}
    start, end = 0, info.size
    found = _RANGE.fullmatch(asked.get("range", "").replace(" ", ""))
    if found is None or asked.get("if-range", etag) != etag:
        return Answer(HTTPStatus.OK, reply | {"Content-Length": str(end)}, start, end)
    first, last, suffix = found.groups()
    if suffix is not None:
        start = max(0, info.size - int(suffix))
    else:
        start, end = int(first), min(info.size, int(last) + 1 if last else info.size)
        if last and int(last) < start:
            # An invalid range is ignored.
            return Answer(HTTPStatus.OK, reply | {"Content-Length": str(info.size)}, 0, info.size)
    if start >= end:
        reply |= {"Content-Range": f"bytes */{info.size}", "Content-Length": "0"}
        return Answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, reply, 0, 0)
    reply |= {
        "Content-Range": f"bytes {start}-{end - 1}/{info.size}",
        "Content-Length": str(end - start),
    }
    return Answer(HTTPStatus.PARTIAL_CONTENT, reply, start, end)


def fastapi_dependency(
    uow: type[UnitOfWork],
    *,
    auto_commit: bool = True,
    join: Callable[..., Any] | None = None,
    timeout: float | None = None,
) -> Any:
    """Return a dependency of FastAPI that gives each request a unit of work.

    It commits after the path function has returned and before the response is sent, so a commit
    that fails becomes an error response. An exception that leaves the path function undoes the
    work; a returned response commits it, whatever its status. A plain `Depends` on a function that
    yields commits after the response was sent, when the client already has its 200.

    Args:
        uow: the class to open.
        auto_commit: like that of `UnitOfWork`.
        join: a dependency that provides the session to join; a path function that depends on it,
            too, gets the same session.
        timeout: like that of `UnitOfWork`: seconds from the path function's call to the commit.

    Raises:
        ConfigException: FastAPI is not installed, or older than 0.121, which does not support this;
            or the unit of work does not accept an argument.

    Example:
        ```python
        from typing import Annotated

        from fastapi import FastAPI, UploadFile

        from fennflow import UnitOfWork
        from fennflow.files import StreamContent
        from fennflow.repositories import CrudRepository, RepoField
        from fennflow.web import fastapi_dependency


        class UOW(UnitOfWork):
            inbox = RepoField(CrudRepository, namespace="inbox")


        app = FastAPI()


        @app.post("/inbox")
        async def receive(
            file: UploadFile, uow: Annotated[UOW, fastapi_dependency(UOW)]
        ) -> list[str]:
            return list(await uow.inbox.put(StreamContent.from_iterable(file)))
        ```
    """
    _check(uow, auto_commit=auto_commit, timeout=timeout)
    try:
        from fastapi import Depends

        joined = None if join is None else Depends(join)

        async def provide(session: Any = joined) -> AsyncGenerator[UnitOfWork]:
            async with uow(auto_commit=auto_commit, join=session, timeout=timeout) as opened:
                yield opened

        return Depends(provide, scope="function")
    except (ImportError, TypeError) as error:
        message = "fastapi_dependency needs FastAPI 0.121 or newer: pip install 'fastapi>=0.121'."
        raise ConfigException(message) from error


def litestar_dependency(
    uow: type[UnitOfWork], *, auto_commit: bool = True, timeout: float | None = None
) -> Any:
    """Return a dependency of Litestar that gives each request a unit of work.

    It commits after the handler has returned and before the response is sent; an exception that
    leaves the handler undoes the work. To join a session, open the unit of work in the handler:
    Litestar ends dependencies that yield at the same time, so the session could be closed first.

    Args:
        uow: the class to open.
        auto_commit: like that of `UnitOfWork`.
        timeout: like that of `UnitOfWork`: seconds from the handler's call to the commit.

    Raises:
        ConfigException: Litestar is not installed; or the unit of work does not accept an argument.

    Example:
        ```python
        from litestar import Litestar, get
        from litestar.di import NamedDependency

        from fennflow import UnitOfWork
        from fennflow.repositories import CrudRepository, RepoField
        from fennflow.web import litestar_dependency


        class UOW(UnitOfWork):
            inbox = RepoField(CrudRepository, namespace="inbox")


        @get("/inbox")
        async def look(uow: NamedDependency[UOW]) -> list[str]:
            return list(await uow.inbox.list())


        app = Litestar([look], dependencies={"uow": litestar_dependency(UOW)})
        ```
    """
    _check(uow, auto_commit=auto_commit, timeout=timeout)
    try:
        from litestar.di import Provide
    except ImportError as error:
        message = "litestar_dependency needs Litestar: pip install litestar."
        raise ConfigException(message) from error

    async def provide() -> AsyncGenerator[UnitOfWork]:
        async with uow(auto_commit=auto_commit, timeout=timeout) as opened:
            yield opened

    return Provide(provide)


def _check(uow: object, *, auto_commit: bool, timeout: float | None) -> None:
    """Raise now the error that each request would raise."""
    message = f"{brief(uow)} is not a class that extends fennflow.UnitOfWork."
    if not isinstance(uow, type) or not issubclass(uow, UnitOfWork):
        raise ConfigException(message)
    uow(auto_commit=auto_commit, timeout=timeout)
