"""Access to local files below a root without following symbolic links.

A link below the root may lead anywhere, or make two keys name the same file. For writes and
deletions, each directory is opened relative to its parent, so that it cannot be replaced by a link
meanwhile.
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
    """Return why a path cannot be that of an object, such as a link or a pipe; else an empty text.

    The key may also come from a step in the journal, not only from the user.
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
    """Return when a file was written; None if the time is out of range.

    Any writer can set the time of a file to a hundred million years from now, at which obstore
    fails.
    """
    try:
        return datetime.fromtimestamp(path.lstat().st_mtime, UTC)
    except (OverflowError, ValueError):
        return None


@contextmanager
def opened(root: Path, segments: Sequence[str], *, mode: int | None = None) -> Generator[list[int]]:
    """Open directories, each relative to the one before, starting at the root.

    Args:
        root: the first one.
        segments: the names of the others.
        mode: the mode of directories that are created; without it none is created.

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
                os.fchmod(found[-1], mode or 0)  # independent of the umask
        yield found


def place(root: Path, incoming: str, key: str, *, replace: bool, mode: int) -> None:
    """Move a file to its final path, durably.

    Args:
        root: the directory above both paths.
        incoming: the path of the file, below the root.
        key: the final path.
        replace: whether it may replace a file.
        mode: the mode of directories that are created.

    Raises:
        FileExistsError: there is a file, and it must not be replaced.
        OSError: a directory on the path is a file or a link, or another error of the file system.
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
                # A directory became empty, and the task that deleted its last file has removed it.
                if attempt == ATTEMPTS_TO_MAKE:
                    raise


def remove(root: Path, key: str) -> None:
    """Delete a file and the directories that become empty, durably; a missing file is not an error."""
    *parents, name = key.split("/")
    # A file in place of a directory, or a directory in place of the file: there is no object.
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
        root: the root directory.
        directory: where to begin, as a path below the root; or empty.
        skip: a directory that is left out.
        report: called with each path that is left out, and the reason.
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
    """Return the entries of a directory; none if it is gone or left out."""
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
