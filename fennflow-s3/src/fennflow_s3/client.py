"""The pooled client, and the conversion of its errors."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, unquote_plus, urlsplit

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.hooks import AioHierarchicalEmitter
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from aiohttp.http_exceptions import InvalidHeader
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)
from botocore.loaders import Loader, create_loader
from botocore.parsers import ResponseParserError
from typing_extensions import override

from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    NoSuchKeyException,
    NoSuchNamespaceException,
    PreconditionFailedException,
)
from fennflow.printable import cause_to_show, printable, without_credentials
from fennflow.telemetry import log_event
from fennflow_s3.answers import time_of
from fennflow_s3.first_attempt import FirstAttempts, answer_to_first_attempt, content_md5
from fennflow_s3.window import Window

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

    from fennflow_s3.config import S3ConnectorConfig

# The meaning of S3's error codes, or of the status if there is no code, and what to do next.
_MEANINGS: Sequence[tuple[set[str], set[int], type[BaseConnectorException], str]] = (
    (
        {"NoSuchBucket"},
        set(),
        NoSuchNamespaceException,
        "Create the bucket, or check its name and the endpoint.",
    ),
    (
        {"InvalidBucketName"},
        set(),
        NoSuchNamespaceException,
        "Like AWS, it accepts 3 to 63 lower-case letters, digits, dots and hyphens: no underscore.",
    ),
    (
        {"NoSuchKey", "NoSuchVersion", "NoSuchUpload", "NotFound"},
        {HTTPStatus.NOT_FOUND},
        NoSuchKeyException,
        "",
    ),
    (
        {
            "AccessDenied",
            "ExpiredToken",
            "InvalidAccessKeyId",
            "InvalidToken",
            "SignatureDoesNotMatch",
        },
        {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN},
        AccessDeniedException,
        "Check the credentials and their permissions on the bucket.",
    ),
    (
        {"NotImplemented"},
        {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED},
        ConnectorCapabilityException,
        "This server does not support that.",
    ),
    (
        {"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"},
        {HTTPStatus.TOO_MANY_REQUESTS},
        ConnectorUnavailableException,
        "The server is busy; try again later.",
    ),
)

_REFUSALS = frozenset(
    {
        "AccessDenied",
        "InvalidArgument",
        "InvalidRequest",
        "KeyTooLongError",
        "MalformedXML",
        "MethodNotAllowed",
        "NoSuchKey",
        "NoSuchVersion",
        "NotImplemented",
        "PreconditionFailed",
        "SlowDown",
    }
)
"""Error codes for a key of DeleteObjects that mean that it was definitely not deleted."""


READ_AT_ONCE = 1 << 18
_FAILED = "fennflow_failed"
"""The key in the context of a request for the failure of its last attempt and its time."""
_CHECKSUMS = ("x-amz-checksum-", "x-amz-sdk-checksum-")


class _Response(aiohttp.ClientResponse):
    """Returns its connection to the pool immediately if a header is not UTF-8.

    aiobotocore decodes the headers and does not close the response if that fails: its connection would be in
    use until the exception is collected.
    """

    @override
    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        await super().start(connection)
        for _, value in self.raw_headers:
            value.decode()  # an exception here makes aiohttp close the response
        return self


class _Session(AIOHTTPSession):
    """HTTP session with adaptive concurrency that leaves retries to botocore.

    aiohttp silently retries a PUT or DELETE when a reused connection breaks (its issue 10790). The
    first attempt may have taken effect: in a versioned bucket as a version that FennFlow does not
    know of. Botocore retries too, but `_note_attempt` counts its attempts (protocol P20).
    """

    def __init__(self, **options: Any) -> None:
        # Half of the connections are for requests, the other half for open downloads.
        super().__init__(**options)
        self._window = Window(options["max_pool_connections"] // 2)

    @override
    async def send(self, request: Any) -> Any:
        entered, status = await self._window.enter(), None
        try:
            answer: Any = await super().send(request)
            status = answer.status_code
            return answer
        finally:
            self._window.leave(entered, status)

    async def _get_session(self, proxy_url: str | None) -> aiohttp.ClientSession:
        # The stubs hide this method, and aiohttp has no public switch.
        base: Any = super()
        session: aiohttp.ClientSession = await base._get_session(proxy_url)  # noqa: SLF001
        session._retry_connection = False  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        session._response_class = _Response  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        # One `recv` returns this much; with a smaller limit aiohttp would pause reading each time.
        session._read_bufsize = READ_AT_ONCE  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        return session


def client_context(config: S3ConnectorConfig) -> AbstractAsyncContextManager[S3Client]:
    """Return the context in which a client with a pool of connections is open.

    Raises:
        AccessDeniedException: the profile cannot be found.
        BaseConnectorException: the configuration is not valid.
    """
    options = AioConfig(
        signature_version="s3v4",
        http_session_cls=_Session,
        retries={"mode": "standard", "total_max_attempts": config.max_attempts},
        max_pool_connections=config.max_pool_connections,
        s3={"addressing_style": config.addressing_style},
        # FennFlow builds the requests itself, and `validate` has checked the user's options.
        parameter_validation=False,
        # FennFlow sends a SHA-256 with every PUT and checks it on every read.
        request_checksum_calculation=config.request_checksum_calculation,
        response_checksum_validation=config.response_checksum_validation,
    )
    if config.aiobotocore_config is not None:
        options = options.merge(config.aiobotocore_config)
    connections: int = _connections(options)
    options = options.merge(AioConfig(max_pool_connections=2 * connections))
    secret, token = config.aws_secret_access_key, config.aws_session_token
    session = AioSession(
        profile=config.profile_name, event_hooks=copy(_hooks()), include_builtin_handlers=False
    )
    # Parsing botocore's model of S3 takes most of the time of creating a client.
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=time_of)
    with translated("open a client for", "S3"):
        # Its overloads need the stubs of every AWS service.
        create = cast("Callable[..., Any]", session.create_client)  # pyright: ignore[reportUnknownMemberType]
        context: AbstractAsyncContextManager[S3Client] = create(
            "s3",
            region_name=config.region_name,
            endpoint_url=config.endpoint_url,
            aws_access_key_id=config.aws_access_key_id,
            aws_secret_access_key=None if secret is None else secret.get_secret_value(),
            aws_session_token=None if token is None else token.get_secret_value(),
            config=options,
        )
    return context


@cache
def _hooks() -> AioHierarchicalEmitter:
    """Return the event handlers of a client, for copying: registering them is slow."""
    hooks = AioHierarchicalEmitter()
    session = AioSession(event_hooks=hooks)  # registers botocore's handlers
    session.register("before-sign.s3.DeleteObjects", _add_content_md5)
    session.register("before-parameter-build.s3.ListMultipartUploads", _ask_for_encoded_keys)
    session.register("after-call.s3.ListMultipartUploads", _decode_keys)
    session.register("creating-client-class.s3", _add_first_attempts)
    session.register("before-send.s3", answer_to_first_attempt)
    session.register("response-received.s3", _note_attempt)
    session.register("request-created.s3", _log_repetition)
    session.register("needs-retry.s3.PutObject", _no_retry)
    for operation in ("GetObject", "HeadObject"):
        session.register(f"needs-retry.s3.{operation}", _no_retry_of_what_cannot_be_read)
    return hooks


@cache
def _loader(search_path: str | None) -> Loader:
    """Return the loader of botocore's data files, shared by all clients of the process."""
    return create_loader(search_path)


