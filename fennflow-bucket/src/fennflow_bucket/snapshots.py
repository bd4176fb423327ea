"""Snapshots: the state as gzipped lines of JSON, written and read without holding it in memory."""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar, cast

from fennflow_bucket.log import FORMAT, check_format
from fennflow_bucket.rows import dumps
from fennflow_bucket.state import TABLES, Frozen, Position, State

R = TypeVar("R")

ROWS_AT_ONCE = 2000
CHUNK = 1 << 20
"""How many bytes of compressed lines are sent at a time."""
FED_AT_ONCE = 1 << 17
"""How many bytes of compressed lines are read at a time."""
GZIP = 31
"""For zlib: gzip, with the largest window."""

InThread = Callable[[Callable[[], R]], Awaitable[R]]


async def chunks(frozen: Frozen, in_thread: InThread[bytes]) -> AsyncIterator[bytes]:
    """Return the bytes of a snapshot.

    Args:
        frozen: the state.
        in_thread: runs a blocking function in a thread.
    """
    blocks = _blocks(frozen)
    while block := await in_thread(lambda: next(blocks, b"")):
        yield block


def _blocks(frozen: Frozen) -> Iterator[bytes]:
    compressor = zlib.compressobj(level=1, wbits=GZIP)
    position = frozen.position
    header = {
        "format": FORMAT,
        "position": position.number,
        "digest": f"{position.digest:x}",
        "time": position.time,
        "last": position.last,
    }
    block = bytearray(compressor.compress(f"{dumps(header)}\n".encode()))
    count = 0
    for lines in frozen.lines(ROWS_AT_ONCE):
        count += len(lines)
        block += compressor.compress("".join(f"{line}\n" for line in lines).encode())
        if len(block) >= CHUNK:
            yield bytes(block)
            block.clear()
    block += compressor.compress(f"{dumps({'rows': count})}\n".encode())
    block += compressor.flush()
    yield bytes(block)


class Loading:
    """Reads a snapshot into the state, in one transaction that the caller ends.

    Args:
        state: the state that is replaced.
        name: the name of the snapshot, for errors.
    """

    def __init__(self, state: State, name: str) -> None:
        self._state = state
        self._name = name
        self._decompressor = zlib.decompressobj(wbits=GZIP)
        self._rest = b""
        self._header: dict[str, object] | None = None
        self._count = 0
        self._end: int | None = None
        state.clear()

    def feed(self, chunk: bytes) -> None:
        """Read some bytes of the snapshot.

        Raises:
            ConfigException: a newer version of FennFlow wrote it.
            DAMAGE: it is damaged.
        """
        # In small steps: chunks of a large file have several MiB, and grow many times when
        # decompressed.
        for start in range(0, len(chunk), FED_AT_ONCE):
            self._feed(chunk[start : start + FED_AT_ONCE])

    def _feed(self, chunk: bytes) -> None:
        try:
            text = self._rest + self._decompressor.decompress(chunk)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        *lines, self._rest = text.split(b"\n")
        rows: list[tuple[str, list[object]]] = []
        for line in lines:
            value = json.loads(line)
            if self._header is None:
                check_format(value, self._name)
                self._header = value
            elif isinstance(value, dict):
                self._end = cast("dict[str, int | None]", value).get("rows")
            elif value[0] not in TABLES:
                message = f"it has rows of an unknown table {value[0]!r}"
                raise ValueError(message)
            else:
                rows.append((line.decode(), value))
        if rows:
            self._count += len(rows)
            self._state.fill(rows)

    def finish(self, number: int, size: int) -> Position:
        """Return the position of the snapshot once it is complete.

        Args:
            number: the position in its name.
            size: of the snapshot, in bytes.

        Raises:
            DAMAGE: it is damaged.
        """
        header = self._header
        if header is None or self._rest or self._end != self._count:
            message = "it is not complete"
            raise ValueError(message)
        self._state.filled()
        if f"{self._state.digest:x}" != header["digest"]:
            message = "its rows are not the ones with which it was written"
            raise ValueError(message)
        time, last = header["time"], header["last"]
        if header["position"] != number or not isinstance(time, int) or not isinstance(last, str):
            message = f"it is the snapshot of position {header['position']}"
            raise ValueError(message)
        return Position(number, self._state.digest, time, last, number, size)
