"""Units of work without `async`."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import InMemoryBackendConfig
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.exceptions import (
    ConfigException,
    FileException,
    FilepathsCollisionError,
    NoSuchKeyException,
    ObjectChangedException,
    PathException,
    RecordAlreadyExistsException,
    TransactionException,
)
from fennflow.files import BinaryContent, StreamContent, TextContent
from fennflow.paths import StoragePath
from fennflow.reports import Finding
from fennflow.repositories import RepoField
from fennflow.sync import SyncUnitOfWork
from fennflow.sync.portal import Portal, close
from fennflow.testing import S3Server
from stores import FullRepository, new_bucket, numbers


class Shelf(FullRepository):
    async def longest(self) -> str:
        return max([str(path) async for path in self.iter()], key=len)

    def folder(self, name: str) -> Shelf:
        return self.at(name)


class Fields:
    files = RepoField(Shelf, namespace="files")
    others = RepoField(FullRepository, namespace="others")


class UOW(Fields, UnitOfWork):
    pass


class DeclaredWithoutAsync(Fields, SyncUnitOfWork):
    pass


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Give each test stores of its own, and end the loop after it."""
    name = f"sync {next(numbers)}"
    config = ConfigDict(
        connector=InMemoryConnectorConfig(name=name), backend=InMemoryBackendConfig(name=name)
    )
    monkeypatch.setattr(UOW, "config", config)
    monkeypatch.setattr(DeclaredWithoutAsync._asynchronous, "config", config)
    yield
    close()


def text(body: str, name: str) -> TextContent:
    return TextContent.from_content(body, filename=name)


@pytest.mark.parametrize("opened", [UOW.sync, DeclaredWithoutAsync])
def test_methods_return_what_they_return_with_async(opened: type[DeclaredWithoutAsync]) -> None:
    with opened() as uow:
        assert uow.files.put(text("1", "a"), text("2", "b/c")) == [StoragePath("a"), "b/c"]
        assert uow.files.at("b").get("c").one().content == "2"
        assert uow.files.at("b").cwd == "b"
        assert list(uow.files.list()) == list(uow.files.iter()) == ["a", "b/c"]
        assert uow.files.stat("a").size == 1
        assert [info.path for info in uow.files.stat("a", "b/c")] == ["a", "b/c"]
        assert uow.files.copy("a", "d", to=uow.others) == "d"
        assert uow.others.exists("d")
    with opened() as uow:
        with pytest.raises(NoSuchKeyException, match="x"):
            uow.files.get("x")
        with pytest.raises(RecordAlreadyExistsException):
            uow.files.create(text("3", "a"))
        with pytest.raises(FilepathsCollisionError):
            uow.files.copy("a", "a")
        assert uow.files.delete("a", "x") == ["a"]


def test_the_block_commits_and_an_exception_undoes_it() -> None:
    with pytest.raises(ZeroDivisionError), UOW.sync() as uow:
        uow.files.put(text("1", "a"))
        raise ZeroDivisionError
    with UOW.sync(auto_commit=False) as uow:
        assert list(uow.files.iter()) == []
        uow.files.put(text("1", "b"))
        uow.commit()
        uow.files.put(text("1", "c"))
        uow.rollback()
        uow.files.put(text("1", "d"))
    with UOW.sync() as uow:
        assert list(uow.files.iter()) == ["b"]


def test_a_savepoint_is_undone_alone() -> None:
    with UOW.sync() as uow:
        uow.files.put(text("1", "a"))
        with pytest.raises(ZeroDivisionError), uow.savepoint():
            uow.files.put(text("2", "a"))
            with uow.savepoint():
                uow.files.put(text("2", "b"))
            raise ZeroDivisionError
        assert uow.files.get("a").one().content == "1"
        with uow.savepoint():
            uow.files.put(text("3", "c"))
    with UOW.sync() as uow:
        assert list(uow.files.iter()) == ["a", "c"]


def test_methods_of_a_repository_of_ones_own_wait_for_their_results() -> None:
    with UOW.sync() as uow:
        uow.files.put(text("1", "a/long"), text("1", "b"))
        assert uow.files.longest() == "a/long"  # type: ignore[attr-defined]
        assert uow.files.folder("a").exists("long")  # type: ignore[attr-defined]
        with pytest.raises(AttributeError):
            uow.files.shortest()  # type: ignore[attr-defined]


