"""Commands for files: listing, reading and deleting what a unit of work stores.

A place is `FIELD:PATH`: a repository field of the unit of work, and a path in it, from the root of
its bucket. Text without a name before its first colon is a local path.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, NoReturn

import typer
from typing_extensions import override

from fennflow.cli.app import FAILED, Json, run, show_json
from fennflow.cli.target import Target, load
from fennflow.cli.terminal import stderr, stdout, write_bytes
from fennflow.exceptions import NoSuchKeyException
from fennflow.paths import StoragePath
from fennflow.repositories import (
    CopyRepository,
    CrudRepository,
    GeneratePresignedUrlRepository,
    StatRepository,
    StreamRepository,
)
from fennflow.repositories.fields import fields_of
from fennflow.responses import ObjectInfo
from fennflow.uow import UnitOfWork

AT_ONCE = 1000

Places = Annotated[
    list[str],
    typer.Argument(
        metavar="FIELD:PATH…",
        help="Files of the store. *, ? and [] match within a name, ** any directories.",
    ),
]
Recursive = Annotated[
    bool, typer.Option("--recursive", "-r", help="Include directories and everything below them.")
]


class Files(
    CrudRepository,
    StatRepository,
    CopyRepository,
    StreamRepository,
    GeneratePresignedUrlRepository,
):
    """A repository with all that the commands need, whatever the user's own repositories can do."""


@dataclass(frozen=True)
class Place:
    """A path in a repository."""

    field: str
    path: str

    @override
    def __str__(self) -> str:
        return f"{self.field}:{self.path}"


@dataclass
class Summary:
    """What a command did, for people and for JSON."""

    files: int = 0
    bytes: int = 0
    paths: list[str] = field(default_factory=list[str])

    def add(self, path: object, size: int) -> None:
        """Count one more."""
        self.files += 1
        self.bytes += size
        self.paths.append(str(path))


class UowTarget:
    """A unit of work of the user's, with everything that the commands need."""

    def __init__(self, target: str) -> None:
        uow_class = load(target)
        found = fields_of(uow_class)
        self.fields = list(found)
        fields = {name: each.using(Files) for name, each in found.items()}
        self.uow_class: type[UnitOfWork] = type(uow_class.__name__, (uow_class,), fields)

    def place(self, text: str) -> Place | None:
        """Return the place that a text names; None for a local path.

        Raises:
            typer.BadParameter: it looks like a place, but there is no such field.
        """
        name, colon, path = text.partition(":")
        if not colon:
            return None
        if not name and len(self.fields) == 1:
            return Place(self.fields[0], path.lstrip("/"))
        if name in self.fields:
            return Place(name, path.lstrip("/"))
        # One letter may be a drive.
        return self.refuse(text) if name.isidentifier() and len(name) > 1 else None

    def places(self, texts: Sequence[str]) -> list[Place]:
        """Return the places that texts name.

        Raises:
            typer.BadParameter: one of them is not a place.
        """
        return [self.place(text) or self.refuse(text) for text in texts]

    def refuse(self, text: str) -> NoReturn:
        """Raise an error that says what a place looks like."""
        message = (
            f"{text!r} is not a place in the store: write FIELD:PATH, where FIELD is one of "
            f"{', '.join(self.fields)}. A local path with a colon begins with ./"
        )
        raise typer.BadParameter(message)

    def open(self) -> UnitOfWork:
        """Return one transaction for all that a command does."""
        return self.uow_class()


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (ls, cat, stat, rm, presign):
        app.command()(command)


def ls(
    target: Target,
    place: Annotated[str, typer.Argument(metavar="[FIELD:PATH]", help="Where to look.")] = ":",
    *,
    recursive: Recursive = False,
    long: Annotated[bool, typer.Option("--long", "-l", help="Show size, time and type.")] = False,
    as_json: Json = False,
) -> None:
    """List files and directories, as the catalog has them; without a place, the fields."""
    uow = UowTarget(target)
    if place == ":" and len(uow.fields) > 1:
        lines = [f"{name}:" for name in uow.fields]
        if as_json:
            show_json([{"path": line} for line in lines])
        else:
            for line in lines:
                stdout.line(line)
        return
    (where,) = uow.places([place])
    directories, paths, infos = run(_listed(uow, where, recursive=recursive, stat=long or as_json))
    if as_json:
        rows: list[Any] = [{"path": each} for each in directories]
        show_json(rows + infos)
    elif long:
        table = [("", "", "", each) for each in directories]
        table += [
            (str(each.size), f"{each.modified_at:%Y-%m-%d %H:%M}", each.media_type, str(each.path))
            for each in infos
        ]
        stdout.table(("bytes", "written", "type", "path"), table)
    else:
        for path in (*directories, *paths):
            stdout.line(path)


