"""Files of the filesystem that are open."""

from __future__ import annotations

from contextlib import closing
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

from fsspec.spec import AbstractBufferedFile

from fennflow.exceptions import ObjectChangedException, TransactionException

if TYPE_CHECKING:
    from types import TracebackType

    from fennflow_fsspec.filesystem import FennFlowFileSystem

_Base: Any = AbstractBufferedFile

IN_MEMORY = 8 << 20
"""Bytes of a file that is written before they go to a temporary file."""


class FennFlowFile(_Base):  # type: ignore[misc]
    """A file that is open: read in parts, or written when it is closed.

    What is written belongs to the transaction in which it was opened. If an exception leaves its block,
    or it is never closed, nothing of it is stored.
    """

    def __init__(self, fs: FennFlowFileSystem, path: str, mode: str = "rb", **kwargs: Any) -> None:
        self._written: Any = None
        self._level = fs.transactions.level
        base: Any = super()
        base.__init__(fs, path, mode, **kwargs)

    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes
        data, info = self.fs.read_part(self.path, start, end)
        if self.fs.content_of(info) != self.fs.content_of(self.details):
            message = f"{self.path} was changed while it was read. Open it again."
            raise ObjectChangedException(message)
        return data

    def _initiate_upload(self) -> None:
        self._written = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 - closed by discard()
        if self.mode == "ab" and self.fs.isfile(self.path):
            self._written.write(self.fs.cat_file(self.path))

    def _upload_chunk(self, final: bool = False) -> bool:  # noqa: FBT001, FBT002 - as fsspec calls it
        self._written.write(self.buffer.getvalue())
        if final and self.autocommit:
            self.commit()
        return True

    def commit(self) -> None:
        """Store what was written.

        Raises:
            TransactionException: the transaction in which the file was opened has ended.
        """
        with closing(self._written):
            self._check_level()
            self._written.seek(0)
            self.fs.store(self.path, self._written, create=self.mode == "xb")

    def _check_level(self) -> None:
        level = self._level
        if level is not None and not level.usable:
            message = (
                f"The transaction in which {self.path} was opened for writing has ended, so it was "
                "not stored. Close files before the transaction ends."
            )
            raise TransactionException(message)

    def discard(self) -> None:
        """Store nothing."""
        if self._written is not None:
            self._written.close()
        self.forced = True  # so that close() stores nothing either

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_value is not None and self.mode != "rb":
            self.discard()
        self.close()

    def __del__(self) -> None:
        """Store nothing of what was not closed."""
        self.discard()