def _connections(options: Any) -> int:
    """Return `max_pool_connections`; the stubs of botocore do not know the attribute."""
    return int(options.max_pool_connections)


def connections_of(client: S3Client) -> int:
    """Return how many connections a client has for downloads, and how many for other requests."""
    return _connections(client.meta.config) // 2


def _add_content_md5(request: Any, **_kwargs: Any) -> None:
    """Send the MD5, which every server accepts, in place of newer checksums, which some refuse."""
    for name in [each for each in request.headers if each.lower().startswith(_CHECKSUMS)]:
        del request.headers[name]
    request.headers["Content-MD5"] = content_md5(request.body)


def _add_first_attempts(base_classes: list[type], **_kwargs: Any) -> None:
    base_classes.insert(0, FirstAttempts)


def _ask_for_encoded_keys(params: Any, **_kwargs: Any) -> None:
    """Request URL-encoded keys; botocore does so only for objects and versions.

    Any writer can begin an upload for a key with a control character. Unencoded, no client could
    parse the list that contains it.
    """
    params.setdefault("EncodingType", "url")


def _decode_keys(parsed: Any, **_kwargs: Any) -> None:
    """Decode the keys of a list of uploads, and where its next page begins."""
    if parsed.get("EncodingType") != "url":
        return  # the server did not encode them
    for part in (parsed, *parsed.get("Uploads", ())):
        for name in {"Key", "NextKeyMarker"} & part.keys():
            part[name] = unquote_plus(part[name])


