"""Metadata in headers: metadata that FennFlow did not write causes no errors."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest

from fennflow.backends import WriteId
from fennflow.connectors import Location, StoredObject
from fennflow.connectors.metadata import ENCODED, decode
from fennflow.engine.stamps import Stamp, stamp_of, stamped


@pytest.mark.parametrize(
    "body", [b"[" * 1400, b'{"a":"\\ud800"}', b'{"\\udfff":"a"}', b"[1]", b"1" * 5000, b"\xff"]
)
def test_what_strangers_write_in_our_place_is_ignored(body: bytes) -> None:
    """Reconciliation reads the metadata of all objects of a bucket."""
    text = base64.urlsafe_b64encode(body).decode()
    assert decode({ENCODED: text, "Kept": "value"}) == {"kept": "value"}


@pytest.mark.parametrize("text", ["no base64", "ü", "===="])
def test_invalid_base64_is_ignored(text: str) -> None:
    assert decode({ENCODED: text}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("seq", each)
            for each in ("0", "-1", "+1", "01", "1.0", "1_0", "\u0661", f"{2**63}", "x", "")
        ),
        *(("transaction", each) for each in ("", "x", "{0189}", "0" * 32, "../x")),
        *(("catalog", each) for each in ("", "a/b", "a b", "ü", "x" * 129)),
    ],
)
def test_what_is_not_exactly_as_fennflow_writes_it_is_not_a_stamp(name: str, value: str) -> None:
    stamp = Stamp(WriteId("01890000-0000-7000-8000-000000000000", 1), catalog_id="c")
    metadata = stamped({}, stamp)
    stored = StoredObject(location=Location("a"), etag="e", size=1, metadata=metadata)
    assert stamp_of(stored) == stamp
    assert stamp_of(replace(stored, metadata={**metadata, f"fennflow_{name}": value})) is None
