"""The values that a backend stores: records, intents, steps, late writes."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from typing_extensions import override

from fennflow.connectors.values import Location
from fennflow.exceptions import ConflictException, CursorException, RecordLockedException
from fennflow.printable import brief

_CURSOR = re.compile(r"[0-9]{1,18}\.[!-~]{0,200}")


class ObjectKey(NamedTuple):
    """The key of catalog rows and locks; sorts in the order that protocol P3 requires."""

    namespace: str
    key: str

    @override
    def __str__(self) -> str:
        return f"{self.namespace}/{self.key}"


class WriteId(NamedTuple):
    """Identifies a write: the id of its transaction, and its number in the transaction."""

    transaction_id: str
    seq: int


class Area(NamedTuple):
    """The keys of a namespace that begin with a prefix: the part that a repository field can see."""

    namespace: str
    prefix: str = ""

    def overlaps(self, other: Area) -> bool:
        """Return whether a key can be in both areas."""
        nested = self.prefix.startswith(other.prefix) or other.prefix.startswith(self.prefix)
        return self.namespace == other.namespace and nested

    @override
    def __str__(self) -> str:
        return f"{self.namespace}/{self.prefix}" if self.prefix else self.namespace


class Fill(NamedTuple):
    """The first reading of a bucket into a catalog that has no record of it.

    Attributes:
        area: the area that is read.
        fill_id: a UUIDv7, by which several processes recognise the same fill.
    """

    area: Area
    fill_id: str

    @property
    def hidden(self) -> str:
        """The namespace of its records until it is complete; no repository field can have it."""
        return f"{self.area.namespace}\x1f{self.area.prefix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FillPart:
    """One batch of a fill; it is stored as a whole or not at all.

    Args:
        records: the records to add; they replace earlier ones of the fill.
        removed: keys whose records are removed.
        begins: begin the fill, unless a fill of its area has begun or the area has a record.
    """

    records: Collection[Record]
    removed: Collection[str] = ()
    begins: bool = False


class Placement(StrEnum):
    """Where the bytes of a write go before the pivot (protocol, Placements)."""

    DIRECT = "direct"
    STAGED = "staged"
    VERSIONED = "versioned"
    DELETE = "delete"


class Outcome(StrEnum):
    """How a transaction was decided (P5)."""

    COMMITTED = "committed"
    ABORTED = "aborted"


class TransactionToken(NamedTuple):
    """A transaction's id (UUIDv7) and the fencing number of its owner."""

    transaction_id: str
    fence: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantees:
    """What a backend can promise (protocol, Guarantees by backend).

    Args:
        shared: the scope of isolation and atomicity: one process, the processes of one machine, or
            all processes in the network.
        durable: whether catalog and journal outlive the process, so that recovery can finish
            transactions after a crash.
    """

    shared: Literal["process", "machine", "network"] = "process"
    durable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A catalog row: what is committed under a key, and where its bytes are now.

    Args:
        namespace: the bucket.
        key: the key that users see.
        location: where the bytes are; it differs from `key` only between pivot and apply.
        etag: of the object at `location`.
        size: in bytes.
        media_type: for instance `text/plain`; empty if only the store's listing was read, which has
            no media type, metadata and headers.
        content_type: tag of the content type that wrote it; None if FennFlow did not write it.
        sha256: hexadecimal, of the bytes; None if FennFlow did not write them.
        metadata: the user's.
        headers: HTTP headers that are stored with the object, such as Content-Encoding.
        created_at: when the key was first committed, UTC.
        modified_at: when this content was written, UTC.
        write: the id of the write that made it.
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
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    created_at: datetime
    modified_at: datetime
    write: WriteId

    @property
    def object_key(self) -> ObjectKey:
        """The key in the catalog."""
        return ObjectKey(self.namespace, self.key)

    @property
    def only_listed(self) -> bool:
        """Whether its media type, metadata and headers are not known yet."""
        return not self.media_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """A journal row: this transaction is about to write or delete this key, here.

    Args:
        seq: numbers the intents of a transaction.
        namespace: the bucket.
        key: the key that users see.
        placement: where the bytes go.
        target: the key that the request names: `key`, or a staging key (P10).
        upload_id: of the current multipart upload.
    """

    seq: int
    namespace: str
    key: str
    placement: Placement
    target: str
    upload_id: str | None = None

    @property
    def object_key(self) -> ObjectKey:
        """The key that is locked."""
        return ObjectKey(self.namespace, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Apply: copy staged bytes to their key.

    Args:
        seq: the sequence of the write; the copy has it and the transaction's id in its metadata
            (P30).
        namespace: the bucket.
        key: the target.
        source: the staging key.
        expected: ETag of the object that the transaction knows at the key; None if there is none (P17).
        ambiguous: whether the response to the PUT of the source was lost (P20 c).
        extra: the `connector_extra` of the write, only JSON values.
    """

    seq: int
    namespace: str
    key: str
    source: Location
    expected: str | None
    ambiguous: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def object_key(self) -> ObjectKey:
        """The key that stays locked until this is done."""
        return ObjectKey(self.namespace, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Apply or compensation: delete an object.

    Args:
        namespace: the bucket.
        location: the object to delete.
        etag: the ETag of the object; None if it is not known.
        owner: the write that must have made the object (P18), or is known to have made this
            version; None if the name identifies it (a staging key), or for a committed `delete`.
        for_key: the key that users see, where `location` is another one: a staging key.
    """

    namespace: str
    location: Location
    etag: str | None = None
    owner: WriteId | None = None
    for_key: str | None = None

    @property
    def object_key(self) -> ObjectKey:
        """The key that stays locked until this is done."""
        return ObjectKey(self.namespace, self.for_key or self.location.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortUpload:
    """Compensation: end an unfinished multipart upload.

    Args:
        namespace: the bucket.
        key: the key of the upload.
        upload_id: the store's id of the upload.
        for_key: the key that users see, where `key` is another one: a staging key.
    """

    namespace: str
    key: str
    upload_id: str
    for_key: str | None = None

    @property
    def object_key(self) -> ObjectKey:
        """The key that stays locked until this is done."""
        return ObjectKey(self.namespace, self.for_key or self.key)


Step = Copy | Delete | AbortUpload


@dataclass(frozen=True, slots=True, kw_only=True)
class LateWrite:
    """A write that may still arrive: an object with its id is garbage (P20 a)."""

    namespace: str
    key: str
    write: WriteId


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A journaled call of a function that is registered by name: a compensation or a hook (P33).

    Args:
        transaction_id: the transaction that journaled it.
        number: numbers the jobs of a transaction.
        name: under which the function is registered.
        arguments: the arguments of the call, as JSON.
        after: the outcome of the transaction after which the function is called; None if it is
            called however the transaction ends, like the compensations of an undone savepoint.
        key: jobs with the same key are called one after the other; None for any order.
        attempts: how many calls have begun; fences each attempt (P35).
        error: why the last attempt failed.
    """

    transaction_id: str
    number: int
    name: str
    arguments: str
    after: Outcome | None
    key: str | None = None
    attempts: int = 0
    error: str | None = None

    @property
    def idempotency_key(self) -> str:
        """The same text for every attempt, and different for every job."""
        return f"{self.transaction_id}-{self.number}"

    def waits_for(self, other: Job) -> bool:
        """Whether this compensation is called only after another one: later steps come first.

        A compensation that has failed a few times does not delay others (P34).
        """
        return (
            self.transaction_id == other.transaction_id
            and self.number < other.number
            and other.attempts < ATTEMPTS_IN_ORDER
            and (other.after is None or self.after is not None)
        )


ATTEMPTS_IN_ORDER = 3
"""Attempts of a compensation for which those of earlier steps wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The contents of a pivot.

    Args:
        records: new and changed records.
        removed: keys whose records are removed.
        steps: the steps of apply; if there are none, the same database transaction finishes this
            one (P4).
        late_writes: ambiguous writes.
        reads: the record that the transaction saw under each key it read, None for no record; empty
            unless `validate_reads`.
        jobs: hooks to call after the commit (P36); empty unless the backend `keeps_jobs`.
    """

    records: Sequence[Record] = ()
    removed: Collection[ObjectKey] = ()
    steps: Sequence[Step] = ()
    late_writes: Collection[LateWrite] = ()
    reads: Mapping[ObjectKey, Record | None] = field(
        default_factory=dict[ObjectKey, "Record | None"]
    )
    jobs: Sequence[Job] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """The part of a transaction that is finished, and the rows that are kept of it (P6).

    Args:
        keys: the finished keys, if others are not finished yet: their locks and intents are
            removed, the transaction stays. None for the whole transaction.
        late_writes: writes that may still arrive; they are due after `late_write_period`.
        keep_locked: the finished keys that stay locked for `late_write_period` (P20 b, c).
        late_writes_checked: late writes that were due and have been checked; they are removed.
    """

    keys: Collection[ObjectKey] | None = None
    late_writes: Collection[LateWrite] = ()
    keep_locked: Collection[ObjectKey] = ()
    late_writes_checked: Collection[LateWrite] = ()


FINISHED = Settlement()
"""The whole transaction is finished, and nothing is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedTransaction:
    """An entry of the feed of commits: what a pivot wrote (P38).

    Args:
        cursor: of the entry: `Backend.commits(after=cursor)` continues after it. It has up to 18
            digits, a full stop, and up to 200 other ASCII characters without spaces.
        transaction_id: the id of the transaction.
        committed_at: when its pivot was written, by the backend's clock, UTC.
        records: new and changed records, as the pivot wrote them.
        removed: keys whose records were removed.
    """

    cursor: str
    transaction_id: str
    committed_at: datetime
    records: Sequence[Record]
    removed: Collection[ObjectKey]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a transaction was decided, and what is left to do (P5, P6).

    Args:
        outcome: the valid outcome.
        finished: whether the journal has no rows of the transaction. Then nothing more may be sent
            for it: others may have committed the same keys since.
        keys: the keys that the transaction still holds; released keys are finished.
        steps: the steps of apply, as the pivot stored them. Steps of keys that are not held are
            done.
    """

    outcome: Outcome
    finished: bool = False
    keys: Collection[ObjectKey] = ()
    steps: Sequence[Step] = ()


def changed_reads(
    reads: Mapping[ObjectKey, Record | None], now: Mapping[ObjectKey, Record]
) -> list[ObjectKey]:
    """Return the keys whose record is no longer the one that was read.

    Changes only of a location or of object details do not count.
    """

    def write_of(record: Record | None) -> WriteId | None:
        return None if record is None else record.write

    return [key for key, record in reads.items() if write_of(now.get(key)) != write_of(record)]


def process_name() -> str:
    """Return the name of this process for operators: `host:pid`."""
    return f"{socket.gethostname()}:{os.getpid()}"


def conflict(keys: Collection[ObjectKey]) -> ConflictException:
    """Return the error for records that changed after a transaction had read them."""
    names = ", ".join(map(str, sorted(keys)))
    message = (
        f"Changed by another transaction after this one had read them: {names}. Nothing was "
        "committed; run the unit of work again."
    )
    return ConflictException(message)


def locked(
    key: ObjectKey | None, free_in: float | None = None, holder: str | None = None
) -> RecordLockedException:
    """Return the error for a key that another transaction, or a late request of it, keeps locked.

    Args:
        key: the key; None if it was released before it could be named.
        free_in: seconds until it is free, if its transaction has ended (protocol P20).
        holder: the id of the transaction that holds it.
    """
    name = "A key of this call" if key is None else str(key)
    if free_in is None:
        message = f"{name} is being written by another transaction."
        return RecordLockedException(message, holder=holder)
    until = datetime.now(UTC) + timedelta(seconds=free_in)
    message = (
        f"{name} is locked until {until:%Y-%m-%d %H:%M:%S} UTC, {free_in:.0f} s from now "
        "(late_write_period): the response to a request of an earlier transaction was lost, and that "
        "request may still change the object."
    )
    return RecordLockedException(message, free_in=free_in)


def check_cursor(cursor: str) -> None:
    """Refuse a text that is not a cursor of any feed of commits, before a feed is read.

    Raises:
        CursorException: it is not a cursor.
    """
    if _CURSOR.fullmatch(cursor) is None:
        message = (
            f"{brief(cursor)} is not a cursor of the feed of commits. Pass the cursor of a commit, or one that "
            "UOW.commit_cursor() returned, unchanged. Without one the feed begins with the first commit "
            "that is kept. Nothing was sent."
        )
        raise CursorException(message)


def bad_cursor(cursor: str) -> CursorException:
    """Return the error for a cursor from which the feed of commits cannot continue (P38)."""
    message = (
        f"The feed of commits cannot continue from the cursor {brief(cursor)}: the commits after it are "
        "older than `commit_retention` and were removed, or the cursor is one of another catalog, or "
        "of this one before it was restored from a backup. Nothing was returned. Start over: take "
        "cursor = await UOW.commit_cursor(), then read all files, then continue with "
        "UOW.commits(after=cursor)."
    )
    return CursorException(message)


_STEPS: Mapping[str, type[Copy | Delete | AbortUpload]] = {
    "copy": Copy,
    "delete": Delete,
    "abort_upload": AbortUpload,
}


def dump_steps(steps: Sequence[Step]) -> str:
    """Return steps as JSON, for a backend that stores them as text."""
    names = {step: name for name, step in _STEPS.items()}
    # `asdict` would copy every value, and a commit of a thousand steps waits for this.
    return json.dumps(
        [{"do": names[type(step)], **_values(step)} for step in steps], default=_values
    )


def dump_commit(commit: Commit) -> str:
    """Return the contents of a pivot as JSON, for a backend that stores it as text."""
    return json.dumps(
        {
            "records": [_dump_record(each) for each in commit.records],
            "removed": list(commit.removed),
            "steps": dump_steps(commit.steps),
            "late_writes": [_values(each) for each in commit.late_writes],
            "reads": [
                (key, None if record is None else _dump_record(record))
                for key, record in commit.reads.items()
            ],
            "jobs": [_values(each) for each in commit.jobs],
        },
        default=_values,
    )


def load_commit(text: str) -> Commit:
    """Parse the output of `dump_commit`; the text can name no code to run."""
    stored = json.loads(text)
    return Commit(
        records=[_load_record(each) for each in stored["records"]],
        removed=[ObjectKey(*each) for each in stored["removed"]],
        steps=load_steps(stored["steps"]),
        late_writes=[_load_late_write(each) for each in stored["late_writes"]],
        reads={
            ObjectKey(*key): None if record is None else _load_record(record)
            for key, record in stored["reads"]
        },
        jobs=[_load_job(each) for each in stored["jobs"]],
    )


def _load_late_write(stored: dict[str, Any]) -> LateWrite:
    values: dict[str, Any] = {**stored, "write": WriteId(*stored["write"])}
    return LateWrite(**values)


def _load_job(stored: dict[str, Any]) -> Job:
    after: Any = stored["after"] and Outcome(stored["after"])
    return Job(**{**stored, "after": after})


_TIMES = ("created_at", "modified_at")


def _dump_record(record: Record) -> dict[str, Any]:
    times = {name: getattr(record, name).isoformat() for name in _TIMES}
    mappings = {"metadata": dict(record.metadata), "headers": dict(record.headers)}
    return {**_values(record), **times, **mappings}


def _load_record(stored: dict[str, Any]) -> Record:
    times = {name: datetime.fromisoformat(stored[name]) for name in _TIMES}
    parts = {"location": Location(**stored["location"]), "write": WriteId(*stored["write"])}
    values: dict[str, Any] = {**stored, **times, **parts}
    return Record(**values)


def _values(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}


def load_steps(text: str) -> list[Step]:
    """Parse the output of `dump_steps`; the text can name no code to run."""
    steps: list[Step] = []
    for each in json.loads(text):
        for name in ("source", "location"):
            if name in each:
                each[name] = Location(**each[name])
        if each.get("owner") is not None:
            each["owner"] = WriteId(*each["owner"])
        steps.append(_STEPS[each.pop("do")](**each))
    return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class JournaledTransaction:
    """A transaction in the journal.

    Args:
        token: its id, and the fence of its owner.
        outcome: how it was decided; None if it is undecided.
        age: seconds since its first intents.
        lease_left: seconds until its lease runs out; negative if it has.
        intents: its intents to write or delete.
        held: what its pivot will write, if it is held for another process to decide.
        held_left: seconds until recovery aborts it if it is not decided before.
        process: the process that began it or took it over last, as `process_name()` names it; None if the
            backend does not keep it.
    """

    token: TransactionToken
    outcome: Outcome | None
    age: float
    lease_left: float
    intents: Sequence[Intent]
    held: Commit | None = None
    held_left: float = 0.0
    process: str | None = None

    @property
    def is_held(self) -> bool:
        """Whether another process may commit or abort it (P37)."""
        return self.held is not None and self.held_left > 0 and self.outcome is None
