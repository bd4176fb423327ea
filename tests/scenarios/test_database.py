"""The tables of the backend on SQLite and PostgreSQL: their creation, and refused configurations."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, closing, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from fennflow.backends import Commit, ObjectKey, Settlement, SqlalchemyBackendConfig
from fennflow.exceptions import (
    BackendUnavailableException,
    ConfigException,
    ConflictException,
    FennFlowException,
    RecordLockedException,
)
from fennflow.files import TextContent
from fennflow.testing import PostgresqlServer, S3Server
from fennflow.testing.backend_values import A, B, new_transaction, opened, plan_for, put, record
from fennflow_sqlalchemy import include_object_for, metadata_for, tables
from fennflow_sqlalchemy.database import Database, LockWaitTimeoutError
from fennflow_sqlalchemy.engines import Postgresql, Sqlite, open_databases, shown
from stores import Store, new_bucket, numbers, s3_config

PREFIXES = ["", "fennflow_", "my_"]


@asynccontextmanager
async def engine_of(config: SqlalchemyBackendConfig) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(config.url.get_secret_value())
    try:
        yield engine
    finally:
        await engine.dispose()


def url_of(database: str, request: pytest.FixtureRequest) -> str:
    if database == "sqlite":
        return f"sqlite:///{request.getfixturevalue('tmp_path')}/{next(numbers)}.db"
    server: PostgresqlServer = request.getfixturevalue("postgresql")
    return server.new_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """Return a database without tables."""
    return url_of(request.param, request)


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_catalogs_under_different_prefixes_share_a_database(url: str, prefix: str) -> None:
    config = SqlalchemyBackendConfig(url=url, table_prefix=prefix)
    other = SqlalchemyBackendConfig(url=url, table_prefix="other_", journal=journal(config))
    async with opened(config) as backend, opened(other) as stranger:
        await put(backend, A)
        assert set(await backend.records([A])) == {A}
        assert await stranger.records([A]) == {}
        assert backend.catalog_id != stranger.catalog_id


def journal(config: SqlalchemyBackendConfig) -> Path | None:
    """Return a separate journal for a second catalog in one SQLite file."""
    url = config.url.get_secret_value()
    return Path(f"{url.partition(':///')[2]}.other") if url.startswith("sqlite") else None


async def test_tables_are_in_the_schema_that_the_user_names(
    request: pytest.FixtureRequest,
) -> None:
    url = url_of("postgresql", request)
    config = SqlalchemyBackendConfig(url=url, schema_name="Files")
    async with engine_of(config) as engine, engine.begin() as connection:
        await connection.execute(sqlalchemy.schema.CreateSchema("Files"))
    async with opened(config) as backend:
        await put(backend, A)
    async with engine_of(config) as engine, engine.connect() as connection:
        names = await connection.run_sync(
            lambda sync: sqlalchemy.inspect(sync).get_table_names(schema="Files")
        )
        assert "fennflow_records" in names
        default = await connection.run_sync(lambda sync: sqlalchemy.inspect(sync).get_table_names())
        assert default == []


async def test_the_first_process_creates_the_tables_and_all_use_them(url: str) -> None:
    config = SqlalchemyBackendConfig(url=url, pool_size=1)

    async def use(number: int) -> str:
        async with opened(config) as backend:
            await put(backend, ObjectKey("bucket", f"{number}"))
            return backend.catalog_id

    async with asyncio.TaskGroup() as group:
        uses = [group.create_task(use(number)) for number in range(8)]
    assert len({each.result() for each in uses}) == 1
    async with opened(config) as backend:
        assert len(await backend.scan("bucket", prefix="", start="", limit=99)) == 8


@pytest.mark.parametrize("mode", [None, 0o660])
async def test_sqlite_files_are_private_unless_configured_otherwise(
    tmp_path: Path, mode: int | None
) -> None:
    def modes() -> dict[str, int]:
        return {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}

    url = f"sqlite:///{tmp_path}/a.db"
    config = SqlalchemyBackendConfig(url=url)
    if mode is not None:
        config = SqlalchemyBackendConfig(url=url, file_mode=mode)
    before = os.umask(0o022)
    try:
        async with opened(config) as backend:
            await put(backend, A)
            found = modes()
    finally:
        os.umask(before)
    assert {"a.db", "a.db-wal", "a.journal.db", "a.journal.db-wal"} <= found.keys()
    assert set(found.values()) == {mode or 0o600}


async def test_a_file_that_cannot_be_switched_to_wal_now_is_tried_again(tmp_path: Path) -> None:
    """SQLite refuses one of two processes that switch a new file at once, whatever their time limits."""
    path = tmp_path / "new.db"
    config = SqlalchemyBackendConfig(url=f"sqlite:///{path}", busy_timeout=0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE theirs (value TEXT)")
        other.execute("BEGIN")
        other.execute("SELECT * FROM theirs").fetchall()

        async def let_go() -> None:
            await asyncio.sleep(0.3)
            other.execute("COMMIT")

        async with asyncio.TaskGroup() as group:
            group.create_task(let_go())
            async with opened(config) as backend:
                await put(backend, A)


async def test_a_writer_with_less_time_does_not_queue_behind_a_waiting_one(tmp_path: Path) -> None:
    """A writer of SQLite waits for other processes; a writer with less time must not wait for it."""
    config = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/turns.db")
    database, _ = open_databases(config, lease_ttl=60)
    assert isinstance(database, Sqlite)
    database.turn_wait = 0.01
    entered, done = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        entered.set()
        done.wait(100)

    def never(connection: Connection) -> None:
        pytest.fail("it is another's turn")

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(database.run(hold))
            await asyncio.to_thread(entered.wait)
            with pytest.raises(LockWaitTimeoutError):
                await database.run(never, lock_wait=0.01)
            done.set()
        await database.run(hold, lock_wait=0.01)
    finally:
        await database.aclose()


@asynccontextmanager
async def waiting_writers(
    tmp_path: Path, *works: Callable[[Connection], object]
) -> AsyncGenerator[tuple[Sqlite, list[asyncio.Task[object]], Callable[[], None]]]:
    """Let writers wait for one that holds the file, and yield a function that ends it."""
    config = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/shared.db")
    database, _ = open_databases(config, lease_ttl=60)
    assert isinstance(database, Sqlite)
    await database.run(execute("CREATE TABLE made (value TEXT)"))
    entered, done = threading.Event(), threading.Event()

    def hold(_connection: Connection) -> None:
        entered.set()
        done.wait(100)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(database.run(hold))
            await asyncio.to_thread(entered.wait)
            tasks = [asyncio.create_task(database.run(work)) for work in works]
            for _ in range(10):
                await asyncio.sleep(0)
            try:
                yield database, tasks, done.set
            finally:
                done.set()
        await asyncio.wait(tasks)
    finally:
        await database.aclose()


def execute(statement: str) -> Callable[[Connection], None]:
    def work(connection: Connection) -> None:
        connection.execute(sqlalchemy.text(statement))

    return work


def made(value: str) -> Callable[[Connection], None]:
    return execute(f"INSERT INTO made VALUES ('{value}')")


async def values(database: Sqlite) -> list[str]:
    def read(connection: Connection) -> list[str]:
        return list(connection.scalars(sqlalchemy.text("SELECT value FROM made ORDER BY value")))

    return await database.run(read, write=False)


async def test_writers_that_wait_share_one_transaction(tmp_path: Path) -> None:
    works = [made(str(number)) for number in range(8)]
    async with waiting_writers(tmp_path, *works) as (database, tasks, go_on):
        commits: list[object] = []
        event.listen(database.engine, "commit", commits.append)
        go_on()
        await asyncio.wait(tasks)
        assert len(commits) == 2  # of the one they waited for, and theirs
        assert await values(database) == sorted(map(str, range(8)))


async def test_one_of_several_writers_that_fails_undoes_its_own_alone(tmp_path: Path) -> None:
    def fail(connection: Connection) -> None:
        made("wrong")(connection)
        message = "mine"
        raise LookupError(message)

    works = [made("a"), fail, execute("no statement"), made("b")]
    async with waiting_writers(tmp_path, *works) as (database, tasks, go_on):
        go_on()
        await asyncio.wait(tasks)
        assert [type(task.exception()) for task in tasks] == [
            type(None),
            LookupError,
            BackendUnavailableException,
            type(None),
        ]
        assert await values(database) == ["a", "b"]


async def test_a_failed_group_commit_is_an_error_of_each_writer(tmp_path: Path) -> None:
    commits: list[Connection] = []

    def refuse(connection: Connection) -> None:
        commits.append(connection)
        if len(commits) > 1:  # not of the one they waited for
            statement = "COMMIT"
            raise OperationalError(statement, None, sqlite3.OperationalError("full"))

    async with waiting_writers(tmp_path, made("a"), made("b")) as (database, tasks, go_on):
        event.listen(database.engine, "commit", refuse)
        go_on()
        await asyncio.wait(tasks)
        event.remove(database.engine, "commit", refuse)
        errors = [task.exception() for task in tasks]
        assert [type(error) for error in errors] == [BackendUnavailableException] * 2
        assert errors[0] is not errors[1]
        assert await values(database) == []


async def test_writers_of_a_transaction_that_sqlite_undid_write_again(tmp_path: Path) -> None:
    """SQLite undoes all of it, as when the disk is full."""

    def undo_everything(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.execute("ROLLBACK")
        execute("no statement")(connection)

    works = [made("a"), undo_everything, made("b")]
    async with waiting_writers(tmp_path, *works) as (database, tasks, go_on):
        go_on()
        await asyncio.wait(tasks)
        assert isinstance(tasks[1].exception(), BackendUnavailableException)
        assert await values(database) == ["a", "b"]


async def test_a_writer_that_is_cancelled_before_its_turn_writes_nothing(tmp_path: Path) -> None:
    works = [made("a"), made("b"), made("c")]
    async with waiting_writers(tmp_path, *works) as (database, tasks, go_on):
        for task in tasks[:2]:
            task.cancel()
        await asyncio.wait(tasks[:2])
        go_on()
        await asyncio.wait(tasks)
        assert [task.cancelled() for task in tasks] == [True, True, False]
        assert await values(database) == ["c"]


async def test_a_writer_that_is_cancelled_when_its_turn_comes_passes_it_on(tmp_path: Path) -> None:
    async with waiting_writers(tmp_path, made("a"), made("b")) as (database, tasks, go_on):
        database._waiting[0].turn.add_done_callback(lambda _: tasks[0].cancel())
        go_on()
        await asyncio.wait(tasks)
        assert tasks[0].cancelled()
        assert await values(database) == ["b"]


async def test_a_writer_that_is_cancelled_while_others_write_it_is_ended_first(
    tmp_path: Path,
) -> None:
    entered, done = threading.Event(), threading.Event()

    def slow(_connection: Connection) -> None:
        entered.set()
        done.wait(100)

    async with waiting_writers(tmp_path, slow, made("b")) as (database, tasks, go_on):
        go_on()
        await asyncio.to_thread(entered.wait)
        for _ in range(3):
            tasks[1].cancel()
            await asyncio.sleep(0)
        assert not tasks[1].done()
        done.set()
        await asyncio.wait(tasks)
        assert tasks[1].cancelled()
        assert await values(database) == ["b"]


async def test_a_writer_with_less_time_does_not_cut_off_others_of_its_group(
    tmp_path: Path,
) -> None:
    """Another process holds the file: one writer gives up, the other one finally writes."""
    config = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/held.db")
    database, _ = open_databases(config, lease_ttl=60, lock_timeout=60)
    assert isinstance(database, Sqlite)
    await database.run(execute("CREATE TABLE made (value TEXT)"))
    with closing(sqlite3.connect(tmp_path / "held.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        first = asyncio.create_task(database.run(made("first")))
        patient = asyncio.create_task(database.run(made("patient")))
        hasty = asyncio.create_task(database.run(made("hasty"), lock_wait=0.01))
        for _ in range(10):
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({hasty})
        assert isinstance(hasty.exception(), LockWaitTimeoutError)
        assert not patient.done()
        other.execute("COMMIT")
        await asyncio.wait({first, patient})
    assert first.cancelled()
    assert await values(database) == ["patient"]
    await database.aclose()


async def test_a_cancelled_caller_does_not_wait_for_another_process(tmp_path: Path) -> None:
    config = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/held.db")
    database, _ = open_databases(config, lease_ttl=60, lock_timeout=60)
    done: list[int] = []
    with closing(sqlite3.connect(tmp_path / "held.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await database.run(lambda _: done.append(1))
        other.execute("COMMIT")
    assert isinstance(database, Sqlite)
    pool: Any = database.engine.pool
    assert pool.checkedout() == 0
    await database.run(lambda _: done.append(2))
    assert done == [2]
    await database.aclose()


async def test_what_is_under_way_when_it_is_cancelled_is_ended_first(tmp_path: Path) -> None:
    """No work continues after its caller sees the cancellation."""
    config = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/ended.db")
    database, _ = open_databases(config, lease_ttl=60)
    entered, done = threading.Event(), threading.Event()

    def work(connection: Connection) -> None:
        entered.set()
        done.wait(100)
        connection.execute(sqlalchemy.text("CREATE TABLE made (value TEXT)"))

    task = asyncio.create_task(database.run(work))
    await asyncio.to_thread(entered.wait)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    done.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    made = sqlalchemy.text("SELECT count(*) FROM made")
    assert await database.run(lambda connection: connection.scalar(made), write=False) == 0
    await database.aclose()


async def test_writers_of_both_files_do_not_wait_for_each_others_connections(
    tmp_path: Path,
) -> None:
    """Each looks into the other's file in the midst of its own transaction."""
    config = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/both.db", pool_size=1)
    databases = open_databases(config, lease_ttl=60)
    both = threading.Barrier(2)
    one = sqlalchemy.text("SELECT 1")

    async def write(first: Database, second: Database) -> None:
        def work(connection: Connection) -> None:
            both.wait(60)
            with second.peek(connection) as peeked:
                assert peeked.scalar(one) == 1

        await first.run(work)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(write(*databases))
        group.create_task(write(*reversed(databases)))
    for each in databases:
        await each.aclose()


