"""What all commands share: the target that they work on, how they print, how they end."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast

import typer
from rich.console import Console
from rich.table import Table

from fennflow.exceptions import FennFlowException
from fennflow.uow import UnitOfWork

T = TypeVar("T")

FAILED = 1
NEEDS_ATTENTION = 3
INTERRUPTED = 130

app = typer.Typer(
    name="fennflow",
    help="Transactions over object storage: what is installed, what it guarantees, and its files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:CLASS",
        help="The unit of work, as it is imported: app.storage:UOW. The working directory is on "
        "the path.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


def load(target: str) -> type[UnitOfWork]:
    """Import a unit of work by its name.

    Raises:
        typer.BadParameter: there is none of that name.
    """
    module_name, colon, name = target.partition(":")
    if not colon or not name:
        message = f"{target!r} is not MODULE:CLASS, for instance app.storage:UOW."
        raise typer.BadParameter(message)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        message = f"There is no module {module_name!r} here or among what is installed."
        raise typer.BadParameter(message) from None
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not issubclass(found, UnitOfWork):
        message = f"{module_name} has no unit of work {name!r}."
        raise typer.BadParameter(message)
    return found


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run what a command does; its errors are told without a traceback, and end the program."""
    try:
        with asyncio.Runner(loop_factory=_faster_loop()) as runner:
            return runner.run(work)
    except FennFlowException as error:
        fail(error)
    except KeyboardInterrupt:
        stderr.print("Interrupted; what was under way is undone.")
        raise typer.Exit(INTERRUPTED) from None


def _faster_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes a loop of uvloop, where that is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def fail(error: Exception) -> NoReturn:
    """Tell an error, with its notes, and end the program."""
    stderr.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    stderr.print(str(error), markup=False)
    for note in getattr(error, "__notes__", ()):
        stderr.print(f"  {note}", markup=False)
    raise typer.Exit(FAILED) from error


def show_json(value: object) -> None:
    """Print a value as one line of JSON."""
    print(json.dumps(plain(value), ensure_ascii=False))  # noqa: T201 - rich would wrap it


def plain(value: object) -> Any:
    """Return what JSON can hold of a value: dataclasses become objects, times ISO 8601."""
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


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; what does not fit is wrapped, not cut."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    stdout.print(table, soft_wrap=False)