def test_functions_of_the_users_run_in_the_callers_thread() -> None:
    threads: list[tuple[str, threading.Thread]] = []

    def seen(name: str) -> Callable[..., None]:
        return lambda *_: threads.append((name, threading.current_thread()))

    with UOW.sync() as uow:
        uow.on_commit(seen("commit"))
        uow.step(seen("step"), seen("undo"))
        uow.files.put(text("1", "a"), on_progress=seen("progress"))
    with pytest.raises(ZeroDivisionError), UOW.sync() as uow:
        uow.on_rollback(seen("rollback"))
        uow.step(seen("step"), seen("undo"))
        raise ZeroDivisionError
    found: list[Finding] = []
    reports = UOW.sync().reconcile(strategy="replace", on_finding=found.append)
    assert set(reports) == {"files", "others"}
    assert [name for name, _ in threads] == [
        "step",
        "progress",
        "commit",
        "step",
        "undo",
        "rollback",
    ]
    assert {thread for _, thread in threads} == {threading.current_thread()}


def test_a_step_may_use_the_unit_of_work_but_not_end_it() -> None:
    def work() -> str:
        uow.files.put(text("1", "a"))
        with pytest.raises(TransactionException, match="inside step"):
            uow.commit()
        return "done"

    with UOW.sync() as uow:
        assert uow.step(work, lambda: None) == "done"
    with UOW.sync() as uow:
        assert uow.files.exists("a")


def test_steps_may_be_async_too() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 1

    with UOW.sync() as uow:
        assert uow.step(work, lambda: None) == 1


def test_what_on_progress_raises_fails_the_call() -> None:
    def refuse(*_: object) -> None:
        raise ZeroDivisionError

    chunks = [b"x" * 1000] * 3
    with UOW.sync() as uow:
        for file in (text("1", "a"), StreamContent.from_iterable(chunks, filename="b.bin")):
            with pytest.raises(ZeroDivisionError):
                uow.files.put(file, on_progress=refuse)
        assert list(uow.files.iter()) == []


async def test_a_thread_that_runs_an_event_loop_is_refused() -> None:
    with pytest.raises(TransactionException, match="async with"), UOW.sync():
        pytest.fail("opened")

    def use() -> None:
        with UOW.sync() as uow:
            uow.files.put(text("1", "a"))

    await asyncio.to_thread(use)


def test_a_unit_of_work_is_opened_once_and_before_it_is_used() -> None:
    uow = UOW.sync()
    with pytest.raises(TransactionException, match="Open it first"):
        uow.files.list()
    with pytest.raises(TransactionException, match="Open"):
        uow.commit()
    with uow:
        with pytest.raises(TransactionException, match="open or was used"), uow:
            pytest.fail("opened")
    for late in (uow.files.list, uow.commit, uow.rollback):
        with pytest.raises(TransactionException, match="has ended"):
            late()
    with pytest.raises(ConfigException, match="join"), UOW.sync(join=object()):
        pytest.fail("joined")


def test_threads_share_one_loop() -> None:
    with ThreadPoolExecutor(8) as pool, UOW.sync().lifespan():

        def work(number: int) -> None:
            with UOW.sync() as uow:
                uow.files.put(text("1", str(number)))

        list(pool.map(work, range(50)))
        assert sum(thread.name == "fennflow" for thread in threading.enumerate()) == 1
        with UOW.sync() as uow:
            assert len(list(uow.files.iter())) == 50


