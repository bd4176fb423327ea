"""Reports of maintenance: how a catalog and its buckets differ, and what was done about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Literal

from fennflow.backends import Guarantees
from fennflow.connectors import Capabilities
from fennflow.paths import StoragePath

__all__ = [
    "CatalogInfo",
    "Change",
    "CommitInfo",
    "CommittedFile",
    "DeletedFile",
    "Diagnosis",
    "Difference",
    "Finding",
    "NamespaceDiagnosis",
    "ReconcileAction",
    "ReconcileReport",
    "RecoveryReport",
    "TransactionInfo",
]


class Difference(StrEnum):
    """How an object and its record differ."""

    UNKNOWN = "unknown"
    """An object without a record, which FennFlow did not write."""

    ORPHAN = "orphan"
    """An object without a record, which FennFlow wrote: its process died, or its catalog is lost."""

    MISSING = "missing"
    """A record without an object."""

    CHANGED = "changed"
    """An object with another ETag than its record has."""

    REFUSED = "refused"
    """An object whose key breaks FennFlow's key rules, so that no record can have it."""

    OTHER_CATALOG = "other_catalog"
    """An object that another catalog's unit of work wrote; it was left alone."""

    UNREADABLE = "unreadable"
    """An object that the store lists but does not describe, or not in valid HTTP and UTF-8."""

    UNLISTED = "unlisted"
    """A prefix below which the client could not list all objects; its records are checked one by one."""

    BUSY = "busy"
    """A key that a unit of work was writing; it was left alone."""


