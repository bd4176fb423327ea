"""The first attempt of a request on S3 is the same as botocore's, and so are the following ones."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiobotocore.awsrequest import AioAWSResponse
from aiobotocore.config import AioConfig
from aiohttp.http_exceptions import HttpProcessingError, InvalidHeader
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
)

from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConnectorUnavailableException,
)
from fennflow_s3 import S3ConnectorConfig
from fennflow_s3.client import client_context, translated
from fennflow_s3.first_attempt import EXPECT_FROM
from fennflow_s3.options import FOR_PUT, SWITCHES, TIMES

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""
NOW = datetime(2026, 11, 27, 12, 0, 0, tzinfo=UTC)
ENDPOINTS = [
    "http://localhost:9000",
    "http://[::1]:9000",
    "http://127.0.0.1:80",
    "https://s3.example.org",
    "https://s3.example.org/behind/a/prefix",
    "https://s3.example.org:8443/slash/",
    None,
]
BUCKETS = ["bucket", "with.dots.in-it"]
KEYS = [
    "plain.txt",
    "a b+c&d=e?f#g%20h",
    "//two/./../slashes//",
    "/first",
    "ünï/日本語/🙂",
    "~tilde*star'quote(paren)",
    "..",
    "line\nfeed\rreturn\x01",
    "x" * 1024,
]


class Raw:
    """A response of aiohttp."""

    def __init__(self, headers: Mapping[str, str], body: bytes) -> None:
        self.raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.content = asyncio.StreamReader()
        self.content.feed_data(body)
        self.content.feed_eof()
        self.url = "http://localhost"
        self.closed = False

    async def read(self) -> bytes:
        return await self.content.read()

    def close(self) -> None:
        self.closed = True


@dataclass
class Pool:
    """Answers requests as configured, and keeps them."""

    answers: list[Any] = field(default_factory=list[Any])
    requests: list[Any] = field(default_factory=list[Any])
    raw: list[Raw] = field(default_factory=list[Raw])

    async def send(self, request: Any) -> AioAWSResponse:
        self.requests.append(request)
        nothing: Answer = (200, {}, b"")
        answer: Any = self.answers.pop(0) if self.answers else nothing
        if isinstance(answer, Exception):
            raise answer
        status, headers, body = cast("Answer", answer)
        self.raw.append(Raw(headers, body))
        lower: Any = {name.lower(): value for name, value in headers.items()}
        return AioAWSResponse(request.url, status, lower, self.raw[-1])

    def sent(self) -> list[Any]:
        """Return what a server would see of the requests, apart from what is not signed."""
        return [
            (
                each.method,
                each.url,
                {
                    name.lower(): value.decode() if isinstance(value, bytes) else value
                    for name, value in each.headers.items()
                    if name.lower() not in {"user-agent", "expect"}
                    and not name.lower().startswith("amz-sdk-")
                },
                body_of(each),
            )
            for each in self.requests
        ]


def body_of(request: Any) -> bytes:
    body = request.body
    return b"" if body is None else body.read() if hasattr(body, "read") else bytes(body)


@asynccontextmanager
async def opened(
    *, plain: bool = False, answers: list[Any] | None = None, **changes: Any
) -> AsyncGenerator[tuple[Any, Pool]]:
    """Open a client on a pool that answers as configured; a plain one makes no first attempts."""
    values: dict[str, Any] = {
        "region_name": "eu-central-1",
        "endpoint_url": "http://localhost:9000",
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "max_attempts": 2,
    }
    async with client_context(S3ConnectorConfig(**{**values, **changes})) as client:
        parts: Any = client
        pool = Pool(answers or [])
        own = parts._endpoint.http_session
        parts._endpoint.http_session = pool
        parts._endpoint._sleep = no_sleep
        if plain:
            parts._find_route = no_route
        try:
            yield client, pool
        finally:
            parts._endpoint.http_session = own


async def no_sleep(_seconds: float) -> None:
    """Wait for nothing."""


async def no_route(*_arguments: Any) -> None:
    """Find none."""


@pytest.fixture(autouse=True)
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: NOW)


def options_of_each_kind() -> dict[str, Any]:
    values: dict[str, Any] = {name: f"value of {name}" for name in FOR_PUT}
    return values | dict.fromkeys(SWITCHES, True) | dict.fromkeys(TIMES, "2030-01-02T03:04:05Z")


def calls(bucket: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Return a call of each operation with all parameters that the connector may give it."""
    named = {"Bucket": bucket, "Key": key}
    source = {"CopySource": {**named, "VersionId": "v+1/2"}, "CopySourceIfMatch": '"e"'}
    described = {
        "ContentType": "text/plain",
        "Metadata": {"fennflow_seq": "1", "other": " two  spaces "},
    }
    digest = base64.b64encode(hashlib.sha256(b"body").digest()).decode()
    return [
        ("put_object", {**named, **described, "Body": b"body", "ChecksumSHA256": digest}),
        (
            "put_object",
            {**named, **described, **options_of_each_kind(), "Body": b"", "IfNoneMatch": "*"},
        ),
        ("put_object", {**named, "Body": b"1"}),
        ("get_object", {**named}),
        ("get_object", {**named, "VersionId": "a&b", "IfMatch": '"e"', "Range": "bytes=3-"}),
        ("head_object", {**named}),
        ("head_object", {**named, "VersionId": "null"}),
        ("delete_object", {**named, "IfMatch": '"e"'}),
        ("delete_object", {**named, "VersionId": "v"}),
        ("copy_object", {**named, "CopySource": named}),
        (
            "copy_object",
            {
                **named,
                **source,
                **described,
                **options_of_each_kind(),
                "IfMatch": '"other"',
                "MetadataDirective": "REPLACE",
                "TaggingDirective": "REPLACE",
            },
        ),
        (
            "delete_objects",
            {
                "Bucket": bucket,
                "Delete": {
                    "Quiet": True,
                    "Objects": [{"Key": key}, {"Key": "<&>", "VersionId": "v", "ETag": '"e"'}],
                },
            },
        ),
    ]


