"""Properties of obstore: URLs, secrets, local files, and missing guarantees."""

from __future__ import annotations

import asyncio
import atexit
import os
import stat
import time
import traceback
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from obstore.exceptions import AlreadyExistsError, GenericError

from fennflow import ReconcileConfig
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import (
    Capabilities,
    Connector,
    CopyRequest,
    CopySource,
    Deletion,
    Location,
    ObjectAttributes,
    ObstoreConnectorConfig,
    PutRequest,
    S3ConnectorConfig,
    StoredObject,
)
from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConfigException,
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    FennFlowException,
    IncompleteListingException,
    KeyException,
    NoSuchNamespaceException,
    PreconditionFailedException,
    RecordAlreadyExistsException,
)
from fennflow.files import StreamContent, TextContent
from fennflow.reports import Difference
from fennflow.testing import Fault, S3Request, S3Server
from fennflow_obstore import listing as listings
from fennflow_obstore import local, stores
from fennflow_obstore.errors import exception_for, translated
from fennflow_obstore.stores import Stores
from stores import OBSTORES, Store, make_store, obstore_config, raw_client, s3_config

TEXT = ObjectAttributes(media_type="text/plain", metadata={"Über": "ü"})
LARGE = bytes(range(256)) * (9 << 12)  # 9 MiB


@pytest.fixture(params=OBSTORES)
async def store(request: pytest.FixtureRequest) -> Store:
    return await make_store(request.param, request)


@pytest.fixture
async def files(request: pytest.FixtureRequest) -> Store:
    return await make_store("obstore-file", request)


@pytest.fixture
async def s3(request: pytest.FixtureRequest) -> Store:
    return await make_store("obstore-moto", request)


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://host", "must begin with one of"),
        ("bucket", "must begin with one of"),
        ("s3://key:secret@bucket", "neither credentials"),
        ("s3://bucket?token=secret", "neither credentials"),
        ("s3://key:se/cret@bucket", "neither credentials"),
        ("s3://secret@bucket", "neither credentials"),
        ("file://relative/path", "absolute directory"),
        ("file:///a%00b", "absolute directory"),
    ],
)
def test_a_url_of_another_kind_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigException, match=reason) as caught:
        ObstoreConnectorConfig(url=url)
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_no_secret_is_shown_and_equal_configs_are_one() -> None:
    config = ObstoreConnectorConfig(
        url="s3://",
        options={"secret_access_key": "very secret"},
        client_options={"default_headers": {"Authorization": "very secret"}},
    )
    assert "very secret" not in f"{config!r} {config}"
    assert config == config.model_copy()
    assert hash(config) == hash(config.model_copy())


@pytest.mark.parametrize("name", ["endpoint", "aws_endpoint_url"])
@pytest.mark.parametrize("password", ["secret", "se/cret", "a@secret"])
def test_an_endpoint_with_credentials_is_refused(name: str, password: str) -> None:
    with pytest.raises(ConfigException, match=f"{name} must not contain credentials") as caught:
        ObstoreConnectorConfig(url="s3://", options={name: f"http://ann:{password}@127.0.0.1:9"})
    assert "cret" not in "".join(traceback.format_exception(caught.value))
    # A key of a service account holds URLs and addresses, and is not a URL.
    ObstoreConnectorConfig(
        url="gs://", options={"service_account_key": '{"a": "https://x", "b": "c@d"}'}
    )


@pytest.mark.parametrize("make", [S3ConnectorConfig, ObstoreConnectorConfig])
async def test_no_message_shows_the_password_of_an_endpoint_from_the_environment(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "other", "REGION": "us-east-1"}
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "http://ann:Pl4in@127.0.0.1:9")
    config = make(max_attempts=1, **({} if make is S3ConnectorConfig else {"url": "s3://"}))
    uow_class = Store(config, "bucket").uow(reconcile=ReconcileConfig(frequency="never"))
    with pytest.raises(FennFlowException) as caught:
        async with uow_class() as uow:
            await uow.files.put(text("1", "a"))
    assert "Pl4in" not in "".join(traceback.format_exception(caught.value))
    with suppress(FennFlowException):
        assert "Pl4in" not in repr(await uow_class.diagnose())


async def test_options_that_obstore_does_not_know_are_named_without_their_values() -> None:
    store = Store(ObstoreConnectorConfig(url="s3://", options={"nonsense": "secret"}), "bucket")
    with pytest.raises(ConfigException, match="nonsense") as caught:
        async with store.uow()() as uow:
            await uow.files.put(text("1", "a"))
    assert "secret" not in "".join(traceback.format_exception(caught.value))


async def test_a_wrong_value_of_an_option_is_not_shown() -> None:
    options = {"aws_copy_if_not_exists": "a secret in the wrong place"}
    store = Store(ObstoreConnectorConfig(url="s3://", options=options), "bucket")
    with pytest.raises(ConfigException, match=r"\*\*\*.*S3CopyIfNotExists") as caught:
        async with store.uow()() as uow:
            await uow.files.put(text("1", "a"))
    assert "secret in" not in "".join(traceback.format_exception(caught.value))


