"""Objects that reconciliation could not record: how many there were when it last compared a bucket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fennflow.reports import Difference

if TYPE_CHECKING:
    from fennflow.backends import Area
    from fennflow.engine.context import EngineContext

HIDING = (Difference.UNLISTED, Difference.REFUSED, Difference.UNREADABLE)
"""What keeps objects out of the catalog, whatever the settings."""


async def note_hidden(
    context: EngineContext, area: Area, differences: Mapping[Difference, int]
) -> None:
    """Keep how many objects of an area a comparison could not record."""
    found = {kind: differences[kind] for kind in HIDING if differences.get(kind)}
    if found != await hidden_in(context, area):
        await context.backend.keep_note(_name(context, area), json.dumps(found))


async def hidden_in(context: EngineContext, area: Area) -> Mapping[Difference, int]:
    """Return how many objects of an area the last comparison could not record."""
    kept = await context.backend.note(_name(context, area))
    return {Difference(kind): count for kind, count in json.loads(kept or "{}").items()}


def _name(context: EngineContext, area: Area) -> str:
    text = json.dumps([context.connector.store_id, *area])
    return f"hidden:{hashlib.sha256(text.encode()).hexdigest()[:32]}"
