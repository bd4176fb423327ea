"""Reconciling a catalog with its bucket, on every store."""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from typing_extensions import override

from fennflow import ReconcileConfig, plugins
from fennflow.backends import (
    BucketBackendConfig,
    InMemoryBackendConfig,
    LateWrite,
    ObjectKey,
    Settlement,
    SqlalchemyBackendConfig,
    TransactionToken,
    WriteId,
)
from fennflow.config import BackendConfig
from fennflow.connectors import Deletion, Location, ObjectAttributes, PutRequest, StoredObject
from fennflow.engine import walking
from fennflow.engine.stamps import Stamp, stamped
from fennflow.engine.tally import KEPT_FINDINGS, Tally
from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ChecksumMismatchException,
    ConfigException,
    ConnectorUnavailableException,
    KeyException,
    MetadataException,
    NoSuchNamespaceException,
    ObjectChangedException,
    ReconcileFailedException,
    RecordAlreadyExistsException,
)
from fennflow.files import BinaryContent, JsonContent, TextContent
from fennflow.paths import StoragePath
from fennflow.reports import Difference, Finding, ReconcileAction, ReconcileReport
from fennflow.testing import PostgresqlServer, S3Server, faults
from fennflow.testing.backend_values import opened
from stores import FullUOW, Store, blocking_client, make_store, numbers, s3_config

NEVER = ReconcileConfig(frequency="never")
OLD = int(time.time()) - 13 * 3600


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name, metadata={"von": "Zoë"})


def fresh(store: Store, **changes: Any) -> type[FullUOW]:
    """Return a class with a separate catalog, like another process with a memory backend."""
    return store.uow(backend=InMemoryBackendConfig(name=f"r{next(numbers)}"), **changes)


async def put_raw(store: Store, key: str, body: bytes, media_type: str = "text/plain") -> None:
    async with store.connector() as connector:
        attributes = ObjectAttributes(media_type=media_type)
        await connector.put(PutRequest(store.namespace, key, attributes), body)


async def put_orphan(
    store: Store, key: str, *, began: int = OLD, catalog_id: str | None = None
) -> None:
    """Put an object of a transaction whose process died before its commit."""
    transaction_id = uuid.UUID(int=began * 1000 << 80 | 7 << 76 | 2 << 62 | next(numbers))
    stamp = Stamp(WriteId(str(transaction_id), 1), "text", catalog_id=catalog_id)
    metadata = stamped({"für": "Ann"}, stamp)
    async with store.connector() as connector:
        attributes = ObjectAttributes(media_type="text/plain", metadata=metadata)
        await connector.put(PutRequest(store.namespace, key, attributes), b"orphan")


async def delete_raw(store: Store, key: str) -> None:
    async with store.connector() as connector:
        await connector.delete(store.namespace, [Deletion(location=Location(key))])


async def listed(uow_class: type[FullUOW]) -> list[str]:
    async with uow_class() as uow:
        return [str(path) for path in await uow.files.list()]


async def stat_of(uow_class: type[FullUOW], path: str) -> Any:
    async with uow_class() as uow:
        return await uow.files.stat(path)


async def reconciled(uow_class: type[FullUOW], **settings: Any) -> ReconcileReport:
    [report] = (await uow_class.reconcile(**settings)).values()
    return report


def reported(report: ReconcileReport) -> dict[str, tuple[Difference, ReconcileAction | None]]:
    return {str(each.path): (each.difference, each.action) for each in report.findings}


async def test_a_new_process_finds_the_files_of_the_old_one(store: Store) -> None:
    first = store.uow()
    async with first() as uow:
        await uow.files.put(
            JsonContent.from_content([1], filename="a/b.json", metadata={"von": "Zoë"}),
            BinaryContent(data=b"x", media_type="text/plain", filename="c"),
        )
    second = fresh(store)
    async with second() as uow:
        assert await uow.files.list() == ["a/b.json", "c"]
        json, binary = await uow.files.get("a/b.json", "c")
        assert isinstance(json, JsonContent)
        assert (json.content, json.metadata) == ([1], {"von": "Zoë"})
        # Only a catalog knows the class that went in: a stamp can be forged.
        assert type(binary) is TextContent
        known = await uow.files.stat("a/b.json")
        written = await stat_of(first, "a/b.json")
        times = {"created_at": known.created_at, "modified_at": known.modified_at}
        assert known == replace(written, sha256=None, **times)
        await uow.files.put(text("new", "c"))
        await uow.files.delete("a/b.json")
    assert await store.objects() == {"c": b"new"}


