"""The first attempt of a request on an object, without most layers of a botocore client.

For each request a client emits a dozen events, resolves the endpoint, and looks in the answer for
every possible member. That is most of the cost of a request, and the same work each time. So this
module makes the first attempt from botocore's own parts: its serializer, signer and parser, and the
client's credentials and connection pool.

Any answer except a plain success is passed to the client, as the answer to its own first attempt.
So botocore alone handles retries, redirects and errors, as if this module did not exist
(`docs/design/008-requests-on-s3.md`).
"""

# ruff: noqa: SLF001 - botocore has no public names for the parts of a client

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiobotocore.client import AioBaseClient
from aiobotocore.parsers import AioResponseParserFactory
from aiobotocore.response import StreamingBody
from botocore.auth import SIGNED_HEADERS_BLACKLIST, S3SigV4Auth
from botocore.awsrequest import prepare_request_dict
from botocore.exceptions import HTTPClientError
from botocore.handlers import (
    add_recursion_detection_header,
    escape_xml_payload,
    handle_copy_source_param,
    handle_expires_header,
)
from botocore.parsers import ResponseParserError
from botocore.utils import ArnParser, parse_timestamp
from multidict import CIMultiDict
from typing_extensions import override

from fennflow_s3 import options
from fennflow_s3.body import Body

if TYPE_CHECKING:
    from collections.abc import Mapping

    from botocore.model import OperationModel

EXPECT_FROM = 1 << 20
"""The size in bytes from which on the server is asked first whether it accepts the body (`Expect:
100-continue`): one more round trip, which saves sending a body that is refused."""
MOST_ROUTES = 1000

_OPERATIONS = frozenset(
    {"CopyObject", "DeleteObject", "DeleteObjects", "GetObject", "HeadObject", "PutObject"}
)
_PARAMETERS = options.FOR_PUT | {
    "Body",
    "Bucket",
    "ChecksumSHA256",
    "ContentType",
    "CopySource",
    "CopySourceIfMatch",
    "Delete",
    "IfMatch",
    "IfNoneMatch",
    "Key",
    "Metadata",
    "MetadataDirective",
    "Range",
    "TaggingDirective",
    "VersionId",
}
"""Operations that need only the serializer; for others the client has handlers."""
_SAYS_NOTHING_OF_THE_ENDPOINT = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED})
"""After other answers the client may have found that a bucket is in another region."""
_WITHOUT_BODY = frozenset({"GET", "HEAD"})
_NOTHING = re.compile(rb"\Z")
_XML = {
    name: re.compile(rb"\s*(<\?xml[^>]*\?>\s*)?<%s\b" % root)
    for name, root in (("CopyObject", b"CopyObjectResult"), ("DeleteObjects", b"DeleteResult"))
}
"""The beginning of a successful body, since S3 sends errors with status 200, too."""


@dataclass(slots=True, repr=False)
class _Request:
    """A request as botocore's signer and the pool need it; its headers contain secrets."""

    method: str
    url: str
    headers: CIMultiDict[str]
    body: Any
    context: dict[str, Any]
    stream_output: bool
    params: None = None
    signed: _SignedHeaders | None = None


class _SignedHeaders(dict[str, str]):
    """Headers by lower-case name; each has one value."""

    def get_all(self, name: str) -> list[str]:
        return [self[name]]


class _Signer(S3SigV4Auth):
    """Signs requests to one host, as botocore does.

    It derives the signing key once a day, and collects the headers of a request once.

    Args:
        service: that the signature names.
        region: that the signature names.
    """

    def __init__(self, service: str, region: str) -> None:
        none_yet: Any = None
        super().__init__(none_yet, service, region)
        self._host = ""
        self._scope = (region, service, "aws4_request")
        self._derived_from: tuple[str | None, str] = ("", "")
        self._key = b""

    def sign(self, request: _Request, credentials: Any) -> None:
        """Sign a request with credentials, which may differ each time."""
        self.credentials = credentials
        to_sign: Any = request
        self.add_auth(to_sign)

    @override
    def headers_to_sign(self, request: Any) -> Any:
        if request.signed is None:
            if not self._host:
                self._host = super().headers_to_sign(request)["host"]
            request.signed = _SignedHeaders(host=self._host)
            for name, value in request.headers.items():
                lower = name.lower()
                if lower not in SIGNED_HEADERS_BLACKLIST:
                    request.signed[lower] = value
        return request.signed

    @override
    def signature(self, string_to_sign: str, request: Any) -> str:
        derived_from = (self.credentials.secret_key, request.context["timestamp"][:8])
        if derived_from != self._derived_from:
            secret, day = derived_from
            key = f"AWS4{secret}".encode()
            for part in (day, *self._scope):
                key = hmac.digest(key, part.encode(), "sha256")
            self._derived_from, self._key = derived_from, key
        return hmac.digest(self._key, string_to_sign.encode(), "sha256").hex()


