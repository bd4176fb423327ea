"""A bucket that already has objects, and one that several applications share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from typing_extensions import override

from fennflow import ConfigDict, ReconcileConfig, UnitOfWork, plugins
from fennflow.backends import InMemoryBackendConfig, SqlalchemyBackendConfig
from fennflow.config import BackendConfig
from fennflow.connectors import Deletion, Location, ObjectAttributes, PutRequest, StoredObject
from fennflow.engine import adopting, catalogs
from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConfigException,
    ConnectorUnavailableException,
    FennFlowException,
    KeyException,
    NoSuchKeyException,
    ObjectChangedException,
    RecordAlreadyExistsException,
)
from fennflow.files import JsonContent, TextContent
from fennflow.paths import StoragePath
from fennflow.reports import Difference, ReconcileAction
from fennflow.repositories import RepoField, S3RepoField
from fennflow.testing import faults
from fennflow.testing.backend_values import opened
from stores import FullRepository, FullUOW, Store, make_store, numbers

R = TypeVar("R")
SMALL = ReconcileConfig(batch_size=3)
OLD = [f"old/{number:02}" for number in range(10)]


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


def memory() -> InMemoryBackendConfig:
    return InMemoryBackendConfig(name=f"a{next(numbers)}")


def sqlite(path: Path) -> SqlalchemyBackendConfig:
    return SqlalchemyBackendConfig(url=f"sqlite:///{path}.db")


async def put_raw(store: Store, *keys: str, body: bytes = b"old", kind: str = "text/plain") -> None:
    async with store.connector() as connector:
        attributes = ObjectAttributes(media_type=kind, metadata={"von": "Zoë"})
        for key in keys:
            await connector.put(PutRequest(store.namespace, key, attributes), body)


async def delete_raw(store: Store, key: str) -> None:
    async with store.connector() as connector:
        await connector.delete(store.namespace, [Deletion(location=Location(key))])


async def listed(uow_class: type[UnitOfWork]) -> list[str]:
    async with uow_class() as uow:
        return [str(path) for path in await uow.files.list()]  # type: ignore[attr-defined]


async def listed_or_error(uow_class: type[UnitOfWork]) -> list[str] | FennFlowException:
    try:
        return await listed(uow_class)
    except FennFlowException as error:
        return error


class Counting(faults.Faults):
    """Counts operations, and fails one of them."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.failing: tuple[str, int] | None = None

    @override
    async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
        self.seen[operation.name] += 1
        if self.failing == (operation.name, self.seen[operation.name]):
            message = "The store is unreachable."
            raise ConnectorUnavailableException(message)
        return await effect()


class Listing(faults.FaultyConnector):
    """Counts each listed object as an operation, too."""

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        async def nothing() -> None: ...

        operation = faults.Operation(name="list", part="connector")
        await self.faults.around(operation, nothing)
        async for stored in self.inner.list(namespace, prefix, start_after=start_after):
            await self.faults.around(operation, nothing)
            yield stored


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Generator[Counting]:
    with plugins.override(faults):
        monkeypatch.setattr(faults, "FaultyConnector", Listing)
        yield Counting()


