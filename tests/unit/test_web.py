"""What is answered to conditional and partial requests."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fennflow.paths import StoragePath
from fennflow.responses import ObjectInfo
from fennflow.web import answer_for

SHA256 = "ab" * 32
ETAG = f'"{SHA256}"'


def info_of(size: int) -> ObjectInfo:
    written = datetime(2026, 11, 26, 12, tzinfo=UTC)
    return ObjectInfo(
        path=StoragePath("a.txt"),
        size=size,
        media_type="text/plain",
        etag="moves",
        sha256=SHA256,
        created_at=written,
        modified_at=written,
        metadata={},
        version_id=None,
    )


@pytest.mark.parametrize(
    ("asked", "status", "start", "end"),
    [
        ({}, 200, 0, 10),
        ({"Range": "bytes=0-0"}, 206, 0, 1),
        ({"range": "bytes=3-"}, 206, 3, 10),
        ({"Range": "bytes=3-99"}, 206, 3, 10),
        ({"Range": "bytes=-4"}, 206, 6, 10),
        ({"Range": "bytes=-99"}, 206, 0, 10),
        ({"Range": "bytes=10-"}, 416, 0, 0),
        ({"Range": "bytes=-0"}, 416, 0, 0),
        ({"Range": "bytes=5-4"}, 200, 0, 10),
        ({"Range": "bytes=0-1,3-4"}, 200, 0, 10),
        ({"Range": "lines=0-1"}, 200, 0, 10),
        ({"Range": f"bytes={'9' * 5000}-"}, 200, 0, 10),
        ({"Range": "bytes=0-1", "If-Range": ETAG}, 206, 0, 2),
        ({"Range": "bytes=0-1", "If-Range": '"other"'}, 200, 0, 10),
        ({"Range": "bytes=0-1", "If-Range": f"W/{ETAG}"}, 200, 0, 10),
        ({"If-None-Match": ETAG}, 304, 0, 0),
        ({"If-None-Match": f'"x", W/{ETAG}'}, 304, 0, 0),
        ({"If-None-Match": "*", "Range": "bytes=0-1"}, 304, 0, 0),
        ({"If-None-Match": '"x"'}, 200, 0, 10),
    ],
)
def test_an_answer_follows_the_rfc(
    asked: dict[str, str], status: int, start: int, end: int
) -> None:
    answer = answer_for(info_of(10), asked)
    assert (answer.status, answer.start, answer.end) == (status, start, end)
    assert answer.headers["ETag"] == ETAG
    assert answer.headers["Last-Modified"] == "Thu, 26 Nov 2026 12:00:00 GMT"
    assert ("Content-Range" in answer.headers) == (status in {206, 416})


@given(st.text(max_size=30), st.integers(0, 20))
def test_whatever_is_asked_is_answered_with_what_there_is(asked: str, size: int) -> None:
    for value in (asked, f"bytes={asked}"):
        answer = answer_for(info_of(size), {"Range": value, "If-None-Match": asked})
        assert 0 <= answer.start <= answer.end <= size
        if answer.status in {200, 206}:
            assert int(answer.headers["Content-Length"]) == answer.end - answer.start


def test_a_name_for_downloads_cannot_break_out_of_its_header() -> None:
    answer = answer_for(info_of(1), {}, download_as='a"\r\nSet-Cookie: x; é.txt')
    disposition = answer.headers["Content-Disposition"]
    assert "\r" not in disposition
    assert disposition.endswith("''a%22%0D%0ASet-Cookie%3A%20x%3B%20%C3%A9.txt")
