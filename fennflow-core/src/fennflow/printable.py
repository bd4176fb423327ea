"""Text from outside, made safe to print: it is shown, and never takes effect."""

from __future__ import annotations

import re

# Characters that `str.isprintable` accepts although they are invisible: fillers and selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


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
