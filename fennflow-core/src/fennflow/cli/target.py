"""The unit of work that a command works on, and what is imported for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Annotated

import typer
from typing_extensions import override

from fennflow.cli.app import fail, run
from fennflow.cli.stores import kept_in
from fennflow.exceptions import FennFlowException
from fennflow.sync import SyncUnitOfWork
from fennflow.uow import UnitOfWork

_NAMED = typer.Argument(
    metavar="MODULE:CLASS",
    help="The unit of work, as it is imported: app.storage:UOW. The module is looked for in "
    "the working directory first. Or a bucket that holds its own catalog: s3://bucket.",
)
Target = Annotated[str, _NAMED]
OptionalTarget = Annotated[str | None, _NAMED]


def load(target: str) -> type[UnitOfWork]:
    """Import a unit of work by name, or create one for a bucket that holds its own catalog.

    Raises:
        typer.BadParameter: there is none of that name.
    """
    if "://" in target:
        return run(kept_in(target))
    module_name, colon, name = target.partition(":")
    if not colon or not name or not all(map(str.isidentifier, module_name.split("."))):
        message = (
            f"{target!r} is not MODULE:CLASS, for instance app.storage:UOW, and not the URL of a "
            "bucket that holds its own catalog, for instance s3://bucket."
        )
        raise typer.BadParameter(message)
    sys.meta_path.insert(0, _WorkingDirectory(Path.cwd(), module_name.partition(".")[0]))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        message = f"There is no module {module_name!r}, neither in this directory nor installed."
        raise typer.BadParameter(message) from None
    except FennFlowException as error:
        error.add_note(f"This happened while {module_name} was imported.")
        fail(error)
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, SyncUnitOfWork):
        return found._asynchronous  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - of this package
    if not isinstance(found, type) or not issubclass(found, UnitOfWork):
        message = f"{module_name} has no unit of work {name!r}."
        raise typer.BadParameter(message)
    return found


class _WorkingDirectory(MetaPathFinder):
    """Finds modules in the working directory, but only for the user's own modules.

    The directory is not on `sys.path`: it may hold files that other people named, and libraries try
    to import optional modules that are not installed. The module that the command names is looked
    for here first. What the user's modules import is looked for here last.

    Args:
        directory: the working directory.
        named: the top-level package or module that the command names.
    """

    def __init__(self, directory: Path, named: str) -> None:
        self._directory = str(directory)
        self._named = named
        self._users = {named}

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None:
            return None
        found = PathFinder.find_spec(fullname, [self._directory])
        if found is None or fullname == self._named:
            return found
        if not self._asked_by_user(sys._getframe(1)):  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - the finders' way
            return None
        others = (each for each in sys.meta_path if each is not self)
        if any(each.find_spec(fullname, None) is not None for each in others):
            return None
        self._users.add(fullname)
        return found

    def _asked_by_user(self, frame: FrameType | None) -> bool:
        """Return whether the import comes from a module of the user's, directly or by name."""
        by_name = False
        while frame is not None:
            module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if module == "importlib":
                # `importlib.import_module`, as frameworks import what settings name.
                by_name = by_name or frame.f_globals["__name__"] == "importlib"
            elif module in self._users:
                return True
            elif not by_name:
                return False
            frame = frame.f_back
        return False
