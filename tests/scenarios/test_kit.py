"""The test kit for users: fixtures, injected failures, and leftovers."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from litestar import Litestar, post
from litestar.exceptions import ClientException
from litestar.params import FromPath
from litestar.testing import TestClient
from sqlalchemy import text as sql
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from fennflow import ConfigDict, UnitOfWork
from fennflow.connectors import InMemoryConnectorConfig, ObjectAttributes, PutRequest
from fennflow.exceptions import ConnectorUnavailableException
from fennflow.files import TextContent
from fennflow.repositories import CrudRepository, RepoField
from fennflow.testing.fixtures import failing, fennflow_joined, fennflow_memory, leftovers
from fennflow.testing.stream_suite import Target, opened

__all__ = ["fennflow_joined", "fennflow_memory"]

DOCS = Path(__file__).parents[2] / "docs" / "testing.md"
InMemory = Callable[[type[UnitOfWork]], type[UnitOfWork]]


class UOW(UnitOfWork):
    files = RepoField(CrudRepository, namespace="files")
    config = ConfigDict(connector=InMemoryConnectorConfig(name="production"), max_concurrency=3)


sessions = async_sessionmaker()
called: list[str] = []


async def charge() -> None:
    called.append("charged")


@UOW.compensation("refund")
def refund(payment: str) -> None:
    called.append(f"refunded {payment}")


@UOW.after_commit("send")
def send(order: str) -> None:
    called.append(f"sent {order}")


@post("/letters/{name:str}")
async def write(name: FromPath[str]) -> list[str]:
    async with sessions.begin() as session, UOW(join=session) as uow:
        await session.execute(sql("CREATE TABLE IF NOT EXISTS letters (name text)"))
        await session.execute(sql("INSERT INTO letters VALUES (:name)"), {"name": name})
        await uow.files.put(text("Dear Ann", name))
        if name == "broken":
            raise ClientException
        rows = (await session.execute(sql("SELECT name FROM letters"))).scalars().all()
        return [*rows, *map(str, await uow.files.list())]


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


@pytest.mark.once
def test_the_example_of_the_docs_passes(tmp_path: Path) -> None:
    conftest, program, tests, joined = re.findall(
        r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL
    )
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "letters.py").write_text(program)
    (tmp_path / "test_joined.py").write_text(joined)
    (tmp_path / "test_letters.py").write_text(tests)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-W", "error"),
            *("-W", "ignore:Using `httpx` with `starlette.testclient`", "."),  # Starlette's wish
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "4 passed" in done.stdout, done.stdout + done.stderr


def test_a_joined_program_is_tested_with_the_client_of_litestar(
    fennflow_joined: Callable[[type[UnitOfWork]], str],
) -> None:
    """The docs do the same with FastAPI's client, and Django's tests with Django's."""
    sessions.configure(bind=create_async_engine(fennflow_joined(UOW), poolclass=NullPool))
    app = Litestar([write], lifespan=[lambda _: UOW.lifespan()])
    with TestClient(app) as client:
        assert client.post("/letters/broken").status_code == 400
        assert client.post("/letters/ann").json() == ["ann", "ann"]


async def test_a_class_keeps_its_files_in_memory_for_a_test(fennflow_memory: InMemory) -> None:
    before = UOW.config
    fennflow_memory(UOW)
    assert UOW.config.connector != before.connector
    assert UOW.config.max_concurrency == 3
    async with UOW() as uow:
        await uow.files.put(text("1", "a"))
    fennflow_memory(UOW)
    async with UOW() as uow:
        assert await uow.files.list() == []


@pytest.mark.parametrize("kind", ["memory", "joined"])
async def test_compensations_and_hooks_of_a_program_are_called_in_its_tests(
    kind: str, fennflow_memory: InMemory, fennflow_joined: Callable[[type[UnitOfWork]], str]
) -> None:
    """They were registered when the program was imported, before the test gave it another config."""
    called.clear()
    replace = fennflow_memory if kind == "memory" else fennflow_joined
    replace(UOW)
    replace(UOW)  # a test may do so twice
    async with UOW() as uow:
        await uow.step(charge, undo=refund("1"))
        uow.on_commit(send("1"))
    with pytest.raises(ValueError, match="out of stock"):
        async with UOW() as uow:
            await uow.step(charge, undo=refund("2"))
            uow.on_commit(send("2"))
            message = "out of stock"
            raise ValueError(message)
    await UOW.recover()
    assert called == ["charged", "sent 1", "charged", "refunded 2"]


async def test_a_request_fails_where_it_was_said(fennflow_memory: InMemory) -> None:
    fennflow_memory(UOW)
    with failing("put", at=2):
        async with UOW() as uow:
            await uow.files.put(text("1", "a"))
        with pytest.raises(ConnectorUnavailableException, match="number 2"):
            async with UOW() as uow:
                await uow.files.put(text("2", "b"))
    async with UOW() as uow:
        assert await uow.files.list() == ["a"]
    assert await leftovers(UOW) == []


async def test_an_answer_is_lost_where_it_was_said(fennflow_memory: InMemory) -> None:
    fennflow_memory(UOW)
    with failing("put", when="after"):
        # FennFlow looks, and finds what it has written.
        async with UOW() as uow:
            await uow.files.put(text("1", "a"))
    assert await leftovers(UOW) == []
    with failing("get", when="after"), pytest.raises(ConnectorUnavailableException):
        async with UOW() as uow:
            await uow.files.get("a")


async def test_leftovers_are_reported(fennflow_memory: InMemory) -> None:
    fennflow_memory(UOW)
    async with UOW() as uow:
        await uow.files.put(text("1", "a"))
        [pending] = [line for line in await leftovers(UOW) if "transaction" in line]
        assert "files/a is unknown" in " ".join(await leftovers(UOW))
    assert pending
    assert await leftovers(UOW) == []
    async with opened(Target(UOW.config.connector, "files")) as connector:
        await connector.put(
            PutRequest("files", "b", ObjectAttributes(media_type="text/plain")), b"1"
        )
    assert await leftovers(UOW) == ["files/b is unknown to the catalog"]


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Even if the process is killed and cannot clean up."""
    files, program = tmp_path / "files", tmp_path / "program.py"
    files.mkdir()
    program.write_text(f"""
import sys, time
from pathlib import Path
from fennflow.testing.processes import running

server = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
with running(server, lambda: None, garbage=[Path({str(files)!r})]):
    print("runs", flush=True)
    time.sleep(600)
""")
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"runs\n"
        assert files.exists()
        process.kill()
    # The guard removes the files when the server has ended.
    deadline = time.monotonic() + 60
    while files.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
