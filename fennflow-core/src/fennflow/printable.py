"""Makes untrusted text safe to print: it is shown, and has no effect."""

from __future__ import annotations

import re

MAX_SHOWN = 80

# Characters that `str.isprintable` accepts although they are invisible: fillers and selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)

# No scheme is longer. Without a limit, the time for a long word grows quadratically.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}://)([^\s\"'<>`]*)")


def without_credentials(text: str) -> str:
    """Return a text with possible secrets removed from the URLs in it.

    These are everything up to the last `@` (a password may have an unescaped `/` or `@`), and
    everything after a `?` or `#` (signatures and tokens). A URL without them is unchanged.

    Example:
        ```python
        from fennflow.printable import without_credentials

        print(without_credentials("Cannot reach https://ann:pa/ss@db:5432/app?token=x now."))
        #> Cannot reach https://***@db:5432/app?*** now.
        ```
    """
    return _URL.sub(_shown, text)


def cause_to_show(error: BaseException) -> BaseException | None:
    """Return an exception of another library to chain; None if tracebacks would show credentials."""
    each: BaseException | None = error
    while each is not None:
        if "***@" in without_credentials(f"{each}{each!r}"):
            return None
        each = each.__cause__ or each.__context__
    return error


def _shown(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    _, at, rest = rest.rpartition("@")
    place = re.split("[?#]", rest, maxsplit=1)[0]
    return f"{scheme}{'***@' if at else ''}{place}{'' if place == rest else '?***'}"


def printable(text: str) -> str:
    r"""Return a text with everything escaped that is invisible or that a terminal acts on.

    These are control characters (C0, C1, DEL) and line breaks, changes of direction, characters of
    no width, spaces other than U+0020, unassigned characters, and lone surrogates. They are
    written as in a Python string.

    Example:
        ```python
        from fennflow.printable import printable

        print(printable("all\x1b[2J is\u202ewell"))
        #> all\x1b[2J is\u202ewell
        ```
    """
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    return "".join(
        each
        if each.isprintable() and not _INVISIBLE.match(each)
        else each.encode("unicode_escape").decode()
        for each in text
    )


def brief(value: object) -> str:
    r"""Return a short ASCII text of an untrusted value, for a message.

    Example:
        ```python
        from fennflow.printable import brief

        print(brief("a\u202eb"), brief(10**5000))
        #> 'a\u202eb' of type int
        ```
    """
    try:
        text = ascii(value)
    except Exception:  # noqa: BLE001 - a number of 5,000 digits, or a __repr__ that fails
        return f"of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
