"""`cp` and `mv`: copy and move files into, out of and inside the store."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fennflow.cli.app import NEEDS_ATTENTION, Json, fail, run, show_json
from fennflow.cli.downloads import PendingDownloads
from fennflow.cli.files import (
    Files,
    Place,
    Recursive,
    Summary,
    UowTarget,
    directory_of,
    find,
    is_pattern,
    show_done,
    stated,
    write_out,
)
from fennflow.cli.target import Target
from fennflow.cli.terminal import stderr, stdout
from fennflow.exceptions import (
    FileException,
    FilepathsCollisionError,
)
from fennflow.files import FileContent, StreamContent, media_types
from fennflow.paths import StoragePath

UNKNOWN_TYPE = "application/octet-stream"
STANDARD = "-"
"""Standard input as a source, standard output as a destination."""
CHUNK = 1 << 20

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", "-n", help="Print each source and where it would go; write and delete nothing."
    ),
]
FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        "-L",
        help="Copy what symbolic links in local directories point to. Default: a link is an error.",
    ),
]


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
    follow_links: FollowLinks = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Copy files into, out of or inside the store: all of them, or none.

    A destination that ends in / is a directory, and so is one for several sources. A directory
    is copied into an existing directory; otherwise the copy gets the name of the destination. The source - is standard input,
    the destination - standard output.
    """
    uow = UowTarget(target)
    if STANDARD in {*sources, destination}:
        if dry_run:
            message = "--dry-run is for files; standard input and output (-) are not. A file is ./-"
            raise typer.BadParameter(message)
        _standard(uow, sources, destination, recursive=recursive, as_json=as_json)
        return
    transfer = _Transfer(uow, sources, destination, recursive, follow_links, move=False)
    if dry_run:
        transfer.show(as_json=as_json)
        return
    show_done(transfer.run(quiet=as_json), "Copied", as_json=as_json)


