"""The program's commands on a bucket that holds its own catalog: no user module is needed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import uuid_utils

from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import BucketBackendConfig, Delete, InMemoryBackendConfig, dump_steps
from fennflow.cli import app, maintenance
from fennflow.config import ConnectorConfig
from fennflow.connectors import Location, ObstoreConnectorConfig
from fennflow.files import TextContent
from fennflow.repositories import CrudRepository, RepoField
from fennflow_bucket.log import LogEntry
from shells import Program
from stores import make_store, numbers


def put(connector: ConnectorConfig, backend: BucketBackendConfig, **files: str) -> None:
    """Put files, like the application that owns the catalog."""
    bucket = backend.namespace

    class UOW(UnitOfWork):
        letters = RepoField(CrudRepository, namespace=bucket, prefix="letters/")
        config = ConfigDict(connector=connector, backend=backend)

    async def work() -> None:
        async with UOW() as uow:
            await uow.letters.put(
                *(TextContent.from_content(text, filename=name) for name, text in files.items())
            )

    asyncio.run(work())


@pytest.fixture
def bucket(program: Program) -> Path:
    """Return a directory that is a bucket with a catalog."""
    directory = program.directory / "store" / "bucket"
    directory.mkdir(parents=True)
    connector = ObstoreConnectorConfig(url=f"file://{directory.parent}/")
    put(connector, BucketBackendConfig(namespace="bucket"), ann="Dear Ann", bob="Dear Bob")
    (directory / "strange.txt").write_text("not the application's")
    program.target = f"file://{directory}"
    return directory


def test_files_are_found_without_a_module(program: Program, bucket: Path) -> None:
    assert program("ls").out.split() == ["letters/"]
    assert program.files() == ["letters/ann", "letters/bob"]
    assert program("cat", ":letters/ann").out == "Dear Ann"
    [info] = program("stat", ":letters/ann", "--json").json
    assert info["size"] == len("Dear Ann")
    # A read-only command does not adopt objects that are not in the catalog.
    assert (bucket / "strange.txt").exists()
    assert program("cat", ":strange.txt").code == 1


def test_files_go_in_and_out_without_a_module(program: Program, bucket: Path) -> None:
    (program.directory / "new.txt").write_text("Dear Zoë")
    assert program("cp", "new.txt", ":letters/zoe").code == 0
    assert (bucket / "letters" / "zoe").read_text() == "Dear Zoë"
    assert program("cp", ":letters/zoe", "back.txt").code == 0
    assert (program.directory / "back.txt").read_text() == "Dear Zoë"


@pytest.mark.usefixtures("bucket")
def test_the_journal_is_found_without_a_module(program: Program) -> None:
    assert "No transaction is open" in program("transactions").out
    assert program("recover", "--json").json["pending"] == 0
    found = program("doctor", "--json").json
    assert found["guarantees"] == {"shared": "network", "durable": True}
    assert found["problems"] == []


@pytest.mark.usefixtures("bucket")
def test_commits_are_listed_behind_a_cursor(program: Program) -> None:
    first, *more = program("commits", "--json").out.splitlines()
    commit = json.loads(first)
    assert [file["path"] for file in commit["records"]] == ["letters/ann", "letters/bob"]
    assert more == []
    assert program("commits", "--after", commit["cursor"]).out == "No commits.\n"
    assert program("rm", ":letters/ann").code == 0
    head, line = program("commits", "--after", commit["cursor"]).out.splitlines()
    assert line == "  deleted  bucket/letters/ann"
    assert len(program("commits", "--json").out.splitlines()) == 2
    assert program("commits", "--after", head.split()[-1], "--json").out == ""
    done = program("commits", "--after", "nothing")
    assert (done.code, done.out) == (1, "")
    assert "'nothing' is not a cursor" in done.err
    assert "commit_retention" in program("commits", "--after", "9.9.").err


async def test_commits_are_printed_as_they_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class UOW(UnitOfWork):
        files = RepoField(CrudRepository, namespace="bucket")
        config = ConfigDict(backend=InMemoryBackendConfig(name=f"follow{next(numbers)}"))

    printed = asyncio.Event()

    def show_json(commit: object) -> None:
        app.show_json(commit)
        printed.set()

    monkeypatch.setattr(maintenance, "show_json", show_json)
    following = asyncio.create_task(maintenance._show_commits(UOW, None, 0.001, as_json=True))
    for name in "ab":
        async with UOW() as uow:
            await uow.files.put(TextContent.from_content("Dear Ann", filename=name))
        await printed.wait()
        printed.clear()
        assert json.loads(capsys.readouterr().out)["records"][0]["path"] == name
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following


def test_a_look_finishes_nothing_that_a_log_names(program: Program) -> None:
    """The writer of the log is unknown, and it may name any bucket that the credentials reach."""
    store = program.directory / "store"
    log = store / "bucket/.fennflow/catalog/default/log"
    victim = store / "other/victim"
    for directory in (log, victim.parent):
        directory.mkdir(parents=True)
    victim.write_text("of another application")
    step = Delete(namespace="other", location=Location("victim"))
    names = {"id": str(uuid_utils.uuid7()), "token": 0}
    keys = [["bucket", "a"], ["other", "victim"]]
    begin = {"begins": True, "keys": keys, "intents": [], "by": "web-1:1"}
    commit = {"records": [], "removed": [], "steps": dump_steps([step]), "late": [], "jobs": []}
    commands = [("begin_writes", names | begin), ("commit", names | commit)]
    entry = LogEntry(
        position=0, writer="w", seq=1, at=1, digest=0, lease=1, late=1, waited=0, commands=commands
    )
    (log / f"{0:020}").write_bytes(entry.dump())
    program.target = f"file://{store}/bucket"
    assert program("ls").code == 0
    [found] = program("transactions", "--json").json
    assert found["transaction_id"] == names["id"]
    (program.directory / "new.txt").write_text("new")
    done = program("cp", "new.txt", ":a")
    assert (done.code, "RecordLocked" in done.err) == (1, True)
    assert victim.exists()
    assert program("recover", "--json").json["rolled_forward"] == 1
    assert not victim.exists()


def test_a_bucket_without_a_catalog_gets_none(program: Program) -> None:
    directory = program.directory / "store" / "bucket"
    directory.mkdir(parents=True)
    program.target = f"file://{directory}"
    done = program("ls")
    assert (done.code, done.out) == (1, "")
    assert "holds no catalog 'default'" in done.err
    assert list(directory.iterdir()) == []


def test_a_directory_that_does_not_exist_is_not_made(program: Program) -> None:
    directory = program.directory / "my%20files"
    program.target = f"file://{directory}/bucket"
    for command in (["ls"], ["cp", "app.py", ":a"], ["doctor"]):
        done = program(*command)
        assert (done.code, done.out) == (2, "")
        assert "There is no directory" in done.err
    assert not directory.exists()
    assert not (program.directory / "my files").exists()


def test_a_catalog_of_another_name_is_named(program: Program) -> None:
    directory = program.directory / "store" / "bucket"
    directory.mkdir(parents=True)
    connector = ObstoreConnectorConfig(url=f"file://{directory.parent}/")
    put(connector, BucketBackendConfig(namespace="bucket", name="post"), ann="Dear Ann")
    program.target = f"file://{directory}"
    done = program("ls")
    assert done.code == 1
    assert f"file://{directory}#post" in done.err.replace("\n", "")
    program.target += "#post"
    assert program.files() == ["letters/ann"]


async def test_a_bucket_on_s3_is_found_by_its_name(
    program: Program, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    store = await make_store("moto", request)
    assert store.server is not None
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.server.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.server.secret_key)
    program.target = f"s3://{store.namespace}"
    backend = BucketBackendConfig(namespace=store.namespace)
    await asyncio.to_thread(put, store.config, backend, ann="Dear Ann")
    done = await asyncio.to_thread(program, "cat", ":letters/ann")
    assert done.out == "Dear Ann"


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/directory",
        "s3://ann:Pl4in@bucket",
        "s3://ann:Pl/4in@bucket",
        "s3://Pl4in@bucket?x=y",
        "s3://bucket?token=Pl4in",
        "gs://Pl4in@bucket",
        "s3://",
        "http://[odd/bucket",
        "://bucket",
    ],
)
def test_a_url_that_names_no_bucket_is_refused_without_its_password(
    program: Program, url: str
) -> None:
    for arguments in (("ls", url), ("doctor", "--store", url)):
        done = program(*arguments, target=False)
        assert done.code in {1, 2}
        assert "Traceback" not in done.err
        assert "4in" not in done.err
        assert url != "s3://bucket/directory" or "names no bucket" in done.err