@pytest.fixture
def notes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a catalog leave its note before it first writes, however new it is."""
    monkeypatch.setattr(catalogs, "YOUNG", 0.0)


async def watched(counting: Counting, backend: BackendConfig | None = None) -> Any:
    """Return a store in memory, and the same store with counted connector and backend."""
    inner = await make_store("memory", None)  # type: ignore[arg-type]
    config = faults.FaultyConnectorConfig(inner=inner.config, faults=counting)
    own = faults.FaultyBackendConfig(inner=backend or memory(), faults=counting)
    return inner, Store(config, inner.namespace, settings={"backend": own, "reconcile": SMALL})


async def test_the_listing_alone_fills_a_catalog_and_details_come_when_they_are_needed(
    counting: Counting,
) -> None:
    inner, store = await watched(counting)
    await put_raw(inner, *OLD)
    await put_raw(inner, "data.json", body=b"[1]", kind="application/json")
    uow_class = store.uow()
    assert await listed(uow_class) == ["data.json", *OLD]
    async with uow_class() as uow:
        assert await uow.files.exists("data.json")
        # A HEAD was sent for each of the newest objects.
        assert adopting.NEWEST <= counting.seen["head"] <= 2 * adopting.NEWEST
        assert counting.seen["get"] == 0
        counting.seen.clear()
        file = (await uow.files.get("data.json")).one()
        assert isinstance(file, JsonContent)
        assert (file.content, file.metadata) == ([1], {"von": "Zoë"})
        assert (await uow.files.stat("data.json")).media_type == "application/json"
        assert counting.seen["head"] == 0
        info = await uow.files.stat("old/00")
        assert (info.media_type, info.metadata, info.size) == ("text/plain", {"von": "Zoë"}, 3)
        await uow.files.stat("old/00", "old/01")
        await uow.files.stat("old/00", "old/01")
        assert counting.seen["head"] == 2
        async with uow.files.open("old/02") as stream:
            assert stream.info.media_type == "text/plain"
            assert [chunk async for chunk in stream] == [b"old"]
        await uow.files.copy("old/03", "copied")
        assert (await uow.files.stat("copied")).metadata == {"von": "Zoë"}
        await uow.files.move("old/04", "moved")
        assert (await uow.files.stat("moved")).media_type == "text/plain"
        await uow.files.put(text("new", "old/05"))
        await uow.files.delete("old/06")
    left = ["copied", "data.json", "moved", *(key for key in OLD if key[-1] not in "46")]
    assert await listed(uow_class) == left
    objects = await inner.objects()
    assert sorted(objects) == left
    assert objects["old/05"] == b"new"


async def test_what_changed_before_its_first_use_is_an_error() -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    await put_raw(store, "changed", "gone")
    uow_class = store.uow(backend=memory())
    assert await listed(uow_class) == ["changed", "gone"]
    await put_raw(store, "changed", body=b"other")
    await delete_raw(store, "gone")
    for name in ("changed", "gone"):
        async with uow_class() as uow:
            for call in (uow.files.stat(name), uow.files.get(name), uow.files.copy(name, "copy")):
                with pytest.raises(ObjectChangedException, match="reconcile"):
                    await call
            with pytest.raises(ObjectChangedException):
                async with uow.files.open(name):
                    pass
    await uow_class.reconcile(strategy="replace")
    async with uow_class() as uow:
        assert await uow.files.list() == ["changed"]
        assert (await uow.files.stat("changed")).size == 5


@pytest.mark.once
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("operation", ["list", "fill", "end_fill", "fills", "scan"])
async def test_an_interrupted_reading_shows_nothing_and_is_continued_by_another_process(
    counting: Counting, tmp_path: Path, kind: str, operation: str
) -> None:
    """Whatever fails at any point, readers see everything, or an error that says what to do."""
    for at in range(1, 9):
        backend = memory() if kind == "memory" else sqlite(tmp_path / f"{operation}{at}")
        inner, store = await watched(counting, backend)
        await put_raw(inner, *OLD)
        counting.seen.clear()
        counting.failing = (operation, at)
        first = store.uow()
        seen = await listed_or_error(first)
        assert isinstance(seen, FennFlowException) or seen == OLD
        reached = counting.seen[operation] >= at
        counting.failing = None
        # No reader sees a part of it, and a program without reconciliation gets an error.
        never = inner.uow(backend=backend, reconcile=ReconcileConfig(frequency="never"))
        shown = await listed_or_error(never)
        problems = (await never.diagnose()).problems
        if isinstance(shown, FennFlowException):
            assert "fennflow adopt" in str(shown)
            assert isinstance(seen, FennFlowException)
            assert "fennflow adopt" in seen.__notes__[0]
            assert "fennflow adopt" in problems[0]
        else:
            assert shown in ([], OLD)
            assert problems == ()
        await put_raw(inner, "old/00", body=b"other")
        await delete_raw(inner, "old/01")
        await put_raw(inner, "old/99")
        second = inner.uow(backend=backend)
        if shown != OLD:
            expected = [*(key for key in OLD if key != "old/01"), "old/99"]
            assert await listed(second) == expected
            async with second() as uow:
                assert (await uow.files.get("old/00")).one().content == "other"
            report = (await second.reconcile())[inner.namespace]
            assert report.differences == {}
        else:
            assert await listed(second) == OLD
        if not reached:
            break
    assert at > (0 if operation == "end_fill" else 1)


async def test_a_lifespan_reads_the_bucket_before_its_block_or_fails(counting: Counting) -> None:
    """After that the first call sends nothing."""
    inner, store = await watched(counting)
    await put_raw(inner, *OLD)
    uow_class = store.uow()
    counting.failing = ("fill", 2)
    with pytest.raises(ConnectorUnavailableException):
        async with uow_class.lifespan():
            pytest.fail("The catalog is not filled.")
    counting.failing = None
    async with uow_class.lifespan():
        counting.seen.clear()
        assert await listed(uow_class) == OLD
        assert counting.seen["list"] == counting.seen["head"] == 0


async def test_two_processes_that_read_a_bucket_at_once_record_it_once(
    counting: Counting, tmp_path: Path
) -> None:
    """The later one finds that it is done."""
    backend = sqlite(tmp_path / "catalog")
    inner, store = await watched(counting, backend)
    await put_raw(inner, *OLD)
    slow, fast = store.uow(), inner.uow(backend=backend)

    class Overtaken(Counting):
        @override
        async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
            if operation.name == "fill":
                self.seen["fill"] += 1
                if self.seen["fill"] == 2:
                    assert await listed(fast) == OLD
                    async with fast() as uow:
                        await uow.files.delete("old/09")
            return await effect()

    overtaken = Overtaken()
    own = faults.FaultyBackendConfig(inner=backend, faults=overtaken)
    slow = inner.uow(backend=own, reconcile=SMALL)
    assert await listed(slow) == OLD[:-1]
    assert overtaken.seen["fill"] == 2
    assert await listed(fast) == OLD[:-1]


async def test_what_a_transaction_is_writing_is_not_adopted() -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    backend = memory()
    writer = store.uow(backend=backend, reconcile=ReconcileConfig(frequency="never"))
    async with writer(auto_commit=False) as uow:
        await uow.files.put(text("uncommitted", "mine"))
        await put_raw(store, *OLD)
        report = (await store.uow(backend=backend, reconcile=SMALL).reconcile())["bucket"]
        assert report.differences == {Difference.BUSY: 1, Difference.UNKNOWN: len(OLD)}
    assert await listed(writer) == OLD


@pytest.mark.usefixtures("notes_at_once")
async def test_only_what_another_catalog_can_have_written_is_asked_for(
    counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its note in the bucket says since when it writes."""
    monkeypatch.setattr(adopting, "ROUNDED", adopting.ROUNDED * 0)
    monkeypatch.setattr(adopting, "NEWEST", 0)
    inner, store = await watched(counting, sqlite(tmp_path / "second"))
    await put_raw(inner, *OLD)
    first = inner.uow(backend=sqlite(tmp_path / "first"))
    async with first() as uow:
        assert await uow.files.list() == OLD
        await uow.files.put(text("1", "mine"))
    async with first(auto_commit=False) as uow:
        await uow.files.put(text("2", "uncommitted"))
        await put_raw(inner, "young")
        assert await listed(store.uow()) == [*OLD, "young"]
        assert counting.seen["head"] == 3 + 1  # that of its own note
    assert await listed(store.uow()) == [*OLD, "young"]


