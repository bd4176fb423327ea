"""Sessions that are decided and not finished: what an operator has to know of (P9)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fennflow.backends import JournaledSession, Outcome

if TYPE_CHECKING:
    from fennflow.backends import Backend

A_MOMENT = 1.0
"""Seconds between two looks: a session that is in both did not just happen to be finishing."""
PAGE = 1000
NAMED = 3
SAME_BUT_LAST = 16
"""Ids that differ in their last digit alone."""


async def unfinished(backend: Backend) -> list[str]:
    """Describe the sessions that are decided, and were not finished within a moment."""
    before = await _decided(backend)
    if not before:
        return []
    await asyncio.sleep(A_MOMENT)
    after = await _decided(backend)
    ids = {each.session.session_id for each in before}
    return [_described(each) for each in after if each.session.session_id in ids]


async def holder(backend: Backend, session_id: str) -> str | None:
    """Describe the session that holds a lock, if it is decided."""
    near = await backend.sessions(after=session_id[:-1], limit=SAME_BUT_LAST)
    found = [each for each in near if each.session.session_id == session_id and each.outcome]
    return _described(found[0]) if found else None


async def _decided(backend: Backend) -> Sequence[JournaledSession]:
    decided: list[JournaledSession] = []
    last = ""
    while page := await backend.sessions(after=last, limit=PAGE):
        last = page[-1].session.session_id
        decided += [each for each in page if each.outcome is not None]
    return decided


def _described(session: JournaledSession) -> str:
    paths = [f"{each.namespace}/{each.key}" for each in session.intents]
    named = ", ".join(dict.fromkeys(paths[:NAMED])) + (" …" if len(paths) > NAMED else "")
    is_what = (
        "committed, and not applied completely"
        if session.outcome is Outcome.COMMITTED
        else "rolled back, and not undone completely"
    )
    return (
        f"Session {session.session.session_id} is {is_what} yet: {named or 'no path is left'}. "
        "Until the store takes its requests these paths stay locked. If that takes long, the log "
        "says what the store refuses (rule P9)."
    )
