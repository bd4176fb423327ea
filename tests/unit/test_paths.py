"""Key rules, scopes and continuation tokens."""

from __future__ import annotations

import contextlib
from posixpath import normpath
from typing import ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from fennflow.exceptions import ContinuationTokenException, KeyException
from fennflow.paths import (
    PathModel,
    PathTemplate,
    StoragePath,
    after_key,
    after_prefix,
    check_key,
    check_prefix,
    decode_token,
    encode_token,
    join_key,
    render_path,
)

characters = st.characters(exclude_categories=["Cs"])


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "is empty"),
        ("a" * 1025, "1025 bytes"),
        ("ü" * 513, "1026 bytes"),
        ("a\x00b", "control character"),
        ("a\nb", "control character"),
        ("a\x7fb", "control character"),
        ("a\x85b", "control character"),
        ("a\ufffe", "XML"),
        ("a/\uffff/b", "XML"),
        ("a\ud800b", "lone surrogate"),
        (".", "'.' segment"),
        ("..", "'..' segment"),
        ("../up", "'..' segment"),
        ("a/../b", "'..' segment"),
        ("./x", "'.' segment"),
        ("/a", "all paths are relative"),
        ("a/", "names no file"),
        ("a//b", "names no file"),
        (".fennflow", "FennFlow's own"),
        (".fennflow/x", "FennFlow's own"),
    ],
)
def test_a_key_that_some_store_cannot_hold_is_refused(key: str, reason: str) -> None:
    with pytest.raises(KeyException, match=reason) as caught:
        check_key(key, reserved_prefix=".fennflow")
    assert "nothing was sent" in str(caught.value)
    assert str(caught.value).isascii()


@pytest.mark.parametrize(
    "key", ["a", "a" * 1024, "ü" * 512, "a/.b/..c/d.", "日本/😀 +%&?#'\"", "…"]
)
def test_any_printable_key_is_taken(key: str) -> None:
    assert check_key(key, reserved_prefix=".fennflow") == key


@given(st.text(st.characters()))
def test_a_key_is_taken_or_refused_and_nothing_else(key: str) -> None:
    try:
        checked = check_key(key)
    except KeyException:
        return
    assert checked == key
    assert 0 < len(key.encode()) <= 1024
    assert not {"", ".", ".."} & set(key.split("/"))


@given(st.text(characters, min_size=1), st.text(characters))
@example("a", "../b")
@example("a", "b/../../c")
@example("a", "/b")
def test_a_relative_path_stays_in_its_scope(scope: str, path: str) -> None:
    try:
        check_key(scope)
        key = check_key(join_key(scope, check_key(path)))
    except KeyException:
        return
    assert normpath(key) == key
    assert key.startswith(f"{scope}/")


@given(st.text(characters), st.text(characters))
def test_what_follows_a_key_is_next_in_order(key: str, other: str) -> None:
    assert (other > key) == (other >= after_key(key))


@given(st.text(characters), st.text(characters), st.text(characters))
def test_what_follows_a_prefix_skips_all_that_have_it(prefix: str, rest: str, other: str) -> None:
    following = after_prefix(prefix)
    if following is None:
        assert not prefix.strip("\U0010ffff")
        return
    assert (prefix + rest).encode() < following.encode()
    inside_or_before = other < following
    assert inside_or_before == (other <= prefix or other.startswith(prefix) or other < prefix)


@given(st.text(characters, min_size=1))
def test_a_token_contains_where_the_next_page_starts(start: str) -> None:
    try:
        check_prefix(start)
    except KeyException:
        with pytest.raises(ContinuationTokenException):
            decode_token(encode_token(start))
    else:
        assert decode_token(encode_token(start)) == start