async def test_files_of_others_get_the_class_of_their_media_type(store: Store) -> None:
    await put_raw(store, "a", b"[1]", "application/json; charset=utf-8")
    await put_raw(store, "b", b"x", "application/x-unheard-of")
    async with fresh(store)() as uow:
        json, binary = await uow.files.get("a", "b")
        assert isinstance(json, JsonContent)
        assert type(binary) is BinaryContent
        assert (await uow.files.stat("a")).sha256 is None


async def test_what_users_cannot_have_is_left_alone(request: pytest.FixtureRequest) -> None:
    store = await make_store("moto", request)
    for key in ("dir/", "dir/a", ".fennflow/other/transaction/1", "a//b"):
        await put_raw(store, key, b"1")
    uow_class = fresh(store)
    assert await listed(uow_class) == ["dir/a"]
    report = await reconciled(uow_class, strategy="replace", orphans="delete")
    assert reported(report) == {"a//b": (Difference.REFUSED, None)}
    assert "has '//'" in str(report.findings[0].reason)
    assert len(await store.objects()) == 4


async def test_the_frequency_says_when(store: Store) -> None:
    never = fresh(store, reconcile=NEVER)
    once = fresh(store, reconcile=ReconcileConfig(strategy="insert_missing"))
    always = fresh(
        store, reconcile=ReconcileConfig(frequency="on_session_start", strategy="insert_missing")
    )
    await put_raw(store, "a", b"1")
    for uow_class, expected in ((never, []), (once, ["a"]), (always, ["a"])):
        assert await listed(uow_class) == expected
    await put_raw(store, "b", b"2")
    for uow_class, expected in ((never, []), (once, ["a"]), (always, ["a", "b"])):
        assert await listed(uow_class) == expected
    async with always() as uow:
        assert await uow.files.list() == ["a", "b"]
        await put_raw(store, "c", b"3")
        assert await uow.files.list() == ["a", "b"]
        await uow.commit()
        assert await uow.files.list() == ["a", "b"]


async def differing(store: Store, **changes: Any) -> type[FullUOW]:
    """Return a class whose catalog and bucket differ in every way."""
    uow_class = fresh(store, **changes)
    async with uow_class() as uow:
        await uow.files.put(text("1", "changed"), text("2", "missing"), text("3", "same"))
    await put_raw(store, "changed", b"other")
    await put_raw(store, "unknown", b"foreign")
    await delete_raw(store, "missing")
    await put_orphan(store, "orphan")
    await put_orphan(store, "young", began=int(time.time()))
    return uow_class


REPORTED: dict[str, tuple[Difference, ReconcileAction | None]] = {
    "changed": (Difference.CHANGED, None),
    "missing": (Difference.MISSING, None),
    "orphan": (Difference.ORPHAN, None),
    "unknown": (Difference.UNKNOWN, None),
    "young": (Difference.ORPHAN, None),
}


async def test_a_catalog_that_has_records_is_only_compared_by_default(store: Store) -> None:
    uow_class = await differing(store)
    before = await store.objects()
    report = await reconciled(uow_class)
    assert reported(report) == REPORTED
    assert (report.objects, report.records) == (5, 3)
    assert report.differences[Difference.ORPHAN] == 2
    assert report.actions == {}
    assert await listed(uow_class) == ["changed", "missing", "same"]
    assert await store.objects() == before


async def test_missing_records_are_inserted_and_others_kept(store: Store) -> None:
    uow_class = await differing(store)
    report = await reconciled(uow_class, strategy="insert_missing")
    inserted = (Difference.UNKNOWN, ReconcileAction.INSERTED)
    assert reported(report) == REPORTED | {"unknown": inserted}
    assert await listed(uow_class) == ["changed", "missing", "same", "unknown"]
    async with uow_class() as uow:
        assert (await uow.files.get("unknown")).one().content == "foreign"
    assert reported(await reconciled(uow_class)) == {
        key: value for key, value in REPORTED.items() if key != "unknown"
    }


async def test_records_are_replaced_by_what_the_bucket_holds(store: Store) -> None:
    uow_class = await differing(store)
    created = (await stat_of(uow_class, "changed")).created_at
    report = await reconciled(uow_class, strategy="replace")
    assert reported(report) == REPORTED | {
        "changed": (Difference.CHANGED, ReconcileAction.UPDATED),
        "missing": (Difference.MISSING, ReconcileAction.REMOVED),
        "unknown": (Difference.UNKNOWN, ReconcileAction.INSERTED),
    }
    async with uow_class() as uow:
        assert await uow.files.list() == ["changed", "same", "unknown"]
        files = await uow.files.get("changed", "same", "unknown")
        assert [file.content for file in files] == ["other", "3", "foreign"]
    assert (await stat_of(uow_class, "changed")).created_at == created


