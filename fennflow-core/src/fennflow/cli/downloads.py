"""Copies files of the store to local paths: all of them, or none."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from fennflow.exceptions import FileException, FilepathsCollisionError, PathException
from fennflow.repositories.streaming import ObjectStream

WINDOWS = os.name == "nt"

_NOT_ON_WINDOWS = re.compile(r'[\x00-\x1f<>:"\\|?*]')
_DEVICES = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9\u00b9\u00b2\u00b3]) *(?:\.|$)",
    re.IGNORECASE,
)
_TAKEN = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def check_local_name(name: str, *, windows: bool = WINDOWS) -> None:
    """Refuse a path of the store that would not be a path inside of a local directory.

    Args:
        name: the path below the destination, with `/` between segments.
        windows: whether the rules of Windows apply as well.

    Raises:
        PathException: it leads outside, or names something other than a file.
    """
    for segment in name.split("/"):
        outside = segment in {"", ".", ".."} or "\0" in segment
        if windows and not outside:
            # A backslash separates, a colon names a drive or a stream, dots at the end are dropped.
            outside = bool(_NOT_ON_WINDOWS.search(segment) or _DEVICES.match(segment))
            outside = outside or segment[-1] in " ."
        if outside:
            message = (
                f"{name!r} cannot be a local path: its segment {segment!r} would lead outside of the "
                "destination, or cannot be a file name on this system. Nothing was written."
            )
            raise PathException(message)


class PendingDownloads:
    """Local files that are being written.

    Bytes are written to a new directory inside the destination, under the names that the files will
    have. So names that the file system considers equal (case, Unicode forms) collide there, before
    anything is replaced. When all files are complete they are renamed, and what they replace is
    kept until the transaction has ended.

    Args:
        base: the directory below which files may be written; it is made if it does not exist.
        durable: whether files are synced to the disk, as a move needs.
    """

    def __init__(self, base: Path, *, durable: bool) -> None:
        self._base = base
        self._durable = durable
        self._directory = base / f".fennflow-{uuid.uuid4().hex[:12]}"
        self._names: list[str] = []
        self._made: list[Path] = []
        self._undo: list[Callable[[], object]] = []
        self._keep = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._keep:
            shutil.rmtree(self._directory, ignore_errors=True)
        for directory in reversed(self._made):
            with suppress(OSError):  # it is not empty: another program uses it by now
                directory.rmdir()

    def check(self, names: Sequence[str]) -> None:
        """Check that all files can be placed, without writing anything.

        Args:
            names: paths below the destination, with `/` between segments.

        Raises:
            PathException: a path leads outside, also through a link.
            FilepathsCollisionError: a directory is in the way.
            FileException: the file system refuses.
        """
        root = os.path.realpath(self._base)
        checked: set[Path] = set()
        for name in names:
            check_local_name(name)
            target = self._base / name
            with _reported(target):
                if target.parent not in checked:
                    self._check_directory(root, name)
                    checked.add(target.parent)
                if target.exists() and not target.is_file():
                    message = (
                        f"{target} is a directory or a device, which {name!r} would replace. "
                        "Nothing was written."
                    )
                    raise FilepathsCollisionError(message)

    def reserve(self, names: Sequence[str]) -> None:
        """Reserve the names of all files.

        Args:
            names: paths below the destination, which were checked.

        Raises:
            FilepathsCollisionError: two of them would be one local file.
            FileException: the file system refuses.
        """
        with _reported(self._base):
            self._make(self._base)
            self._directory.mkdir(mode=0o700)
            (self._directory / "new").mkdir()
            (self._directory / "old").mkdir()
            for name in names:
                self._reserve(name)
        self._names = list(names)

    def _reserve(self, name: str) -> None:
        incoming = self._incoming(name)
        try:
            incoming.parent.mkdir(parents=True, exist_ok=True)
            incoming.open("xb").close()
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            message = (
                f"{self._base / name} would be the local path of two files, or both a file and a "
                "directory. Copy them to different directories; nothing was written."
            )
            raise FilepathsCollisionError(message) from None

    def _check_directory(self, root: str, name: str) -> None:
        """Refuse a directory that resolves to another place, or is a file."""
        *parents, _ = name.split("/")
        directory = Path(root, *parents)
        real = os.path.realpath(directory)
        # A link to itself resolves to itself.
        links = (
            Path(root, *parents[:number]).is_symlink() for number in range(1, len(parents) + 1)
        )
        if os.path.normcase(real) != os.path.normcase(directory) or any(links):
            message = (
                f"{name!r} would be written through a link, to {real}, which is not in {self._base} "
                "under this name. Remove the link, or choose another destination; nothing was "
                "written."
            )
            raise PathException(message)
        for each in (directory, *directory.parents):
            if each.exists():
                if not each.is_dir():
                    message = f"{each} is a file, and {name!r} needs a directory there. Nothing was written."
                    raise FilepathsCollisionError(message)
                return

    async def receive(
        self, stream: ObjectStream, name: str, on_progress: Callable[[int, int | None], object]
    ) -> None:
        """Write a file to the new directory; the file at its final path is left alone."""
        path = self._incoming(name)
        with _reported(path), await asyncio.to_thread(path.open, "wb") as file:
            sent = 0
            async for chunk in stream:
                await asyncio.to_thread(file.write, chunk)
                sent += len(chunk)
                on_progress(sent, stream.info.size)
            await asyncio.to_thread(file.flush)
            if self._durable:
                await asyncio.to_thread(os.fsync, file.fileno())

    async def place(self) -> None:
        """Rename all files to their final paths; if one cannot be renamed, restore everything.

        Raises:
            FileException: the file system refuses.
        """
        try:
            for number, name in enumerate(self._names):
                target = self._base / name
                with _reported(target):
                    self._make(target.parent)
                    self._set_aside(target, self._directory / "old" / str(number))
                    self._incoming(name).replace(target)
            if self._durable:
                with _reported(self._base):
                    self._sync()
        except BaseException:
            await self.restore()
            raise

    def _set_aside(self, target: Path, old: Path) -> None:
        """Move an existing file aside, and note how to restore it."""
        try:
            try:
                os.link(target, old, follow_symlinks=False)
            except FileNotFoundError:
                raise
            except (OSError, NotImplementedError):
                target.rename(old)  # the file system has no hard links
        except FileNotFoundError:
            self._undo.append(lambda: target.unlink(missing_ok=True))
        else:
            self._undo.append(lambda: old.replace(target))

    async def restore(self) -> None:
        """Restore the files that were replaced, since the command failed."""
        while self._undo:
            try:
                self._undo[-1]()
            except OSError as error:
                self._keep = True
                message = (
                    f"A local file could not be restored: {error}. Files that were replaced are in "
                    f"{self._directory / 'old'}."
                )
                raise FileException(message) from error
            self._undo.pop()
        self._keep = False

    def _incoming(self, name: str) -> Path:
        return self._directory / "new" / name

    def _make(self, directory: Path) -> None:
        """Create a directory and its parents, and note which ones are new."""
        missing: list[Path] = []
        for each in (directory, *directory.parents):
            if each.is_dir():
                break
            missing.append(each)
        for each in reversed(missing):
            with suppress(FileExistsError):
                each.mkdir()
                self._made.append(each)

    def _sync(self) -> None:
        """Make the names of the files durable."""
        if WINDOWS:
            return
        above = {each.parent for each in self._made}
        for directory in {(self._base / name).parent for name in self._names} | above:
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _reported(path: Path) -> Generator[None]:
    """Turn errors of the file system into FennFlow's."""
    try:
        yield
    except OSError as error:
        message = (
            f"{path} cannot be written: {error.strerror or error}. No local file was replaced, and "
            "the store is unchanged."
        )
        raise FileException(message) from error
