"""Local files below a root: no symbolic link on the way to one is followed.

A link below the root may lead anywhere, or make one file of two keys. Where something is written
or deleted, each directory is opened in the one above it, so that it cannot become a link meanwhile.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fennflow.paths import MAX_KEY_BYTES

ATTEMPTS_TO_MAKE = 10
SHOWN = 80
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def obstacle(root: Path, key: str) -> str:
    """Return what keeps a path from being that of an object: a link, a pipe; else an empty text.

    The key need not be one of the user's: a step in the journal names it, too.
    """
    path, segments = root, key.split("/")
    for segment in segments:
        if segment in {".", ".."} or "\0" in segment:
            return f"its segment {segment!r} is not the name of a file"
    for segment in segments:
        path /= segment
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            return f"{path} cannot be examined ({error.strerror})"
        if stat.S_ISLNK(mode):
            return f"{path} is a symbolic link, which is not followed"
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            return f"{path} is not a regular file"
    return ""


def written_at(path: Path) -> datetime | None:
    """Return when a file was written; None for a time that no calendar has.

    Any writer of a file can set its time to one of a hundred million years. obstore fails at it.
    """
    try:
        return datetime.fromtimestamp(path.lstat().st_mtime, UTC)
    except (OverflowError, ValueError):
        return None


@contextmanager
def opened(root: Path, segments: Sequence[str], *, mode: int | None = None) -> Generator[list[int]]:
    """Open directories, each in the one before, from the root on.

    Args:
        root: the first one.
        segments: the names of the others.
        mode: of those that are made; without it none is made.

    Raises:
        OSError: one does not exist, or is a file or a link.
    """
    with ExitStack() as stack:

        def enter(name: str | Path, above: int | None) -> int:
            descriptor = os.open(name, DIRECTORY, dir_fd=above)
            stack.callback(os.close, descriptor)
            return descriptor

        found = [enter(root, None)]
        for segment in segments:
            made = False
            if mode is not None:
                with suppress(FileExistsError):
                    os.mkdir(segment, mode, dir_fd=found[-1])
                    made = True
            found.append(enter(segment, found[-1]))
            if made:
                os.fchmod(found[-1], mode or 0)  # whatever the umask
        yield found


def place(root: Path, incoming: str, key: str, *, replace: bool, mode: int) -> None:
    """Let a file take its place, durably.

    Args:
        root: above both.
        incoming: the path of the file, below the root.
        key: the path that it gets.
        replace: whether it may replace a file.
        mode: of directories that are made.

    Raises:
        FileExistsError: there is a file, and it must not be replaced.
        OSError: a directory on the way is a file or a link, or what the file system says.
    """
    *above, name = incoming.split("/")
    *parents, target = key.split("/")
    with opened(root, above) as sources:
        for attempt in range(1, ATTEMPTS_TO_MAKE + 1):
            try:
                with opened(root, parents, mode=mode) as targets:
                    if replace:
                        os.rename(name, target, src_dir_fd=sources[-1], dst_dir_fd=targets[-1])
                    else:
                        os.link(
                            *(name, target),
                            src_dir_fd=sources[-1],
                            dst_dir_fd=targets[-1],
                            follow_symlinks=False,
                        )
                        os.unlink(name, dir_fd=sources[-1])
                    for each in reversed(targets):
                        os.fsync(each)
                    return
            except FileNotFoundError:
                # A directory became empty, and the task that deleted its last file removed it.
                if attempt == ATTEMPTS_TO_MAKE:
                    raise


def remove(root: Path, key: str) -> None:
    """Delete a file, and directories that are empty then, durably; nothing there is as good."""
    *parents, name = key.split("/")
    # A file in the place of a directory, or a directory in that of the file: there is no object.
    with (
        suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError),
        opened(root, parents) as found,
    ):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=found[-1])
        left = len(found)
        with suppress(OSError):  # it is not empty
            for parent in reversed(parents):
                os.rmdir(parent, dir_fd=found[left - 2])
                left -= 1
        for each in reversed(found[:left]):
            os.fsync(each)


def walk(
    root: Path, directory: str, skip: str, report: Callable[[str, str], None]
) -> Iterator[str]:
    """Iterate over the paths of regular files in a directory, below the root, in no order.

    Args:
        root: of all.
        directory: where to begin: a path below the root, or empty.
        skip: a directory that is left out.
        report: called with the path of what is left out, and why.
    """
    blocked = obstacle(root, directory) if directory else ""
    if blocked:
        report(directory, blocked)
        return
    waiting = [directory]
    while waiting:
        above = waiting.pop()
        for entry in _entries(root, above, report, first=above == directory):
            path = f"{above}/{entry.name}" if above else entry.name
            if path == skip:
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_file(follow_symlinks=False):
                yield path
            else:
                kind = "a symbolic link" if entry.is_symlink() else "not a regular file"
                report(path, f"is {kind}")


def _entries(
    root: Path, directory: str, report: Callable[[str, str], None], *, first: bool
) -> Sequence[os.DirEntry[str]]:
    """Return what is in a directory; nothing of one that is gone or left out."""
    if len(os.fsencode(directory)) >= MAX_KEY_BYTES:
        report(f"{directory[:SHOWN]}...", "is longer than a key can be")
        return ()
    try:
        with os.scandir(root / directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except PermissionError as error:
        if first:
            raise
        report(directory, f"cannot be read: {error.strerror}")
        return ()