@dataclass(slots=True)
class Attempts:
    """The results of the attempts of a request so far.

    Args:
        lost: whether the answer to an attempt was lost, so that it may still take effect.
    """

    lost: bool = False


_attempts: ContextVar[Attempts | None] = ContextVar("_attempts", default=None)
_once: ContextVar[bool] = ContextVar("_once", default=False)


@contextmanager
def sent_once() -> Generator[None]:
    """Send the PUTs of the block only once, whatever the answer."""
    token = _once.set(True)
    try:
        yield
    finally:
        _once.reset(token)


def _no_retry(**_kwargs: Any) -> bool | None:
    """Disable retries: botocore uses the first handler result that is not None."""
    return False if _once.get() else None


def _no_retry_of_what_cannot_be_read(
    caught_exception: Exception | None = None, **_kwargs: Any
) -> bool | None:
    """Keep botocore from repeating a request whose answer can never be read.

    A few dozen such objects would use up the retry quota, which all requests share.
    """
    return False if _cannot_be_read(caught_exception) else None


def _note_attempt(
    context: dict[str, Any],
    parsed_response: Any = None,
    exception: Exception | None = None,
    **_kwargs: Any,
) -> None:
    """Note a failed attempt, and whether its answer was lost.

    botocore's own count includes refused attempts, too.
    """
    if exception is not None:
        lost, failure = not _unsent(exception), f"{type(exception).__name__}: {exception}"
    elif parsed_response is not None and _status(parsed_response) >= HTTPStatus.MULTIPLE_CHOICES:
        status = _status(parsed_response)
        code = str(parsed_response.get("Error", {}).get("Code", ""))
        lost, failure = not is_refusal(code, status), f"{code} (HTTP {status})"
    else:
        return
    context[_FAILED] = failure, time.monotonic()
    attempts = _attempts.get()
    if attempts is not None:
        attempts.lost = attempts.lost or lost


def _log_repetition(request: Any, operation_name: str, **_kwargs: Any) -> None:
    """Log a retry, which botocore decides."""
    failed = request.context.pop(_FAILED, None)
    if failed is None:
        return
    failure, since = failed
    parts = urlsplit(str(request.url))
    log_event(
        logging.WARNING,
        "%s of %s failed, and is sent again after %.2f s: %s",
        operation_name,
        printable(f"{parts.netloc}{unquote(parts.path)}"),
        time.monotonic() - since,
        printable(without_credentials(failure)),
        rule="retry",
    )


@contextmanager
def translated(verb: str, name: str, *, writes: bool = False) -> Generator[Attempts]:
    """Convert exceptions of aiobotocore to FennFlow's.

    Args:
        verb: the operation, for the message.
        name: the object: bucket and key.
        writes: whether the block sends a request that changes the bucket. Do not use it in a
            generator, which runs in the context of its caller.

    Yields:
        the attempts: after the request they show whether an answer was lost.
    """
    attempts = Attempts()
    if not writes:
        with _translated(verb, name, attempts, writes=False):
            yield attempts
        return
    token = _attempts.set(attempts)
    try:
        with _translated(verb, name, attempts, writes=True):
            yield attempts
    finally:
        _attempts.reset(token)