SUCCESSES: dict[str, Answer] = {
    "copy_object": (
        200,
        {"x-amz-version-id": "v"},
        (
            b'<?xml version="1.0"?>\n<CopyObjectResult xmlns="x"><ETag>"e"</ETag>'
            b"<LastModified>2026-11-26T00:00:00.000Z</LastModified></CopyObjectResult>"
        ),
    ),
    "delete_object": (204, {"x-amz-delete-marker": "true"}, b""),
    "delete_objects": (
        200,
        {},
        b"<DeleteResult><Error><Key>a&#xA;b</Key><Code>AccessDenied</Code></Error></DeleteResult>",
    ),
    "head_object": (200, {"Content-Length": "7", "ETag": '"e"'}, b""),
    "put_object": (200, {"ETag": '"e"', "x-amz-version-id": "v", "x-amz-request-id": "r"}, b""),
    "get_object": (
        206,
        {
            "Content-Length": "4",
            "Content-Range": "bytes 3-6/7",
            "Content-Type": "text/plain",
            "ETag": '"e"',
            "Expires": "never",
            "Last-Modified": "Thu, 26 Nov 2026 00:00:00 GMT",
            "X-Amz-Meta-Fennflow_Seq": "1",
            "x-amz-missing-meta": "3",
        },
        b"body",
    ),
}


async def outcome(client: Any, method: str, params: Mapping[str, Any]) -> Any:
    """Return what a call returns, with its body read, or the error it raises."""
    try:
        answer = await getattr(client, method)(**params)
    except ClientError as error:
        return (type(error).__name__, error.response)
    if "Body" in answer:
        async with answer["Body"] as body:
            answer["Body"] = await body.read()
    return answer


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=str)
async def test_the_first_attempt_is_the_request_that_botocore_would_send(
    endpoint: str | None,
) -> None:
    for bucket in BUCKETS:
        async with (
            opened(endpoint_url=endpoint, aws_session_token="token") as (client, pool),
            opened(endpoint_url=endpoint, aws_session_token="token", plain=True) as (plain, other),
        ):
            # Where a key stands in the path does not depend on the endpoint.
            for key in KEYS if endpoint is None else KEYS[2:3]:
                for method, params in calls(bucket, key):
                    pool.requests.clear()
                    other.requests.clear()
                    pool.answers = [SUCCESSES[method]]
                    other.answers = [SUCCESSES[method]]

                    mine = await outcome(client, method, params)
                    theirs = await outcome(plain, method, params)

                    assert pool.sent() == other.sent(), (method, key)
                    assert mine == theirs, method
                    assert (
                        "amz-sdk-request" not in pool.requests[0].headers
                    )  # no layer of botocore's