@dataclass(frozen=True, slots=True)
class _Route:
    """The URL for one operation on one bucket, and how its requests are signed.

    Args:
        operation: the operation in botocore's model, with the bucket removed from its path.
        url: the URL of the endpoint, including the bucket.
        headers: the headers that the endpoint requires.
        context: the client's settings for the signer.
        signer: for this endpoint and its region.
    """

    operation: Any
    url: str
    headers: Mapping[str, str]
    context: Mapping[str, Any]
    signer: _Signer


def content_md5(body: bytes) -> str:
    """Return the MD5 of a batch of deletions, which S3 requires and every server accepts."""
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _parse_timestamp(value: Any) -> datetime:
    """Parse the time of a header or an element; botocore's own parser takes twenty times as long."""
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            when = parse(value)
        except (TypeError, ValueError):
            continue
        if when.tzinfo is not None:
            return when
    return parse_timestamp(value)


_answered: ContextVar[list[Any] | None] = ContextVar("_answered", default=None)


def answer_to_first_attempt(**_kwargs: Any) -> Any:
    """Return the answer to the client's first attempt, in place of sending it.

    Raises:
        Exception: the exception of an attempt without an answer.
    """
    answers = _answered.get()
    if not answers:
        return None
    answer = answers.pop()
    if isinstance(answer, Exception):
        raise answer
    return answer