async def test_what_young_transactions_wrote_is_taken_with_a_shorter_age_as_after_a_restore(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """P27: for instance objects written after the backup. A log record says that they were left alone."""
    uow_class = await differing(store)
    await put_orphan(store, "same", began=int(time.time()))
    await reconciled(uow_class)
    assert "max_transaction_age" not in caplog.text
    settings = {"strategy": "replace", "orphans": "adopt"}
    report = reported(await reconciled(uow_class, **settings))
    assert report["same"] == (Difference.CHANGED, None)
    assert report["young"] == (Difference.ORPHAN, None)
    assert f"2 objects in {store.namespace} differ from the catalog" in caplog.text

    class Restored(uow_class):  # type: ignore[valid-type, misc]  # a class made at run time
        config = uow_class.config.model_copy(update={"max_transaction_age": 0.001})

    caplog.clear()
    report = reported(await reconciled(Restored, **settings))
    assert report["same"] == (Difference.CHANGED, ReconcileAction.UPDATED)
    assert report["young"] == (Difference.ORPHAN, ReconcileAction.INSERTED)
    assert "max_transaction_age" not in caplog.text


async def test_orphans_are_adopted_once_their_transaction_cannot_commit(store: Store) -> None:
    """P27: a younger transaction may be alive in another process."""
    uow_class = await differing(store)
    report = await reconciled(uow_class, orphans="adopt")
    assert reported(report) == REPORTED | {"orphan": (Difference.ORPHAN, ReconcileAction.INSERTED)}
    async with uow_class() as uow:
        file = (await uow.files.get("orphan")).one()
        assert isinstance(file, TextContent)
        assert (file.content, file.metadata) == ("orphan", {"für": "Ann"})
        await uow.files.delete("orphan")
    assert "orphan" not in await store.objects()


async def test_orphans_are_deleted_once_their_transaction_cannot_commit(store: Store) -> None:
    """I5: nothing else is deleted, not even the objects next to them."""
    uow_class = await differing(store)
    before = await store.objects()
    report = await reconciled(uow_class, orphans="delete")
    assert reported(report) == REPORTED | {"orphan": (Difference.ORPHAN, ReconcileAction.DELETED)}
    after = await store.objects()
    assert after == {key: body for key, body in before.items() if key != "orphan"}
    async with store.connector() as connector:
        if (await connector.capabilities(store.namespace)).versioned:
            assert await connector.versions(store.namespace, "orphan") == []
    # No lock is left.
    async with uow_class() as uow:
        await uow.files.put(text("new", "orphan"), text("new", "unknown"))


async def test_with_an_empty_catalog_nothing_is_an_orphan(store: Store) -> None:
    """Otherwise a restarted process with a memory backend would delete all of its own objects."""
    await put_orphan(store, "a")
    settings = ReconcileConfig(orphans="delete", strategy="replace")
    assert await listed(fresh(store, reconcile=settings)) == ["a"]
    assert list(await store.objects()) == ["a"]


async def test_what_a_transaction_is_writing_is_left_alone(store: Store) -> None:
    """I5, P6: a live transaction's objects have no record yet."""
    uow_class = fresh(store, lock_timeout=0.0)

    class Impatient(uow_class):  # type: ignore[valid-type, misc]  # a class made at run time
        config = uow_class.config.model_copy(update={"max_transaction_age": 0.001})

    async with uow_class() as uow:
        await uow.files.put(text("0", "z"))
    for key in ("a", "y"):
        await put_raw(store, key, b"foreign")
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"), text("2", "b"), text("3", "c"))
        report = await reconciled(Impatient, strategy="replace", orphans="delete")
        assert report.differences.get(Difference.ORPHAN) is None
        assert reported(report)["a"] == (Difference.BUSY, None)
        assert reported(report)["y"] == (Difference.UNKNOWN, ReconcileAction.INSERTED)
    expected = {"a": b"1", "b": b"2", "c": b"3", "y": b"foreign", "z": b"0"}
    assert await store.objects() == expected
    assert await listed(uow_class) == list(expected)


async def test_what_needs_attention_comes_before_thousands_of_findings_that_were_dealt_with() -> (
    None
):
    tally = Tally(on_finding=None, on_progress=None)
    done = Finding("files", StoragePath("a"), Difference.UNKNOWN, ReconcileAction.INSERTED)
    others = Finding("files", StoragePath("b"), Difference.OTHER_CATALOG, catalog_id="c")
    left = Finding("files", StoragePath("z"), Difference.REFUSED)
    for finding in [*[done] * KEPT_FINDINGS, *[others] * KEPT_FINDINGS, left]:
        tally.add(finding)
    await tally.pass_on()
    report = tally.report()
    assert list(report.findings[:2]) == [left, others]
    assert len(report.findings) == KEPT_FINDINGS


async def test_a_bucket_is_reconciled_in_batches(store: Store) -> None:
    for number in range(7):
        await put_raw(store, f"{number}", b"1")
    findings: list[Finding] = []
    progress: list[ReconcileReport] = []
    uow_class = fresh(store, reconcile=NEVER)
    report = await reconciled(
        uow_class, batch_size=3, on_finding=findings.append, on_progress=progress.append
    )
    assert report.actions == {ReconcileAction.INSERTED: 7}
    assert findings == list(report.findings)
    assert [each.objects for each in progress] == [3, 6]
    assert await listed(uow_class) == [f"{number}" for number in range(7)]
    assert (await reconciled(uow_class)).findings == ()


async def test_what_a_stamp_claims_is_not_believed(store: Store) -> None:
    """Class, checksum and transaction are not trusted: any uploader can write a stamp."""
    filled, compared = fresh(store), fresh(store, reconcile=NEVER)
    async with compared() as uow:
        await uow.files.put(text("2", "b"))
    stamp = Stamp(WriteId(UUID7, 1), "json", "0" * 64)
    async with store.connector() as connector:
        attributes = ObjectAttributes(media_type="text/plain", metadata=stamped({}, stamp))
        await connector.put(PutRequest(store.namespace, "a", attributes), b"1")
    await reconciled(compared, strategy="insert_missing", orphans="adopt")
    for uow_class in (filled, compared):
        async with uow_class() as uow:
            file = (await uow.files.get("a")).one()
            assert type(file) is TextContent
            assert (await uow.files.stat("a")).sha256 is None


UUID7 = "01890000-0000-7000-8000-000000000000"
NOT_STAMPS = [
    {"fennflow_transaction": UUID7, "fennflow_seq": str(2**63)},
    {"fennflow_transaction": UUID7, "fennflow_seq": "9" * 5000},
    {"fennflow_transaction": UUID7, "fennflow_seq": "٣"},
    {"fennflow_transaction": UUID7, "fennflow_seq": "0"},
    {"fennflow_transaction": UUID7, "fennflow_seq": "01"},
    {"fennflow_transaction": UUID7.upper().replace("0", "A"), "fennflow_seq": "1"},
    {"fennflow_transaction": "x\0y", "fennflow_seq": "1"},
    {"fennflow_transaction": UUID7 + "\n", "fennflow_seq": "1"},
    {"fennflow_transaction": UUID7, "fennflow_seq": "1", "fennflow_catalog": "a/b"},
    {"fennflow_transaction": UUID7, "fennflow_seq": "1", "fennflow_catalog": "x" * 5000},
    {"fennflow_transaction": UUID7},
]
ODD_METADATA = [
    {"a\0b": "c\0d"},
    {"\ud800": "\udfff"},
    {"a": "\udce9"},
    {"a": "=?utf-8?q?=ff=00?="},
    {"a\nb": "c\r\nd"},
]


@pytest.fixture(params=["memory", "sqlite", "postgresql", "bucket"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> BackendConfig:
    """Return a catalog of every kind."""
    if request.param == "memory":
        return InMemoryBackendConfig(name=f"r{next(numbers)}")
    if request.param == "bucket":
        return BucketBackendConfig(namespace="bucket")
    if request.param == "sqlite":
        return SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/catalog.db")
    server: PostgresqlServer = request.getfixturevalue("postgresql")
    return SqlalchemyBackendConfig(url=server.new_database())


async def test_no_object_of_a_stranger_stops_a_catalog(catalog: BackendConfig) -> None:
    """An object whose metadata do not parse is foreign."""
    store = await make_store("memory", None)  # type: ignore[arg-type]
    odd = [{"media_type": "text/plain", "metadata": each} for each in (*NOT_STAMPS, *ODD_METADATA)]
    odd += [
        {"media_type": each}
        for each in ("te\0xt/plain", "\ud800/x", "text/plain\r\nA: b", "", "ü/x")
    ]
    for number, attributes in enumerate(odd):
        async with store.connector() as connector:
            described = ObjectAttributes(**attributes)  # type: ignore[arg-type]
            await connector.put(PutRequest(store.namespace, f"odd/{number}", described), b"odd")
    for key in ("a\nb", "a\0b", "\ud800", "a//b", "\udce9/b"):
        await put_raw(store, key, b"1")
    await put_raw(store, "good", b"good")
    uow_class = store.uow(backend=catalog)
    async with uow_class() as uow:
        assert (await uow.files.get("good")).one().content == "good"
        assert len(await uow.files.list("odd/")) == len(odd)
        await uow.files.get_prefix("odd/")
        await uow.files.put(text("mine", "mine"))
    report = await reconciled(uow_class, strategy="replace", orphans="adopt")
    assert report.differences == {Difference.REFUSED: 5}
    assert (await uow_class.recover()).problems == ()


async def put_strange(store: Store, kind: str) -> tuple[set[str], set[str]]:
    """Put objects that imitate FennFlow's and, on a server, objects that no client can read or name.

    Returns:
        the keys of files that can be read, and of those that cannot.
    """
    readable = {"good", "odd/stamp"}
    async with store.connector() as connector:

        async def put(key: str, metadata: dict[str, str]) -> None:
            attributes = ObjectAttributes(media_type="text/plain", metadata=metadata)
            await connector.put(PutRequest(store.namespace, key, attributes), b"text")

        await put("good", {})
        await put("odd/stamp", stamped({}, Stamp(WriteId(UUID7, 1), "json", "0" * 64)))
        for number, metadata in enumerate((*NOT_STAMPS, *ODD_METADATA)):
            with suppress(MetadataException, UnicodeEncodeError):  # where no header holds it
                await put(f"odd/{number}", metadata)
                readable.add(f"odd/{number}")
    if store.server is None:
        return readable, set()
    client = blocking_client(store.server.url, store.server.access_key, store.server.secret_key)
    client.put_object(Bucket=store.namespace, Key="refused/\x1b[2J", Body=b"text")
    not_utf_8 = {"Cache-Control": "\xff"}
    headers = dict.fromkeys((".fennflow/catalogs/odd", ".fennflow/probe/absent"), not_utf_8)
    headers["odd/latin-1"] = not_utf_8
    if "moto" in kind:  # other servers refuse it
        headers["odd/nul"] = {"x-amz-meta-a": "1\0"}
    for key, each in headers.items():
        params = {"Bucket": store.namespace, "Key": key}
        url = client.generate_presigned_url("put_object", Params=params)
        request = Request(url, data=b"text", method="PUT", headers={"Content-Type": "", **each})
        (await asyncio.to_thread(urlopen, request)).close()
    return readable, {key for key in headers if key.startswith("odd/")}


@pytest.mark.parametrize(
    ("kind", "catalog"),
    [
        ("moto", "postgresql"),
        ("moto-versioned", "bucket"),
        pytest.param("seaweedfs", "postgresql", marks=pytest.mark.once),
        pytest.param("seaweedfs-versioned", "bucket", marks=pytest.mark.once),
        ("obstore-moto", "sqlite"),
        pytest.param("obstore-seaweedfs", "postgresql", marks=pytest.mark.once),
        ("obstore-file", "postgresql"),
        ("obstore-memory", "bucket"),
    ],
    indirect=["catalog"],
)
async def test_no_object_of_a_stranger_stops_a_catalog_on_any_store(
    kind: str,
    catalog: BackendConfig,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither when a bucket is compared nor when it is first used, and nothing is asked again."""
    store = await make_store(kind, request)
    readable, unreadable = await put_strange(store, kind)
    compared = fresh(store, reconcile=NEVER)
    async with compared() as uow:
        await uow.files.put(text("mine", "mine"))
    report = await reconciled(compared, strategy="replace", orphans="adopt")
    expected = {Difference.UNKNOWN: len(readable) - 1, Difference.ORPHAN: 1}
    if store.server is not None:
        not_named = Difference.UNLISTED if kind.startswith("obstore") else Difference.REFUSED
        expected |= {not_named: 1, Difference.UNREADABLE: len(unreadable)}
    assert report.differences == expected
    reasons = {
        str(each.path): str(each.reason)
        for each in report.findings
        if each.difference is Difference.UNREADABLE
    }
    assert reasons.keys() == unreadable
    assert all("header" in each for each in reasons.values())
    assert await listed(compared) == sorted({"mine", *readable})
    if isinstance(catalog, BucketBackendConfig):
        catalog = BucketBackendConfig(namespace=store.namespace)
    first = store.uow(backend=catalog)
    async with first() as uow:
        assert await uow.files.list(limit=1_000_000) == sorted({"mine", *readable})
        for prefix in ("%", "odd/_", "\\", "\ud7ff", "\U0010ffff", "x" * 1024):
            assert await uow.files.list(prefix) == []
        for prefix in ("a\0", "\ud800", "../"):
            with pytest.raises(KeyException, match="Prefix"):
                await uow.files.list(prefix)
        for file in await uow.files.get(*readable):
            assert type(file) is TextContent
            assert (await uow.files.stat(str(file.path))).sha256 is None
        await uow.files.put(text("new", "new"))
    assert (await first.recover()).problems == ()
    repeated = [each for each in caplog.messages if "again after" in each or "attempt 1" in each]
    assert not [each for each in repeated if any(key in each for key in unreadable)]


class Unreadable(faults.FaultyConnector):
    """Fails to describe objects whose name begins with `odd`, as if a header were not UTF-8."""

    error: type[BaseConnectorException] = ConnectorUnavailableException
    away = False

    @override
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        # An object under a fixed name of a probe would look like an unreachable store.
        if self.away or location.key.startswith(("odd", ".fennflow/probe/absent")):
            message = "The headers cannot be read."
            raise self.error(message)
        return await super().head(namespace, location)


@pytest.mark.parametrize("error", [ConnectorUnavailableException, AccessDeniedException])
async def test_an_object_that_cannot_be_read_is_one_finding(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseConnectorException],
) -> None:
    """But if the store describes no object at all, that is an error."""
    monkeypatch.setattr(faults, "FaultyConnector", Unreadable)
    monkeypatch.setattr(Unreadable, "error", error)
    with plugins.override(faults):
        inner = await make_store("memory", None)  # type: ignore[arg-type]

        async def script(*_: str) -> None: ...

        store = Store(
            faults.FaultyConnectorConfig(inner=inner.config, faults=faults.Scripted(script)),
            "bucket",
        )
        for key in ("a", "odd\n", "odd1", "odd2", "z"):
            await put_raw(inner, key, b"1")
        uow_class = fresh(store, reconcile=NEVER)
        async with uow_class() as uow:
            await uow.files.put(text("1", "mine"))
        report = await reconciled(uow_class, strategy="replace", orphans="delete")
        assert await listed(uow_class) == ["a", "mine", "z"]
        assert "'odd1' in bucket cannot be read" in caplog.text
        inserted = (Difference.UNKNOWN, ReconcileAction.INSERTED)
        assert reported(report) == {
            **dict.fromkeys(("a", "z"), inserted),
            "odd\n": (Difference.REFUSED, None),
            "odd1": (Difference.UNREADABLE, None),
            "odd2": (Difference.UNREADABLE, None),
        }
        reasons = {str(each.path): str(each.reason) for each in report.findings}
        assert "its key has a control character" in reasons["odd\n"]
        assert "headers cannot be read" in reasons["odd1"]
        # The listing alone fills a catalog: then the first use shows it.
        second = fresh(store)
        async with second() as uow:
            assert await uow.files.list() == ["a", "mine", "odd1", "odd2", "z"]
            assert (await uow.files.stat("a")).size == 1
            with pytest.raises(error):
                await uow.files.stat("odd1")
        await put_raw(inner, "b", b"1")
        monkeypatch.setattr(Unreadable, "away", True)
        with pytest.raises(error):
            await reconciled(uow_class, strategy="replace")


def with_catalog(store: Store, path: Path, **changes: Any) -> type[FullUOW]:
    return store.uow(backend=SqlalchemyBackendConfig(url=f"sqlite:///{path}.db"), **changes)


async def test_what_another_catalog_wrote_is_never_touched(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Committed or not, whatever the strategy; only a setting that names the catalog changes that."""
    first, second = with_catalog(store, tmp_path / "a"), with_catalog(store, tmp_path / "b")
    async with first() as uow:
        await uow.files.put(text("1", "a"), text("1", "b"))
    async with first(auto_commit=False) as uow:
        await uow.files.put(text("2", "c"))
        assert await listed(second) == []
        assert "belong to other catalogs" in caplog.text
        await reconciled(second, strategy="replace", orphans="adopt")
    await put_orphan(store, "old", catalog_id="lost")
    before = await store.objects()
    report = await reconciled(second, strategy="replace", orphans="delete")
    assert reported(report) == dict.fromkeys(("a", "b", "old"), (Difference.OTHER_CATALOG, None))
    assert "lost" in {each.catalog_id for each in report.findings}
    async with second() as uow:
        assert await uow.files.delete("a") == []
        with pytest.raises(RecordAlreadyExistsException, match="another application"):
            await uow.files.put(text("mine", "a"))
        with pytest.raises(RecordAlreadyExistsException):
            await uow.files.create(text("mine", "a"))
    assert await store.objects() == before
    async with first() as uow:
        assert (await uow.files.get("a")).one().content == "1"
    assert {each.catalog_id for each in report.findings} > {"lost"}
    third = with_catalog(store, tmp_path / "c", reconcile=NEVER)
    catalogs = {each.catalog_id for each in report.findings if each.catalog_id}
    report = await reconciled(third, adopt_catalogs=sorted(catalogs))
    assert report.actions == {ReconcileAction.INSERTED: 3}


@pytest.mark.parametrize("strategy", ["insert_missing", "replace"])
async def test_what_arrived_late_is_never_adopted(store: Store, strategy: str) -> None:
    """P20 a: neither next to a record nor without one, and not into an empty catalog either."""
    backend = InMemoryBackendConfig(name=f"r{next(numbers)}")
    uow_class = store.uow(backend=backend)
    late = TransactionToken(
        str(uuid.UUID(int=OLD * 1000 << 80 | 7 << 76 | 2 << 62 | next(numbers)))
    )

    async def arrive(key: str) -> None:
        metadata = stamped({}, Stamp(WriteId(late.transaction_id, 1)))
        async with store.connector() as connector:
            attributes = ObjectAttributes(media_type="text/plain", metadata=metadata)
            await connector.put(PutRequest(store.namespace, key, attributes), b"late")

    async with opened(backend, connector=store.config) as journal:
        keys = [ObjectKey(store.namespace, key) for key in ("a", "b")]
        doubts = [
            LateWrite(namespace=key.namespace, key=key.key, write=WriteId(late.transaction_id, 1))
            for key in keys
        ]
        await journal.begin_writes(late, keys, lambda _: ())
        await journal.abort(late)
        await journal.settle(late, Settlement(late_writes=doubts))
    await arrive("b")
    assert await listed(uow_class) == []
    async with uow_class() as uow:
        await uow.files.put(text("committed", "a"))
    await arrive("a")
    report = await reconciled(uow_class, strategy=strategy, orphans="adopt")
    assert reported(report) == {"a": (Difference.CHANGED, None)}
    assert await listed(uow_class) == ["a"]


async def test_a_committed_object_under_another_etag_keeps_class_and_checksum(
    store: Store,
) -> None:
    """Stores may assign a new ETag when objects are moved; the catalog keeps class and checksum."""
    uow_class = fresh(store)
    async with uow_class() as uow:
        await uow.files.put(BinaryContent(data=b"x", media_type="text/plain", filename="a"))
    before = await stat_of(uow_class, "a")
    async with store.connector() as connector:
        stored = await connector.head(store.namespace, Location("a"))
        assert stored is not None
        # The same stamp, other bytes of the same length: a forgery.
        attributes = ObjectAttributes(media_type="text/html", metadata=stored.metadata)
        await connector.put(PutRequest(store.namespace, "a", attributes), b"y")
    report = await reconciled(uow_class, strategy="replace")
    assert reported(report) == {"a": (Difference.CHANGED, ReconcileAction.UPDATED)}
    after = await stat_of(uow_class, "a")
    assert (after.sha256, after.media_type) == (before.sha256, "text/plain")
    async with uow_class() as uow:
        with pytest.raises(ChecksumMismatchException):
            await uow.files.get("a")


async def test_a_bucket_that_is_missing_is_named_and_why_it_was_looked_at(moto: S3Server) -> None:
    uow_class = Store(s3_config(moto), "nowhere", moto).uow()
    with pytest.raises(NoSuchNamespaceException) as caught:
        await listed(uow_class)
    assert "ReconcileConfig" in caught.value.__notes__[0]


class Unordered(faults.FaultyConnector):
    """Lists backwards, as some stores list in no order (S3 directory buckets do)."""

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        for each in reversed([each async for each in self.inner.list(namespace)]):
            yield each


@pytest.fixture
async def unordered(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Store]:
    """Return a store that lists backwards, with five objects."""
    with plugins.override(faults):

        async def script(*_: str) -> None: ...

        monkeypatch.setattr(faults, "FaultyConnector", Unordered)
        inner = await make_store("memory", None)  # type: ignore[arg-type]
        store = Store(
            faults.FaultyConnectorConfig(inner=inner.config, faults=faults.Scripted(script)),
            "bucket",
        )
        for key in "abcde":
            await put_raw(store, key, b"1")
        yield store


async def test_an_empty_catalog_is_filled_from_a_store_that_lists_in_no_order(
    unordered: Store,
) -> None:
    uow_class = unordered.uow(reconcile=ReconcileConfig(batch_size=2))
    assert await listed(uow_class) == list("abcde")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
async def test_a_store_that_lists_in_no_order_is_compared_with_records(
    unordered: Store, batch_size: int
) -> None:
    """Whatever the order, each difference is exactly one finding."""
    uow_class = unordered.uow(reconcile=ReconcileConfig(batch_size=batch_size))
    async with uow_class() as uow:
        assert await uow.files.list() == list("abcde")
        await uow.files.put(*(text(key, key) for key in ("aa", "cc", "f", "g")))
        await uow.files.delete("c")
    await delete_raw(unordered, "aa")
    await delete_raw(unordered, "b")
    await delete_raw(unordered, "g")
    await put_raw(unordered, "d", b"other")
    await put_raw(unordered, "bb", b"unknown")
    await put_raw(unordered, "z", b"unknown")
    findings: list[Finding] = []
    report = await reconciled(uow_class, on_finding=findings.append)
    assert reported(report) == {
        **dict.fromkeys(("aa", "b", "g"), (Difference.MISSING, None)),
        **dict.fromkeys(("bb", "z"), (Difference.UNKNOWN, None)),
        "d": (Difference.CHANGED, None),
    }
    assert len(findings) == 6
    assert (report.objects, report.records) == (7, 8)
    await reconciled(uow_class, strategy="replace")
    assert (await reconciled(uow_class)).findings == ()
    assert await listed(uow_class) == ["a", "bb", "cc", "d", "e", "f", "z"]


async def test_a_temporary_file_that_cannot_be_written_is_named(
    unordered: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    uow_class = unordered.uow(reconcile=ReconcileConfig(batch_size=2))
    assert await listed(uow_class) == list("abcde")

    def refuse() -> Any:
        message = "unable to open database file"
        raise sqlite3.OperationalError(message)

    monkeypatch.setattr(walking, "_temporary_database", refuse)
    with pytest.raises(ReconcileFailedException, match="SQLITE_TMPDIR"):
        await uow_class.reconcile()
    assert await listed(uow_class) == list("abcde")


async def test_a_cancelled_reconciliation_leaves_no_lock() -> None:
    """P21: it is shielded like a compensation, and can be repeated."""
    with plugins.override(faults):
        inner = await make_store("memory", None)  # type: ignore[arg-type]
        for key in ("a", "b"):
            await put_raw(inner, key, b"1")
        at, count = 0, 0
        task: asyncio.Task[Any] | None = None

        async def script(*_: str) -> None:
            nonlocal count
            count += 1
            if count == at and task is not None:
                task.cancel()
            await asyncio.sleep(0)

        store = Store(
            faults.FaultyConnectorConfig(inner=inner.config, faults=faults.Scripted(script)),
            "bucket",
        )
        while True:
            at, count = at + 1, 0
            backend = faults.FaultyBackendConfig(
                inner=InMemoryBackendConfig(name=f"q{next(numbers)}"),
                faults=faults.Scripted(script),
            )
            uow_class = store.uow(backend=backend, reconcile=NEVER, lock_timeout=0.0)
            task = asyncio.ensure_future(uow_class.reconcile())
            await asyncio.wait({task})
            reached, task = count >= at, None
            await uow_class.reconcile(strategy="insert_missing")
            assert await listed(uow_class) == ["a", "b"]
            async with uow_class(auto_commit=False) as uow:
                await uow.files.put(text("1", "a"))
            if not reached:
                break
        assert at > 5


async def test_an_orphan_that_is_replaced_while_it_is_judged_is_spared() -> None:
    """P18, I5: only the object that was examined is deleted."""
    with plugins.override(faults):
        inner = await make_store("memory-weak", None)  # type: ignore[arg-type]
        replacing: list[str] = []

        async def script(phase: str, operation: str, key: str) -> None:
            if (phase, operation, key) == ("after", "head", "b") and replacing:
                replacing.clear()
                await put_raw(inner, "b", b"foreign")

        store = Store(
            faults.FaultyConnectorConfig(inner=inner.config, faults=faults.Scripted(script)),
            "bucket",
        )
        uow_class = fresh(store)
        async with uow_class() as uow:
            await uow.files.put(text("1", "a"))
        await put_orphan(inner, "b")
        replacing.append("b")
        await reconciled(uow_class, orphans="delete")
        assert await inner.objects() == {"a": b"1", "b": b"foreign"}


async def test_reading_what_was_replaced_in_the_bucket_works_after_reconciling(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("juicefs", request)
    uow_class = fresh(store)
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"))
    await put_raw(store, "a", b"22")
    async with uow_class() as uow:
        with pytest.raises(ObjectChangedException, match="reconcile"):
            await uow.files.get("a")
    await reconciled(uow_class, strategy="replace")
    async with uow_class() as uow:
        assert (await uow.files.get("a")).one().content == "22"


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "x"},
        {"orphans": True},
        {"batch_size": 0},
        {"batch_size": 1 << 70},
        {"frequency": ""},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigException):
        ReconcileConfig(**settings)
