"""What all commands share: how they run, what JSON says, how they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, TypeVar, cast

import typer

from fennflow.cli import terminal
from fennflow.cli.terminal import stderr, stdout
from fennflow.exceptions import FennFlowException

T = TypeVar("T")

FAILED = 1
USED_WRONGLY = 2
NEEDS_ATTENTION = 3
INTERRUPTED = 130

app = typer.Typer(
    name="fennflow",
    help="Transactions over object storage: what is installed, what it guarantees, and its files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # it wraps lines at the terminal's width, not where the source does
    context_settings={"help_option_names": ["-h", "--help"]},
)
UsageError = cast("type[Exception]", typer.BadParameter.__base__)
"""The error class of click; typer bundles click under a name that varies."""

Json = Annotated[bool, typer.Option("--json", help="Print only JSON.")]


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - as typer calls it
    if wanted:
        stdout.line(f"fennflow {version('fennflow-core')}")
        raise typer.Exit


@app.callback()
def _program(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_show_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Transactions over object storage: what is installed, what it guarantees, and its files."""


def main() -> int:
    """Run the program as the command line says, and return its exit code."""
    terminal.guard()
    try:
        # Typer would print the error in an argument without escaping it.
        result = app(standalone_mode=False)
    except UsageError as error:
        message = str(getattr(error, "format_message", error.__str__)())
        context = getattr(error, "ctx", None)
        if message and context is not None:
            stderr.message(f"{context.get_usage()}\nTry '{context.command_path} --help' for help.")
        if message:  # empty if no command was given: the help was printed
            stderr.message(message, title="Error")
        return USED_WRONGLY
    except (typer.Abort, KeyboardInterrupt):
        stderr.line("Interrupted.")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the program ends here
        terminal.show_traceback(error)
        return FAILED
    return result if isinstance(result, int) else 0


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command; its errors are printed without a traceback, and end the program."""
    try:
        with asyncio.Runner(loop_factory=_faster_loop()) as runner:
            return runner.run(work)
    except FennFlowException as error:
        fail(error)
    except KeyboardInterrupt:
        stderr.line("Interrupted; what was not committed is undone.")
        raise typer.Exit(INTERRUPTED) from None


def _faster_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the function that creates a uvloop loop, if uvloop is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def fail(error: Exception) -> NoReturn:
    """Print an error with its notes, and end the program."""
    text = "\n".join((str(error), *getattr(error, "__notes__", ())))
    stderr.message(text, title=type(error).__name__)
    raise typer.Exit(FAILED) from error


def show_json(value: object) -> None:
    """Print a value as one line of JSON."""
    terminal.show_json(plain(value))


def plain(value: object) -> Any:
    """Return a value in a form that JSON can hold: dataclasses become objects, times ISO 8601."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(key): plain(each) for key, each in items}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in cast("Sequence[object]", value)]
    if isinstance(value, datetime):
        return value.isoformat()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)