@pytest.mark.parametrize("style", ["path", "virtual"])
async def test_buckets_are_named_as_the_config_says(style: str) -> None:
    async with (
        opened(addressing_style=style) as (client, pool),
        opened(addressing_style=style, plain=True) as (plain, other),
    ):
        for each in (client, plain):
            await each.put_object(Bucket="bucket", Key="a b", Body=b"1")

        assert pool.sent() == other.sent()
        start = {
            "path": "http://localhost:9000/bucket/",
            "virtual": "http://bucket.localhost:9000/",
        }
        assert pool.requests[0].url.startswith(start[style])


ANSWERS: list[list[Answer | Exception]] = [
    [(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")],
    [(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")],
    [(503, {}, b"<Error><Code>SlowDown</Code></Error>"), SUCCESSES["copy_object"]],
    [(500, {}, b""), (500, {}, b"")],
    [(200, {}, b"<Error><Code>InternalError</Code></Error>"), SUCCESSES["copy_object"]],
    [(200, {}, b'<?xml version="1.0"?><Error><Code>SlowDown</Code></Error>')] * 2,
    [(200, {}, b"<CopyObjectResult><ETag>cut o"), SUCCESSES["copy_object"]],
    [(200, {}, b"")],
    [(403, {}, b"<Error><Code>RequestTimeTooSkewed</Code></Error>")],
    [(400, {}, b"<Error><Code>ExpiredToken</Code></Error>")],
    [(400, {}, b"<html>a proxy says no</html>")],
    [ConnectionClosedError(endpoint_url="x"), SUCCESSES["copy_object"]],
    [EndpointConnectionError(endpoint_url="x", error=aiohttp.ClientError())] * 2,
]


@pytest.mark.parametrize("answers", ANSWERS, ids=str)
async def test_an_answer_that_is_not_a_plain_success_is_handled_by_botocore(
    answers: list[Any],
) -> None:
    async with (
        opened(answers=list(answers)) as (client, pool),
        opened(answers=list(answers), plain=True) as (plain, other),
    ):
        ends: list[Any] = []
        for each in (client, plain):
            lost = None
            try:
                with translated("copy", "it", writes=True) as attempts:
                    method, params = "copy_object", {"CopySource": {"Bucket": "bucket", "Key": "k"}}
                    end = await getattr(each, method)(Bucket="bucket", Key="key", **params)
                    lost = attempts.lost
            except Exception as error:  # noqa: BLE001 - compared
                end = (type(error), str(error), vars(error))
            ends.append((end, lost))

    assert ends[0] == ends[1]
    assert len(pool.requests) == len(other.requests) == len(answers)
    assert not pool.answers


async def test_a_bucket_in_another_region_is_found_once() -> None:
    moved = (
        301,
        {"x-amz-bucket-region": "us-west-2"},
        b"<Error><Code>PermanentRedirect</Code></Error>",
    )
    async with opened(endpoint_url=None, answers=[moved]) as (client, pool):
        for _ in range(3):
            await client.put_object(Bucket="bucket", Key="key", Body=b"1")

    hosts = [each.url.split("/")[2] for each in pool.requests]
    assert hosts[0] == "bucket.s3.eu-central-1.amazonaws.com"
    assert set(hosts[1:]) == {"bucket.s3.us-west-2.amazonaws.com"}
    assert len(hosts) == 4
    assert "/us-west-2/s3/" in pool.requests[-1].headers["Authorization"]


async def test_each_request_is_signed_with_the_credentials_of_that_moment() -> None:
    async with opened() as (client, pool):
        for key, secret, token in (("one", "1", "a"), ("two", "2", "b"), ("two", "3", None)):
            credentials = client._request_signer._credentials
            credentials.access_key, credentials.secret_key = key, secret
            credentials.token = token
            await client.get_object(Bucket="bucket", Key="key")

    signatures = [each.headers["Authorization"] for each in pool.requests]
    assert [each.split("=")[1].split("/")[0] for each in signatures] == ["one", "two", "two"]
    assert len({each.rpartition("=")[2] for each in signatures}) == 3
    assert [each.headers.get("X-Amz-Security-Token") for each in pool.requests] == ["a", "b", None]


@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        (ConnectionClosedError(endpoint_url="x"), True),
        ((500, {}, b""), True),
        ((200, {}, b"cut o"), True),
        ((403, {}, b"<Error><Code>AccessDenied</Code></Error>"), False),
    ],
    ids=["no answer", "500", "half an answer", "a refusal"],
)
async def test_an_attempt_counts_though_there_are_no_credentials_for_the_next_one(
    answer: Any,
    lost: bool,  # noqa: FBT001 - a parameter
) -> None:
    async with opened(answers=[answer]) as (client, pool):
        credentials = client._request_signer._credentials
        frozen, asked = await credentials.get_frozen_credentials(), []

        async def get_frozen_credentials() -> Any:
            asked.append(1)
            if len(asked) > 1:
                raise CredentialRetrievalError(provider="p", error_msg="gone")
            return frozen

        credentials.get_frozen_credentials = get_frozen_credentials
        with (
            pytest.raises(AccessDeniedException) as caught,
            translated("put", "it", writes=True),
        ):
            await client.put_object(Bucket="bucket", Key="key", Body=b"1")

    assert len(pool.requests) == 1
    assert caught.value.retried is lost


async def test_successes_give_back_what_retries_have_cost() -> None:
    failure: Answer = (500, {}, b"")
    async with opened() as (client, pool):
        for _ in range(100):
            pool.answers = [failure, failure]
            with pytest.raises(ClientError):
                await client.put_object(Bucket="bucket", Key="key", Body=b"1")
        pool.answers, pool.requests = [failure], []
        with pytest.raises(ClientError):
            await client.put_object(Bucket="bucket", Key="key", Body=b"1")
        assert len(pool.requests) == 1  # the quota of retries is used up

        for _ in range(5):
            await client.put_object(Bucket="bucket", Key="key", Body=b"1")
        pool.answers, pool.requests = [failure], []
        await client.put_object(Bucket="bucket", Key="key", Body=b"1")
        assert len(pool.requests) == 2


def not_utf_8() -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


def with_nul() -> aiohttp.ClientResponseError:
    seen: Any = SimpleNamespace(real_url="http://localhost")
    error = aiohttp.ClientResponseError(seen, ())
    error.__cause__ = HttpProcessingError()
    error.__cause__.__cause__ = InvalidHeader(b"1\0")
    return error


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("operation", ["get_object", "head_object"])
@pytest.mark.parametrize("unreadable", [not_utf_8, with_nul])
async def test_what_no_client_can_read_is_asked_for_once(
    unreadable: Callable[[], Exception],
    operation: str,
    plain: bool,  # noqa: FBT001 - a parameter
) -> None:
    """Any uploader can store such a header; retries are only for unreachable servers."""
    answers = [HTTPClientError(error=unreadable())]
    async with opened(plain=plain, answers=answers) as (client, pool):
        with (
            pytest.raises(BaseConnectorException, match="has stored a header") as caught,
            translated("read", "it"),
        ):
            await getattr(client, operation)(Bucket="bucket", Key="key")

    assert not isinstance(caught.value, ConnectorUnavailableException)
    assert len(pool.requests) == 1


@pytest.mark.parametrize(
    ("bucket", "params", "changes"),
    [
        ("arn:aws:s3:eu-central-1:123456789012:accesspoint/point", {}, {"endpoint_url": None}),
        ("bucket", {"SSECustomerKey": "0" * 32, "SSECustomerAlgorithm": "AES256"}, {}),
        ("bucket", {}, {"request_checksum_calculation": "when_supported"}),
        ("bucket", {}, {"response_checksum_validation": "when_supported"}),
        ("bucket", {}, {"aiobotocore_config": AioConfig(retries={"mode": "adaptive"})}),
        ("bucket", {}, {"aiobotocore_config": AioConfig(signature_version="s3")}),
    ],
    ids=["access point", "SSE-C", "checksums", "validation", "retries", "signature"],
)
async def test_what_needs_more_than_a_signature_is_left_to_botocore(
    bucket: str, params: dict[str, Any], changes: dict[str, Any]
) -> None:
    async with opened(**changes) as (client, pool):
        await client.put_object(Bucket=bucket, Key="key", Body=b"1", **params)

    assert "amz-sdk-request" in pool.requests[0].headers


async def test_only_large_bodies_wait_for_the_server_to_want_them() -> None:
    async with opened() as (client, pool):
        for size in (0, 1, EXPECT_FROM - 1, EXPECT_FROM):
            await client.put_object(Bucket="bucket", Key="key", Body=b"1" * size)

    assert [each.headers.get("Expect") for each in pool.requests] == [
        None,
        None,
        None,
        "100-continue",
    ]
