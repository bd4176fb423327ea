"""Commands that take files in, out, or from place to place: `cp` and `mv`."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fennflow.cli.app import Json, Target, fail, run, stderr
from fennflow.cli.files import (
    Done,
    Files,
    Place,
    Recursive,
    Uow,
    directory_of,
    nothing_under,
    show_done,
    stated,
)
from fennflow.exceptions import (
    FileException,
    FilepathsCollisionError,
    MediaTypeCannotBeGuessedException,
    PathException,
)
from fennflow.files import FileContent
from fennflow.repositories.streaming import ObjectStream

UNKNOWN_TYPE = "application/octet-stream"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (cp, mv):
        app.command()(command)


def cp(
    target: Target,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE…")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION")],
    *,
    recursive: Recursive = False,
    as_json: Json = False,
) -> None:
    """Copy files in, out, or inside the store: all of them, or none.

    A destination that ends in / is a directory, and so is one for several sources.
    """
    _transfer(target, sources, destination, recursive=recursive, move=False, as_json=as_json)


def mv(
    target: Target,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE…")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION")],
    *,
    recursive: Recursive = False,
    as_json: Json = False,
) -> None:
    """Move files in, out, or inside the store: all of them, or none.

    A local source goes when the transaction has committed; a file of the store, with it.
    """
    _transfer(target, sources, destination, recursive=recursive, move=True, as_json=as_json)


@dataclass(frozen=True)
class Task:
    """One file to copy or move."""

    source: Place | Path
    destination: Place | Path
    size: int


def _transfer(
    target: str,
    sources: Sequence[str],
    destination: str,
    *,
    recursive: bool,
    move: bool,
    as_json: bool,
) -> None:
    uow = Uow(target)
    origins = [uow.place(text) or Path(text) for text in sources]
    goal = uow.place(destination) or Path(destination)
    if isinstance(goal, Path) and any(isinstance(each, Path) for each in origins):
        message = f"Neither {sources[0]!r} nor {destination!r} is a place, FIELD:PATH, of {target}."
        raise typer.BadParameter(message)
    into = destination.endswith(("/", ":")) or len(sources) > 1 or recursive
    into = into or (isinstance(goal, Path) and goal.is_dir())
    done = Done()
    local = [
        each
        for origin in origins
        if isinstance(origin, Path)
        for each in _local(origin, recursive=recursive)
    ]

    async def work(shown: Shown, arriving: Arriving) -> None:
        async with uow.open() as opened:
            found = local + [
                each
                for origin in origins
                if isinstance(origin, Place)
                for each in await _remote(opened, origin, recursive=recursive)
            ]
            tasks = [
                Task(source, below(goal, name, into=into), size) for source, name, size in found
            ]
            _check(tasks)
            shown.begin(tasks)
            for task in tasks:
                await _one(opened, task, shown, arriving, move=move)
                done.add(task.destination, task.size)
                shown.file()
            # Before the commit: what a move deletes must lie here by then.
            arriving.place()

    with _progress(quiet=as_json) as shown, Arriving() as arriving:
        run(work(shown, arriving))
    if move:
        for source, _, _ in local:
            source.unlink()
    show_done(done, "Moved" if move else "Copied", as_json=as_json)


def _local(origin: Path, *, recursive: bool) -> list[tuple[Path, str, int]]:
    """Return the files that a local path stands for, each with its name below it."""
    if recursive and origin.is_dir():
        return [
            (path, path.relative_to(origin).as_posix(), path.stat().st_size)
            for path in sorted(origin.rglob("*"))
            if path.is_file() and not path.is_symlink()
        ]
    if origin.is_file():
        return [(origin, origin.name, origin.stat().st_size)]
    hint = " It is a directory: add --recursive." if origin.is_dir() else ""
    message = f"There is no file {origin}.{hint}"
    return fail(FileException(message))


async def _remote(opened: Any, origin: Place, *, recursive: bool) -> list[tuple[Place, str, int]]:
    """Return the files that a place stands for, each with its name below it."""
    files: Files = getattr(opened, origin.field)
    if not recursive:
        info = await files.stat(origin.path)
        return [(origin, info.path.name, info.size)]
    prefix = directory_of(origin.path)
    paths = [path async for path in files.iter(prefix)]
    if not paths:
        raise nothing_under(Place(origin.field, prefix))
    return [
        (Place(origin.field, str(info.path)), str(info.path).removeprefix(prefix), info.size)
        for info in await stated(files, paths)
    ]


def _check(tasks: Sequence[Task]) -> None:
    """Refuse what would replace one file of the command by another one of it: a move loses one."""
    sources = {task.source for task in tasks}
    taken: set[Place | Path] = set()
    for task in tasks:
        if task.destination in taken or task.destination in sources:
            message = (
                f"{task.destination} is the destination of {task.source} and of another file, or "
                "is to be copied or moved itself. Use one command for each; nothing was done."
            )
            raise FilepathsCollisionError(message)
        taken.add(task.destination)


def below(goal: Place | Path, name: str, *, into: bool) -> Place | Path:
    """Return where a file goes, which is not outside of the destination."""
    if isinstance(goal, Place):
        return Place(goal.field, directory_of(goal.path) + name) if into else goal
    path = goal / name if into else goal
    if into and not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(goal)):
        message = f"{name!r} would lie outside of {goal}."
        raise PathException(message)
    return path


async def _one(opened: Any, task: Task, shown: Shown, arriving: Arriving, *, move: bool) -> None:
    source, destination = task.source, task.destination
    if isinstance(source, Path):
        assert isinstance(destination, Place)  # noqa: S101 - one of both is
        files: Files = getattr(opened, destination.field)
        content = await asyncio.to_thread(_content, source, destination.path)
        await files.put(content, on_progress=shown.sent)
    elif isinstance(destination, Place):
        files = getattr(opened, source.field)
        other: Files = getattr(opened, destination.field)
        copy = files.move if move else files.copy
        await copy(source.path, destination.path, to=other)
        shown.sent(task.size, task.size)
    else:
        files = getattr(opened, source.field)
        async with files.open(source.path) as stream:
            await arriving.receive(stream, destination, shown)
        if move:
            await files.delete(source.path, missing_ok=False)


def _content(source: Path, path: str) -> FileContent:
    try:
        return FileContent.from_local_path(source, filename=path)
    except MediaTypeCannotBeGuessedException:
        return FileContent.from_local_path(source, filename=path, media_type=UNKNOWN_TYPE)


class Arriving:
    """Local files beside their places, until all of them are whole and their sums are right."""

    def __init__(self) -> None:
        self._parts: dict[Path, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        for part in self._parts:
            part.unlink(missing_ok=True)

    async def receive(self, stream: ObjectStream, destination: Path, shown: Shown) -> None:
        """Write a file beside its place."""
        part = destination.with_name(f"{destination.name}.{uuid.uuid4().hex[:8]}.part")
        await asyncio.to_thread(destination.parent.mkdir, parents=True, exist_ok=True)
        self._parts[part] = destination
        with await asyncio.to_thread(part.open, "xb") as file:
            sent = 0
            async for chunk in stream:
                await asyncio.to_thread(file.write, chunk)
                sent += len(chunk)
                shown.sent(sent, stream.info.size)

    def place(self) -> None:
        """Let all of them take their places."""
        for part, destination in self._parts.items():
            part.replace(destination)


class Shown:
    """How far it is, on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bytes = progress.add_task("bytes", total=None)
        self._before = self._files = self._total = 0

    def begin(self, tasks: Sequence[Task]) -> None:
        """Tell how much there is to do."""
        self._total = len(tasks)
        self._progress.update(self._bytes, total=sum(task.size for task in tasks))

    def sent(self, done: int, total: int | None) -> None:
        """Tell how much of this file is done."""
        del total
        self._progress.update(self._bytes, completed=self._before + done)

    def file(self) -> None:
        """Tell that this file is done."""
        self._files += 1
        self._before = int(self._progress.tasks[0].completed)
        self._progress.update(self._bytes, description=f"{self._files} of {self._total} files")


@contextmanager
def _progress(*, quiet: bool) -> Generator[Shown]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=quiet) as progress:
        yield Shown(progress)
