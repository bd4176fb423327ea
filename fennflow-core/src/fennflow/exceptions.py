"""The one tree of FennFlow's exceptions.

```
FennFlowException
├── ConfigException
│   └── PluginException
├── PathException
│   ├── KeyException
│   ├── FilepathsCollisionError
│   └── ContinuationTokenException
├── FileException
│   ├── MediaTypeCannotBeGuessedException
│   ├── MetadataException
│   ├── ChecksumMismatchException
│   ├── UploadIdleException
│   └── UploadTicketException
├── BaseBackendException
│   ├── RecordAlreadyExistsException
│   ├── RecordLockedException
│   ├── BackendUnavailableException
│   ├── ConflictException
│   ├── CatalogDivergedException
│   ├── CursorException
│   └── TransactionLostException
├── BaseConnectorException
│   ├── NoSuchKeyException
│   ├── NoSuchNamespaceException
│   ├── AccessDeniedException
│   ├── PreconditionFailedException
│   ├── ObjectChangedException
│   ├── ConnectorCapabilityException
│   │   └── IncompleteListingException
│   └── ConnectorUnavailableException
├── ReconcileFailedException
├── StepNotDoneException
└── TransactionException
    ├── CommitUncertainException
    ├── TransactionTimeoutException
    └── CompensationPendingWarning (a warning)
```

Every message says what happened, to which object, and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from fennflow.printable import printable

__all__ = [
    "AccessDeniedException",
    "BackendUnavailableException",
    "BaseBackendException",
    "BaseConnectorException",
    "CatalogDivergedException",
    "ChecksumMismatchException",
    "CommitUncertainException",
    "CompensationPendingWarning",
    "ConfigException",
    "ConflictException",
    "ConnectorCapabilityException",
    "ConnectorUnavailableException",
    "ContinuationTokenException",
    "CursorException",
    "FennFlowException",
    "FileException",
    "FilepathsCollisionError",
    "IncompleteListingException",
    "KeyException",
    "MediaTypeCannotBeGuessedException",
    "MetadataException",
    "NoSuchKeyException",
    "NoSuchNamespaceException",
    "ObjectChangedException",
    "PathException",
    "PluginException",
    "PreconditionFailedException",
    "ReconcileFailedException",
    "RecordAlreadyExistsException",
    "RecordLockedException",
    "StepNotDoneException",
    "TransactionException",
    "TransactionLostException",
    "TransactionTimeoutException",
    "UploadIdleException",
    "UploadTicketException",
]


class FennFlowException(Exception):  # noqa: N818 - the name that users know
    r"""Base class of all exceptions of FennFlow.

    Its text and its notes may name keys and repeat what a server said. Characters in them that are
    invisible or that a terminal acts on, and line breaks, are escaped: `a\u202eb`.
    """

    @override
    def __str__(self) -> str:
        return printable(super().__str__())

    @override
    def add_note(self, note: str, /) -> None:
        """Add a note, which tracebacks show."""
        super().add_note(printable(note))


class ConfigException(FennFlowException):
    """A configuration that cannot work; raised before any I/O."""


class PluginException(ConfigException):
    """A plugin is missing, broken, misspelt, provided twice, or built for other hook specs."""


class PathException(FennFlowException):
    """A path cannot be used; raised before any I/O."""


class KeyException(PathException):
    """A key breaks the key rules or leaves the scope that `at()` set.

    Args:
        message: which key, and what is wrong with it.
        reason: what is wrong with it, without its name.
    """

    def __init__(self, message: str = "", *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class FilepathsCollisionError(PathException):
    """Two files of one call have the same path."""


class ContinuationTokenException(PathException):
    """A continuation token did not come from `list`."""


class FileException(FennFlowException):
    """A file's content, name, media type or metadata is not valid for its class."""


class MediaTypeCannotBeGuessedException(FileException):
    """The media type of a file cannot be detected from its name or its bytes: pass `media_type`."""


class MetadataException(FileException):
    """Metadata that the store cannot hold, for instance over 2 KB; raised before any I/O."""


class ChecksumMismatchException(FileException):
    """The bytes that were read are not the bytes that were committed."""


class UploadIdleException(FileException):
    """The source of a stream gave no bytes for `upload_idle_timeout`; the call was undone."""


class UploadTicketException(FileException):
    """A ticket is not valid here, or what was uploaded is not what it allows; nothing was accepted."""


class BaseBackendException(FennFlowException):
    """The catalog or the journal refused an operation."""


class RecordAlreadyExistsException(BaseBackendException):
    """`create` found the key taken."""


class RecordLockedException(BaseBackendException):
    """A key is locked, and was not free within `lock_timeout`.

    Args:
        message: which key, and why it is locked.
        free_in: seconds until a key is free that is locked because a request may still reach it
            (protocol P20); None if another transaction is writing the key.
        holder: the id of the transaction that is writing it, where that is known.
    """

    def __init__(
        self, message: str = "", *, free_in: float | None = None, holder: str | None = None
    ) -> None:
        super().__init__(message)
        self.free_in = free_in
        self.holder = holder


