"""Rules of the protocol that show only when something happens in between."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import uuid_utils

from fennflow import ConfigDict, plugins
from fennflow.backends import (
    InMemoryBackendConfig,
    LateWrite,
    ObjectKey,
    Settlement,
    TransactionToken,
    WriteId,
)
from fennflow.connectors import InMemoryConnectorConfig, Location, ObjectAttributes, PutRequest
from fennflow.engine.stamps import Stamp, stamped
from fennflow.exceptions import (
    AccessDeniedException,
    ChecksumMismatchException,
    CompensationPendingWarning,
    ConnectorUnavailableException,
    NoSuchNamespaceException,
    PreconditionFailedException,
    RecordAlreadyExistsException,
    RecordLockedException,
)
from fennflow.files import BinaryContent, TextContent
from fennflow.testing import S3Request, faults
from fennflow_memory import connector as memory
from stores import FullUOW, Store, make_store, numbers

BACKGROUND = {"claim", "due_late_writes", "fills", "scan"}
PLAIN = ObjectAttributes(media_type="text/plain")
# A key that a failed deletion may still reach is free after the late-write period.
AFTER_DOUBT = {"late_write_period": 0.2, "lock_timeout": 5.0}


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


class Script:
    """Records operations, and runs a function of a test once at a given point."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self.at: tuple[str, str] = ("", "")
        self.action: Callable[[], Awaitable[None]] | None = None

    def once(self, phase: str, operation: str, action: Callable[[], Awaitable[None]]) -> None:
        self.at, self.action = (phase, operation), action

    async def __call__(self, phase: str, operation: str, key: str) -> None:
        self.seen.append((phase, operation, key))
        if self.action is not None and (phase, operation) == self.at:
            action, self.action = self.action, None
            await action()

    def operations(self) -> list[str]:
        """Return what transactions did, without recovery and reconciliation at first use."""
        return [
            operation
            for phase, operation, _ in self.seen
            if phase == "before" and operation not in BACKGROUND
        ]


class Scene:
    """A memory store and a memory backend, both behind one script."""

    def __init__(self) -> None:
        self.script = Script()
        self.inner = Store(InMemoryConnectorConfig(name=f"p{next(numbers)}"), "bucket")
        self.backend_config = InMemoryBackendConfig(name=f"p{next(numbers)}")
        self.store = Store(
            faults.FaultyConnectorConfig(
                inner=self.inner.config, faults=faults.Scripted(self.script)
            ),
            "bucket",
            settings={
                "backend": faults.FaultyBackendConfig(
                    inner=self.backend_config, faults=faults.Scripted(self.script)
                ),
                "lock_timeout": 0.0,
            },
        )

    def uow(self, **changes: object) -> type[FullUOW]:
        return self.store.uow(**changes)

    async def put_raw(self, key: str, body: bytes, attributes: ObjectAttributes = PLAIN) -> None:
        async with self.inner.connector() as connector:
            await connector.put(PutRequest("bucket", key, attributes), body)


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture(autouse=True)
def _faulty_plugin() -> object:  # pyright: ignore[reportUnusedFunction]
    with plugins.override(faults):
        yield


async def test_a_transaction_that_only_reads_never_writes_to_the_journal(scene: Scene) -> None:
    """P1."""
    async with scene.uow()() as uow:
        await uow.files.list()
        await uow.files.get("a", missing_ok=True)
        await uow.files.exists("a")
    assert set(scene.script.operations()) == {"records"}


async def test_a_transaction_of_plain_creates_costs_two_journal_transactions(scene: Scene) -> None:
    """P2, P4: the intents of a whole call before its first request, and the pivot."""
    async with scene.uow()() as uow:
        await uow.files.put(text("1", "a"), text("1", "b"))
    assert scene.script.operations() == ["begin_writes", "put", "put", "commit"]


async def test_apply_copies_then_moves_the_records_then_deletes_then_settles(scene: Scene) -> None:
    """P28."""
    uow_class = scene.uow()
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"), text("1", "b"))
    scene.script.seen.clear()
    async with uow_class() as uow:
        await uow.files.put(text("2", "a"))
        await uow.files.delete("b")
    assert scene.script.operations() == [
        *("begin_writes", "put", "begin_writes", "commit"),
        *("copy", "records", "relocate", "delete", "settle"),
    ] or scene.script.operations() == [
        *("begin_writes", "put", "begin_writes", "commit"),
        *("records", "copy", "relocate", "delete", "settle"),
    ]


