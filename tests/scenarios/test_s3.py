"""Properties of S3: errors that say what to do, secrets, probes, suspended versioning."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import traceback
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from botocore.utils import parse_timestamp
from hypothesis import given
from hypothesis import strategies as st

from fennflow.backends import InMemoryBackendConfig, SqlalchemyBackendConfig
from fennflow.config import ConnectorConfig
from fennflow.connectors import (
    Capabilities,
    Location,
    ObjectAttributes,
    PutRequest,
    S3ConnectorConfig,
    metadata,
)
from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConfigException,
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    KeyException,
    MetadataException,
    NoSuchNamespaceException,
    ObjectChangedException,
)
from fennflow.files import BinaryContent, StreamContent, TextContent
from fennflow.testing import Fault, S3Server, strict_s3_server
from fennflow.testing.strict_s3 import Lacking
from fennflow_s3 import probe
from fennflow_s3.answers import time_of
from fennflow_s3.client import from_code, is_refusal
from fennflow_s3.probe import is_aws
from stores import (
    Store,
    blocking_client,
    make_store,
    new_bucket,
    obstore_config,
    raw_client,
    s3_config,
)

PLAIN = ObjectAttributes(media_type="text/plain")
EVERYTHING: Sequence[Lacking] = (
    *("batch deletions", "checksums", "conditional reads", "metadata", "upload clean-up"),
)
SECRET = "s3cr3t-" + "x" * 33  # of no account


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def put_one(store: Store) -> None:
    async with store.uow()() as uow:
        await uow.files.put(text("1", "a"))


async def test_a_wrong_secret_is_denied_and_shown_nowhere(
    juicefs: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = s3_config(juicefs, aws_secret_access_key=SECRET, aws_session_token=SECRET)
    with pytest.raises(AccessDeniedException, match="Check the credentials") as caught:
        await put_one(Store(config, "bucket"))
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in f"{error!r} {error}"
        error = error.__cause__
    assert SECRET not in caplog.text
    assert SECRET not in f"{config!r} {config} {config.model_dump()}"


async def test_missing_credentials_are_reported(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    config = S3ConnectorConfig(endpoint_url=moto.url, region_name="us-east-1")
    with pytest.raises(AccessDeniedException, match="aws_access_key_id"):
        await put_one(Store(config, "bucket"))
    missing = S3ConnectorConfig(endpoint_url=moto.url, profile_name="absent")
    with pytest.raises(AccessDeniedException, match="absent"):
        await put_one(Store(missing, "bucket"))


async def test_a_missing_bucket_is_named(moto: S3Server) -> None:
    with pytest.raises(NoSuchNamespaceException, match=r"no-such-bucket.*Create the bucket"):
        await put_one(Store(s3_config(moto), "no-such-bucket"))


async def test_an_underscore_that_a_server_refuses_is_explained(juicefs: S3Server) -> None:
    with pytest.raises(BaseConnectorException) as caught:
        await put_one(Store(s3_config(juicefs), "my_files"))
    assert "my_files" in str(caught.value)
    assert "underscore" in str(caught.value)


async def test_an_unreachable_server_is_reported() -> None:
    config = S3ConnectorConfig(
        endpoint_url="http://127.0.0.1:9",
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        max_attempts=1,
    )
    with pytest.raises(ConnectorUnavailableException, match="Is the server up"):
        await put_one(Store(config, "bucket"))


async def test_a_request_to_a_busy_server_is_repeated_and_reported(
    moto_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fennflow")
    server = moto_store.server
    assert server is not None
    await put_one(moto_store)
    left = [Fault.BEFORE, Fault.AFTER, Fault.CUT]
    async with moto_store.uow()() as uow:
        with server.failing(
            lambda request: left.pop() if left and request.operation == "PUT" else None
        ):
            await uow.files.put(text("2", "b"))
    assert not left
    assert "was sent more than once" in caplog.text
    assert await moto_store.objects() == {"a": b"1", "b": b"2"}


async def test_a_suspended_bucket_counts_as_one_without_versions(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("moto-suspended", request)
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"))
        assert (await uow.files.stat("a")).version_id is None
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.put(text("new", "a"), text("new", "b"))
            await uow.files.delete("a")
            raise ZeroDivisionError
    assert await store.objects() == {"a": b"old"}
    async with uow_class() as uow:
        await uow.files.put(text("new", "a"))
    assert await store.objects() == {"a": b"new"}


@pytest.mark.parametrize("kind", ["moto-suspended", "strict-suspended"])
async def test_nothing_is_left_under_the_reserved_prefix_of_a_suspended_bucket(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """No delete markers for overwrites, nor for objects that were undone."""
    store = await make_store(kind, request)
    assert store.server is not None
    uow_class = store.uow()
    for number in range(3):
        async with uow_class() as uow:
            await uow.files.put(text(str(number), "a"), text(str(number), "b"))
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.put(text("new", "a"))
            raise ZeroDivisionError
    async with uow_class() as uow:
        await uow.files.delete("b")
    async with raw_client(store.server) as client:
        listed = await client.list_object_versions(Bucket=store.namespace)
    versions, markers = listed.get("Versions", []), listed.get("DeleteMarkers", [])
    assert [each.get("Key") for each in versions] == ["a"]
    assert {each.get("Key") for each in markers} <= {"b"}  # moto makes none


async def test_versions_from_before_the_versioning_are_staged_over(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("moto", request)
    assert store.server is not None
    async with store.uow()() as uow:
        await uow.files.put(text("old", "a"))
    async with raw_client(store.server) as client:
        await client.put_bucket_versioning(
            Bucket=store.namespace, VersioningConfiguration={"Status": "Enabled"}
        )
    claimed = Store(
        s3_config(store.server, capabilities=Capabilities(conditional_create=True, versioned=True)),
        store.namespace,
        store.server,
    )
    uow_class = claimed.uow()
    async with uow_class() as uow:
        await uow.files.put(text("new", "b"))
        assert (await uow.files.stat("b")).version_id is not None


async def test_committed_versions_stay_the_users(request: pytest.FixtureRequest) -> None:
    store = await make_store("moto-versioned", request)
    uow_class = store.uow()
    for value in ("1", "2"):
        async with uow_class() as uow:
            await uow.files.put(text(value, "a"))
    async with uow_class() as uow:
        await uow.files.delete("a")
    async with store.connector() as connector:
        assert await connector.head(store.namespace, Location("a")) is None
        versions = await connector.versions(store.namespace, "a")
        bodies = [
            (await connector.get(store.namespace, version.location))[1] for version in versions
        ]
    assert bodies == [b"2", b"1"]


async def test_replaced_versions_go_where_the_user_does_not_keep_them(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("moto-versioned", request)
    uow_class = store.uow(keep_versions=False)
    for value in ("1", "2", "3"):
        async with uow_class() as uow:
            await uow.files.put(text(value, "a"), text(value, "b"))
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.put(text("4", "a"))
            raise ZeroDivisionError
    async with uow_class() as uow:
        await uow.files.delete("b")
    async with store.connector() as connector:
        [kept] = await connector.versions(store.namespace, "a")
        assert (await connector.get(store.namespace, kept.location))[1] == b"3"
        assert await connector.versions(store.namespace, "b") == []
    assert await store.objects() == {"a": b"3"}


async def test_what_moto_and_juicefs_enforce_is_found_out(
    moto_store: Store, request: pytest.FixtureRequest
) -> None:
    """P15."""
    async with moto_store.connector() as connector:
        assert await connector.capabilities(moto_store.namespace) == Capabilities(
            conditional_create=True, conditional_delete="single"
        )
    weak = await make_store("juicefs", request)
    async with weak.connector() as connector:
        assert await connector.capabilities(weak.namespace) == Capabilities(
            keeps_directories=True, hierarchical=True
        )


async def test_processes_that_probe_at_the_same_time_find_the_same(
    request: pytest.FixtureRequest,
) -> None:
    """A probe must not use another's directory, and its result is kept for a day."""
    weak = await make_store("juicefs", request)
    attributes = ObjectAttributes(media_type="text/plain", metadata={})
    async with weak.connector() as connector:
        await connector.put(
            PutRequest(weak.namespace, ".fennflow/probe/of-another", attributes), b"1"
        )
        assert await connector.capabilities(weak.namespace) == Capabilities(
            keeps_directories=True, hierarchical=True
        )