class FirstAttempts(AioBaseClient):
    """A client that makes the first attempt of requests on objects without its layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The stubs hide the parts of a client.
        self._parts: Any = self
        parsers: Any = AioResponseParserFactory()
        parsers.set_parser_defaults(timestamp_parser=_parse_timestamp)
        self._parser: Any = parsers.create_parser("rest-xml")
        self._routes: dict[tuple[str, str], _Route | None] = {}

    async def _make_api_call(self, operation_name: str, api_params: dict[str, Any]) -> Any:
        client: Any = super()
        route = None
        if operation_name in _OPERATIONS and api_params.keys() <= _PARAMETERS:
            route = await self._route(operation_name, api_params)
        if route is None:
            return await client._make_api_call(operation_name, api_params)
        success, answer = await self._first_answer(route, api_params)
        if success is not None:
            return success
        if getattr(answer, "status_code", 0) not in _SAYS_NOTHING_OF_THE_ENDPOINT:
            self._routes.pop((operation_name, api_params["Bucket"]), None)
        answers = [answer]
        token = _answered.set(answers)
        try:
            return await client._make_api_call(operation_name, api_params)
        except Exception:
            if answers:  # not consumed, for instance because there were no credentials
                await self._report(operation_name, answer)
            raise
        finally:
            _answered.reset(token)

    async def _report(self, operation_name: str, answer: Any) -> None:
        """Report an attempt to the counters, since the client did not get its answer."""
        status = getattr(answer, "status_code", 0)
        refused = status >= HTTPStatus.MULTIPLE_CHOICES
        parsed: dict[str, Any] = {"ResponseMetadata": {"HTTPStatusCode": status}}
        exception = answer if isinstance(answer, Exception) else HTTPClientError(error=status)
        await self._parts.meta.events.emit(
            f"response-received.s3.{operation_name}",
            response_dict=None,
            parsed_response=parsed if refused else None,
            context={},
            exception=None if refused else exception,
        )

    async def _route(self, operation_name: str, api_params: dict[str, Any]) -> _Route | None:
        name = (operation_name, api_params["Bucket"])
        if name not in self._routes:
            route = await self._find_route(operation_name, api_params)
            if len(self._routes) >= MOST_ROUTES:
                self._routes.clear()
            self._routes[name] = route
        return self._routes[name]

    async def _find_route(self, operation_name: str, api_params: dict[str, Any]) -> _Route | None:
        """Determine where the client sends such a request; None if it needs special treatment."""
        client, config = self._parts, self._parts.meta.config
        if (
            client._request_signer._credentials is None
            or config.auth_scheme_preference
            or config.request_checksum_calculation != "when_required"
            or config.response_checksum_validation != "when_required"
            or config.retries["mode"] == "adaptive"
            or ArnParser.is_arn(api_params["Bucket"])
        ):
            return None
        operation = client.meta.service_model.operation_model(operation_name)
        context: dict[str, Any] = {
            "client_region": client.meta.region_name,
            "client_config": config,
            "has_streaming_input": operation.has_streaming_input,
            "auth_type": operation.resolved_auth_type,
            "unsigned_payload": operation.unsigned_payload,
            "auth_options": client.meta.service_model.metadata.get("auth"),
        }
        params = await client._emit_api_params(
            api_params=dict(api_params), operation_model=operation, context=context
        )
        url, headers, _ = await client._resolve_endpoint_ruleset(operation, params, context)
        version = await client._request_signer._choose_signer(operation_name, "standard", context)
        if version != "s3v4":
            return None
        signing = context.get("signing", {})
        return _Route(
            operation,
            url,
            {**headers, "User-Agent": client._user_agent_creator.to_string()},
            {name: context[name] for name in context.keys() - {"s3_redirect", "input_params"}},
            _Signer(
                signing.get("signing_name", client._request_signer._signing_name),
                signing.get("region", client._request_signer._region_name),
            ),
        )

    async def _first_answer(self, route: _Route, api_params: dict[str, Any]) -> tuple[Any, Any]:
        """Make the first attempt.

        Returns:
            the result of the call, or None if it is not a plain success; and the answer, or the
            exception in place of it.
        """
        client = self._parts
        request = self._request(route, api_params)
        credentials = await client._request_signer._credentials.get_frozen_credentials()
        route.signer.sign(request, credentials)
        if request.method not in _WITHOUT_BODY:
            request.headers["Content-Length"] = str(len(request.body or b""))
        if request.body is not None and len(request.body) >= EXPECT_FROM:
            request.body = Body(request.body)
        try:
            response = await client._endpoint.http_session.send(request)
        except Exception as error:  # noqa: BLE001 - the client raises it, after its last attempt
            return None, error
        parsed = await self._parsed(route.operation, response)
        if parsed is None:
            return None, response
        # As after each success, the cost of retries is returned to the quota.
        await client.meta.events.emit("after-call.s3", http_response=response, context={})
        return parsed, response

    def _request(self, route: _Route, api_params: dict[str, Any]) -> _Request:
        params = dict(api_params)
        handle_copy_source_param(params)
        made = self._parts._serializer.serialize_to_request(params, route.operation)
        made["headers"] = headers = CIMultiDict({**made["headers"], **route.headers})
        prepare_request_dict(made, route.url, context=dict(route.context))
        add_recursion_detection_header(made)
        if route.operation.name == "DeleteObjects":
            escape_xml_payload(made)
            headers["Content-MD5"] = content_md5(made["body"])
        body: bytes = made["body"]
        if len(body) >= EXPECT_FROM:
            headers["Expect"] = "100-continue"
        return _Request(
            made["method"],
            made["url"],
            headers,
            body or None,
            made["context"],
            route.operation.has_streaming_output,
        )

    async def _parsed(self, operation: OperationModel, response: Any) -> Any:
        """Return the result of a call for a plain success, else None."""
        if response.status_code >= HTTPStatus.MULTIPLE_CHOICES:
            await (
                response.content
            )  # the client reads it, too, and would give it up if it were cancelled
            return None
        body: Any
        if operation.has_streaming_output:
            body = StreamingBody(response.raw, response.headers.get("content-length"))
        else:
            body = await response.content
            if not _XML.get(operation.name, _NOTHING).match(body):
                return None
        # A look-up here is faster than in the headers of the response.
        headers = CIMultiDict(
            {name.decode().lower(): value.decode() for name, value in response.raw.raw_headers}
        )
        answer = {"status_code": response.status_code, "headers": headers, "body": body}
        extra: dict[str, Any] = {}
        handle_expires_header(operation, answer, extra)
        try:
            parsed = await self._parser.parse(answer, operation.output_shape)
        except ResponseParserError:
            return None
        parsed["ResponseMetadata"]["RetryAttempts"] = 0
        return {**parsed, **extra}