def mv(
    target: Target,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE…")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION")],
    *,
    recursive: Recursive = False,
    follow_links: FollowLinks = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Move files into, out of or inside the store: all of them, or none.

    Local sources are deleted after the commit, sources in the store by the commit.
    """
    if STANDARD in {*sources, destination}:
        message = (
            "Standard input and output cannot be moved: use cp. For a file of this name, write ./-"
        )
        raise typer.BadParameter(message)
    transfer = _Transfer(
        UowTarget(target), sources, destination, recursive, follow_links, move=True
    )
    if dry_run:
        transfer.show(as_json=as_json)
        return
    done = transfer.run(quiet=as_json)
    kept = transfer.delete_sources()
    show_done(done, "Moved", as_json=as_json)
    for line in kept:
        stderr.message(line)
    if kept:
        raise typer.Exit(NEEDS_ATTENTION)


@dataclass(frozen=True)
class Task:
    """One file to copy or move."""

    source: Place | Path
    destination: Place | Path
    size: int


@dataclass(frozen=True)
class Source:
    """A source file of a command, with `directory` and `name` as in `Found`."""

    path: Place | Path
    directory: str | None
    name: str
    size: int


class _Transfer:
    """What `cp` and `mv` do, in one transaction."""

    def __init__(
        self,
        uow: UowTarget,
        sources: Sequence[str],
        destination: str,
        recursive: bool,  # noqa: FBT001 - of one caller
        follow_links: bool,  # noqa: FBT001 - as above
        *,
        move: bool,
    ) -> None:
        self._uow = uow
        self._recursive = recursive
        self._move = move
        self._destination = target = uow.place(destination) or Path(destination)
        sources_found = [uow.place(text) or Path(text) for text in sources]
        if isinstance(target, Path) and any(isinstance(each, Path) for each in sources_found):
            message = (
                f"Neither {sources[0]!r} nor {destination!r} is a place in the store (FIELD:PATH)."
            )
            raise typer.BadParameter(message)
        self._places = [each for each in sources_found if isinstance(each, Place)]
        into = destination.endswith(("/", ":")) or len(sources) > 1
        into = into or any(is_pattern(each.path) for each in self._places)
        # `Path.is_dir` raises if a name is too long; writing gives a better error.
        self._into = into or (isinstance(target, Path) and os.path.isdir(target))  # noqa: PTH112
        self._local = [
            each
            for text, source in zip(sources, sources_found, strict=True)
            if isinstance(source, Path)
            for each in _local(text, recursive=recursive, follow_links=follow_links)
        ]
        paths = [each.path for each in self._local if isinstance(each.path, Path)]
        self._before = {path: _state(path) for path in paths} if move else {}

    def run(self, *, quiet: bool) -> Summary:
        """Do it."""
        with _progress(quiet=quiet) as shown, self._downloads() as downloads:
            return run(self._all(shown, downloads))

    def show(self, *, as_json: bool) -> None:
        """Print what would be done."""
        done = Summary()
        with self._downloads() as downloads:
            planned = run(self._planned(downloads))
        for task in planned.values():
            done.add(task.destination, task.size)
            if not as_json:
                stdout.line(f"{task.source} -> {task.destination}")
        if as_json:
            show_json(done)

    def _downloads(self) -> PendingDownloads:
        target = self._destination
        base = Path() if isinstance(target, Place) else target if self._into else target.parent
        return PendingDownloads(base, durable=self._move)

    async def _planned(self, downloads: PendingDownloads) -> dict[str, Task]:
        async with self._uow.open() as opened:
            return await self._plan(opened, downloads)

    async def _plan(self, opened: Any, downloads: PendingDownloads) -> dict[str, Task]:
        """Return the tasks by their path below the destination, after checking what can be checked."""
        sources = self._local + await _remote(opened, self._places, recursive=self._recursive)
        await self._look_at_destination(opened)
        names = [self._name(each) for each in sources]
        self._check_not_inside(sources)
        tasks = [
            Task(each.path, self._place(name), each.size)
            for each, name in zip(sources, names, strict=True)
        ]
        _check(tasks)
        if isinstance(self._destination, Path):
            await asyncio.to_thread(downloads.check, names)
        return dict(zip(names, tasks, strict=True))

    async def _all(self, shown: ProgressView, downloads: PendingDownloads) -> Summary:
        done = Summary()
        async with self._uow.open() as opened:
            tasks = await self._plan(opened, downloads)
            if isinstance(self._destination, Path):
                await asyncio.to_thread(downloads.reserve, list(tasks))
            shown.begin(list(tasks.values()))
            for name, task in tasks.items():
                await self._one(opened, task, name, shown, downloads)
                done.add(task.destination, task.size)
                shown.file()
            if isinstance(self._destination, Path):
                # Before the commit: the files that a move deletes must be stored here by then.
                await opened.step(downloads.place, downloads.restore)
        return done

    async def _look_at_destination(self, opened: Any) -> None:
        """Find out whether the destination is an existing directory, into which directories go."""
        target = self._destination
        if self._recursive and not self._into and isinstance(target, Place):
            files: Files = getattr(opened, target.field)
            self._into = bool(await files.list(directory_of(target.path), limit=1))

    def _check_not_inside(self, sources: Sequence[Source]) -> None:
        """Refuse to copy or move a directory of the store into itself, like the shell's `cp` and `mv`."""
        target = self._destination
        for each in sources:
            if each.directory is None or not isinstance(each.path, Place):
                continue
            root = Place(each.path.field, each.path.path.removesuffix(each.name))
            if (
                isinstance(target, Place)
                and target.field == root.field
                and directory_of(target.path).startswith(root.path)
            ):
                message = f"{target} is inside {root}, which cannot be copied or moved into itself; nothing was done."
                raise FilepathsCollisionError(message)

    def _name(self, source: Source) -> str:
        """Return the path of a file below the destination directory, as the shell's `cp` builds it."""
        if self._into:
            return f"{source.directory}/{source.name}" if source.directory else source.name
        target = self._destination
        name = target.name if isinstance(target, Path) else target.path.rpartition("/")[2]
        return name if source.directory is None else f"{name}/{source.name}"

    def _place(self, name: str) -> Place | Path:
        """Return where a file goes."""
        target = self._destination
        if isinstance(target, Path):
            return (target if self._into else target.parent) / name
        prefix = target.path if self._into else target.path.rpartition("/")[0]
        return Place(target.field, directory_of(prefix) + name)

    async def _one(
        self, opened: Any, task: Task, name: str, shown: ProgressView, downloads: PendingDownloads
    ) -> None:
        source, destination = task.source, task.destination
        if isinstance(source, Path):
            assert isinstance(destination, Place)  # noqa: S101 - one of both is
            files: Files = getattr(opened, destination.field)
            content = await asyncio.to_thread(_content, source, destination.path)
            await files.put(content, on_progress=shown.sent)
        elif isinstance(destination, Place):
            files = getattr(opened, source.field)
            other: Files = getattr(opened, destination.field)
            copy = files.move if self._move else files.copy
            await copy(source.path, destination.path, to=other)
            shown.sent(task.size, task.size)
        else:
            files = getattr(opened, source.field)
            async with files.open(source.path) as stream:
                await downloads.receive(stream, name, shown.sent)
            if self._move:
                await files.delete(source.path, missing_ok=False)

    def delete_sources(self) -> list[str]:
        """Delete the local files that are now in the store; return those that were kept, and why."""
        kept: list[str] = []
        for path, before in self._before.items():
            try:
                if _state(path) != before:
                    kept.append(f"{path} was changed after it was read, so it was not deleted.")
                else:
                    path.unlink()
            except FileNotFoundError:
                pass  # it was named twice, or deleted in the meantime
            except OSError as error:
                kept.append(f"{path} is in the store, and could not be deleted here: {error}")
        return kept


