"""Objects that were uploaded without FennFlow, and are recorded by a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fennflow.backends import ObjectKey, Placement, Record
from fennflow.engine.concurrency import run_all
from fennflow.engine.details import check_catalog
from fennflow.engine.differences import Policy, judge
from fennflow.engine.directories import check_directories
from fennflow.engine.plan import Write, visible
from fennflow.engine.transaction import Transaction, no_such_key
from fennflow.engine.writing import head
from fennflow.exceptions import ObjectChangedException, RecordAlreadyExistsException
from fennflow.paths import check_key


async def adopt(tx: Transaction, namespace: str, keys: Sequence[str]) -> Sequence[Record]:
    """Record the objects of keys that have no record, all or none (P8).

    Nothing is sent to the store but questions, so nothing is undone there.

    Raises:
        NoSuchKeyException: some keys have no object; names them all.
        RecordAlreadyExistsException: a key has a record, or its object belongs to another catalog.
        RecordLockedException: another transaction is writing one of the keys.
        ObjectChangedException: a transaction that did not commit has written an object.
    """
    for key in keys:
        check_key(key, reserved_prefix=tx.config.reserved_prefix)
    wanted = list(dict.fromkeys(ObjectKey(namespace, key) for key in keys))
    if not wanted:
        return []
    capabilities = await tx.capabilities_for(namespace)
    await check_directories(tx, namespace, [each.key for each in wanted])

    def place(key: ObjectKey, before: Record | None, chain: Sequence[Write]) -> Placement:
        if before is not None or visible(chain, before) is not None:
            message = (
                f"{key.namespace}/{key.key} is in the catalog already. The call was rolled back. "
                "To bring its record up to date, reconcile the catalog with the bucket."
            )
            raise RecordAlreadyExistsException(message)
        return Placement.VERSIONED if capabilities.versioned else Placement.DIRECT

    seqs = await tx.begin_writes(wanted, place)
    try:
        found = await run_all(tx.config.max_concurrency, partial(_judged, tx), seqs)
    except BaseException:
        tx.retract(seqs)
        raise
    records = {record.key: record for record in found if record is not None}
    missing = [each.key for each in wanted if each.key not in records]
    if missing:
        tx.retract(seqs)
        raise no_such_key(namespace, missing)
    for seq in seqs:
        tx.update(seq, record=records[tx.writes[seq].intent.key])
    return [records[key] for key in keys]


async def _judged(tx: Transaction, seq: int) -> Record | None:
    """Return the record of the object at a key; None if there is no object."""
    key = tx.writes[seq].intent.object_key
    stored = await head(tx, key)
    if stored is None:
        return None
    check_catalog(tx, key, stored)
    policy = Policy(
        settings=tx.config.reconcile.model_copy(
            update={"strategy": "insert_missing", "orphans": "report"}
        ),
        filling=False,
        dead_before=0.0,
        transaction_id=tx.transaction_id,
        catalog_id=tx.backend.catalog_id,
    )
    late_writes = await tx.backend.late_writes([key])
    verdict = judge(key, stored, None, policy, seq=seq, late_writes=late_writes)
    if verdict is None or verdict.record is None:
        message = (
            f"{key.namespace}/{key.key} has the stamp of a transaction that did not commit, so it is "
            "not an upload of others. The call was rolled back. Upload it under another name."
        )
        raise ObjectChangedException(message)
    return verdict.record