def test_amazons_endpoints_are_taken_at_their_documentation() -> None:
    assert is_aws("https://s3.eu-central-1.amazonaws.com")
    assert is_aws("https://bucket.s3.cn-north-1.amazonaws.com.cn")
    assert not is_aws("https://amazonaws.com.evil.example")
    assert not is_aws("http://localhost:9000")


@pytest.mark.parametrize(
    "values",
    [
        {"endpoint_url": "http://user:password@host"},
        {"endpoint_url": "http://host/?token=password@"},
        {"endpoint_url": "ftp://host"},
        {"multipart_part_size": 1},
        {"max_attempts": 0},
        {"aws_secret_access_key": 7},
    ],
)
def test_a_config_that_cannot_work_is_refused_without_showing_it(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigException) as caught:
        S3ConnectorConfig(**values)
    assert "password@" not in f"{caught.value} {caught.value.__cause__}"


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=60), max_size=8))
def test_metadata_of_any_unicode_survives_ascii_headers(values: dict[str, str]) -> None:
    try:
        encoded = metadata.encode(values)
    except (MetadataException, UnicodeEncodeError):
        return
    for name, value in encoded.items():
        assert f"{name}{value}".isascii()
        assert value == value.strip()
    assert metadata.decode({name.title(): value for name, value in encoded.items()}) == values


