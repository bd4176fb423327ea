"""Finishing a transaction: its steps batch by batch, each noted in the journal when it is done.

The owner of the transaction's token may finish it, any number of times (P7). Nothing that is noted is
done again: the records that were moved, the keys that were released (P9, P28).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable

from fennflow.backends import LateWrite, ObjectKey, Settlement, Step
from fennflow.engine.settle import Settler, batches_of

KEYS_AT_ONCE = 1000
"""Keys that are finished, and released, together."""


async def finish(
    settler: Settler,
    steps: Iterable[Step],
    late_writes: Collection[LateWrite] = (),
    *,
    keys: Iterable[ObjectKey] = (),
    late_writes_checked: Collection[LateWrite] = (),
) -> None:
    """Perform all steps, release their keys, and remove the transaction from the journal.

    Args:
        settler: a new one, of the transaction.
        steps: of apply or compensation.
        late_writes: to leave.
        keys: others that the transaction holds, for which nothing is to be done.
        late_writes_checked: late writes to remove.

    Raises:
        FennFlowException: steps of some keys failed. These keys stay in the journal, all others
            are released (P9).
    """
    by_key: dict[ObjectKey, list[Step]] = {key: [] for key in keys}
    for step in steps:
        by_key.setdefault(step.object_key, []).append(step)
    batches = list(batches_of(_in_order(settler, by_key), KEYS_AT_ONCE)) or [[]]
    for batch in batches:
        await settler.attempt([step for key in batch for step in by_key[key]])
        done = {key for key in batch if key not in settler.failed}
        whole = batch is batches[-1] and not settler.failed
        if not (whole or done):
            continue
        gone = {each for each in late_writes_checked if whole or _key_of(each) in done}
        await settler.context.backend.settle(
            settler.lease.token,
            Settlement(
                keys=None if whole else done,
                late_writes=late_writes,
                keep_locked=settler.progress.keys_in_flight & done,
                late_writes_checked=gone,
            ),
        )
        settler.progress.keys_in_flight -= done
        late_writes, late_writes_checked = (
            (),
            [each for each in late_writes_checked if each not in gone],
        )
    settler.raise_failures()
    settler.context.leases.release(settler.lease)


def _in_order(settler: Settler, keys: Iterable[ObjectKey]) -> list[ObjectKey]:
    """Return keys in the order in which they are finished: those that failed before come last."""
    shuffled = sorted(keys)
    if settler.claimed:
        random.shuffle(shuffled)  # it is not known which ones failed before
    return sorted(shuffled, key=lambda key: settler.progress.failures[key])


def _key_of(late_write: LateWrite) -> ObjectKey:
    return ObjectKey(late_write.namespace, late_write.key)