async def test_a_catalog_that_begins_to_write_during_the_reading_is_noticed(
    tmp_path: Path, counting: Counting
) -> None:
    inner, store = await watched(counting)
    await put_raw(inner, *OLD)
    first = inner.uow(
        backend=sqlite(tmp_path / "first"), reconcile=ReconcileConfig(frequency="never")
    )

    class Interleaved(Counting):
        @override
        async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
            answer = await effect()
            if operation.name == "fill" and not self.seen["fill"]:
                self.seen["fill"] += 1
                async with first() as uow:
                    await uow.files.put(text("1", "old/99"), text("1", "old/0"))
            return answer

    own = faults.FaultyBackendConfig(inner=memory(), faults=Interleaved())
    del store

    class Lazy(Listing):
        """Lists one key at a time, so that objects that are written meanwhile are listed."""

        @override
        async def list(
            self, namespace: str, prefix: str = "", *, start_after: str = ""
        ) -> AsyncIterator[StoredObject]:
            last = start_after
            while True:
                found = [
                    each async for each in self.inner.list(namespace, prefix, start_after=last)
                ]
                if not found:
                    return
                yield found[0]
                last = found[0].location.key

    config = faults.FaultyConnectorConfig(inner=inner.config, faults=Counting())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "FaultyConnector", Lazy)
        second = Store(config, inner.namespace).uow(backend=own, reconcile=SMALL)
        assert await listed(second) == OLD


