from __future__ import annotations

import traceback
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from fennflow.exceptions import (
    BaseConnectorException,
    CompensationPendingWarning,
    KeyException,
)
from fennflow.printable import brief, printable, without_credentials

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
NO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u3164\ufe0f\U000e0061"


@pytest.mark.parametrize(
    "character", ["\x00", "\x1b", "\r", "\n", "\x7f", "\x9b", "\x85", "\u2028", *BIDI, *NO_WIDTH]
)
def test_what_is_invisible_or_acts_on_a_terminal_is_escaped(character: str) -> None:
    shown = printable(f"a{character}b")
    assert shown.isascii()
    assert shown == f"a{character.encode('unicode_escape').decode()}b"


@pytest.mark.parametrize(
    "text", ["", "plain text.txt", "[bold]x[/]", "Zoë", "日本.txt", "😀", "\\"]
)
def test_what_is_visible_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@given(st.text(st.characters(), max_size=20))
def test_no_control_character_is_left(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(each) for each in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown.encode()


@pytest.mark.parametrize(
    "password", ["Pl4in", "a@b/Pl4in", "Pl4in/9", "a:b@Pl4in", "1/Pl4in", "a%40Pl4in?x"]
)
@pytest.mark.parametrize("text", ["{}", "Cannot reach {} now.", '"{}"', "from {}\nto {}", "({})"])
def test_no_url_shows_a_password(password: str, text: str) -> None:
    url = f"http://zoe:{password}@host:9000/bucket"
    shown = without_credentials(text.format(url, url))
    assert "Pl4in" not in shown
    assert "zoe" not in shown
    assert "http://***@host:9000/bucket" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/a?X-Amz-Signature=Pl4in", "https://host/a?***"),
        ("https://host/a#Pl4in", "https://host/a?***"),
        ("s3://bucket/a:b, file:///srv/a", "s3://bucket/a:b, file:///srv/a"),
        ("bucket/ann@example.com: no URL?", "bucket/ann@example.com: no URL?"),
    ],
)
def test_what_follows_a_question_mark_in_a_url_is_left_out(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_a_long_word_in_an_error_takes_no_time() -> None:
    """Without a limit for schemes it takes minutes."""
    word = "a" * 200_000
    assert without_credentials(f"{word}://ann:pa/ss@db {word}") == f"{word}://***@db {word}"


def test_what_an_exception_of_ours_says_is_escaped() -> None:
    for kind in (KeyException, BaseConnectorException, CompensationPendingWarning):
        error = kind("files/a\u202eb\nc\x1b[2J is away")
        error.add_note("also d\u2028e")
        assert str(error) == "files/a\\u202eb\\nc\\x1b[2J is away"
        text = "".join(traceback.format_exception(error))
        assert all(line.isprintable() for line in text.split("\n"))


class Unshowable:
    @override
    def __repr__(self) -> str:
        raise RuntimeError


def test_any_value_has_a_short_text() -> None:
    for value in (10**5000, Unshowable(), "x" * 500, "\u202e", ["\n"], 5):
        assert len(brief(value)) <= 80
        assert brief(value).isprintable()