async def test_a_namespace_that_no_directory_can_be_called_is_an_error_of_ours(
    tmp_path: Path,
) -> None:
    store = Store(ObstoreConnectorConfig(url=f"file://{tmp_path}"), "x" * 300)
    with pytest.raises(FennFlowException, match="name too long"):
        async with store.uow()() as uow:
            await uow.files.put(text("1", "a"))


@pytest.mark.parametrize("namespace", ["", ".", "..", "a/b"])
def test_a_namespace_stays_below_the_url(namespace: str, tmp_path: Path) -> None:
    stores = Stores(ObstoreConnectorConfig(url=f"file://{tmp_path}"))
    with pytest.raises(ConfigException, match="one path segment"):
        stores.of(namespace, "reading")


async def test_a_prefix_of_a_bucket_is_a_place_for_namespaces(s3: Store) -> None:
    assert s3.server is not None
    config = obstore_config(s3.server, url=f"s3://{s3.namespace}/team")
    async with Store(config, "letters").uow()() as uow:
        await uow.files.put(text("1", "a/b"))
    assert set(await s3.objects()) == {"team/letters/a/b"}


async def test_both_connectors_read_what_the_other_wrote(s3: Store) -> None:
    assert s3.server is not None
    other = Store(s3_config(s3.server), s3.namespace, s3.server)
    for one, two in ((s3, other), (other, s3)):
        async with one.connector() as writer, two.connector() as reader:
            put = await writer.put(PutRequest(s3.namespace, "a", TEXT), b"1")
            stored, body = await reader.get(s3.namespace, Location("a"), if_match=put.etag)
            assert (body, stored.media_type, stored.metadata) == (b"1", "text/plain", {"Über": "ü"})


# --- requests that fail ------------------------------------------------------------------------


async def test_a_request_that_was_sent_again_says_so(s3: Store) -> None:
    faults = iter([Fault.AFTER, Fault.BEFORE])

    def fault(request: S3Request) -> Fault | None:
        return next(faults, None) if request.method == "PUT" else None

    assert s3.server is not None
    async with s3.connector() as connector:
        with s3.server.failing(fault):
            assert (await connector.put(PutRequest(s3.namespace, "a", TEXT), b"1")).retried
        assert not (await connector.put(PutRequest(s3.namespace, "a", TEXT), b"1")).retried
        with s3.server.failing(lambda _: next(faults, None)):
            faults = iter([Fault.AFTER])
            with pytest.raises(PreconditionFailedException) as caught:
                await connector.put(PutRequest(s3.namespace, "b", TEXT, if_none_match=True), b"1")
            assert caught.value.retried


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("endpoint", "not a url", "endpoint must be"),
        ("AWS_ENDPOINT_URL", "localhost:9000", "must be an http"),
        ("endpoint", "http://", "must be an http"),
        ("region", "us-east-1\n", "region must not contain control"),
        ("session_token", "very secret\n", "session_token must not contain control"),
    ],
)
def test_an_option_at_which_obstore_would_panic_is_refused(
    name: str, value: str, reason: str
) -> None:
    with pytest.raises(ConfigException, match=reason) as caught:
        ObstoreConnectorConfig(url="s3://", options={name: value})
    assert "very secret" not in "".join(traceback.format_exception(caught.value))


async def test_options_of_which_no_store_can_be_made_are_refused_before_any_request() -> None:
    options = {"nonsense": "1"}
    for config in (
        ObstoreConnectorConfig(url="s3://", options=options),
        ObstoreConnectorConfig(url="s3://", client_options=options),
    ):
        store = Store(config, "bucket")
        with pytest.raises(ConfigException, match="nonsense"):
            async with store.connector():
                raise AssertionError


class RustPanic(BaseException):
    """pyo3's exception has this name or PanicException, which is not an `Exception`."""


def test_a_panic_of_rust_is_an_exception_of_ours() -> None:
    """It would pass every `except Exception`, and leave the outcome of the write unknown."""
    with pytest.raises(ConnectorUnavailableException, match="failed internally") as caught:
        with translated("put", "bucket/a", writes=True):
            raise RustPanic
    assert caught.value.ambiguous


async def test_requests_give_up(s3: Store) -> None:
    assert s3.server is not None
    config = obstore_config(s3.server, max_attempts=2)
    store = Store(config, s3.namespace, s3.server)
    with s3.server.failing(lambda _: Fault.BEFORE), s3.server.watched() as requests:
        async with store.connector() as connector:
            with pytest.raises(ConnectorUnavailableException, match="503"):
                await connector.put(PutRequest(s3.namespace, "a", TEXT), b"1")
    assert len(requests) == 2


async def test_a_server_that_is_down_is_reported() -> None:
    server = S3Server("http://127.0.0.1:9", "key", "very secret")
    store = Store(obstore_config(server, max_attempts=1), "bucket")
    with pytest.raises(ConnectorUnavailableException, match="url and options") as caught:
        async with store.uow()() as uow:
            await uow.files.put(text("1", "a"))
    assert "very secret" not in "".join(traceback.format_exception(caught.value))


async def test_a_deletion_in_a_missing_bucket_is_reported(s3: Store) -> None:
    assert s3.server is not None
    async with Store(obstore_config(s3.server), "no-such-bucket").connector() as connector:
        with pytest.raises(NoSuchNamespaceException):
            await connector.capabilities("no-such-bucket")


