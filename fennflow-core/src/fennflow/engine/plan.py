"""Decides what a transaction does: pure functions on frozen values, without I/O.

The transaction keeps a chain of writes for every key. The last write that is done and not retracted is
live: the transaction sees it, and the pivot commits it. All other writes are garbage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fennflow.backends import (
    AbortUpload,
    Commit,
    Copy,
    Decision,
    Delete,
    Intent,
    LateWrite,
    ObjectKey,
    Outcome,
    Placement,
    Record,
    Step,
    WriteId,
)
from fennflow.connectors import Capabilities, Location
from fennflow.paths import StoragePath
from fennflow.reports import Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """The state of one write or deletion of one key in a transaction.

    Args:
        intent: its intent in the journal.
        before: the committed record of the key; the lock keeps it unchanged.
        sent: whether a request may have changed the bucket.
        ambiguous: whether an attempt's answer was lost (P19, P20).
        record: the record that the pivot will commit; None until the store has confirmed the bytes.
        retracted: whether the call that made it failed (P8).
        extra: the `connector_extra` with which it is written.
        discards: the upload from which its bytes were copied; the commit deletes it.
    """

    intent: Intent
    before: Record | None = None
    sent: bool = False
    ambiguous: bool = False
    record: Record | None = None
    retracted: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    discards: Sequence[Delete] = ()


def staging_key(reserved_prefix: str, catalog_id: str, write: WriteId) -> str:
    """Return where a staged write puts its bytes (P10)."""
    return f"{reserved_prefix}/{catalog_id}/{write.transaction_id}/{write.seq}"


def choose_placement(
    before: Record | None,
    *,
    written: bool,
    capabilities: Capabilities,
    hide_pending: bool,
) -> Placement:
    """Return where the bytes of a write go before the pivot (protocol, Placements).

    Args:
        before: the committed record of the key.
        written: whether this transaction or another writer may have put an object at the key.
        capabilities: of the namespace.
        hide_pending: the user's setting.
    """
    if capabilities.versioned and (before is None or before.location.version_id is not None):
        return Placement.VERSIONED
    # In a versioned bucket an object from before the versioning has no version id: a new version
    # would hide it from readers that follow its record, so the next write of the key is staged.
    if before is None and not written and capabilities.conditional_create and not hide_pending:
        return Placement.DIRECT
    return Placement.STAGED


def live(chain: Sequence[Write]) -> Write | None:
    """Return the live write of a key, if any; an unfinished write does not count yet."""
    for write in reversed(chain):
        done = write.record is not None or write.intent.placement is Placement.DELETE
        if done and not write.retracted:
            return write
    return None


def visible(chain: Sequence[Write], committed: Record | None) -> Record | None:
    """Return what the transaction sees under a key: its own change or else the committed record (P12)."""
    write = live(chain)
    return committed if write is None else write.record


def changes_of(chains: Iterable[Sequence[Write]]) -> list[Change]:
    """Return the resulting change of each key, given its writes, oldest first."""
    changes: list[Change] = []
    for chain in chains:
        write = live(chain)
        if write is not None and (write.before is not None or write.record is not None):
            changes.append(change_of(write.intent.object_key, write.before, write.record))
    return in_order(changes)


def held_changes(commit: Commit, before: Mapping[ObjectKey, Record]) -> list[Change]:
    """Return the changes of a pivot, given the records of its locked keys."""
    changes = [
        change_of(each.object_key, before.get(each.object_key), each) for each in commit.records
    ]
    return in_order([*changes, *(change_of(key, before.get(key), None) for key in commit.removed)])


def in_order(changes: Iterable[Change]) -> list[Change]:
    """Sort changes by bucket and path."""
    return sorted(changes, key=lambda each: (each.namespace, str(each.path)))


def change_of(key: ObjectKey, before: Record | None, after: Record | None) -> Change:
    """Return the change of a key whose record is replaced or removed."""
    kind: Literal["create", "overwrite", "delete"] = "overwrite"
    if before is None or after is None:
        kind = "create" if after is not None else "delete"
    return Change(
        namespace=key.namespace,
        path=StoragePath(key.key),
        kind=kind,
        size=None if after is None else after.size,
        sha256=None if after is None else after.sha256,
        media_type=None if after is None else after.media_type,
        old_size=None if before is None else before.size,
        old_sha256=None if before is None else before.sha256,
    )


def plan_compensation(
    transaction_id: str, writes: Iterable[Write], capabilities: Mapping[str, Capabilities]
) -> list[Step]:
    """Return the steps that remove every trace of a transaction's writes, and nothing else (P18).

    A write whose answer was lost counts as done (P19).
    """
    steps: list[Step] = []
    for write in writes:
        intent, record = write.intent, write.record
        for_key = None if intent.target == intent.key else intent.key
        if intent.upload_id is not None and record is None:
            steps.append(
                AbortUpload(
                    namespace=intent.namespace,
                    key=intent.target,
                    upload_id=intent.upload_id,
                    for_key=for_key,
                )
            )
        if intent.placement is Placement.DELETE or not write.sent:
            continue
        location = Location(intent.target) if record is None else record.location
        # A version id or a staging key names only this transaction's object. For a staging key in a
        # versioned bucket, the version has to be found first.
        version = location.version_id is not None
        staged = intent.placement is Placement.STAGED
        unique = staged and not version and not capabilities[intent.namespace].versioned
        steps.append(
            Delete(
                namespace=intent.namespace,
                location=location,
                etag=None if unique or version or record is None else record.etag,
                owner=None if unique else WriteId(transaction_id, intent.seq),
                for_key=for_key,
            )
        )
    return steps


def outstanding(decision: Decision, compensation: Iterable[Step]) -> list[Step]:
    """Return the remaining steps of a transaction: those of the keys that it still holds (P7).

    Args:
        decision: the state of the transaction in the journal.
        compensation: the steps that undo all of it, used if it was aborted.
    """
    committed = decision.outcome is Outcome.COMMITTED
    held = frozenset(decision.keys)
    steps = decision.steps if committed else compensation
    return [] if decision.finished else [step for step in steps if step.object_key in held]


def late_writes(transaction_id: str, writes: Iterable[Write]) -> list[LateWrite]:
    """Return the keys at which a late request may still create an object of the transaction (P20 a)."""
    return [
        LateWrite(
            namespace=write.intent.namespace,
            key=write.intent.target,
            write=WriteId(transaction_id, write.intent.seq),
        )
        for write in writes
        if write.ambiguous
    ]


def plan_commit(
    transaction_id: str,
    chains: Mapping[ObjectKey, Sequence[Write]],
    capabilities: Mapping[str, Capabilities],
    reads: Mapping[ObjectKey, Record | None],
    *,
    keep_versions: bool = True,
) -> Commit:
    """Return the contents of the pivot, including the steps of apply (P4, P28).

    Args:
        transaction_id: of the transaction.
        chains: its writes of each key, oldest first.
        capabilities: of the namespaces.
        reads: the reads that the pivot has to check.
        keep_versions: whether to keep versions that it replaces or deletes.
    """
    records: list[Record] = []
    removed: list[ObjectKey] = []
    steps: list[Step] = []
    for key, chain in chains.items():
        alive = live(chain)
        garbage = [write for write in chain if write is not alive]
        if alive is not None and alive.intent.placement is Placement.DELETE:
            if alive.before is not None:
                removed.append(key)
            gone = alive.before or _adopted(chain)
            if gone is not None:
                # A delete marker destroys nothing, and the transaction's own versions may be newer
                # than the record's.
                versioned = capabilities[key.namespace].versioned
                etag = None if versioned else gone.etag
                steps.append(Delete(namespace=key.namespace, location=Location(key.key), etag=etag))
        elif alive is not None and alive.record is not None:
            records.append(alive.record)
            steps += alive.discards
            if alive.intent.placement is Placement.STAGED:
                replaced = [w for w in garbage if w.intent.placement is Placement.DIRECT]
                garbage = [w for w in garbage if w.intent.placement is not Placement.DIRECT]
                own = capabilities[key.namespace]
                steps += _move(transaction_id, alive, alive.record, replaced, own)
        steps += plan_compensation(transaction_id, garbage, capabilities)
        replaced_version = None if alive is None or alive.before is None else alive.before.location
        if replaced_version is not None and replaced_version.version_id and not keep_versions:
            steps.append(Delete(namespace=key.namespace, location=replaced_version))
    every = [write for chain in chains.values() for write in chain]
    return Commit(
        records=records,
        removed=removed,
        steps=steps,
        late_writes=late_writes(transaction_id, every),
        reads=reads,
    )


def _adopted(chain: Iterable[Write]) -> Record | None:
    """Return the record of a foreign object that the transaction has adopted."""
    adopted = (each.record for each in chain if not (each.sent or each.retracted))
    return next((record for record in adopted if record is not None), None)


def _move(
    transaction_id: str,
    write: Write,
    record: Record,
    replaced: Sequence[Write],
    capabilities: Capabilities,
) -> list[Step]:
    """Return the steps that copy staged bytes to their key, over earlier writes of the transaction."""
    known = [w.record.etag for w in replaced if w.record is not None]
    if write.before is not None:
        known.append(write.before.etag)
    copy = Copy(
        seq=write.intent.seq,
        namespace=record.namespace,
        key=record.key,
        source=record.location,
        expected=known[0] if known else None,
        ambiguous=write.ambiguous,
        extra=write.extra,
    )
    return [copy, *plan_compensation(transaction_id, [write], {record.namespace: capabilities})]