def _state(path: Path) -> Mapping[str, int]:
    """Return the attributes of a file that change when it is written."""
    found = path.stat()
    return {"inode": found.st_ino, "size": found.st_size, "time": found.st_mtime_ns}


def _local(text: str, *, recursive: bool, follow_links: bool) -> list[Source]:
    """Return the files that a local path names."""
    source = Path(text)
    try:
        if recursive and source.is_dir():
            last = text.rstrip("/").rpartition("/")[2]
            directory = "" if last in {".", ".."} else source.name
            return [
                Source(path, directory, path.relative_to(source).as_posix(), path.stat().st_size)
                for path in _walked(source, follow_links=follow_links)
            ]
        if source.is_file():
            return [Source(source, None, source.name, source.stat().st_size)]
    except OSError as error:
        fail(FileException(f"{source} cannot be read: {error}. Nothing was done."))
    except FileException as error:
        fail(error)
    if source.is_dir():
        message = f"{source} is a directory: add --recursive. Nothing was done."
    elif source.exists():
        message = (
            f"{source} is not a file. If it is a pipe, give its bytes to standard input and name "
            f"that: cat {source} | fennflow cp … - … Nothing was done."
        )
    else:
        message = f"No such file: {source}"
    return fail(FileException(message))


def _walked(source: Path, *, follow_links: bool) -> Generator[Path]:
    """Iterate over the files of a directory; anything that is neither file nor directory is an error."""

    def stop(error: OSError) -> None:
        raise error

    for folder, directories, files in os.walk(source, onerror=stop, followlinks=follow_links):
        directories.sort()
        for name in (*directories, *sorted(files)):
            path = Path(folder, name)
            if path.is_symlink():
                if not follow_links:
                    hint = "Add --follow-links to copy what links point to"
                    raise _not_copied(path, "is a symbolic link", hint)
                if Path(folder).resolve().is_relative_to(path.resolve()):
                    raise _not_copied(path, "is a link to a directory above it", "Remove it")
            if name in files:
                if not path.is_file():
                    raise _not_copied(path, "is not a file, or a broken link", "Remove it")
                yield path