async def test_a_catalog_leaves_no_note_before_it_is_a_minute_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short trial of FennFlow leaves nothing in a bucket."""
    store = await make_store("memory", None)  # type: ignore[arg-type]
    uow_class = store.uow(backend=sqlite(tmp_path / "a"))

    async def notes() -> int:
        async with uow_class() as uow:
            await uow.files.put(text("1", "a"))
        return len((await uow_class.diagnose()).namespaces[store.namespace].catalogs)

    assert await notes() == 0
    monkeypatch.setattr(catalogs, "YOUNG", 0.0)
    assert await notes() == 1


async def test_what_a_catalog_without_a_note_wrote_is_not_adopted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its newest object shows that it exists, and its id shows since when."""
    store = await make_store("memory", None)  # type: ignore[arg-type]
    first, second = (store.uow(backend=sqlite(tmp_path / name)) for name in "ab")
    many = [f"{number:02}" for number in range(2 * adopting.NEWEST)]
    async with first(auto_commit=False) as uow:
        await uow.files.put(*(text("1", name) for name in many))
        await put_raw(store, "y", "z")
        assert await listed(second) == ["y", "z"]
    assert "also written by the catalog" in caplog.text


@pytest.mark.usefixtures("notes_at_once")
async def test_an_adopted_object_of_another_catalog_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the note of that catalog was deleted: its objects carry its id."""
    store = await make_store("memory", None)  # type: ignore[arg-type]
    first, second = (store.uow(backend=sqlite(tmp_path / name)) for name in "ab")
    async with first() as uow:
        await uow.files.put(text("1", "a"), text("1", "b"))
    async with store.connector() as connector:
        notes = [each async for each in connector.list(store.namespace, ".fennflow/catalogs/")]
        assert len(notes) == 1
        await connector.delete(store.namespace, [Deletion(location=notes[0].location)])
    monkeypatch.setattr(adopting, "NEWEST", 0)
    async with second() as uow:
        for call in (uow.files.get("a"), uow.files.stat("a"), uow.files.copy("a", "c")):
            with pytest.raises(ObjectChangedException, match="another application"):
                await call
        for change in (uow.files.delete("a"), uow.files.put(text("2", "a"))):
            with pytest.raises(RecordAlreadyExistsException, match="another application"):
                await change
    async with first() as uow:
        assert [file.content for file in await uow.files.get("a", "b")] == ["1", "1"]


@pytest.mark.usefixtures("notes_at_once")
async def test_catalogs_that_write_in_one_place_are_listed_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For instance two replicas of one service with a SQLite file each."""
    store = await make_store("memory", None)  # type: ignore[arg-type]
    first, second = (store.uow(backend=sqlite(tmp_path / name)) for name in "ab")
    async with first() as uow:
        await uow.files.put(text("1", "a"))
    assert "also written by the catalog" not in caplog.text
    assert not any("also written" in each for each in (await first.diagnose()).advice)
    async with second() as uow:
        await uow.files.put(text("1", "b"))
    [warning] = [each for each in caplog.records if "also written" in each.getMessage()]
    assert warning.levelno == logging.WARNING
    assert "another instance" in warning.getMessage()
    diagnosis = await first.diagnose()
    assert any("also written by the catalog" in each for each in diagnosis.advice)
    found = diagnosis.namespaces[store.namespace].catalogs
    assert [each.own for each in found] == [True, False]
    assert diagnosis.problems == ()


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"[]",
        b"{}",
        b'{"since": "x"}',
        b'{"since": 1, "prefixes": 7}',
        b"\xff",
        b"[" * 5000,
        b'{"since": "9999-01-01", "prefixes": [1], "program": "\\u001b[0m", "host": null}',
        b'{"since": "0001-01-01", "prefixes": [""], "program": "p", "host": "h"}',
    ],
)
async def test_a_note_that_others_wrote_stops_nothing(note: bytes) -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    await put_raw(store, ".fennflow/catalogs/other", body=note)
    await put_raw(store, ".fennflow/catalogs/not an id", ".fennflow/catalogs/a/b", *OLD)
    uow_class = store.uow(backend=memory())
    assert await listed(uow_class) == OLD
    [info] = (await uow_class.diagnose()).namespaces[store.namespace].catalogs
    assert (info.catalog_id, info.program.isprintable()) == ("other", True)


