"""How many objects of a bucket the last reconciliation could not record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from fennflow.exceptions import CatalogDivergedException
from fennflow.reports import Difference

if TYPE_CHECKING:
    from fennflow.backends import Area
    from fennflow.engine.context import EngineContext

HIDING = (Difference.UNLISTED, Difference.REFUSED, Difference.UNREADABLE)
"""The differences that keep objects out of the catalog, whatever the settings."""
_HIDDEN = TypeAdapter(dict[Difference, NonNegativeInt])


async def note_hidden(
    context: EngineContext, area: Area, differences: Mapping[Difference, int]
) -> None:
    """Store how many objects of an area a comparison could not record."""
    found = {kind: differences[kind] for kind in HIDING if differences.get(kind)}
    text = json.dumps(found)
    if text != (await context.backend.note(_name(context, area)) or "{}"):
        await context.backend.keep_note(_name(context, area), text)


async def hidden_in(context: EngineContext, area: Area) -> Mapping[Difference, int]:
    """Return how many objects of an area the last comparison could not record.

    Raises:
        CatalogDivergedException: something other than FennFlow wrote the number.
    """
    kept = await context.backend.note(_name(context, area))
    try:
        return _HIDDEN.validate_json(kept or "{}")
    except ValidationError:
        message = (
            f"The result of the last comparison with {area} was changed by something other than "
            "FennFlow. Nothing was changed. Reconcile the catalog, which notes it again."
        )
        raise CatalogDivergedException(message) from None


def _name(context: EngineContext, area: Area) -> str:
    text = json.dumps([context.connector.store_id, *area])
    return f"hidden:{hashlib.sha256(text.encode()).hexdigest()[:32]}"