def _not_copied(path: Path, what: str, hint: str) -> FileException:
    return FileException(f"{path} {what}. {hint}, or copy without it. Nothing was done.")


async def _remote(opened: Any, places: Sequence[Place], *, recursive: bool) -> list[Source]:
    """Return the files that places name."""
    found = await find(opened, places, recursive=recursive)
    sizes: dict[Place, int] = {}
    for name in dict.fromkeys(each.place.field for each in found):
        paths = [StoragePath(each.place.path) for each in found if each.place.field == name]
        for info in await stated(getattr(opened, name), paths):
            sizes[Place(name, str(info.path))] = info.size
    return [Source(each.place, each.directory, each.name, sizes[each.place]) for each in found]


def _check(tasks: Sequence[Task]) -> None:
    """Refuse a command in which one file would replace another one: a move would lose a file."""
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


def _standard(
    uow: UowTarget, sources: Sequence[str], destination: str, *, recursive: bool, as_json: bool
) -> None:
    """Copy a file to standard output, or from standard input."""
    message = ""
    if len(sources) > 1 or recursive:
        message = (
            "Standard input or output (-) is one file: give one other file, without --recursive."
        )
    elif destination == STANDARD:
        if as_json:
            message = "--json and the bytes of a file cannot both go to standard output."
        else:
            write_out(uow, uow.places(sources))
    else:
        [place] = uow.places([destination])
        if not place.path or place.path.endswith("/"):
            message = "Standard input (-) has no name: write FIELD:PATH with the name of a file."
        else:
            show_done(run(_from_input(uow, place)), "Copied", as_json=as_json)
    if message:
        message += " For a local file of this name, write ./-"
        raise typer.BadParameter(message)


async def _from_input(uow: UowTarget, place: Place) -> Summary:
    """Store standard input as a file, in one transaction."""
    done = Summary()

    async def chunks() -> AsyncGenerator[bytes]:
        while chunk := await _read_input():
            done.bytes += len(chunk)
            yield chunk

    async with uow.open() as opened:
        files: Files = getattr(opened, place.field)
        content = StreamContent.from_iterable(
            chunks(), filename=place.path, media_type=_media_type(place.path)
        )
        await files.put(content)
        done.add(place, 0)
    return done


async def _read_input() -> bytes:
    """Read from standard input in a thread that an interrupt need not wait for."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()

    def settle(chunk: bytes, error: OSError | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(chunk)
        else:
            answer.set_exception(FileException(f"Standard input cannot be read: {error}"))

    def read() -> None:
        error, chunk = None, b""
        try:
            chunk = os.read(sys.stdin.fileno(), CHUNK)
        except OSError as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed in the meantime
            loop.call_soon_threadsafe(settle, chunk, error)

    threading.Thread(target=read, daemon=True).start()
    return await answer


def _content(source: Path, path: str) -> FileContent:
    return FileContent.from_local_path(source, filename=path, media_type=_media_type(path))


def _media_type(path: str) -> str:
    return media_types.from_name(path) or UNKNOWN_TYPE


class ProgressView:
    """The progress of a command, on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bytes = progress.add_task("bytes", total=None)
        self._before = self._files = self._total = 0

    def begin(self, tasks: Sequence[Task]) -> None:
        """Report how much there is to do."""
        self._total = len(tasks)
        self._progress.update(self._bytes, total=sum(task.size for task in tasks))

    def sent(self, done: int, total: int | None) -> None:
        """Report how much of this file is done."""
        del total
        self._progress.update(self._bytes, completed=self._before + done)

    def file(self) -> None:
        """Report that this file is done."""
        self._files += 1
        self._before = int(self._progress.tasks[0].completed)
        self._progress.update(self._bytes, description=f"{self._files} of {self._total} files")


@contextmanager
def _progress(*, quiet: bool) -> Generator[ProgressView]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with stderr.progress(*columns, quiet=quiet) as progress:
        yield ProgressView(progress)
