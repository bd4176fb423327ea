"""All output to the terminal: untrusted text is shown, and has no effect.

Other people choose keys, metadata, file names and server messages. They are never interpreted as
markup, and characters that are invisible or that a terminal would act on are escaped. No other
module of the command line prints.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from fennflow.printable import printable


class Terminal:
    """Standard output or standard error.

    Args:
        stderr: whether it is standard error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        self._console = Console(
            stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True
        )

    def line(self, text: str = "", *, style: str = "", wrap: bool = False) -> None:
        """Print one line.

        Args:
            text: the line; a line break in it is escaped.
            style: such as `bold`, for terminals.
            wrap: whether to wrap it between words.
        """
        self._console.print(Text(printable(text), style), soft_wrap=not wrap)

    def message(self, text: str, *, title: str = "") -> None:
        """Print a message of several lines; all except the first are indented.

        So no line of it looks like one that the program itself prints.

        Args:
            text: of the message.
            title: printed before it, in red.
        """
        head = Text(printable(title), "bold red") + Text(": " if title else "")
        lines = [printable(each) for each in text.splitlines()] or [""]
        self._console.print(head + Text("\n  ".join(lines)))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table: on a terminal wrapped to its width, elsewhere a line for each row."""
        cells = [[printable(str(cell)) for cell in row] for row in rows]
        heads = [printable(column) for column in columns]
        if not self._console.is_terminal:
            lines = [heads, *cells] if any(heads) else cells
            widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
            for line in lines:
                padded = (set_cell_size(*each) for each in zip(line, widths, strict=True))
                self.line("  ".join(padded).rstrip())
            return
        table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(heads))
        for head in heads:
            table.add_column(head, overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        self._console.print(table, soft_wrap=False)

    def progress(self, *columns: ProgressColumn, quiet: bool) -> Progress:
        """Return a progress display, which is cleared at the end."""
        return Progress(*columns, console=self._console, transient=True, disable=quiet)


stdout = Terminal()
stderr = Terminal(stderr=True)


def show_json(value: object) -> None:
    """Print a JSON value as one line without characters that a terminal would act on."""
    document = json.dumps(value, ensure_ascii=False)
    # Unprintable characters can only be inside strings, where JSON can escape them.
    if not _is_shown(document):
        document = "".join(each if _is_shown(each) else json.dumps(each)[1:-1] for each in document)
    # Flush, since the reader of a pipe waits for the line.
    print(document, flush=True)  # noqa: T201 - rich would wrap it


def _is_shown(text: str) -> bool:
    """Return whether a text can be printed as it is: encodable, and without effect on a terminal."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return printable(text) == text


def write_bytes(data: bytes) -> None:
    """Write the content of a file to standard output as it is."""
    sys.stdout.buffer.write(data)


def guard() -> None:
    """Escape what other code prints, too: log records, warnings, characters that cannot be encoded."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    make = logging.getLogRecordFactory()

    def record(*args: object, **kwargs: object) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with suppress(Exception):  # the arguments do not fit the message: the handler reports it
            made.msg, made.args = printable(made.getMessage()), None
        if made.exc_info:
            made.exc_text = _escaped_lines(logging.Formatter().formatException(made.exc_info))
        return made

    logging.setLogRecordFactory(record)
    formatted = warnings.formatwarning

    def formatwarning(*args: object, **kwargs: object) -> str:
        return _escaped_lines(formatted(*args, **kwargs)) + "\n"  # type: ignore[arg-type]

    warnings.formatwarning = formatwarning


def show_traceback(error: BaseException) -> None:
    """Print the traceback of an unexpected error."""
    print(  # noqa: T201 - as Python prints it
        _escaped_lines("".join(traceback.format_exception(error))), file=sys.stderr
    )


def _escaped_lines(text: str) -> str:
    return "\n".join(map(printable, text.splitlines()))