@contextmanager
def _translated(verb: str, name: str, attempts: Attempts, *, writes: bool) -> Generator[None]:
    try:
        yield
    except ClientError as error:
        raise from_client_error(error, verb, name, attempts, writes=writes) from cause_to_show(
            error
        )
    except (
        NoCredentialsError,
        PartialCredentialsError,
        CredentialRetrievalError,
        TokenRetrievalError,
        ProfileNotFound,
    ) as error:
        message = (
            f"Could not {verb} {name}: {error}. Give aws_access_key_id and "
            "aws_secret_access_key, or set up the AWS chain."
        )
        raise AccessDeniedException(message, retried=attempts.lost) from cause_to_show(error)
    except (
        TimeoutError,
        BotoConnectionError,
        HTTPClientError,
        ResponseParserError,
        aiohttp.ClientError,
        OSError,
    ) as error:
        if not writes and _cannot_be_read(error):
            message = (
                f"Could not {verb} {name}: a client has stored a header with the object that is not UTF-8 "
                "or has a NUL. Upload the object again, or delete it."
            )
            raise BaseConnectorException(message, retried=attempts.lost) from error
        message = (
            f"Could not {verb} {name}: {type(error).__name__}: {without_credentials(str(error))}. "
            "Is the server up, and is endpoint_url right?"
        )
        ambiguous = writes and not _unsent(error)
        raise ConnectorUnavailableException(
            message, ambiguous=ambiguous, retried=attempts.lost
        ) from cause_to_show(error)
    except BotoCoreError as error:
        message = f"Could not {verb} {name}: {without_credentials(str(error))}"
        raise BaseConnectorException(message, retried=attempts.lost) from cause_to_show(error)


def _cannot_be_read(error: Exception | None) -> bool:
    """Return whether the server has answered, with headers that no client can read."""
    if not isinstance(error, HTTPClientError):
        return False
    cause: BaseException | None = error.kwargs.get("error")
    while cause is not None:
        if isinstance(cause, (InvalidHeader, UnicodeDecodeError)):
            return True
        cause = cause.__cause__
    return False


def _unsent(error: Exception) -> bool:
    """Return whether a request failed before any byte of it was sent."""
    if isinstance(error, ConnectTimeoutError):
        return True
    # botocore's EndpointConnectionError is also raised for connections that broke later.
    cause: object = error.kwargs.get("error") if isinstance(error, BotoCoreError) else error
    return isinstance(
        cause, (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, socket.gaierror)
    )


def is_refusal(code: str, status: int) -> bool:
    """Return whether an error means that the server definitely did not perform the request.

    Other errors may come from a proxy, which does not know whether the server performed the
    request.

    Args:
        code: the S3 error code; the status if there is none.
        status: the HTTP status; 0 for a key of DeleteObjects, which has only a code.
    """
    if not status:
        return code in _REFUSALS
    if status < HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.NOT_IMPLEMENTED:
        return True
    return status == HTTPStatus.SERVICE_UNAVAILABLE and code == "SlowDown"


def _status(response: Any) -> int:
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def from_client_error(
    error: ClientError, verb: str, name: str, attempts: Attempts, *, writes: bool
) -> BaseConnectorException:
    """Return FennFlow's exception for an error response."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = _status(error.response)
    return from_code(
        code,
        str(error.response.get("Error", {}).get("Message", "")),
        status,
        verb,
        name,
        ambiguous=writes and not is_refusal(code, status),
        retried=attempts.lost,
    )


def from_code(
    code: str,
    text: str,
    status: int,
    verb: str,
    name: str,
    *,
    ambiguous: bool = False,
    retried: bool = False,
) -> BaseConnectorException:
    """Return FennFlow's exception for an S3 error code.

    Args:
        code: for instance `NoSuchKey`; for a HEAD, which has no body, the status.
        text: the server's message.
        status: the HTTP status; 0 for a key of DeleteObjects.
        verb: the operation.
        name: the object.
        ambiguous: whether the request may have taken effect anyway.
        retried: whether the answer to an earlier attempt was lost.
    """
    said = f"Could not {verb} {name}: {code} (HTTP {status}) {text}".rstrip(". ") + "."
    if code in {"ConditionalRequestConflict", "PreconditionFailed"} or (
        status == HTTPStatus.PRECONDITION_FAILED
    ):
        contended = code == "ConditionalRequestConflict"
        return PreconditionFailedException(said, contended=contended, retried=retried)
    for codes, statuses, exception, advice in _MEANINGS:
        if code in codes or status in statuses:
            said = f"{said} {advice}".rstrip()
            return exception(said, ambiguous=ambiguous, retried=retried)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        said = f"{said} The server failed; try again later."
        return ConnectorUnavailableException(said, ambiguous=ambiguous, retried=retried)
    return BaseConnectorException(said, ambiguous=ambiguous, retried=retried)