async def test_a_missing_bucket_is_reported(s3: Store) -> None:
    assert s3.server is not None
    store = Store(obstore_config(s3.server), "no-such-bucket")
    with pytest.raises(NoSuchNamespaceException, match="no-such-bucket"):
        async with store.uow()() as uow:
            await uow.files.put(text("1", "a"))


async def test_refused_credentials_are_reported(request: pytest.FixtureRequest) -> None:
    store = await make_store("obstore-juicefs", request)
    assert store.server is not None
    wrong = S3Server(store.server.url, "stranger", "very secret")
    with pytest.raises(AccessDeniedException) as caught:
        async with Store(obstore_config(wrong), store.namespace).uow()() as uow:
            await uow.files.put(text("1", "a"))
    assert "very secret" not in "".join(traceback.format_exception(caught.value))


async def test_of_a_batch_that_fails_each_deletion_is_tried_alone(s3: Store) -> None:
    assert s3.server is not None
    async with s3.connector() as connector:
        for key in ("a", "b"):
            await connector.put(PutRequest(s3.namespace, key, TEXT), b"1")
        await connector.capabilities(s3.namespace)
        deletions = [Deletion(location=Location(key)) for key in ("a", "b", "c")]
        with s3.server.failing(
            lambda request: Fault.ERROR_IN_200 if request.method == "POST" else None
        ):
            report = await connector.delete(s3.namespace, deletions)
        assert list(report.errors) == [None, None, None]
        assert report.retried
        assert [each async for each in connector.list(s3.namespace)] == []


# --- missing guarantees ------------------------------------------------------------------------


async def test_a_long_stream_for_a_new_key_is_sent_in_parts_and_copied_at_the_commit(
    s3: Store,
) -> None:
    """obstore supports conditions only for single requests."""
    server = s3.server
    assert server is not None

    async def chunks() -> AsyncGenerator[bytes]:
        for _ in range(40):
            yield b"x" * (1 << 18)

    def content() -> StreamContent:
        return StreamContent.from_iterable(chunks(), filename="a.bin")

    async with s3.uow()() as uow:
        with server.watched() as seen:
            await uow.files.put(content())
            await uow.files.copy("a.bin", "b.bin")
        written = [each.key for each in seen if each.method in {"PUT", "POST"} and each.key]
        assert {key.partition("/")[0] for key in written} == {".fennflow"}
        assert "a.bin" not in await s3.objects()
    assert await s3.objects() == dict.fromkeys(["a.bin", "b.bin"], b"x" * (10 << 20))

    async with s3.uow(reconcile=ReconcileConfig(frequency="never"))() as uow:
        with pytest.raises(RecordAlreadyExistsException), server.watched() as seen:
            await uow.files.create(content())
        assert not [each for each in seen if "upload" in each.query]  # it looks first


async def test_extras_of_other_stores_are_refused(store: Store) -> None:
    with pytest.raises(ConnectorCapabilityException, match=r"ACL.*Cache-Control"):
        async with store.uow()() as uow:
            await uow.files.put(text("1", "a"), connector_extra={"ACL": "public-read"})


async def test_extras_are_kept_and_copied(store: Store) -> None:
    async with store.connector() as connector:
        extra = {"Cache-Control": "no-store"}
        attributes = ObjectAttributes(media_type="text/css", extra=extra, metadata={"a": "ü"})
        await connector.put(PutRequest(store.namespace, "a", attributes), b"1")
        source = CopySource(store.namespace, Location("a"))
        await connector.copy(CopyRequest(store.namespace, "b", source, extra=extra))
        copied = await connector.head(store.namespace, Location("b"))
        assert copied is not None
        assert (copied.media_type, copied.metadata) == ("text/css", {"a": "ü"})


@pytest.mark.parametrize("changed", [False, True])
async def test_a_large_object_is_copied_whole(store: Store, *, changed: bool) -> None:
    async with store.connector() as connector:
        put = await connector.put(PutRequest(store.namespace, "a", TEXT), LARGE)
        source = CopySource(store.namespace, Location("a"), put.etag, size=len(LARGE))
        other = ObjectAttributes(media_type="a/b", metadata={"c": "d"})
        copied = await connector.copy(
            CopyRequest(store.namespace, "dir/b", source, attributes=other if changed else None)
        )
        stored, body = await connector.get(store.namespace, Location("dir/b"))
        assert body == LARGE
        assert (stored.etag, stored.size) == (copied.etag, len(LARGE))
        expected = other if changed else TEXT
        assert (stored.media_type, stored.metadata) == (expected.media_type, expected.metadata)
        wrong = CopySource(store.namespace, Location("a"), "0" * 32, size=len(LARGE))
        with pytest.raises(PreconditionFailedException):
            await connector.copy(CopyRequest(store.namespace, "c", wrong))


async def test_a_prefix_need_not_end_at_a_segment(store: Store) -> None:
    keys = ["ab/c", "abc", "abd", "b", "aa"]
    async with store.connector() as connector:
        await connector.capabilities(store.namespace)
        for key in keys:
            await connector.put(PutRequest(store.namespace, key, TEXT), b"1")
        for prefix in ("", "a", "ab", "ab/", "abc", "b", "c", "!", " "):
            listing = connector.list(store.namespace, prefix)
            found = [each.location.key async for each in listing]
            assert sorted(found) == sorted(key for key in keys if key.startswith(prefix)), prefix


