"""The rules for keys, and how a path inside a scope becomes a key."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from string import Formatter
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from fennflow.exceptions import ContinuationTokenException, KeyException, PathException
from fennflow.printable import brief

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

__all__ = ["AnyPath", "PathModel", "PathTemplate", "StoragePath"]

MAX_KEY_BYTES = 1024
LAST_CHARACTER = 0x10FFFF
BEFORE_SURROGATES, AFTER_SURROGATES = 0xD7FF, 0xE000


@runtime_checkable
class PathTemplate(Protocol):
    """Anything that renders itself to a path: `at(template)` takes it like a `str`."""

    def render(self) -> str:
        """Return the path, relative to the scope it is used in."""
        ...


AnyPath = str | PurePath | PathTemplate
"""The types that methods accept as a path; a `PurePath` must be relative, and is written with `/`."""


class PathModel(BaseModel):
    """A path template made of a pydantic model's fields.

    Set `template` to a format string of the fields. The value of a field stays inside its segment:
    a value that is empty, has a `/`, or makes a `.` or `..` segment is refused.

    Raises:
        KeyException: the template names an unknown field; raised when the class is made.

    Example:
        ```python
        from typing import ClassVar

        from fennflow.paths import PathModel


        class Invoices(PathModel):
            template: ClassVar[str] = "{customer}/{year}-{month:02d}"
            customer: str
            year: int
            month: int


        print(Invoices(customer="acme", year=2026, month=3).render())
        #> acme/2026-03
        ```
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    template: ClassVar[str] = ""

    @classmethod
    @override
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a template that cannot be rendered when the class is made."""
        super().__pydantic_init_subclass__(**kwargs)
        try:
            parts = [each for each in Formatter().parse(cls.template) if each[1] is not None]
        except (TypeError, ValueError) as error:
            message = f"The template of {cls.__name__} is not a format string: {error}."
            raise KeyException(message) from None
        for _, name, spec, conversion in parts:
            if conversion not in _CONVERSIONS or "{" in (spec or ""):
                message = f"The format of {name!r} in the template of {cls.__name__} is not known."
                raise KeyException(message)
        unknown = sorted({str(name) for _, name, _, _ in parts} - set(cls.model_fields))
        if unknown:
            message = (
                f"The template of {cls.__name__} names {', '.join(map(repr, unknown))}; its fields "
                f"are {', '.join(cls.model_fields) or 'none'}."
            )
            raise KeyException(message)

    def render(self) -> str:
        """Return the path, relative to the scope it is used in.

        Raises:
            KeyException: a value leaves its segment, or does not fit its format.
        """
        rendered: list[str] = []
        for literal, name, spec, conversion in Formatter().parse(self.template):
            rendered.append(literal)
            if name is None:
                continue
            try:
                value = format(_CONVERSIONS[conversion](getattr(self, name)), spec or "")
            except (ArithmeticError, KeyError, TypeError, ValueError) as error:
                message = f"{name!r} of {type(self).__name__} does not fit {spec!r}: {error}"
                raise KeyException(message) from error
            if not value or "/" in value:
                _refuse(value, f"is not valid for {name!r} of {type(self).__name__}")
            rendered.append(value)
        return check_key("".join(rendered))


_CONVERSIONS: Mapping[str | None, Callable[[object], object]] = {
    None: lambda value: value,
    "a": ascii,
    "r": repr,
    "s": str,
}


class StoragePath(str):
    """A full path from the root of a bucket; every method takes it as absolute.

    Methods return paths of this type. As a field of a pydantic model it accepts no other strings: a
    client's text would become an absolute path, which leaves the scope of `at()`. Declare such a
    field as `str`. To use a path that your own program has stored, write `StoragePath(text)`.

    Example:
        ```python
        from fennflow.paths import StoragePath

        path = StoragePath("folder1/report.txt")
        print(path.name, path.parent)
        #> report.txt folder1
        ```
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """The part after the last `/`."""
        return self.rpartition("/")[2]

    @property
    def parent(self) -> StoragePath:
        """The part before the last `/`; empty at the root."""
        return StoragePath(self.rpartition("/")[0])

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Let models have `StoragePath` fields, which accept no other strings."""
        from pydantic_core import core_schema

        return core_schema.no_info_wrap_validator_function(
            _only_made_here, core_schema.str_schema()
        )


def _only_made_here(value: object, _handler: object) -> StoragePath:
    if not isinstance(value, StoragePath):
        message = (
            "only a StoragePath that FennFlow returned is accepted here, since it is absolute; declare "
            "text from clients as str, and write StoragePath(text) for a path of your own"
        )
        raise ValueError(message)  # noqa: TRY004 - pydantic turns ValueErrors into its own
    return value


def check_key(key: str, *, reserved_prefix: str | None = None) -> str:
    """Return the key if every store can hold it.

    Args:
        key: the full key.
        reserved_prefix: the prefix that user keys may not start with (protocol P10).

    Raises:
        KeyException: the key is empty, over 1,024 bytes of UTF-8 (the limit of S3), has control
            characters, lone surrogates, U+FFFE or U+FFFF, `.` or `..` segments, a leading, doubled or trailing
            `/`, or starts with the reserved prefix.
    """
    if not key:
        _refuse(key, "is empty")
    _check_characters(key)
    for number, segment in enumerate(key.split("/")):
        if segment in {".", ".."}:
            _refuse(key, f"has a {segment!r} segment")
        if not segment and not number:
            _refuse(key, "starts with '/': all paths are relative")
        if not segment:
            _refuse(key, "ends with '/', or has '//': it names no file")
    if reserved_prefix is not None and key.startswith(reserved_prefix):
        _refuse(key, f"starts with {reserved_prefix!r}, which is FennFlow's own")
    return key


def fault_of(key: str) -> str | None:
    """Return what `check_key` finds wrong with a key; None if every store can hold it."""
    try:
        check_key(key)
    except KeyException as error:
        return error.reason
    return None


def check_delimiter(delimiter: object) -> None:
    """Refuse a delimiter that no key can hold.

    Raises:
        KeyException: the rules of `check_key` allow no key that has it.
        PathException: it is empty, or not a text.
    """
    if not isinstance(delimiter, str) or not delimiter:
        message = f"delimiter={brief(delimiter)} is not a text of at least one character."
        raise PathException(message)
    _check_characters(delimiter, "Delimiter")


def check_prefix(prefix: str) -> str:
    """Return the prefix if keys can begin with it.

    Args:
        prefix: from the root of the bucket; empty for all keys. It may end within a segment.

    Raises:
        KeyException: the rules of `check_key` allow no key that begins with it.
    """
    _check_characters(prefix, "Prefix")
    for segment in prefix.split("/")[:-1]:
        if segment in {".", ".."}:
            _refuse(prefix, f"has a {segment!r} segment", "Prefix")
        if not segment:
            _refuse(prefix, "starts with '/', or has '//'", "Prefix")
    return prefix


def _check_characters(key: str, what: str = "Key") -> None:
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        _refuse(key, "has a lone surrogate, which UTF-8 cannot hold", what)
    if size > MAX_KEY_BYTES:
        _refuse(key, f"has {size} bytes of UTF-8; S3 takes at most {MAX_KEY_BYTES}", what)
    # Cc, the control characters, are the only category below U+0020 and at U+007F to U+009F.
    if not key.isprintable() and any(unicodedata.category(char) == "Cc" for char in key):
        _refuse(key, "has a control character", what)
    # XML can hold neither: a batch of deletions with one of them would be refused as a whole.
    if "\ufffe" in key or "\uffff" in key:
        _refuse(key, "has U+FFFE or U+FFFF, which XML cannot hold", what)


def _refuse(key: str, reason: str, what: str = "Key") -> NoReturn:
    shown = key if len(key) <= 80 else f"{key[:77]}..."  # noqa: PLR2004 - a line's length
    message = f"{what} {shown!a} {reason}. Choose another {what.lower()}; nothing was sent."
    raise KeyException(message, reason=reason)


def join_key(scope: str, path: str) -> str:
    """Return the full key of a path used under a scope; a `StoragePath` is absolute."""
    if isinstance(path, StoragePath) or not scope:
        return str(path)
    return f"{scope}/{path}"


def render_path(path: AnyPath) -> str:
    """Return the text of a path or template.

    Raises:
        KeyException: it is neither.
    """
    # This check comes first, since checking for a protocol takes longer than everything else.
    if type(path) is str or isinstance(path, StoragePath):
        return path
    rendered: object = path if isinstance(path, str) else None
    if isinstance(path, PurePath):
        rendered = path.as_posix()
    elif isinstance(path, PathTemplate):
        rendered = path.render()
    if not isinstance(rendered, str):
        message = (
            "A path is a str, a PurePath or has render() -> str, and this is a "
            f"{type(path).__name__}.{_hint_for(path)} Nothing was sent."
        )
        raise KeyException(message)
    return rendered


def _hint_for(path: object) -> str:
    if isinstance(path, bytes):
        return " Decode it."
    if hasattr(path, "filename"):
        return " The path of a file is its filename, or its path after it was read."
    if isinstance(path, Iterable):
        return " Several paths are several arguments: *paths."
    return ""


def after_key(key: str) -> str:
    """Return the smallest key that sorts after this one."""
    return key + "\0"


def after_prefix(prefix: str) -> str | None:
    """Return the smallest key that sorts after all keys with this prefix; None if none does.

    Python compares strings by code point, which is the order of UTF-8 bytes: S3's order.
    """
    for end in range(len(prefix), 0, -1):
        last = ord(prefix[end - 1])
        if last < LAST_CHARACTER:
            successor = AFTER_SURROGATES if last == BEFORE_SURROGATES else last + 1
            return prefix[: end - 1] + chr(successor)
    return None


def rolled_up(key: str, prefix: str, delimiter: str | None) -> str | None:
    """Return the common prefix that a listing shows in place of a key: up to the first delimiter.

    None if it shows the key itself, which has no delimiter beyond the prefix.
    """
    end = -1 if delimiter is None else key.find(delimiter, len(prefix))
    return None if delimiter is None or end < 0 else key[: end + len(delimiter)]


def after_name(key: str, prefix: str, delimiter: str | None) -> str | None:
    """Return the smallest key that sorts after what a listing shows for a key; None if none does."""
    common = rolled_up(key, prefix, delimiter)
    return after_key(key) if common is None else after_prefix(common)


def next_name(keys: Sequence[str], index: int, prefix: str, delimiter: str | None) -> int:
    """Return the index, in sorted keys, of the key that a listing shows after the one at an index."""
    common = rolled_up(keys[index], prefix, delimiter)
    if common is None:
        return index + 1
    following = after_prefix(common)
    return len(keys) if following is None else bisect_left(keys, following, index)


def encode_token(start: str) -> str:
    """Return the continuation token of the page that starts at a key."""
    return base64.urlsafe_b64encode(start.encode()).decode().rstrip("=")


def decode_token(token: str) -> str:
    """Return the key at which the next page starts.

    A token only moves the start of a page: prefix and scope are applied again, so a forged token
    gives no access to anything else.

    Raises:
        ContinuationTokenException: it is not a token of `list`.
    """
    try:
        padded = token.encode("ascii") + b"=" * (-len(token) % 4)
        start = check_prefix(base64.b64decode(padded, altchars=b"-_", validate=True).decode())
    except (UnicodeError, binascii.Error, AttributeError, TypeError, KeyException):
        start = ""
    if not start:  # a page that starts at the beginning has no token
        message = (
            f"continuation_token={brief(token)} is not one that list() returned. Pass the "
            "continuation_token of the page before, unchanged; None for the first page. Nothing was sent."
        )
        raise ContinuationTokenException(message)
    return start