@given(st.dictionaries(st.text(max_size=9), st.text(max_size=30), max_size=4))
def test_metadata_of_others_never_fails_to_decode(values: dict[str, str]) -> None:
    metadata.decode(values)
    metadata.decode({metadata.ENCODED: "".join(values)})


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("SlowDown", 503, ConnectorUnavailableException),
        ("Whatever", 500, ConnectorUnavailableException),
        ("InternalError", 0, ConnectorUnavailableException),
        ("403", 403, AccessDeniedException),
        ("ExpiredToken", 400, AccessDeniedException),
        ("EntityTooLarge", 400, BaseConnectorException),
    ],
)
def test_codes_of_s3_become_our_exceptions(
    code: str, status: int, expected: type[BaseConnectorException]
) -> None:
    assert type(from_code(code, "", status, "put", "bucket/key")) is expected


@pytest.mark.parametrize(
    ("code", "status", "refused"),
    [
        ("SlowDown", 503, True),
        ("503", 503, False),  # a proxy's
        ("SlowDownWrite", 503, False),  # MinIO's, which may have written it on some of its disks
        ("InternalError", 500, False),
        ("502", 502, False),
        ("504", 504, False),
        ("NotImplemented", 501, True),
        ("OperationAborted", 409, True),
        ("TooManyRequests", 429, True),
        ("NoSuchUpload", 404, True),
        ("AccessDenied", 0, True),
        ("InternalError", 0, False),
    ],
)
def test_an_answer_is_a_refusal_or_leaves_open_what_happened(
    code: str, status: int, *, refused: bool
) -> None:
    """P20."""
    assert is_refusal(code, status) is refused


@pytest.mark.parametrize(
    "text",
    [
        *("2026-11-26T10:11:12Z", "2026-11-26T10:11:12.345Z", "2026-11-26T10:11:12.123456789Z"),
        *(
            "2026-11-26T10:11:12+02:00",
            "Thu, 26 Nov 2026 10:11:12 GMT",
            "Thu Nov 26 10:11:12 2026 GMT",
        ),
        *("Nov 26 2026 10:11 GMT", "1764151872", 1764151872),
    ],
)
def test_a_time_is_what_botocore_makes_of_it(text: Any) -> None:
    assert time_of(text) == parse_timestamp(text)
    assert time_of(text).tzinfo is not None


@pytest.mark.parametrize("text", ["", "Z", "x GMT", "2026-99-99T00:00:00Z", "Thu, 99 Nov 2026 GMT"])
def test_a_text_that_is_not_a_time_is_parsed_by_botocore(text: str) -> None:
    with pytest.raises(ValueError, match="Invalid timestamp"):
        parse_timestamp(text)
    with pytest.raises(ValueError, match="Invalid timestamp"):
        time_of(text)


@pytest.mark.parametrize("size", [1, 6 << 20])
@pytest.mark.parametrize("how", ["put", "copy", "stream"])
async def test_an_archive_class_is_given_at_the_last_copy(
    how: str, size: int, request: pytest.FixtureRequest
) -> None:
    """P2: staged bytes of that class could not be copied to their key."""
    store = await make_store(
        "strict", request, multipart_threshold=5 << 20, multipart_copy_threshold=5 << 20
    )
    assert store.server is not None
    extra = {"StorageClass": "DEEP_ARCHIVE"}
    body = b"2" * size
    new = BinaryContent(data=body, media_type="a/b", filename="a")
    uow_class = store.uow(lock_timeout=0.0, backend=InMemoryBackendConfig(name=store.namespace))
    async with uow_class() as uow:
        await uow.files.put(BinaryContent(data=b"1", media_type="a/b", filename="a"))
        await uow.files.put(BinaryContent(data=body, media_type="a/b", filename="source"))
    async with uow_class() as uow:
        if how == "copy":
            await uow.files.copy("source", "a", connector_extra=extra)
        elif how == "stream":
            streamed = StreamContent.from_iterable([body], filename="a", media_type="a/b")
            await uow.files.put(streamed, connector_extra=extra)
        else:
            await uow.files.put(new, connector_extra=extra)
        assert (await uow.files.get("a")).one().data == body
    async with raw_client(store.server) as client:
        head = await client.head_object(Bucket=store.namespace, Key="a")
        assert (head["StorageClass"], head["ContentLength"]) == ("DEEP_ARCHIVE", size)
    assert not await uow_class.transactions()
    async with uow_class() as uow:
        await uow.files.put(BinaryContent(data=b"3", media_type="a/b", filename="a"))
    assert (await store.objects())["a"] == b"3"


