"""Copies and moves inside a transaction: the store copies the bytes, the catalog changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fennflow.backends import ObjectKey, Placement, Record
from fennflow.engine.details import with_details
from fennflow.engine.directories import check_directories
from fennflow.engine.plan import Write, choose_placement, visible
from fennflow.engine.transaction import Transaction, no_such_key
from fennflow.engine.writing import Sending, Upload, check_beside
from fennflow.exceptions import (
    BaseConnectorException,
    FilepathsCollisionError,
    NoSuchKeyException,
    ObjectChangedException,
    PreconditionFailedException,
)
from fennflow.paths import check_key

COPY_ATTEMPTS = 3


async def copy(
    tx: Transaction, source: ObjectKey, target: ObjectKey, extra: Mapping[str, Any], *, move: bool
) -> Record:
    """Copy the object that the transaction sees under a key inside the store, and replace the target.

    Args:
        tx: the transaction.
        source: the key to copy.
        target: the key to copy to; it may be in another namespace.
        extra: the user's `connector_extra` for the target.
        move: delete the source at the commit, too.

    Raises:
        NoSuchKeyException: the source does not exist.
        FilepathsCollisionError: source and target are one key.
        RecordLockedException: another transaction is writing the target, or the source of a move.
        ObjectChangedException: the source was changed outside FennFlow.
    """
    for key in (source, target):
        check_key(key.key, reserved_prefix=tx.config.reserved_prefix)
    if source == target:
        message = f"Source and target are both {source}. Choose another target."
        raise FilepathsCollisionError(message)
    check_beside(tx, target.namespace, _draft(target, None, extra))
    moved: BaseConnectorException | None = None
    for _ in range(COPY_ATTEMPTS):
        # A move locks its source. A copy does not, so it checks afterwards that the source had the
        # same record all the time (P29).
        with tx.scope() as attempt:
            seqs, record = await _stage_copy(tx, source, target, move=move)
            try:
                [record] = await with_details(tx, [record])
                copied = await Sending(tx, seqs[0], _draft(target, record, extra)).send()
                if move or await _is_same(tx, source, record):
                    return copied
            except (NoSuchKeyException, PreconditionFailedException) as error:
                moved = error
            except BaseException:
                tx.rewind(attempt)
                raise
        tx.rewind(attempt)
    message = (
        f"{source.namespace}/{source.key} differs from its record in the catalog, or changes faster "
        "than it can be copied. Try again, put it again, or reconcile the catalog with the bucket."
    )
    raise ObjectChangedException(message) from moved


async def _is_same(tx: Transaction, source: ObjectKey, record: Record) -> bool:
    """Return whether the source is unchanged since it was copied."""
    [now] = await tx.read_records(source.namespace, [source.key], missing_ok=True)
    return now is not None and (now.write, now.etag) == (record.write, record.etag)


async def _stage_copy(
    tx: Transaction, source: ObjectKey, target: ObjectKey, *, move: bool
) -> tuple[list[int], Record]:
    """Journal the intents of a copy or a move, the target's first; return the source's record."""
    capabilities = await tx.capabilities_for(target.namespace)
    await check_directories(tx, target.namespace, [target.key])
    seen: list[Record | None] = []
    if move:
        await tx.capabilities_for(source.namespace)
    else:
        seen = await tx.read_records(source.namespace, [source.key], missing_ok=False)

    def place(key: ObjectKey, before: Record | None, chain: Sequence[Write]) -> Placement:
        if key == source:
            return Placement.DELETE
        return choose_placement(
            before,
            written=bool(chain),
            # A copy that must not overwrite needs the condition on copies, not on PUTs.
            capabilities=replace(capabilities, conditional_create=capabilities.conditional_copy),
            hide_pending=tx.config.hide_pending,
        )

    def check(records: Mapping[ObjectKey, Record]) -> None:
        if move:
            seen[:] = [visible(tx.chain(source), records.get(source))]
            if seen == [None]:
                raise no_such_key(source.namespace, [source.key])

    seqs = await tx.begin_writes([target, source] if move else [target], place, check)
    [record] = [record for record in seen if record is not None]
    return seqs, record


def _draft(target: ObjectKey, record: Record | None, extra: Mapping[str, Any]) -> Upload:
    """Return the upload that copies a record; without one, what can be checked before any I/O."""
    return Upload(
        key=target.key,
        body=b"" if record is None else record,
        sha256=None if record is None else record.sha256,
        media_type="application/octet-stream" if record is None else record.media_type,
        content_type=None if record is None else record.content_type,
        metadata={} if record is None else record.metadata,
        extra=extra,
    )