async def _listed(
    uow: UowTarget, where: Place, *, recursive: bool, stat: bool
) -> tuple[list[str], list[str], list[ObjectInfo]]:
    async with uow.open() as opened:
        files: Files = getattr(opened, where.field)
        found = await files.list(where.path, delimiter=None if recursive else "/")
        infos = await stated(files, found) if stat else []
        return [str(each) for each in found.prefixes], [str(each) for each in found], infos


@dataclass(frozen=True)
class Found:
    """A file of the store that a command names.

    Args:
        place: where it is.
        directory: name of the directory that the command names; empty for the root, None for a file.
        name: of the file, or its path below that directory.
    """

    place: Place
    directory: str | None
    name: str


async def find(opened: Any, places: Sequence[Place], *, recursive: bool) -> list[Found]:
    """Return the files that places stand for, each once.

    A place that names an existing file means that file, whatever characters it has; otherwise it
    may be a pattern.

    Raises:
        NoSuchKeyException: a pattern or a directory has no file.
    """
    found: dict[Place, Found] = {}
    for place in places:
        files: Files = getattr(opened, place.field)
        for each in await _matching(files, place, recursive=recursive):
            name = each.path.rpartition("/")[2]
            if not recursive or (name not in {"", "."} and await files.exists(each.path)):
                found.setdefault(each, Found(each, None, name))
                continue
            prefix, base = directory_of(each.path), each.path.rstrip("/").rpartition("/")[2]
            if base == ".":
                prefix, base = directory_of(each.path.rstrip("/")[:-1]), ""
            below = [str(path) async for path in files.iter(prefix)]
            if not below:
                raise nothing_under(Place(place.field, prefix))
            for path in below:
                one = Place(place.field, path)
                found.setdefault(one, Found(one, base, path.removeprefix(prefix)))
    return list(found.values())


async def _matching(files: Files, place: Place, *, recursive: bool) -> list[Place]:
    """Return the files, and with `recursive` the directories, that match a pattern."""
    if not is_pattern(place.path) or await files.exists(place.path):
        return [place]
    prefix = directory_of(re.split(r"[*?[]", place.path)[0].rpartition("/")[0])
    pattern = place.path.rstrip("/").split("/")
    matches: dict[Place, None] = {}
    async for path in files.iter(prefix):
        names = str(path).split("/")
        lengths = range(1 if recursive else len(names), len(names) + 1)
        length = next((n for n in lengths if _matches(names[:n], pattern)), None)
        if length is not None:
            matches[Place(place.field, "/".join(names[:length]))] = None
    if not matches:
        raise nothing_under(place)
    return list(matches)


def is_pattern(path: str) -> bool:
    """Return whether a path has wildcard characters."""
    return any(character in path for character in "*?[")


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path matches a pattern, both split at `/`; `**` matches any directories."""
    if not pattern or not names:
        return not pattern and not names
    if pattern[0] == "**" and len(pattern) > 1:
        return _matches(names, pattern[1:]) or _matches(names[1:], pattern)
    return fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


async def stated(files: Files, paths: Sequence[StoragePath]) -> list[ObjectInfo]:
    """Return the catalog's information about files, a thousand at a time."""
    infos: list[ObjectInfo] = []
    for start in range(0, len(paths), AT_ONCE):
        found: Any = await files.stat(*paths[start : start + AT_ONCE])
        infos += [found] if isinstance(found, ObjectInfo) else found
    return infos


def cat(target: Target, places: Places) -> None:
    """Write the bytes of files to standard output, one after the other."""
    uow = UowTarget(target)
    write_out(uow, uow.places(places))


def write_out(uow: UowTarget, wanted: Sequence[Place]) -> None:
    """Write the bytes of files to standard output."""

    async def work() -> None:
        async with uow.open() as opened:
            for each in await find(opened, wanted, recursive=False):
                place = each.place
                async with getattr(opened, place.field).open(place.path) as stream:
                    async for chunk in stream:
                        write_bytes(chunk)
        sys.stdout.buffer.flush()

    try:
        run(work())
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stat(target: Target, places: Places, *, as_json: Json = False) -> None:
    """Show the catalog's records of files: size, type, checksum, times, metadata."""
    uow = UowTarget(target)
    wanted = uow.places(places)

    async def work() -> list[ObjectInfo]:
        async with uow.open() as opened:
            return [
                await getattr(opened, each.place.field).stat(each.place.path)
                for each in await find(opened, wanted, recursive=False)
            ]

    infos = run(work())
    if as_json:
        show_json(infos)
        return
    for number, info in enumerate(infos):
        if number:
            stdout.line()
        rows = [
            ("path", info.path),
            ("size", f"{info.size} bytes"),
            ("type", info.media_type),
            ("ETag", info.etag),
            ("SHA-256", info.sha256 or "not known"),
            ("created", info.created_at.isoformat()),
            ("written", info.modified_at.isoformat()),
            *((f"metadata {name}", value) for name, value in info.metadata.items()),
        ]
        stdout.table(("", ""), rows)


