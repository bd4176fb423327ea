"""Open files of the filesystem."""

from __future__ import annotations

import io
import logging
import shutil
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

from fsspec.spec import AbstractBufferedFile
from typing_extensions import Buffer, override

from fennflow.exceptions import ObjectChangedException, TransactionException
from fennflow.printable import printable
from fennflow.sync.writers import Discardable

if TYPE_CHECKING:
    from fennflow_fsspec.filesystem import FennFlowFileSystem

logger = logging.getLogger("fennflow")

_Base: Any = AbstractBufferedFile

IN_MEMORY = 8 << 20
"""How many bytes of a written file are held in memory before a temporary file is used."""


class FennFlowFile(Discardable, _Base):  # type: ignore[misc]
    """A file that is open: read in parts, or written when it is closed.

    A written file belongs to the transaction in which it was opened. If an exception leaves its
    block, or it is never closed, it is not stored.
    """

    def __init__(self, fs: FennFlowFileSystem, path: str, mode: str = "rb", **kwargs: Any) -> None:
        self._written: Any = None
        self._discarded = False
        self._level = fs.transactions.level
        base: Any = super()
        base.__init__(fs, path, mode, **kwargs)
        if mode == "ab" and fs.isfile(path):
            self.loc = fs.size(path)

    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes
        data, info = self.fs.read_part(self.path, start, end)
        if self.fs.content_of(info) != self.fs.content_of(self.details):
            message = f"{self.path} was changed while it was read. Open it again."
            raise ObjectChangedException(message)
        return data

    def write(self, data: Buffer) -> int:
        """Write; after `discard()` this does nothing, so that wrappers can still be closed."""
        if self._discarded:
            return memoryview(data).nbytes
        base: Any = super()
        count: int = base.write(data)
        return count

    def _initiate_upload(self) -> None:
        self._written = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 - closed by discard()

    def _upload_chunk(self, final: bool = False) -> bool:  # noqa: FBT001, FBT002 - as fsspec calls it
        self._written.write(self.buffer.getvalue())
        if final and self.autocommit:
            self.commit()
        return True

    def commit(self) -> None:
        """Store the file.

        Raises:
            TransactionException: the transaction in which the file was opened has ended.
        """
        with self._written as written:
            self._check_level()
            written.seek(0)
            if self.mode == "ab":
                self._append(written)
            else:
                self.fs.store(self.path, written, create=self.mode == "xb")

    def _append(self, written: Any) -> None:
        # The existing content is read in the unit of work that writes, so that `validate_reads`
        # covers it.
        with self.fs.transactions.together(), SpooledTemporaryFile(max_size=IN_MEMORY) as whole:
            if self.fs.isfile(self.path):
                whole.write(self.fs.cat_file(self.path))
            shutil.copyfileobj(written, whole)
            whole.seek(0)
            self.fs.store(self.path, whole, create=False)

    def _check_level(self) -> None:
        level = self._level
        if level is not None and not level.usable:
            message = (
                f"The transaction in which {self.path} was opened for writing has ended, so it was "
                "not stored. Close files before the transaction ends."
            )
            raise TransactionException(message)

    @override
    def discard(self) -> None:
        if self._written is not None:
            self._written.close()
        self._discarded = self.forced = True  # so that close() does not store it, either

    @override
    def __del__(self) -> None:
        if self.writable() and not self._discarded:
            logger.warning(
                "%s was written, but never closed, so it was not stored.", printable(self.path)
            )
        self.discard()


class CompressedFile(Discardable, io.BufferedIOBase):
    """A file that is written through a compressor, and closed with it.

    Args:
        file: the file that is open for writing.
        compressor: writes to it.
    """

    def __init__(self, file: FennFlowFile, compressor: Any) -> None:
        super().__init__()
        self._file = file
        self._compressor = compressor

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Buffer, /) -> int:
        count: int = self._compressor.write(data)
        return count

    @override
    def discard(self) -> None:
        self._file.discard()

    @override
    def close(self) -> None:
        if not self.closed:
            super().close()
            with self._file:
                self._compressor.close()


class TextFile(Discardable, io.TextIOWrapper):
    """A file that is open for writing text; its name is that of the `FennFlowFile`."""

    buffer: FennFlowFile | CompressedFile  # type: ignore[assignment]

    @override
    def discard(self) -> None:
        self.buffer.discard()