async def test_a_loop_that_ends_loses_no_connection(request: pytest.FixtureRequest) -> None:
    """The loop cancels all tasks, even clean-up tasks that have not begun."""

    def stillborn(loop: Any, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        task.cancel()
        return task

    def work(connection: Connection) -> None:
        connection.execute(sqlalchemy.text("SELECT 1"))

    config = SqlalchemyBackendConfig(url=url_of("postgresql", request))
    database = open_databases(config, lease_ttl=1.0)[0]
    assert isinstance(database, Postgresql)
    await database.run(work)
    loop = asyncio.get_running_loop()
    loop.set_task_factory(stillborn)
    try:
        with pytest.raises(asyncio.CancelledError):
            await database.run(work)
    finally:
        loop.set_task_factory(None)
    pool: Any = database.engine.pool
    assert pool.checkedout() == 0
    await database.aclose()


async def test_alembic_finds_nothing_to_do(url: str) -> None:
    """`metadata` describes all tables, so that migrations can create them."""
    config = SqlalchemyBackendConfig(url=url)
    async with opened(config):
        pass

    def differences(connection: Connection) -> Any:
        names = sqlalchemy.inspect(connection).get_table_names()
        context = MigrationContext.configure(
            connection,
            # SQLite has the journal's tables in another file.
            opts={"include_object": lambda thing, name, kind, *_: kind != "table" or name in names},
        )
        return compare_metadata(context, metadata_for())

    async with engine_of(config) as engine, engine.connect() as connection:
        assert await connection.run_sync(differences) == []


ENV = """
import sqlalchemy
from alembic import context
from {module} import {name}

metadata = sqlalchemy.MetaData()
sqlalchemy.Table("letters", metadata, sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True))
url = context.config.get_main_option("sqlalchemy.url")
with sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, {name}={name})
    with context.begin_transaction():
        context.run_migrations()
"""
TEMPLATE = "revision = '1'\ndown_revision = None\n\n\ndef upgrade():\n    ${upgrades if upgrades else 'pass'}\n"


@pytest.mark.parametrize("name", ["include_object", "print"])
async def test_a_revision_of_alembic_drops_no_tables_of_the_catalog(
    name: str, tmp_path: Path
) -> None:
    async with opened(SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/app.db")):
        pass
    filtered = name == "include_object"
    env = ENV.format(name=name, module="fennflow_sqlalchemy" if filtered else "builtins")
    scripts = tmp_path / "migrations"
    (scripts / "versions").mkdir(parents=True)
    (scripts / "env.py").write_text(env if filtered else env.replace(", print=print", ""))
    (scripts / "script.py.mako").write_text(TEMPLATE)
    config = alembic.config.Config()
    config.set_main_option("script_location", str(scripts))
    config.set_main_option("path_separator", "os")
    config.set_main_option("sqlalchemy.url", f"sqlite:///{tmp_path}/app.db")
    await asyncio.to_thread(alembic.command.revision, config, "letters", autogenerate=True)
    [revision] = (scripts / "versions").glob("*.py")
    written = revision.read_text()
    assert "op.create_table('letters'" in written
    assert ("op.drop_table('fennflow_records')" in written) == (not filtered)


@pytest.mark.parametrize("schema", [None, "files"])
def test_tables_of_the_same_name_in_another_schema_are_the_users(schema: str | None) -> None:
    include = include_object_for("", "files")
    named = sqlalchemy.Table("records", sqlalchemy.MetaData(schema=schema))
    users = sqlalchemy.Table("records", sqlalchemy.MetaData(schema="public"))
    assert not include(named, "records", "table", True, None)  # noqa: FBT003 - Alembic's signature
    assert include(users, "records", "table", True, None)  # noqa: FBT003 - as above
    assert include(users.c, "records", "column", True, None)  # noqa: FBT003 - as above


async def test_tables_that_alembic_is_to_make_are_missed_by_name(url: str) -> None:
    config = SqlalchemyBackendConfig(url=url, create_tables=False, table_prefix="my_")
    with pytest.raises(ConfigException, match=r"my_records\.etag.*create_tables=True"):
        async with opened(config):
            pytest.fail("it must not open")
    made = metadata_for("my_")
    for each in (config, config.model_copy(update={"url": journal_url(config)})):
        async with engine_of(each) as engine, engine.begin() as connection:
            await connection.run_sync(made.create_all)
    async with opened(config) as backend:
        await put(backend, A)
        assert set(await backend.records([A])) == {A}


def journal_url(config: SqlalchemyBackendConfig) -> Any:
    """Return the URL of the journal, which has a separate file on SQLite."""
    url = config.url.get_secret_value()
    if not url.startswith("sqlite"):
        return config.url
    return type(config.url)(url.replace(".db", ".journal.db"))


async def test_tables_of_a_newer_version_are_refused(url: str) -> None:
    config = SqlalchemyBackendConfig(url=url)
    async with opened(config):
        pass
    newer = "UPDATE fennflow_meta SET value = '99' WHERE name = 'schema_version'"
    async with engine_of(config) as engine, engine.begin() as connection:
        await connection.execute(sqlalchemy.text(newer))
    with pytest.raises(ConfigException, match="version 99"):
        async with opened(config):
            pytest.fail("it must not open")


async def test_tables_of_an_older_version_are_migrated_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SqlalchemyBackendConfig(url=url)
    async with opened(config) as backend:
        await put(backend, A)
        catalog_id = backend.catalog_id
    migrated: list[str] = []

    def add_column(connection: Connection, tables_of_file: Any) -> None:
        name = tables_of_file[1].name
        migrated.append(name)
        connection.execute(sqlalchemy.text(f"ALTER TABLE {name} ADD COLUMN colour TEXT"))

    monkeypatch.setattr(tables, "VERSION", 2)
    monkeypatch.setitem(tables._MIGRATIONS, 1, add_column)

    async def use() -> None:
        async with opened(config) as backend:
            assert backend.catalog_id == catalog_id
            assert set(await backend.records([A])) == {A}

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(use())
    assert migrated[0] == "fennflow_records"
    assert len(migrated) == (2 if url.startswith("sqlite") else 1)


async def test_a_journal_of_another_catalog_is_refused(tmp_path: Path) -> None:
    first = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/1.db")
    async with opened(first):
        pass
    mixed = SqlalchemyBackendConfig(
        url=f"sqlite:///{tmp_path}/2.db", journal=tmp_path / "1.journal.db"
    )
    with pytest.raises(ConfigException, match="does not belong to the catalog"):
        async with opened(mixed):
            pytest.fail("it must not open")


@pytest.mark.parametrize(
    "values",
    [
        {"url": "mysql://app:secret@host/database"},
        {"url": "postgresql+pg8000://app:secret@host/database"},
        {"url": "postgresql://app:p@secret@host/database"},
        {"url": "postgresql://app:p@ss/secret@host/database"},
        {"url": "postgresql://app:p@ss?secret@host/database"},
        {"url": "postgresql://us/er:secret@host/database"},
        {"url": "postgresql://app:password@host:secret/database"},
        {"url": "sqlite://app:secret@host/database"},
        {"url": "sqlite://"},
        {"url": "sqlite:///:memory:"},
        {"url": "sqlite:///sec\0ret.db"},
        {"url": "postgresql://app:secret@host:65536/database"},
        {"url": "postgresql://app:secret@\ud800/database"},
        {"url": "secret"},
        {"table_prefix": "a; DROP TABLE secret"},
        {"schema_name": 'a"secret'},
        {"pool_size": 0},
    ],
)
def test_a_config_that_cannot_work_is_refused_without_showing_it(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigException) as caught:
        SqlalchemyBackendConfig(**values)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("driver", ["", "+asyncpg", "+psycopg", "+psycopg2", "+psycopg_async"])
def test_a_url_of_any_driver_is_that_of_the_backend(driver: str) -> None:
    options = "connect_timeout=5&channel_binding=prefer&sslmode=require"
    config = SqlalchemyBackendConfig(url=f"postgresql{driver}://app@host/database?{options}")
    assert config.url.get_secret_value().startswith("postgresql+asyncpg://app@host/database?")
    with pytest.raises(ConfigException, match="channel_binding"):
        SqlalchemyBackendConfig(url=f"postgresql{driver}://app@host/db?channel_binding=require")


@pytest.mark.parametrize("password", ["secret", "p%40secret", "secret/secret", "p:secret"])
async def test_an_unreachable_database_is_reported_without_its_password(password: str) -> None:
    url = f"postgresql://app:{password}@127.0.0.1:9/database"
    config = SqlalchemyBackendConfig(url=url)
    with pytest.raises(BackendUnavailableException, match=r"127\.0\.0\.1/database") as caught:
        async with opened(config):
            pytest.fail("it must not open")
    assert "secret" not in repr(config)
    assert "secret" not in "".join(traceback.format_exception(caught.value))
    assert not hasattr(caught.value, "__notes__")  # as of a lock that is held


async def test_a_file_that_cannot_be_opened_is_not_taken_for_a_locked_one(tmp_path: Path) -> None:
    config = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/missing/files.db")
    with pytest.raises(BackendUnavailableException, match="Its directory must exist") as caught:
        async with opened(config):
            pytest.fail("it must not open")
    assert not hasattr(caught.value, "__notes__")


def test_what_sqlalchemy_takes_for_the_host_is_not_shown_if_it_may_be_a_password() -> None:
    for password in ("p@secret", "p@secret/secret", "secret"):
        url = sqlalchemy.make_url(f"postgresql+asyncpg://app:{password}@host/database")
        assert "secret" not in shown(url)


async def test_a_statement_that_fails_shows_no_values(url: str) -> None:
    """The values are keys and metadata, which SQLAlchemy's message would show."""
    asked = "hunter2"
    config = SqlalchemyBackendConfig(url=url)
    async with opened(config) as backend:
        await put(backend, A)
        async with engine_of(config) as engine, engine.begin() as connection:
            await connection.execute(text("DROP TABLE fennflow_records"))
        with pytest.raises(FennFlowException) as caught:
            await backend.scan("bucket", prefix=asked, start="", limit=9)
    assert asked not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_a_database_holds_neither_the_bytes_of_files_nor_the_credentials_of_stores(
    database: str, request: pytest.FixtureRequest
) -> None:
    moto: S3Server = request.getfixturevalue("moto")
    url = url_of(database, request)
    config = s3_config(moto, aws_secret_access_key="very-secret")
    store = Store(config, await new_bucket(moto))
    catalog = SqlalchemyBackendConfig(url=url)
    held = ""

    def read(connection: Connection) -> str:
        names = sqlalchemy.inspect(connection).get_table_names()
        return repr([connection.execute(text(f'SELECT * FROM "{each}"')).all() for each in names])

    uow_class = store.uow(backend=catalog)
    async with uow_class() as uow:
        await uow.files.put(TextContent.from_content("the bytes of a file", filename="a.txt"))
    async with uow_class() as uow:
        await uow.files.put(TextContent.from_content("the bytes of a new one", filename="a.txt"))
        for each in (catalog, catalog.model_copy(update={"url": journal_url(catalog)})):
            async with engine_of(each) as engine, engine.connect() as connection:
                held += await connection.run_sync(read)
    assert "a.txt" in held
    assert "the bytes" not in held
    assert "very-secret" not in held


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_the_time_of_a_statement_grows_with_its_rows_and_not_with_their_square(
    database: str, request: pytest.FixtureRequest
) -> None:
    """The planner must not compare all rows of a table with all rows of a parameter."""
    config = SqlalchemyBackendConfig(url=url_of(database, request))
    slow: list[tuple[float, float, float]] = []
    async with opened(config) as backend:
        while len(slow) < 5:
            keys = [ObjectKey("bucket", f"{len(slow)}/{number:06}") for number in range(6000)]
            transaction = new_transaction()
            times = [time.monotonic()]
            await backend.begin_writes(transaction, keys, plan_for(*keys))
            times.append(time.monotonic())
            await backend.settle(transaction, Settlement(keys=keys[:1000]))
            times.append(time.monotonic())
            await backend.settle(transaction, Settlement(keep_locked=keys[1000:]))
            times.append(time.monotonic())
            with pytest.raises(RecordLockedException):
                await backend.begin_writes(new_transaction(), keys[-1:], lambda _: ())
            await backend.begin_writes(new_transaction(), keys[:1], lambda _: ())
            # It takes a tenth of the time to release the keys; it took seven times as long, each time.
            begun, released, kept = (after - before for before, after in pairwise(times))
            if released < 2 * begun and kept < 5 * begun:
                return
            slow.append((begun, released, kept))
    pytest.fail(f"Seconds to lock keys, and to release them in two parts: {slow}")


@asynccontextmanager
async def held(config: SqlalchemyBackendConfig, *statements: str) -> AsyncGenerator[None]:
    """Hold the locks of a user's transaction."""
    async with engine_of(config) as engine, engine.connect() as connection:
        for statement in statements:
            await connection.execute(sqlalchemy.text(statement))
        yield
        await connection.rollback()


async def test_a_heartbeat_does_not_wait_for_a_row_that_another_transaction_holds(
    request: pytest.FixtureRequest,
) -> None:
    """P22: the lease of one transaction must not cost those of all others."""
    config = SqlalchemyBackendConfig(url=url_of("postgresql", request))
    async with opened(config) as backend:
        blocked, free = new_transaction(), new_transaction()
        for transaction, key in ((blocked, A), (free, B)):
            await backend.begin_writes(transaction, [key], plan_for(key))
        lock = f"SELECT * FROM fennflow_transactions WHERE transaction_id = '{blocked.transaction_id}' FOR UPDATE"
        async with held(config, lock), asyncio.timeout(60):
            assert await backend.heartbeat([blocked, free]) == [free]
        assert set(await backend.heartbeat([blocked, free])) == {blocked, free}


@pytest.mark.parametrize("exist", [True, False])
async def test_of_two_that_read_what_the_other_writes_at_most_one_commits(
    request: pytest.FixtureRequest, *, exist: bool
) -> None:
    """Neither waits for the other: on PostgreSQL both pivots run at the same time."""
    config = SqlalchemyBackendConfig(url=url_of("postgresql", request))
    async with opened(config) as backend:
        for turn in range(5):
            one, two = (ObjectKey("bucket", f"{name}{turn}") for name in "ab")
            if exist:
                await put(backend, one, two)
            reads = {key: (await backend.records([key])).get(key) for key in (one, two)}
            commits: list[Coroutine[None, None, None]] = []
            for mine, other in ((one, two), (two, one)):
                transaction = new_transaction()
                await backend.begin_writes(transaction, [mine], plan_for(mine))
                commit = Commit(records=[record(mine, transaction)], reads={other: reads[other]})
                commits.append(backend.commit(transaction, commit))
            async with asyncio.timeout(60):
                results = await asyncio.gather(*commits, return_exceptions=True)
            assert [type(each) for each in results if each is not None][:1] == [ConflictException]


async def test_a_commit_that_reads_waits_for_no_transaction_that_writes(
    request: pytest.FixtureRequest,
) -> None:
    config = SqlalchemyBackendConfig(url=url_of("postgresql", request))
    async with opened(config) as backend:
        await put(backend, A, B)
        read = dict(await backend.records([A, B]))
        change = "UPDATE fennflow_records SET etag = 'other' WHERE key = 'a'"
        async with held(config, change), asyncio.timeout(60):
            for key, refused in ((B, False), (A, True)):
                transaction = new_transaction()
                mine = ObjectKey("bucket", f"reads {key.key}")
                await backend.begin_writes(transaction, [mine], plan_for(mine))
                commit = Commit(records=[record(mine, transaction)], reads={key: read[key]})
                with pytest.raises(ConflictException) if refused else nullcontext():
                    await backend.commit(transaction, commit)


async def test_a_wait_for_a_users_transaction_ends_with_an_error_that_nothing_was_done(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fennflow_sqlalchemy.engines.SHORTEST_LOCK_WAIT", 0.2)
    config = SqlalchemyBackendConfig(url=url)
    async with opened(config, lock_timeout=0.2) as backend:
        await put(backend, A)
        transaction = new_transaction()
        await backend.begin_writes(transaction, [A], plan_for(A))
        change = "UPDATE fennflow_records SET etag = 'other' WHERE key = 'a'"
        async with held(config, change), asyncio.timeout(60):
            with pytest.raises(RecordLockedException, match="nothing was changed"):
                await backend.commit(transaction, Commit(records=[record(A, transaction)]))
            assert await backend.heartbeat([transaction]) == [transaction]
        await backend.commit(transaction, Commit(records=[record(A, transaction, etag="e2")]))
        assert (await backend.records([A]))[A].etag == "e2"
