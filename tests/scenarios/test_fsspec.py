"""A filesystem of fsspec whose transactions are units of work."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
from collections.abc import Callable, Generator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.tests import abstract

from fennflow import ConfigDict, UnitOfWork
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.exceptions import (
    ConfigException,
    FilepathsCollisionError,
    KeyException,
    TransactionException,
)
from fennflow.repositories import RepoField
from fennflow.sync import SyncUnitOfWork
from fennflow.sync.portal import close
from fennflow_fsspec import FennFlowFileSystem
from stores import FullRepository


class UOW(UnitOfWork):
    files = RepoField(FullRepository, namespace="files")
    other = RepoField(FullRepository, namespace="other")
    config = ConfigDict(connector=InMemoryConnectorConfig(name="fsspec"))


class SyncUOW(SyncUnitOfWork):
    files = RepoField(FullRepository, namespace="files")
    config = ConfigDict(connector=InMemoryConnectorConfig(name="fsspec"))


class StopError(Exception):
    """Leaves a block."""


@pytest.fixture(scope="module")
def portal() -> Generator[None]:
    yield
    close()


@pytest.fixture
def fs(portal: None) -> Any:
    """Return the filesystem, which is empty."""
    filesystem = fsspec.filesystem("fennflow", uow=UOW)
    for name in filesystem.find(""):
        filesystem.rm(name)
    return filesystem


@pytest.mark.filterwarnings("ignore:Class-scoped fixtures:pytest.PytestRemovedIn10Warning")
class Fixtures(abstract.AbstractFixtures):  # type: ignore[misc]
    @pytest.fixture(scope="class")
    def fs(self, portal: None) -> Any:
        return FennFlowFileSystem(uow=UOW)

    @pytest.fixture
    def fs_path(self) -> str:
        return "files/suite"

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return False


@pytest.mark.once
class TestCopy(abstract.AbstractCopyTests, Fixtures):  # type: ignore[misc]
    pass


@pytest.mark.once
class TestGet(abstract.AbstractGetTests, Fixtures):  # type: ignore[misc]
    pass


@pytest.mark.once
class TestPut(abstract.AbstractPutTests, Fixtures):  # type: ignore[misc]
    pass


@pytest.mark.once
class TestOpen(abstract.AbstractOpenTests, Fixtures):  # type: ignore[misc]
    pass


@pytest.mark.once
class TestPipe(abstract.AbstractPipeTests, Fixtures):  # type: ignore[misc]
    pass


def test_a_transaction_commits_as_a_whole(fs: Any) -> None:
    outside = FennFlowFileSystem(uow=SyncUOW)
    with fs.transaction:
        fs.pipe("files/a", b"1")
        with fs.open("files/b", "wb") as file:
            file.write(b"2")
        fs.cp("files/a", "other/c")
        fs.mv("files/b", "files/d")
        assert fs.cat(fs.find("files")) == {"files/a": b"1", "files/d": b"2"}
        assert outside.find("files") == []
    assert fs.find("") == ["files/a", "files/d", "other/c"]
    assert outside.cat_file("files/d") == b"2"


def test_an_exception_undoes_all_of_a_transaction(fs: Any) -> None:
    fs.pipe({"files/a": b"old", "files/b": b"old"})
    with pytest.raises(StopError), fs.transaction:
        fs.pipe("files/a", b"new")
        fs.rm("files/b")
        fs.mv("files/a", "files/c")
        raise StopError
    assert fs.cat(fs.find("files")) == {"files/a": b"old", "files/b": b"old"}
    transaction = fs.start_transaction()
    fs.pipe("files/a", b"new")
    transaction.complete(commit=False)
    assert fs.cat_file("files/a") == b"old"
    fs.start_transaction()
    fs.pipe("files/a", b"new")
    fs.end_transaction()
    assert fs.cat_file("files/a") == b"new"


def test_a_transaction_in_another_one_is_a_savepoint(fs: Any) -> None:
    with fs.transaction:
        fs.pipe("files/a", b"1")
        with pytest.raises(StopError), fs.transaction:
            fs.pipe("files/a", b"2")
            fs.pipe("files/b", b"2")
            raise StopError
        with fs.transaction:
            fs.pipe("files/c", b"3")
    assert fs.cat(fs.find("files")) == {"files/a": b"1", "files/c": b"3"}


def test_the_error_in_a_notebook_says_to_use_a_thread(fs: Any) -> None:
    async def cell() -> None:
        with pytest.raises(TransactionException, match=r"await asyncio\.to_thread\(function\)"):
            fs.pipe("files/a.txt", b"1")
        await asyncio.to_thread(fs.pipe, "files/b.txt", b"2")

    asyncio.run(cell())
    assert fs.find("files") == ["files/b.txt"]


def test_a_call_of_several_steps_is_done_as_a_whole(fs: Any, tmp_path: Any) -> None:
    fs.pipe("files/a/1", b"1")
    with pytest.raises(FileNotFoundError):
        fs.pipe({"files/x": b"1", "nowhere/y": b"2"})
    with pytest.raises(FileNotFoundError):
        fs.mv(["files/a/1", "files/none"], ["files/b/1", "files/b/2"])
    with fs.transaction, pytest.raises(FileNotFoundError):
        fs.pipe({"files/x": b"1", "nowhere/y": b"2"})
    assert fs.find("") == ["files/a/1"]
    fs.mv("files/a", "files/b", recursive=True)
    assert fs.find("") == ["files/b/1"]
    fs.rm("files/b", recursive=True)
    assert fs.find("") == []


@pytest.mark.parametrize(
    ("source", "target", "options", "moved"),
    [
        ("a/1", "c", {}, {"c": "1", "a/2": "2", "a/b/3": "3"}),
        ("a/1", "a/b", {}, {"a/2": "2", "a/b/1": "1", "a/b/3": "3"}),
        ("a/1", "a/2", {}, {"a/2": "1", "a/b/3": "3"}),
        ("a/*", "new/", {}, {"new/1": "1", "new/2": "2", "a/b/3": "3"}),
        ("a", "new", {"recursive": True}, {"new/1": "1", "new/2": "2", "new/b/3": "3"}),
        # fsspec's own would lose what is below, what is copied into it, and what is not a pattern.
        (
            "a",
            "new",
            {"recursive": True, "maxdepth": 1},
            {"new/1": "1", "new/2": "2", "a/b/3": "3"},
        ),
        ("a", "a/c", {"recursive": True}, {"a/c/1": "1", "a/c/2": "2", "a/c/b/3": "3"}),
        (["a/1", "a/2"], ["x", "y"], {}, {"x": "1", "y": "2", "a/b/3": "3"}),
        (["a/1", "a/2"], ["a/2", "x"], {}, FilepathsCollisionError),
        (["a/1", "a/2"], ["x", "a/1"], {}, FilepathsCollisionError),
        (["a/1", "a"], ["x", "y"], {"recursive": True}, IsADirectoryError),
        ("a", "a/b", {"recursive": True}, {"a/b/a/1": "1", "a/b/a/2": "2", "a/b/a/b/3": "3"}),
        ("a", "new", {}, IsADirectoryError),
        (["a/1", "a/none"], ["x", "y"], {}, FileNotFoundError),
        ("a/none", "new", {}, FileNotFoundError),
    ],
)
def test_a_move_leaves_every_file_at_one_place(
    fs: Any, source: Any, target: Any, options: Any, moved: Any
) -> None:
    before = {"a/1": "1", "a/2": "2", "a/b/3": "3"}
    for name, body in before.items():
        fs.pipe(f"files/{name}", body.encode())

    def named(path: Any) -> Any:
        return [named(each) for each in path] if isinstance(path, list) else f"files/{path}"

    if isinstance(moved, dict):
        fs.mv(named(source), named(target), **options)
    else:
        with pytest.raises(moved):
            fs.mv(named(source), named(target), **options)
        moved = before
    found = {name.removeprefix("files/"): fs.cat_file(name).decode() for name in fs.find("")}
    assert found == moved


def test_a_file_belongs_to_the_transaction_in_which_it_was_opened(fs: Any) -> None:
    with pytest.raises(StopError), fs.transaction:
        late = fs.open("files/late", "wb")
        late.write(b"1")
        raise StopError
    with pytest.raises(TransactionException, match="has ended"):
        late.close()
    with fs.transaction:
        with pytest.raises(StopError), fs.transaction:
            inner = fs.open("files/inner", "wb")
            raise StopError
        with pytest.raises(TransactionException, match="has ended"):
            inner.close()
        with fs.transaction:
            kept = fs.open("files/kept", "wb")
        kept.write(b"2")
        kept.close()
    assert fs.find("") == ["files/kept"]


@pytest.mark.parametrize(
    ("mode", "compression"),
    [("wb", None), ("w", None), ("wb", "gzip"), ("wt", "xz"), ("xt", "bz2")],
)
def test_what_is_not_written_to_its_end_is_not_stored(
    fs: Any, mode: str, compression: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    half: Any = b"half" if "b" in mode else "half"
    options = {"compression": compression, "block_size": 2}
    with pytest.raises(StopError), fs.open("files/a", mode, **options) as file:
        file.write(half)
        raise StopError
    assert caplog.messages == []
    file = fs.open("files/a", mode, **options)
    file.write(half)
    del file
    # A frame may hold it until the loop's thread has dropped the error that it raised for this one.
    while "files/a was written, but never closed" not in caplog.text:
        assert fs.find("") == []
        gc.collect()
    assert fs.find("") == []
    with fs.open("files/a", mode, **options) as file:
        file.write(half)
    assert fs.open("files/a", mode.replace("w", "r").replace("x", "r"), **options).read() == half


def test_what_is_appended_follows_what_is_there_then(fs: Any) -> None:
    fs.pipe("files/a", b"1")
    with fs.open("files/a", "ab") as file:
        assert file.tell() == 1
        file.write(b"3")
        fs.pipe("files/a", b"12")
    assert fs.cat_file("files/a") == b"123"
    with fs.open("files/b", "a") as file:
        file.write("new")
    assert fs.cat_file("files/b") == b"new"


def test_a_directory_is_deleted_only_if_that_is_asked_for(fs: Any) -> None:
    fs.pipe({"files/a/1": b"", "files/a/b/2": b""})
    for wrong in ("files/a", ["files/a/1", "files/a"]):
        with pytest.raises(IsADirectoryError, match="recursive"):
            fs.rm(wrong)
    fs.rm("files/a/*")
    assert fs.find("files") == ["files/a/b/2"]
    with pytest.raises(IsADirectoryError):
        fs.cp_file("files/a/b/2", "other")


def test_a_class_of_the_same_name_has_a_filesystem_of_its_own() -> None:
    def made(namespace: str) -> Any:
        class Local(UnitOfWork):
            files = RepoField(FullRepository, namespace=namespace)
            config = UOW.config

        return Local

    first, second = made("local1"), made("local2")
    fsspec.filesystem("fennflow", uow=first).pipe("files/a", b"1")
    assert fsspec.filesystem("fennflow", uow=second).find("files") == []
    again = fsspec.filesystem("fennflow", uow=second)
    assert fsspec.filesystem("fennflow", uow=second) is again


def test_modes_and_parts(fs: Any) -> None:
    with fs.open("files/a", "w") as file:
        file.write("Grüße")
    with fs.open("files/a", "ab") as file:
        file.write(b"!")
    assert fs.open("files/a", "r", encoding="utf-8").read() == "Grüße!"
    assert fs.cat_file("files/a", start=-1) == b"!"
    assert fs.cat_file("files/a", 1, 3) == b"r\xc3"
    assert fs.cat_file("files/a", 5, 3) == b""
    with pytest.raises(FileExistsError), fs.open("files/a", "xb") as file:
        file.write(b"")
    with pytest.raises(FileExistsError):
        fs.pipe_file("files/a", b"", mode="create")
    assert fs.info("files/a")["size"] == 8
    assert fs.created("files/a") <= fs.modified("files/a")
    before = fs.ukey("files/a")
    file = fs.open("files/a", block_size=2)
    assert file.read(2) == b"Gr"
    fs.pipe_file("files/a", b"12345678")
    assert fs.ukey("files/a") != before
    with pytest.raises(Exception, match="was changed"):
        file.read()
    fs.touch("files/empty")
    assert fs.cat_file("files/empty") == b""


def test_what_is_missing_or_wrong_is_said(fs: Any) -> None:
    for act in (fs.cat_file, fs.info, fs.ls, fs.rm, fs.rm_file, fs.open):
        with pytest.raises(FileNotFoundError):
            act("files/none")
    with pytest.raises(FileNotFoundError, match="files, other"):
        fs.ls("nowhere")
    with pytest.raises(IsADirectoryError):
        fs.pipe("files", b"")
    for ask in (fs.created, fs.modified, fs.ukey):
        with pytest.raises(IsADirectoryError):
            ask("files")
    assert not fs.exists("files/none")
    assert fs.isdir("files")
    wrongs: list[Any] = ["nothing", "test_fsspec:None", int]
    for wrong in wrongs:
        with pytest.raises(ConfigException, match="uow="):
            FennFlowFileSystem(uow=wrong)
    with pytest.raises(ConfigException, match="storage_options="):
        fsspec.open("fennflow://files/a.txt", "wb")


@pytest.mark.parametrize(
    "path", ["../other/a", "a/../../b", "/a", "a\0b", "\ud800", ".fennflow/x", "."]
)
def test_no_path_leaves_its_repository(fs: Any, path: str) -> None:
    fs.pipe("other/a", b"1")
    path = f"files/{path}"
    for act in (fs.cat_file, fs.info, fs.ls, fs.rm_file, fs.created, fs.ukey, fs.sign):
        with pytest.raises(FileNotFoundError) as caught:
            act(path)
        assert isinstance(caught.value, KeyException)
    assert [ask(path) for ask in (fs.exists, fs.isdir, fs.isfile, fs.find)] == [False] * 3 + [[]]
    writes: list[Callable[[], object]] = [
        lambda: fs.pipe_file(path, b"2"),
        lambda: fs.cp_file("other/a", path),
        lambda: fs.open(path, "wb"),  # not only when it is closed
    ]
    for write in writes:
        with pytest.raises(KeyException):
            write()
    assert fs.find("") == ["other/a"]


@pytest.mark.parametrize("first", ["savepoint", "__class__", "config", "", ".."])
def test_no_path_leads_to_what_is_not_a_repository(fs: Any, first: str) -> None:
    for act in (fs.cat_file, fs.info, fs.rm_file, fs.created, fs.ukey, fs.touch):
        with pytest.raises(FileNotFoundError, match="has no field"):
            act(f"{first}/a")


def test_what_is_said_of_a_path_is_escaped(fs: Any, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("x\x1b[2J\n", "files/\u202e"):
        with pytest.raises(FileNotFoundError) as caught:
            fs.info(path)
        assert str(caught.value).isprintable()
    fs.open("files/\u202e", "wb").__del__()
    assert "files/\\u202e was written, but never closed" in caplog.text


def test_it_is_found_by_its_url_and_travels_to_other_processes(fs: Any) -> None:
    with fsspec.open("fennflow://files/a.txt", "wt", uow="test_fsspec:UOW") as file:
        file.write("Hello")
    assert fs.cat("fennflow://files/a.txt") == b"Hello"
    again = pickle.loads(pickle.dumps(fs))
    assert again.cat("files/a.txt") == b"Hello"


def test_threads_of_a_library_write_in_the_transaction(fs: Any) -> None:
    with pytest.raises(StopError), fs.transaction:
        threads = [threading.Thread(target=fs.pipe, args=(f"files/{n}", b"1")) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(fs.find("files")) == 3
        raise StopError
    assert fs.find("files") == []


def test_a_thread_does_not_begin_a_transaction_inside_that_of_another(fs: Any) -> None:
    refused: list[TransactionException] = []

    def begin() -> None:
        try:
            fs.start_transaction()
        except TransactionException as error:
            refused.append(error)

    with fs.transaction:
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()
        fs.pipe("files/a", b"1")
    assert "each thread" in str(refused[0])
    assert fs.find("files") == ["files/a"]
    with pytest.raises(TransactionException, match="open"):
        fs.end_transaction()


@pytest.mark.docs
def test_pandas_pyarrow_and_zarr_leave_nothing_after_an_exception(fs: Any) -> None:
    pandas = pytest.importorskip("pandas")
    parquet = pytest.importorskip("pyarrow.parquet")
    zarr = pytest.importorskip("zarr")
    frame = pandas.DataFrame({"month": ["may", "june"], "sum": [1, 2]})
    table = pytest.importorskip("pyarrow").Table.from_pandas(frame)

    wrapped = AsyncFileSystemWrapper(fs, asynchronous=True)

    def write() -> None:
        frame.to_csv("fennflow://files/a.csv", storage_options={"uow": UOW}, index=False)
        frame.to_parquet("fennflow://files/a.parquet", storage_options={"uow": UOW})
        parquet.write_to_dataset(table, "files/set", partition_cols=["month"], filesystem=fs)
        store = zarr.storage.FsspecStore(wrapped, path="files/a.zarr")
        zarr.create_array(store, data=frame["sum"].to_numpy(), overwrite=True)

    with pytest.raises(StopError), fs.transaction:
        write()
        assert len(fs.find("files")) > 4
        raise StopError
    assert fs.find("files") == []
    with fs.transaction:
        write()
    options = {"storage_options": {"uow": UOW}}
    assert pandas.read_csv("fennflow://files/a.csv", **options).equals(frame)
    assert pandas.read_parquet("fennflow://files/a.parquet", **options).equals(frame)
    assert parquet.read_table("files/set", filesystem=fs).num_rows == 2
    store = zarr.storage.FsspecStore(wrapped, path="files/a.zarr")
    assert list(zarr.open_array(store, mode="r")[:]) == [1, 2]