def test_a_stream_is_a_file_object() -> None:
    body = b"".join(b"line %d\n" % number for number in range(50_000))
    with UOW.sync() as uow:
        uow.files.put(BinaryContent(data=body, filename="a.bin", media_type="text/plain"))
        with uow.files.open("a.bin") as file:
            assert file.info.size == len(body)
            assert file.read(7) == b"line 0\n"
            assert next(iter(file)) == b"line 1\n"
            assert (file.seek(-2, io.SEEK_END), file.read()) == (len(body) - 2, b"9\n")
            assert (file.seek(7), file.tell()) == (7, 7)
            buffer = bytearray(100_000)
            assert file.readinto(buffer) == 100_000
            assert buffer == body[7:100_007]
            assert file.seek(len(body) + 10) == len(body) + 10
            assert file.read() == b""
            file.seek(0)
            assert file.read() == body
            assert list(io.TextIOWrapper(file))[:1] == []
        assert file.closed
        with uow.files.open("a.bin", start=5, end=13) as part:
            assert part.readlines() == [b"0\n", b"line 1"]
            assert (part.seek(2), part.read(), part.seek(0, 2)) == (2, b"line 1", 8)
            with pytest.raises(PathException):
                part.seek(-1)
        with pytest.raises(NoSuchKeyException):
            uow.files.open("b.bin")
        with pytest.raises(PathException, match="rb nor wb"):
            uow.files.open("a.bin", "r")  # type: ignore[call-overload]


def test_copyfileobj_copies_both_ways(tmp_path: Path) -> None:
    body = bytes(range(256)) * 10_000
    with UOW.sync() as uow:
        with uow.files.at("in").open("a.bin", "wb", metadata={"k": "v"}) as file:
            shutil.copyfileobj(io.BytesIO(body), file)
        with uow.files.open("in/b.zip", "wb") as packed, zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("x.txt", b"x" * 1000)
        assert uow.files.stat("in/a.bin").metadata == {"k": "v"}
    with UOW.sync() as uow:
        with uow.files.open("in/a.bin") as stored, (tmp_path / "a").open("wb") as local:
            shutil.copyfileobj(stored, local)
        assert (tmp_path / "a").read_bytes() == body
        with uow.files.open("in/b.zip") as stored:
            assert zipfile.ZipFile(stored).read("x.txt") == b"x" * 1000


def test_nothing_stays_of_a_file_whose_block_an_exception_leaves() -> None:
    with UOW.sync() as uow:
        with pytest.raises(ZeroDivisionError), uow.files.open("a.bin", "wb") as file:
            file.write(b"x" * 1_000_000)
            raise ZeroDivisionError
        assert not uow.files.exists("a.bin")
        with pytest.raises(PathException), uow.files.open("../a.bin", "wb") as file:
            file.write(b"x" * 10_000_000)


def test_a_seek_never_leads_into_another_version() -> None:
    with UOW.sync() as uow:
        uow.files.put(text("old", "a.txt"))
    with UOW.sync() as uow, uow.files.open("a.txt") as file:
        with UOW.sync() as other:
            other.files.put(text("new", "a.txt"))
        file.seek(1)
        with pytest.raises(ObjectChangedException, match="Open it again"):
            file.read()


# --- processes ---------------------------------------------------------------------------------

SETUP = """
import logging, os, signal, sys, threading, time
from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.exceptions import ConnectorCapabilityException, TransactionException
from fennflow.files import StreamContent, TextContent
from fennflow.repositories import CrudRepository, RepoField

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it

class UOW(UnitOfWork):
    files = RepoField(CrudRepository, namespace="files")
    config = ConfigDict(backend=SqlalchemyBackendConfig(url="sqlite:///app.db"))

def put(name):
    with UOW.sync() as uow:
        uow.files.put(TextContent.from_content("1", filename=name))

def names():
    with UOW.sync() as uow:
        return list(uow.files.iter())
"""


def run(program: str, cwd: Path, *options: str) -> str:
    """Run a program in which any warning is an error, and return what it printed."""
    code = SETUP + textwrap.dedent(program)
    command = [sys.executable, "-W", "error", *options, "-c", code]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_nothing_is_left_when_the_program_ends(tmp_path: Path) -> None:
    """Engines are closed, and a thread that outlives the main one may leave its block."""
    program = """
        put("a")
        def work():
            with UOW.sync() as uow:
                opened.set()
                threading.main_thread().join(1)
                uow.files.put(TextContent.from_content("1", filename="b"))
            print("committed")
        opened = threading.Event()
        threading.Thread(target=work).start()
        opened.wait()
    """
    assert run(program, tmp_path) == "committed\n"
    assert run("print(sorted(map(str, names())))", tmp_path) == "['a', 'b']\n"
    assert not list(tmp_path.glob("*-wal"))  # the last one who closes a file moves it