async def test_every_object_has_a_stamp(store: Store) -> None:
    """P11."""
    async with store.uow()() as uow:
        await uow.files.put(
            TextContent.from_content("Hello, world!", filename="a", metadata={"mine": "Zoë"})
        )
    async with store.connector() as connector:
        stored = await connector.head(store.namespace, Location("a"))
    assert stored is not None
    assert set(stored.metadata) == {
        *("fennflow_transaction", "fennflow_seq", "fennflow_type", "fennflow_sha256", "mine")
    }
    assert stored.metadata["fennflow_type"] == "text"
    assert stored.metadata["fennflow_sha256"].startswith("315f5bdb")


async def test_garbage_that_arrived_late_does_not_take_a_key(scene: Scene) -> None:
    """P14: an object of a late write may be overwritten, even by `create`."""
    dead = TransactionToken(str(uuid_utils.uuid7()))
    uow_class = scene.uow()
    config = ConfigDict(connector=scene.inner.config, backend=scene.backend_config)
    backend = plugins.registry().backend_for(config.backend).factory(config.backend, config)
    key = ObjectKey("bucket", "a")
    await backend.begin_writes(dead, [key], lambda _: [])
    await backend.abort(dead)
    await backend.settle(
        dead,
        Settlement(
            late_writes=[
                LateWrite(namespace="bucket", key="a", write=WriteId(dead.transaction_id, 1))
            ]
        ),
    )
    for seq, key_name in ((1, "a"), (2, "b")):
        late = ObjectAttributes(
            media_type="a/b", metadata=stamped({}, Stamp(WriteId(dead.transaction_id, seq)))
        )
        await scene.put_raw(key_name, b"late", late)
    async with uow_class() as uow:
        await uow.files.create(text("new", "a"))
        with pytest.raises(RecordAlreadyExistsException):
            await uow.files.create(text("new", "b"))
    assert await scene.inner.objects() == {"a": b"new", "b": b"late"}