@pytest.mark.parametrize("how", ["put", "copy"])
async def test_a_class_that_the_store_refuses_is_refused_before_the_commit(
    how: str, request: pytest.FixtureRequest
) -> None:
    """P2: the copy to the key, the only request with the class, could never succeed."""
    store = await make_store("moto", request)
    uow_class = store.uow(lock_timeout=0.0, backend=InMemoryBackendConfig(name=store.namespace))
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"), text("2", "b"))
    async with uow_class() as uow:
        for _ in range(2):
            with pytest.raises(BaseConnectorException, match="InvalidStorageClass") as raised:
                if how == "copy":
                    await uow.files.copy("b", "a", connector_extra={"StorageClass": "NONE"})
                else:
                    await uow.files.put(text("3", "a"), connector_extra={"StorageClass": "NONE"})
            assert "a trial of StorageClass" in raised.value.__notes__[-1]
    assert not await uow_class.transactions()
    assert await store.objects() == {"a": b"1", "b": b"2"}


async def test_slow_downloads_leave_connections_to_other_requests(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A download without a free connection gives up with an error that says so."""
    monkeypatch.setattr("fennflow_s3.downloads.WAIT", 0.05)
    monkeypatch.setattr("fennflow.engine.streaming.FIRST_PAUSE", 0.01)
    store = await make_store("strict", request, max_pool_connections=2)
    uow_class = store.uow()
    large = BinaryContent(data=b"x" * (8 << 20), media_type="a/b", filename="large")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(uow_class.lifespan())
        async with uow_class() as uow:
            await uow.files.put(large)
        for _ in range(2):
            reader = await stack.enter_async_context(uow_class())
            stream = await stack.enter_async_context(reader.files.open("large"))
            await anext(aiter(stream))
        async with asyncio.timeout(30), uow_class() as uow:
            await uow.files.put(BinaryContent(data=b"1", media_type="a/b", filename="small"))
        with pytest.raises(ConnectorUnavailableException, match="2 downloads are open"):
            async with uow_class() as uow, uow.files.open("large") as stream:
                await anext(aiter(stream))
    assert "2 are open" in caplog.text


@pytest.mark.parametrize("kind", ["moto", "moto-versioned"])
async def test_options_of_s3_are_kept_across_the_copy_of_apply(
    kind: str, request: pytest.FixtureRequest
) -> None:
    store = await make_store(kind, request, multipart_threshold=5 << 20)
    assert store.server is not None
    extra = {
        "CacheControl": "max-age=60",
        "StorageClass": "STANDARD_IA",
        "ServerSideEncryption": "AES256",
        "Tagging": "team=a",
    }
    uow_class = store.uow()
    for body in (b"1", b"2", b"3" * (6 << 20)):
        async with uow_class() as uow:
            await uow.files.put(
                BinaryContent(data=body, media_type="a/b", filename="a"), connector_extra=extra
            )
        async with raw_client(store.server) as client:
            head = await client.head_object(Bucket=store.namespace, Key="a")
            tags = await client.get_object_tagging(Bucket=store.namespace, Key="a")
        assert head["ContentLength"] == len(body)
        assert head["CacheControl"] == "max-age=60"
        assert head.get("StorageClass") == "STANDARD_IA"
        assert head.get("ServerSideEncryption") == "AES256"
        assert tags["TagSet"] == [{"Key": "team", "Value": "a"}]


@pytest.mark.parametrize(
    "extra", [{"SSECustomerKey": "x"}, {"CacheControll": "x"}, {"Expires": object()}]
)
async def test_an_option_that_s3_does_not_know_is_refused_before_any_request(
    moto_store: Store, extra: dict[str, object]
) -> None:
    assert moto_store.server is not None
    with moto_store.server.watched() as seen:
        async with moto_store.uow()() as uow:
            with pytest.raises(ConnectorCapabilityException, match=next(iter(extra))):
                await uow.files.create(text("1", "a"), connector_extra=extra)
    assert seen == []


async def test_what_was_probed_is_known_to_the_next_process(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """P15: kept in a durable backend's catalog, for a day and for this endpoint."""
    store = await make_store("juicefs", request, capabilities=None)
    backend = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/fennflow.db")
    probes: list[str] = []

    async def probed(client: Any, bucket: str, prefix: str) -> Capabilities:
        probes.append(bucket)
        return await original(client, bucket, prefix)

    original = probe.probe
    request.getfixturevalue("monkeypatch").setattr("fennflow_s3.connector.probe", probed)

    async def put(name: str) -> None:
        uow_class = store.uow(backend=backend)
        async with uow_class.lifespan(), uow_class() as uow:
            await uow.files.put(text("1", name))

    await put("a/b/c")
    await put("d")
    assert probes == [store.namespace]
    uow_class = store.uow(backend=backend)
    async with uow_class.lifespan(), uow_class() as uow:
        await uow.files.delete("a/b/c")
    assert set(await store.objects()) == {"d"}  # it is still known that directories are kept
    with closing(sqlite3.connect(tmp_path / "fennflow.journal.db")) as journal:
        age = "UPDATE fennflow_journal_meta SET value = '0' || substr(value, 2)"
        journal.execute(f"{age} WHERE name LIKE 'probe:%'")
        journal.commit()
    await put("e")
    assert probes == [store.namespace] * 2
    assert store.server is not None
    elsewhere = store.server.url.replace("127.0.0.1", "localhost")
    store.config = store.config.model_copy(update={"endpoint_url": elsewhere})
    await put("f")
    assert probes == [store.namespace] * 3


async def test_an_upload_for_a_key_that_xml_cannot_hold_does_not_stop_clean_up(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("strict", request)
    assert store.server is not None
    keys = [".fennflow/\x01", ".fennflow/a +%41&<", ".fennflow/é"]
    async with raw_client(store.server) as client:
        for key in keys:
            await client.create_multipart_upload(Bucket=store.namespace, Key=key)
    async with store.connector() as connector:
        found = [each.key async for each in connector.uploads(store.namespace, ".fennflow/")]
    assert sorted(found) == sorted(keys)
    uow_class = store.uow(backend=InMemoryBackendConfig(name=store.namespace))
    assert (await uow_class.recover()).problems == ()


async def test_an_object_that_cannot_be_read_keeps_no_connection(moto: S3Server) -> None:
    """Otherwise repeated reads of it would use up all connections: its body is longer than the buffers."""
    bucket = await new_bucket(moto)
    client = blocking_client(moto.url, moto.access_key, moto.secret_key)
    params = {"Bucket": bucket, "Key": "a"}
    url = client.generate_presigned_url("put_object", Params=params)
    headers = {"Content-Type": "", "Cache-Control": "\xff"}
    request = Request(url, data=bytes(4 << 20), method="PUT", headers=headers)
    (await asyncio.to_thread(urlopen, request)).close()
    store = Store(s3_config(moto, max_pool_connections=1), bucket, moto)
    kept: list[BaseConnectorException] = []
    async with store.connector() as connector, asyncio.timeout(60):
        for _ in range(4):
            with pytest.raises(BaseConnectorException, match="has stored a header") as caught:
                await connector.get(bucket, Location("a"))
            kept.append(caught.value)


@pytest.mark.parametrize("host", ["under_score..a", "a b", "ann:Pl4in@h"])
async def test_an_endpoint_of_the_environment_that_cannot_be_used_is_an_error_of_ours(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
    store = Store(s3_config(S3Server(url="http://h"), endpoint_url=None), "bucket")
    with pytest.raises(ConfigException) as caught:
        async with store.uow()() as uow:
            await uow.files.list()
    assert "Pl4in" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("make", [s3_config, obstore_config])
@pytest.mark.parametrize(
    "lacking",
    [
        ("batch deletions",),
        ("checksums",),
        ("conditional reads",),
        ("metadata",),
        ("upload clean-up",),
        EVERYTHING,
    ],
)
async def test_a_server_that_lacks_something_is_used_as_it_is(
    make: Callable[..., ConnectorConfig], lacking: Sequence[Lacking]
) -> None:
    with strict_s3_server(without=lacking) as server:
        config = make(server, max_attempts=1)
        store = Store(config, await new_bucket(server), server)
        uow_class = store.uow()
        async with uow_class() as uow:
            await uow.files.put(text("1", "a"), text("1", "b"), text("1", "c"))
        async with uow_class() as uow:
            await uow.files.put(text("2", "a"))
            await uow.files.delete("b", "c")
        with pytest.raises(ZeroDivisionError):
            async with uow_class() as uow:
                await uow.files.put(text("3", "a"), text("3", "d"))
                await uow.files.copy("a", "e")
                raise ZeroDivisionError
        async with store.connector() as connector:
            await connector.put(PutRequest(store.namespace, "a", PLAIN), b"other")
        async with uow_class() as uow:
            with pytest.raises(ObjectChangedException):
                await uow.files.get("a")
        await uow_class.recover()
        assert await store.objects() == {"a": b"other"}


async def test_an_upload_that_no_server_can_abort_holds_no_lock() -> None:
    with strict_s3_server(without=["upload clean-up"]) as server:
        config = s3_config(server, multipart_threshold=5 << 20)
        store = Store(config, await new_bucket(server), server)
        uow_class = store.uow(lock_timeout=0.0)
        with pytest.raises(ZeroDivisionError):
            async with uow_class() as uow:
                await uow.files.put(text("1" * (6 << 20), "a"))
                raise ZeroDivisionError
        async with uow_class() as uow:
            await uow.files.put(text("2", "a"))
        assert await store.objects() == {"a": b"2"}


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({"Filter": {"Prefix": ""}, "Expiration": {"Days": 30}}, True),
        (
            {
                "Filter": {"Prefix": ".fenn"},
                "Transitions": [{"Days": 1, "StorageClass": "GLACIER"}],
            },
            True,
        ),
        ({"Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 30}}, False),
        (
            {"Filter": {"Prefix": ""}, "NoncurrentVersionExpiration": {"NoncurrentDays": 9}},
            False,
        ),
        (
            {
                "Filter": {"Prefix": ""},
                "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
            },
            False,
        ),
        ({"Filter": {"Prefix": ""}, "Expiration": {"Days": 30}, "Status": "Disabled"}, False),
    ],
)
async def test_the_doctor_names_rules_that_delete_what_fennflow_keeps(
    rule: Any,
    named: bool,  # noqa: FBT001 - a parameter
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("moto", request)
    assert store.server is not None
    rules: Any = {"Rules": [{"ID": "tidy", "Status": "Enabled", **rule}]}
    async with raw_client(store.server) as client:
        await client.put_bucket_lifecycle_configuration(
            Bucket=store.namespace, LifecycleConfiguration=rules
        )
    diagnosis = await store.uow().diagnose()
    assert any("tidy" in each for each in diagnosis.problems) is named
    aborts = any("No lifecycle rule" in each for each in diagnosis.advice)
    assert aborts is ("AbortIncompleteMultipartUpload" not in rule)


@pytest.mark.parametrize(
    ("kind", "fault", "said"),
    [
        ("moto", None, "No lifecycle rule"),
        ("moto", Fault.DENIED, "cannot be read: AccessDeniedException"),
        ("strict", None, "cannot be read: ConnectorCapabilityException"),
    ],
)
async def test_the_doctor_says_if_there_are_no_rules_or_it_cannot_read_them(
    kind: str, fault: Fault | None, said: str, request: pytest.FixtureRequest
) -> None:
    store = await make_store(kind, request)
    assert store.server is not None
    with store.server.failing(lambda each: fault if "lifecycle" in each.query else None):
        diagnosis = await store.uow().diagnose()
    assert diagnosis.problems == ()
    assert [each for each in diagnosis.advice if said in each]


async def test_names_that_a_server_cannot_keep_are_refused_before_anything_is_journaled(
    moto: S3Server,
) -> None:
    """SeaweedFS has no directories for users, and keeps names like a file system."""
    claims = Capabilities(conditional_create=True, short_names=True)
    store = Store(s3_config(moto, capabilities=claims), await new_bucket(moto), moto)
    uow_class = store.uow(hide_pending=True)
    async with uow_class() as uow:
        with pytest.raises(KeyException, match="at most 255"):
            await uow.files.put(text("1", "a/" + "x" * 256))
        await uow.files.put(text("1", "a/" + "x" * 255))
    assert list(await store.objects()) == ["a/" + "x" * 255]
