"""The contract of a backend, the rows it keeps, and by name the configs that plugins bring.

A backend is the source of truth: the catalog of committed objects and the journal of live
sessions. It does no object I/O. Every method is one transaction: all of it is durable on return,
or nothing of it happened. Who calls what, in the life of a session:

| method | called | rule |
| --- | --- | --- |
| `stage` | before the first object request of each writing call | P1 P2 P3 |
| `note_upload` | before the first part of a multipart upload | P13 |
| `commit` | once, by the owner: the pivot | P4 P5 |
| `abort` | once, before anything is undone | P5 |
| `relocate` | after the copies of apply, before its deletions | P28 |
| `settle` | when nothing is left to do | P6 P20 |

Time is the backend's: `lock_until` and `due` are by its clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from fennflow.connectors import Location
from fennflow.exceptions import ConflictException

if TYPE_CHECKING:
    from fennflow_memory import InMemoryBackendConfig as InMemoryBackendConfig
else:

    def __getattr__(name: str) -> object:
        from fennflow.plugins import config_class

        return config_class("backend", name, __name__)


__all__ = [
    "AbortUpload",
    "Backend",
    "Commit",
    "Copy",
    "Delete",
    "InMemoryBackendConfig",
    "Intent",
    "ObjectKey",
    "Outcome",
    "Placement",
    "Plan",
    "Record",
    "SessionToken",
    "Step",
    "Tombstone",
    "conflict",
]


class ObjectKey(NamedTuple):
    """What the catalog and the locks are keyed by; sorts as the protocol's P3 asks."""

    namespace: str
    key: str


class Placement(StrEnum):
    """Where the bytes of a write go before the pivot (protocol section 4)."""

    DIRECT = "direct"
    STAGED = "staged"
    VERSIONED = "versioned"
    DELETE = "delete"


class Outcome(StrEnum):
    """How a session was decided (P5)."""

    COMMITTED = "committed"
    ABORTED = "aborted"


class SessionToken(NamedTuple):
    """A session's id (UUIDv7) and the fencing token of who works on it."""

    session_id: str
    token: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A catalog row: what is committed under a key, and where its bytes lie now.

    Args:
        namespace: the bucket.
        key: the key that users know.
        location: where the bytes lie; another key than `key` only between pivot and apply.
        etag: of the object at `location`.
        size: in bytes.
        media_type: for instance `text/plain`.
        content_type: tag of the content type that wrote it; None if FennFlow did not.
        sha256: hexadecimal, of the bytes; None if FennFlow did not write them.
        metadata: the user's.
        created_at: when the key was first committed, UTC.
        modified_at: when this content was written, UTC.
        session_id: of the session that wrote it; with `seq` its identity.
        seq: of the write in that session.
    """

    namespace: str
    key: str
    location: Location
    etag: str
    size: int
    media_type: str
    content_type: str | None = None
    sha256: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    created_at: datetime
    modified_at: datetime
    session_id: str
    seq: int

    @property
    def object_key(self) -> ObjectKey:
        """What the catalog is keyed by."""
        return ObjectKey(self.namespace, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """A journal row: this session is about to write or delete this key, here.

    Args:
        seq: numbers the intents of a session.
        namespace: the bucket.
        key: the key that users know.
        placement: where the bytes go.
        target: the key that the request names: `key`, or a staging key (P10).
        upload_id: of the multipart upload under way.
    """

    seq: int
    namespace: str
    key: str
    placement: Placement
    target: str
    upload_id: str | None = None

    @property
    def object_key(self) -> ObjectKey:
        """What the locks are keyed by."""
        return ObjectKey(self.namespace, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Apply: copy staged bytes to their key.

    Args:
        seq: the write; with the session's id what the copy carries in its metadata (P30).
        namespace: the bucket.
        key: the target.
        source: the staging key.
        expected: ETag of what the session knows to lie at the key; None if nothing (P17).
        doubtful: whether the PUT of the source was in doubt (P20 c).
        extra: the `connector_extra` of the write, JSON values alone.
    """

    seq: int
    namespace: str
    key: str
    source: Location
    expected: str | None
    doubtful: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Apply or compensation: delete an object.

    Args:
        namespace: the bucket.
        location: what to delete.
        etag: what the object is known to have; None if that is not known.
        owner: the write that must have made the object (P18); None if the name says so already
            (a staging key, a version id) or a committed `delete` asks for it.
        owner_session: whose write that is; None for the session that deletes.
    """

    namespace: str
    location: Location
    etag: str | None = None
    owner: int | None = None
    owner_session: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortUpload:
    """Compensation: end an unfinished multipart upload."""

    namespace: str
    key: str
    upload_id: str


Step = Copy | Delete | AbortUpload


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """A write that may still arrive: what carries this session and seq is garbage (P20 a)."""

    namespace: str
    key: str
    session_id: str
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What the pivot writes.

    Args:
        records: new and changed records.
        removed: keys whose records go.
        steps: what apply has to do; none settles the session in the same transaction (P4).
        tombstones: doubtful writes.
        reads: the record that the session saw under each key it read, None for no record; empty
            unless `validate_reads`.
    """

    records: Sequence[Record] = ()
    removed: Collection[ObjectKey] = ()
    steps: Sequence[Step] = ()
    tombstones: Collection[Tombstone] = ()
    reads: Mapping[ObjectKey, Record | None] = field(
        default_factory=dict[ObjectKey, "Record | None"]
    )


