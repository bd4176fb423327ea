"""Conversion of obstore's errors to FennFlow's exceptions."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TypeVar

from obstore import exceptions as obstore

from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    NoSuchKeyException,
    NoSuchNamespaceException,
    PreconditionFailedException,
)
from fennflow.printable import cause_to_show, without_credentials
from fennflow.retries import repeat

R = TypeVar("R")

_STATUS = re.compile(r"status code: (\d{3})")
_NO_NAMESPACE = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist")

# The answer has a header that is not UTF-8 or has a control character.
_UNREADABLE = re.compile(r"contained non UTF-8 characters|hyper::Error\(\s*Parse\(\s*Header\(")

# A local path is below a file, or is a directory: ENOTDIR and EISDIR.
_NO_FILE = re.compile(r"LocalFileSystem error: .*\(os error (20|21)\)", re.DOTALL)

_LATER = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
_MEANINGS: tuple[
    tuple[tuple[type[Exception], ...], set[int], type[BaseConnectorException], str], ...
] = (
    ((FileNotFoundError,), {HTTPStatus.NOT_FOUND}, NoSuchKeyException, ""),
    (
        (obstore.PermissionDeniedError, obstore.UnauthenticatedError, PermissionError),
        {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN},
        AccessDeniedException,
        "Check the credentials and their permissions.",
    ),
    (
        (obstore.InvalidPathError, obstore.NotSupportedError, NotImplementedError),
        {HTTPStatus.NOT_IMPLEMENTED},
        ConnectorCapabilityException,
        "",
    ),
)


# The exception of a Rust panic, after a bug in obstore or an option that it cannot use.
_PANICS = frozenset({"PanicException", "RustPanic"})


@contextmanager
def translated(
    verb: str, name: str, *, writes: bool = False, retried: bool = False
) -> Generator[None]:
    """Convert exceptions of obstore to FennFlow's.

    Args:
        verb: the operation, for the message.
        name: the object: namespace and key.
        writes: whether the request changes the store.
        retried: whether the answer to an earlier attempt was lost.
    """
    try:
        yield
    except (obstore.BaseError, OSError, NotImplementedError) as error:
        raised = exception_for(error, verb, name, writes=writes, retried=retried)
        raise raised from cause_to_show(error)
    except BaseException as error:
        if not is_panic(error):
            raise
        message = (
            f"Could not {verb} {name}: obstore failed internally ({words_of(error)}). Check the options: it "
            "accepts some invalid ones, such as an endpoint that is not a URL, and fails at a request."
        )
        raise ConnectorUnavailableException(
            message, ambiguous=writes, retried=retried
        ) from cause_to_show(error)


def is_panic(error: BaseException) -> bool:
    """Return whether Rust panicked; its exception is not always an `Exception`."""
    return type(error).__name__ in _PANICS


def words_of(error: BaseException) -> str:
    """Return the message of an obstore error, without the debug dump that repeats it."""
    return without_credentials(str(error).partition("\n\nDebug source")[0])


def exception_for(
    error: Exception, verb: str, name: str, *, writes: bool, retried: bool
) -> BaseConnectorException:
    """Return FennFlow's exception for an obstore exception."""
    words = words_of(error)
    said = f"Could not {verb} {name}: {words}".rstrip(". \n") + "."
    found = _STATUS.search(words)
    status = int(found[1]) if found else 0
    conditions = (obstore.AlreadyExistsError, obstore.PreconditionError)
    if status == HTTPStatus.CONFLICT or isinstance(error, conditions):
        # Azure answers 409 to a create if there is an object; elsewhere it means a race.
        contended = status == HTTPStatus.CONFLICT and "<Code>BlobAlreadyExists</Code>" not in words
        return PreconditionFailedException(said, contended=contended, retried=retried)
    if _NO_NAMESPACE.search(words):
        said = f"{said} Create it, or correct the namespace."
        return NoSuchNamespaceException(said, retried=retried)
    if _NO_FILE.search(words):
        status = HTTPStatus.NOT_FOUND
    for kinds, statuses, exception, advice in _MEANINGS:
        if isinstance(error, kinds) or status in statuses:
            return exception(f"{said} {advice}".rstrip(), retried=retried)
    if not writes and _UNREADABLE.search(str(error)):
        # The store has answered, and would give the same answer each time.
        said = (
            f"{said} The object has a stored header that cannot be read. "
            "Upload the object again, or delete it."
        )
        return BaseConnectorException(said, retried=retried)
    refused = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
    if refused and status not in _LATER:
        return BaseConnectorException(said, retried=retried)
    slow_down = status == HTTPStatus.SERVICE_UNAVAILABLE and "<Code>SlowDown</Code>" in words
    unsent = not status and "kind: Connect," in str(error)
    return ConnectorUnavailableException(
        f"{said} Is the store up, and are url and options right?",
        ambiguous=writes and not (refused or slow_down or unsent),
        retried=retried,
    )


async def sent(
    verb: str, name: str, request: Callable[[], Awaitable[R]], *, writes: bool, attempts: int
) -> tuple[R, bool]:
    """Send a request until it is answered.

    Args:
        verb: the operation, for the message.
        name: the object: namespace and key.
        request: sends the request.
        writes: whether it changes the store.
        attempts: the total number of attempts.

    Returns:
        the answer, and whether the answer to an earlier attempt was lost, so that it may still take
        effect.
    """
    lost = False

    async def send() -> R:
        nonlocal lost
        try:
            with translated(verb, name, writes=writes, retried=lost):
                return await request()
        except BaseConnectorException as error:
            lost = error.ambiguous
            raise

    answer = await repeat(
        send, on=_worth_another, attempts=attempts, what=f"The attempt to {verb} {name}"
    )
    return answer, lost


def _worth_another(error: Exception) -> bool:
    """Return whether a request may succeed if it is sent again."""
    contended = isinstance(error, PreconditionFailedException) and error.contended
    return contended or isinstance(error, ConnectorUnavailableException)
