"""Describes transactions that keep paths locked or wait for clean-up, for operators (P6, P9, P20)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from fennflow.backends import Intent, JournaledTransaction, Outcome, Placement

if TYPE_CHECKING:
    from fennflow.backends import Backend

A_MOMENT = 1.0
"""Seconds between two checks: a transaction that is in both was not just about to finish."""
PAGE = 1000
NAMED = 3
SAME_BUT_LAST = 16
"""Ids that differ in their last digit alone."""


async def unfinished(backend: Backend) -> list[str]:
    """Describe the decided transactions that were not finished within a moment."""
    before = await _decided(backend)
    if not before:
        return []
    await asyncio.sleep(A_MOMENT)
    after = await _decided(backend)
    ids = {each.token.transaction_id for each in before}
    return [_described(each) for each in after if each.token.transaction_id in ids]


async def undecided(
    backend: Backend, period: float, waiting: Collection[str] = ()
) -> dict[str, str]:
    """Describe the transactions that have been undecided for a long time, or whose decision was cut off.

    Args:
        backend: the backend that has them.
        period: how many seconds count as a long time.
        waiting: ids of other transactions to describe if they are still undecided.

    Returns:
        the descriptions by id.
    """
    return {
        each.token.transaction_id: _described(each)
        for each in await _journaled(backend)
        if each.outcome is None
        and (
            each.age > period
            or each.token.transaction_id in waiting
            or (each.is_held and each.lease_left <= 0)
        )
    }


async def overdue(backend: Backend) -> list[str]:
    """Describe the late writes that are due and were not checked within a moment."""
    before = set(await backend.due_late_writes(after=None, limit=PAGE))
    if not before:
        return []
    await asyncio.sleep(A_MOMENT)
    after = await backend.due_late_writes(after=None, limit=PAGE)
    left = [f"{each.namespace}/{each.key}" for each in after if each in before]
    text = (
        f"{len(left)} late writes still have to be checked and deleted: {_named(left)}. "
        "UOW.recover(), or fennflow recover, says what the store refuses (rule P20)."
    )
    return [text] if left else []


async def holder(backend: Backend, transaction_id: str) -> str | None:
    """Describe the transaction that holds a lock; None if it has ended by now."""
    near = await backend.transactions(after=transaction_id[:-1], limit=SAME_BUT_LAST)
    found = [each for each in near if each.token.transaction_id == transaction_id]
    if not found:
        return None
    [held] = found
    if held.lease_left > 0:
        lease = (
            f"Its process is alive, or was alive recently: its lease ends in {held.lease_left:.0f} s. If it was "
            "killed, try again after that: the next writer undoes the transaction. With a lock_timeout "
            "above lease_ttl a call waits for that by itself"
        )
    else:
        lease = "Its process has not renewed its lease, so recovery takes it over"
    return f"{_described(held)} {lease}."


async def _decided(backend: Backend) -> Sequence[JournaledTransaction]:
    return [each for each in await _journaled(backend) if each.outcome is not None]


async def _journaled(backend: Backend) -> Sequence[JournaledTransaction]:
    journaled: list[JournaledTransaction] = []
    last = ""
    while page := await backend.transactions(after=last, limit=PAGE):
        last = page[-1].token.transaction_id
        journaled += page
    return journaled


def _described(transaction: JournaledTransaction) -> str:
    named = _named([str(each.object_key) for each in transaction.intents])
    name = f"Transaction {transaction.token.transaction_id}"
    if transaction.is_held:
        return (
            f"{name} is held: {named}. These paths stay locked until it is committed or undone, or for "
            f"{transaction.held_left:.0f} s more. Decide it with fennflow transactions commit or abort."
        )
    if transaction.process is not None:
        name = f"{name} of process {transaction.process}"
    if transaction.outcome is None:
        calls = _named([_call(each) for each in transaction.intents])
        return (
            f"{name} has been open for {transaction.age:.0f} s: {calls}. Until its block ends, and the "
            "database transaction that it joined, if any, these paths stay locked. If its "
            "process hangs or is stopped, end that process; if it is gone, recovery undoes the transaction."
        )
    is_what = (
        "committed, and not applied completely"
        if transaction.outcome is Outcome.COMMITTED
        else "rolled back, and not undone completely"
    )
    return (
        f"{name} is {is_what} yet: {named}. Until the store accepts its requests these paths stay "
        "locked. If that takes long, the log says what the store refuses (rule P9)."
    )


def _call(intent: Intent) -> str:
    verb = "delete" if intent.placement is Placement.DELETE else "write"
    return f"{verb} {intent.object_key}"


def _named(paths: Sequence[str]) -> str:
    more = " …" if len(paths) > NAMED else ""
    return f"{', '.join(dict.fromkeys(paths[:NAMED]))}{more}" or "no path is left"
