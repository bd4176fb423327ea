"""Listings of obstore: which names are asked for, and how many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from fennflow.exceptions import IncompleteListingException
from fennflow_obstore import listing


async def test_names_that_a_store_may_have_made_up_are_asked_for_some_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only those that are listed; the order stays, and one that is not there hides its directory."""
    names = [f"{folder}/{number:02}\ufffd" for folder in "abcd" for number in range(30)]
    asked: list[str] = []
    active = most = 0

    async def pages(*_: object, **__: object) -> AsyncGenerator[list[dict[str, Any]]]:
        yield [{"path": each, "size": 1} for each in names]

    async def head(_: object, path: str) -> dict[str, Any]:
        nonlocal active, most
        asked.append(path)
        active += 1
        most = max(most, active)
        await asyncio.sleep(0)
        active -= 1
        if path.startswith("c"):
            raise FileNotFoundError
        return {"path": path, "size": 1}

    monkeypatch.setattr(listing, "obstore", SimpleNamespace(list=pages, head_async=head))
    monkeypatch.setattr(listing, "LISTED_AT_ONCE", 25)
    found: list[str] = []
    store: Any = None
    with pytest.raises(IncompleteListingException) as caught:
        async for path, _meta in listing.listed(store, "", names[29]):
            found.append(path)
    assert found == names[30:60] + names[90:]
    assert caught.value.prefixes == ("c/",)
    assert (most, len(asked)) == (listing.ASKED_AT_ONCE, 90)
    assert [path async for path, _meta in listing.listed(store, "d/2", "")] == names[-10:]