async def test_a_note_that_is_too_long_is_not_read() -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    note = b'{"since": "2026-01-01", "prefixes": ["x/"], "program": "p", "host": "h"}'
    await put_raw(store, ".fennflow/catalogs/long", body=note + b" " * catalogs.MOST_BYTES)
    await put_raw(store, *OLD)
    uow_class = store.uow(backend=memory())
    assert await listed(uow_class) == OLD
    [info] = (await uow_class.diagnose()).namespaces[store.namespace].catalogs
    assert (info.catalog_id, info.program, info.prefixes) == ("long", "?", ("",))


@pytest.mark.usefixtures("notes_at_once")
async def test_an_own_note_that_is_too_long_is_replaced_unread(tmp_path: Path) -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    settings = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/a.db")
    async with opened(settings) as backend:
        key = f".fennflow/catalogs/{backend.catalog_id}"
    await put_raw(store, key, body=b" " * (catalogs.MOST_BYTES + 1))
    uow_class = store.uow(backend=settings)
    async with uow_class() as uow:
        await uow.files.put(text("new", "new"))
    async with store.connector() as connector:
        note = await connector.head(store.namespace, Location(key))
    assert note is not None
    assert note.size < catalogs.MOST_BYTES
    [own] = (await uow_class.diagnose()).namespaces[store.namespace].catalogs
    assert own.own


class UnreadableNotes(faults.FaultyConnector):
    """Returns no note, as if it had a header that is not UTF-8."""

    error: type[BaseConnectorException]

    @override
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        if location.key.startswith(".fennflow/catalogs/"):
            message = "A header cannot be read."
            raise self.error(message)
        return await super().get(namespace, location, if_match=if_match)


