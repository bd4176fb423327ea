"""The pooled client, and what its errors mean."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
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
from fennflow_s3.window import Window

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

    from fennflow_s3.config import S3ConnectorConfig

# What a code of S3, or a status where there is no code, means; and what to do next.
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
        "Like AWS, it takes 3 to 63 lower-case letters, digits, dots and hyphens: no underscore.",
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
        "Check the credentials, and their permissions on the bucket.",
    ),
    (
        {"NotImplemented"},
        {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED},
        ConnectorCapabilityException,
        "This server cannot do that.",
    ),
    (
        {"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"},
        {HTTPStatus.TOO_MANY_REQUESTS},
        ConnectorUnavailableException,
        "The server is busy; try again later.",
    ),
)


class _Session(AIOHTTPSession):
    """Sends what a server takes at once, and leaves every repetition to botocore, which counts it.

    aiohttp sends a PUT or DELETE once more, without a word, when a reused connection breaks (its
    issue 10790). The first one may have taken effect: in a versioned bucket as a version that
    nobody knows of. Botocore repeats it too, but says so (protocol P20).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._window = Window(options["max_pool_connections"])

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
        return session


def client_context(config: S3ConnectorConfig) -> AbstractAsyncContextManager[S3Client]:
    """Return the context in which a client with a pool of connections is open.

    Raises:
        AccessDeniedException: the profile cannot be found.
        BaseConnectorException: the configuration does not make a client.
    """
    options = AioConfig(
        signature_version="s3v4",
        http_session_cls=_Session,
        retries={"mode": "standard", "total_max_attempts": config.max_attempts},
        max_pool_connections=config.max_pool_connections,
        s3={"addressing_style": config.addressing_style},
        # What is sent is made here, and `validate` has looked at what users add to it.
        parameter_validation=False,
        # FennFlow names a SHA-256 with every PUT and checks it on every read.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    if config.aiobotocore_config is not None:
        options = options.merge(config.aiobotocore_config)
    secret, token = config.aws_secret_access_key, config.aws_session_token
    session = AioSession(profile=config.profile_name)
    # Parsing botocore's model of S3 takes most of the time that a new client takes.
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    session.register("before-sign.s3.DeleteObjects", _add_content_md5)
    with translated("open a client for", "S3"):
        # Its overloads name the stubs of every service of AWS.
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
def _loader(search_path: str | None) -> Loader:
    """Return the loader of botocore's data files, shared by all clients of the process."""
    return create_loader(search_path)


def _add_content_md5(request: Any, **_kwargs: Any) -> None:
    """Name the MD5 that servers ask of DeleteObjects which do not know newer checksums."""
    digest = hashlib.md5(request.body, usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


@contextmanager
def translated(verb: str, name: str) -> Generator[None]:
    """Turn what aiobotocore raises into our exceptions.

    Args:
        verb: what was tried, for the message.
        name: on what: bucket and key.
    """
    try:
        yield
    except ClientError as error:
        raise from_client_error(error, verb, name) from error
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
        raise AccessDeniedException(message) from error
    except (
        TimeoutError,
        BotoConnectionError,
        HTTPClientError,
        aiohttp.ClientError,
        OSError,
    ) as error:
        message = (
            f"Could not {verb} {name}: {type(error).__name__}: {error}. "
            "Is the server up, and is endpoint_url right?"
        )
        raise ConnectorUnavailableException(message) from error
    except BotoCoreError as error:
        message = f"Could not {verb} {name}: {error}"
        raise BaseConnectorException(message) from error


def was_retried(response: Any) -> bool:
    """Return whether botocore sent a request more than once."""
    return bool(response.get("ResponseMetadata", {}).get("RetryAttempts"))


def from_client_error(error: ClientError, verb: str, name: str) -> BaseConnectorException:
    """Return our exception for an answer of the server that is an error."""
    metadata: Any = error.response.get("ResponseMetadata", {})
    return from_code(
        str(error.response.get("Error", {}).get("Code", "")),
        str(error.response.get("Error", {}).get("Message", "")),
        int(metadata.get("HTTPStatusCode", 0)),
        verb,
        name,
        retried=was_retried(error.response),
    )


def from_code(
    code: str, text: str, status: int, verb: str, name: str, *, retried: bool = False
) -> BaseConnectorException:
    """Return our exception for an error code of S3.

    Args:
        code: for instance `NoSuchKey`; of a HEAD, which has no body, the status.
        text: the server's words.
        status: of HTTP; 0 for a key of DeleteObjects.
        verb: what was tried.
        name: on what.
        retried: whether the request was sent more than once.
    """
    said = f"Could not {verb} {name}: {code} (HTTP {status}) {text}".rstrip(". ") + "."
    if code in {"ConditionalRequestConflict", "PreconditionFailed"} or (
        status == HTTPStatus.PRECONDITION_FAILED
    ):
        contended = code == "ConditionalRequestConflict"
        return PreconditionFailedException(said, contended=contended, retried=retried)
    for codes, statuses, exception, advice in _MEANINGS:
        if code in codes or status in statuses:
            return exception(f"{said} {advice}".rstrip())
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return ConnectorUnavailableException(f"{said} The server failed; try again later.")
    return BaseConnectorException(said)
