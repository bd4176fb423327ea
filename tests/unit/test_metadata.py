"""Metadata in headers: what FennFlow did not write is nothing to trip over."""

from __future__ import annotations

import base64

import pytest

from fennflow.connectors.metadata import ENCODED, decode


@pytest.mark.parametrize(
    "body", [b"[" * 1400, b'{"a":"\\ud800"}', b'{"\\udfff":"a"}', b"[1]", b"1" * 5000, b"\xff"]
)
def test_what_strangers_write_in_our_place_is_ignored(body: bytes) -> None:
    """Reconciliation reads the metadata of all objects of a bucket."""
    text = base64.urlsafe_b64encode(body).decode()
    assert decode({ENCODED: text, "Kept": "value"}) == {"kept": "value"}


@pytest.mark.parametrize("text", ["no base64", "ü", "===="])
def test_what_is_no_base64_is_ignored(text: str) -> None:
    assert decode({ENCODED: text}) == {}
