"""Responses to conditional and partial requests."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from fennflow.exceptions import FileException
from fennflow.paths import StoragePath
from fennflow.responses import ObjectInfo
from fennflow.web import answer_for

SHA256 = "ab" * 32
ETAG = f'"{SHA256}"'


WRITTEN = datetime(2026, 11, 26, 12, tzinfo=UTC)


def info_of(size: int, **changes: Any) -> ObjectInfo:
    written = WRITTEN
    info = ObjectInfo(
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
    return replace(info, **changes)


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
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
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


class OtherUtc(tzinfo):
    """A UTC like that of some libraries, which is not Python's."""

    @override
    def utcoffset(self, _: datetime | None) -> timedelta:
        return timedelta()

    @override
    def dst(self, _: datetime | None) -> timedelta:
        return timedelta()

    @override
    def tzname(self, _: datetime | None) -> str:
        return "other"


@pytest.mark.parametrize(
    "modified_at",
    [
        WRITTEN.replace(tzinfo=OtherUtc()),
        WRITTEN.replace(tzinfo=None),
        WRITTEN.astimezone(timezone(timedelta(hours=-5))),
        WRITTEN.astimezone(ZoneInfo("Asia/Kolkata")),
    ],
)
def test_a_time_of_any_time_zone_is_answered_in_utc(modified_at: datetime) -> None:
    answer = answer_for(info_of(1, modified_at=modified_at), {})
    assert answer.headers["Last-Modified"] == "Thu, 26 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    "media_type",
    [
        *("text/html", "TEXT/HTML; charset=utf-8", "image/svg+xml", "image/svg", "text/xml"),
        *("application/xhtml+xml", "application/xml", "text/javascript", "text/xsl", "text/css"),
        *("multipart/related", "message/rfc822", "application/x-unheard-of", "no media type"),
        *("image/png;x,text/html", "audio/mp3 ;a=b, image/svg+xml"),
    ],
)
def test_what_a_browser_could_run_is_downloaded_unless_asked_otherwise(media_type: str) -> None:
    info = info_of(1, media_type=media_type)
    assert answer_for(info, {}).headers["Content-Disposition"] == (
        "attachment; filename*=UTF-8''a.txt"
    )
    stored = replace(info, headers={"Content-Disposition": "inline"})
    assert answer_for(stored, {}).headers["Content-Disposition"].startswith("attachment")
    assert "Content-Disposition" not in answer_for(info, {}, inline=True).headers


@pytest.mark.parametrize(
    "disposition",
    ["attachment x", 'attachment"x"', "attachment, inline", "attachment=;", "attachments"],
)
def test_a_stored_disposition_that_browsers_ignore_does_not_show_html(disposition: str) -> None:
    info = info_of(1, media_type="text/html", headers={"Content-Disposition": disposition})
    assert answer_for(info, {}).headers["Content-Disposition"] == (
        "attachment; filename*=UTF-8''a.txt"
    )


@pytest.mark.parametrize(
    "media_type", ["text/plain; charset=utf-8", "image/png", "video/mp4", "application/pdf"]
)
def test_what_is_passive_is_shown(media_type: str) -> None:
    headers = answer_for(info_of(1, media_type=media_type), {}).headers
    assert headers["Content-Type"] == media_type
    assert "Content-Disposition" not in headers


def test_headers_that_were_stored_with_a_file_are_sent() -> None:
    stored = {
        "Cache-Control": "max-age=60",
        "Content-Disposition": 'attachment; filename="b"',
        "Content-Encoding": "gzip",
        "Content-Language": "de",
    }
    info = info_of(10, headers=stored)
    for asked in ({}, {"Range": "bytes=0-1"}):
        answer = answer_for(info, asked)
        assert {name: answer.headers[name] for name in stored} == stored
    assert answer_for(info, {}, download_as="c").headers["Content-Disposition"].endswith("''c")
    unchanged = answer_for(info, {"If-None-Match": ETAG}).headers
    assert "Content-Encoding" not in unchanged
    assert unchanged["Cache-Control"] == "max-age=60"


values = st.text(st.characters(), max_size=8).map(lambda each: f"text/html\r\nX-Other: {each}")


@given(values, values, values)
def test_no_header_has_a_line_break_or_what_http_cannot_carry(
    media_type: str, name: str, value: str
) -> None:
    headers = {"Content-Encoding": value, "Cache-Control": value, "Content-Disposition": value}
    info = info_of(1, media_type=media_type, headers=headers, path=StoragePath(name))
    for answer in (answer_for(info, {}), answer_for(info, {}, download_as=name)):
        for each in answer.headers.values():
            assert each.isascii()
            assert each.isprintable()
    with pytest.raises(FileException, match="ETag"):
        answer_for(replace(info, sha256=None, etag=value), {})
