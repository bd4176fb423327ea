from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fennflow.printable import printable

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
