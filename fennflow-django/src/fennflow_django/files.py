"""The files that the storage returns to Django."""

from __future__ import annotations

import io
from collections.abc import Callable
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any, cast

from django.conf import settings
from django.core.files.base import File
from typing_extensions import Buffer, override

from fennflow.exceptions import ObjectChangedException
from fennflow.sync.writers import Discardable

if TYPE_CHECKING:
    from fennflow.responses import ObjectInfo

    AnyFile = File[Any]
else:
    AnyFile = File  # it is not generic at run time

BLOCK = 8 << 20
"""How many bytes are requested at a time; a file up to this size is compared with its SHA-256."""

Read = Callable[[str, int, int | None], "tuple[bytes, ObjectInfo]"]


class _Blocks(io.RawIOBase):
    """The bytes of a file, requested block by block, so that nothing stays open in between.

    Args:
        name: of the file.
        info: the catalog's information about it.
        read: returns a range of bytes, or all of them, and the catalog's information about the file
            at that time.
    """

    def __init__(self, name: str, info: ObjectInfo, read: Read) -> None:
        super().__init__()
        self._name = name
        self._info = info
        self._read = read
        self._position = 0
        self._block = b""
        self._begin = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._position

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        if base + offset < 0:
            message = f"seek({offset}, {whence}) leads before the beginning of {self._name}."
            raise ValueError(message)
        self._position = base + offset
        return self._position

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        target = memoryview(buffer).cast("B")
        if self._position >= self._info.size:
            return 0
        offset = self._position - self._begin
        if not 0 <= offset < len(self._block):
            self._fetch()
            offset = self._position - self._begin
        part = self._block[offset : offset + len(target)]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _fetch(self) -> None:
        size = self._info.size
        begin = self._position // BLOCK * BLOCK
        end = None if size <= BLOCK else min(begin + BLOCK, size)
        block, info = self._read(self._name, begin, end)
        if _content(info) != _content(self._info):
            message = f"{self._name} was changed while it was read. Open it again."
            raise ObjectChangedException(message)
        self._block, self._begin = block, begin


def _content(info: ObjectInfo) -> tuple[int, str]:
    return info.size, info.sha256 or info.etag


class StorageFile(Discardable, AnyFile):
    """A file of a storage that is open: read in parts, or stored when it is closed.

    A written file is not stored if an exception leaves its block.

    Args:
        name: of the file.
        mode: `rb` or `wb`; `r` or `w` for text.
        read: returns parts of it.
        look: returns the catalog's information about it.
        put: stores it.
    """

    def __init__(
        self,
        name: str,
        mode: str,
        *,
        read: Read,
        look: Callable[[str], ObjectInfo],
        put: Callable[..., str],
    ) -> None:
        self._read, self._look, self._put = read, look, put
        self._written: Any = None
        super().__init__(None, name)
        self._begin(mode)

    def _begin(self, mode: str) -> None:
        kind = mode.replace("t", "").replace("b", "")
        file: Any
        if kind == "r":
            name = str(self)
            self.info = info = self._look(name)
            self.size = info.size
            file = io.BufferedReader(_Blocks(name, info, self._read), 1 << 16)
        elif kind == "w":
            vars(self).pop("size", None)  # it is computed when it is needed
            file = SpooledTemporaryFile(max_size=settings.FILE_UPLOAD_MAX_MEMORY_SIZE)  # noqa: SIM115 - closed by close()
            self._written = file
        else:
            message = f"A stored file can be opened for reading or writing, not as {mode!a}."
            raise ValueError(message)
        self.mode = mode
        self.file = file if "b" in mode else io.TextIOWrapper(file, "utf-8")

    @override
    def open(self, mode: str | None = None, *args: Any, **kwargs: Any) -> StorageFile:
        """Go to the beginning; a closed file is opened again, in its current version."""
        if not self.closed:
            self.seek(0)
        else:
            self._begin(mode or self.mode)
        return self

    @override
    def close(self) -> None:
        written, self._written = self._written, None
        if written is None:
            super().close()
            return
        with written:
            cast("Any", self.file).flush()
            written.seek(0)
            self._put(self.name, File(written), overwrite=True)

    @override
    def discard(self) -> None:
        self._written = None
