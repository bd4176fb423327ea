"""Files as Django hands them out."""

from __future__ import annotations

import io
from collections.abc import Callable
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any, cast

from django.conf import settings
from django.core.files.base import File
from typing_extensions import Buffer, override

from fennflow.exceptions import ObjectChangedException

if TYPE_CHECKING:
    from types import TracebackType

    from fennflow.responses import ObjectInfo

    AnyFile = File[Any]
else:
    AnyFile = File  # it takes no type when it runs

BLOCK = 8 << 20
"""Bytes that are requested at a time; a file that is not larger is compared with its SHA-256."""

Read = Callable[[str, int, int | None], "tuple[bytes, ObjectInfo]"]


class _Blocks(io.RawIOBase):
    """The bytes of a file, requested block by block, so that nothing is held open in between.

    Args:
        name: of the file.
        info: what the catalog says of it.
        read: returns the bytes from a position to another one, or all of them, and what the catalog
            says of the file then.
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


class StoredFile(AnyFile):
    """A file that is open for reading.

    Args:
        name: of the file.
        mode: `rb`, or `r` for text.
        info: what the catalog says of it.
        read: returns parts of it.
    """

    def __init__(self, name: str, mode: str, info: ObjectInfo, read: Read) -> None:
        if mode.replace("t", "") not in {"rb", "r"}:
            message = f"A stored file can be opened for reading or writing, not as {mode!a}."
            raise ValueError(message)
        file: Any = io.BufferedReader(_Blocks(name, info, read), 1 << 16)
        super().__init__(file if "b" in mode else io.TextIOWrapper(file, "utf-8"), name)
        self.mode = mode
        self.size = info.size


class WrittenFile(AnyFile):
    """A file that is open for writing: it is stored when it is closed.

    If an exception leaves its block, it is not.

    Args:
        name: of the file.
        mode: `wb`, or `w` for text.
        put: stores it.
    """

    def __init__(self, name: str, mode: str, put: Callable[..., str]) -> None:
        self._bytes = SpooledTemporaryFile(max_size=settings.FILE_UPLOAD_MAX_MEMORY_SIZE)  # noqa: SIM115 - closed by close()
        file: Any = self._bytes
        super().__init__(file if "b" in mode else io.TextIOWrapper(file, "utf-8"), name)
        self.mode = mode
        self._put = put
        self._open = True

    @override
    def close(self) -> None:
        if self._open:
            self._open = False
            cast("Any", self.file).flush()
            self._bytes.seek(0)
            self._put(self.name, File(cast("Any", self._bytes)), overwrite=True)
            self._bytes.close()

    @override
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc_value is not None and self._open:
            self._open = False
            self._bytes.close()
        self.close()