def conflict(keys: Collection[ObjectKey]) -> ConflictException:
    """Return the error for records that changed after a session had read them."""
    names = ", ".join(f"{key.namespace}/{key.key}" for key in sorted(keys))
    message = (
        f"Changed by others after this unit of work had read them: {names}. Nothing was "
        "committed; run the unit of work again."
    )
    return ConflictException(message)


Plan = Callable[[Mapping[ObjectKey, Record]], Sequence[Intent]]


class Backend(ABC):
    """Catalog and journal. See the module's docstring for who calls what."""

    @property
    @abstractmethod
    def catalog_id(self) -> str:
        """Tells this catalog's staging keys from those of others that share a bucket (P10)."""

    @abstractmethod
    async def open(self) -> None:
        """Acquire connections, create what is missing; on the running event loop."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release connections; nothing is called afterwards."""

    @abstractmethod
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        """Return the records of those keys that have one, all from one moment (I9)."""

    @abstractmethod
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        """Return up to `limit` records, key order, keys with the prefix and not before `start`.

        Keys compare as UTF-8 bytes.
        """

    @abstractmethod
    async def stage(
        self, session: SessionToken, keys: Collection[ObjectKey], plan: Plan
    ) -> Mapping[ObjectKey, Record]:
        """Lock keys and write intents for them: all or nothing.

        In one transaction, in this order: the session's row is written if it is new; the keys are
        locked in sorted order (a key that the session holds already counts as locked); their
        records are read; `plan(records)` says which intents to write; they are written.

        Args:
            session: who stages.
            keys: what is locked.
            plan: a pure function. What it raises undoes the transaction and propagates.

        Returns:
            the records of the keys. They cannot change until the session is settled (P6).

        Raises:
            RecordLockedException: another session holds one of the keys. The engine waits.
            SessionLostException: the token is no longer the session's.
        """

    @abstractmethod
    async def note_upload(self, session: SessionToken, seq: int, upload_id: str) -> None:
        """Store the upload id in an intent.

        Raises:
            SessionLostException: the token is no longer the session's.
        """

    @abstractmethod
    async def commit(self, session: SessionToken, commit: Commit) -> None:
        """The pivot: decide `committed` and make all changes visible in one instant (P4, P5).

        Raises:
            ConflictException: a record of `commit.reads` changed. Nothing happened.
            SessionLostException: the session is not this owner's any more, or was decided
                `aborted`. Nothing happened.
            Exception: any other leaves the outcome open; the engine then calls `abort`.
        """

    @abstractmethod
    async def abort(self, session: SessionToken) -> tuple[Outcome, Sequence[Step]]:
        """Decide `aborted` unless the session is decided already (P5).

        Returns:
            the outcome that stands. COMMITTED means that a pivot whose answer was lost had gone
            through: then with the steps that it stored.

        Raises:
            SessionLostException: the token is no longer the session's.
        """

    @abstractmethod
    async def relocate(self, session: SessionToken, records: Sequence[Record]) -> None:
        """Replace records by ones that differ in `location` and `etag` alone (P28).

        Raises:
            SessionLostException: the token is no longer the session's.
        """

    @abstractmethod
    async def settle(
        self,
        session: SessionToken,
        *,
        tombstones: Collection[Tombstone] = (),
        keep_locked: Collection[ObjectKey] = (),
    ) -> None:
        """Remove the session's rows and locks.

        Args:
            session: which one.
            tombstones: writes that may still arrive; due after `doubt_period`.
            keep_locked: keys that stay locked for `doubt_period` (P20 b, c).

        Raises:
            SessionLostException: the token is no longer the session's.
        """

    @abstractmethod
    async def tombstones(self, keys: Collection[ObjectKey]) -> Collection[Tombstone]:
        """Return the tombstones that the journal holds of keys (P14)."""