@pytest.mark.parametrize(
    ("code", "contended"), [("BlobAlreadyExists", False), ("ConditionalRequestConflict", True)]
)
def test_a_create_that_azure_refuses_is_not_sent_again(code: str, *, contended: bool) -> None:
    error = AlreadyExistsError(
        "Object already exists: Server returned non-2xx status code: 409 Conflict: "
        f"<Error><Code>{code}</Code></Error>"
    )
    found = exception_for(error, "put", "a", writes=True, retried=False)
    assert isinstance(found, PreconditionFailedException)
    assert found.contended == contended


@pytest.mark.parametrize(
    "said",
    [
        "Generic S3 error: Content-Type header contained non UTF-8 characters",
        "HTTP error: error sending request\n\nDebug source:\nhyper::Error(\n Parse(\n  Header(\n   Token",
    ],
    ids=["not UTF-8", "a control character"],
)
def test_a_header_that_no_client_can_read_is_not_a_store_that_is_away(said: str) -> None:
    error = GenericError(said)
    found = exception_for(error, "head", "a", writes=False, retried=False)
    assert type(found) is BaseConnectorException
    assert "Upload the object again" in str(found)
    written = exception_for(error, "put", "a", writes=True, retried=False)
    assert isinstance(written, ConnectorUnavailableException)


KEYS = ["a/+1", "a/x", "a/y/z", "b", "c/1", "c/2"]


async def fill(store: Store, *keys: str) -> None:
    assert store.server is not None
    async with raw_client(store.server) as client:
        for key in keys:
            await client.put_object(Bucket=store.namespace, Key=key, Body=key.encode())