class ConflictException(BaseBackendException):
    """A record that the transaction read was changed before the commit (`validate_reads`)."""


class CatalogDivergedException(BaseBackendException):
    """The log of a catalog in the bucket does not continue the state of this process.

    Something other than FennFlow changed the log, or this is a bug. The process serves nothing more
    from this catalog: restart it, and keep a copy of the bucket.
    """


class CursorException(BaseBackendException):
    """The feed cannot continue from a cursor: it is not one, or commits after it were removed."""


class TransactionLostException(BaseBackendException):
    """The transaction's lease ran out: recovery owns it now, and it did not commit here."""


class BackendUnavailableException(BaseBackendException):
    """The database could not be reached, was locked or full; retries are used up.

    With any other exception of this tree, nothing was committed. With this one, and with any
    exception that is not FennFlow's, it is unknown whether the transaction was committed.
    """


class BaseConnectorException(FennFlowException):
    """The object store refused a request or could not be reached.

    `ambiguous` says whether the request may have taken effect anyway, or still may (protocol P19).
    A refusal of a request that was sent once is definite. An exception that is not FennFlow's is
    always ambiguous.

    Args:
        message: what happened, to which object.
        ambiguous: whether the answer was lost (a time-out, a connection that broke after bytes
            were sent, 500, 502, 504).
        retried: whether the request was sent before, and the answer to that attempt was lost. Then
            the outcome is ambiguous, whatever the answer to the last attempt was (protocol P20).
    """

    def __init__(
        self, message: str = "", *, ambiguous: bool = False, retried: bool = False
    ) -> None:
        super().__init__(message)
        self.retried = retried
        self.ambiguous = ambiguous or retried


class NoSuchKeyException(BaseConnectorException):
    """There is no object under the key."""


class NoSuchNamespaceException(BaseConnectorException):
    """The bucket (container, directory) does not exist."""


class AccessDeniedException(BaseConnectorException):
    """The credentials are wrong, missing, expired, or lack a permission."""


class PreconditionFailedException(BaseConnectorException):
    """A condition of the request (`If-None-Match`, `If-Match`) did not hold.

    Args:
        message: what happened, to which object.
        contended: whether the store could not decide because another request was under way
            (S3's 409 ConditionalRequestConflict): then the key may well be free, and the request
            may be sent again.
        retried: whether an earlier attempt, whose answer was lost, may have taken effect or still
            may (protocol P20).
    """

    def __init__(self, message: str, *, contended: bool = False, retried: bool = False) -> None:
        super().__init__(message, retried=retried)
        self.contended = contended


class ObjectChangedException(BaseConnectorException):
    """The object was changed outside FennFlow."""


class ConnectorCapabilityException(BaseConnectorException):
    """The store does not support the operation."""


class IncompleteListingException(ConnectorCapabilityException):
    """Not all objects could be listed; raised after the others were listed.

    Args:
        message: what could not be listed, and why.
        prefixes: of the keys that may be missing from the listing.
    """

    def __init__(self, message: str, *, prefixes: Sequence[str]) -> None:
        super().__init__(message)
        self.prefixes = tuple(prefixes)


class ConnectorUnavailableException(BaseConnectorException):
    """The store did not answer, or answered that it cannot serve requests now; retries are used up.

    Args:
        message: what happened, to which object.
        ambiguous: False only if it is certain that no attempt had an effect or still can: nothing
            was sent, or the store refused all of them, as with 503 `SlowDown`.
        retried: like that of `BaseConnectorException`.
    """

    def __init__(self, message: str = "", *, ambiguous: bool = True, retried: bool = False) -> None:
        super().__init__(message, ambiguous=ambiguous, retried=retried)


class ReconcileFailedException(FennFlowException):
    """A catalog could not be reconciled with a bucket, or has not been filled from it completely."""


class StepNotDoneException(FennFlowException):
    """Raise it, or a subclass, in a step that did nothing: the step is then not undone.

    For any other exception of a step its registered compensation is called, since an exception may
    only mean that the response was lost.
    """


class TransactionException(FennFlowException):
    """A unit of work was used in a state that does not allow it, or could not end as asked."""


class CommitUncertainException(TransactionException):
    """The outcome of a commit is unknown; recovery will either commit or roll back."""


class TransactionTimeoutException(TransactionException):
    """The unit of work took longer than its `timeout`; nothing of it is committed."""


class CompensationPendingWarning(TransactionException, RuntimeWarning):
    """FennFlow readers see the transaction undone; recovery still has to remove some of its objects."""


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        from fennflow._migration import missing

        raise missing(__name__, name)