def test_a_unit_of_work_that_begins_after_the_main_thread_has_ended_is_refused(
    tmp_path: Path,
) -> None:
    program = """
        def work():
            threading.main_thread().join()
            try:
                put("a")
            except TransactionException as error:
                print(str(error)[:53])
        threading.Thread(target=work).start()
    """
    assert run(program, tmp_path) == "The event loop of this unit of work has ended, since \n"


def test_the_first_connection_to_s3_may_be_made_when_the_main_thread_has_ended(
    tmp_path: Path, moto: S3Server
) -> None:
    """Names are resolved in threads, which Python 3.12 no longer starts then: one is kept ready."""
    bucket = asyncio.run(new_bucket(moto))
    program = f"""
        from fennflow.connectors import S3ConnectorConfig

        class Stored(UnitOfWork):
            files = RepoField(CrudRepository, namespace={bucket!r})
            config = ConfigDict(
                connector=S3ConnectorConfig(
                    endpoint_url={moto.url.replace("127.0.0.1", "localhost")!r},
                    aws_access_key_id="test", aws_secret_access_key="test",
                    region_name="us-east-1", addressing_style="path",
                ),
                backend=SqlalchemyBackendConfig(url="sqlite:///app.db"),
            )

        def work():
            with Stored.sync() as uow:
                opened.set()
                threading.main_thread().join(1)
                uow.files.put(TextContent.from_content("1", filename="a"))
            print("committed")

        opened = threading.Event()
        threading.Thread(target=work).start()
        opened.wait()
    """
    assert run(program, tmp_path) == "committed\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_starts_afresh(tmp_path: Path) -> None:
    program = """
        put("before")
        uow = UOW.sync()
        with uow:
            uow.files.put(TextContent.from_content("1", filename="around"))
            child = os.fork()
            if not child:
                try:
                    uow.files.list()
                except TransactionException as error:
                    print(str(error)[:51], flush=True)
                put("child")
                print("child", flush=True)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
        else:
            sys.exit(0)  # and closes nothing of the parent's
        put("after")
        print(sorted(map(str, names())))
    """
    refused = "This unit of work was opened before the process was"
    expected = f"{refused}\nchild\n['after', 'around', 'before', 'child']\n"
    warned = ("-W", "ignore::DeprecationWarning")  # of 3.12: the process has threads
    assert run(program, tmp_path, *warned) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_keeps_what_it_commits_on_sqlite_when_its_parent_closes_the_file(
    tmp_path: Path,
) -> None:
    """The last process that closes a file deletes its write-ahead log; that must not be the parent."""
    program = """
        from fennflow.sync.portal import close

        put("before")
        (of_child, to_parent), (of_parent, to_child) = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            put("early")
            os.write(to_parent, b".")
            os.read(of_parent, 1)
            put("late")
            os._exit(0)
        os.read(of_child, 1)
        close()
        os.write(to_child, b".")
        assert os.waitpid(child, 0)[1] == 0
        print(*names())
    """
    warned = ("-W", "ignore::DeprecationWarning")  # of 3.12: the process has threads
    assert run(program, tmp_path, *warned) == "before early late\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_obstore_is_refused_in_a_child_of_a_process_that_used_it(tmp_path: Path) -> None:
    program = """
        from fennflow.connectors import ObstoreConnectorConfig

        class Stored(UnitOfWork):
            files = RepoField(CrudRepository, namespace="files")
            config = ConfigDict(connector=ObstoreConnectorConfig(url="memory://"))

        with Stored.sync() as uow:
            uow.files.put(TextContent.from_content("1", filename="a"))
        child = os.fork()
        if not child:
            try:
                with Stored.sync() as uow:
                    uow.files.list()
            except ConnectorCapabilityException as error:
                print(str(error)[:57], flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    warned = ("-W", "ignore::DeprecationWarning")  # of 3.12: the process has threads
    printed = run(program, tmp_path, *warned)
    assert printed == "This process was forked from one that had used obstore, w\n"


def test_ctrl_c_undoes_the_block_before_it_ends_the_program(tmp_path: Path) -> None:
    program = """
        def chunks():
            yield b"x" * 6_000_000
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            yield b"y"
        try:
            with UOW.sync() as uow:
                uow.step(lambda: print("done"), lambda: print("undone"))
                uow.files.put(TextContent.from_content("1", filename="a"))
                uow.files.put(StreamContent.from_iterable(chunks(), filename="b.bin"))
        except KeyboardInterrupt:
            print("interrupted", UOW.sync().transactions(), names())
        logging.disable()  # which says that a callback was cut off
        try:
            with UOW.sync() as uow:
                uow.files.put(TextContent.from_content("1", filename="c"))
                uow.on_commit(lambda: signal.raise_signal(signal.SIGINT))
        except KeyboardInterrupt as error:
            print(error.__notes__, names())
    """
    assert run(program, tmp_path).splitlines() == [
        "done",
        "undone",
        "interrupted [] []",
        "['The interrupted call had already ended successfully.'] ['c']",
    ]


def test_a_step_that_ctrl_c_cuts_off_is_undone(tmp_path: Path) -> None:
    program = """
        try:
            with UOW.sync() as uow:
                uow.step(lambda: signal.raise_signal(signal.SIGINT), lambda: print("undone"))
        except KeyboardInterrupt:
            print("interrupted")
    """
    assert run(program, tmp_path) == "undone\ninterrupted\n"


def test_repositories_are_iterated_in_pages() -> None:
    with UOW.sync() as uow:
        uow.files.put(*(text("1", f"{number:04}") for number in range(2100)))
        paths: Iterator[StoragePath] = uow.files.iter()
        assert next(paths) == "0000"
        assert sum(1 for _ in paths) == 2099


def test_a_config_belongs_to_a_unit_of_work_without_async_too() -> None:
    with pytest.raises(ConfigException, match="config"):
        type("Bad", (SyncUnitOfWork,), {"config": 1})
    made = type("Good", (DeclaredWithoutAsync,), {"config": ConfigDict(lock_timeout=1)})
    assert issubclass(made, SyncUnitOfWork)


def test_what_cannot_be_called_back_is_refused_without_async_too() -> None:
    with UOW.sync() as uow:
        for value in (None, 5):
            with pytest.raises(ConfigException, match="not a function"):
                uow.on_commit(cast("Callable[[], object]", value))


def test_there_is_no_commit_while_a_file_is_open_for_writing() -> None:
    """The commit would wait for bytes that only its caller can write, and then commit without the file."""
    with pytest.raises(TransactionException, match=r"a.bin .* open for writing"), UOW.sync() as uow:
        uow.files.put(text("1", "other"))
        uow.files.open("a.bin", "wb").write(b"1")
    with UOW.sync() as uow:
        file = uow.files.open("b.bin", "wb")
        with pytest.raises(TransactionException, match=r"b.bin .* open for writing"):
            uow.commit()
        file.close()
        uow.commit()
        uow.files.open("c.bin", "wb").write(b"1")
        uow.rollback()
        assert list(uow.files.list()) == ["b.bin"]


def test_a_file_is_not_put_that_was_interrupted_as_it_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its buffer would be written again, including the part that was sent before the interruption."""
    call = Portal.call

    def interrupted(*args: object) -> None:
        monkeypatch.setattr(Portal, "call", call)
        cast("Callable[..., object]", call)(*args)
        raise KeyboardInterrupt

    with UOW.sync() as uow:
        with pytest.raises(FileException, match="interrupted"):
            with uow.files.open("a.bin", "wb") as file:
                file.write(b"1" * 1000)
                monkeypatch.setattr(Portal, "call", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    file.flush()
        with pytest.raises(KeyboardInterrupt), uow.files.open("b.bin", "wb") as file:
            file.write(b"2" * 1000)
            monkeypatch.setattr(Portal, "call", interrupted)
    with UOW.sync() as uow:
        assert list(uow.files.list()) == []


def test_an_interruption_just_before_the_end_undoes_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal handler may raise in `__exit__`, before the loop is asked for the end."""
    call = Portal.call

    def interrupted(*_: object) -> None:
        monkeypatch.setattr(Portal, "call", call)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), UOW.sync() as uow:
        uow.files.put(text("1", "a"))
        monkeypatch.setattr(Portal, "call", interrupted)
    assert list(UOW.sync().transactions()) == []
    with UOW.sync() as uow:
        assert not uow.files.exists("a")