@pytest.mark.parametrize(
    ("odd", "unlisted", "missed"),
    [
        ("a//b", "a/", {"a/+1"}),
        ("a/../b", "a/", {"a/+1"}),
        ("a/y/\x1f", "a/y/", set[str]()),
        ("c/1\x7f", "c/", {"c/1"}),
        ("../x", "", set[str]()),
        ('a//" contained empty path segment', "a/", {"a/+1"}),
        ("//x", "/", set[str]()),
        ("/", None, set[str]()),
    ],
)
async def test_no_key_of_a_stranger_keeps_other_directories_from_being_adopted(
    s3: Store,
    odd: str,
    unlisted: str | None,
    missed: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    await fill(s3, *KEYS, odd)
    uow = s3.uow()
    report = (await uow.reconcile())[s3.namespace]
    found = [each.path for each in report.findings if each.difference is Difference.UNLISTED]
    assert found == ([] if unlisted is None else [unlisted])
    problems = (await uow.diagnose()).problems
    assert any("1 unlisted" in each for each in problems) == bool(found)
    logged = [each for each in caplog.messages if "could be listed" in each]
    assert len(logged) == len(found)
    assert all("use fennflow-s3" in each for each in logged)
    async with uow() as files:
        assert set(await files.files.list()) == set(KEYS) - missed
        for key in set(KEYS) - missed:
            assert (await files.files.get(key)).one().data == key.encode()
        await files.files.put(text("new", "new"))


async def test_what_cannot_be_listed_is_looked_at_before_it_counts_as_missing(s3: Store) -> None:
    await fill(s3, *KEYS)
    uow = s3.uow(reconcile=ReconcileConfig(strategy="replace"))
    await uow.reconcile()
    assert s3.server is not None
    async with raw_client(s3.server) as client:
        await client.delete_object(Bucket=s3.namespace, Key="a/x")
        await client.delete_object(Bucket=s3.namespace, Key="c/1")
    await fill(s3, "a/\x01", "a/z\x01", "../b")
    report = (await uow.reconcile())[s3.namespace]
    assert {(each.path, each.difference) for each in report.findings} == {
        ("a/x", Difference.MISSING),
        ("c/1", Difference.MISSING),
        ("", Difference.UNLISTED),
        ("a/", Difference.UNLISTED),
    }
    async with uow() as files:
        assert set(await files.files.list()) == set(KEYS) - {"a/x", "c/1"}


async def test_of_a_directory_with_an_odd_key_the_directories_in_it_are_listed_to_their_ends(
    s3: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    monkeypatch.setattr(listings, "LISTED_AT_ONCE", 3)
    keys = {"a/1", "a/2", "a/3", "a/4", "c/d/1", "c/d/2", "c/e", "d"}
    await fill(s3, *keys, "a1\x01", "c\x01", "c/d//2")
    async with s3.connector() as connector:
        found, left_out = await listing(connector, s3.namespace)
    assert {each.location.key for each in found} == keys
    assert left_out == ("", "c/d/")


async def test_doctor_counts_what_the_last_comparison_could_not_record(
    s3: Store, tmp_path: Path
) -> None:
    await fill(s3, *KEYS, "a//b", "c//d")
    uow = s3.uow(backend=SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/files.db"))
    await uow.reconcile()
    assert any("2 unlisted" in each for each in (await uow.diagnose()).problems)
    assert s3.server is not None
    async with raw_client(s3.server) as client:
        await client.delete_object(Bucket=s3.namespace, Key="a//b")
        await client.delete_object(Bucket=s3.namespace, Key="c//d")
    await uow.reconcile(strategy="insert_missing")
    assert (await uow.diagnose()).problems == ()
    async with uow() as files:
        assert set(await files.files.list()) == set(KEYS)


async def test_an_odd_key_of_a_stranger_does_not_prevent_the_start(s3: Store) -> None:
    await fill(s3, ".fennflow//1")
    uow = s3.uow()
    async with uow.lifespan(), uow() as files:
        await files.files.put(text("1", "a"))
    diagnosis = (await uow.diagnose()).namespaces[s3.namespace]
    assert (diagnosis.unswept, diagnosis.lists_uploads) == (None, True)


async def test_an_interrupted_adoption_keeps_what_cannot_be_listed_any_more(s3: Store) -> None:
    await fill(s3, *KEYS)
    uow = s3.uow(reconcile=ReconcileConfig(batch_size=1))

    def stop(_: object) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await uow.reconcile(on_finding=stop)
    await fill(s3, "a/z\x01")
    assert s3.server is not None
    async with raw_client(s3.server) as client:
        await client.put_object(Bucket=s3.namespace, Key="a/+1", Body=b"changed")
    await uow.reconcile()
    async with uow() as files:
        assert (await files.files.get("a/+1")).one().data == b"changed"


async def test_a_prefix_without_odd_keys_is_listed_as_ever(s3: Store) -> None:
    await fill(s3, *KEYS, "a//b")
    async with s3.connector() as connector:
        found = [each.location.key async for each in connector.list(s3.namespace, "c/")]
        assert found == ["c/1", "c/2"]
        with pytest.raises(IncompleteListingException, match="'a/'") as caught:
            assert [each async for each in connector.list(s3.namespace, "a/y")]
    assert caught.value.prefixes == ("a/",)


async def test_a_slash_that_obstore_takes_off_makes_no_other_object(s3: Store) -> None:
    assert s3.server is not None
    async with raw_client(s3.server) as client:
        for key in ("folder/", "empty", "empty/"):
            await client.put_object(Bucket=s3.namespace, Key=key, Body=b"")
    await fill(s3, "folder/1", "report", "report/", "report-", "/report")
    uow = s3.uow(reconcile=ReconcileConfig(batch_size=1))
    async with uow() as files:
        assert await files.files.list() == ["empty", "folder/1", "report", "report-"]
        assert (await files.files.get("report")).one().data == b"report"


async def test_an_odd_key_next_to_the_notes_of_catalogs_makes_every_object_suspect(
    s3: Store, tmp_path: Path
) -> None:
    other = s3.uow(backend=SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/other.db"))
    await fill(s3, "a", ".fennflow/catalogs/\x01", ".fennflow/staging//1")
    async with other() as files:
        await files.files.put(text("theirs", "theirs"))
    report = (await s3.uow().reconcile())[s3.namespace]
    assert {(each.path, each.difference) for each in report.findings} == {
        ("a", Difference.UNKNOWN),
        ("theirs", Difference.OTHER_CATALOG),
        (".fennflow/catalogs/", Difference.UNLISTED),
        (".fennflow/staging/", Difference.UNLISTED),
    }


async def test_presigned_urls_are_those_of_the_store(s3: Store, files: Store) -> None:
    async with s3.uow()() as uow:
        await uow.files.put(text("Dear Ann", "a"))
    async with s3.uow()() as uow:
        url = await uow.files.generate_presigned_url("a")
    body = await asyncio.to_thread(lambda: urlopen(Request(url[0])).read())
    assert body == b"Dear Ann"
    async with files.uow()() as uow:
        await uow.files.put(text("Dear Ann", "a"))
    async with files.uow()() as uow:
        with pytest.raises(ConnectorCapabilityException):
            await uow.files.generate_presigned_url("a")


# --- local files -------------------------------------------------------------------------------


async def test_local_files_are_plain_files(files: Store, tmp_path: Path) -> None:
    async with files.uow()() as uow:
        await uow.files.put(text("Dear Ann", "letters/ann.txt"))
    path = tmp_path / files.namespace / "letters" / "ann.txt"
    assert path.read_text() == "Dear Ann"
    async with files.uow()() as uow:
        await uow.files.delete("letters/ann.txt")
    assert not path.parent.exists()


async def test_files_of_others_are_read_too(files: Store, tmp_path: Path) -> None:
    directory = tmp_path / files.namespace
    directory.mkdir()
    (directory / "a.txt").write_text("theirs")
    os.setxattr(directory / "a.txt", local.ATTRIBUTE, b"no JSON")
    async with files.connector() as connector:
        stored, body = await connector.get(files.namespace, Location("a.txt"))
        assert (body, stored.metadata) == (b"theirs", {})


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("key", ["link/y.txt", "link", "deep/link/er/y.txt", "link/there.txt"])
async def test_links_are_not_followed(
    files: Store, tmp_path: Path, key: str, *, inside: bool
) -> None:
    """Neither out of the root, nor to another file in it, which would then have two keys."""
    root, outside = tmp_path / files.namespace, tmp_path / "outside"
    goal = root / "real" if inside else outside
    for directory in (root / "deep", goal / "er"):
        directory.mkdir(parents=True)
    (goal / "there.txt").write_text("of another writer")
    link = root.joinpath(*key.split("/")[: key.split("/").index("link") + 1])
    link.symlink_to(goal / "there.txt" if key == "link" else goal)
    location = Location(key)
    async with files.connector() as connector:
        with pytest.raises(KeyException, match="symbolic link"):
            connector.validate(files.namespace, key, TEXT)
        await connector.put(PutRequest(files.namespace, "a", TEXT), b"1")
        source = CopySource(files.namespace, Location("a"))
        for refused in (
            connector.put(PutRequest(files.namespace, key, TEXT), b"new"),
            connector.put(PutRequest(files.namespace, key, TEXT, if_none_match=True), b"new"),
            connector.upload(PutRequest(files.namespace, key, TEXT), chunks(b"new")),
            connector.get(files.namespace, location),
            connector.head(files.namespace, location),
            anext(aiter(connector.stream(files.namespace, location, if_match="1"))),
            connector.copy(CopyRequest(files.namespace, key, source)),
            connector.copy(
                CopyRequest(files.namespace, "b", CopySource(files.namespace, location))
            ),
        ):
            with pytest.raises(AccessDeniedException, match="symbolic link"):
                await refused
        report = await connector.delete(files.namespace, [Deletion(location=location)])
        assert [type(error) for error in report.errors] == [AccessDeniedException]
        found, left_out = await listing(connector, files.namespace)
        assert [each.location.key for each in found] == (
            ["a", "real/there.txt"] if inside else ["a"]
        )
        assert left_out == (str(link.relative_to(root)),)
        assert (await listing(connector, files.namespace, f"{key}/"))[0] == []
    assert {path.name for path in goal.iterdir()} == {"er", "there.txt"}
    assert (goal / "there.txt").read_text() == "of another writer"
    for hidden in (False, True):
        with pytest.raises(KeyException, match="symbolic link"):
            async with files.uow(hide_pending=hidden)() as uow:
                await uow.files.put(text("new", key))


@pytest.mark.parametrize("key", ["../out/file", "a/../../out/file", "..", "a/.", "a/x\0y"])
async def test_no_key_leads_out_of_the_directory(files: Store, tmp_path: Path, key: str) -> None:
    """Nor does a key that was written into the journal, which bypasses the checks of keys."""
    victim = tmp_path / "out" / "file"
    victim.parent.mkdir()
    victim.write_text("of another program")
    location = Location(key)
    async with files.connector() as connector:
        with pytest.raises(KeyException, match="not the name of a file"):
            connector.validate(files.namespace, key, TEXT)
        await connector.put(PutRequest(files.namespace, "a/b", TEXT), b"1")
        source = CopySource(files.namespace, Location("a/b"))
        for refused in (
            connector.put(PutRequest(files.namespace, key, TEXT), b"new"),
            connector.upload(PutRequest(files.namespace, key, TEXT), chunks(b"new")),
            connector.get(files.namespace, location),
            connector.head(files.namespace, location),
            anext(aiter(connector.stream(files.namespace, location, if_match="1"))),
            connector.copy(CopyRequest(files.namespace, key, source)),
        ):
            with pytest.raises(AccessDeniedException, match="not the name of a file"):
                await refused
        report = await connector.delete(files.namespace, [Deletion(location=location)])
        assert [type(error) for error in report.errors] == [AccessDeniedException]
        assert (await listing(connector, files.namespace, f"{key}/"))[0] == []
    assert victim.read_text() == "of another program"
    assert [path.name for path in victim.parent.iterdir()] == ["file"]


async def listing(
    connector: Connector, namespace: str, prefix: str = ""
) -> tuple[list[StoredObject], Sequence[str]]:
    """Return the objects that a connector lists, and those that it leaves out."""
    found: list[StoredObject] = []
    try:
        async for each in connector.list(namespace, prefix):
            found += [each]
    except IncompleteListingException as error:
        return found, error.prefixes
    return found, ()


async def chunks(*parts: bytes) -> AsyncGenerator[bytes]:
    for part in parts:
        yield part


@pytest.mark.parametrize("name", [".fennflow", ".fennflow/incoming"])
async def test_a_file_where_fennflow_keeps_its_own_is_named(
    files: Store, tmp_path: Path, name: str
) -> None:
    path = tmp_path / files.namespace / name
    path.parent.mkdir(parents=True)
    path.write_text("of another writer")
    with pytest.raises(BaseConnectorException, match="file or a link has its name"):
        async with files.uow()() as uow:
            await uow.files.put(text("1", "a"))
    assert path.read_text() == "of another writer"


async def test_a_file_in_place_of_a_namespace_is_named(files: Store, tmp_path: Path) -> None:
    (tmp_path / files.namespace).write_text("of another writer")
    with pytest.raises(ConfigException, match="is a file, but a namespace is a directory"):
        async with files.uow()() as uow:
            await uow.files.put(text("1", "a"))


@pytest.mark.parametrize("link", [".fennflow", ".fennflow/incoming"])
async def test_what_is_written_first_is_not_written_through_a_link_either(
    files: Store, tmp_path: Path, link: str
) -> None:
    outside = tmp_path / "outside"
    (outside / "incoming").mkdir(parents=True)
    for directory in (outside, outside / "incoming"):
        (directory / "old").write_text("of another writer")
        os.utime(directory / "old", (1, 1))
    path = tmp_path / files.namespace / link
    path.parent.mkdir(parents=True)
    path.symlink_to(outside)
    async with files.connector() as connector:
        with pytest.raises(BaseConnectorException):
            await connector.put(PutRequest(files.namespace, "a", TEXT), b"1")
        assert [each async for each in connector.uploads(files.namespace, ".fennflow/")] == []
        with suppress(BaseConnectorException):
            await connector.abort_upload(files.namespace, ".fennflow/incoming/old", "old")
    assert sorted(path.name for path in outside.rglob("*")) == ["incoming", "old", "old"]


async def test_a_namespace_that_is_a_link_is_refused(files: Store, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / files.namespace).symlink_to("outside")
    with pytest.raises(ConfigException, match="symbolic link"):
        async with files.uow()() as uow:
            await uow.files.put(text("1", "a"))
    assert list((tmp_path / "outside").iterdir()) == []


async def test_what_cannot_have_a_key_is_left_out_of_a_listing_and_logged(
    files: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / files.namespace
    (root / "sub").mkdir(parents=True)
    for name in (b"good.txt", b"two\nlines.txt", b"caf\xe9.txt", b"sub/a#1", b"sub/\x1b[2J", b"z"):
        (Path(os.fsdecode(root)) / os.fsdecode(name)).write_text("x")
    (root / "loop").symlink_to("loop")
    (root / "self").symlink_to(".")
    (root / "broken").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    async with files.connector() as connector:
        found, left_out = await listing(connector, files.namespace)
        assert [each.location.key for each in found] == ["good.txt", "z"]
        assert len(left_out) == 8
        [stored] = (await listing(connector, files.namespace, "g"))[0]
        assert stored == await connector.head(files.namespace, Location("good.txt"))
    uow_class = files.uow()
    report = (await uow_class.reconcile())[files.namespace]
    assert report.differences == {Difference.UNKNOWN: 2, Difference.UNLISTED: 8}
    assert {each.path for each in report.findings} == {"good.txt", "z", *left_out}
    [record] = [each for each in caplog.messages if "are left out" in each]
    assert record.isprintable()
    assert "8 files of " in record
    assert "and 3 more" in record
    assert any("8 unlisted" in each for each in (await uow_class.diagnose()).problems)
    async with uow_class() as uow:
        assert list(await uow.files.list()) == ["good.txt", "z"]


async def test_directories_deeper_than_a_key_can_be_are_left_out_of_a_listing(
    files: Store, tmp_path: Path
) -> None:
    root = tmp_path / files.namespace
    root.mkdir()
    (root / "a").write_text("1")
    # Longer than a key, and short enough for pytest, which removes the directories by recursion.
    root.joinpath(*["deeper"] * 160).mkdir(parents=True)
    async with files.connector() as connector:
        with pytest.raises(IncompleteListingException, match="is longer than a key can be"):
            assert [each async for each in connector.list(files.namespace)]
        assert [each.location.key for each in (await listing(connector, files.namespace))[0]] == [
            "a"
        ]


async def test_a_file_of_a_time_that_no_calendar_has_stops_no_other(
    files: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with files.uow()() as uow:
        await uow.files.put(text("1", "a"), text("2", "odd"))
    lstat = Path.lstat

    def of_the_year_200_000(path: Path) -> os.stat_result:
        found = lstat(path)
        # Not every file system holds such a time, and of those that do obstore panics.
        return os.stat_result([*found[:8], 1 << 43, 0]) if path.name == "odd" else found

    monkeypatch.setattr(Path, "lstat", of_the_year_200_000)
    async with files.connector() as connector:
        found, left_out = await listing(connector, files.namespace)
        assert ([each.location.key for each in found], left_out) == (["a"], ("odd",))
    async with files.uow()() as uow:
        assert (await uow.files.get("a")).one().data == b"1"
        with pytest.raises(BaseConnectorException, match="out of range"):
            await uow.files.get("odd")
        with pytest.raises(BaseConnectorException, match="out of range"):
            async with uow.files.open("odd") as stream:
                assert [chunk async for chunk in stream]
    incoming = tmp_path / files.namespace / ".fennflow" / "incoming"
    (incoming / "odd").write_text("half")
    assert (await files.uow().recover()).problems == ()


async def test_what_others_left_where_files_are_written_first_stops_no_clean_up(
    files: Store, tmp_path: Path
) -> None:
    incoming = tmp_path / files.namespace / ".fennflow" / "incoming"
    (incoming / "directory" / "sub").mkdir(parents=True)
    (incoming / "loop").symlink_to("loop")
    os.mkfifo(incoming / "pipe")
    (incoming / "old").write_text("half")
    for name in ("directory", "pipe", "old"):
        os.utime(incoming / name, (1, 1))
    assert (await files.uow().recover()).problems == ()
    assert sorted(path.name for path in incoming.iterdir()) == ["directory", "loop", "pipe"]


async def test_a_file_in_the_place_where_files_are_written_first_is_no_reason_to_raise(
    files: Store, tmp_path: Path
) -> None:
    root = tmp_path / files.namespace
    root.mkdir()
    (root / ".fennflow").write_text("in the way")
    async with files.connector() as connector:
        assert [each async for each in connector.uploads(files.namespace, ".fennflow/")] == []


async def test_a_directory_that_cannot_be_read_is_left_out_of_a_listing(
    files: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, scandir = tmp_path / files.namespace, os.scandir
    (root / "private").mkdir(parents=True)
    (root / "a").write_text("1")

    def refusing(path: Path) -> object:
        if path == refused:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    async with files.connector() as connector:
        refused = root / "private"
        found, left_out = await listing(connector, files.namespace)
        assert ([each.location.key for each in found], left_out) == (["a"], ("private",))
        refused = root
        with pytest.raises(AccessDeniedException):
            assert [each async for each in connector.list(files.namespace)]


@pytest.mark.parametrize("config", [{}, {"file_mode": 0o640, "directory_mode": 0o750}])
async def test_files_and_directories_are_private_unless_configured_otherwise(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    before = os.umask(0o022)
    try:
        url = f"file://{tmp_path}"
        async with Store(
            ObstoreConnectorConfig(url=url, **config), "bucket"
        ).connector() as connector:
            await connector.put(PutRequest("bucket", "sub/a", TEXT), b"1")
            await connector.put(PutRequest("bucket", "sub/b", TEXT, if_none_match=True), b"1")
            await connector.upload(PutRequest("bucket", "sub/c", TEXT), chunks(b"1"))
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "bucket").rglob("*")}
    wanted = {False: config.get("file_mode", 0o600), True: config.get("directory_mode", 0o700)}
    assert modes == {path: wanted[path.is_dir()] for path in modes}
    assert stat.S_IMODE((tmp_path / "bucket").stat().st_mode) == wanted[True]


@pytest.mark.parametrize("config", [{"file_mode": 0o400}, {"directory_mode": 0o600}])
def test_modes_that_lock_the_owner_out_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigException):
        ObstoreConnectorConfig(url="file:///srv/files", **config)


async def test_a_file_in_the_place_of_a_directory_is_a_refusal(files: Store) -> None:
    async with files.connector() as connector:
        await connector.put(PutRequest(files.namespace, "a", TEXT), b"1")
        await connector.put(PutRequest(files.namespace, "d/e", TEXT), b"1")
        for key in ("a/b", "d"):
            with pytest.raises(BaseConnectorException, match="directory") as caught:
                await connector.put(PutRequest(files.namespace, key, TEXT), b"2")
            assert not caught.value.ambiguous
            report = await connector.delete(files.namespace, [Deletion(location=Location(key))])
            assert list(report.errors) == [None]
        found = [each.location.key async for each in connector.list(files.namespace)]
        assert found == ["a", "d/e"]


async def test_what_a_dead_process_was_writing_is_swept(files: Store, tmp_path: Path) -> None:
    incoming = tmp_path / files.namespace / ".fennflow" / "incoming"
    incoming.mkdir(parents=True)
    for name in ("old", "old#1", "new#1"):
        (incoming / name).write_text("half")
        if name.startswith("old"):
            os.utime(incoming / name, (1, 1))
    await files.uow().recover()
    assert [path.name for path in incoming.iterdir()] == ["new#1"]
    assert await files.objects() == {}
    async with files.connector() as connector:
        await connector.abort_upload(files.namespace, ".fennflow/incoming/../../a", "../../a")


@pytest.mark.parametrize("key", ["a#1", "a/b#12/c", "x" * 241])
async def test_names_that_no_local_file_can_have_are_refused(files: Store, key: str) -> None:
    with pytest.raises(KeyException, match="local"):
        async with files.uow()() as uow:
            await uow.files.put(text("1", key))


async def test_a_file_system_without_attributes_is_refused(
    files: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(ConnectorCapabilityException, match="extended attribute"):
        async with files.uow()() as uow:
            await uow.files.put(text("1", "a"))
    assert [path for path in (tmp_path / files.namespace).rglob("*") if path.is_file()] == []


async def test_what_a_reader_gets_belongs_together(files: Store) -> None:
    async with files.connector() as connector:
        numbers = range(40)

        async def write() -> None:
            for number in numbers:
                attributes = ObjectAttributes(media_type="a/b", metadata={"n": str(number)})
                await connector.put(
                    PutRequest(files.namespace, "a", attributes), str(number).encode()
                )

        await connector.put(
            PutRequest(
                files.namespace, "a", ObjectAttributes(media_type="a/b", metadata={"n": "0"})
            ),
            b"0",
        )
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(write())
            while not writing.done():
                stored, body = await connector.get(files.namespace, Location("a"))
                assert stored.metadata["n"].encode() == body


async def test_what_it_enforces_is_found_by_trying(store: Store) -> None:
    async with store.connector() as connector:
        found = await connector.capabilities(store.namespace)
    juicefs = store.server is not None and store.server.access_key == "tester"
    assert isinstance(store.config, ObstoreConnectorConfig)
    local = store.config.scheme == "file"
    expected = (
        Capabilities(keeps_directories=True, hierarchical=True)
        if juicefs
        else Capabilities(conditional_create=True, hierarchical=local, short_names=local)
    )
    assert found == expected


def test_a_process_waits_once_for_the_threads_of_obstore_when_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that ends immediately is sometimes aborted."""
    at_exit: list[tuple[object, ...]] = []
    monkeypatch.setattr(stores, "_process", [])
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    stores.check_process()
    stores.check_process()
    assert at_exit == [(time.sleep, stores.SECONDS_AT_EXIT)]
