"""A unit of work for each request of a web framework ends before the response is sent."""

# No postponed annotations: the frameworks would look for the local classes in the module.

import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from litestar import Litestar, get
from litestar import Request as LitestarRequest
from litestar import Response as LitestarResponse
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromPath
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fennflow.backends import SqlalchemyBackendConfig
from fennflow.exceptions import (
    ConfigException,
    FennFlowException,
    NoSuchNamespaceException,
)
from fennflow.files import TextContent
from fennflow.testing import S3Server
from fennflow.web import fastapi_dependency, litestar_dependency
from stores import FullUOW, Store, make_store, s3_config

App = Callable[[type[FullUOW]], Any]


async def put_and_then(uow: FullUOW, what: str, missing: Callable[[], Exception]) -> str:
    """Put a file, and let the handler or its commit fail afterwards."""
    await uow.files.put(TextContent.from_content("one", filename="a.txt"))
    if what == "conflict":
        assert not await uow.files.exists("b.txt")
        async with type(uow)() as other:
            await other.files.put(TextContent.from_content("two", filename="b.txt"))
    if what == "raise":
        raise missing()
    return "done"


def fastapi_app(uow_class: type[FullUOW], **options: Any) -> Any:
    app = FastAPI()

    @app.exception_handler(FennFlowException)
    async def refuse(_: Request, error: FennFlowException) -> Response:  # pyright: ignore[reportUnusedFunction]
        return JSONResponse(type(error).__name__, 409)

    @app.get("/{what}")
    async def handle(  # pyright: ignore[reportUnusedFunction]
        what: str, uow: Annotated[FullUOW, fastapi_dependency(uow_class, **options)]
    ) -> str:
        return await put_and_then(uow, what, lambda: HTTPException(404))

    return app


def litestar_app(uow_class: type[FullUOW], **options: Any) -> Any:
    @get("/{what:str}")
    async def handle(what: FromPath[str], uow: NamedDependency[FullUOW]) -> str:
        return await put_and_then(uow, what, NotFoundException)

    def refuse(
        _: LitestarRequest[Any, Any, Any], error: FennFlowException
    ) -> LitestarResponse[str]:
        return LitestarResponse(type(error).__name__, status_code=409)

    return Litestar(
        [handle],
        dependencies={"uow": litestar_dependency(uow_class, **options)},
        exception_handlers={FennFlowException: refuse},
        logging_config=None,
    )


@pytest.fixture
async def memory(request: pytest.FixtureRequest) -> Store:
    return await make_store("memory", request)


@pytest.mark.parametrize("make", [fastapi_app, litestar_app])
async def test_a_request_commits_before_it_is_answered(make: App, memory: Store) -> None:
    uow_class = memory.uow(validate_reads=True)
    transport = httpx.ASGITransport(app=make(uow_class))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/conflict")
        assert (answer.status_code, "ConflictException" in answer.text) == (409, True)
        assert (await client.get("/raise")).status_code == 404
        async with uow_class() as uow:
            assert not await uow.files.exists("a.txt")
        assert (await client.get("/commit")).status_code == 200
        async with uow_class() as uow:
            assert await uow.files.exists("a.txt")


async def test_a_request_of_fastapi_joins_the_transaction_of_its_path_function(
    tmp_path: Path, memory: Store
) -> None:
    url = f"{tmp_path}/app.db"
    engine = create_async_engine(f"sqlite+aiosqlite:///{url}")

    async def database() -> AsyncGenerator[AsyncSession]:
        async with AsyncSession(engine) as session:
            yield session

    uow_class = memory.uow(backend=SqlalchemyBackendConfig(url=f"sqlite:///{url}"))
    app = FastAPI()

    @app.get("/{name}")
    async def handle(  # pyright: ignore[reportUnusedFunction]
        name: str,
        session: Annotated[AsyncSession, Depends(database)],
        uow: Annotated[FullUOW, fastapi_dependency(uow_class, join=database)],
    ) -> None:
        await uow.files.put(TextContent.from_content("", filename=name))
        await session.execute(text("insert into letters values (:name)"), {"name": name})
        if name == "fails":
            raise HTTPException(404)

    async with engine.begin() as connection:
        await connection.execute(text("create table letters (name text)"))
    transport = httpx.ASGITransport(app=app)
    async with (
        uow_class.lifespan(),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        assert (await client.get("/fails")).status_code == 404
        assert (await client.get("/works")).status_code == 200
        async with uow_class() as uow:
            assert await uow.files.list() == ["works"]
    async with engine.connect() as connection:
        rows = await connection.execute(text("select name from letters"))
        assert rows.scalars().all() == ["works"]
    await engine.dispose()


@pytest.mark.parametrize("make", [fastapi_app, litestar_app])
async def test_a_request_has_the_options_of_its_unit_of_work(make: App, memory: Store) -> None:
    uow_class = memory.uow()
    for options, code, kept in (
        ({"auto_commit": False}, 200, False),
        ({"timeout": 1e-9}, 409, False),
    ):
        transport = httpx.ASGITransport(app=make(uow_class, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get("/commit")
        assert (answer.status_code, "Timeout" in answer.text) == (code, code == 409)
        async with uow_class() as uow:
            assert await uow.files.exists("a.txt") is kept


@pytest.mark.parametrize("dependency", [fastapi_dependency, litestar_dependency])
def test_options_that_no_request_could_have_are_refused_at_once(dependency: Any) -> None:
    with pytest.raises(ConfigException, match="timeout=-1"):
        dependency(FullUOW, timeout=-1)
    with pytest.raises(ConfigException, match=r"extends fennflow\.UnitOfWork"):
        dependency(FullUOW())


def test_a_framework_that_is_not_installed_or_too_old_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastapi.Depends", lambda dependency: dependency)
    with pytest.raises(ConfigException, match=r"FastAPI 0\.121"):
        fastapi_dependency(FullUOW)
    monkeypatch.setitem(sys.modules, "litestar.di", None)
    with pytest.raises(ConfigException, match="pip install litestar"):
        litestar_dependency(FullUOW)


async def test_a_program_does_not_start_without_its_bucket_unless_it_says_so(
    strict: S3Server,
) -> None:
    store = Store(s3_config(strict), "no-such-bucket", strict)
    uow_class = store.uow()
    with pytest.raises(NoSuchNamespaceException) as caught:
        async with uow_class.lifespan():
            pytest.fail("it has started")
    assert "lifespan(check=False)" in "".join(caught.value.__notes__)
    async with uow_class.lifespan(check=False):
        pass