def rm(
    target: Target,
    places: Places,
    *,
    recursive: Recursive = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Print what would be deleted; delete nothing.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Delete directories without asking.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete files: all of them, or none. A path that does not exist is an error.

    With --recursive or a pattern it shows the number of files, and asks. Scripts pass --yes.
    """
    uow = UowTarget(target)
    wanted = uow.places(places)
    found = run(_found(uow, wanted, recursive=recursive))
    if dry_run:
        if as_json:
            show_json(_done(found))
        else:
            for each in found:
                stdout.line(str(each))
        return
    if (recursive or any(is_pattern(each.path) for each in wanted)) and not yes:
        _confirm(len(found), wanted)

    async def work() -> list[Place]:
        gone: list[Place] = []
        async with uow.open() as opened:
            for field_name in dict.fromkeys(each.field for each in found):
                files: Files = getattr(opened, field_name)
                paths = [StoragePath(each.path) for each in found if each.field == field_name]
                for start in range(0, len(paths), AT_ONCE):
                    # Another program may have deleted some files of a directory in the meantime.
                    some = paths[start : start + AT_ONCE]
                    deleted = await files.delete(*some, missing_ok=recursive)
                    gone += [Place(field_name, str(path)) for path in deleted]
        return gone

    show_done(_done(run(work())), "Deleted", as_json=as_json)


def presign(
    target: Target,
    places: Places,
    *,
    expires_in: Annotated[
        float, typer.Option("--expires-in", "-e", help="Seconds until the URLs expire.")
    ] = 3600.0,
    upload: Annotated[
        bool, typer.Option("--upload", help="Make URLs for a PUT to free paths, instead of a GET.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a URL for each file, with which anyone can read it until it expires.

    With --upload the headers that a PUT has to send are printed too, as curl takes them.
    """
    uow = UowTarget(target)
    wanted = uow.places(places)

    async def work() -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = []
        async with uow.open() as opened:
            found = (
                wanted
                if upload
                else [each.place for each in await find(opened, wanted, recursive=False)]
            )
            for place in found:
                files: Files = getattr(opened, place.field)
                made = await files.generate_presigned_url(
                    place.path, expires_in=expires_in, method="PUT" if upload else "GET"
                )
                shown.append({"path": str(place), "url": made[0], "headers": dict(made.headers)})
        return shown

    shown = run(work())
    if as_json:
        show_json(shown)
        return
    for each in shown:
        stdout.line(each["url"])
        if upload:
            for name, value in each["headers"].items():
                stdout.line(f"  -H '{name}: {value}'")


async def _found(uow: UowTarget, wanted: Sequence[Place], *, recursive: bool) -> list[Place]:
    """Return the files that places stand for, each once."""
    async with uow.open() as opened:
        found = [each.place for each in await find(opened, wanted, recursive=recursive)]
        for name in dict.fromkeys(each.field for each in found):
            paths = [StoragePath(each.path) for each in found if each.field == name]
            await stated(getattr(opened, name), paths)
    return found


def _confirm(count: int, wanted: Sequence[Place]) -> None:
    """Ask whether to delete; end the program unless the answer is yes."""
    where = ", ".join(map(str, wanted))
    stderr.line(f"Delete {count:,} {'file' if count == 1 else 'files'} of {where}? [y/N]")
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        stderr.line("Nothing was deleted. Add --yes to delete without being asked.")
        raise typer.Exit(FAILED)


def _done(places: Sequence[Place]) -> Summary:
    done = Summary()
    for place in places:
        done.add(place, 0)
    return done


def directory_of(path: str) -> str:
    """Return the prefix of everything in a directory."""
    return f"{path.rstrip('/')}/" if path.strip("/") else ""


def show_done(done: Summary, verb: str, *, as_json: bool) -> None:
    """Report what was done."""
    if as_json:
        show_json(done)
        return
    size = f", {done.bytes:,} bytes" if done.bytes else ""
    stdout.line(f"{verb} {done.files:,} {'file' if done.files == 1 else 'files'}{size}.")


def nothing_under(place: Place) -> NoSuchKeyException:
    """Return the error for a place without a file."""
    message = f"No such file: {place}"
    return NoSuchKeyException(message)