@pytest.mark.parametrize(
    "error", [BaseConnectorException, AccessDeniedException, ConnectorUnavailableException]
)
@pytest.mark.usefixtures("notes_at_once")
async def test_a_note_that_cannot_be_read_stops_nothing(
    error: type[BaseConnectorException],
    counting: Counting,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Neither another catalog's note nor this one's, which others may have replaced."""
    monkeypatch.setattr(faults, "FaultyConnector", UnreadableNotes)
    monkeypatch.setattr(UnreadableNotes, "error", error, raising=False)
    inner, store = await watched(counting, sqlite(tmp_path / "a"))
    await put_raw(inner, ".fennflow/catalogs/other", *OLD)
    uow_class = store.uow()
    async with uow_class() as uow:
        assert await uow.files.list() == OLD
        await uow.files.put(text("new", "new"))
    [own, other] = sorted(
        (await uow_class.diagnose()).namespaces[store.namespace].catalogs,
        key=lambda each: not each.own,
    )
    assert (own.own, other.catalog_id) == (True, "other")


# --- prefixes --------------------------------------------------------------------------------------


def with_prefix(store: Store, backend: BackendConfig, prefix: str) -> type[FullUOW]:
    class UOW(FullUOW):
        files = RepoField(FullRepository, namespace=store.namespace, prefix=prefix)
        config = ConfigDict(connector=store.config, backend=backend)

    return UOW


async def test_a_field_with_a_prefix_sees_and_changes_nothing_else(store: Store) -> None:
    await put_raw(store, "svc-a/old", "svc-a/x/old", "svc-ab", "svc-b/old", "svc-a.txt")
    first = with_prefix(store, memory(), "svc-a/")
    second = with_prefix(store, memory(), "svc-b")
    async with first() as uow:
        assert await uow.files.list() == ["old", "x/old"]
        await uow.files.put(text("1", "new"), text("2", "x/new"))
        assert await uow.files.list() == ["new", "old", "x/new", "x/old"]
        assert list((await uow.files.list(delimiter="/")).prefixes) == ["x/"]
        scoped = uow.files.at("x")
        assert scoped.cwd == "x"
        assert await scoped.list() == ["x/new", "x/old"]
        assert [path async for path in uow.files.iter("x/")] == ["x/new", "x/old"]
        page = await uow.files.list(limit=2)
        rest = await uow.files.list(continuation_token=page.continuation_token)
        assert [*page, *rest] == ["new", "old", "x/new", "x/old"]
        files = await uow.files.get(*await uow.files.list())
        assert [file.content for file in files] == ["1", "old", "2", "old"]
        assert [file.filename for file in files] == ["new", "old", "new", "old"]
        assert (await uow.files.stat("x/new")).path == "x/new"
        assert await scoped.exists(StoragePath("x/new"))
        assert not await uow.files.exists("svc-a/new")
        assert await uow.files.copy("new", "copy") == "copy"
        assert await uow.files.move("copy", "moved") == "moved"
        async with uow.files.open("moved") as stream:
            assert stream.info.path == "moved"
        assert await uow.files.delete("moved") == ["moved"]
        with pytest.raises(KeyException):
            await uow.files.get("../svc-b/old")
        with pytest.raises(NoSuchKeyException):
            await uow.files.get(StoragePath("svc-b/old"))
        with pytest.raises(KeyException):
            await uow.files.list("/")
    async with second() as uow:
        assert await uow.files.list() == ["old"]
        assert await uow.files.delete_prefix() == ["old"]
    for uow_class in (first, second):
        for report in (await uow_class.reconcile(strategy="replace", orphans="delete")).values():
            assert report.differences == {}
    assert sorted(await store.objects()) == [
        "svc-a.txt",
        *(f"svc-a/{name}" for name in ("new", "old", "x/new", "x/old")),
        "svc-ab",
    ]


@pytest.mark.usefixtures("notes_at_once")
async def test_applications_with_a_prefix_each_share_a_bucket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    classes = [with_prefix(store, sqlite(tmp_path / name), f"svc-{name}/") for name in "ab"]
    for uow_class in classes:
        async with uow_class() as uow:
            await uow.files.put(text("x", "one"))
            await uow.files.put(text("y", "one"))
    for uow_class in classes:
        assert await listed(uow_class) == ["one"]
        [report] = (await uow_class.reconcile()).values()
        assert (report.differences, report.objects) == ({}, 1)
        diagnosis = await uow_class.diagnose()
        assert not any("also written" in each for each in diagnosis.advice)
        [found] = diagnosis.namespaces.values()
        assert [each.prefixes for each in found.catalogs] == [["svc-a/"], ["svc-b/"]]
    assert "also written" not in caplog.text
    # A unit of work on the whole bucket is warned, and adopts nothing of theirs.
    whole = store.uow(backend=sqlite(tmp_path / "c"))
    assert await listed(whole) == []
    assert "belong to other catalogs" in caplog.text


async def test_prefixes_of_fields_of_one_catalog_may_be_nested(tmp_path: Path) -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    await put_raw(store, "a/old", "b")

    class UOW(UnitOfWork):
        files = RepoField(FullRepository, namespace=store.namespace)
        inner = S3RepoField(FullRepository, bucket_name=store.namespace, prefix="a")
        config = ConfigDict(connector=store.config, backend=sqlite(tmp_path / "c"))

    async with UOW() as uow:
        assert await uow.inner.list() == ["old"]
        assert await uow.files.list() == ["a/old", "b"]
        await uow.inner.put(text("1", "new"))
        assert await uow.files.move("a/new", "moved", to=uow.inner) == "moved"
        assert await uow.files.list() == ["a/moved", "a/old", "b"]
    assert set(await UOW.reconcile()) == {store.namespace, f"{store.namespace}/a/"}


@pytest.mark.parametrize("prefix", ["/", "a//b", "../a", "a/./", "\x00", "\ud800", None, 7, b"a"])
def test_a_prefix_that_no_key_has_is_refused_when_the_field_is_made(prefix: Any) -> None:
    with pytest.raises(ConfigException):
        RepoField(FullRepository, namespace="bucket", prefix=prefix)


def test_a_prefix_that_is_reserved_is_refused_when_the_class_is_made() -> None:
    with pytest.raises(ConfigException, match="FennFlow's own"):
        type(
            "UOW",
            (UnitOfWork,),
            {
                "files": RepoField(FullRepository, namespace="bucket", prefix=".fennflow/a"),
                "config": ConfigDict(),
            },
        )


async def test_the_report_of_a_first_reading_counts_what_was_recorded() -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    await put_raw(store, *OLD)
    progress: list[int] = []
    uow_class = store.uow(backend=memory(), reconcile=ReconcileConfig(frequency="never"))
    reports = await uow_class.reconcile(
        batch_size=4, on_progress=lambda report: progress.append(report.objects)
    )
    assert reports["bucket"].actions == {ReconcileAction.INSERTED: len(OLD)}
    assert progress == [4, 8]