class ReconcileAction(StrEnum):
    """What reconciliation did."""

    INSERTED = "inserted"
    UPDATED = "updated"
    REMOVED = "removed"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference between a bucket and the catalog.

    Args:
        namespace: the bucket.
        path: in it.
        difference: what is wrong.
        action: what was done; None if it was only reported.
        catalog_id: of the catalog whose object it is, if it is another one.
        reason: why nothing could be done about it, if the difference and the settings do not
            explain it.
    """

    namespace: str
    path: StoragePath
    difference: Difference
    action: ReconcileAction | None = None
    catalog_id: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileReport:
    """How a reconciliation went.

    Args:
        objects: how many were listed.
        records: how many they were compared with.
        differences: how many of each kind were found; kinds that were not found are left out.
        actions: how many of each kind were taken.
        findings: at most a thousand, first those about which nothing was done; `on_finding` gets
            all of them.
    """

    objects: int = 0
    records: int = 0
    differences: Mapping[Difference, int] = field(default_factory=dict[Difference, int])
    actions: Mapping[ReconcileAction, int] = field(default_factory=dict[ReconcileAction, int])
    findings: Sequence[Finding] = ()

    @property
    def needs_attention(self) -> bool:
        """Whether there are differences about which nothing was done."""
        # Objects of another catalog need no attention.
        others = self.differences.get(Difference.OTHER_CATALOG, 0)
        return sum(self.differences.values()) - others > sum(self.actions.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What a recovery did.

    Args:
        rolled_forward: committed transactions that recovery has applied.
        compensated: uncommitted transactions that recovery has undone.
        pending: transactions that cannot be finished now, because of the store or of a database
            transaction that is still open.
        late_writes_checked: possible late writes that were checked and, if necessary, cleaned up.
        swept: objects under the reserved prefix that belonged to no transaction and were deleted.
        uploads: unfinished multipart uploads there that were aborted.
        jobs_called: compensations and hooks that were called and succeeded.
        jobs_pending: compensations and hooks that are due, but failed or were not called.
        problems: what was refused or unreachable and therefore skipped, and transactions that have
            been open for a long time.
    """

    rolled_forward: int = 0
    compensated: int = 0
    pending: int = 0
    late_writes_checked: int = 0
    swept: int = 0
    uploads: int = 0
    jobs_called: int = 0
    jobs_pending: int = 0
    problems: Sequence[str] = ()

    @property
    def needs_attention(self) -> bool:
        """Whether something was left for later."""
        return bool(self.pending or self.jobs_pending or self.problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a unit of work would do to one file.

    Args:
        namespace: the bucket.
        path: of the file in it.
        kind: `create`, `overwrite` or `delete`.
        size: of the new content in bytes; None for a deletion.
        sha256: of the new content; None for a deletion, or if the checksum is not known.
        media_type: of the new content.
        old_size: of the content that is committed; None if there is none.
        old_sha256: of the content that is committed; None if there is none.
    """

    namespace: str
    path: StoragePath
    kind: Literal["create", "overwrite", "delete"]
    size: int | None = None
    sha256: str | None = None
    media_type: str | None = None
    old_size: int | None = None
    old_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedFile:
    """A file as a unit of work committed it.

    Args:
        namespace: the bucket.
        path: of the file in it.
        size: in bytes.
        media_type: for instance `text/plain`; empty if the file was adopted, and not used before.
        sha256: hexadecimal; None if FennFlow did not write the object.
        created_at: when the path was first written, UTC.
        modified_at: when this content was written, UTC.
        metadata: the user's.
        headers: HTTP headers that are stored with the object, such as Content-Encoding.
    """

    namespace: str
    path: StoragePath
    size: int
    media_type: str
    sha256: str | None
    created_at: datetime
    modified_at: datetime
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedFile:
    """A file that a unit of work deleted.

    Args:
        namespace: the bucket.
        path: of the file in it.
    """

    namespace: str
    path: StoragePath


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitInfo:
    """What one transaction committed.

    Args:
        cursor: pass it to `UOW.commits(after=cursor)` to continue after this commit.
        transaction_id: of the transaction.
        committed_at: the time of the commit by the backend's clock, UTC.
        records: the files that it created or overwrote.
        deletions: the files that it deleted.
    """

    cursor: str
    transaction_id: str
    committed_at: datetime
    records: Sequence[CommittedFile] = ()
    deletions: Sequence[DeletedFile] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionInfo:
    """A transaction that is not finished.

    Args:
        transaction_id: its id.
        state: `open`, `held` (until it is committed or aborted by its id), `committed` (but not yet
            fully applied) or `aborted` (but not yet fully undone).
        age: seconds since its first intents.
        lease_left: seconds until other processes may take it over; negative if they may now.
        paths: what it writes or deletes, as `bucket/path`.
        changes: what it would change, if it is held.
        process: that began it or took it over last, as `host:pid`; None if the backend does not keep it.
    """

    transaction_id: str
    state: Literal["open", "held", "committed", "aborted"]
    age: float
    lease_left: float
    paths: Sequence[str]
    changes: Sequence[Change] = ()
    process: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogInfo:
    """A catalog that writes in a bucket, by the note that it left there.

    Args:
        catalog_id: its id, which is in the stamps of its objects.
        since: a time not after its first write there, by the store's clock.
        last_used: when it last wrote there, to within a day.
        program: name of the program.
        host: name of the machine.
        prefixes: of the keys that its repository fields can have; an empty one for all keys.
        own: whether it is this process's own catalog.
    """

    catalog_id: str
    since: datetime
    last_used: datetime
    program: str = "?"
    host: str = "?"
    prefixes: Sequence[str] = ("",)
    own: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceDiagnosis:
    """The result of the checks on a bucket.

    Args:
        capabilities: what it enforces; None if it could not be reached.
        keeps_stamps: whether the store keeps the metadata by which FennFlow recognises its objects.
        latency: seconds that a small request took.
        clock_skew: seconds that the store's clock is ahead of this machine's; None if it does
            not report it.
        error: what went wrong; None if nothing did.
        unswept: why leftovers under the reserved prefix cannot be listed; None if they can.
        lists_uploads: whether the store has a listing of unfinished multipart uploads.
        catalogs: that write in it, the oldest first.
        rules: names of lifecycle rules of the bucket that delete or archive what is under the
            reserved prefix.
        rules_unread: why the lifecycle rules cannot be read; None if they can, or if the connector
            does not support them.
        aborts_uploads: whether a lifecycle rule aborts unfinished multipart uploads; None if that
            is not known.
    """

    capabilities: Capabilities | None = None
    keeps_stamps: bool = False
    latency: float = 0.0
    clock_skew: float | None = None
    error: str | None = None
    unswept: str | None = None
    lists_uploads: bool = True
    catalogs: Sequence[CatalogInfo] = ()
    rules: Sequence[str] = ()
    rules_unread: str | None = None
    aborts_uploads: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What a configuration guarantees, as far as it could be determined.

    Args:
        guarantees: of the backend; None if it could not be reached.
        latency: seconds that a small query to the backend took.
        transactions: how many the journal holds.
        namespaces: by name.
        problems: what is wrong, and what to do; empty if nothing is.
        advice: what could be better.
    """

    guarantees: Guarantees | None = None
    latency: float = 0.0
    transactions: int = 0
    namespaces: Mapping[str, NamespaceDiagnosis] = field(
        default_factory=dict[str, NamespaceDiagnosis]
    )
    problems: Sequence[str] = ()
    advice: Sequence[str] = ()

    @property
    def needs_attention(self) -> bool:
        """Whether something is wrong."""
        return bool(self.problems)