@pytest.mark.parametrize("token", ["", "é", "!", "YQBi", "AA", 7, b"YQ"])
def test_a_token_that_list_cannot_have_returned_is_refused(token: str) -> None:
    with pytest.raises(ContinuationTokenException, match="None for the first page"):
        decode_token(token)


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("a" * 1025, "1025 bytes"),
        ("a\x00b", "control character"),
        ("a\x00", "control character"),
        ("\n", "control character"),
        ("\ud800b", "lone surrogate"),
        ("../", "'..' segment"),
        ("a/../b", "'..' segment"),
        ("./x", "'.' segment"),
        ("/a", "starts with"),
        ("a//b", "starts with"),
    ],
)
def test_a_prefix_with_which_no_key_can_begin_is_refused(prefix: str, reason: str) -> None:
    with pytest.raises(KeyException, match=rf"Prefix .*{reason}") as caught:
        check_prefix(prefix)
    assert str(caught.value).isascii()


@given(st.text(characters), st.integers(0, 40))
def test_whatever_a_key_begins_with_is_a_prefix(key: str, length: int) -> None:
    try:
        check_key(key)
    except KeyException:
        return
    assert check_prefix(key[:length]) == key[:length]


class Body(BaseModel):
    path: StoragePath
    others: list[StoragePath] | None = None


def test_a_field_of_a_model_takes_only_paths_that_fennflow_returned() -> None:
    """A client's string would become absolute, and leave the scope."""
    path = StoragePath("tenants/a/n.txt")
    kept = Body(path=path, others=[path])
    assert isinstance(kept.path, StoragePath)
    assert kept.model_dump_json() == '{"path":"tenants/a/n.txt","others":["tenants/a/n.txt"]}'
    assert Body.model_validate(kept.model_dump()) == kept
    assert Body.model_json_schema()["properties"]["path"]["type"] == "string"
    for validate in (
        lambda: Body.model_validate_json('{"path": "tenants/b/n.txt"}'),
        lambda: Body.model_validate({"path": "tenants/b/n.txt"}),
        lambda: Body.model_validate_strings({"path": "tenants/b/n.txt"}),
        lambda: Body.model_validate({"path": path, "others": ["x"]}),
        lambda: TypeAdapter(StoragePath).validate_python("x", strict=True),
        lambda: TypeAdapter(dict[StoragePath, int]).validate_json('{"x": 1}'),
    ):
        with pytest.raises(ValidationError, match="that FennFlow returned"):
            validate()


@given(st.text(st.characters()))
def test_a_token_from_elsewhere_is_refused_or_harmless(token: str) -> None:
    with contextlib.suppress(ContinuationTokenException):
        assert isinstance(decode_token(token), str)


def test_templates_render_themselves() -> None:
    class Invoice:
        def render(self) -> str:
            return "invoices/2026"

    assert render_path(Invoice()) == "invoices/2026"
    assert render_path(StoragePath("a")) == "a"
    with pytest.raises(KeyException, match="int"):
        render_path(7)  # type: ignore[arg-type]


class Month(PathModel):
    template: ClassVar[str] = "users/{user}/{year}-{month:02d}"
    user: str
    year: int
    month: int


def test_a_model_of_a_path_renders_its_fields() -> None:
    assert Month(user="Zoë", year=2026, month=3).render() == "users/Zoë/2026-03"
    assert isinstance(Month(user="a", year=1, month=1), PathTemplate)


@pytest.mark.parametrize("user", ["", "..", ".", "a/b", "../../etc", "a\x00b", "x" * 2000])
def test_a_field_of_a_path_cannot_leave_its_segment(user: str) -> None:
    with pytest.raises(KeyException):
        Month(user=user, year=2026, month=3).render()


@pytest.mark.parametrize("text", ["{missing}", "{user.id}", "{0}", "{}"])
def test_a_template_with_an_unknown_field_is_refused_when_the_class_is_made(text: str) -> None:
    with pytest.raises(KeyException, match="fields are user"):

        class Wrong(PathModel):
            template: ClassVar[str] = text
            user: str


def test_a_value_that_does_not_fit_its_format_is_reported() -> None:
    class Wrong(PathModel):
        template: ClassVar[str] = "{user:d}"
        user: str

    with pytest.raises(KeyException, match="does not fit"):
        Wrong(user="a").render()


def test_a_number_that_is_too_large_for_its_format_is_refused() -> None:
    class Priced(PathModel):
        template: ClassVar[str] = "{price:.2f}"
        price: int

    assert Priced(price=1).render() == "1.00"
    with pytest.raises(KeyException, match="does not fit"):
        Priced(price=10**400).render()