async def test_an_object_that_was_put_meanwhile_is_replaced_and_logged(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """P17: the catalog is the source of truth."""
    uow_class = scene.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"))
    scene.script.once("before", "copy", lambda: scene.put_raw("a", b"foreign"))
    async with uow_class() as uow:
        await uow.files.put(text("new", "a"))
    assert await scene.inner.objects() == {"a": b"new"}
    [warning] = [each for each in caplog.records if getattr(each, "rule", "") == "P17"]
    assert warning.levelno == logging.WARNING


async def test_a_copy_whose_answer_was_lost_is_recognised(scene: Scene) -> None:
    """P30."""

    async def lose() -> None:
        message = "the answer is lost"
        raise ConnectorUnavailableException(message)

    uow_class = scene.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"))
    scene.script.once("after", "copy", lose)
    async with uow_class() as uow:
        await uow.files.put(text("new", "a"))
    assert scene.script.operations().count("copy") == 2
    assert await scene.inner.objects() == {"a": b"new"}
    async with uow_class() as uow:
        await uow.files.put(text("newer", "a"))


async def test_a_get_of_several_paths_returns_one_moment(scene: Scene) -> None:
    """P29, I9: a commit between two reads makes it start over."""
    uow_class = scene.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"), text("old", "b"))

    async def overwrite() -> None:
        async with uow_class() as uow:
            await uow.files.put(text("new", "a"), text("new", "b"))

    for phase in ("before", "after"):
        scene.script.once(phase, "get", overwrite)
        async with uow_class(auto_commit=False) as uow:
            files = await uow.files.get("a", "b")
        assert len({file.content for file in files}) == 1


async def test_a_get_finds_what_was_deleted_meanwhile_gone(scene: Scene) -> None:
    """P29."""
    uow_class = scene.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"), text("old", "b"))

    async def delete() -> None:
        async with uow_class() as uow:
            await uow.files.delete("a")

    scene.script.once("before", "get", delete)
    async with uow_class() as uow:
        files = await uow.files.get("a", "b", missing_ok=True)
        assert [file.path for file in files] == ["b"]


async def test_a_deletion_that_is_refused_for_one_key_is_not_overlooked(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """P31: the errors in a batch are read; the transaction stays in the journal (P9)."""

    async def refuse() -> None:
        message = "bucket/a may not be deleted."
        raise AccessDeniedException(message)

    uow_class = scene.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"))
    scene.script.once("before", "delete", refuse)
    async with uow_class() as uow:
        await uow.files.delete("a")
    assert "will be applied later: bucket/a may not be deleted." in caplog.text
    await uow_class.recover()
    async with uow_class() as uow:
        assert await uow.files.list() == []
    assert await scene.inner.objects() == {}


async def test_locks_are_held_until_the_transaction_is_finished(scene: Scene) -> None:
    """P6: also after the pivot, while apply is under way."""
    uow_class = scene.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"))

    async def write() -> None:
        with pytest.raises(RecordLockedException):
            async with uow_class() as uow:
                await uow.files.put(text("other", "a"))

    for point in ("copy", "relocate", "delete", "settle"):
        scene.script.once("before", point, write)
        async with uow_class() as uow:
            await uow.files.put(text(point, "a"))
        assert scene.script.action is None
    assert await scene.inner.objects() == {"a": b"settle"}


async def test_staging_keys_name_the_catalog_and_leave_nothing(
    request: pytest.FixtureRequest,
) -> None:
    """P10, I4."""
    store = await make_store("moto", request)
    assert store.server is not None
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"))
    with store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(text("2", "a"))
            await uow.files.put(text("3", "a"))
            assert await uow.files.list() == ["a"]
    staged = [each.key for each in seen if each.operation == "PUT"]
    assert all(key.startswith(".fennflow/") and key.count("/") == 3 for key in staged)
    assert len({key.rpartition("/")[0] for key in staged}) == 1
    assert await store.objects() == {"a": b"3"}


async def fail() -> None:
    message = "not now"
    raise AccessDeniedException(message)


async def stop() -> None:
    message = "not now"
    raise NoSuchNamespaceException(message)


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("operation", ["copy", "relocate", "delete", "settle"])
async def test_apply_may_stop_anywhere_and_be_run_again(
    scene: Scene, phase: str, operation: str
) -> None:
    """P7."""
    uow_class = scene.uow(**AFTER_DOUBT)
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"), text("old", "b"))
    scene.script.once(phase, operation, stop)
    async with uow_class() as uow:
        await uow.files.put(text("new", "a"), text("new", "c"))
        await uow.files.delete("b")
    assert scene.script.action is None
    await uow_class.recover()
    async with uow_class() as uow:
        assert await uow.files.list() == ["a", "c"]
        await uow.files.put(text("newer", "b"))
    assert (await uow_class.recover()).pending == 0
    assert await scene.inner.objects() == {"a": b"new", "b": b"newer", "c": b"new"}


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("operation", ["abort", "delete", "settle"])
async def test_compensation_may_stop_anywhere_and_be_run_again(
    scene: Scene, phase: str, operation: str
) -> None:
    """P7, and promise 6: the user's exception is not masked."""
    uow_class = scene.uow(**AFTER_DOUBT)
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"), text("old", "b"))
    with pytest.raises(ZeroDivisionError) as caught:
        async with uow_class() as uow:
            await uow.files.put(text("new", "a"), text("new", "c"))
            await uow.files.delete("b")
            scene.script.once(phase, operation, stop)
            raise ZeroDivisionError
    assert scene.script.action is None
    [note] = caught.value.__notes__
    assert "not now" in note
    await uow_class.recover()
    async with uow_class() as uow:
        assert await uow.files.list() == ["a", "b"]
        await uow.files.put(text("newer", "c"))
    assert await scene.inner.objects() == {"a": b"old", "b": b"old", "c": b"newer"}


async def test_a_write_whose_answer_was_lost_is_recognised_as_its_own(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """P17 warns only of changes by others."""

    async def lose() -> None:
        scene.script.once("before", "head", fail)
        message = "The answer got lost."
        raise ConnectorUnavailableException(message)

    async with scene.uow()() as uow:
        scene.script.once("after", "put", lose)
        with pytest.raises(ConnectorUnavailableException) as caught:
            await uow.files.put(text("lost", "a"))
        assert "It is not known whether the object was written" in caught.value.__notes__[0]
        await uow.files.put(text("new", "a"))
    assert await scene.inner.objects() == {"a": b"new"}
    assert "modified outside FennFlow" not in caplog.text


async def test_an_ambiguous_deletion_keeps_its_key_locked_after_a_failed_attempt(
    scene: Scene,
) -> None:
    """P20 b: an unanswered deletion can arrive after another attempt has succeeded."""

    async def lose() -> None:
        scene.script.once("before", "settle", fail)
        message = "The answer got lost."
        raise ConnectorUnavailableException(message)

    uow_class = scene.uow()
    async with uow_class() as uow:
        await uow.files.put(text("same", "a"), text("same", "b"))
        scene.script.once("after", "delete", lose)
        with pytest.warns(CompensationPendingWarning):
            await uow.rollback()
    assert (await uow_class.recover()).pending == 0
    for key in "ab":
        with pytest.raises(RecordLockedException):
            async with uow_class() as uow:
                await uow.files.put(text("same", key))


async def test_a_rollback_that_cannot_be_finished_warns(scene: Scene) -> None:
    async with scene.uow()() as uow:
        await uow.files.put(text("new", "a"))
        scene.script.once("before", "delete", fail)
        with pytest.warns(CompensationPendingWarning, match="will be removed later"):
            await uow.rollback()
        await uow.files.put(text("other", "b"))
    async with scene.uow()() as uow:
        assert await uow.files.list() == ["b"]
    assert await scene.inner.objects() == {"b": b"other"}


async def test_other_bytes_under_the_same_etag_are_not_returned(scene: Scene) -> None:
    """I1: the checksum in the record is checked on every read."""
    async with scene.uow()() as uow:
        await uow.files.put(text("what was committed", "a"))
    assert isinstance(scene.inner.config, InMemoryConnectorConfig)
    versions = memory._stores[scene.inner.config.name].objects["bucket", "a"]
    versions[0] = replace(versions[0], body=b"rot")
    async with scene.uow()() as uow:
        with pytest.raises(ChecksumMismatchException, match="bucket/a"):
            await uow.files.get("a")


async def test_a_write_under_way_hides_nothing_from_its_own_transaction(scene: Scene) -> None:
    uow_class = scene.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"))
    async with uow_class() as uow:

        async def look() -> None:
            assert await uow.files.list() == ["a"]
            assert (await uow.files.get("a")).one().content == "old"

        scene.script.once("before", "put", look)
        await uow.files.put(text("new", "a"))
        assert scene.script.action is None
        assert (await uow.files.get("a")).one().content == "new"


async def test_a_create_that_raced_is_sent_again(scene: Scene) -> None:
    """P14: a 409 does not say that the key is taken; the read-back does."""

    async def contend() -> None:
        message = "another operation is under way"
        raise PreconditionFailedException(message, contended=True)

    async with scene.uow()() as uow:
        scene.script.once("before", "put", contend)
        await uow.files.create(text("1", "a"))
    assert scene.script.operations() == ["begin_writes", "put", "head", "put", "commit"]
    assert await scene.inner.objects() == {"a": b"1"}


async def test_the_id_of_an_upload_is_journaled_before_its_first_part(
    scene: Scene, request: pytest.FixtureRequest
) -> None:
    """P13."""
    store = await make_store("moto", request, multipart_threshold=5 << 20)
    assert store.server is not None
    script, order = scene.script, list[str]()

    async def noted() -> None:
        order.append("journaled")

    def watch(each: S3Request) -> None:
        if "partNumber" in each.query:
            order.append("part")

    script.once("after", "note_upload", noted)
    with store.server.failing(watch):
        async with store.uow(backend=scene.store.settings["backend"])() as uow:
            body = b"x" * (6 << 20)
            await uow.files.put(BinaryContent(data=body, media_type="a/b", filename="a"))
    assert order == ["journaled", "part"]
