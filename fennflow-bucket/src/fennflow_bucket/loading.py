"""The part of a replica that loads the catalog, writes snapshots, and deletes what they replace.

It implements rules L6, L7 and L8.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

from typing_extensions import override

from fennflow.connectors import StoredObject
from fennflow.exceptions import (
    BackendUnavailableException,
    NoSuchKeyException,
    PreconditionFailedException,
)
from fennflow_bucket.clocks import SECOND, Moment
from fennflow_bucket.following import READ_AT_ONCE, Follower
from fennflow_bucket.log import BOUNDARY, DAMAGE, LOG, SNAPSHOT, LogEntry, load_entry
from fennflow_bucket.snapshots import Loading, chunks
from fennflow_bucket.state import Position

logger = logging.getLogger("fennflow")

LOADS = 10
"""How often a load starts over before the catalog is reported as unavailable."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Consecutive entries of the log.

    Args:
        before: the bytes of the entry before them; None if it was removed.
        entries: their bytes and their contents.
    """

    before: bytes | None
    entries: Sequence[tuple[bytes, LogEntry]]


class Loader(Follower):
    """A follower that can load the catalog, and writes snapshots so that later loads are short."""

    # --- loading (L6) ------------------------------------------------------------------------

    @override
    async def _load(self, *, opening: bool = False) -> None:
        for _ in range(LOADS):
            start = Moment.now()
            try:
                if await self._load_once(opening=opening) and start.age() <= self._limits.trusted:
                    self._contact = start
                    return
            except (NoSuchKeyException, PreconditionFailedException):
                continue  # the snapshot was deleted meanwhile: there is a newer one
        message = (
            f"The catalog {self._log.namespace}/{self._log.root} changed faster than it could be "
            f"read, {LOADS} times. Nothing was changed; try again."
        )
        raise BackendUnavailableException(message)

    async def _load_once(self, *, opening: bool) -> bool:
        """Read a snapshot, unless the local state can be used, and all entries after it.

        Returns:
            whether there was no gap.
        """
        # The order matters: a boundary is created after its snapshot, and only a newer snapshot
        # replaces that.
        boundary = await self._boundary()
        snapshots = await self._log.list(SNAPSHOT)
        newest = max(snapshots, default=-1)
        if boundary > newest:
            name = f"{self._log.namespace}/{self._log.name(SNAPSHOT, boundary)}"
            reason = f"{name} is missing, and entries before it may have been deleted"
            raise self._diverge(boundary + 1, reason)
        if not await self._continues(boundary, opening=opening):
            if newest >= 0:
                await self._load_snapshot(newest, snapshots[newest])
            else:
                await self._forget()
        state = self._opened()
        if newest > state.position.snapshot:
            size = snapshots[newest].size
            state.position = replace(state.position, snapshot=newest, snapshot_bytes=size)
        return await self._load_entries()

    async def _continues(self, boundary: int, *, opening: bool) -> bool:
        """Return whether the local state belongs to this log, and all entries after it still exist.

        Raises:
            CatalogDivergedException: it does not, although this process has used it.
        """
        position = self.position
        if position.number < 0:
            return False
        if position.number < boundary:
            return False
        body = await self._log.read(position.number)
        if body is not None and sha256(body).hexdigest() == position.last:
            return True
        if opening or position.number <= await self._boundary():
            return False  # it may have been deleted
        raise self._diverge(
            position.number, "it was removed or replaced after this process had applied it"
        )

    async def _boundary(self) -> int:
        """Return the position up to which entries may have been deleted."""
        return max(await self._log.list(BOUNDARY), default=-1)

    async def _forget(self) -> None:
        """Reset to an empty state."""
        state = self._opened()
        if state.position == Position():
            return

        def clear() -> None:
            state.begin()
            try:
                state.clear()
                state.filled()
            except BaseException:
                state.rollback()
                raise
            state.commit(Position())

        await self._thread(clear)

    async def _load_snapshot(self, number: int, stored: StoredObject) -> None:
        state = self._opened()
        name = f"{self._log.namespace}/{stored.location.key}"

        def begin() -> Loading:
            state.begin()
            return Loading(state, name)

        loading = await self._thread(begin)
        try:
            async for chunk in self._log.stream(stored):
                await self._thread(partial(loading.feed, chunk))
            position = await self._thread(lambda: loading.finish(number, stored.size))
            await self._thread(lambda: state.commit(position))
        except BaseException as error:
            await self._thread(state.rollback)
            if isinstance(error, DAMAGE):
                raise self._diverge(number + 1, f"{name} is damaged: {error!r}") from error
            raise

    async def _load_entries(self) -> bool:
        """Apply all entries after the state; return whether there was no gap."""
        listed = await self._log.list(LOG, after=self.position.number)
        last = max(listed, default=self.position.number)
        while (left := last - self.position.number) > 0:
            count = min(left, READ_AT_ONCE)
            bodies = await self._read_many(self.position.number + 1, count)
            if len(bodies) < count:
                return False
            await self._apply(bodies)
        while (body := await self._log.read(self.position.number + 1)) is not None:
            await self._apply([body])
        return True

    # --- the feed of commits -----------------------------------------------------------------

    async def current_position(self) -> Position:
        """Return the end of the log at a moment not before the call (L9)."""
        self._check()
        await self._current()
        return self.position

    async def first_kept(self) -> int:
        """Return the position of the first entry that is not deleted."""
        try:
            return await self._boundary() + 1
        except Exception as error:
            raise self._as_backend_error(error) from error

    async def entries(self, first: int, last: int) -> Entries | None:
        """Read some of the applied entries from `first` to `last` again.

        Returns:
            None if `first` may have been deleted.

        Raises:
            CatalogDivergedException: an entry is now missing or damaged.
            BackendUnavailableException: the store cannot be reached.
        """
        count = min(last - first + 1, READ_AT_ONCE)
        try:
            before = await self._log.read(first - 1) if first else None
            bodies = await self._read_many(first, count)
            # The boundary is read afterwards: it is created before anything up to it is deleted or,
            # by a late request, created again. So the entries that were read after it are the log
            # (L8).
            boundary = await self._boundary()
        except Exception as error:
            raise self._as_backend_error(error) from error
        if boundary >= first:
            return None
        if len(bodies) < count:
            raise self._diverge(first + len(bodies), "it was removed")
        found: list[tuple[bytes, LogEntry]] = []
        for number, body in enumerate(bodies, first):
            try:
                found.append((body, load_entry(body, self._log.name(LOG, number))))
            except DAMAGE as error:
                raise self._diverge(number, f"it is not an entry of a log ({error!r})") from error
        return Entries(None if boundary == first - 1 else before, found)

    # --- snapshots and deletion (L7, L8) -----------------------------------------------------

    @property
    def _snapshot_due(self) -> bool:
        position, limits = self.position, self._limits
        entries = position.number - position.snapshot
        most = max(limits.snapshot_bytes, position.snapshot_bytes // 2)
        return entries >= limits.snapshot_entries or position.log_bytes > most

    async def _tidy(self) -> None:
        """Write a snapshot unless another process has, and delete what old snapshots have replaced."""
        try:
            snapshots = await self._log.list(SNAPSHOT)
            newest = max(snapshots, default=-1)
            if newest > self.position.snapshot:
                await self._noted(newest, snapshots[newest].size)
            if self._snapshot_due:
                await self._write_snapshot()
                await self.collect()
        except Exception as error:  # noqa: BLE001 - logged, and repeated after a later entry
            logger.warning(
                "No snapshot of the catalog %s/%s was written, or old entries were not deleted: %r. "
                "It is tried again after the next transaction.",
                self._log.namespace,
                self._log.root,
                error,
            )

    async def _write_snapshot(self) -> None:
        state = self._opened()
        frozen = await self._thread(state.frozen)
        try:
            sizes: list[int] = []

            async def counted() -> AsyncIterator[bytes]:
                async for chunk in chunks(frozen, self._thread):
                    sizes.append(len(chunk))
                    yield chunk

            with suppress(PreconditionFailedException):
                await self._log.upload_snapshot(frozen.position.number, counted())
            await self._noted(frozen.position.number, sum(sizes))
        finally:
            await self._thread(frozen.close)

    async def _noted(self, number: int, size: int) -> None:
        """Note a snapshot; the size of the log is counted from it."""
        state = self._opened()
        async with self._turn:
            if number > state.position.snapshot:
                state.position = replace(
                    state.position, snapshot=number, snapshot_bytes=size, log_bytes=0
                )

    async def collect(self) -> None:
        """Delete entries and snapshots that an old snapshot has replaced (L8).

        Unfinished uploads of snapshots that a newer one has replaced are aborted at the same age,
        since the processes that began them have died.

        Raises:
            BaseConnectorException: not all could be deleted; the rest is deleted next time.
        """
        snapshots = await self._log.list(SNAPSHOT)
        # Use only its age by the store's clock: in an idle catalog the last entry is old.
        before = self._clock.now() / SECOND - self._limits.retention
        old = [
            number
            for number, stored in snapshots.items()
            if stored.modified_at is not None and stored.modified_at.timestamp() < before
        ]
        if old:
            await self._delete_replaced(max(old), snapshots)
        await self._log.abort_uploads(until=max(snapshots, default=-1), before=before)

    async def _delete_replaced(self, last: int, snapshots: Mapping[int, StoredObject]) -> None:
        """Delete the objects that a sufficiently old snapshot has replaced."""
        boundaries = await self._log.list(BOUNDARY)
        if last > max(boundaries, default=-1):
            with suppress(PreconditionFailedException):
                await self._log.create(BOUNDARY, last, b"")
        entries = await self._log.list(LOG)
        await self._log.delete([each for number, each in entries.items() if number <= last])
        await self._log.delete([each for number, each in snapshots.items() if number < last])
        await self._log.delete([each for number, each in boundaries.items() if number < last])
