"""Finishing a session: its steps batch by batch, each noted in the journal when it is done.

Whoever holds the session's token may finish it, any number of times (P7). Nothing that is noted is
done again: the records that were moved, the keys that were released (P9, P28).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable

from fennflow.backends import ObjectKey, Step, Tombstone
from fennflow.engine.settle import Settler, batches_of

KEYS_AT_ONCE = 1000
"""Keys that are finished, and released, together."""


async def finish(
    settler: Settler,
    steps: Iterable[Step],
    tombstones: Collection[Tombstone] = (),
    *,
    keys: Iterable[ObjectKey] = (),
    buried: Collection[Tombstone] = (),
) -> None:
    """Perform all steps, release their keys, and remove the session from the journal.

    Args:
        settler: a new one, of the session.
        steps: of apply or compensation.
        tombstones: to leave.
        keys: others that the session holds, for which nothing is to be done.
        buried: tombstones to remove.

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
        gone = {each for each in buried if whole or _key_of(each) in done}
        await settler.parts.backend.settle(
            settler.lease.token,
            keys=None if whole else done,
            tombstones=tombstones,
            keep_locked=settler.progress.in_doubt & done,
            buried=gone,
        )
        settler.progress.in_doubt -= done
        tombstones, buried = (), [each for each in buried if each not in gone]
    settler.raise_failures()
    settler.parts.leases.release(settler.lease)


def _in_order(settler: Settler, keys: Iterable[ObjectKey]) -> list[ObjectKey]:
    """Return keys in the order in which they are finished: those that failed before come last."""
    shuffled = sorted(keys)
    if settler.claimed:
        random.shuffle(shuffled)  # nobody knows which ones failed before
    return sorted(shuffled, key=lambda key: settler.progress.failures[key])


def _key_of(tombstone: Tombstone) -> ObjectKey:
    return ObjectKey(tombstone.namespace, tombstone.key)
